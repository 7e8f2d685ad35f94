/* A few tokens times frozen weights: each stored row is read once and meets every token by a dot product of floats;
 * quantized rows with `partner` go by bytes (quant.c), others are decoded. And which way a product goes.
 * Bound: the bytes of W, once. */

/* Float activations: rows are decoded one by one. */
static void FN(linear_decoded)(
    const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    float *row = (float *)(void *)scratch;
    int64_t row_bytes = row_offset((int)a->type, a->n_in);
    for (int64_t o = begin; o < end; o++) {
        FN(decode_row)((int)a->type, (const char *)a->w + o * row_bytes, a->n_in, row);
        for (int64_t t = 0; t < a->n_tokens; t++)
            result_row(a, t)[o] = v_dot(row, token_row(a, t), a->n_in);
    }
}

/* VL stored floats as a vector. */
V_INLINE vf load_stored(int type, const char *w)
{
    if (type == TYPE_BF16)
        return v_load_bf16((const uint16_t *)(const void *)w);
    if (type == TYPE_F16)
        return v_load_f16((const uint16_t *)(const void *)w);
    return v_load((const float *)(const void *)w);
}

V_INLINE float float_dot(int type, const char *w, int64_t n, const float *x)
{
    const int64_t size = type == TYPE_F32 ? 4 : 2;
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero();
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        for (int64_t ahead = 0; ahead < 4 * VL * size; ahead += 64)
            prefetch_weights(w + i * size + ahead);
        s0 = v_fma(load_stored(type, w + i * size), v_load(x + i), s0);
        s1 = v_fma(load_stored(type, w + (i + VL) * size), v_load(x + i + VL), s1);
        s2 = v_fma(load_stored(type, w + (i + 2 * VL) * size), v_load(x + i + 2 * VL), s2);
        s3 = v_fma(load_stored(type, w + (i + 3 * VL) * size), v_load(x + i + 3 * VL), s3);
    }
    for (; i + VL <= n; i += VL)
        s0 = v_fma(load_stored(type, w + i * size), v_load(x + i), s0);
    if (i < n) {
        float tail[VL];
        FN(decode_row)(type, w + i * size, n - i, tail);
        s1 = v_fma(v_load_some(tail, n - i), v_load_some(x + i, n - i), s1);
    }
    return v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}

V_INLINE void float_rows(int type, const struct linear_args *a, int64_t begin, int64_t end)
{
    int64_t row_bytes = row_offset(type, a->n_in);
    for (int64_t o = begin; o < end; o++) {
        const char *w = (const char *)a->w + o * row_bytes;
        for (int64_t t = 0; t < a->n_tokens; t++)
            result_row(a, t)[o] = float_dot(type, w, a->n_in, token_row(a, t));
    }
}

/* Columns begin ... end of y, on which the products already are: some ranks of an adapter come on top, and last the
 * base; the sums of finish_lanes, bit by bit. */
V_INLINE void up_ranks(const struct linear_args *a, const int ranks, const int type, int64_t t,
    const float *u, int64_t rank, int64_t begin, int64_t end)
{
    vf factor[DOWN_RANKS];
    const float *base = a->base && rank + ranks == a->rank ? a->base + t * a->n_out : NULL;
    float *y = result_row(a, t);
#pragma GCC unroll 4
    for (int r = 0; r < ranks; r++)
        factor[r] = v_set1(a->scale * u[rank + r]);
    for (int64_t o = begin; o < end; o += VL) {
        int64_t lanes = at_most(end - o, VL);
        vf sum = v_load_some(y + o, lanes);
#pragma GCC unroll 4
        for (int r = 0; r < ranks; r++)
            sum = v_fma(factor[r], load_as(type, a->b, (rank + r) * a->n_out + o, lanes), sum);
        v_store_some(y + o, base ? v_add(v_load_some(base + o, lanes), sum) : sum, lanes);
    }
}

/* An adapter beside the products of few tokens. Every worker makes all of x A': that is less than waiting for each
 * other. */
V_INLINE void adapt_few(
    const struct linear_args *a, const int type, float *u, int64_t begin, int64_t end)
{
    for (int64_t t = 0; t < a->n_tokens; t++) {
        down_row(TYPE_F32, type, token_row(a, t), a->a, a->n_in, a->rank, 1.0f, 0, u);
        for (int64_t r = 0; r < a->rank;)
            if (a->rank - r < DOWN_RANKS) {
                up_ranks(a, 1, type, t, u, r, begin, end);
                r += 1;
            } else {
                up_ranks(a, DOWN_RANKS, type, t, u, r, begin, end);
                r += DOWN_RANKS;
            }
    }
}

/* Rows begin ... end of W with all tokens. */
static void FN(linear_gemv)(const struct linear_args *a, char *scratch, int64_t begin, int64_t end)
{
    switch (a->type) {
    case TYPE_F32:
        float_rows(TYPE_F32, a, begin, end);
        break;
    case TYPE_F16:
        float_rows(TYPE_F16, a, begin, end);
        break;
    case TYPE_BF16:
        float_rows(TYPE_BF16, a, begin, end);
        break;
    default:
        if (rounds(a))
            FN(linear_quant)(a, scratch, begin, end);
        else
            FN(linear_decoded)(a, scratch, begin, end);
        break;
    }
    if (is_finished(a))
        return;
    float *u = (float *)(void *)scratch;
    if (a->rank > 0 && !a->u && a->factor_type == TYPE_F16)
        adapt_few(a, TYPE_F16, u, begin, end);
    else if (a->rank > 0 && !a->u)
        adapt_few(a, TYPE_F32, u, begin, end);
    else
        FN(finish_rows)(a, 0, a->n_tokens, begin, end - begin, result_row(a, 0) + begin, a->n_out);
}

static void FN(pack_for)(const struct linear_args *a, const struct worker *worker)
{
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs) {
        CAT(pack_tokens_bf16, VARIANT)(a, worker);
        return;
    }
#endif
#ifdef HAVE_BYTE_PRODUCT
    if (multiplies_bytes(a)) {
        FN(pack_bytes)(a, worker);
        return;
    }
#endif
    CAT(pack_tokens_f32, VARIANT)(a, worker);
}

static void FN(pack)(const void *p, const struct worker *worker)
{
    const struct pack_args *a = p;
    struct linear_args product = {.n_tokens = a->n_tokens,
        .n_in = a->n_in,
        .x = a->x,
        .x_type = a->x_type,
        .type = a->type,
        .partner = a->partner,
        .pairs = a->pairs,
        .packed = a->packed};
    FN(pack_for)(&product, worker);
}

static void FN(linear)(const void *p, const struct worker *worker)
{
    const struct linear_args *a = p;
    if (a->n_tokens <= GEMV_TOKENS) {
        int64_t begin, end;
        worker_range(worker, a->n_out, 1, &begin, &end);
        FN(linear_gemv)(a, worker->scratch, begin, end);
        return;
    }
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs) {
        CAT(linear_gemm_bf16, VARIANT)(a, worker);
        return;
    }
#endif
#ifdef HAVE_BYTE_PRODUCT
    if (multiplies_bytes(a)) {
        FN(linear_bytes)(a, worker);
        return;
    }
#endif
    CAT(linear_gemm_f32, VARIANT)(a, worker);
}

/* gate.y = silu(gate.y) up.y for a few tokens: each worker what it has just made itself. */
static void FN(gated_few)(const struct feed_forward_args *f, const struct worker *worker)
{
    int64_t begin, end, n = f->gate.n_out;
    worker_range(worker, n, 1, &begin, &end);
    FN(linear_gemv)(&f->gate, worker->scratch, begin, end);
    FN(linear_gemv)(&f->up, worker->scratch, begin, end);
    for (int64_t t = 0; t < f->gate.n_tokens; t++)
        for (int64_t o = begin; o < end; o += VL) {
            int64_t lanes = end - o < VL ? end - o : VL;
            float *y = result_row(&f->gate, t) + o;
            v_store_some(y,
                v_silu_mul(v_load_some(y, lanes), v_load_some(result_row(&f->up, t) + o, lanes)),
                lanes);
        }
}

static void FN(feed_forward)(const void *p, const struct worker *worker)
{
    const struct feed_forward_args *f = p;
    if (f->gate.n_tokens <= GEMV_TOKENS) {
        FN(gated_few)(f, worker);
    } else if (f->panels) {
#ifdef HAVE_PAIR_PRODUCT
        if (f->gate.pairs)
            CAT(gated_bf16, VARIANT)(f, worker);
        else
#endif
            CAT(gated_f32, VARIANT)(f, worker);
    } else {
        struct silu_mul_args gated = {
            f->gate.n_tokens * f->gate.n_out, f->gate.y, f->up.y, TYPE_F32, f->gate.y, TYPE_F32};
        FN(linear)(&f->gate, worker);
        FN(linear)(&f->up, worker);
        team_barrier(worker);
        FN(silu_mul)(&gated, worker);
        team_barrier(worker);
        FN(pack_for)(&f->down, worker);
    }
    team_barrier(worker);
    FN(linear)(&f->down, worker);
}

static void FN(linear_back)(const void *p, const struct worker *worker)
{
    const struct linear_back_args *a = p;
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs) {
        CAT(linear_back_gemm_bf16, VARIANT)(a, worker);
        return;
    }
#endif
    CAT(linear_back_gemm_f32, VARIANT)(a, worker);
}
