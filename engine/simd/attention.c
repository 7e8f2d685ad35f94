/* Causal attention with a streaming softmax, and its gradient. Scores of all pairs never stand in memory.
 *
 * An item of work is one key head of one sequence and a block of query tokens: all query heads of the group
 * stack as rows, so that each loaded key serves them all. Keys pass in blocks of KEYS: scores by the register
 * tile (rows x KEYS), a running maximum and sum per row (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
 * arXiv:2205.14135), then the products with the values, again by the tile.
 * Bound: 4 n_head head_dim FLOPs for each pair of query and visible key. */

#define BLOCK_PRODUCT CAT(block_product_f32, VARIANT)

enum { KEYS = 64, QUERY_ROWS = 96 };

/* Where an item's rows come from. Row i is query token first + i / group, head group_head + i % group. */
struct query_block {
    int64_t seq, head, first, tokens, group, rows;
};

V_INLINE int64_t query_tokens(int64_t group) { return group < QUERY_ROWS ? QUERY_ROWS / group : 1; }

V_INLINE struct query_block query_block_of(
    int64_t item, int64_t n_query, int64_t n_head, int64_t n_head_kv, int64_t tokens)
{
    int64_t blocks = (n_query + tokens - 1) / tokens;
    struct query_block b = {.group = n_head / n_head_kv};
    b.first = (blocks - 1 - item % blocks) * tokens; /* the blocks that see most keys come first */
    b.head = item / blocks % n_head_kv;
    b.seq = item / blocks / n_head_kv;
    b.tokens = n_query - b.first < tokens ? n_query - b.first : tokens;
    b.rows = b.tokens * b.group;
    return b;
}

/* Element offset of row i of the block in a matrix of n_head * dim columns. */
V_INLINE int64_t query_offset(
    const struct query_block *b, int64_t n_query, int64_t n_head, int64_t dim, int64_t i)
{
    int64_t token = b->seq * n_query + b->first + i / b->group;
    return (token * n_head + b->head * b->group + i % b->group) * dim;
}

/* dst[i][0 ... dim) = scale src row, zero up to `stride` columns. */
static void FN(load_rows)(const struct query_block *b, const float *src, int64_t n_query,
    int64_t n_head, int64_t dim, float scale, float *dst, int64_t stride)
{
    for (int64_t i = 0; i < b->rows; i++) {
        const float *x = src + query_offset(b, n_query, n_head, dim, i);
        for (int64_t j = 0; j < stride; j += VL) {
            int64_t lanes = dim - j < VL ? dim - j : VL;
            v_store(dst + i * stride + j, v_mul(v_set1(scale), v_load_n(x + j, lanes)));
        }
    }
}

/* Keys or values first ... first + n of one head as KEYS float rows of `stride`, zero beyond. */
static void FN(load_keys)(const void *src, int type, int64_t row, int64_t n, int64_t width,
    int64_t column, int64_t dim, float *dst, int64_t stride)
{
    int64_t size = type == TYPE_F16 ? 2 : 4;
    memset(dst, 0, (size_t)(KEYS * stride) * sizeof *dst);
    for (int64_t j = 0; j < n; j++)
        FN(decode_row)(
            type, (const char *)src + ((row + j) * width + column) * size, dim, dst + j * stride);
}

/* One row of scores to probabilities relative to the row's running maximum; the first n of KEYS count. */
V_INLINE void soften(float *score, int64_t n, float *maximum, float *sum, float *correction)
{
    vf top = v_set1(-INFINITY);
    for (int64_t j = 0; j < n; j += VL) {
        vf s = v_load(score + j);
        top = v_max(top, v_blend_n(s, top, n - j < VL ? n - j : VL));
    }
    float old = *maximum, largest = v_max_lane(top);
    largest = largest > old ? largest : old;
    vf total = v_zero();
    for (int64_t j = 0; j < KEYS; j += VL) {
        int64_t lanes = n - j < 0 ? 0 : n - j < VL ? n - j : VL;
        vf e = v_keep_n(v_exp(v_sub(v_load(score + j), v_set1(largest))), lanes);
        v_store(score + j, e);
        total = v_add(total, e);
    }
    *correction = old == -INFINITY ? 0.0f : expf(old - largest);
    *sum = *sum * *correction + v_sum(total);
    *maximum = largest;
}

static void FN(attend)(const struct attention_args *a, struct query_block b, char *scratch)
{
    int64_t d = a->head_dim, dp = padded(d), n_past = a->n_past ? *a->n_past : 0;
    float *q = (float *)(void *)scratch, *out = q + b.rows * dp, *score = out + b.rows * dp;
    float *keys = score + b.rows * KEYS, *turned = keys + KEYS * dp, *values = turned + dp * KEYS;
    float *maximum = values + KEYS * dp, *sum = maximum + b.rows;
    FN(load_rows)(&b, a->q, a->n_query, a->n_head, d, a->scale, q, dp);
    memset(out, 0, (size_t)(b.rows * dp) * sizeof *out);
    for (int64_t i = 0; i < b.rows; i++) {
        maximum[i] = -INFINITY;
        sum[i] = 0;
    }
    int64_t width = a->n_head_kv * d, visible = n_past + b.first + b.tokens;
    for (int64_t j = 0; j < visible; j += KEYS) {
        int64_t n = visible - j < KEYS ? visible - j : KEYS, row = b.seq * a->kv_seq_rows + j;
        FN(load_keys)(a->k, (int)a->type, row, n, width, b.head * d, d, keys, dp);
        FN(load_keys)(a->v, (int)a->type, row, n, width, b.head * d, d, values, dp);
        FN(transpose)(keys, dp, KEYS, d, turned, KEYS);
        BLOCK_PRODUCT(b.rows, KEYS, d, q, dp, turned, KEYS, score, KEYS, 0);
        for (int64_t i = 0; i < b.rows; i++) {
            int64_t sees = n_past + b.first + i / b.group + 1 - j;
            sees = sees < 0 ? 0 : sees < n ? sees : n;
            if (sees == 0) {
                memset(score + i * KEYS, 0, KEYS * sizeof *score);
                continue;
            }
            float correction;
            soften(score + i * KEYS, sees, maximum + i, sum + i, &correction);
            for (int64_t c = 0; c < dp; c += VL)
                v_store(out + i * dp + c, v_mul(v_load(out + i * dp + c), v_set1(correction)));
        }
        BLOCK_PRODUCT(b.rows, dp, n, score, KEYS, values, dp, out, dp, 1);
    }
    for (int64_t i = 0; i < b.rows; i++) {
        int64_t offset = query_offset(&b, a->n_query, a->n_head, d, i);
        for (int64_t c = 0; c < d; c += VL)
            v_store_n(a->out + offset + c, v_mul(v_load(out + i * dp + c), v_set1(1.0f / sum[i])),
                d - c < VL ? d - c : VL);
        if (a->lse)
            a->lse[offset / d] = maximum[i] + logf(sum[i]);
    }
}

static void FN(attention)(const void *p, const struct worker *worker)
{
    const struct attention_args *a = p;
    int64_t tokens = query_tokens(a->n_head / a->n_head_kv);
    int64_t items = a->n_seq * a->n_head_kv * ((a->n_query + tokens - 1) / tokens);
    for (int64_t item = worker->index; item < items; item += worker->count)
        FN(attend)(
            a, query_block_of(item, a->n_query, a->n_head, a->n_head_kv, tokens), worker->scratch);
}

/* delta[t][h] = dout[t][h] . out[t][h], which is sum_j p_j dp_j */
static void FN(attention_delta)(const struct attention_back_args *a, const struct worker *worker)
{
    int64_t begin, end, d = a->head_dim;
    worker_range(worker, a->n_seq * a->n_query * a->n_head, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        a->delta[i] = v_dot(a->dout + i * d, a->out + i * d, d);
}

/* Working space of one item on the way back. */
struct back_space {
    float *q, *dout, *p, *dp, *turned_p, *dq;                     /* rows x ...  */
    float *keys, *turned_keys, *values, *turned_values, *dk, *dv; /* KEYS x ... */
};

/* Probabilities again from the saved log-sum, and dS = P (dP - delta), one row. */
V_INLINE void score_gradient(float *p, float *dp, int64_t sees, float lse, float delta)
{
    for (int64_t j = 0; j < KEYS; j += VL) {
        int64_t lanes = sees - j < 0 ? 0 : sees - j < VL ? sees - j : VL;
        vf e = v_keep_n(v_exp(v_sub(v_load(p + j), v_set1(lse))), lanes);
        v_store(p + j, e);
        v_store(dp + j, v_mul(e, v_sub(v_load(dp + j), v_set1(delta))));
    }
}

static void FN(attend_back_block)(const struct attention_back_args *a, const struct query_block *b,
    int64_t key, const struct back_space *s)
{
    int64_t d = a->head_dim, dp = padded(d), rp = padded(b->rows);
    FN(load_rows)(b, a->q, a->n_query, a->n_head, d, a->scale, s->q, dp);
    FN(load_rows)(b, a->dout, a->n_query, a->n_head, d, 1.0f, s->dout, dp);
    BLOCK_PRODUCT(b->rows, KEYS, d, s->q, dp, s->turned_keys, KEYS, s->p, KEYS, 0);
    BLOCK_PRODUCT(b->rows, KEYS, d, s->dout, dp, s->turned_values, KEYS, s->dp, KEYS, 0);
    for (int64_t i = 0; i < b->rows; i++) {
        int64_t sees = b->first + i / b->group + 1 - key;
        int64_t at = query_offset(b, a->n_query, a->n_head, d, i) / d;
        score_gradient(
            s->p + i * KEYS, s->dp + i * KEYS, sees < 0 ? 0 : sees, a->lse[at], a->delta[at]);
    }
    FN(transpose)(s->p, KEYS, b->rows, KEYS, s->turned_p, rp);
    BLOCK_PRODUCT(KEYS, dp, b->rows, s->turned_p, rp, s->dout, dp, s->dv, dp, 1);
    FN(transpose)(s->dp, KEYS, b->rows, KEYS, s->turned_p, rp);
    BLOCK_PRODUCT(KEYS, dp, b->rows, s->turned_p, rp, s->q, dp, s->dk, dp, 1);
    BLOCK_PRODUCT(b->rows, dp, KEYS, s->dp, KEYS, s->keys, dp, s->dq, dp, 0);
    for (int64_t i = 0; i < b->rows; i++) {
        float *dq = a->dq + query_offset(b, a->n_query, a->n_head, d, i);
        for (int64_t c = 0; c < d; c += VL) {
            int64_t lanes = d - c < VL ? d - c : VL;
            vf old = key > 0 ? v_load_n(dq + c, lanes) : v_zero();
            v_store_n(dq + c, v_fma(v_set1(a->scale), v_load(s->dq + i * dp + c), old), lanes);
        }
    }
}

/* One key head of one sequence: key blocks outside, the query blocks that see them inside. */
static void FN(attend_back)(
    const struct attention_back_args *a, int64_t seq, int64_t head, char *scratch)
{
    int64_t d = a->head_dim, dp = padded(d), width = a->n_head_kv * d;
    int64_t group = a->n_head / a->n_head_kv, tokens = query_tokens(group);
    int64_t rows = padded(tokens * group), blocks = (a->n_query + tokens - 1) / tokens;
    struct back_space s;
    float *f = (float *)(void *)scratch;
    float **parts[] = {&s.q, &s.dout, &s.dq, &s.p, &s.dp, &s.turned_p, &s.keys, &s.values, &s.dk,
        &s.dv, &s.turned_keys, &s.turned_values};
    int64_t sizes[] = {rows * dp, rows * dp, rows * dp, rows * KEYS, rows * KEYS, rows * KEYS,
        KEYS * dp, KEYS * dp, KEYS * dp, KEYS * dp, KEYS * dp, KEYS * dp};
    for (int i = 0; i < 12; f += sizes[i], i++)
        *parts[i] = f;
    for (int64_t key = 0; key < a->n_query; key += KEYS) {
        int64_t n = a->n_query - key < KEYS ? a->n_query - key : KEYS, row = seq * a->n_query + key;
        FN(load_keys)(a->k, TYPE_F32, row, n, width, head * d, d, s.keys, dp);
        FN(load_keys)(a->v, TYPE_F32, row, n, width, head * d, d, s.values, dp);
        FN(transpose)(s.keys, dp, KEYS, d, s.turned_keys, KEYS);
        FN(transpose)(s.values, dp, KEYS, d, s.turned_values, KEYS);
        memset(s.dk, 0, (size_t)(KEYS * dp) * sizeof(float));
        memset(s.dv, 0, (size_t)(KEYS * dp) * sizeof(float));
        for (int64_t block = 0; block < blocks; block++) {
            int64_t item = (seq * a->n_head_kv + head) * blocks + blocks - 1 - block;
            struct query_block b =
                query_block_of(item, a->n_query, a->n_head, a->n_head_kv, tokens);
            if (b.first + b.tokens > key)
                FN(attend_back_block)(a, &b, key, &s);
        }
        for (int64_t j = 0; j < n; j++) {
            memcpy(a->dk + (row + j) * width + head * d, s.dk + j * dp, (size_t)d * sizeof(float));
            memcpy(a->dv + (row + j) * width + head * d, s.dv + j * dp, (size_t)d * sizeof(float));
        }
    }
}

static void FN(attention_back)(const void *p, const struct worker *worker)
{
    const struct attention_back_args *a = p;
    FN(attention_delta)(a, worker);
    team_barrier(worker);
    for (int64_t item = worker->index; item < a->n_seq * a->n_head_kv; item += worker->count)
        FN(attend_back)(a, item / a->n_head_kv, item % a->n_head_kv, worker->scratch);
}
