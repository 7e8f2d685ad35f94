/* Steps that walk rows once: norms, rotation, gates, sums, the cache's entry. All bound by bytes. */

V_INLINE void norm_rows(const int y_type, const struct rms_norm_args *a, int64_t begin, int64_t end)
{
    int64_t n = a->n_cols;
    for (int64_t t = begin; t < end; t++) {
        const float *x = a->x + t * n;
        vd sum = v_zero_double(); /* squares are added in double */
        for (int64_t i = 0; i < n; i += VL) {
            vf v = v_load_some(x + i, n - i < VL ? n - i : VL);
            sum = v_add_double(sum, v_mul(v, v));
        }
        float inverse = 1.0f / sqrtf((float)(v_sum_double(sum) / (double)n) + a->eps);
        a->inv[t] = inverse;
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            vf v = v_mul(v_load_some(x + i, lanes), v_set1(inverse));
            store_as(y_type, a->y, t * n + i, v_mul(v, v_load_some(a->w + i, lanes)), lanes);
        }
    }
}

static void FN(rms_norm)(const void *p, const struct worker *worker)
{
    const struct rms_norm_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    if (a->y_type == TYPE_BF16)
        norm_rows(TYPE_BF16, a, begin, end);
    else
        norm_rows(TYPE_F32, a, begin, end);
}

enum { NORM_VECS = 4 };

/* dw of `vecs` vectors of columns from i on, of the last one `lanes`. */
V_INLINE void norm_weights_back(
    const int vecs, const struct rms_norm_back_args *a, int64_t i, int64_t lanes)
{
    vf sum[NORM_VECS];
    const float *x = a->x + i, *dy = a->dy + i;
#pragma GCC unroll 4
    for (int j = 0; j < vecs; j++)
        sum[j] = a->accumulate_w ? v_load_some(a->dw + i + j * VL, lanes) : v_zero();
    for (int64_t t = 0; t < a->n_tokens; t++, x += a->n_cols, dy += a->n_cols)
#pragma GCC unroll 4
        for (int j = 0; j < vecs; j++) {
            vf normed = v_mul(v_load_some(x + j * VL, lanes), v_set1(a->inv[t]));
            sum[j] = v_fma(normed, v_load_some(dy + j * VL, lanes), sum[j]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < vecs; j++)
        v_store_some(a->dw + i + j * VL, sum[j], lanes);
}

static void FN(rms_norm_back)(const void *p, const struct worker *worker)
{
    const struct rms_norm_back_args *a = p;
    int64_t begin, end, n = a->n_cols;
    if (a->dw) { /* columns are split, so that a column's sum runs over tokens in one order */
        worker_range(worker, n, VL, &begin, &end);
        for (; begin + NORM_VECS * VL <= end; begin += NORM_VECS * VL)
            norm_weights_back(NORM_VECS, a, begin, VL);
        for (; begin < end; begin += VL)
            norm_weights_back(1, a, begin, at_most(n - begin, VL));
        if (a->dx == a->dy)
            team_barrier(worker);
    }
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const float *x = a->x + t * n, *dy = a->dy + t * n;
        float *dx = a->dx + t * n, inverse = a->inv[t];
        vd sum = v_zero_double();
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            vf g = v_mul(v_load_some(a->w + i, lanes), v_load_some(dy + i, lanes));
            sum = v_add_double(sum, v_mul(g, v_load_some(x + i, lanes)));
        }
        vf pull = v_set1(-inverse * inverse * (float)(v_sum_double(sum) / (double)n));
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            vf g = v_mul(v_load_some(a->w + i, lanes), v_load_some(dy + i, lanes));
            vf d = v_mul(v_fma(v_load_some(x + i, lanes), pull, g), v_set1(inverse));
            if (a->accumulate_x)
                d = v_add(d, v_load_some(dx + i, lanes));
            v_store_some(dx + i, d, lanes);
        }
    }
}

V_INLINE vf round_f16(vf x)
{
    uint16_t half[VL];
    v_store_f16(half, x);
    return v_load_f16(half);
}

V_INLINE void rotate_rows(const int y_type, const struct rope_args *a, int64_t begin, int64_t end)
{
    int64_t width = a->n_head * a->head_dim;
    for (int64_t t = begin; t < end; t++) {
        int64_t row = a->positions[t] * a->n_rot;
        const float *cos = a->cos + row, *sin = a->sin + row;
        for (int64_t h = 0; h < a->n_head; h++) {
            int64_t at = t * width + h * a->head_dim;
            const float *x = a->x + at;
            for (int64_t i = 0; i < a->head_dim; i += VL) {
                int64_t lanes = a->head_dim - i < VL ? a->head_dim - i : VL;
                vf v = v_load_some(x + i, lanes), r = v;
                if (i < a->n_rot) { /* n_rot is even, so a vector may end in the middle of it */
                    int64_t turned = a->n_rot - i < lanes ? a->n_rot - i : lanes;
                    vf s = v_mul(v_set1(a->sign), v_load_some(sin + i, turned));
                    r = v_fma(v_swap_pairs(v), s, v_mul(v, v_load_some(cos + i, turned)));
                    r = v_blend_n(r, v, turned);
                }
                store_as(y_type, a->y, at + i, a->round_f16 ? round_f16(r) : r, lanes);
            }
        }
    }
}

static void FN(rope)(const void *p, const struct worker *worker)
{
    const struct rope_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    if (a->y_type == TYPE_BF16)
        rotate_rows(TYPE_BF16, a, begin, end);
    else
        rotate_rows(TYPE_F32, a, begin, end);
}

V_INLINE void gate_some(
    const int type, const int y_type, const struct silu_mul_args *a, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i += VL) {
        int64_t lanes = end - i < VL ? end - i : VL;
        vf y = v_silu_mul(load_as(type, a->g, i, lanes), load_as(type, a->u, i, lanes));
        store_as(y_type, a->y, i, y, lanes);
    }
}

static void FN(silu_mul)(const void *p, const struct worker *worker)
{
    const struct silu_mul_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n, VL, &begin, &end);
    if (a->type == TYPE_BF16)
        gate_some(TYPE_BF16, TYPE_BF16, a, begin, end);
    else if (a->y_type == TYPE_BF16)
        gate_some(TYPE_F32, TYPE_BF16, a, begin, end);
    else
        gate_some(TYPE_F32, TYPE_F32, a, begin, end);
}

V_INLINE void gate_back_some(
    const int type, const struct silu_mul_back_args *a, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i += VL) {
        int64_t lanes = end - i < VL ? end - i : VL;
        vf g = load_as(type, a->g, i, lanes), u = load_as(type, a->u, i, lanes);
        vf dy = v_load_some(a->dy + i, lanes);
        vf s = v_logistic(g), one = v_set1(1.0f);
        vf slope = v_mul(s, v_fma(g, v_sub(one, s), one));
        store_as(type, a->dg, i, v_mul(v_mul(dy, u), slope), lanes);
        store_as(type, a->du, i, v_mul(v_mul(dy, g), s), lanes);
    }
}

static void FN(silu_mul_back)(const void *p, const struct worker *worker)
{
    const struct silu_mul_back_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n, VL, &begin, &end);
    if (a->type == TYPE_BF16)
        gate_back_some(TYPE_BF16, a, begin, end);
    else
        gate_back_some(TYPE_F32, a, begin, end);
}

static void FN(add)(const void *p, const struct worker *worker)
{
    const struct add_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n, VL, &begin, &end);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t lanes = end - i < VL ? end - i : VL;
        v_store_some(
            a->y + i, v_add(v_load_some(a->a + i, lanes), v_load_some(a->b + i, lanes)), lanes);
    }
}

static void FN(zero)(const void *p, const struct worker *worker)
{
    const struct zero_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n, VL, &begin, &end);
    if (begin < end)
        memset(a->y + begin, 0, (size_t)(end - begin) * sizeof *a->y);
}

static void FN(cache_store)(const void *p, const struct worker *worker)
{
    const struct cache_store_args *a = p;
    int type = (int)a->type;
    int64_t begin, end, row_bytes = row_offset(type, a->n_cols);
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++)
        FN(encode_row)(
            type, a->x + t * a->n_cols, a->n_cols, (char *)a->cache + (*a->n_past + t) * row_bytes);
}
