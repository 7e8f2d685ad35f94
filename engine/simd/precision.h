/* What tile.c and gemm.c need to know of a precision: PRECISION (f32 or bf16) chooses among the names below.
 *
 *     ELEM  element of a row that is broadcast          LANE   element of a panel's lane
 *     STEP  elements of the reduction in one step
 * PP(x) is x_precision, FP(x) is x_precision_variant. */

#define PP(name) CAT(name, PRECISION)
#define FP(name) CAT(CAT(name, PRECISION), VARIANT)
#define ELEM PP(elem)
#define LANE PP(lane)
#define STEP PP(step)

/* ------------------------------------------------------------------ f32 */

typedef float elem_f32;
typedef float lane_f32;
typedef vf v_step_f32;
enum {
    step_f32 = 1,
    row_grain_f32 =
        TILE_ROWS, /* workers split the rows of W so that each row meets the same kind of tile */
    chunk_rows_f32 = 192, /* rows of W worked on at a time: a multiple of TILE_ROWS and of VL */
    gated_rows_f32 = 96,  /* the same, of each of the two weights of a gate */
    /* A reduction is worked on in one part up to chunk_depth, whole blocks of every type; beyond, in parts of part_depth;
     * and over short_depth with fewer tokens. Parts and rows are as large as the second cache allows: 512 x 2048 x 5632
     * by pairs took place at 83 to 89 % of the peak of two Zen 5 cores in parts of 2048 with 256 tokens and 96 rows, at
     * 90 to 91 % so; float32 in one core at 91 % in parts of 256, at 94 in parts of 512. */
    chunk_depth_f32 = 512,
    part_depth_f32 = 512,
    short_depth_f32 = 512,
    back_depth_f32 = 192, /* rows of W decoded at a time on the way back */
};

V_INLINE vf v_load_step_f32(const float *p) { return v_load(p); }
V_INLINE vf v_broadcast_step_f32(const float *p) { return v_set1(*p); }
V_INLINE vf v_fma_step_f32(vf a, vf b, vf c) { return v_fma(a, b, c); }

V_INLINE int64_t matrix_rows_f32(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_stride,
    const float *b, int64_t b_stride, float *c, int64_t c_stride, int accumulate)
{
    (void)m, (void)n, (void)k, (void)a, (void)a_stride, (void)b, (void)b_stride, (void)c,
        (void)c_stride;
    (void)accumulate;
    return 0;
}

V_INLINE void matrix_begin_f32(void) {}
V_INLINE void matrix_end_f32(void) {}

/* n floats as elements of a row; in f32 they are those already, so x itself serves. */
V_INLINE const float *as_row_f32(const float *x, int64_t n, float *buffer)
{
    (void)n, (void)buffer;
    return x;
}

/* One step of a panel from `rows` rows (one) of n floats, n a multiple of VL. */
V_INLINE void interleave_f32(const float *rows, int64_t stride, int64_t n, float *lanes)
{
    (void)stride;
    memcpy(lanes, rows, (size_t)n * sizeof *lanes);
}

/* The same from rows that are stored as elements, `rows` of STEP. */
V_INLINE void interleave_stored_f32(const float *const *rows, int64_t n, float *lanes)
{
    memcpy(lanes, rows[0], (size_t)n * sizeof *lanes);
}

/* e^(x - y), as exactly as what becomes of it deserves. */
V_INLINE vf v_softmax_exp_f32(vf x, vf y) { return v_exp(v_sub(x, y)); }

/* Two neighbours of the reduction, at p and the step after it. */
V_INLINE void v_store_two_f32(float *p, int64_t stride, vf a, vf b)
{
    v_store(p, a);
    v_store(p + stride, b);
}

/* VL elements of a row. */
V_INLINE void v_store_row_f32(float *p, vf x) { v_store(p, x); }

V_INLINE int stored_as_row_f32(int type, const void *w)
{
    return type == TYPE_F32 && (uintptr_t)w % sizeof(float) == 0;
}

/* ------------------------------------------------------------------ bf16 pairs */

#ifdef HAVE_PAIR_PRODUCT
typedef uint16_t elem_bf16;
typedef uint32_t lane_bf16;
typedef vi v_step_bf16;
enum {
    step_bf16 = 2,
#ifdef HAVE_MATRIX_TILES
    row_grain_bf16 = MATRIX_ROWS,
    chunk_rows_bf16 = 96,
    gated_rows_bf16 = 96,
    chunk_depth_bf16 =
        2048, /* matrix tiles are worth whole reductions: results leave them seldom */
    part_depth_bf16 = 512,
    short_depth_bf16 = 1024,
#else
    row_grain_bf16 = TILE_ROWS,
    chunk_rows_bf16 = 192,
    gated_rows_bf16 = 96,
    chunk_depth_bf16 = 1024,
    part_depth_bf16 = 1024,
    short_depth_bf16 = 1024,
#endif
    back_depth_bf16 = 1024,
};

V_INLINE vi v_load_step_bf16(const uint32_t *p) { return _mm512_loadu_si512(p); }
V_INLINE vi v_broadcast_step_bf16(const uint16_t *p)
{
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
}
V_INLINE vf v_fma_step_bf16(vi a, vi b, vf c) { return v_pair_fma(a, b, c); }

#ifndef HAVE_MATRIX_TILES
V_INLINE int64_t matrix_rows_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a,
    int64_t a_stride, const uint32_t *b, int64_t b_stride, float *c, int64_t c_stride,
    int accumulate)
{
    (void)m, (void)n, (void)k, (void)a, (void)a_stride, (void)b, (void)b_stride, (void)c,
        (void)c_stride;
    (void)accumulate;
    return 0;
}
V_INLINE void matrix_begin_bf16(void) {}
V_INLINE void matrix_end_bf16(void) {}
#endif

V_INLINE const uint16_t *as_row_bf16(const float *x, int64_t n, uint16_t *buffer)
{
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        v_store_pairs_two(buffer + i, v_load(x + i), v_load(x + i + VL));
    FN(encode_bf16)(x + i, n - i, buffer + i);
    return buffer;
}

V_INLINE void interleave_bf16(const float *rows, int64_t stride, int64_t n, uint32_t *lanes)
{
    for (int64_t j = 0; j < n; j += VL)
        _mm512_storeu_si512(lanes + j, v_pair(v_load(rows + j), v_load(rows + stride + j)));
}

V_INLINE void interleave_stored_bf16(const uint16_t *const *rows, int64_t n, uint32_t *lanes)
{
    int64_t j = 0;
    for (; j + VL <= n; j += VL) {
        vi even = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[0] + j)));
        vi odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[1] + j)));
        _mm512_storeu_si512(lanes + j, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
    for (; j < n; j++)
        lanes[j] = rows[0][j] | (uint32_t)rows[1][j] << 16;
}

V_INLINE vf v_softmax_exp_bf16(vf x, vf y) { return v_exp_rough(x, y); }

V_INLINE void v_store_two_bf16(uint32_t *p, int64_t stride, vf a, vf b)
{
    (void)stride;
    _mm512_storeu_si512(p, v_pair(a, b));
}

V_INLINE void v_store_row_bf16(uint16_t *p, vf x) { v_store_pairs(p, x); }

V_INLINE int stored_as_row_bf16(int type, const void *w)
{
    return type == TYPE_BF16 && (uintptr_t)w % sizeof(uint16_t) == 0;
}
#endif
