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

enum { OUTER_RANKS = 4, OUTER_VECS = 4 };

/* Columns i ... i + vecs VL of `ranks` rows of g: a load of x serves them all, and a column's sum runs over the
 * tokens in order. Called with constants, so that the sums stay in registers. */
V_INLINE void outer_block(const struct lora_outer_args *a, const int ranks, const int vecs,
    int64_t first, int64_t i, int64_t lanes)
{
    vf sum[OUTER_RANKS][OUTER_VECS], scale = v_set1(a->scale);
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            sum[r][j] = v_zero();
    for (int64_t t = 0; t < a->n_tokens; t++) {
        const float *x = a->x + t * a->n_cols + i, *u = a->u + t * a->rank + first;
        vf row[OUTER_VECS];
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            row[j] = vecs == 1 ? v_load_n(x, lanes) : v_load(x + j * VL);
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
            for (int j = 0; j < vecs; j++)
                sum[r][j] = v_fma(v_set1(u[r]), row[j], sum[r][j]);
    }
    for (int r = 0; r < ranks; r++)
        for (int j = 0; j < vecs; j++) {
            float *g = a->g + (first + r) * a->n_cols + i + j * VL;
            int64_t n = vecs == 1 ? lanes : VL;
            v_store_n(g, v_fma(scale, sum[r][j], v_load_n(g, n)), n);
        }
}

static void FN(lora_outer)(const void *p, const struct worker *worker)
{
    const struct lora_outer_args *a = p;
    int64_t begin, end, wide = OUTER_VECS * VL;
    worker_range(worker, a->n_cols, wide, &begin, &end);
    for (int64_t r = 0; r < a->rank;) {
        int ranks = a->rank - r >= OUTER_RANKS ? OUTER_RANKS : 1;
        int64_t i = begin;
        for (; i + wide <= end; i += wide) {
            if (ranks == OUTER_RANKS)
                outer_block(a, OUTER_RANKS, OUTER_VECS, r, i, VL);
            else
                outer_block(a, 1, OUTER_VECS, r, i, VL);
        }
        for (; i < end; i += VL) {
            int64_t lanes = end - i < VL ? end - i : VL;
            if (ranks == OUTER_RANKS)
                outer_block(a, OUTER_RANKS, 1, r, i, lanes);
            else
                outer_block(a, 1, 1, r, i, lanes);
        }
        r += ranks;
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
