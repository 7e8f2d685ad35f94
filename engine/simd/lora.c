/* The thin products of adapters: one side is the rank, a handful. Adapters stand rank-major (rank rows as
 * long as the weight's), so that lanes run along the long side in every one of them.
 * Bound: the activations' bytes, and 2 n_tokens n_cols rank FLOPs. */

static void FN(lora_down)(const void *p, const struct worker *worker)
{
    const struct lora_down_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens * a->rank, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const float *x = a->x + i / a->rank * a->n_cols, *m = a->m + i % a->rank * a->n_cols;
        float sum = a->scale * v_dot(x, m, a->n_cols);
        a->u[i] = a->accumulate ? a->u[i] + sum : sum;
    }
}

static void FN(lora_up)(const void *p, const struct worker *worker)
{
    enum { COLUMNS = 64 };
    const struct lora_up_args *a = p;
    int64_t begin, end, blocks = (a->n_cols + COLUMNS - 1) / COLUMNS;
    worker_range(worker, a->n_tokens * blocks, 1, &begin, &end);
    for (int64_t k = begin; k < end; k++) {
        int64_t t = k / blocks, first = k % blocks * COLUMNS;
        int64_t last = first + COLUMNS < a->n_cols ? first + COLUMNS : a->n_cols;
        for (int64_t i = first; i < last; i += VL) {
            int64_t lanes = last - i < VL ? last - i : VL;
            vf sum = a->base ? v_load_n(a->base + t * a->n_cols + i, lanes) : v_zero();
            for (int64_t r = 0; r < a->rank; r++) {
                vf u = v_set1(a->scale * a->u[t * a->rank + r]);
                sum = v_fma(u, v_load_n(a->m + r * a->n_cols + i, lanes), sum);
            }
            v_store_n(a->y + t * a->n_cols + i, sum, lanes);
        }
    }
}

/* Columns are split; a column's sum runs over the tokens in order. RANKS rows of g share a load of x. */
static void FN(lora_outer)(const void *p, const struct worker *worker)
{
    enum { RANKS = 4, VECS = 4 };
    const struct lora_outer_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_cols, VECS * VL, &begin, &end);
    for (int64_t first = 0; first < a->rank; first += RANKS) {
        int64_t ranks = a->rank - first < RANKS ? a->rank - first : RANKS;
        for (int64_t i = begin; i < end; i += VL) {
            int64_t lanes = end - i < VL ? end - i : VL;
            vf sum[RANKS] = {v_zero(), v_zero(), v_zero(), v_zero()};
            for (int64_t t = 0; t < a->n_tokens; t++) {
                vf x = v_load_n(a->x + t * a->n_cols + i, lanes);
                const float *u = a->u + t * a->rank + first;
                for (int64_t r = 0; r < ranks; r++)
                    sum[r] = v_fma(v_set1(u[r]), x, sum[r]);
            }
            for (int64_t r = 0; r < ranks; r++) {
                float *g = a->g + (first + r) * a->n_cols + i;
                v_store_n(g, v_fma(v_set1(a->scale), sum[r], v_load_n(g, lanes)), lanes);
            }
        }
    }
}

static void FN(lora_gather)(const void *p, const struct worker *worker)
{
    const struct lora_gather_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        for (int64_t r = 0; r < a->rank; r++)
            a->u[t * a->rank + r] = a->m[r * a->n_cols + a->ids[t]];
}

/* Ranks are split, not tokens: the same token may stand in several rows. */
static void FN(lora_scatter)(const void *p, const struct worker *worker)
{
    const struct lora_scatter_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->rank, 1, &begin, &end);
    for (int64_t r = begin; r < end; r++)
        for (int64_t t = 0; t < a->n_tokens; t++)
            a->g[r * a->n_cols + a->ids[t]] += a->scale * a->du[t * a->rank + r];
}
