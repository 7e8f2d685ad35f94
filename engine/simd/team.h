/* How threads share work: one parallel region runs a list of steps; inside it workers split the rows or
 * tiles of every step by their index and meet at a barrier where one step reads what others wrote. */
#ifndef CYLORA_TEAM_H
#define CYLORA_TEAM_H

#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

struct team {
    int count;
    int waiting;    /* workers that have arrived */
    int generation; /* rises each time all have */
};

struct worker {
    int index, count;
    struct team *team;
    char *scratch;   /* WORKER_SCRATCH bytes of its own, 64-byte aligned */
    int64_t *waited; /* nanoseconds at barriers, if they are asked for */
};

enum { WORKER_SCRATCH = 4 << 20, MAX_WORKERS = 512 };

/* A step's work, called by every worker of the team with the same arguments. */
typedef void (*op_fn)(const void *args, const struct worker *worker);

struct step {
    op_fn run;
    const void *args;
    int64_t barrier; /* all workers must have finished the steps before this one */
};

/* Nanoseconds added up over runs: of each step as worker 0 saw it, waits included; of each worker at barriers. */
struct team_clock {
    int64_t *steps, *waits;
};

/* Runs the steps with n_threads workers; scratch holds n_threads * WORKER_SCRATCH bytes. clock may be NULL. */
void team_run(const struct step *steps, int64_t n_steps, int n_threads, char *scratch,
    const struct team_clock *clock);

static inline int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Spins, for steps are short; yields once in a while, for cores may be fewer than workers. */
static inline void team_wait(const struct worker *w)
{
    struct team *team = w->team;
    int generation = __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->waiting, 1, __ATOMIC_ACQ_REL) == w->count) {
        __atomic_store_n(&team->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->generation, generation + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 1; __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == generation;
        spins++) {
        if (spins % 4096 == 0)
            sched_yield();
        else
            _mm_pause();
    }
}

static inline void team_barrier(const struct worker *w)
{
    if (w->count == 1)
        return;
    int64_t begin = w->waited ? nanoseconds() : 0;
    team_wait(w);
    if (w->waited)
        *w->waited += nanoseconds() - begin;
}

/* The part [*begin, *end) of n items, in multiples of grain, that falls to this worker. */
static inline void worker_range(
    const struct worker *w, int64_t n, int64_t grain, int64_t *begin, int64_t *end)
{
    int64_t grains = (n + grain - 1) / grain;
    int64_t first = grains * w->index / w->count * grain;
    int64_t last = grains * (w->index + 1) / w->count * grain;
    *begin = first < n ? first : n;
    *end = last < n ? last : n;
}

#endif
