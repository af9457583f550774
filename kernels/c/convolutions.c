/* Convolutions one behind the other, float32, NCHW, without groups or dilation:

       b i p q, o i p q -> b o        each with its own window, stride and zeros around it; the bias is the last one's

   A 1 x 1 convolution is a product with the positions as columns. A window's input is first laid out with its zeros, one
   plane for each phase of the stride; then the entries that a tap meets are a plane moved by a constant, and the window
   is a product too, whose rows of positions have some columns behind them that are dropped. The weights are read as they
   are stored. Several images, or some rows of one, go through all stages at a time, so that what lies between stages
   stays in the second-level cache, and a few rows of the weight meet all their positions while they are in the first.
   This file includes itself once for each instruction set, as two_products.c does, whose names it uses.
*/
#ifndef LANES

enum {
    TILE = 8,       /* outputs of one tile */
    PANEL = 3,      /* vectors of positions of one tile */
    BLOCK = 192,    /* positions of one part */
    STAGES = 4,     /* at most */
    SLACK = 64,     /* numbers behind a buffer that may be read */
    CACHE = 1 << 17 /* numbers that lie between stages at a time */
};

/* One convolution. `plain`: 1 x 1, each position of the input is one of the output. */
struct stage {
    const float *weight;
    long inputs, outputs, rows, columns, down, across, top, left, height, width, in_height, in_width;
    int plain;
};

struct span {
    long start, stop;
};

/* One stage for some rows of some images, as a product. */
struct task {
    const struct stage *stage;
    struct span in, out;            /* rows that are there of the input, rows that are made */
    const float *from;              /* the input */
    float *laid, *to;               /* the input laid out, the output */
    const float *bias;
    const long *offsets;            /* of each input and tap, in laid, or in from where plain */
    long images, from_image, from_channel, laid_image, to_image, to_channel;
    long pitch, plane_rows, positions; /* of laid: numbers in a row, rows of a plane, and what the product makes */
    void (*block)(const struct task *, long output, long outputs, long image, long start, long stop);
};

/* Positions [q, q + n) of the product, in `made`, to their places in the output. */
static void put(const struct task *t, const float *made, float *to, long q, long n) {
    const long width = t->stage->width;
    for (long x = q % t->pitch, y = q / t->pitch; n > 0; x = 0, y++) {
        long run = t->pitch - x < n ? t->pitch - x : n, kept = width - x < run ? width - x : run;
        if (kept > 0)
            memcpy(to + y * width + x, made, (size_t)kept * sizeof(float));
        made += run;
        n -= run;
    }
}

#define LANES 4
#define ROWS 4
#define VERSION _portable
#define TARGET
#include "convolutions.c"

#ifdef X86
#define LANES 8
#define ROWS 4
#define VERSION _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "convolutions.c"

#define LANES 16
#define ROWS 8
#define VERSION _avx512
#define TARGET AVX512
#include "convolutions.c"
#endif

static void (*const blocks[])(const struct task *, long, long, long, long, long) = {
    block_portable,
#ifdef X86
    block_avx2,
    block_avx512,
#endif
};

static long phases(const struct stage *s) { return s->down * s->across; }

/* Rows and row length of a phase's plane for `rows` rows of the output. */
static long plane_rows(const struct stage *s, long rows) { return rows + (s->rows - 1) / s->down; }

static long pitch(const struct stage *s) { return s->plain ? s->width : s->width + (s->columns - 1) / s->across; }

/* The rows of the input that some of the output need. */
static struct span needed(const struct stage *s, struct span out) {
    long start = out.start * s->down - s->top, stop = (out.stop - 1) * s->down - s->top + s->rows;
    start = start > 0 ? start : 0;
    stop = stop < s->in_height ? stop : s->in_height;
    return (struct span){start, stop > start ? stop : start};
}

/* Lay out channel after channel, all images: zeros where the input has no entry. */
static void lay_out(void *context, long start, long stop) {
    const struct task *t = context;
    const struct stage *s = t->stage;
    for (long part = start; part < stop; part++) {
        long image = part / s->inputs, channel = part % s->inputs;
        const float *from = t->from + image * t->from_image + channel * t->from_channel;
        float *to = t->laid + image * t->laid_image + channel * phases(s) * t->plane_rows * t->pitch;
        for (long phase = 0; phase < phases(s); phase++)
            for (long y = 0; y < t->plane_rows; y++, to += t->pitch) {
                long row = (t->out.start + y) * s->down + phase / s->across - s->top, skip = phase % s->across - s->left;
                if (row < t->in.start || row >= t->in.stop) {
                    memset(to, 0, (size_t)t->pitch * sizeof(float));
                    continue;
                }
                const float *entries = from + (row - t->in.start) * s->in_width;
                for (long x = 0; x < t->pitch; x++) {
                    long column = x * s->across + skip;
                    to[x] = column >= 0 && column < s->in_width ? entries[column] : 0;
                }
            }
    }
}

static void some_blocks(void *context, long start, long stop) {
    const struct task *t = context;
    const long outputs = t->stage->outputs, of_image = (t->positions + BLOCK - 1) / BLOCK;
    for (long part = start; part < stop; part++) {
        long block = part % of_image, image = part / of_image % t->images, output = part / of_image / t->images * TILE;
        long first = block * BLOCK, last = first + BLOCK < t->positions ? first + BLOCK : t->positions;
        t->block(t, output, outputs - output < TILE ? outputs - output : TILE, image, first, last);
    }
}

/* Numbers between the stages for `rows` rows of one image's output, and of those the ones that lie out for a window. */
static long between(const struct stage *stages, int count, long rows, long *laid) {
    struct span span = {0, rows};
    long most = 0;
    *laid = 0;
    for (int k = count - 1; k >= 0; k--) {
        const struct stage *s = stages + k;
        if (!s->plain) {
            long size = s->inputs * phases(s) * plane_rows(s, span.stop - span.start) * pitch(s);
            *laid = size > *laid ? size : *laid;
        }
        long length = (span.stop - span.start - 1) * s->down + s->rows;
        span.stop = span.start + (length < s->in_height ? length : s->in_height);
        long size = k ? s->inputs * (span.stop - span.start) * s->in_width : 0;
        most = size > most ? size : most;
    }
    return most;
}

struct plan {
    const struct stage *stages;
    int count, version;
    const float *x, *bias;
    float *y, *laid, *values[2];
    long *offsets;
    long value;
};

/* All stages for some rows of the output of some images. */
static void run_band(const struct plan *p, int threads, long image, long images, struct span rows) {
    struct span spans[STAGES + 1];
    spans[p->count] = rows;
    for (int k = p->count - 1; k >= 0; k--)
        spans[k] = needed(p->stages + k, spans[k + 1]);
    const struct stage *first = p->stages, *last = p->stages + p->count - 1;
    for (int k = 0; k < p->count; k++) {
        const struct stage *s = p->stages + k;
        long in_rows = spans[k].stop - spans[k].start, out_rows = spans[k + 1].stop - spans[k + 1].start;
        if (out_rows < 1) /* the window behind it meets zeros alone */
            continue;
        struct task t = {s, spans[k], spans[k + 1], p->values[k % 2], p->laid, p->values[(k + 1) % 2], NULL, p->offsets,
                         images, p->value, in_rows * s->in_width, 0, p->value, out_rows * s->width, pitch(s),
                         plane_rows(s, out_rows), (out_rows - 1) * pitch(s) + s->width, blocks[p->version]};
        if (s == first) {
            t.from_channel = s->in_height * s->in_width;
            t.from_image = s->inputs * t.from_channel;
            t.from = p->x + image * t.from_image + spans[0].start * s->in_width;
        }
        if (s == last) {
            t.to_channel = s->height * s->width;
            t.to_image = s->outputs * t.to_channel;
            t.to = p->y + image * t.to_image + rows.start * s->width;
            t.bias = p->bias;
        }
        long plane = t.plane_rows * t.pitch, *offset = p->offsets;
        t.laid_image = s->inputs * phases(s) * plane;
        for (long channel = 0; channel < s->inputs; channel++)
            for (long y = 0; y < s->rows; y++)
                for (long x = 0; x < s->columns; x++)
                    *offset++ = s->plain ? channel * t.from_channel
                                         : (channel * phases(s) + y % s->down * s->across + x % s->across) * plane +
                                               y / s->down * t.pitch + x / s->across;
        if (!s->plain)
            pool_run(threads, lay_out, &t, images * s->inputs, 1 + (1 << 13) / (plane * phases(s)));
        long parts = (s->outputs + TILE - 1) / TILE * images * ((t.positions + BLOCK - 1) / BLOCK);
        long taps = s->inputs * s->rows * s->columns, width = t.positions < BLOCK ? t.positions : BLOCK;
        pool_run(threads, some_blocks, &t, parts, 1 + (1 << 17) / (TILE * taps * width));
    }
}

/* Takes x (images, channels, height, width) through `count` convolutions with weights (o, i, rows, columns), `numbers` of
   each: o, rows, columns, stride down and across, zeros on top and at the left, height and width of the output. bias of
   the last or NULL. y (images, o, height, width). */
EXPORT int tdc_convolutions(int version, int threads, const float *x, const float *const *weights, const float *bias,
                            float *y, long images, long channels, long height, long width, int count,
                            const long *numbers) {
    struct stage stages[STAGES];
    long taps = 0, macs = 0;
    if (version < 0 || version > tdc_version() || count < 1 || count > STAGES)
        return NO_SUCH_VERSION;
    for (int k = 0; k < count; k++, numbers += 9) {
        const long *n = numbers;
        int plain = n[1] == 1 && n[2] == 1 && n[3] == 1 && n[4] == 1 && n[7] == height && n[8] == width;
        stages[k] = (struct stage){weights[k], channels, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8],
                                   height,     width,    plain};
        taps = channels * n[1] * n[2] > taps ? channels * n[1] * n[2] : taps;
        macs += n[0] * channels * n[1] * n[2] * n[7] * n[8];
        channels = n[0], height = n[7], width = n[8];
    }
    if (images == 0 || channels == 0 || height == 0 || width == 0)
        return OK;
    long rows = height, laid, value = between(stages, count, rows, &laid);
    while (rows > 1 && laid + 2 * value > CACHE)
        rows = (rows + 1) / 2, value = between(stages, count, rows, &laid);
    long together = rows < height ? 1 : CACHE / (laid + 2 * value + 1);
    together = together < 1 ? 1 : together < images ? together : images;
    laid = (laid * together + SLACK + 15) / 16 * 16;
    long values = (value * together + SLACK + 15) / 16 * 16, size = (laid + 2 * values) * (long)sizeof(float);
    float *scratch = aligned_alloc(64, (size_t)((size + taps * (long)sizeof(long) + 63) / 64 * 64));
    if (!scratch)
        return NO_MEMORY;
    memset(scratch + laid - SLACK, 0, SLACK * sizeof(float));
    struct plan plan = {stages, count, version, x, bias, y, scratch, {scratch + laid, scratch + laid + values},
                        (long *)(void *)(scratch + laid + 2 * values), value};
    threads = pool_enter(macs * images < 1 << 20 ? 1 : threads);
    for (long image = 0; image < images; image += together)
        for (long row = 0; row < height; row += rows)
            run_band(&plan, threads, image, images - image < together ? images - image : together,
                     (struct span){row, row + rows < height ? row + rows : height});
    pool_leave(threads);
    free(scratch);
    return OK;
}

#else /* one version */

#define VEC NAMED(vec, VERSION)

/* A tile: rows of the weight from `output`, `vectors` of positions from q, of which `left` are wanted (0: all). */
INLINE TARGET void NAMED(fill, VERSION)(const struct task *t, long output, long image, long q, int rows, int vectors,
                                        long left) {
    const long depth = t->stage->inputs * t->stage->rows * t->stage->columns;
    const float *w = t->stage->weight + output * depth;
    const float *from = (t->stage->plain ? t->from + image * t->from_image : t->laid + image * t->laid_image) + q;
    const long masked = t->stage->plain ? left : 0;
    VEC acc[ROWS][PANEL];
#pragma GCC unroll 8
    for (int s = 0; s < rows; s++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++)
            acc[s][j] = (VEC){0} + (t->bias ? t->bias[output + s] : 0);
    for (long k = 0; k < depth; k++) {
        const float *b = from + t->offsets[k];
        VEC v[PANEL];
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++)
            v[j] = masked ? NAMED(part, VERSION)(b, left) : *(const VEC *)(b + j * LANES);
#pragma GCC unroll 8
        for (int s = 0; s < rows; s++)
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++)
                acc[s][j] += w[s * depth + k] * v[j];
        if (k % 16 == 0) /* the rows of the next tile */
#pragma GCC unroll 8
            for (int s = 0; s < rows; s++)
                __builtin_prefetch((const char *)((uintptr_t)(w + (rows + s) * depth + k)), 0, 2);
    }
    float *to = t->to + image * t->to_image + output * t->to_channel;
    if (left == 0 && t->pitch == t->stage->width) {
#pragma GCC unroll 8
        for (int s = 0; s < rows; s++)
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++)
                *(VEC *)(to + s * t->to_channel + q + j * LANES) = acc[s][j];
        return;
    }
    float made[PANEL * LANES];
#pragma GCC unroll 8
    for (int s = 0; s < rows; s++) {
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++)
            *(VEC *)(made + j * LANES) = acc[s][j];
        put(t, made, to + s * t->to_channel, q, left ? left : vectors * LANES);
    }
}

INLINE TARGET void NAMED(fill_row, VERSION)(const struct task *t, long output, long image, long start, long stop,
                                            int rows) {
    long q = start;
    for (; q + PANEL * LANES <= stop; q += PANEL * LANES)
        NAMED(fill, VERSION)(t, output, image, q, rows, PANEL, 0);
    if (q + 2 * LANES <= stop) {
        NAMED(fill, VERSION)(t, output, image, q, rows, 2, 0);
        q += 2 * LANES;
    }
    if (q + LANES <= stop) {
        NAMED(fill, VERSION)(t, output, image, q, rows, 1, 0);
        q += LANES;
    }
    if (q < stop)
        NAMED(fill, VERSION)(t, output, image, q, rows, 1, stop - q);
}

static TARGET void NAMED(block, VERSION)(const struct task *t, long output, long outputs, long image, long start,
                                         long stop) {
    const long behind = output + outputs;
    for (; output + ROWS <= behind; output += ROWS)
        NAMED(fill_row, VERSION)(t, output, image, start, stop, ROWS);
    if (ROWS > 4)
        for (; output + 4 <= behind; output += 4)
            NAMED(fill_row, VERSION)(t, output, image, start, stop, 4);
    for (; output < behind; output++)
        NAMED(fill_row, VERSION)(t, output, image, start, stop, 1);
}

#undef VEC
#undef LANES
#undef ROWS
#undef VERSION
#undef TARGET
#endif
