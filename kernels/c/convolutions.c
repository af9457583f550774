/* Convolutions one behind the other, float32, NCHW, without groups or dilation:

       b i p q, o i p q -> b o        each with its own window, stride and zeros around it; the bias is the last one's

   Each is a product of the weight as it is stored, outputs x (inputs, taps), with the entries that the taps meet as
   columns, one for each position of the output, of all images in a row. The columns of two vectors of positions are copied
   to a panel, for DEEP inputs and taps at a time, and the tiles of many_rows.c multiply rows of the weight with it while it
   is in the first-level cache. A direct stage, whose window is small and steps by one or two, is read where its input lies,
   with zeros for what a window meets outside. Where it steps by one and keeps the size, the positions of all rows are one
   row, of which each vector is full. For other windows the input is first laid out with its zeros, one plane for each
   phase of the stride; then what a tap meets along a row of the output lies in a row. Between stages the images of a
   channel lie side by side.

   The first one, if 1 x 1, may be behind a gather of the channels, h = x[order[:r]] + x[order[r:]] first', and to the last
   one, 1 x 1, what it reads may be put on top (stacked), perhaps before a gather, y = [h, h last'][place] + bias: as in
   two_products.c, with channels for entries. Neither moves anything: the columns are read, and the outputs are written,
   where they lie.

   Several images, or some rows of one, a band, go through all stages at a time, so that what lies between stages stays in
   the second-level cache. Threads take bands of their own where these can be dealt out evenly; else they share each stage
   of a band. This file includes itself once for each instruction set, as two_products.c does, whose names it uses.
*/
#ifndef LANES

enum {
    STAGES = 4,      /* at most */
    SLOTS = 64,      /* threads that take bands of their own, at most */
    SHORTEST = 6,    /* rows of a band that are few because of them, at least: those at its edges are made twice */
    LIGHT = 1 << 18, /* weights that each of them may as well copy by itself; else twice as many rows */
    WIDEST = 1024,   /* positions of one part, at most */
    GRAIN = 16,      /* of which they are a multiple */
    FEWEST = 64,     /* positions of one part that are worth copying the weights */
    DEEP = 256,      /* inputs and taps at a time */
    TALLEST = 192,   /* outputs whose weights are copied at a time */
    PANELS = 32,     /* panels at a time, at most */
    ROWS_AHEAD = 6,  /* of the weights that are fetched: they are far apart */
    SPAN = 8,        /* rows and columns of the window of a direct stage, at most */
    LARGE = 1 << 20, /* numbers of an input that is laid out for strides: memory is read faster in its order */
    CACHE = 1 << 18  /* numbers that lie between stages at a time */
};

/* One convolution. `plain`: 1 x 1, each position of the input is one of the output. `direct`: its columns are read where
   the input lies, which is not laid out. `order`: of the channels of the input, the first `outputs` of which are added to
   the product; else NULL. `places`: where the output has its channels, those of the input on top, then those of the
   product; else NULL. */
struct stage {
    const float *weight;
    long inputs, outputs, rows, columns, down, across, top, left, height, width, in_height, in_width;
    int plain, direct;
    const int32_t *order;
    const long *places;
};

/* Channels of the input, and of the output. */
static long channels_in(const struct stage *s) { return s->inputs + (s->order ? s->outputs : 0); }

static long channels_out(const struct stage *s) { return s->outputs + (s->places ? s->inputs : 0); }

/* Parts, the last one perhaps smaller. */
static long parts_of(long whole, long part) { return (whole + part - 1) / part; }

struct span {
    long start, stop;
};

/* One stage for some rows of some images, as a product. */
struct task {
    const struct stage *stage;
    struct span in, out; /* rows that are there of the input, rows that are made */
    const float *from;   /* the input */
    float *laid, *to;    /* the input laid out, the output */
    const float *bias;
    const long *offsets; /* of each input and tap, in laid, or in from where direct */
    long images, from_image, from_channel, laid_image, to_image, to_channel;
    long pitch, plane_rows; /* numbers in a row of laid, or of from where direct; rows of a plane of laid */
    long positions;         /* of the output of one image */
    long wide, chunks;      /* positions of a part, and parts of the outputs */
    int near;               /* whether columns may be multiplied where they lie */
    int ahead;              /* whether they are fetched ahead: the input's, which may not be in cache */
    void (*block)(const struct task *, long output, long outputs, long start, long stop);
};

/* Numbers that lie in a row in what is multiplied, and where they go in a panel. Of a direct stage `down` and `across` say,
   a bit for each number, for which the rows and the columns of the window meet an entry; elsewhere it is zero. */
struct piece {
    const float *from;
    long at, length;
    uint16_t down[SPAN], across[SPAN];
};

static unsigned bits(long start, long stop) { return start < stop ? ((1u << stop) - 1) & ~((1u << start) - 1) : 0; }

/* What of a window is met at the positions of a piece from `place`. */
static void meet(const struct task *t, long place, struct piece *piece) {
    const struct stage *s = t->stage;
    const long height = t->out.stop - t->out.start;
    memset(piece->down, 0, sizeof piece->down);
    memset(piece->across, 0, sizeof piece->across);
    for (long l = 0, length; l < piece->length; l += length, place += length) {
        const long x = place % s->width, row = (place / s->width % height + t->out.start) * s->down - s->top;
        length = s->width - x < piece->length - l ? s->width - x : piece->length - l;
        for (long y = 0; y < s->rows; y++)
            if (row + y >= t->in.start && row + y < t->in.stop)
                piece->down[y] |= (uint16_t)bits(l, l + length);
        for (long q = 0; q < s->columns; q++) {
            const long before = s->left - q, there = s->in_width + before; /* numbers from the first one that is met */
            const long first = before > 0 ? parts_of(before, s->across) - x : 0;
            const long behind = there > 0 ? parts_of(there, s->across) - x : 0;
            piece->across[q] |= (uint16_t)bits(l + (first > 0 ? first : 0), l + (behind < length ? behind : length));
        }
    }
}

/* The pieces of `count` positions from q, counted over all images, each of at most `longest`. */
static long pieces_of(const struct task *t, long q, long count, long longest, struct piece *pieces) {
    const struct stage *s = t->stage;
    const long down = s->direct ? s->down : 1, across = s->direct ? s->across : 1;
    const int flat = t->pitch == s->width && down == 1 && across == 1;
    const long through = flat && s->direct && t->from_image == t->positions ? t->images * t->positions : t->positions;
    const long row = flat ? through : s->width;
    const float *from = t->laid;
    if (s->direct)
        from = t->from + (t->out.start * s->down - s->top - t->in.start) * s->in_width - s->left;
    long found = 0;
    for (long at = 0; at < count; found++) {
        const long image = (q + at) / through, place = (q + at) % through;
        long length = row - place % row < count - at ? row - place % row : count - at;
        length = length < longest ? length : longest;
        const float *base = from + image * (s->direct ? t->from_image : t->laid_image);
        base += place / s->width * down * t->pitch + place % s->width * across;
        pieces[found] = (struct piece){base, at, length, {0}, {0}};
        if (s->direct)
            meet(t, place, pieces + found);
        at += length;
    }
    return found;
}

/* Of each tap and piece which numbers meet an entry, as bits for the entries from the first one on. */
static void mask(const struct stage *s, const struct piece *pieces, long count, uint32_t *masks) {
    for (long y = 0; y < s->rows; y++)
        for (long x = 0; x < s->columns; x++)
            for (long j = 0; j < count; j++) {
                uint32_t met = pieces[j].down[y] & pieces[j].across[x];
                if (s->across == 2) { /* each second one */
                    met = (met | met << 8) & 0xff00ff;
                    met = (met | met << 4) & 0xf0f0f0f;
                    met = (met | met << 2) & 0x33333333;
                    met = (met | met << 1) & 0x55555555;
                }
                *masks++ = met;
            }
}

static long phases(const struct stage *s) { return s->down * s->across; }

#define LANES 4
#define HIGH 4
#define VERSION _portable
#define TARGET
#include "convolutions.c"

#ifdef X86
#define LANES 8
#define HIGH 6
#define VERSION _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "convolutions.c"

#define LANES 16
#define HIGH 12
#define VERSION _avx512
#define TARGET AVX512
#include "convolutions.c"
#endif

static const struct {
    void (*block)(const struct task *, long, long, long, long);
    phase lay_out;
} versions[] = {
    {block_portable, lay_out_portable},
#ifdef X86
    {block_avx2, lay_out_avx2},
    {block_avx512, lay_out_avx512},
#endif
};

/* Rows and row length of a phase's plane for `rows` rows of the output. */
static long plane_rows(const struct stage *s, long rows) { return rows + (s->rows - 1) / s->down; }

static long pitch(const struct stage *s) {
    return s->direct ? s->in_width : s->width + (s->columns - 1) / s->across;
}

/* The rows of the input that some of the output need. */
static struct span needed(const struct stage *s, struct span out) {
    long start = out.start * s->down - s->top, stop = (out.stop - 1) * s->down - s->top + s->rows;
    start = start > 0 ? start : 0;
    stop = stop < s->in_height ? stop : s->in_height;
    return (struct span){start, stop > start ? stop : start};
}

/* Channels that are stacked on the product, at positions [start, stop) of all images. */
static void stack(const struct task *t, long start, long stop) {
    for (long q = start; q < stop;) {
        const long image = q / t->positions, place = q % t->positions;
        const long length = t->positions - place < stop - q ? t->positions - place : stop - q;
        for (long channel = 0; channel < t->stage->inputs; channel++) {
            const long to = t->stage->places[channel];
            const float *from = t->from + image * t->from_image + channel * t->from_channel + place;
            const float bias = t->bias ? t->bias[to] : 0;
            float *y = t->to + image * t->to_image + to * t->to_channel + place;
            for (long x = 0; x < length; x++)
                y[x] = from[x] + bias;
        }
        q += length;
    }
}

static void some_blocks(void *context, long start, long stop) {
    const struct task *t = context;
    const long outputs = t->stage->outputs, all = t->images * t->positions;
    for (long part = start; part < stop; part++) {
        const long chunk = part % t->chunks, q = part / t->chunks * t->wide, first = outputs * chunk / t->chunks;
        const long behind = q + t->wide < all ? q + t->wide : all;
        if (chunk == 0 && t->stage->places)
            stack(t, q, behind);
        t->block(t, first, outputs * (chunk + 1) / t->chunks - first, q, behind);
    }
}

/* Numbers between the stages for `rows` rows of one image's output, and of those the ones that lie out for a window. */
static long between(const struct stage *stages, int count, long rows, long *laid) {
    struct span span = {0, rows};
    long most = 0;
    *laid = 0;
    for (int k = count - 1; k >= 0; k--) {
        const struct stage *s = stages + k;
        if (!s->direct) {
            long size = s->inputs * phases(s) * plane_rows(s, span.stop - span.start) * pitch(s);
            *laid = size > *laid ? size : *laid;
        }
        long length = (span.stop - span.start - 1) * s->down + s->rows;
        span.stop = span.start + (length < s->in_height ? length : s->in_height);
        long size = k ? channels_in(s) * (span.stop - span.start) * s->in_width : 0;
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
    long images, together, rows; /* images, and rows of one, that go through all stages at a time: a band */
    long apart;                  /* bytes from the scratch of one thread to that of the next */
    long slots;                  /* threads that have one of their own; 1: all share it */
    atomic_int *taken;           /* which are in use */
};

/* Where each input and tap of a stage lies, from the first entry that the window meets. */
static void lay_offsets(const struct task *t, long *offset) {
    const struct stage *s = t->stage;
    const long plane = t->plane_rows * t->pitch;
    for (long channel = 0; channel < s->inputs; channel++)
        for (long y = 0; y < s->rows; y++)
            for (long x = 0; x < s->columns; x++)
                if (s->direct)
                    *offset++ = (s->order ? s->order[s->outputs + channel] : channel) * t->from_channel + y * t->pitch + x;
                else
                    *offset++ = (channel * phases(s) + y % s->down * s->across + x % s->across) * plane +
                                y / s->down * t->pitch + x / s->across;
}

/* Parts of the positions and of the outputs, of one size and as many as keep the threads busy. */
static void set_parts(struct task *t, long threads) {
    const struct stage *s = t->stage;
    const long all = t->images * t->positions, few = parts_of(all, WIDEST);
    const long more = threads < all / FEWEST ? threads : all / FEWEST;
    t->wide = parts_of(parts_of(all, few > more ? few : more), GRAIN) * GRAIN;
    const long worth = 1 + s->outputs * s->inputs * s->rows * s->columns / (1 << 14);
    const long idle = parts_of(threads, parts_of(all, t->wide)), some = idle < worth ? idle : worth;
    t->chunks = parts_of(parts_of(s->outputs + !s->outputs, TALLEST), some) * some;
}

/* One stage, from the rows spans[0] of its input to the rows spans[1] of its output. */
static void run_stage(const struct plan *p, struct team *team, int k, long image, long images, const struct span *spans) {
    const struct stage *s = p->stages + k;
    const long in_rows = spans[0].stop - spans[0].start, out_rows = spans[1].stop - spans[1].start;
    const long entries = in_rows * s->in_width, positions = out_rows * s->width;
    if (out_rows < 1) /* the window behind it meets zeros alone */
        return;
    struct task t = {.stage = s,
                     .in = spans[0],
                     .out = spans[1],
                     .images = images,
                     .from = p->values[k % 2],
                     .from_image = entries,
                     .from_channel = images * entries,
                     .to = p->values[(k + 1) % 2],
                     .to_image = positions,
                     .to_channel = images * positions,
                     .positions = positions,
                     .laid = p->laid,
                     .pitch = pitch(s),
                     .plane_rows = plane_rows(s, out_rows),
                     .offsets = p->offsets,
                     .near = s->direct && s->across == 1,
                     .ahead = k == 0,
                     .block = versions[p->version].block};
    t.laid_image = s->inputs * phases(s) * t.plane_rows * t.pitch;
    if (k == 0) {
        t.from_channel = s->in_height * s->in_width;
        t.from_image = channels_in(s) * t.from_channel;
        t.from = p->x + image * t.from_image + spans[0].start * s->in_width;
    }
    if (k == p->count - 1) {
        t.to_channel = s->height * s->width;
        t.to_image = channels_out(s) * t.to_channel;
        t.to = p->y + image * t.to_image + spans[1].start * s->width;
        t.bias = p->bias;
    }
    lay_offsets(&t, p->offsets);
    if (!s->direct)
        team_run(team, versions[p->version].lay_out, &t, images * s->inputs, 1 + (1 << 13) * s->inputs / (t.laid_image + 1));
    set_parts(&t, team->threads);
    team_run(team, some_blocks, &t, parts_of(images * positions, t.wide) * t.chunks, 1);
}

/* All stages for some rows of the output of some images. */
static void run_band(const struct plan *p, struct team *team, long image, long images, struct span rows) {
    struct span spans[STAGES + 1];
    spans[p->count] = rows;
    for (int k = p->count - 1; k >= 0; k--)
        spans[k] = needed(p->stages + k, spans[k + 1]);
    for (int k = 0; k < p->count; k++)
        run_stage(p, team, k, image, images, spans + k);
}

/* Bands [start, stop), one after the other. */
static void run_bands(const struct plan *p, struct team *team, long start, long stop) {
    const long height = p->stages[p->count - 1].height, across = parts_of(height, p->rows);
    for (long band = start; band < stop; band++) {
        long image = band / across * p->together, row = band % across * p->rows;
        run_band(p, team, image, p->images - image < p->together ? p->images - image : p->together,
                 (struct span){row, row + p->rows < height ? row + p->rows : height});
    }
}

static void *moved(void *place, long bytes) { return (char *)place + bytes; }

/* The same on scratch of their own, by one thread. */
static void some_bands(void *context, long start, long stop) {
    struct plan *shared = context;
    struct plan own = *shared;
    struct team alone = {.threads = 1};
    long slot = 0;
    while (atomic_exchange(&shared->taken[slot], 1)) /* there are as many as threads: one is free */
        slot = (slot + 1) % shared->slots;
    const long by = slot * shared->apart;
    own.laid = moved(own.laid, by);
    own.offsets = moved(own.offsets, by);
    own.values[0] = moved(own.values[0], by);
    own.values[1] = moved(own.values[1], by);
    run_bands(&own, &alone, start, stop);
    atomic_store(&shared->taken[slot], 0);
}

static void all_bands(void *context, struct team *team) {
    struct plan *p = context;
    const long bands = parts_of(p->images, p->together) * parts_of(p->stages[p->count - 1].height, p->rows);
    if (p->slots > 1)
        team_run(team, some_bands, p, bands, 1);
    else
        run_bands(p, team, 0, bands);
}

/* The most images at a time, up to `together`, at which threads that each take bands of them are done soonest; 0 where
   some of these would have over a tenth more to do than others. */
static long shared_out(long images, long together, long threads) {
    long best = 0, least = images + images / 10;
    for (long some = together; some > 0; some--) {
        long all = parts_of(parts_of(images, some), threads) * threads * some;
        if (all < least || (all == least && !best))
            best = some, least = all;
    }
    return best;
}

/* Whether each number below n is there once; where they are is in `places`. */
static int inverted(const int32_t *index, long n, long *places) {
    for (long k = 0; k < n; k++)
        places[k] = -1;
    for (long k = 0; k < n; k++) {
        if (index && (index[k] < 0 || index[k] >= n || places[index[k]] >= 0))
            return 0;
        places[index ? index[k] : k] = k;
    }
    return 1;
}

/* Takes x (images, channels, height, width) through `count` convolutions with weights (o, i, rows, columns), `numbers` of
   each: o, rows, columns, stride down and across, zeros on top and at the left, height and width of the output. bias of
   the last or NULL. order (channels) or NULL, of the first one, place of the channels of the output or NULL, only if
   stacked. y (images, channels of the output, height, width). */
EXPORT int tdc_convolutions(int version, int threads, const float *x, const float *const *weights, const float *bias,
                            const int32_t *order, const int32_t *place, float *y, long images, long channels,
                            long height, long width, int count, const long *numbers, int stacked) {
    struct stage stages[STAGES];
    long taps = 0, macs = 0, stored = 0;
    if (version < 0 || version > tdc_version() || count < 1 + !!order || count > STAGES)
        return NO_SUCH_VERSION;
    for (long k = 0; order && k < channels; k++)
        if (order[k] < 0 || order[k] >= channels)
            return INDEX;
    channels -= order ? numbers[0] : 0;
    for (int k = 0; k < count; k++, numbers += 9) {
        const long *n = numbers;
        int plain = n[1] == 1 && n[2] == 1 && n[3] == 1 && n[4] == 1 && n[7] == height && n[8] == width;
        int direct = n[1] <= SPAN && n[2] <= SPAN && n[4] <= 2;
        if (k == 0 && n[4] == 2 && images * channels * height * width > LARGE)
            direct = 0;
        stages[k] = (struct stage){weights[k], channels, n[0],   n[1],  n[2],  n[3],   n[4],             n[5], n[6],
                                   n[7],       n[8],     height, width, plain, direct, k ? NULL : order, NULL};
        if ((k == 0 && order && !plain) || (k == count - 1 && stacked && !plain))
            return NO_SUCH_VERSION;
        taps = channels * n[1] * n[2] > taps ? channels * n[1] * n[2] : taps;
        stored += n[0] * channels * n[1] * n[2];
        macs += n[0] * channels * n[1] * n[2] * n[7] * n[8];
        channels = n[0], height = n[7], width = n[8];
    }
    if (images == 0 || height == 0 || width == 0)
        return OK;
    struct stage *last = stages + count - 1;
    long *places = stacked ? malloc((size_t)(last->inputs + last->outputs + 1) * sizeof(long)) : NULL;
    if (stacked && !places)
        return NO_MEMORY;
    if (stacked && !inverted(place, last->inputs + last->outputs, places)) {
        free(places);
        return INDEX;
    }
    last->places = places;
    long rows = height, laid, value = between(stages, count, rows, &laid);
    while (rows > 1 && laid + 2 * value > CACHE)
        rows = parts_of(rows, 2), value = between(stages, count, rows, &laid);
    long together = rows < height ? 1 : CACHE / (laid + 2 * value + 1);
    together = together < 1 ? 1 : together < images ? together : images;
    threads = macs * images < 1 << 20 ? 1 : threads;
    long slots = 1;
    if (threads > 1 && threads <= SLOTS) {
        const long fewer = parts_of(rows, threads), shortest = stored < LIGHT ? SHORTEST : 2 * SHORTEST;
        long some = shared_out(images * parts_of(height, rows), together, threads);
        if (!some && fewer >= shortest && (some = shared_out(images * parts_of(height, fewer), 1, threads)))
            rows = fewer, value = between(stages, count, rows, &laid);
        together = some ? some : together;
        slots = some ? threads : 1;
    }
    laid = (laid * together + 31) / 16 * 16; /* and a vector behind it, which may be read */
    long values = (value * together + 15) / 16 * 16, size = (laid + 2 * values) * (long)sizeof(float);
    const long apart = (size + taps * (long)sizeof(long) + 63) / 64 * 64;
    float *scratch = take_scratch((size_t)(apart * slots));
    if (!scratch) {
        free(places);
        return NO_MEMORY;
    }
    atomic_int taken[SLOTS] = {0};
    struct plan plan = {stages, count, version, x, bias, y, scratch, {scratch + laid, scratch + laid + values},
                        (long *)(void *)(scratch + laid + 2 * values), images, together, rows, apart, slots, taken};
    team_call(threads, threads, all_bands, &plan);
    give_scratch(scratch);
    free(places);
    return OK;
}

#else /* one version */

#define VEC NAMED(vec, VERSION)

INLINE TARGET void NAMED(store_part, VERSION)(float *p, VEC v, long n) {
#if LANES == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#elif LANES == 8
    static const int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    _mm256_maskstore_ps(p, _mm256_loadu_si256((const __m256i *)(ones + 8 - n)), (__m256)v);
#else
    memcpy(p, &v, (size_t)n * sizeof(float));
#endif
}

/* Lay out channel after channel, all images: zeros where the input has no entry. */
static TARGET void NAMED(lay_out, VERSION)(void *context, long start, long stop) {
    const struct task *t = context;
    const struct stage *s = t->stage;
    for (long part = start; part < stop; part++) {
        long image = part / s->inputs, channel = part % s->inputs;
        const float *from = t->from + image * t->from_image + channel * t->from_channel;
        float *restrict to = t->laid + image * t->laid_image + channel * phases(s) * t->plane_rows * t->pitch;
        for (long phase = 0; phase < phases(s); phase++)
            for (long y = 0; y < t->plane_rows; y++, to += t->pitch) {
                long row = (t->out.start + y) * s->down + phase / s->across - s->top, skip = phase % s->across - s->left;
                if (row < t->in.start || row >= t->in.stop) {
                    memset(to, 0, (size_t)t->pitch * sizeof(float));
                    continue;
                }
                const float *restrict entries = from + (row - t->in.start) * s->in_width;
                long x = 0, some = (s->in_width - skip + s->across - 1) / s->across; /* columns that are there */
                some = some < t->pitch ? some : t->pitch;
                for (; x < t->pitch && x * s->across + skip < 0; x++)
                    to[x] = 0;
                for (; x < some; x++)
                    to[x] = entries[x * s->across + skip];
                for (; x < t->pitch; x++)
                    to[x] = 0;
            }
    }
}

/* The numbers at p whose bit is set, zeros elsewhere. */
INLINE TARGET VEC NAMED(met, VERSION)(const float *p, unsigned mask) {
#if LANES == 16
    return (VEC)_mm512_maskz_loadu_ps((__mmask16)mask, p);
#elif LANES == 8
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)mask), bit);
    return (VEC)_mm256_maskload_ps(p, _mm256_cmpeq_epi32(set, bit));
#else
    VEC v = {0};
    for (int l = 0; l < LANES; l++)
        if (mask >> l & 1)
            v[l] = p[l];
    return v;
#endif
}

/* The numbers at p, p + 2, p + 4 and so on whose bit is set, of bits 0, 2, 4 and so on; zeros elsewhere. */
INLINE TARGET VEC NAMED(met_by_two, VERSION)(const float *p, unsigned mask) {
#if LANES > 4
    const VEC one = NAMED(met, VERSION)(p, mask & ((1u << LANES) - 1));
    const VEC two = NAMED(met, VERSION)(p + LANES, mask >> LANES);
#endif
#if LANES == 16
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return (VEC)_mm512_permutex2var_ps((__m512)one, even, (__m512)two);
#elif LANES == 8
    const __m256 mixed = _mm256_shuffle_ps((__m256)one, (__m256)two, 0x88);
    return (VEC)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
#else
    VEC v = {0};
    for (int l = 0; l < LANES; l++)
        if (mask >> 2 * l & 1)
            v[l] = p[2 * l];
    return v;
#endif
}

#if LANES == 16 /* others take masks more slowly than they copy */
/* As high_tile() of many_rows.c, of two pieces where they lie. `masks`: of each tap and piece; the first k is of `tap`. */
INLINE TARGET void NAMED(near_tile, VERSION)(const struct piece *pieces, const long *offsets, const uint32_t *masks, long tap,
                                             long taps, long ahead, const float *rows, long depth, float *y, long stride,
                                             int begun, const float *bias, int high) {
    const float *one = pieces[0].from, *two = pieces[1].from;
    VEC acc[HIGH][2];
#pragma GCC unroll 16
    for (int t = 0; t < high; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            acc[t][v] = (VEC){0} + (bias ? bias[t] : 0);
            if (begun)
                acc[t][v] = *(const VEC *)(y + t * stride + v * LANES);
        }
    for (long k = 0; k < depth; k++) {
        const long offset = offsets[k];
        if (ahead) {
            __builtin_prefetch((const char *)((uintptr_t)(one + offset + ahead)), 0, 3);
            __builtin_prefetch((const char *)((uintptr_t)(two + offset + ahead)), 0, 3);
        }
        const VEC u[2] = {NAMED(met, VERSION)(one + offset, masks[2 * tap]),
                          NAMED(met, VERSION)(two + offset, masks[2 * tap + 1])};
        tap = tap + 1 < taps ? tap + 1 : 0;
#pragma GCC unroll 16
        for (int t = 0; t < high; t++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++)
                acc[t][v] += u[v] * rows[t * ROW + k];
    }
#pragma GCC unroll 16
    for (int t = 0; t < high; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            *(VEC *)(y + t * stride + v * LANES) = acc[t][v];
}

#define NEAR_TILE(h)                                                                                                   \
    static TARGET __attribute__((noinline)) void NAMED(JOIN(near, h), VERSION)(                                        \
        const struct piece *pieces, const long *offsets, const uint32_t *masks, long tap, long taps, long ahead,       \
        const float *rows, long depth, float *y, long stride, int begun, const float *bias) {                          \
        NAMED(near_tile, VERSION)(pieces, offsets, masks, tap, taps, ahead, rows, depth, y, stride, begun, bias, h);   \
    }
#define NEAR_NAME(h) NAMED(JOIN(near, h), VERSION)

NEAR_TILE(1) NEAR_TILE(2) NEAR_TILE(3) NEAR_TILE(4) NEAR_TILE(5) NEAR_TILE(6)
NEAR_TILE(7) NEAR_TILE(8) NEAR_TILE(9) NEAR_TILE(10) NEAR_TILE(11) NEAR_TILE(12)

static void (*const near_tiles[])(const struct piece *, const long *, const uint32_t *, long, long, long, const float *, long,
                                  float *, long, int, const float *) = {
    NULL, NEAR_NAME(1), NEAR_NAME(2), NEAR_NAME(3), NEAR_NAME(4), NEAR_NAME(5), NEAR_NAME(6),
    NEAR_NAME(7), NEAR_NAME(8), NEAR_NAME(9), NEAR_NAME(10), NEAR_NAME(11), NEAR_NAME(12),
};

#undef NEAR_TILE
#undef NEAR_NAME
#endif

/* The columns of `count` pieces for the inputs and taps [k, k + depth), to a panel. What a short piece brings too much, the
   next one or the next row covers. `across`: 0 where the input is laid out, else the stride. */
INLINE TARGET void NAMED(gather, VERSION)(const struct task *t, const struct piece *pieces, long count, long k,
                                          long depth, float *panel, const uint32_t *masks, long across, long ahead) {
    const long *offsets = t->offsets + k, columns = t->stage->columns, taps = t->stage->rows * columns;
    long tap = k % taps, column = k % columns;
    for (long d = 0; d < depth; d++, panel += 2 * LANES) {
        const long fetched = column ? 0 : ahead; /* the rest of the row is near it */
        for (long j = 0; j < count; j++) {
            const float *from = pieces[j].from + offsets[d];
            VEC *to = (VEC *)(panel + pieces[j].at);
            if (fetched)
                __builtin_prefetch((const char *)((uintptr_t)(from + fetched)), 0, 3);
            if (across == 2)
                *to = NAMED(met_by_two, VERSION)(from, masks[tap * count + j]);
            else
                *to = across ? NAMED(met, VERSION)(from, masks[tap * count + j]) : *(const VEC *)from;
        }
        tap = tap + 1 < taps ? tap + 1 : 0;
        column = column + 1 < columns ? column + 1 : 0;
    }
}

static TARGET void NAMED(columns, VERSION)(const struct task *t, const struct piece *pieces, long count, long k,
                                           long depth, float *panel) {
    uint32_t masks[SPAN * SPAN * 2 * LANES];
    if (!t->stage->direct) {
        NAMED(gather, VERSION)(t, pieces, count, k, depth, panel, NULL, 0, 0);
        return;
    }
    mask(t->stage, pieces, count, masks);
    const long ahead = t->ahead * t->stage->down * t->stage->across * 2 * LANES;
    if (t->stage->across == 2)
        NAMED(gather, VERSION)(t, pieces, count, k, depth, panel, masks, 2, ahead);
    else
        NAMED(gather, VERSION)(t, pieces, count, k, depth, panel, masks, 1, ahead);
}

/* The sums of a tile, outputs from `output` and `count` positions from q, to their places. `begun`: these have those of
   the inputs and taps before. */
static TARGET void NAMED(put, VERSION)(const struct task *t, const float *sums, long output, int high, long q,
                                       long count, int begun) {
    while (count > 0) {
        const long image = q / t->positions, place = q % t->positions;
        const long run = t->to_image == t->positions ? count : t->positions - place, length = run < count ? run : count;
        for (int s = 0; s < high; s++) {
            const long channel = t->stage->places ? t->stage->places[t->stage->inputs + output + s] : output + s;
            const float *sum = sums + s * 2 * LANES, bias = t->bias ? t->bias[channel] : 0;
            float *y = t->to + image * t->to_image + channel * t->to_channel + place;
            long x = 0;
            for (; x + LANES <= length; x += LANES) {
                VEC more = (VEC){0} + bias;
                if (begun)
                    more = *(const VEC *)(y + x);
                *(VEC *)(y + x) = *(const VEC *)(sum + x) + more;
            }
            if (x < length) {
                VEC more = (VEC){0} + bias;
                if (begun)
                    more = NAMED(part, VERSION)(y + x, length - x);
                NAMED(store_part, VERSION)(y + x, NAMED(part, VERSION)(sum + x, length - x) + more, length - x);
            }
        }
        q += length;
        sums += length;
        count -= length;
    }
}

/* What is added to the product behind a gather, to where the product goes, for the positions of a panel. */
static TARGET void NAMED(pass_by, VERSION)(const struct task *t, long output, long outputs, const struct piece *pieces,
                                           long count, long q) {
    for (long j = 0; j < count; j++) {
        const long image = (q + pieces[j].at) / t->positions, place = (q + pieces[j].at) % t->positions;
        for (long o = output; o < output + outputs; o++) {
            float *y = t->to + image * t->to_image + o * t->to_channel + place;
            const float *from = pieces[j].from + t->stage->order[o] * t->from_channel;
            if (pieces[j].length == LANES)
                *(VEC *)y = *(const VEC *)from;
            else
                memcpy(y, from, (size_t)pieces[j].length * sizeof(float));
        }
    }
}

/* Outputs from `output` at positions [start, stop), at most `wide` of them. */
static TARGET void NAMED(block, VERSION)(const struct task *t, long output, long outputs, long start, long stop) {
    enum { PANEL = 2 * LANES };
    float packed[DEEP * PANEL + LANES] __attribute__((aligned(64)));
    float rows[TALLEST * ROW] __attribute__((aligned(64))), sums[HIGH * PANEL] __attribute__((aligned(64)));
    struct piece pieces[WIDEST];
    long firsts[WIDEST / PANEL + 1] = {0};
    uint32_t masks[PANELS][SPAN * SPAN * 2];
    int near[PANELS];
    const long taps = t->stage->rows * t->stage->columns, depth = t->stage->inputs * taps, tiles = parts_of(outputs, HIGH);
    const long panels = parts_of(stop - start, PANEL);
    for (long j = 0; j < panels; j++) {
        const long q = start + j * PANEL, count = stop - q < PANEL ? stop - q : PANEL;
        firsts[j + 1] = firsts[j] + pieces_of(t, q, count, LANES, pieces + firsts[j]);
        if (t->stage->order)
            NAMED(pass_by, VERSION)(t, output, outputs, pieces + firsts[j], firsts[j + 1] - firsts[j], q);
    }
    memset(packed, 0, sizeof packed); /* what is behind the last position is multiplied too */
    for (long k = 0; k < depth; k += DEEP) {
        const long some = depth - k < DEEP ? depth - k : DEEP;
        const int begun = k > 0 || t->stage->order;
        for (long o = 0; o < outputs; o++) {
            const float *w = t->stage->weight + (output + o) * depth + k;
            long d = 0;
            for (; d + LANES <= some; d += LANES) {
                __builtin_prefetch((const char *)((uintptr_t)(w + ROWS_AHEAD * depth + d)), 0, 2);
                *(VEC *)(rows + o * ROW + d) = *(const VEC *)(w + d);
            }
            for (; d < some; d++)
                rows[o * ROW + d] = w[d];
        }
        for (long from = 0, to; from < panels; from = to) {
            to = from + (DEEP / some < PANELS ? DEEP / some : PANELS);
            to = to < panels ? to : panels;
            for (long j = from; j < to; j++) {
                const struct piece *own = pieces + firsts[j];
                near[j - from] = LANES == 16 && t->near && firsts[j + 1] - firsts[j] == 2 && own[1].at == LANES;
                if (near[j - from])
                    mask(t->stage, own, 2, masks[j - from]);
                else
                    NAMED(columns, VERSION)(t, own, firsts[j + 1] - firsts[j], k, some, packed + (j - from) * some * PANEL);
            }
            for (long tile = 0; tile < tiles; tile++) {
                const long first = outputs * tile / tiles, b = output + first;
                const int high = (int)(outputs * (tile + 1) / tiles - first);
                const float *some_rows = rows + first * ROW;
                for (long j = from; j < to; j++) {
                    const long q = start + j * PANEL, count = stop - q < PANEL ? stop - q : PANEL;
                    const long image = q / t->positions, place = q % t->positions;
                    const int straight = count % LANES == 0 && !t->stage->places &&
                                         (place + count <= t->positions || t->to_image == t->positions);
                    float *y = straight ? t->to + image * t->to_image + b * t->to_channel + place : sums;
                    const float *bias = straight && t->bias ? t->bias + b : NULL;
                    const long stride = straight ? t->to_channel : PANEL;
#if LANES == 16
                    if (near[j - from])
                        near_tiles[high](pieces + firsts[j], t->offsets + k, masks[j - from], k % taps, taps,
                                         tile ? 0 : t->ahead * (to - from) * PANEL, some_rows, some, y, stride,
                                         straight && begun, bias);
                    else
#endif
                        NAMED(high_tiles, VERSION)[high](packed + (j - from) * some * PANEL, some_rows, some, y, stride,
                                                         straight && begun, bias, count);
                    if (!straight)
                        NAMED(put, VERSION)(t, sums, b, high, q, count, begun);
                }
            }
        }
    }
}

#undef VEC
#undef LANES
#undef HIGH
#undef VERSION
#undef TARGET
#endif
