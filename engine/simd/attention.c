/* Causal attention: which way, and who does what. Many queries go by blocks (attend.c, in either precision). A few
 * (a token, or a handful that are tried at once) go by dot products, and where the context is long it is cut
 * into parts of SPLIT_KEYS for the workers, whose results are joined in the order of the context; so a token's
 * result is the same whether it comes alone or with others.
 * Bound of a few queries: the bytes of keys and values, once. */

/* One row of scores to probabilities; n of them count, of n rounded up to VL. */
V_INLINE void soften_row(float *score, int64_t n, float *maximum, float *sum)
{
    vf top = v_set1(-INFINITY), total = v_zero();
    for (int64_t j = 0; j < n; j += VL)
        top = v_max(top, v_blend_n(v_load(score + j), top, n - j < VL ? n - j : VL));
    *maximum = v_max_lane(top);
    for (int64_t j = 0; j < n; j += VL) {
        int64_t lanes = n - j < VL ? n - j : VL;
        vf e = v_keep_n(v_exp(v_sub(v_load(score + j), v_set1(*maximum))), lanes);
        v_store(score + j, e);
        total = v_add(total, e);
    }
    *sum = v_sum(total);
}

/* The result of a query over a part of the context: a maximum, a sum, dp outputs not yet divided by it. */
V_INLINE int64_t part_floats(int64_t head_dim) { return padded(head_dim) + 2; }

/* All queries of a key head over keys key0 ... end: result[lane] as above. */
static void FN(attend_part)(const struct attention_args *a, const struct query_block *b,
    int64_t key0, int64_t end, char *scratch, float *result)
{
    int64_t d = a->head_dim, dp = padded(d), width = a->n_head_kv * d, n = end - key0;
    int64_t stride = SPLIT_KEYS, n_past = a->n_past ? *a->n_past : 0;
    int64_t lanes = padded(b->lanes);
    float *q = (float *)(void *)scratch, *turned = q + lanes * dp, *rows = turned + lanes * dp;
    float *part = rows + KEYS * dp, *out = part + KEYS * lanes, *score = out + lanes * dp;
    FN(load_queries)(b, a->q, (int)a->q_type, a->n_query, a->n_head, d, a->scale, 0, lanes, q, dp);
    FN(transpose)(q, dp, lanes, d, turned, lanes);
    for (int64_t j = 0; j < n; j += KEYS) {
        int64_t some = n - j < KEYS ? n - j : KEYS, row = b->seq * a->kv_seq_rows + key0 + j;
        FN(load_keys)(a->k, (int)a->k_type, row, some, width, b->head * d, d, rows, dp);
        CAT(block_product_f32, VARIANT)(
            KEYS, lanes, d, rows, dp, turned, lanes, part, lanes, 0, NULL);
        FN(transpose)(part, lanes, KEYS, lanes, score + j, stride);
    }
    for (int64_t l = 0; l < b->lanes; l++) {
        int64_t token = lane_token(b, l), sees = n_past + token + 1 - key0;
        int64_t hidden = a->first_key ? a->first_key[b->seq * a->n_query + token] - key0 : 0;
        float *s = score + l * stride, *r = result + l * part_floats(d);
        sees = sees < 0 ? 0 : sees < n ? sees : n;
        for (int64_t i = 0; i < hidden && i < sees; i++)
            s[i] = -INFINITY;
        r[0] = -1e30f;
        r[1] = 0;
        if (sees > 0 && hidden < sees)
            soften_row(s, sees, r, r + 1);
        else
            sees = 0;
        memset(s + sees, 0, (size_t)(padded(n) - sees) * sizeof *s);
    }
    memset(out, 0, (size_t)(b->lanes * dp) * sizeof *out);
    for (int64_t j = 0; j < n; j += KEYS) {
        int64_t some = n - j < KEYS ? n - j : KEYS, row = b->seq * a->kv_seq_rows + key0 + j;
        FN(load_keys)(a->v, (int)a->v_type, row, some, width, b->head * d, d, rows, dp);
        CAT(block_product_f32, VARIANT)(
            b->lanes, dp, some, score + j, stride, rows, dp, out, dp, 1, NULL);
    }
    for (int64_t l = 0; l < b->lanes; l++)
        memcpy(result + l * part_floats(d) + 2, out + l * dp, (size_t)dp * sizeof *out);
}

/* Joins the parts of one query, each `stride` floats from the one before, to d floats. */
static void FN(join_parts)(
    const float *part, int64_t n_parts, int64_t stride, int64_t d, float *out, float *lse)
{
    float top = -1e30f, sum = 0;
    for (int64_t i = 0; i < n_parts; i++)
        top =
            part[i * stride] > top || part[i * stride] != part[i * stride] ? part[i * stride] : top;
    for (int64_t i = 0; i < n_parts; i++)
        sum += part[i * stride + 1] * expf(part[i * stride] - top);
    for (int64_t c = 0; c < d; c += VL) {
        vf total = v_zero();
        for (int64_t i = 0; i < n_parts; i++) {
            const float *p = part + i * stride;
            total = v_fma(v_set1(expf(p[0] - top)), v_load(p + 2 + c), total);
        }
        v_store_some(out + c, v_mul(total, v_set1(1.0f / sum)), d - c < VL ? d - c : VL);
    }
    if (lse)
        *lse = top + logf(sum);
}

/* A few queries: items are a key head and a part of the context; then each query's parts are joined. */
static void FN(attend_few)(const struct attention_args *a, const struct worker *worker)
{
    int64_t group = a->n_head / a->n_head_kv, heads = a->n_seq * a->n_head_kv;
    int64_t visible = (a->n_past ? *a->n_past : 0) + a->n_query;
    int64_t parts = (visible + SPLIT_KEYS - 1) / SPLIT_KEYS;
    int64_t lanes = a->n_query * group, stride = part_floats(a->head_dim);
    for (int64_t i = worker->index; i < heads * parts; i += worker->count) {
        int64_t key0 = i / heads * SPLIT_KEYS, head = i % heads;
        struct query_block b = {
            .seq = head / a->n_head_kv, .head = head % a->n_head_kv, .group = group};
        int64_t end = key0 + SPLIT_KEYS < visible ? key0 + SPLIT_KEYS : visible;
        for (; b.first < lanes; b.first += WIDE_LANES) {
            b.lanes = at_most(lanes - b.first, WIDE_LANES);
            FN(attend_part)(
                a, &b, key0, end, worker->scratch, a->parts + (i * lanes + b.first) * stride);
        }
    }
    team_barrier(worker);
    int64_t begin, end;
    worker_range(worker, heads * lanes, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        struct query_block b = {.seq = i / lanes / a->n_head_kv,
            .head = i / lanes % a->n_head_kv,
            .group = group,
            .lanes = lanes};
        int64_t at = query_row(&b, a->n_query, a->n_head, query_at(&b, i % lanes));
        float row[ATTENTION_MAX_DIM];
        FN(join_parts)(a->parts + i * stride, parts, heads * lanes * stride, a->head_dim, row,
            a->lse ? a->lse + at : NULL);
        FN(store_row)(row, a->head_dim, a->out, (int)a->out_type, at * a->head_dim);
    }
}

/* The lanes of all queries of a key head in blocks of about equal length, whole panels; shorter ones where all heads'
 * blocks can then be shared out evenly. */
struct query_blocks {
    int64_t heads, lanes, length, count;
};

V_INLINE struct query_blocks query_blocks_of(const struct attention_args *a, int workers)
{
    int64_t heads = a->n_seq * a->n_head_kv;
    int64_t lanes = a->n_query * (a->n_head / a->n_head_kv);
    int64_t most = a->head_dim <= QUERY_DIM ? QUERY_LANES : WIDE_LANES;
    int64_t least = (lanes + most - 1) / most, count = least;
    while (count < 2 * least && heads * count % workers != 0)
        count++;
    int64_t length = whole_panels((lanes + count - 1) / count);
    return (struct query_blocks){heads, lanes, length, (lanes + length - 1) / length};
}

/* The blocks that see most keys come first. */
V_INLINE struct query_block query_block_of(
    const struct attention_args *a, const struct query_blocks *all, int64_t item)
{
    struct query_block b = {.group = a->n_head / a->n_head_kv};
    b.first = (all->count - 1 - item / all->heads) * all->length;
    b.head = item % all->heads % a->n_head_kv;
    b.seq = item % all->heads / a->n_head_kv;
    b.lanes = at_most(all->lanes - b.first, all->length);
    return b;
}

static void FN(attend_block)(
    const struct attention_args *a, struct query_block b, const struct worker *worker)
{
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs) {
        CAT(attend_bf16, VARIANT)(a, b, worker->scratch);
        return;
    }
#endif
    CAT(attend_f32, VARIANT)(a, b, worker->scratch);
}

/* Each worker reckons who has how much to do: a block goes to the one that has least so far. */
static void FN(attend_many)(const struct attention_args *a, const struct worker *worker)
{
    struct query_blocks all = query_blocks_of(a, worker->count);
    int64_t n_past = a->n_past ? *a->n_past : 0;
    int64_t load[MAX_WORKERS] = {0};
    for (int64_t item = 0; item < all.heads * all.count; item++) {
        struct query_block b = query_block_of(a, &all, item);
        int idle = 0;
        for (int i = 1; i < worker->count; i++)
            idle = load[i] < load[idle] ? i : idle;
        load[idle] += b.lanes * (n_past + lane_token(&b, b.lanes / 2) + 1);
        if (idle == worker->index)
            FN(attend_block)(a, b, worker);
    }
}

static void FN(attention)(const void *p, const struct worker *worker)
{
    const struct attention_args *a = p;
    if (a->n_query <= FEW_QUERIES) {
        FN(attend_few)(a, worker);
        return;
    }
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs)
        matrix_begin_bf16();
#endif
    FN(attend_many)(a, worker);
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs)
        matrix_end_bf16();
#endif
}

/* delta[t][h] = dout[t][h] . out[t][h], which is sum_j p_j dp_j */
static void FN(attention_delta)(const struct attention_back_args *a, const struct worker *worker)
{
    int64_t begin, end, d = a->head_dim;
    worker_range(worker, a->n_seq * a->n_query * a->n_head, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        float out[ATTENTION_MAX_DIM];
        FN(decode_row)(
            (int)a->out_type, (const char *)a->out + row_offset((int)a->out_type, i * d), d, out);
        a->delta[i] = v_dot(a->dout + i * d, out, d);
    }
}

static void FN(attention_back)(const void *p, const struct worker *worker)
{
    const struct attention_back_args *a = p;
    int64_t items = a->n_seq * a->n_head_kv;
    FN(attention_delta)(a, worker);
    team_barrier(worker);
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs) {
        matrix_begin_bf16();
        for (int64_t i = worker->index; i < items; i += worker->count)
            CAT(attend_back_bf16, VARIANT)(a, i / a->n_head_kv, i % a->n_head_kv, worker->scratch);
        matrix_end_bf16();
        return;
    }
#endif
    for (int64_t i = worker->index; i < items; i += worker->count)
        CAT(attend_back_f32, VARIANT)(a, i / a->n_head_kv, i % a->n_head_kv, worker->scratch);
}
