/* The one parallel region of a graph's run. Threads are OpenMP's, so they live between runs. */
#include "team.h"

#include <omp.h>
#include <stddef.h>

static void run_steps(const struct step *steps, int64_t n_steps, const struct worker *worker,
    const struct team_clock *clock)
{
    int64_t before = clock ? nanoseconds() : 0;
    for (int64_t i = 0; i < n_steps; i++) {
        if (steps[i].barrier)
            team_barrier(worker);
        steps[i].run(steps[i].args, worker);
        if (clock && worker->index == 0) {
            int64_t now = nanoseconds();
            clock->steps[i] += now - before;
            before = now;
        }
    }
}

void team_run(const struct step *steps, int64_t n_steps, int n_threads, char *scratch,
    const struct team_clock *clock)
{
    struct team team = {0};
#pragma omp parallel num_threads(n_threads)
    {
        /* The runtime may grant fewer threads than asked for. */
        struct worker worker = {.index = omp_get_thread_num(),
            .count = omp_get_num_threads(),
            .team = &team,
            .waited = clock ? clock->waits + omp_get_thread_num() : NULL};
        worker.scratch = scratch + (int64_t)worker.index * WORKER_SCRATCH;
        run_steps(steps, n_steps, &worker, clock);
    }
}
