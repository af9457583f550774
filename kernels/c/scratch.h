/* Memory for what lies between products. Each thread that calls keeps its last piece for the next call, up to KEPT bytes:
   the C library may return what is freed to the system, which then zeroes page after page when it is touched again, and
   that can take as long as the products. It is freed when the thread ends. Only one piece of a thread is in use at a time.
*/
#ifndef TDC_SCRATCH
#define TDC_SCRATCH

#include <stdlib.h>

enum { KEPT = 1 << 24, LINE = 64 };

/* In front of the memory, a line of the cache. */
struct piece_of_scratch {
    size_t bytes;
};

#ifdef TDC_THREADS

#include <pthread.h>

static pthread_key_t scratch_key;
static int scratch_is_kept;

__attribute__((constructor)) static void keep_scratch(void) {
    scratch_is_kept = pthread_key_create(&scratch_key, free) == 0;
}

static struct piece_of_scratch *kept_scratch(void) {
    return scratch_is_kept ? pthread_getspecific(scratch_key) : NULL;
}

static int keep(struct piece_of_scratch *piece) {
    return scratch_is_kept && pthread_setspecific(scratch_key, piece) == 0;
}

#else

static struct piece_of_scratch *kept_scratch(void) { return NULL; }

static int keep(struct piece_of_scratch *piece) { return (void)piece, 0; }

#endif

/* At least so many bytes, at a multiple of LINE, or NULL. */
static void *take_scratch(size_t bytes) {
    struct piece_of_scratch *kept = kept_scratch();
    if (kept && kept->bytes >= bytes)
        return (char *)kept + LINE;
    bytes = (bytes + LINE - 1) / LINE * LINE;
    if (kept && keep(NULL))
        free(kept);
    struct piece_of_scratch *made = aligned_alloc(LINE, bytes + LINE);
    if (!made)
        return NULL;
    made->bytes = bytes;
    return (char *)made + LINE;
}

static void give_scratch(void *taken) {
    struct piece_of_scratch *piece = (void *)((char *)taken - LINE);
    if (piece != kept_scratch() && (piece->bytes > KEPT || !keep(piece)))
        free(piece);
}

#endif
