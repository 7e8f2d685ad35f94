/* Attention of many queries, and its gradient. Included once for each precision (precision.h); attention.c
 * chooses and hands out the items.
 *
 * Queries run along the lanes, as tokens do in every product: with Q' packed once per block, scores are
 * S' = K Q', a row a key, so the running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
 * arXiv:2205.14135) go lane by lane and never across, and the probabilities are packed for the next product, O' =
 * V' P', as they are made. Scores of all pairs never stand in memory.
 * Bound: 4 n_head head_dim FLOPs for each pair of query and visible key; back, 10. */

enum {
    PP(dim_grain) = STEP == 1 ? 1 : 32, /* reductions of whole matrix tiles */
#ifdef HAVE_MATRIX_TILES
    PP(key_grain) = 32,
#else
    PP(key_grain) = TILE_ROWS,
#endif
};

V_INLINE int64_t PP(padded_dim)(int64_t d) { return round_up(d, PP(dim_grain)); }

/* A block's rows with the lanes they belong to along the lanes: [panel][step][TILE_LANES], zero in lanes that have
 * no query. */
static void FP(pack_queries)(const struct query_block *b, const void *src, int type,
    int64_t n_query, int64_t n_head, int64_t d, float scale, LANE *packed)
{
    int64_t dk = PP(padded_dim)(d), steps = dk / STEP, stride = padded(dk);
    float rows[VL * (ATTENTION_MAX_DIM + VL)];
    ELEM elements[VL * ATTENTION_MAX_DIM];
    for (int64_t l = 0; l < whole_panels(b->lanes); l += VL) {
        FN(load_queries)(b, src, type, n_query, n_head, d, scale, l, VL, rows, stride);
        for (int64_t i = 0; i < VL; i++) {
            const ELEM *made = PP(as_row)(rows + i * stride, dk, elements + i * dk);
            if (made != elements + i * dk)
                memcpy(elements + i * dk, made, (size_t)dk * sizeof *made);
        }
        LANE *dst = packed + l / TILE_LANES * TILE_LANES * steps + l % TILE_LANES;
        FN(transpose)((const float *)(const void *)elements, steps, VL, steps, (float *)(void *)dst,
            TILE_LANES);
    }
}

/* Keys or values of one head, n rows from `row` on: where they are, and in what type. */
struct PP(key_source) {
    const void *src;
    int type;
    int64_t row, n, width, column, dim;
};

/* Row j as `stride` floats of a buffer that is zero beyond them; zero where there is no such row. */
V_INLINE void FP(key_row)(const struct PP(key_source) * s, int64_t j, float *row)
{
    if (j < s->n)
        FN(decode_row)(s->type,
            (const char *)s->src + row_offset(s->type, (s->row + j) * s->width + s->column), s->dim,
            row);
    else
        memset(row, 0, (size_t)s->dim * sizeof *row);
}

/* KEYS rows of elements. */
static void FP(key_rows)(const struct PP(key_source) * s, int64_t stride, ELEM *out)
{
    float row[ATTENTION_MAX_DIM + VL] = {0};
    for (int64_t j = 0; j < KEYS; j++, out += stride) {
        FP(key_row)(s, j, row);
        const ELEM *made = PP(as_row)(row, stride, out);
        if (made != out)
            memcpy(out, made, (size_t)stride * sizeof *made);
    }
}

/* The same turned: `dim` rows of KEYS elements, by way of `steps`. */
static void FP(turned_key_rows)(
    const struct PP(key_source) * s, int64_t stride, LANE *steps, ELEM *out)
{
    float rows[STEP][ATTENTION_MAX_DIM + VL] = {{0}};
    for (int64_t j = 0; j < KEYS; j += STEP) {
        for (int64_t i = 0; i < STEP; i++)
            FP(key_row)(s, j + i, rows[i]);
        PP(interleave)(rows[0], ATTENTION_MAX_DIM + VL, stride, steps + j / STEP * stride);
    }
    FN(transpose)((const float *)(const void *)steps, stride, KEYS / STEP, s->dim,
        (float *)(void *)out, KEYS / STEP);
}

/* Scores of a panel, `rows` keys from key0 on, to probabilities relative to each lane's running maximum, packed.
 * A maximum follows only where it has grown by SLACK: e^SLACK is far from overflow, and most blocks then leave
 * the sums and outputs before them as they are. Returns whether one has; correction says by how much. */
V_INLINE int PP(soften)(int64_t rows, int64_t key0, const float *limit, const float *start,
    int masked, const float *score, LANE *p, float *maximum, float *sum, float *correction)
{
    const vf slack = v_set1(8.0f), nothing = v_set1(-INFINITY);
    int grown = 0;
    for (int64_t j = 0; j < TILE_LANES; j += VL) {
        vf end = v_sub(v_load(limit + j), v_set1((float)key0)), top = nothing;
        vf begin = v_sub(v_load(start + j), v_set1((float)key0));
        for (int64_t i = 0; i < rows; i++) {
            vf s = v_load(score + i * TILE_LANES + j), at = v_set1((float)i);
            if (masked)
                s = v_select_less(at, end, v_select_less(at, begin, nothing, s), nothing);
            top = v_max(top, s);
        }
        vf old = v_load(maximum + j), bound = v_add(old, slack), total = v_zero();
        vf largest = v_select_less(bound, top, top, old);
        for (int64_t i = 0; i < rows; i += 2) {
            vf e[2];
            for (int k = 0; k < 2; k++) {
                vf at = v_set1((float)(i + k));
                e[k] = PP(v_softmax_exp)(v_load(score + (i + k) * TILE_LANES + j), largest);
                if (masked)
                    e[k] =
                        v_select_less(at, end, v_select_less(at, begin, v_zero(), e[k]), v_zero());
                total = v_add(total, e[k]);
            }
            PP(v_store_two)(p + i / STEP * TILE_LANES + j, TILE_LANES, e[0], e[1]);
        }
        vf shrink = v_exp(v_sub(old, largest));
        v_store(correction + j, shrink);
        v_store(sum + j, v_fma(v_load(sum + j), shrink, total));
        v_store(maximum + j, largest);
        grown |= v_any_less(bound, top);
    }
    return grown;
}

/* Multiplies the columns of d rows by a factor each. */
V_INLINE void PP(scale_lanes)(int64_t d, const float *factor, float *rows)
{
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < TILE_LANES; j += VL)
            v_store(rows + i * TILE_LANES + j,
                v_mul(v_load(rows + i * TILE_LANES + j), v_load(factor + j)));
}

/* Rows of a panel's lanes from d rows of lanes, into a matrix like the queries'. */
static void FP(unpack_lanes)(const struct query_block *b, const float *panel, int64_t first,
    int64_t n_query, int64_t n_head, int64_t d, void *dst, int type)
{
    float rows[VL * ATTENTION_MAX_DIM];
    struct query q = query_at(b, first);
    for (int64_t l = first; l < b->lanes && l < first + TILE_LANES; l += VL) {
        int64_t n = at_most(b->lanes - l, VL);
        FN(transpose)(panel + l - first, TILE_LANES, d, VL, rows, d);
        for (int64_t i = 0; i < n; i++, q = next_query(b, q)) {
            int64_t at = query_row(b, n_query, n_head, q) * d;
            FN(store_row)(rows + i * d, d, dst, type, at);
        }
    }
}

/* Key rows of a block that a panel's last token sees, in whole tiles. */
V_INLINE int64_t PP(seen_rows)(
    const struct query_block *b, int64_t panel, int64_t n_past, int64_t key0)
{
    int64_t last = panel + TILE_LANES < b->lanes ? panel + TILE_LANES : b->lanes;
    int64_t seen = n_past + lane_token(b, last - 1) + 1 - key0;
    return seen <= 0 ? 0 : at_most(round_up(seen, PP(key_grain)), KEYS);
}

/* Whether some lane of the panel does not see all of keys key0 ... key0 + rows. */
V_INLINE int PP(is_masked)(const struct query_block *b, int64_t panel, int64_t n_past,
    const float *start, int64_t key0, int64_t rows)
{
    int64_t all = n_past + lane_token(b, panel) + 1;
    int masked = panel + TILE_LANES > b->lanes || key0 + rows > all;
    for (int64_t l = panel; l < b->lanes && l < panel + TILE_LANES; l++)
        masked |= start[l] > (float)key0;
    return masked;
}

static void FP(attend)(const struct attention_args *a, struct query_block b, char *scratch)
{
    int64_t d = a->head_dim, dk = PP(padded_dim)(d), dp = padded(dk);
    int64_t n_past = a->n_past ? *a->n_past : 0, width = a->n_head_kv * d;
    int64_t lanes = whole_panels(b.lanes);
    float *out = (float *)(void *)scratch, *score = out + lanes * d;
    float *maximum = score + KEYS * TILE_LANES, *sum = maximum + lanes, *limit = sum + lanes;
    float *start = limit + lanes, *correction = start + lanes;
    LANE *queries = (LANE *)(correction + TILE_LANES), *p = queries + lanes * dk / STEP;
    LANE *steps = p + KEYS / STEP * TILE_LANES;
    ELEM *keys = (ELEM *)(steps + KEYS / STEP * dp), *values = keys + KEYS * dp;
    FP(pack_queries)(&b, a->q, (int)a->q_type, a->n_query, a->n_head, d, a->scale, queries);
    FN(visible_keys)(&b, a->n_query, n_past, a->first_key, lanes, limit, start);
    for (int64_t l = 0; l < lanes; l++) {
        maximum[l] = -1e30f; /* finite, so that differences with it are */
        sum[l] = 0;
    }
    memset(out, 0, (size_t)(lanes * d) * sizeof *out);
    int64_t visible = n_past + lane_token(&b, b.lanes - 1) + 1;
    int64_t key0 = first_visible(&b, a->n_query, a->first_key) / KEYS * KEYS;
    for (; key0 < visible; key0 += KEYS) {
        int64_t n = visible - key0 < KEYS ? visible - key0 : KEYS;
        int64_t row = b.seq * a->kv_seq_rows + key0;
        struct PP(key_source) k = {a->k, (int)a->k_type, row, n, width, b.head * d, d};
        struct PP(key_source) v = {a->v, (int)a->v_type, row, n, width, b.head * d, d};
        FP(key_rows)(&k, dp, keys);
        FP(turned_key_rows)(&v, dp, steps, values);
        for (int64_t l = 0; l < b.lanes; l += TILE_LANES) {
            int64_t m = PP(seen_rows)(&b, l, n_past, key0);
            if (m == 0)
                continue;
            FP(block_product)(m, TILE_LANES, dk / STEP, keys, dp, queries + l * dk / STEP,
                TILE_LANES, score, TILE_LANES, 0, NULL);
            int masked = PP(is_masked)(&b, l, n_past, start, key0, m);
            float *o = out + l * d;
            if (PP(soften)(m, key0, limit + l, start + l, masked, score, p, maximum + l, sum + l,
                    correction))
                PP(scale_lanes)(d, correction, o);
            FP(block_product)(
                d, TILE_LANES, m / STEP, values, KEYS, p, TILE_LANES, o, TILE_LANES, 1, NULL);
        }
    }
    struct query q = query_at(&b, 0);
    for (int64_t l = 0; l < lanes; l++, q = next_query(&b, q)) {
        if (a->lse && l < b.lanes)
            a->lse[query_row(&b, a->n_query, a->n_head, q)] = maximum[l] + logf(sum[l]);
        sum[l] = 1.0f / sum[l];
    }
    for (int64_t l = 0; l < b.lanes; l += TILE_LANES) {
        PP(scale_lanes)(d, sum + l, out + l * d);
        FP(unpack_lanes)(&b, out + l * d, l, a->n_query, a->n_head, d, a->out, (int)a->out_type);
    }
}

/* Working space of one item on the way back. Queries and the gradients of outputs stand in two forms each: along
 * the lanes, reduced over the head's elements, and row by row, reduced over the queries. */
struct PP(back_space) {
    LANE *queries, *dout;               /* [panel][step of dk][TILE_LANES] */
    LANE *query_rows, *dout_rows;       /* [panel][step of TILE_LANES][dp] */
    float *dq;                          /* [panel][d][TILE_LANES] */
    float *limit, *start, *lse, *delta; /* a lane */
    float *rows, *score, *dp, *dk, *dv;
    LANE *steps;
    ELEM *keys, *turned_keys, *values, *p_rows, *ds_rows;
    LANE *ds;
};

/* Places for blocks of `lanes` lanes; how many bytes they take. */
static int64_t FP(back_places)(struct PP(back_space) * s, int64_t lanes, int64_t d, char *scratch)
{
    int64_t dk = PP(padded_dim)(d), dp = padded(dk);
    char *at = scratch;
#define PLACE(name, n)                                                                             \
    do {                                                                                           \
        s->name = (void *)at;                                                                      \
        at += ((n) * (int64_t)sizeof *s->name + 63) / 64 * 64;                                     \
    } while (0)
    PLACE(queries, lanes * dk / STEP);
    PLACE(dout, lanes * dk / STEP);
    PLACE(query_rows, lanes / STEP * dp);
    PLACE(dout_rows, lanes / STEP * dp);
    PLACE(dq, lanes * d);
    PLACE(limit, lanes);
    PLACE(start, lanes);
    PLACE(lse, lanes);
    PLACE(delta, lanes);
    PLACE(rows, KEYS * dp);
    PLACE(steps, KEYS / STEP * dp);
    PLACE(score, KEYS * TILE_LANES);
    PLACE(dp, KEYS * TILE_LANES);
    PLACE(dk, KEYS * dp);
    PLACE(dv, KEYS * dp);
    PLACE(keys, KEYS * dp);
    PLACE(turned_keys, KEYS * dp);
    PLACE(values, KEYS * dp);
    PLACE(p_rows, KEYS * TILE_LANES);
    PLACE(ds_rows, KEYS * TILE_LANES);
    PLACE(ds, KEYS / STEP * TILE_LANES);
#undef PLACE
    return at - scratch;
}

/* The form that is reduced over queries: [step of TILE_LANES][dp] for each panel. */
static void FP(pack_query_rows)(const struct attention_back_args *a, const struct query_block *b,
    const void *src, int type, float scale, float *rows, LANE *packed)
{
    int64_t dp = padded(PP(padded_dim)(a->head_dim));
    for (int64_t l = 0; l < b->lanes; l += TILE_LANES) {
        FN(load_queries)(
            b, src, type, a->n_query, a->n_head, a->head_dim, scale, l, TILE_LANES, rows, dp);
        for (int64_t i = 0; i < TILE_LANES; i += STEP)
            PP(interleave)(rows + i * dp, dp, dp, packed + (l + i) / STEP * dp);
    }
}

/* Probabilities again from the saved log-sum, P = e^(S - lse), and dS = P (dP - delta); both as rows, dS packed. */
V_INLINE void PP(score_gradient)(
    const int masked, int64_t rows, int64_t key0, const struct PP(back_space) * s, int64_t l)
{
    for (int64_t j = 0; j < TILE_LANES; j += VL) {
        vf end = v_sub(v_load(s->limit + l + j), v_set1((float)key0));
        vf begin = v_sub(v_load(s->start + l + j), v_set1((float)key0));
        vf log_sum = v_load(s->lse + l + j), mean = v_load(s->delta + l + j);
        for (int64_t i = 0; i < rows; i += 2) {
            vf gradient[2];
            for (int k = 0; k < 2; k++) {
                int64_t at = (i + k) * TILE_LANES + j;
                vf key = v_set1((float)(i + k));
                vf e = PP(v_softmax_exp)(v_load(s->score + at), log_sum);
                if (masked)
                    e = v_select_less(key, end, v_select_less(key, begin, v_zero(), e), v_zero());
                gradient[k] = v_mul(e, v_sub(v_load(s->dp + at), mean));
                PP(v_store_row)(s->p_rows + at, e);
                PP(v_store_row)(s->ds_rows + at, gradient[k]);
            }
            PP(v_store_two)(
                s->ds + i / STEP * TILE_LANES + j, TILE_LANES, gradient[0], gradient[1]);
        }
    }
}

/* What one panel of queries adds to dk, dv and dq through the keys key0 ... key0 + m. */
static void FP(attend_back_panel)(
    const struct PP(back_space) * s, int64_t d, int64_t l, int64_t key0, int64_t m, int masked)
{
    int64_t dk = PP(padded_dim)(d), dp = padded(dk), steps = dk / STEP, at = l / STEP * dp;
    FP(block_product)(m, TILE_LANES, steps, s->keys, dp, s->queries + l * steps, TILE_LANES,
        s->score, TILE_LANES, 0, NULL);
    FP(block_product)(m, TILE_LANES, steps, s->values, dp, s->dout + l * steps, TILE_LANES, s->dp,
        TILE_LANES, 0, NULL);
    if (masked)
        PP(score_gradient)(1, m, key0, s, l);
    else
        PP(score_gradient)(0, m, key0, s, l);
    FP(block_product)(
        m, dp, TILE_LANES / STEP, s->p_rows, TILE_LANES, s->dout_rows + at, dp, s->dv, dp, 1, NULL);
    FP(block_product)(m, dp, TILE_LANES / STEP, s->ds_rows, TILE_LANES, s->query_rows + at, dp,
        s->dk, dp, 1, NULL);
    FP(block_product)(d, TILE_LANES, m / STEP, s->turned_keys, KEYS, s->ds, TILE_LANES,
        s->dq + l * d, TILE_LANES, 1, NULL);
}

/* One block of queries with all keys it sees; dk and dv continue from the blocks before it. */
static void FP(attend_back_block)(
    const struct attention_back_args *a, const struct query_block *b, char *scratch)
{
    struct PP(back_space) s;
    int64_t d = a->head_dim, dp = padded(PP(padded_dim)(d)), width = a->n_head_kv * d;
    int64_t lanes = whole_panels(b->lanes);
    FP(back_places)(&s, lanes, d, scratch);
    FP(pack_queries)(b, a->q, (int)a->q_type, a->n_query, a->n_head, d, a->scale, s.queries);
    FP(pack_queries)(b, a->dout, TYPE_F32, a->n_query, a->n_head, d, 1.0f, s.dout);
    FP(pack_query_rows)(a, b, a->q, (int)a->q_type, a->scale, s.rows, s.query_rows);
    FP(pack_query_rows)(a, b, a->dout, TYPE_F32, 1.0f, s.rows, s.dout_rows);
    FN(visible_keys)(b, a->n_query, 0, a->first_key, lanes, s.limit, s.start);
    memset(s.dq, 0, (size_t)(lanes * d) * sizeof *s.dq);
    struct query q = query_at(b, 0);
    for (int64_t l = 0; l < lanes; l++, q = next_query(b, q)) {
        int64_t at = query_row(b, a->n_query, a->n_head, q);
        s.lse[l] = l < b->lanes ? a->lse[at] : 0.0f;
        s.delta[l] = l < b->lanes ? a->delta[at] : 0.0f;
    }
    int64_t key0 = first_visible(b, a->n_query, a->first_key) / KEYS * KEYS;
    for (; key0 <= lane_token(b, b->lanes - 1); key0 += KEYS) {
        int64_t n = a->n_query - key0 < KEYS ? a->n_query - key0 : KEYS;
        int64_t row = b->seq * a->n_query + key0, column = b->head * d;
        struct PP(key_source) k = {a->k, (int)a->k_type, row, n, width, column, d};
        struct PP(key_source) v = {a->v, (int)a->v_type, row, n, width, column, d};
        FP(key_rows)(&k, dp, s.keys);
        FP(turned_key_rows)(&k, dp, s.steps, s.turned_keys);
        FP(key_rows)(&v, dp, s.values);
        FN(load_keys)(a->dk, TYPE_F32, row, n, width, column, d, s.dk, dp);
        FN(load_keys)(a->dv, TYPE_F32, row, n, width, column, d, s.dv, dp);
        for (int64_t l = 0; l < b->lanes; l += TILE_LANES) {
            int64_t m = PP(seen_rows)(b, l, 0, key0);
            if (m > 0)
                FP(attend_back_panel)(&s, d, l, key0, m, PP(is_masked)(b, l, 0, s.start, key0, m));
        }
        for (int64_t j = 0; j < n; j++) {
            int64_t to = (row + j) * width + column;
            memcpy(a->dk + to, s.dk + j * dp, (size_t)d * sizeof(float));
            memcpy(a->dv + to, s.dv + j * dp, (size_t)d * sizeof(float));
        }
    }
    for (int64_t l = 0; l < lanes; l++)
        s.limit[l] = a->scale;
    for (int64_t l = 0; l < b->lanes; l += TILE_LANES) {
        PP(scale_lanes)(d, s.limit + l, s.dq + l * d);
        FP(unpack_lanes)(b, s.dq + l * d, l, a->n_query, a->n_head, d, a->dq, TYPE_F32);
    }
}

/* One key head of one sequence, its queries in blocks that fit the scratch. */
static void FP(attend_back)(
    const struct attention_back_args *a, int64_t seq, int64_t head, char *scratch)
{
    struct PP(back_space) s;
    struct query_block b = {.seq = seq, .head = head, .group = a->n_head / a->n_head_kv};
    int64_t lanes = BACK_LANES, d = a->head_dim, width = a->n_head_kv * d;
    while (FP(back_places)(&s, lanes, d, scratch) > WORKER_SCRATCH)
        lanes /= 2;
    for (int64_t j = 0; j < a->n_query; j++) {
        int64_t to = (seq * a->n_query + j) * width + head * d;
        memset(a->dk + to, 0, (size_t)d * sizeof(float));
        memset(a->dv + to, 0, (size_t)d * sizeof(float));
    }
    for (; b.first < a->n_query * b.group; b.first += lanes) {
        b.lanes = at_most(a->n_query * b.group - b.first, lanes);
        FP(attend_back_block)(a, &b, scratch);
    }
}
