/* The register tile: every matrix product of the engine ends here.
 *
 *     c[i][j] (+)= sum over l < k of a[i][l] b[l][j]        i < m <= TILE_ROWS, j < nv VL <= TILE_VECS VL
 *
 * a: m rows at distance a_stride, broadcast element by element; b: k rows at distance b_stride, loaded as
 * vectors; c: m rows at distance c_stride. Each result is one chain of fused multiply-adds in the order of
 * l, so neither the tile's size nor a split of k (continued from c) changes a bit.
 * Bound: m nv / 2 cycles a step on two FMA pipes, m broadcasts and nv loads. */

enum { TILE_LANES = TILE_VECS * VL };

typedef void (*tile_fn)(
    int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c, int64_t c_stride,
    int accumulate);

V_INLINE void tile_body(
    const int m, const int nv, int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
    float *c, int64_t c_stride, int accumulate)
{
    vf acc[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            acc[i][j] = accumulate ? v_load(c + i * c_stride + j * VL) : v_zero();
    for (int64_t l = 0; l < k; l++) {
        vf row[TILE_VECS];
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            row[j] = v_load(b + l * b_stride + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vf x = v_set1(a[i * a_stride + l]);
#pragma GCC unroll 8
            for (int j = 0; j < nv; j++)
                acc[i][j] = v_fma(x, row[j], acc[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < nv; j++)
            v_store(c + i * c_stride + j * VL, acc[i][j]);
}

#define TILE(m, nv)                                                                                          \
    static void FN(tile_##m##x##nv)(                                                                         \
        int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,             \
        int64_t c_stride, int accumulate)                                                                    \
    {                                                                                                        \
        tile_body(m, nv, k, a, a_stride, b, b_stride, c, c_stride, accumulate);                              \
    }
#define TILE_COLUMN(nv) TILE(1, nv) TILE(2, nv) TILE(3, nv) TILE(4, nv) TILE(5, nv) TILE(6, nv)
#define TILE_NAMES(nv)                                                                                       \
    {                                                                                                        \
        FN(tile_1x##nv), FN(tile_2x##nv), FN(tile_3x##nv), FN(tile_4x##nv), FN(tile_5x##nv), FN(tile_6x##nv) \
    }

TILE_COLUMN(1)
TILE_COLUMN(2)
#ifdef __AVX512F__
TILE_COLUMN(3)
TILE_COLUMN(4)
static const tile_fn FN(tiles)[TILE_VECS][TILE_ROWS] = {
    TILE_NAMES(1), TILE_NAMES(2), TILE_NAMES(3), TILE_NAMES(4)};
#else
static const tile_fn FN(tiles)[TILE_VECS][TILE_ROWS] = {TILE_NAMES(1), TILE_NAMES(2)};
#endif

/* The same for any m and n; rows of b and c must be readable and writable up to a multiple of VL. */
static void FN(block_product)(
    int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
    int64_t c_stride, int accumulate)
{
    for (int64_t j = 0; j < n; j += TILE_LANES) {
        int64_t vecs = n - j < TILE_LANES ? (n - j + VL - 1) / VL : TILE_VECS;
        for (int64_t i = 0; i < m; i += TILE_ROWS) {
            int64_t rows = m - i < TILE_ROWS ? m - i : TILE_ROWS;
            FN(tiles)[vecs - 1][rows - 1](
                k, a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride, accumulate);
        }
    }
}
