/* The register tile: every matrix product of the engine ends here. Included once for each precision.
 *
 *     c[i][j] (+)= sum over l < k of a[i][l] b[l][j]        i < m <= TILE_ROWS, j < nv VL <= TILE_VECS VL
 *
 * a: m rows at distance a_stride, broadcast step by step; b: k rows at distance b_stride, loaded as vectors; c:
 * m rows of floats at distance c_stride. In f32 a step is one element; in bf16 it is a pair of neighbours, a
 * 32-bit lane of b, and strides of a count elements. Each result is one chain in the order of l, so neither the
 * tile's size nor a split of k (continued from c) changes a bit.
 * While a tile works on its rows, it asks for those of the next one, a line of each in 16 steps: rows of weights are
 * met once and come from memory, and asking for many lines at a time stops everything until they are there.
 * Bound: m nv steps of arithmetic, m broadcasts and nv loads for each l. */

typedef void (*FP(tile_fn))(int64_t k, const ELEM *a, int64_t a_stride, const LANE *b,
    int64_t b_stride, float *c, int64_t c_stride, int accumulate);

V_INLINE void PP(tile_body)(const int m, const int nv, int64_t k, const ELEM *a, int64_t a_stride,
    const LANE *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate)
{
    vf acc[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            acc[i][j] = accumulate ? v_load(c + i * c_stride + j * VL) : v_zero();
    for (int64_t first = 0; first < k; first += LINE_STEPS) {
        int64_t end = k - first < LINE_STEPS ? k : first + LINE_STEPS;
#pragma GCC unroll 8
        for (int i = 0; i < m; i++)
            prefetch_row(a, ((m + i) * a_stride + first * STEP) * (int64_t)sizeof(ELEM));
        for (int64_t l = first; l < end; l++) {
            PP(v_step) row[TILE_VECS];
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                row[j] = PP(v_load_step)(b + l * b_stride + j * VL);
#pragma GCC unroll 8
            for (int i = 0; i < m; i++) {
                PP(v_step) x = PP(v_broadcast_step)(a + i * a_stride + l * STEP);
#pragma GCC unroll 8
                for (int j = 0; j < nv; j++)
                    acc[i][j] = PP(v_fma_step)(x, row[j], acc[i][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            v_store(c + i * c_stride + j * VL, acc[i][j]);
}

#define TILE(m, nv)                                                                                \
    static void FP(tile_##m##x##nv)(int64_t k, const ELEM *a, int64_t a_stride, const LANE *b,     \
        int64_t b_stride, float *c, int64_t c_stride, int accumulate)                              \
    {                                                                                              \
        PP(tile_body)(m, nv, k, a, a_stride, b, b_stride, c, c_stride, accumulate);                \
    }
#define TILE_COLUMN(nv) TILE(1, nv) TILE(2, nv) TILE(3, nv) TILE(4, nv) TILE(5, nv) TILE(6, nv)
#define TILE_NAMES(nv)                                                                             \
    {FP(tile_1x##nv), FP(tile_2x##nv), FP(tile_3x##nv), FP(tile_4x##nv), FP(tile_5x##nv),          \
        FP(tile_6x##nv)}

TILE_COLUMN(1)
TILE_COLUMN(2)
#ifdef __AVX512F__
TILE_COLUMN(3)
TILE_COLUMN(4)
static const FP(tile_fn)
    FP(tiles)[TILE_VECS][TILE_ROWS] = {TILE_NAMES(1), TILE_NAMES(2), TILE_NAMES(3), TILE_NAMES(4)};
#else
static const FP(tile_fn) FP(tiles)[TILE_VECS][TILE_ROWS] = {TILE_NAMES(1), TILE_NAMES(2)};
#endif
#undef TILE
#undef TILE_COLUMN
#undef TILE_NAMES

/* The same for any m and n; rows of b and c must be readable and writable up to a multiple of VL. Matrix tiles
 * take as many rows as they can, where there are any. What is leaving goes on between tiles. */
static void FP(block_product)(int64_t m, int64_t n, int64_t k, const ELEM *a, int64_t a_stride,
    const LANE *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate,
    struct leaving *leaving)
{
    int64_t done = PP(matrix_rows)(m, n, k, a, a_stride, b, b_stride, c, c_stride, accumulate);
    if (leaving)
        FN(turn_some)(leaving, done / TILE_ROWS);
    for (int64_t j = 0; j < n; j += TILE_LANES) {
        int64_t vecs = n - j < TILE_LANES ? (n - j + VL - 1) / VL : TILE_VECS;
        for (int64_t i = done; i < m; i += TILE_ROWS) {
            int64_t rows = m - i < TILE_ROWS ? m - i : TILE_ROWS;
            FP(tile_fn) tile = FP(tiles)[vecs - 1][rows - 1];
            tile(k, a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride,
                accumulate);
            if (leaving)
                FN(turn_some)(leaving, 1);
        }
    }
}
