/* Cross-entropy over rows of logits, value and gradient in one visit. Bound: 12 bytes a logit. */

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
        for (int64_t i = 0; i < n; i += VL) {
            int64_t lanes = n - i < VL ? n - i : VL;
            v_store_some(x + i, v_fma(v_load_some(x + i, lanes), scale, floor), lanes);
        }
        x[target] -= weight;
    }
}
