/* The threads that help one call: those of the OpenMP runtime that torch has, which its own operators use.

   A job runs on the thread that calls. Its phases have parts; the threads of the team claim some at a time from one
   counter, more while many are left. The caller claims too and can do all of them: within a job it waits only for parts
   that others have claimed, never for a thread that has not come. The runtime ends the call when all its threads have come
   and gone. Where one was late by w, since something else has its core, jobs run on the caller alone for RESTS w; so that
   costs little on average.

   Threads of our own would not do: those of the runtime spin for milliseconds when an operator of torch is done, and would
   have the cores. The runtime is given by tdc_runtime(). Without one, and in the child of a fork, where its threads are
   gone, everything runs on the caller.
*/
#ifndef TDC_TEAM
#define TDC_TEAM

#include <stdatomic.h>

#define EXPORT __attribute__((visibility("default")))

struct team;

/* Does parts [start, stop) of a phase. */
typedef void (*phase)(void *context, long start, long stop);

/* Does all its phases, each by team_run(). */
typedef void (*job)(void *context, struct team *team);

/* Runs the function on some threads, this one among them, and returns when all are done: GOMP_parallel. */
typedef void (*runtime)(void (*run)(void *), void *context, unsigned threads, unsigned flags);

#ifdef TDC_THREADS

#include <pthread.h>
#include <sched.h>
#include <time.h>

enum { LATE = 20000, RESTS = 16, PATIENCE = 64 };

struct team {
    int threads; /* that may claim, the caller among them */
    pthread_t caller;
    job work;
    void *job_context;
    phase run;
    void *context;
    long parts;
    long long waited, over_at; /* ns */
    atomic_long left, done;    /* parts that nobody has claimed, and that are finished */
    atomic_long least;         /* parts that are worth a claim */
    atomic_int seats;          /* helpers that may still come */
    atomic_int over;
};

static runtime on_threads;
static atomic_llong rests_until; /* ns of the monotonic clock */

EXPORT void tdc_runtime(runtime given) { on_threads = given; }

static void forget(void) { on_threads = 0; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget); }

static long long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Claim and do parts until none is left. What a claim reads behind the counter holds until its parts are counted as done:
   only then does the caller go on. */
static void claim_all(struct team *t) {
    long left = atomic_load(&t->left);
    while (left > 0) {
        long share = left / (2 * t->threads), least = atomic_load(&t->least);
        long some = share > least ? share : least;
        some = some < left ? some : left;
        if (!atomic_compare_exchange_weak(&t->left, &left, left - some))
            continue;
        long start = t->parts - left;
        t->run(t->context, start, start + some);
        atomic_fetch_add(&t->done, some);
        left = atomic_load(&t->left);
    }
}

static void member(void *given) {
    struct team *t = given;
    if (pthread_equal(pthread_self(), t->caller)) {
        t->work(t->job_context, t);
        t->over_at = now();
        atomic_store(&t->over, 1);
    } else if (atomic_fetch_sub(&t->seats, 1) > 0)
        for (int idle = 0; !atomic_load(&t->over); idle++) {
            if (atomic_load(&t->left) > 0) {
                claim_all(t);
                idle = 0;
            }
            breathe();
            if (idle > PATIENCE)
                sched_yield();
        }
}

/* Does the job with `seats` of the `threads` that torch has. All of them are asked: the runtime ends those that it is not
   asked for. */
static void team_call(int threads, int seats, job work, void *context) {
    struct team t = {.threads = 1, .caller = pthread_self(), .work = work, .job_context = context};
    if (seats < 2 || !on_threads || now() < atomic_load(&rests_until)) {
        work(context, &t);
        return;
    }
    t.threads = seats;
    atomic_store(&t.seats, seats - 1);
    on_threads(member, &t, (unsigned)threads, 0);
    long long end = now(), waited = t.waited + end - t.over_at;
    if (waited > LATE)
        atomic_store(&rests_until, end + RESTS * waited);
}

/* Does all parts, claimed `least` or more at a time. */
static void team_run(struct team *t, phase run, void *context, long parts, long least) {
    if (t->threads < 2 || parts <= least) {
        run(context, 0, parts);
        return;
    }
    t->run = run;
    t->context = context;
    t->parts = parts;
    atomic_store(&t->least, least);
    atomic_store(&t->done, 0);
    atomic_store(&t->left, parts);
    claim_all(t);
    if (atomic_load(&t->done) == parts)
        return;
    long long start = now(), waited = 0;
    while (atomic_load(&t->done) < parts) {
        breathe();
        waited = now() - start;
        if (waited > LATE)
            sched_yield();
    }
    t->waited += waited > LATE ? waited : 0;
}

#else

struct team {
    int threads;
};

EXPORT void tdc_runtime(runtime given) { (void)given; }

static void team_call(int threads, int seats, job work, void *context) {
    struct team t = {1};
    (void)threads, (void)seats;
    work(context, &t);
}

static void team_run(struct team *t, phase run, void *context, long parts, long least) {
    (void)t, (void)least;
    run(context, 0, parts);
}

#endif
#endif
