/* The thin products of adapters: one side is the rank, a handful. Adapters stand rank-major (rank rows as
 * long as the weight's), so that lanes run along the long side in every one of them.
 * Bound: the activations' bytes, and 2 n_tokens n_cols rank FLOPs. */

V_INLINE void down_rows(const int type, const struct lora_down_args *a, int64_t begin, int64_t end)
{
    for (int64_t t = begin; t < end; t++)
        down_row(type, TYPE_F32, (const char *)a->x + row_offset(type, t * a->x_stride), a->m,
            a->n_cols, a->rank, a->scale, a->accumulate, a->u + t * a->rank);
}

static void FN(lora_down)(const void *p, const struct worker *worker)
{
    const struct lora_down_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    if (a->x_type == TYPE_BF16)
        down_rows(TYPE_BF16, a, begin, end);
    else
        down_rows(TYPE_F32, a, begin, end);
}

enum { UP_COLUMNS = 64 };

/* UP_COLUMNS of a row, whose sums stay in registers. */
V_INLINE void up_block(const struct lora_up_args *a, int64_t t, int64_t first)
{
    vf sum[UP_COLUMNS / VL];
    int64_t at = t * a->n_cols + first;
#pragma GCC unroll 8
    for (int j = 0; j < UP_COLUMNS / VL; j++)
        sum[j] = a->base ? v_load(a->base + at + j * VL) : v_zero();
    for (int64_t r = 0; r < a->rank; r++) {
        vf u = v_set1(a->scale * a->u[t * a->rank + r]);
#pragma GCC unroll 8
        for (int j = 0; j < UP_COLUMNS / VL; j++)
            sum[j] = v_fma(u, v_load(a->m + r * a->n_cols + first + j * VL), sum[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < UP_COLUMNS / VL; j++)
        v_store(a->y + at + j * VL, sum[j]);
}

static void FN(lora_up)(const void *p, const struct worker *worker)
{
    enum { COLUMNS = UP_COLUMNS };
    const struct lora_up_args *a = p;
    int64_t begin, end, blocks = (a->n_cols + COLUMNS - 1) / COLUMNS;
    worker_range(worker, a->n_tokens * blocks, 1, &begin, &end);
    for (int64_t k = begin; k < end; k++) {
        int64_t t = k / blocks, first = k % blocks * COLUMNS;
        int64_t last = first + COLUMNS < a->n_cols ? first + COLUMNS : a->n_cols;
        int64_t i = first, at = t * a->n_cols;
        if (last - first == COLUMNS) {
            up_block(a, t, first);
            continue;
        }
        for (; i < last; i += VL) {
            int64_t lanes = last - i < VL ? last - i : VL;
            vf sum = a->base ? v_load_some(a->base + at + i, lanes) : v_zero();
            for (int64_t r = 0; r < a->rank; r++) {
                vf u = v_set1(a->scale * a->u[t * a->rank + r]);
                sum = v_fma(u, v_load_some(a->m + r * a->n_cols + i, lanes), sum);
            }
            v_store_some(a->y + at + i, sum, lanes);
        }
    }
}

enum { OUTER_RANKS = 4, OUTER_VECS = 4, OUTER_SPAN = 1024, OUTER_TOKENS = 8 };

/* sums[r][c] += sum over tokens of u[t][r] x[t][c] for some ranks and `vecs` VL columns: a load of x serves all ranks,
 * and a column's sum runs over the tokens in order. The same columns of the tokens that come next are asked for. Called with constants, so that sums stay in registers. */
V_INLINE void outer_block(const int type, const int ranks, const int vecs, int64_t n_tokens,
    const void *x, int64_t at, int64_t x_stride, const float *u, int64_t u_stride, int64_t lanes,
    float *sums)
{
    const int64_t size = type == TYPE_F32 ? sizeof(float) : sizeof(uint16_t);

    vf sum[OUTER_RANKS][OUTER_VECS];
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            sum[r][j] = v_load(sums + r * OUTER_SPAN + j * VL);
    for (int64_t t = 0; t < n_tokens; t++, at += x_stride, u += u_stride) {
        vf row[OUTER_VECS];
        for (int64_t line = 0; line < vecs * VL * size; line += 64)
            prefetch_row(x, (OUTER_TOKENS * x_stride + at) * size + line);
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            row[j] = load_as(type, x, at + j * VL, vecs == 1 ? lanes : VL);
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
            for (int j = 0; j < vecs; j++)
                sum[r][j] = v_fma(v_set1(u[r]), row[j], sum[r][j]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++)
            v_store(sums + r * OUTER_SPAN + j * VL, sum[r][j]);
}

/* `ranks` rows of sums over all tokens for n columns from `first` on: rows of x come in order, some at a time. */
V_INLINE void outer_sums(const int type, const int ranks, const struct lora_outer_args *a,
    int64_t rank, int64_t first, int64_t n, float *sums)
{
    const int64_t wide = OUTER_VECS * VL;
    memset(sums, 0, (size_t)(ranks * OUTER_SPAN) * sizeof *sums);
    for (int64_t t = 0; t < a->n_tokens; t += OUTER_TOKENS) {
        int64_t i = 0, tokens = a->n_tokens - t < OUTER_TOKENS ? a->n_tokens - t : OUTER_TOKENS;
        int64_t at = t * a->x_stride + first;
        const float *u = a->u + t * a->rank + rank;
        for (; i + wide <= n; i += wide)
            outer_block(type, ranks, OUTER_VECS, tokens, a->x, at + i, a->x_stride, u, a->rank, VL,
                sums + i);
        for (; i < n; i += VL)
            outer_block(type, ranks, 1, tokens, a->x, at + i, a->x_stride, u, a->rank,
                n - i < VL ? n - i : VL, sums + i);
    }
}

V_INLINE void outer_ranks(const int ranks, const struct lora_outer_args *a, int64_t rank,
    int64_t first, int64_t n, float *sums)
{
    if (a->x_type == TYPE_BF16)
        outer_sums(TYPE_BF16, ranks, a, rank, first, n, sums);
    else
        outer_sums(TYPE_F32, ranks, a, rank, first, n, sums);
}

static void FN(lora_outer)(const void *p, const struct worker *worker)
{
    const struct lora_outer_args *a = p;
    float *sums = (float *)(void *)worker->scratch;
    int64_t begin, end, ranks;
    vf scale = v_set1(a->scale);
    worker_range(worker, a->n_cols, OUTER_VECS * VL, &begin, &end);
    for (int64_t first = begin; first < end; first += OUTER_SPAN) {
        int64_t n = end - first < OUTER_SPAN ? end - first : OUTER_SPAN;
        for (int64_t rank = 0; rank < a->rank; rank += ranks) {
            ranks = a->rank - rank < OUTER_RANKS ? 1 : OUTER_RANKS;
            if (ranks == 1)
                outer_ranks(1, a, rank, first, n, sums);
            else
                outer_ranks(OUTER_RANKS, a, rank, first, n, sums);
            for (int64_t r = 0; r < ranks; r++)
                for (int64_t i = 0; i < n; i += VL) {
                    float *g = a->g + (rank + r) * a->n_cols + first + i;
                    int64_t lanes = n - i < VL ? n - i : VL;
                    vf sum = v_load(sums + r * OUTER_SPAN + i);
                    v_store_some(g, v_fma(scale, sum, v_load_some(g, lanes)), lanes);
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
