/* Two products with one intermediate, float32:

       b i, r i -> b r ; b r, o r -> b o                        y = (x first') second' + bias

   with a gather before, h = x[order[:r]] + x[order[r:]] first', or the intermediate beside the result (stacked) and
   perhaps a gather behind, y = [h, h second'][place] + bias, or both.

   All weights are row-major (outputs, inputs), so every product is a dot product along contiguous memory. Few rows are
   bound by reading the weights: each weight is read once, a tile of TALL of its rows and WIDE rows of activations at a
   time, and lines of the rows that come next are fetched ahead. The intermediate stays in cache. For MANY rows and more
   see many_rows.c. This file includes itself once for each instruction set; the widest one that the processor has is
   chosen at run time.
*/
#ifndef LANES

#include "scratch.h"
#include "team.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#define X86 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define JOIN(a, b) a##b
#define NAMED(name, version) JOIN(name, version)

enum { OK = 0, NO_MEMORY = 1, INDEX = 2, NO_SUCH_VERSION = 3 };

/* y[b, n] = sum_k weight[n, k] a[b, k] + add[b, n] + bias[n] for n in [start, stop); add and bias may be NULL. */
struct product {
    const float *weight, *a, *add, *bias;
    float *y;
    long rows, depth, a_stride, add_stride, y_stride;
};

/* Streams of memory from which the weights come where there are few rows of activations, and how far ahead, in bytes,
   each is fetched. One stream gives half the bandwidth where the rows of the weight are short. */
enum { STREAMS = 8, AHEAD = 2048 };

/* From MANY rows on, packing the weights pays: DEPTH inputs of WIDTH outputs at a time, or more outputs of fewer inputs.
   ROW: between rows that are copied. */
enum { MANY = 48, DEPTH = 256, WIDTH = 128, ROW = DEPTH + 16 };

typedef void (*product_function)(const struct product *, long start, long stop);

INLINE void store(const struct product *p, long n, long b, float y) {
    if (p->add)
        y += p->add[b * p->add_stride + n];
    if (p->bias)
        y += p->bias[n];
    p->y[b * p->y_stride + n] = y;
}

#ifdef X86
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512vl,fma")))

/* The sum of x's and of y's numbers, a step further: half as many vectors, each with the sums of two side by side. */
INLINE AVX512 __m512 beside(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
}

INLINE AVX512 __m512 beside_pairs(__m512 x, __m512 y) {
    __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
}

INLINE AVX512 __m512 beside_quarters(__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

/* The sums of 16 vectors, for rows n .. n + 3 of the weight and b .. b + 3 of the activations, all at once: a third of the
   work of one by one, which is half of all where the depth is short. */
INLINE AVX512 void store_sums(const struct product *p, long n, long b, const void *accumulators) {
    const __m512(*acc)[4] = accumulators;
    __m512 rows[4];
    for (int t = 0; t < 4; t++)
        rows[t] = beside_pairs(beside(acc[0][t], acc[1][t]), beside(acc[2][t], acc[3][t]));
    __m512 all = beside_quarters(beside_quarters(rows[0], rows[1]), beside_quarters(rows[2], rows[3]));
    float sums[16];
    _mm512_storeu_ps(sums, all);
    for (int t = 0; t < 4; t++) {
        __m128 y = _mm_loadu_ps(sums + 4 * t);
        if (p->add)
            y = _mm_add_ps(y, _mm_loadu_ps(p->add + (b + t) * p->add_stride + n));
        if (p->bias)
            y = _mm_add_ps(y, _mm_loadu_ps(p->bias + n));
        _mm_storeu_ps(p->y + (b + t) * p->y_stride + n, y);
    }
}
#endif

#define LANES 4
#define TALL 4
#define WIDE 2
#define HIGH 4
#define VERSION _portable
#define TARGET
#include "two_products.c"

#ifdef X86
#define LANES 8
#define TALL 4
#define WIDE 2
#define HIGH 6
#define VERSION _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "two_products.c"

#define LANES 16
#define TALL 4
#define WIDE 4
#define HIGH 12
#define VERSION _avx512
#define TARGET AVX512
#include "two_products.c"
#endif

static const product_function products[] = {
    product_portable,
#ifdef X86
    product_avx2,
    product_avx512,
#endif
};

/* The widest version that this processor runs: 0 portable, 1 AVX2 with FMA, 2 AVX-512. */
EXPORT int tdc_version(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

struct call {
    const float *x, *first, *second, *bias;
    const int32_t *order, *place;
    float *y, *gathered, *inner;
    long rows, inputs, rank, outputs, inner_stride;
    int stacked;
    product_function product;
    _Atomic int status;
};

/* y[b, j] = from[b, index[j]] + bias[j] for j in [start, stop) and `rows` rows of both; bias may be NULL. */
INLINE void gather_rows(const float *from, long from_stride, const int32_t *restrict index, const float *restrict bias,
                        float *restrict y, long y_stride, int rows, long start, long stop) {
    for (long j = start; j < stop; j++)
#pragma GCC unroll 4
        for (int b = 0; b < rows; b++)
            y[b * y_stride + j] = bias ? from[b * from_stride + index[j]] + bias[j] : from[b * from_stride + index[j]];
}

/* The same for all rows, without an index from[b, j]; 0 where an index is out of range. Four rows at once are three times
   as fast as one. */
static int gather(const float *from, long from_stride, const int32_t *index, long entries, const float *bias, float *y,
                  long y_stride, long rows, long start, long stop) {
    for (long j = start; index && j < stop; j++)
        if (index[j] < 0 || index[j] >= entries)
            return 0;
    long b = 0;
    for (; index && b + 4 <= rows; b += 4)
        gather_rows(from + b * from_stride, from_stride, index, bias, y + b * y_stride, y_stride, 4, start, stop);
    for (; index && b < rows; b++)
        gather_rows(from + b * from_stride, from_stride, index, bias, y + b * y_stride, y_stride, 1, start, stop);
    for (; b < rows; b++)
        for (long j = start; j < stop; j++)
            y[b * y_stride + j] = from[b * from_stride + j] + (bias ? bias[j] : 0);
    return 1;
}

/* Parts of a phase are groups of 16 outputs: those that share a cache line stay together. */
enum { GROUP = 16 };

static long groups(long n) { return (n + GROUP - 1) / GROUP; }

static long edge(long group, long n) { return group * GROUP < n ? group * GROUP : n; }

/* Groups that are worth a claim: 32 KiB of weights, or as many entries of a gather. */
static long worth_a_claim(long numbers) { return 1 + (1 << 13) / (GROUP * numbers + 1); }

static void gather_input(void *context, long start, long stop) {
    struct call *c = context;
    long i = c->inputs;
    if (!gather(c->x, i, c->order, i, NULL, c->gathered, i, c->rows, edge(start, i), edge(stop, i)))
        c->status = INDEX;
}

static void gather_output(void *context, long start, long stop) {
    struct call *c = context;
    long o = c->outputs;
    if (!gather(c->inner, c->inner_stride, c->place, o, c->bias, c->y, o, c->rows, edge(start, o), edge(stop, o)))
        c->status = INDEX;
}

struct share {
    struct product product;
    product_function run;
    long outputs, blocks; /* of the rows */
};

static void some_outputs(void *context, long start, long stop) {
    struct share *s = context;
    s->run(&s->product, edge(start, s->outputs), edge(stop, s->outputs));
}

/* Of many rows: each part has WIDTH outputs of one block of the rows. */
static void some_rows(void *context, long start, long stop) {
    struct share *s = context;
    for (long part = start; part < stop; part++) {
        struct product p = s->product;
        const long b = p.rows * (part % s->blocks) / s->blocks, n = part / s->blocks * WIDTH;
        p.rows = p.rows * (part % s->blocks + 1) / s->blocks - b;
        p.a += b * p.a_stride;
        p.y += b * p.y_stride;
        p.add = p.add ? p.add + b * p.add_stride : NULL;
        s->run(&p, n, n + WIDTH < s->outputs ? n + WIDTH : s->outputs);
    }
}

static void shared_product(struct team *team, product_function run, long outputs, struct product product) {
    struct share s = {product, run, outputs, 1};
    if (team->threads < 2)
        run(&product, 0, outputs);
    else if (product.rows < MANY)
        team_run(team, some_outputs, &s, groups(outputs), worth_a_claim(product.depth));
    else {
        const long wide = (outputs + WIDTH - 1) / WIDTH, wanted = 4 * team->threads / (wide + !wide) + 1;
        s.blocks = wanted < product.rows / MANY ? wanted : product.rows / MANY;
        team_run(team, some_rows, &s, wide * s.blocks, 1);
    }
}

/* All phases, in turn. With a gather in front, the first r gathered entries pass by the first product. If stacked,
   inner holds intermediate and result side by side, else the intermediate alone. */
static void two_products(void *context, struct team *team) {
    struct call *c = context;
    long r = c->rank, i = c->inputs, o = c->outputs, passed = c->order ? r : 0, kept = c->stacked ? r : 0;
    if (c->order)
        team_run(team, gather_input, c, groups(i), worth_a_claim(c->rows));
    const float *source = c->order ? c->gathered : c->x;
    shared_product(team, c->product, r,
                   (struct product){c->first, source + passed, c->order ? source : NULL, NULL, c->inner, c->rows,
                                    i - passed, i, i, c->inner_stride});
    float *y = c->stacked ? c->inner + r : c->y;
    shared_product(team, c->product, o - kept,
                   (struct product){c->second, c->inner, NULL, c->stacked ? NULL : c->bias, y, c->rows, r,
                                    c->inner_stride, 0, c->stacked ? c->inner_stride : o});
    if (c->stacked)
        team_run(team, gather_output, c, groups(o), worth_a_claim(c->rows));
}

/* The second product alone, of rank as many outputs. */
static void one_product(void *context, struct team *team) {
    struct call *c = context;
    long o = c->outputs, i = c->inputs, passed = c->order ? o : 0;
    if (c->order)
        team_run(team, gather_input, c, groups(i), worth_a_claim(c->rows));
    const float *source = c->order ? c->gathered : c->x;
    shared_product(team, c->product, o,
                   (struct product){c->second, source + passed, c->order ? source : NULL, c->bias, c->y, c->rows,
                                    i - passed, i, i, o});
}

/* Threads that are worth waking: each has at least 256 KiB of weights to read, or as long to multiply. */
static int worth(int threads, long weights, long rows) {
    long most = 1 + weights * (1 + rows / MANY) / (1 << 16);
    return threads < most ? threads : (int)most;
}

/* x (rows, i), first (r, i) or with order (r, i - r), second (o, r) or if stacked (o - r, r), bias (o) or NULL,
   order (i) or NULL, place (o) or NULL, only if stacked; y (rows, o). Returns 0, or why nothing usable is in y. */
EXPORT int tdc_two_products(int version, int threads, const float *x, const float *first, const float *second,
                            const float *bias, const int32_t *order, const int32_t *place, float *y, long rows,
                            long inputs, long rank, long outputs, int stacked) {
    if (version < 0 || version > tdc_version())
        return NO_SUCH_VERSION;
    if (rows == 0 || outputs == 0)
        return OK;
    long stride = ((stacked ? outputs : rank) + 15) / 16 * 16, gathered = order ? (rows * inputs + 15) / 16 * 16 : 0;
    float *scratch = take_scratch((size_t)(gathered + rows * stride + 16) * sizeof(float));
    if (!scratch)
        return NO_MEMORY;
    struct call c = {x,    first,  second, bias, order,   place,  y,                 scratch, scratch + gathered,
                     rows, inputs, rank,   outputs, stride,  stacked, products[version], OK};
    team_call(threads, worth(threads, rank * (inputs + outputs), rows), two_products, &c);
    give_scratch(scratch);
    return c.status;
}

/* b i, o i -> b o: x (rows, i), weight (o, i), bias (o) or NULL, y (rows, o). With order (i + o) the input x (rows, i + o)
   is gathered, and its first o entries are added: y = x[order[:o]] + x[order[o:]] weight' + bias. */
EXPORT int tdc_one_product(int version, int threads, const float *x, const float *weight, const float *bias,
                           const int32_t *order, float *y, long rows, long inputs, long outputs) {
    if (version < 0 || version > tdc_version())
        return NO_SUCH_VERSION;
    if (rows == 0 || outputs == 0)
        return OK;
    long stride = inputs + (order ? outputs : 0);
    float *gathered = order ? take_scratch((size_t)(rows * stride + 16) * sizeof(float)) : NULL;
    if (order && !gathered)
        return NO_MEMORY;
    struct call c = {x,    NULL,   weight,  bias,    order,  NULL, y,                 gathered, NULL,
                     rows, stride, outputs, outputs, inputs, 0,    products[version], OK};
    team_call(threads, worth(threads, inputs * outputs, rows), one_product, &c);
    if (gathered)
        give_scratch(gathered);
    return c.status;
}

#else /* one version of the product: LANES numbers a vector */

#define VEC NAMED(vec, VERSION)
typedef float VEC __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* The first n < LANES numbers, zeros behind. */
INLINE TARGET VEC NAMED(part, VERSION)(const float *p, long n) {
#if LANES == 16
    return (VEC)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif LANES == 8
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return (VEC)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(ones + 8 - n)));
#else
    VEC v = {0};
    for (long k = 0; k < n; k++)
        v[k] = p[k];
    return v;
#endif
}

INLINE TARGET float NAMED(sum, VERSION)(const VEC *v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)*v);
#else
    float total[LANES];
    memcpy(total, v, sizeof total);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int k = 0; k < width; k++)
            total[k] += total[k + width];
    return total[0];
#endif
}

/* tall rows of the weight (from n) times wide rows of activations (from b); lines further on, from ahead, are fetched,
   `lines` of them for each vector of the depth. */
INLINE TARGET void NAMED(tile, VERSION)(const struct product *p, long n, long b, int tall, int wide, const char *ahead,
                                        int lines) {
    const float *w = p->weight + n * p->depth, *a = p->a + b * p->a_stride;
    VEC acc[TALL][WIDE];
#pragma GCC unroll 8
    for (int s = 0; s < tall; s++)
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            acc[s][t] = (VEC){0};
    long k = 0;
    for (; k + LANES <= p->depth; k += LANES) {
        VEC v[WIDE];
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            v[t] = *(const VEC *)(a + t * p->a_stride + k);
#pragma GCC unroll 8
        for (int s = 0; s < tall; s++) {
            VEC u = *(const VEC *)(w + s * p->depth + k);
#pragma GCC unroll 8
            for (int t = 0; t < wide; t++)
                acc[s][t] += u * v[t];
        }
#pragma GCC unroll 8
        for (int s = 0; s < lines; s++)
            __builtin_prefetch(ahead + s * 64, 0, 2);
        ahead += lines * 64;
    }
    const long rest = p->depth - k;
#pragma GCC unroll 8
    for (int s = 0; s < tall && rest; s++)
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            acc[s][t] += NAMED(part, VERSION)(w + s * p->depth + k, rest) *
                         NAMED(part, VERSION)(a + t * p->a_stride + k, rest);
#if LANES == 16
    if (tall == 4 && wide == 4) {
        store_sums(p, n, b, acc);
        return;
    }
#endif
#pragma GCC unroll 8
    for (int s = 0; s < tall; s++)
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            store(p, n + s, b + t, NAMED(sum, VERSION)(&acc[s][t]));
}

/* All rows of activations, wide of them, and rows n, n + step, ... of the weight, tall of them. */
INLINE TARGET void NAMED(streams, VERSION)(const struct product *p, long n, long step, int tall, int wide) {
    const float *w = p->weight + n * p->depth, *a = p->a;
    const long apart = step * p->depth;
    VEC acc[STREAMS][WIDE];
#pragma GCC unroll 8
    for (int s = 0; s < tall; s++)
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            acc[s][t] = (VEC){0};
    long k = 0;
    for (; k + LANES <= p->depth; k += LANES) {
        VEC v[WIDE];
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++)
            v[t] = *(const VEC *)(a + t * p->a_stride + k);
#pragma GCC unroll 8
        for (int s = 0; s < tall; s++) {
            const float *at = w + s * apart + k;
            VEC u = *(const VEC *)at;
#pragma GCC unroll 8
            for (int t = 0; t < wide; t++)
                acc[s][t] += u * v[t];
            if (LANES == 16 || k % 16 == 0)
                __builtin_prefetch((const char *)((uintptr_t)at + AHEAD), 0, 2);
        }
    }
    const long rest = p->depth - k;
#pragma GCC unroll 8
    for (int s = 0; s < tall; s++)
#pragma GCC unroll 8
        for (int t = 0; t < wide; t++) {
            if (rest)
                acc[s][t] += NAMED(part, VERSION)(w + s * apart + k, rest) *
                             NAMED(part, VERSION)(a + t * p->a_stride + k, rest);
            store(p, n + s * step, t, NAMED(sum, VERSION)(&acc[s][t]));
        }
}

/* Rows [start, returned) of the weight from `tall` places at once. */
INLINE TARGET long NAMED(spread, VERSION)(const struct product *p, long start, long stop, int tall, int wide) {
    const long step = (stop - start) / tall;
    for (long n = start; n < start + step; n++)
        NAMED(streams, VERSION)(p, n, step, tall, wide);
    return start + step * tall;
}

/* Where the weights lie that are to be fetched now: `rows` rows behind row n. It may be behind the end. */
INLINE const char *NAMED(behind, VERSION)(const struct product *p, long n, long rows) {
    return (const char *)((uintptr_t)p->weight + (size_t)(n + rows) * p->depth * sizeof(float));
}

/* All rows of activations with a few rows of the weight: these are in cache after the first tile. Rows further on, those
   of the strip after the next one, are fetched to the second-level cache a part with each tile, so that memory is busy
   all the time. (One strip ahead is 5 % slower where rows are short; nearer caches lose 10 %.) */
INLINE TARGET void NAMED(strip, VERSION)(const struct product *p, long n, int tall) {
    const long whole = tall * LANES / 16, vectors = p->depth / LANES;
    const char *ahead = NAMED(behind, VERSION)(p, n, 2 * tall);
    for (long at = whole * vectors * 64; at < tall * p->depth * (long)sizeof(float) + 64; at += 64) /* what is left */
        __builtin_prefetch(ahead + at, 0, 2);
    long b = 0, tiles = (p->rows + WIDE - 1) / WIDE, part = whole > tiles ? whole / tiles : 1, left = whole;
    for (; b + WIDE <= p->rows; b += WIDE) {
        long lines = left < part ? left : part;
        if (lines == 4)
            NAMED(tile, VERSION)(p, n, b, tall, WIDE, ahead, 4);
        else if (lines == 2)
            NAMED(tile, VERSION)(p, n, b, tall, WIDE, ahead, 2);
        else if (lines == 1)
            NAMED(tile, VERSION)(p, n, b, tall, WIDE, ahead, 1);
        else
            NAMED(tile, VERSION)(p, n, b, tall, WIDE, ahead, 0);
        left -= lines;
        ahead += lines * 64 * vectors;
    }
    if (WIDE > 2)
        for (; b + 2 <= p->rows; b += 2, left = 0)
            NAMED(tile, VERSION)(p, n, b, tall, 2, ahead, left);
    for (; b < p->rows; b++, left = 0)
        NAMED(tile, VERSION)(p, n, b, tall, 1, ahead, left);
}

#define PANEL (2 * LANES)
#include "many_rows.c"
#undef PANEL

static TARGET void NAMED(product, VERSION)(const struct product *p, long start, long stop) {
    long n = start;
#if LANES > 4
    if (p->rows >= MANY) {
        NAMED(many_rows, VERSION)(p, start, stop);
        return;
    }
#endif
    if (p->rows == 1)
        n = NAMED(spread, VERSION)(p, start, stop, STREAMS, 1);
    else if (p->rows == 2)
        n = NAMED(spread, VERSION)(p, start, stop, LANES == 16 ? STREAMS : STREAMS / 2, 2);
    else if (p->rows == 3 && WIDE > 2)
        n = NAMED(spread, VERSION)(p, start, stop, STREAMS / 2, 3);
    else if (p->rows == 4 && WIDE > 2)
        n = NAMED(spread, VERSION)(p, start, stop, STREAMS / 2, 4);
    for (; n + TALL <= stop; n += TALL)
        NAMED(strip, VERSION)(p, n, TALL);
    for (; n < stop; n++)
        NAMED(strip, VERSION)(p, n, 1);
}

#undef VEC
#undef LANES
#undef TALL
#undef WIDE
#undef HIGH
#undef VERSION
#undef TARGET
#endif
