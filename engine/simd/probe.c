/* What the machine can do at most, for benchmarks and for the choice between micro-kernels: arithmetic without
 * memory, and memory without arithmetic. */

enum { PROBE_CHAINS = 24 };

/* PROBE_CHAINS independent chains of n fused multiply-adds: 2 n PROBE_CHAINS VL FLOPs a worker. */
static void FN(probe_fma)(const void *p, const struct worker *worker)
{
    const struct probe_args *a = p;
    vf acc[PROBE_CHAINS], x = v_set1(0.999f), y = v_set1(1e-3f);
    for (int i = 0; i < PROBE_CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (int64_t l = 0; l < a->n; l++)
#pragma GCC unroll 24
        for (int i = 0; i < PROBE_CHAINS; i++)
            acc[i] = v_fma(acc[i], x, y);
    vf sum = v_zero();
    for (int i = 0; i < PROBE_CHAINS; i++)
        sum = v_add(sum, acc[i]);
    a->sink[worker->index] = v_sum(sum);
}

/* The same of pair products, two products a lane. Without them, nothing. */
static void FN(probe_pairs)(const void *p, const struct worker *worker)
{
#ifdef HAVE_PAIR_PRODUCT
    const struct probe_args *a = p;
    vf acc[PROBE_CHAINS];
    vi x = _mm512_set1_epi32(0x3F803C00), y = _mm512_set1_epi32(0x3C003F80);
    for (int i = 0; i < PROBE_CHAINS; i++)
        acc[i] = v_set1((float)i);
    for (int64_t l = 0; l < a->n; l++)
#pragma GCC unroll 24
        for (int i = 0; i < PROBE_CHAINS; i++)
            acc[i] = v_pair_fma(x, y, acc[i]);
    vf sum = v_zero();
    for (int i = 0; i < PROBE_CHAINS; i++)
        sum = v_add(sum, acc[i]);
    a->sink[worker->index] = v_sum(sum);
#else
    (void)p, (void)worker;
#endif
}

/* n times four products of matrix tiles into accumulators of their own: PROBE_TILES_FLOPS n FLOPs a worker. Without
 * them, nothing. */
static void FN(probe_tiles)(const void *p, const struct worker *worker)
{
#ifdef HAVE_MATRIX_TILES
    const struct probe_args *a = p;
    float first[MATRIX_ROWS * VL];
    matrix_begin_bf16();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t l = 0; l < a->n; l++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, first, VL * 4);
    __asm__ volatile("" ::: "memory"); /* gcc's tile stores do not say that they write memory */
    matrix_end_bf16();
    a->sink[worker->index] = first[0];
#else
    (void)p, (void)worker;
#endif
}

/* Reads n floats, split among the workers. */
static void FN(probe_read)(const void *p, const struct worker *worker)
{
    const struct probe_args *a = p;
    int64_t begin, end;
    worker_range(worker, a->n, 4 * VL, &begin, &end);
    vf s0 = v_zero(), s1 = v_zero(), s2 = v_zero(), s3 = v_zero();
    for (int64_t i = begin; i + 4 * VL <= end; i += 4 * VL) {
        s0 = v_add(s0, v_load(a->data + i));
        s1 = v_add(s1, v_load(a->data + i + VL));
        s2 = v_add(s2, v_load(a->data + i + 2 * VL));
        s3 = v_add(s3, v_load(a->data + i + 3 * VL));
    }
    a->sink[worker->index] = v_sum(v_add(v_add(s0, s1), v_add(s2, s3)));
}
