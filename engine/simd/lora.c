/* The thin products of adapters: one side is the rank, a handful. Adapters stand rank-major (rank rows as
 * long as the weight's), so that lanes run along the long side in every one of them.
 * Bound: the activations' bytes, and 2 n_tokens n_cols rank FLOPs. */

enum { DOWN_TOKENS = VL / DOWN_RANKS };

/* Adds what VL columns, or some at the end, give to the dots of DOWN_TOKENS tokens with DOWN_RANKS rows of m. */
V_INLINE void down_step(const int type, const struct lora_down_args *a, const float *m, int64_t t,
    int64_t i, int64_t lanes, vf sum[DOWN_TOKENS][DOWN_RANKS])
{
    vf row[DOWN_RANKS];
#pragma GCC unroll 4
    for (int j = 0; j < DOWN_RANKS; j++)
        row[j] = v_load_some(m + j * a->n_cols + i, lanes);
#pragma GCC unroll 4
    for (int k = 0; k < DOWN_TOKENS; k++) {
        vf x = load_as(type, a->x, (t + k) * a->x_stride + i, lanes);
#pragma GCC unroll 4
        for (int j = 0; j < DOWN_RANKS; j++)
            sum[k][j] = v_fma(x, row[j], sum[k][j]);
    }
}

/* Those dots: a vector holds the sums of a dot, and as there are VL of them, all are turned and added up at once. With
 * a dot at a time, sums across the lanes took half of the step, and each token loaded m again. */
V_INLINE void down_block(const int type, const struct lora_down_args *a,
    const struct lora_part *part, int64_t rank, int64_t t)
{
    vf sum[DOWN_TOKENS][DOWN_RANKS], column[VL];
    float sums[VL * VL], dots[VL];
    int64_t i = 0, n = a->n_cols;
    const float *m = part->m + rank * n;
#pragma GCC unroll 16
    for (int k = 0; k < VL; k++)
        sum[k / DOWN_RANKS][k % DOWN_RANKS] = v_zero();
    for (; i + VL <= n; i += VL)
        down_step(type, a, m, t, i, VL, sum);
    if (i < n)
        down_step(type, a, m, t, i, n - i, sum);
#pragma GCC unroll 16
    for (int k = 0; k < VL; k++)
        v_store(sums + k * VL, sum[k / DOWN_RANKS][k % DOWN_RANKS]);
    v_turn(sums, VL, column);
    for (int half = VL / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++)
            column[k] = v_add(column[k], column[k + half]);
    v_store(dots, v_mul(v_set1(a->scale), column[0]));
    for (int k = 0; k < VL; k++) {
        float *u = part->u + (t + k / DOWN_RANKS) * part->rank + rank + k % DOWN_RANKS;
        *u = a->accumulate ? *u + dots[k] : dots[k];
    }
}

/* Ranks `rank` ... of one token. */
V_INLINE void down_token(const int type, const struct lora_down_args *a,
    const struct lora_part *part, int64_t rank, int64_t t)
{
    down_row(type, TYPE_F32, (const char *)a->x + row_offset(type, t * a->x_stride),
        part->m + rank * a->n_cols, a->n_cols, part->rank - rank, a->scale, a->accumulate,
        part->u + t * part->rank + rank);
}

/* Tokens are met in blocks where a product of many follows; a few have the bits that each has alone. */
V_INLINE void down_tokens(
    const int type, const struct lora_down_args *a, int64_t begin, int64_t end)
{
    int64_t t = begin;
    for (; a->n_tokens > GEMV_TOKENS && t + DOWN_TOKENS <= end; t += DOWN_TOKENS)
        for (int64_t i = 0, rank; i < a->n_parts; i++) {
            for (rank = 0; rank + DOWN_RANKS <= a->parts[i].rank; rank += DOWN_RANKS)
                down_block(type, a, &a->parts[i], rank, t);
            for (int k = 0; rank < a->parts[i].rank && k < DOWN_TOKENS; k++)
                down_token(type, a, &a->parts[i], rank, t + k);
        }
    for (; t < end; t++)
        for (int64_t i = 0; i < a->n_parts; i++)
            down_token(type, a, &a->parts[i], 0, t);
}

static void FN(lora_down)(const void *p, const struct worker *worker)
{
    const struct lora_down_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, DOWN_TOKENS, &begin, &end);
    if (a->x_type == TYPE_BF16)
        down_tokens(TYPE_BF16, a, begin, end);
    else
        down_tokens(TYPE_F32, a, begin, end);
}

static void FN(lora_up)(const void *p, const struct worker *worker)
{
    const struct lora_up_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    FN(up_columns)(a, begin, end, 0, a->n_cols);
}

enum {
    OUTER_RANKS = 4,
    OUTER_VECS = 4,
    OUTER_SPAN =
        512, /* columns whose sums are worked on at a time: few ranks stay in the first cache */
    OUTER_TOKENS = 8,   /* with so many tokens, for one rank after another */
    OUTER_WINDOW = 256, /* ranks of each adapter whose sums the scratch holds */
};

_Static_assert((int64_t)LORA_PARTS * OUTER_WINDOW * OUTER_SPAN * 4 <= WORKER_SCRATCH,
    "sums of the ranks of all adapters do not fit a worker's scratch");

/* sums[r][c] += sum over tokens of u[t][r] x[t][c] for some ranks and `vecs` VL columns: a load of x serves all ranks,
 * and a column's sum runs over the tokens in order. The same columns of the tokens that come next are asked for.
 * Called with constants, so that sums stay in registers. */
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

/* Adds to `ranks` rows of sums, for n columns from `first` on, what tokens t ... give. */
V_INLINE void outer_tokens(const int type, const int ranks, const struct lora_outer_args *a,
    const struct lora_part *part, int64_t rank, int64_t t, int64_t first, int64_t n, float *sums)
{
    int64_t i = 0, tokens = at_most(a->n_tokens - t, OUTER_TOKENS);
    int64_t at = t * a->x_stride + first;
    const float *u = part->u + t * part->rank + rank;
    for (; i + OUTER_VECS * VL <= n; i += OUTER_VECS * VL)
        outer_block(type, ranks, OUTER_VECS, tokens, a->x, at + i, a->x_stride, u, part->rank, VL,
            sums + i);
    for (; i < n; i += VL)
        outer_block(type, ranks, 1, tokens, a->x, at + i, a->x_stride, u, part->rank,
            at_most(n - i, VL), sums + i);
}

/* Ranks of a part from `rank` on that are worked on together, of those below `end`. */
V_INLINE int64_t some_ranks(int64_t rank, int64_t end)
{
    return end - rank < OUTER_RANKS ? 1 : OUTER_RANKS;
}

/* How many ranks of all parts are worked on together. */
V_INLINE int64_t window_ranks(const struct lora_outer_args *a, int64_t window)
{
    int64_t ranks = 0;
    for (int64_t i = 0; i < a->n_parts; i++)
        ranks += at_most(a->parts[i].rank - window, OUTER_WINDOW);
    return ranks;
}

/* Sums over all tokens for n columns from `first` on and a window of every part's ranks, a row a rank. Tokens come
 * in order, some at a time, and meet all adapters while they are in the first cache. */
V_INLINE void outer_sums(const int type, const struct lora_outer_args *a, int64_t window,
    int64_t first, int64_t n, float *sums)
{
    for (int64_t t = 0; t < a->n_tokens; t += OUTER_TOKENS) {
        float *row = sums;
        for (int64_t i = 0; i < a->n_parts; i++) {
            const struct lora_part *part = &a->parts[i];
            int64_t end = at_most(part->rank, window + OUTER_WINDOW), ranks;
            for (int64_t r = window; r < end; r += ranks, row += ranks * OUTER_SPAN) {
                ranks = some_ranks(r, end);
                if (ranks == 1)
                    outer_tokens(type, 1, a, part, r, t, first, n, row);
                else
                    outer_tokens(type, OUTER_RANKS, a, part, r, t, first, n, row);
            }
        }
    }
}

/* The gradients of those ranks grow by scale times the sums. */
static void FN(add_outer)(
    const struct lora_outer_args *a, int64_t window, int64_t first, int64_t n, const float *sums)
{
    vf scale = v_set1(a->scale);
    for (int64_t k = 0; k < a->n_parts; k++) {
        const struct lora_part *part = &a->parts[k];
        int64_t end = at_most(part->rank, window + OUTER_WINDOW);
        for (int64_t r = window; r < end; r++, sums += OUTER_SPAN)
            for (int64_t i = 0; i < n; i += VL) {
                float *g = part->m + r * a->n_cols + first + i;
                int64_t lanes = at_most(n - i, VL);
                v_store_some(g, v_fma(scale, v_load(sums + i), v_load_some(g, lanes)), lanes);
            }
    }
}

static void FN(lora_outer)(const void *p, const struct worker *worker)
{
    const struct lora_outer_args *a = p;
    float *sums = (float *)(void *)worker->scratch;
    int64_t begin, end, ranks = 0;
    for (int64_t i = 0; i < a->n_parts; i++)
        ranks = ranks < a->parts[i].rank ? a->parts[i].rank : ranks;
    worker_range(worker, a->n_cols, OUTER_VECS * VL, &begin, &end);
    for (int64_t first = begin; first < end; first += OUTER_SPAN) {
        int64_t n = at_most(end - first, OUTER_SPAN);
        for (int64_t window = 0; window < ranks; window += OUTER_WINDOW) {
            memset(sums, 0, (size_t)(window_ranks(a, window) * OUTER_SPAN) * sizeof *sums);
            if (a->x_type == TYPE_BF16)
                outer_sums(TYPE_BF16, a, window, first, n, sums);
            else
                outer_sums(TYPE_F32, a, window, first, n, sums);
            FN(add_outer)(a, window, first, n, sums);
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
