/* One version of the tiles that two_products.c, which includes this file, and convolutions.c multiply in where there is much
   to multiply, and of the product for many rows of activations.

   Those are bound by multiply-adds, not by reading. The weights are packed, for DEPTH inputs at a time, in panels of
   PANEL outputs, input after input: one vector has as many outputs. Then HIGH rows of activations at a time meet one
   panel after the other, their sums in registers and the packed weights in the second-level cache (Goto and van de Geijn
   2008). The rows are copied side by side first: where they lie, some lengths would put all on the same lines of the
   first-level cache. (With vectors of four numbers and without fused multiply-adds this is slower than the tiles there.)
*/

/* y[t, j] = sum_k rows[t, k] panel[k, j] for `high` rows and `vectors` of the panel, rows of y `stride` apart; to what y
   has if `begun`, else to bias[t], which may be NULL. */
INLINE TARGET void NAMED(high_tile, VERSION)(const float *panel, const float *rows, long depth, float *y, long stride,
                                             int begun, const float *bias, int high, int vectors) {
    VEC acc[HIGH][2];
#pragma GCC unroll 16
    for (int t = 0; t < high; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            acc[t][v] = (VEC){0} + (bias ? bias[t] : 0);
            if (begun)
                acc[t][v] = *(const VEC *)(y + t * stride + v * LANES);
        }
    for (long k = 0; k < depth; k++) {
        VEC u[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            u[v] = *(const VEC *)(panel + k * PANEL + v * LANES);
#pragma GCC unroll 16
        for (int t = 0; t < high; t++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                acc[t][v] += u[v] * rows[t * ROW + k];
    }
#pragma GCC unroll 16
    for (int t = 0; t < high; t++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            *(VEC *)(y + t * stride + v * LANES) = acc[t][v];
}

/* Functions of their own: in one large function the compiler's registers do not suffice. */
#define HIGH_TILE(h)                                                                                                   \
    static TARGET __attribute__((noinline)) void NAMED(JOIN(high, h), VERSION)(                                        \
        const float *panel, const float *rows, long depth, float *y, long stride, int begun, const float *bias,        \
        long width) {                                                                                                  \
        if (width > LANES)                                                                                             \
            NAMED(high_tile, VERSION)(panel, rows, depth, y, stride, begun, bias, h, 2);                               \
        else                                                                                                           \
            NAMED(high_tile, VERSION)(panel, rows, depth, y, stride, begun, bias, h, 1);                               \
    }
#define HIGH_NAME(h) NAMED(JOIN(high, h), VERSION)

HIGH_TILE(1) HIGH_TILE(2) HIGH_TILE(3) HIGH_TILE(4)
#if HIGH > 4
HIGH_TILE(5) HIGH_TILE(6)
#endif
#if HIGH > 6
HIGH_TILE(7) HIGH_TILE(8) HIGH_TILE(9) HIGH_TILE(10) HIGH_TILE(11) HIGH_TILE(12)
#endif

static void (*const NAMED(high_tiles, VERSION)[])(const float *, const float *, long, float *, long, int,
                                                  const float *, long) = {
    NULL, HIGH_NAME(1), HIGH_NAME(2), HIGH_NAME(3), HIGH_NAME(4),
#if HIGH > 4
    HIGH_NAME(5), HIGH_NAME(6),
#endif
#if HIGH > 6
    HIGH_NAME(7), HIGH_NAME(8), HIGH_NAME(9), HIGH_NAME(10), HIGH_NAME(11), HIGH_NAME(12),
#endif
};

#undef HIGH_TILE
#undef HIGH_NAME

#if LANES > 4
/* A square of LANES x LANES weights, rows p->depth apart, to columns PANEL apart. */
INLINE TARGET void NAMED(turn, VERSION)(const float *from, long depth, float *to) {
#if LANES == 16
    __m512 quarters[16];
#pragma GCC unroll 4
    for (int g = 0; g < 16; g += 4) {
        __m512 r0 = _mm512_loadu_ps(from + g * depth), r1 = _mm512_loadu_ps(from + (g + 1) * depth);
        __m512 r2 = _mm512_loadu_ps(from + (g + 2) * depth), r3 = _mm512_loadu_ps(from + (g + 3) * depth);
        __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1)), b = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
        __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3)), d = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
        quarters[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        quarters[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        quarters[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        quarters[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512 *q = quarters + c;
        __m512 a = _mm512_shuffle_f32x4(q[0], q[4], 0x88), b = _mm512_shuffle_f32x4(q[8], q[12], 0x88);
        __m512 d = _mm512_shuffle_f32x4(q[0], q[4], 0xdd), e = _mm512_shuffle_f32x4(q[8], q[12], 0xdd);
        _mm512_storeu_ps(to + c * PANEL, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_storeu_ps(to + (4 + c) * PANEL, _mm512_shuffle_f32x4(d, e, 0x88));
        _mm512_storeu_ps(to + (8 + c) * PANEL, _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_storeu_ps(to + (12 + c) * PANEL, _mm512_shuffle_f32x4(d, e, 0xdd));
    }
#else
    __m256 halves[8];
#pragma GCC unroll 2
    for (int g = 0; g < 8; g += 4) {
        __m256 r0 = _mm256_loadu_ps(from + g * depth), r1 = _mm256_loadu_ps(from + (g + 1) * depth);
        __m256 r2 = _mm256_loadu_ps(from + (g + 2) * depth), r3 = _mm256_loadu_ps(from + (g + 3) * depth);
        __m256 a = _mm256_unpacklo_ps(r0, r1), b = _mm256_unpackhi_ps(r0, r1);
        __m256 c = _mm256_unpacklo_ps(r2, r3), d = _mm256_unpackhi_ps(r2, r3);
        halves[g] = _mm256_shuffle_ps(a, c, 0x44);
        halves[g + 1] = _mm256_shuffle_ps(a, c, 0xee);
        halves[g + 2] = _mm256_shuffle_ps(b, d, 0x44);
        halves[g + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        _mm256_storeu_ps(to + c * PANEL, _mm256_permute2f128_ps(halves[c], halves[4 + c], 0x20));
        _mm256_storeu_ps(to + (4 + c) * PANEL, _mm256_permute2f128_ps(halves[c], halves[4 + c], 0x31));
    }
#endif
}

/* The weights [n, n + width) x [k, k + depth): entry (j, d) to panel[d PANEL + j], zeros behind width. */
static TARGET void NAMED(pack, VERSION)(const struct product *p, long n, long width, long k, long depth, float *panel) {
    for (long j = 0; j < PANEL; j += LANES) {
        const float *w = p->weight + (n + j) * p->depth + k;
        const long there = width - j < LANES ? width - j : LANES;
        long d = 0;
        for (; there == LANES && d + LANES <= depth; d += LANES)
            NAMED(turn, VERSION)(w + d, p->depth, panel + d * PANEL + j);
        for (; d < depth; d++)
            for (long s = 0; s < LANES; s++)
                panel[d * PANEL + j + s] = s < there ? w[s * p->depth + d] : 0;
    }
}

/* The sums of a tile to their places in y, with what is to be added; `begun`: y has those of the inputs before. */
static TARGET void NAMED(finish, VERSION)(const struct product *p, const float *sums, long n, long width, long b,
                                          int high, int begun) {
    for (int t = 0; t < high; t++, sums += PANEL) {
        float *y = p->y + (b + t) * p->y_stride + n;
        const float *add = begun ? y : p->add ? p->add + (b + t) * p->add_stride + n : NULL;
        const float *bias = begun || !p->bias ? NULL : p->bias + n;
        long j = 0;
        for (; j + LANES <= width; j += LANES) {
            VEC sum = *(const VEC *)(sums + j);
            if (add)
                sum += *(const VEC *)(add + j);
            if (bias)
                sum += *(const VEC *)(bias + j);
            *(VEC *)(y + j) = sum;
        }
        for (; j < width; j++)
            y[j] = sums[j] + (add ? add[j] : 0) + (bias ? bias[j] : 0);
    }
}

/* Outputs [start, stop) of all rows. */
static TARGET void NAMED(many_rows, VERSION)(const struct product *p, long start, long stop) {
    float packed[DEPTH * WIDTH] __attribute__((aligned(64))), rows[HIGH * ROW] __attribute__((aligned(64)));
    float sums[HIGH * PANEL] __attribute__((aligned(64)));
    const long tiles = (p->rows + HIGH - 1) / HIGH, deepest = p->depth < DEPTH ? p->depth + !p->depth : DEPTH;
    const long most = DEPTH * WIDTH / deepest / PANEL * PANEL; /* outputs that have room */
    for (; start < stop; start += most) {
        const long end = stop - start < most ? stop : start + most;
        for (long k = 0; k == 0 || k < p->depth; k += DEPTH) {
            const long depth = p->depth - k < DEPTH ? p->depth - k : DEPTH;
            for (long n = start; n < end; n += PANEL)
                NAMED(pack, VERSION)(p, n, end - n, k, depth, packed + (n - start) * depth);
            for (long tile = 0; tile < tiles; tile++) {
                const long b = p->rows * tile / tiles;
                const int high = (int)(p->rows * (tile + 1) / tiles - b);
                for (int t = 0; t < high; t++)
                    memcpy(rows + t * ROW, p->a + (b + t) * p->a_stride + k, (size_t)depth * sizeof(float));
                for (long n = start; n < end; n += PANEL) {
                    const long width = end - n < PANEL ? end - n : PANEL;
                    NAMED(high_tiles, VERSION)[high](packed + (n - start) * depth, rows, depth, sums, PANEL, 0, NULL, width);
                    NAMED(finish, VERSION)(p, sums, n, width, b, high, k > 0);
                }
            }
        }
    }
}
#endif
