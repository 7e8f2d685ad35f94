/* The optimizer's two passes: the gradient's norm, and the update, which clips by it on the way.
 * Bound: 4 and 32 bytes a parameter. */

/* Sum of squares: each square rounded to float, the sum in double. */
static double FN(sum_squares)(const float *x, int64_t n)
{
    vd sum = v_zero_double();
    for (int64_t i = 0; i < n; i += VL) {
        vf v = v_load_some(x + i, n - i < VL ? n - i : VL);
        sum = v_add_double(sum, v_mul(v, v));
    }
    return v_sum_double(sum);
}

/* Parts do not depend on the workers, so neither does their sum. */
static void FN(square_sums)(const void *args, const struct worker *w)
{
    const struct square_sums_args *a = args;
    int64_t begin, end;
    worker_range(w, (a->n + SQUARE_PART - 1) / SQUARE_PART, 1, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t first = i * SQUARE_PART, left = a->n - first;
        a->sums[i] = FN(sum_squares)(a->x + first, left < SQUARE_PART ? left : SQUARE_PART);
    }
}

/* Parameters begin ... end - 1, which decay alike. */
static void FN(adamw_run)(const struct adamw_args *a, int64_t begin, int64_t end, float shrink)
{
    vf keep1 = v_set1(a->beta1), new1 = v_set1(1.0f - a->beta1);
    vf keep2 = v_set1(a->beta2), new2 = v_set1(1.0f - a->beta2);
    vf clip = v_set1(a->now->clip), step = v_set1(a->now->step);
    for (int64_t i = begin; i < end; i += VL) {
        int64_t lanes = end - i < VL ? end - i : VL;
        vf g = v_mul(v_load_some(a->g + i, lanes), clip);
        vf m = v_add(v_mul(keep1, v_load_some(a->m + i, lanes)), v_mul(new1, g));
        vf v = v_add(v_mul(keep2, v_load_some(a->v + i, lanes)), v_mul(v_mul(new2, g), g));
        vf root = v_add(v_sqrt(v_mul(v, v_set1(a->now->correction))), v_set1(1e-8f));
        vf x = v_mul(v_load_some(a->x + i, lanes), v_set1(shrink));
        x = v_sub(x, v_div(v_mul(m, step), root));
        v_store_some(a->x + i, x, lanes);
        v_store_some(a->m + i, m, lanes);
        v_store_some(a->v + i, v, lanes);
        v_store_some(a->g + i, v_zero(), lanes);
    }
}

static void FN(adamw)(const void *args, const struct worker *w)
{
    const struct adamw_args *a = args;
    int64_t begin, end, first = 0;
    worker_range(w, a->n, 16, &begin, &end);
    for (int64_t i = 0; i < a->n_runs && first < end; i++) {
        int64_t last = a->run_ends[i] < end ? a->run_ends[i] : end;
        if (last > begin)
            FN(adamw_run)(a, first > begin ? first : begin, last,
                a->run_decays[i] ? 1.0f - a->now->decay : 1.0f);
        first = a->run_ends[i];
    }
}
