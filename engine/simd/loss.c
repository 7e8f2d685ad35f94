/* Cross-entropy over rows of logits, value and gradient in one visit. Bound: 12 bytes a logit, 10 if the
 * gradient is BF16. */

/* n exponentials to their gradient, in place: an element of BF16 lies in front of what is still to be read. */
V_INLINE void loss_gradient(const int type, float *x, int64_t n, vf scale, vf floor)
{
    for (int64_t i = 0; i < n; i += VL) {
        int64_t lanes = n - i < VL ? n - i : VL;
        store_as(type, x, i, v_fma(v_load_some(x + i, lanes), scale, floor), lanes);
    }
}

V_INLINE float largest_logit(const float *x, int64_t n)
{
    vf top = v_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= n; i += VL)
        top = v_max(top, v_load(x + i));
    if (i < n)
        top = v_max(top, v_blend_n(v_load_n(x + i, n - i), top, n - i));
    return v_max_lane(top);
}

/* n logits to e^(x - largest), in place; their sum is made in double. The next row is asked for: it comes from memory,
 * and this one is in the second cache by now. */
V_INLINE double exponentials(float *x, int64_t n, vf largest)
{
    vd sum = v_zero_double();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        vf e = v_exp(v_sub(v_load(x + i), largest));
        prefetch_row(x, (n + i) * (int64_t)sizeof *x);
        v_store(x + i, e);
        sum = v_add_double(sum, e);
    }
    if (i < n) {
        vf e = v_keep_n(v_exp(v_sub(v_load_n(x + i, n - i), largest)), n - i);
        v_store_n(x + i, e, n - i);
        sum = v_add_double(sum, e);
    }
    return v_sum_double(sum);
}

static void FN(cross_entropy)(const void *p, const struct worker *worker)
{
    const struct cross_entropy_args *a = p;
    const float eps = 1e-9f;
    int64_t begin, end, n = a->n_vocab;
    worker_range(worker, a->n_tokens, 1, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        float *x = a->logits + t * n;
        int32_t target = a->targets[t];
        if (target < 0) {
            memset(x, 0, (size_t)n * sizeof *x);
            a->loss[t] = 0;
            continue;
        }
        double sum = exponentials(x, n, v_set1(largest_logit(x, n)));
        float inverse = (float)(1.0 / sum), weight = *a->weight;
        a->loss[t] = -logf((1.0f - eps) * (x[target] * inverse) + eps);
        vf scale = v_set1((1.0f - eps) * inverse * weight), floor = v_set1(eps * weight);
        vf hit = v_sub(v_fma(v_set1(x[target]), scale, floor), v_set1(weight));
        if (a->type == TYPE_BF16) {
            loss_gradient(TYPE_BF16, x, n, scale, floor);
            store_as(TYPE_BF16, x, target, hit, 1);
        } else {
            loss_gradient(TYPE_F32, x, n, scale, floor);
            store_as(TYPE_F32, x, target, hit, 1);
        }
    }
}
