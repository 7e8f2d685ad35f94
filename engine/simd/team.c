/* The one parallel region of a graph's run. Threads are OpenMP's, so they live between runs. */
#include "team.h"

#include <omp.h>
#include <stddef.h>

void team_run(const struct step *steps, int64_t n_steps, int n_threads, char *scratch)
{
    struct team team = {0};
#pragma omp parallel num_threads(n_threads)
    {
        /* The runtime may grant fewer threads than asked for. */
        struct worker worker = {omp_get_thread_num(), omp_get_num_threads(), &team, NULL};
        worker.scratch = scratch + (int64_t)worker.index * WORKER_SCRATCH;
        for (int64_t i = 0; i < n_steps; i++) {
            if (steps[i].barrier)
                team_barrier(&worker);
            steps[i].run(steps[i].args, &worker);
        }
    }
}
