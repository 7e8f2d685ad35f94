/* The optimizer's pass over its parameters. Bound: 28 bytes a parameter. */

/* Sum of squares: each square rounded to float, the sum in double. */
static double FN(sum_squares)(const float *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i += VL) {
        vf v = v_load_n(x + i, n - i < VL ? n - i : VL);
        sum += v_sum_double(v_mul(v, v));
    }
    return sum;
}

static void FN(adamw)(const struct adamw_args *a)
{
    vf keep1 = v_set1(a->beta1), new1 = v_set1(1.0f - a->beta1);
    vf keep2 = v_set1(a->beta2), new2 = v_set1(1.0f - a->beta2);
    for (int64_t i = 0; i < a->n; i += VL) {
        int64_t lanes = a->n - i < VL ? a->n - i : VL;
        vf g = v_mul(v_load_n(a->g + i, lanes), v_set1(a->clip));
        vf m = v_add(v_mul(keep1, v_load_n(a->m + i, lanes)), v_mul(new1, g));
        vf v = v_add(v_mul(keep2, v_load_n(a->v + i, lanes)), v_mul(v_mul(new2, g), g));
        vf root = v_add(v_sqrt(v_mul(v, v_set1(a->correction))), v_set1(1e-8f));
        vf x = v_mul(v_load_n(a->x + i, lanes), v_set1(1.0f - a->decay));
        x = v_sub(x, v_div(v_mul(m, v_set1(a->step)), root));
        v_store_n(a->x + i, x, lanes);
        v_store_n(a->m + i, m, lanes);
        v_store_n(a->v + i, v, lanes);
        v_store_n(a->g + i, v_zero(), lanes);
    }
}
