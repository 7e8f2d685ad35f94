/* AVX-512 with BF16 and matrix tiles (AMX): vec_avx512bf16.h plus the product of 16 x 32 by 32 x 16 bf16.
 *
 * A tile: 16 rows of 32 elements as they stand (weights from the map, or gradients). B tile: 16 pairs of the
 * reduction x 16 lanes, a part of a panel. C tile: 16 rows x 16 lanes of floats, continued from memory. */
#include "vec_avx512bf16.h"

#define HAVE_MATRIX_TILES 1

enum { MATRIX_ROWS = 16, MATRIX_STEPS = 16 };

/* Eight tiles of 16 rows of 64 bytes. The configuration is loaded by a statement of its own that names all of its
 * memory: gcc 12 believes that its intrinsic reads only 8 bytes and drops the stores to the rest. */
V_INLINE void matrix_begin_bf16(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = MATRIX_ROWS;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
V_INLINE void matrix_end_bf16(void) { __asm__ volatile("tilerelease"); }

/* c (+)= a b for 32 or 16 rows and 32 or 16 lanes: every loaded tile is used twice where both are 32. */
#define MATRIX_BLOCK(name, TWO_ROWS, TWO_LANES)                                                    \
    V_INLINE void name(int64_t k, const uint16_t *a, int64_t a_stride, const uint32_t *b,          \
        int64_t b_stride, float *c, int64_t c_stride, int accumulate)                              \
    {                                                                                              \
        const int64_t down = MATRIX_ROWS * c_stride;                                               \
        _tile_zero(0);                                                                             \
        _tile_zero(1);                                                                             \
        _tile_zero(2);                                                                             \
        _tile_zero(3);                                                                             \
        if (accumulate) {                                                                          \
            _tile_loadd(0, c, c_stride * 4);                                                       \
            if (TWO_LANES)                                                                         \
                _tile_loadd(1, c + 16, c_stride * 4);                                              \
            if (TWO_ROWS)                                                                          \
                _tile_loadd(2, c + down, c_stride * 4);                                            \
            if (TWO_ROWS && TWO_LANES)                                                             \
                _tile_loadd(3, c + down + 16, c_stride * 4);                                       \
        }                                                                                          \
        for (int64_t l = 0; l < k; l += MATRIX_STEPS) {                                            \
            _tile_loadd(4, a + 2 * l, a_stride * 2);                                               \
            _tile_loadd(6, b + l * b_stride, b_stride * 4);                                        \
            _tile_dpbf16ps(0, 4, 6);                                                               \
            if (TWO_LANES) {                                                                       \
                _tile_loadd(7, b + l * b_stride + 16, b_stride * 4);                               \
                _tile_dpbf16ps(1, 4, 7);                                                           \
            }                                                                                      \
            if (TWO_ROWS) {                                                                        \
                _tile_loadd(5, a + 2 * l + MATRIX_ROWS * a_stride, a_stride * 2);                  \
                _tile_dpbf16ps(2, 5, 6);                                                           \
                if (TWO_LANES)                                                                     \
                    _tile_dpbf16ps(3, 5, 7);                                                       \
            }                                                                                      \
        }                                                                                          \
        _tile_stored(0, c, c_stride * 4);                                                          \
        if (TWO_LANES)                                                                             \
            _tile_stored(1, c + 16, c_stride * 4);                                                 \
        if (TWO_ROWS)                                                                              \
            _tile_stored(2, c + down, c_stride * 4);                                               \
        if (TWO_ROWS && TWO_LANES)                                                                 \
            _tile_stored(3, c + down + 16, c_stride * 4);                                          \
    }

MATRIX_BLOCK(matrix_32x32, 1, 1)
MATRIX_BLOCK(matrix_32x16, 1, 0)
MATRIX_BLOCK(matrix_16x32, 0, 1)
MATRIX_BLOCK(matrix_16x16, 0, 0)
#undef MATRIX_BLOCK

/* As many rows of c (+)= a b as fill tiles; returns how many. n: a multiple of 16 lanes. Reductions that are no
 * whole tiles are left to the register tile. */
V_INLINE int64_t matrix_rows_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a,
    int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride,
    int accumulate)
{
    if (k % MATRIX_STEPS)
        return 0;
    int64_t done = 0;
    __asm__ volatile("" ::: "memory"); /* gcc's tile loads do not say that they read memory */
    while (m - done >= MATRIX_ROWS) {
        int64_t rows = m - done >= 2 * MATRIX_ROWS ? 2 * MATRIX_ROWS : MATRIX_ROWS;
        const uint16_t *row = a + done * a_stride;
        for (int64_t j = 0; j < n; j += 32) {
            int two = n - j > 16;
            float *at = c + done * c_stride + j;
            if (rows == 2 * MATRIX_ROWS && two)
                matrix_32x32(k, row, a_stride, b + j, b_stride, at, c_stride, accumulate);
            else if (rows == 2 * MATRIX_ROWS)
                matrix_32x16(k, row, a_stride, b + j, b_stride, at, c_stride, accumulate);
            else if (two)
                matrix_16x32(k, row, a_stride, b + j, b_stride, at, c_stride, accumulate);
            else
                matrix_16x16(k, row, a_stride, b + j, b_stride, at, c_stride, accumulate);
        }
        done += rows;
    }
    return done;
}
