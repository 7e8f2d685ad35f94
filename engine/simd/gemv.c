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
            a->y[t * a->n_out + o] = v_dot(row, a->x + t * a->n_in, a->n_in);
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
        s1 = v_fma(v_load_n(tail, n - i), v_load_n(x + i, n - i), s1);
    }
    return v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}

V_INLINE void float_rows(int type, const struct linear_args *a, int64_t begin, int64_t end)
{
    int64_t row_bytes = row_offset(type, a->n_in);
    for (int64_t o = begin; o < end; o++) {
        const char *w = (const char *)a->w + o * row_bytes;
        for (int64_t t = 0; t < a->n_tokens; t++)
            a->y[t * a->n_out + o] = float_dot(type, w, a->n_in, a->x + t * a->n_in);
    }
}

static void FN(linear_gemv)(const struct linear_args *a, const struct worker *worker)
{
    int64_t begin, end;
    worker_range(worker, a->n_out, 1, &begin, &end);
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
            FN(linear_quant)(a, worker->scratch, begin, end);
        else
            FN(linear_decoded)(a, worker->scratch, begin, end);
        break;
    }
    if (a->rank > 0)
        FN(add_lora)(a, 0, a->n_tokens, begin, end - begin);
}

static void FN(linear)(const void *p, const struct worker *worker)
{
    const struct linear_args *a = p;
    if (a->n_tokens <= GEMV_TOKENS) {
        FN(linear_gemv)(a, worker);
        return;
    }
#ifdef HAVE_PAIR_PRODUCT
    if (a->pairs && a->n_in % 2 == 0) {
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
