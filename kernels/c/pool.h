/* A few threads that help the one that calls, and that it never needs.

   A phase has `parts`; threads claim some at a time from one counter, more while many are left. The caller claims too
   and can do all of them; it waits only for parts that others have claimed, never for a thread that has not come. So a
   call is about as fast as on one thread where the other cores are taken by something else. A claimed part can still be
   late, when its thread loses its core: after a wait of w the pool rests for RESTS w; after MISSES phases in turn of which
   no helper did a part it rests for PAUSE ns, since waking them takes time too. So both cost little on average.

   On Linux helpers stay off the core of the caller: woken there, they would only take its time.
   Helpers look for work for SPIN ns, giving way to others that want the core, then sleep. One call at a time has the
   pool; others that come meanwhile run alone. After a fork the child starts with an empty pool. Helpers are started at
   the first call that wants them. Without POSIX threads and semaphores everything runs on the caller.
*/
#ifndef TDC_POOL
#define TDC_POOL

#ifdef __linux__
#define _GNU_SOURCE /* sched_getcpu, affinity of threads */
#endif

/* Does parts [start, stop) of a phase. */
typedef void (*phase)(void *context, long start, long stop);

#ifdef TDC_THREADS

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { HELPERS = 63, SPIN = 50000, LATE = 20000, RESTS = 16, MISSES = 8, PAUSE = 2000000, HELPER_STACK = 1 << 19 };

struct helper {
    pthread_t thread;
    sem_t wake;
    atomic_int asleep;
};

static struct {
    atomic_flag taken;
    atomic_long left, done; /* parts that nobody has claimed, and that are finished */
    atomic_long least;      /* parts that are worth a claim */
    atomic_int seats;       /* helpers that may claim */
    phase run;
    void *context;
    long parts;
    long long rests_until; /* ns of the monotonic clock */
    int helpers, apart, core; /* started; of these, those that are off that core */
    int missed;               /* phases in turn that the caller did alone */
    struct helper helper[HELPERS];
} pool = {.taken = ATOMIC_FLAG_INIT};

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void breathe(void) {
    for (int k = 0; k < 8; k++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
}

/* Claim and do parts until none is left; returns how many. What a claim reads behind the counter holds until its parts are counted as
   done: only then does the caller go on. */
static long claim_all(void) {
    long left = atomic_load(&pool.left), own = 0;
    while (left > 0) {
        long share = left / (2 * (atomic_load(&pool.seats) + 1)), least = atomic_load(&pool.least);
        long some = share > least ? share : least;
        some = some < left ? some : left;
        if (!atomic_compare_exchange_weak(&pool.left, &left, left - some))
            continue;
        long start = pool.parts - left;
        pool.run(pool.context, start, start + some);
        atomic_fetch_add(&pool.done, some);
        own += some;
        left = atomic_load(&pool.left);
    }
    return own;
}

static void *help(void *place) {
    struct helper *me = place;
    const int number = (int)(me - pool.helper);
    for (;;) {
        long long until = now() + SPIN;
        while (now() < until) {
            if (number < atomic_load(&pool.seats) && atomic_load(&pool.left) > 0) {
                claim_all();
                until = now() + SPIN;
            }
            breathe();
            sched_yield();
        }
        atomic_store(&me->asleep, 1);
        if (number < atomic_load(&pool.seats) && atomic_load(&pool.left) > 0 && atomic_exchange(&me->asleep, 0))
            continue;
        while (sem_wait(&me->wake))
            ;
    }
    return NULL;
}

/* The child has none of the threads, and nobody is in a call there. */
static void forget(void) {
    pool.helpers = pool.apart = 0;
    atomic_store(&pool.left, 0);
    atomic_flag_clear(&pool.taken);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

/* Start helpers until there are `wanted`; returns how many there are. */
static int started(int wanted) {
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pool.helpers >= wanted || pthread_attr_init(&attributes))
        return pool.helpers;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, HELPER_STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the program's own threads */
    while (pool.helpers < wanted) {
        struct helper *one = &pool.helper[pool.helpers];
        atomic_store(&one->asleep, 0);
        if (sem_init(&one->wake, 0, 0) || pthread_create(&one->thread, &attributes, help, one))
            break;
        pool.helpers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return pool.helpers;
}

/* Send the helpers to the cores that the caller may use, without the one on which it runs. Returns how many there are to
   use: none where there is no other core. */
static int apart(int helpers) {
#ifdef __linux__
    int core = sched_getcpu();
    cpu_set_t cores;
    if (core < 0 || (core == pool.core && pool.apart == helpers))
        return helpers;
    if (core >= CPU_SETSIZE || sched_getaffinity(0, sizeof cores, &cores))
        return helpers;
    CPU_CLR(core, &cores);
    if (CPU_COUNT(&cores) == 0)
        return 0;
    for (int k = 0; k < helpers; k++)
        pthread_setaffinity_np(pool.helper[k].thread, sizeof cores, &cores);
    pool.core = core;
    pool.apart = helpers;
#endif
    return helpers;
}

/* How many threads this call has, the caller among them; pool_leave() ends it. */
static int pool_enter(int threads) {
    if (threads < 2 || atomic_flag_test_and_set(&pool.taken))
        return 1;
    int helpers = now() < pool.rests_until ? 0 : apart(started(threads - 1 < HELPERS ? threads - 1 : HELPERS));
    if (helpers == 0) {
        atomic_flag_clear(&pool.taken);
        return 1;
    }
    int seats = helpers < threads - 1 ? helpers : threads - 1;
    atomic_store(&pool.seats, seats);
    return seats + 1;
}

static void pool_leave(int threads) {
    if (threads > 1)
        atomic_flag_clear(&pool.taken);
}

/* Does all parts, claimed `least` or more at a time, with the threads of pool_enter(). */
static void pool_run(int threads, phase run, void *context, long parts, long least) {
    if (threads < 2 || parts <= least) {
        run(context, 0, parts);
        return;
    }
    pool.run = run;
    pool.context = context;
    pool.parts = parts;
    atomic_store(&pool.least, least);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.left, parts);
    for (int k = 0; k < threads - 1; k++)
        if (atomic_load(&pool.helper[k].asleep) && atomic_exchange(&pool.helper[k].asleep, 0))
            sem_post(&pool.helper[k].wake);
    pool.missed = claim_all() == parts ? pool.missed + 1 : 0;
    if (pool.missed == MISSES) {
        pool.rests_until = now() + PAUSE;
        pool.missed = 0;
    }
    if (atomic_load(&pool.done) == parts)
        return;
    long long start = now(), waited = 0;
    while (atomic_load(&pool.done) < parts) {
        breathe();
        waited = now() - start;
        if (waited > LATE)
            sched_yield();
    }
    if (waited > LATE)
        pool.rests_until = start + waited + RESTS * waited;
}

#else

static int pool_enter(int threads) { return (void)threads, 1; }
static void pool_leave(int threads) { (void)threads; }
static void pool_run(int threads, phase run, void *context, long parts, long least) {
    (void)threads, (void)least;
    run(context, 0, parts);
}

#endif
#endif
