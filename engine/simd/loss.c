/* Cross-entropy over rows of logits, value and gradient in one visit. Bound: 12 bytes a logit. */

/* n exponentials to their gradient, in place: an element of BF16 lies in front of what is still to be read. */
V_INLINE void loss_gradient(const int type, float *x, int64_t n, vf scale, vf floor)
{
    for (int64_t i = 0; i < n; i += VL) {
        int64_t lanes = n - i < VL ? n - i : VL;
        store_as(type, x, i, v_fma(v_load_some(x + i, lanes), scale, floor), lanes);
    }
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
        vf top = v_set1(-INFINITY);
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            top = v_max(top, v_blend_n(v_load_some(x + i, lanes), top, lanes));
        }
        float largest = v_max_lane(top);
        vd sum = v_zero_double(); /* the divisor is summed in double */
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            vf e = v_keep_n(v_exp(v_sub(v_load_some(x + i, lanes), v_set1(largest))), lanes);
            v_store_some(x + i, e, lanes);
            sum = v_add_double(sum, e);
        }
        float inverse = (float)(1.0 / v_sum_double(sum)), weight = *a->weight;
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
