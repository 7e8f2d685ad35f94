/* What every vector layer gets from the operations it has: exponential, logistic, ragged transposes. */

/* n, up to a multiple of grain. */
V_INLINE int64_t round_up(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

V_INLINE int64_t padded(int64_t n) { return round_up(n, VL); }

/* e^x, within 2 units in the last place for -87 <= x <= 88; above, to 89, it may be infinite early, and far below
 * it is 0. x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite), and the polynomial of
 * Cephes' expf for e^r (S. Moshier, netlib.org/cephes). */
V_INLINE vf v_exp(vf x)
{
    x = v_max(v_set1(-104.0f), x); /* in this order a NaN passes */
    vf n = v_round(v_mul(x, v_set1(1.44269504088896341f)));
    vf r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vf p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set1(1.0f));
    return v_scale2(p, n);
}

/* e^(x - y) within 3e-6 of it and what rounding (x - y) log2 e does, for probabilities that are rounded to bf16 next.
 * 2^f is the polynomial of degree 4 whose largest relative error in |f| <= 1/2 is least. x - y is at most 88; a NaN
 * passes. */
V_INLINE vf v_exp_rough(vf x, vf y)
{
    const vf log2e = v_set1(1.44269504088896341f);
    vf z = v_max(v_set1(-150.0f), v_fma(x, log2e, v_mul(y, v_sub(v_zero(), log2e))));
    vf n = v_round(z), f = v_sub(z, n), p = v_set1(9.570102207e-3f);
    p = v_fma(p, f, v_set1(5.591786280e-2f));
    p = v_fma(p, f, v_set1(2.402474433e-1f));
    p = v_fma(p, f, v_set1(6.931217909e-1f));
    p = v_fma(p, f, v_set1(9.999992847e-1f));
    return v_scale2(p, n);
}

/* 1 / (1 + e^-x); e^-x is cut at e^89, which is infinite, so that x times the result ends at 0. */
V_INLINE vf v_logistic(vf x)
{
    vf limit = v_sub(v_zero(), v_max(v_set1(-89.0f), x));
    return v_div(v_set1(1.0f), v_add(v_set1(1.0f), v_exp(limit)));
}

/* n floats, n at most VL, without a mask where none is needed: a masked store takes some 20 operations on Zen, and
 * a masked load of what was just stored waits for the cache. */
V_INLINE vf v_load_some(const float *p, int64_t n) { return n == VL ? v_load(p) : v_load_n(p, n); }
V_INLINE void v_store_some(float *p, vf x, int64_t n)
{
    if (n == VL)
        v_store(p, x);
    else
        v_store_n(p, x, n);
}

/* Numbers `at` ... `at` + n, n at most VL, of an array of floats, or of halves: F16 or BF16. The type is a constant. */
V_INLINE vf load_as(const int type, const void *p, int64_t at, int64_t n)
{
    if (type == TYPE_F32)
        return v_load_some((const float *)p + at, n);
    const uint16_t *half = (const uint16_t *)p + at;
    uint16_t some[VL] = {0};
    if (n < VL)
        half = memcpy(some, half, (size_t)n * sizeof *half);
    return type == TYPE_F16 ? v_load_f16(half) : v_load_bf16(half);
}

/* The same the other way, to F32 or BF16. Where there is a pair product, what is rounded is on its way there, and
 * subnormals become zero here already. */
V_INLINE void store_as(const int type, void *p, int64_t at, vf x, int64_t n)
{
    if (type == TYPE_F32) {
        v_store_some((float *)p + at, x, n);
        return;
    }
    uint16_t *half = (uint16_t *)p + at, some[VL];
#ifdef HAVE_PAIR_PRODUCT
    v_store_pairs(n < VL ? some : half, x);
#else
    v_store_bf16(n < VL ? some : half, x);
#endif
    if (n < VL)
        memcpy(half, some, (size_t)n * sizeof *half);
}

/* silu(g) u */
V_INLINE vf v_silu_mul(vf g, vf u) { return v_mul(v_mul(g, v_logistic(g)), u); }

/* The hardware's prefetcher stops at each 4 KiB page, and a weight is met once, so its page is always new: on one
 * token of a 135M model this hint took 22 ms to 10. As far ahead as a core reads in the time that memory takes to
 * answer: of 2, 4, 6, 8 and 16 KiB, 6 and 8 read most. Beyond the end of a map it has no effect. */
enum { WEIGHTS_AHEAD = 6144 };
V_INLINE void prefetch_weights(const void *p)
{
    _mm_prefetch((const char *)((uintptr_t)p + WEIGHTS_AHEAD), _MM_HINT_T0);
}

/* Asks for the line `bytes` behind p, which may lie beyond what p points into: there it has no effect. */
V_INLINE void prefetch_row(const void *p, int64_t bytes)
{
    _mm_prefetch((const char *)((uintptr_t)p + (uintptr_t)bytes), _MM_HINT_T0);
}

/* Sum of a[i] b[i] over n floats: four partial vectors, so that latency does not bound it. */
V_INLINE float v_dot(const float *a, const float *b, int64_t n)
{
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero();
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 = v_fma(v_load(a + i), v_load(b + i), s0);
        s1 = v_fma(v_load(a + i + VL), v_load(b + i + VL), s1);
        s2 = v_fma(v_load(a + i + 2 * VL), v_load(b + i + 2 * VL), s2);
        s3 = v_fma(v_load(a + i + 3 * VL), v_load(b + i + 3 * VL), s3);
    }
    for (; i + VL <= n; i += VL)
        s0 = v_fma(v_load(a + i), v_load(b + i), s0);
    if (i < n)
        s1 = v_fma(v_load_n(a + i, n - i), v_load_n(b + i, n - i), s1);
    return v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}

V_INLINE void v_transpose(const float *src, int64_t src_stride, float *dst, int64_t dst_stride)
{
    vf column[VL];
    v_turn(src, src_stride, column);
#pragma GCC unroll 16
    for (int j = 0; j < VL; j++)
        v_store(dst + j * dst_stride, column[j]);
}

/* dst[j][i] = src[i][j] for rows x cols elements of 32 bits. */
V_INLINE void transpose_edge(const float *src, int64_t src_stride, int64_t rows, int64_t cols,
    float *dst, int64_t dst_stride)
{
    for (int64_t j = 0; j < cols; j++)
        for (int64_t i = 0; i < rows; i++)
            dst[j * dst_stride + i] = src[i * src_stride + j];
}

static __attribute__((unused)) void FN(transpose)(const float *src, int64_t src_stride,
    int64_t rows, int64_t cols, float *dst, int64_t dst_stride)
{
    int64_t whole_rows = rows / VL * VL, whole_cols = cols / VL * VL;
    for (int64_t i = 0; i < whole_rows; i += VL)
        for (int64_t j = 0; j < whole_cols; j += VL)
            v_transpose(src + i * src_stride + j, src_stride, dst + j * dst_stride + i, dst_stride);
    transpose_edge(src + whole_cols, src_stride, whole_rows, cols - whole_cols,
        dst + whole_cols * dst_stride, dst_stride);
    transpose_edge(src + whole_rows * src_stride, src_stride, rows - whole_rows, cols,
        dst + whole_rows, dst_stride);
}
