/* The vector layer for AVX-512 F/BW/VL/DQ + VNNI: 16 floats. Twins of vec_avx2.h's operations. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    VL = 16, /* floats of a vector */
    /* 6 x 4 accumulators + 4 loads: 28 of 32 registers; broadcasts come from memory */
    TILE_ROWS = 6,
    TILE_VECS = 4,
};

typedef __m512 vf;
typedef __m512i vi;

#define V_INLINE static inline __attribute__((always_inline, unused))

V_INLINE __mmask16 v_mask(int64_t n) { return (__mmask16)((1u << n) - 1u); }

V_INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
V_INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, v_mask(n), x); }
V_INLINE vf v_keep_n(vf x, int64_t n) { return _mm512_maskz_mov_ps(v_mask(n), x); }
V_INLINE vf v_blend_n(vf x, vf y, int64_t n) { return _mm512_mask_mov_ps(y, v_mask(n), x); }

/* Lanes of x where a < b, of y elsewhere. */
V_INLINE vf v_select_less(vf a, vf b, vf x, vf y)
{
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}
V_INLINE int v_any_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }

V_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
V_INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE vf v_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
V_INLINE vf v_trunc(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
}
V_INLINE vf v_if_less(vf a, vf b, vf x, vf y)
{
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x);
}

V_INLINE __m256 v_half(vf a, int high)
{
    return high ? _mm512_extractf32x8_ps(a, 1) : _mm512_castps512_ps256(a);
}
V_INLINE float v_sum(vf a)
{
    __m256 x = _mm256_add_ps(v_half(a, 0), v_half(a, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
V_INLINE float v_max_lane(vf a)
{
    __m256 x = _mm256_max_ps(v_half(a, 0), v_half(a, 1));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
typedef __m512d vd;
V_INLINE vd v_zero_double(void) { return _mm512_setzero_pd(); }
V_INLINE vd v_add_double(vd acc, vf a)
{
    vd low = _mm512_cvtps_pd(v_half(a, 0));
    return _mm512_add_pd(acc, _mm512_add_pd(low, _mm512_cvtps_pd(v_half(a, 1))));
}
V_INLINE double v_sum_double(vd x)
{
    __m256d y = _mm256_add_pd(_mm512_castpd512_pd256(x), _mm512_extractf64x4_pd(x, 1));
    __m128d z = _mm_add_pd(_mm256_castpd256_pd128(y), _mm256_extractf128_pd(y, 1));
    return _mm_cvtsd_f64(_mm_add_sd(z, _mm_unpackhi_pd(z, z)));
}

V_INLINE vf v_scale2(vf x, vf n) { return _mm512_scalef_ps(x, n); }
V_INLINE vf v_swap_pairs(vf a) { return _mm512_permute_ps(a, 0xB1); }

V_INLINE vf v_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
V_INLINE void v_store_f16(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
V_INLINE vf v_load_bf16(const uint16_t *p)
{
    vi x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
V_INLINE vi v_round_bf16(vf x)
{
    vi bits = _mm512_castps_si512(x);
    vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    vi near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    vi quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(near, nan, quiet), 16);
}
V_INLINE void v_store_bf16(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(v_round_bf16(x)));
}

V_INLINE vf v_from_u8(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
V_INLINE vf v_from_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* out[j]: column j of VL rows. */
V_INLINE void v_turn(const float *src, int64_t src_stride, vf out[VL])
{
    vf r[16], s[16];
    for (int i = 0; i < 16; i++)
        r[i] = v_load(src + i * src_stride);
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        /* r[i + c]: rows i ... i + 3 of columns c, c + 4, c + 8, c + 12 */
        r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xEE);
        r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
    }
    for (int c = 0; c < 4; c++) {
        vf even0 = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x88);
        vf odd0 = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xDD);
        vf even1 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x88);
        vf odd1 = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xDD);
        out[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
        out[c + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        out[c + 8] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
        out[c + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
    }
}

/* Byte products by VNNI: sums of four products a 32-bit lane, unsigned by signed, added to acc. */
#define HAVE_BYTE_PRODUCT 1

V_INLINE vi v_zero_i(void) { return _mm512_setzero_si512(); }
V_INLINE vi v_load_bytes(const void *p) { return _mm512_loadu_si512(p); }
/* The same of what was just stored 32 bytes at a time: a load across two stores would wait for both. */
V_INLINE vi v_load_halves(const void *p)
{
    __m256i low = _mm256_loadu_si256(p), high = _mm256_loadu_si256((const __m256i *)p + 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
V_INLINE vi v_dot_bytes(vi acc, vi u, vi s) { return _mm512_dpbusd_epi32(acc, u, s); }
V_INLINE vi v_set_four(const uint8_t *p)
{
    int32_t four;
    memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}
V_INLINE vf v_from_i32(vi x) { return _mm512_cvtepi32_ps(x); }
/* Signed codes become unsigned by adding SIGNED_BIAS, so that many times the sum of s comes off again. */
enum { SIGNED_BIAS = 128 };
V_INLINE __m256i v_shift_signed(__m256i a) { return _mm256_xor_si256(a, _mm256_set1_epi8(-128)); }
V_INLINE vi v_dot_shifted(vi acc, vi u, vi s) { return v_dot_bytes(acc, u, s); }

/* Four bytes at each of n places `stride` bytes apart, n <= VL; other lanes zero. */
V_INLINE vi v_gather_words(const uint8_t *p, int64_t stride, int64_t n)
{
    const vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    vi at = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)stride));
    return _mm512_mask_i32gather_epi32(v_zero_i(), v_mask(n), at, p, 1);
}
/* The half-precision numbers in the low and the high halves of 32-bit lanes. */
V_INLINE vf v_low_f16(vi x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
V_INLINE vf v_high_f16(vi x) { return v_low_f16(_mm512_srli_epi32(x, 16)); }
/* p[0] p[0] p[1] p[1] ... */
V_INLINE vf v_load_twice(const float *p)
{
    const vi order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
/* Integral values of at most 127 as bytes. */
V_INLINE void v_store_i8(int8_t *p, vf x)
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

/* What the rows of simple blocks need (quant.c): vectors of stored bytes as they stand. */

/* The first n bytes of a vector, an even number: v_load_first gives them and zeros behind, and reads no others. */
typedef __mmask64 v_first;
V_INLINE v_first v_first_bytes(int64_t n)
{
    return n >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << n) - 1;
}
V_INLINE vi v_load_first(const void *p, v_first n) { return _mm512_maskz_loadu_epi8(n, p); }
V_INLINE void v_store_bytes(void *p, vi x) { _mm512_storeu_si512(p, x); }
V_INLINE vi v_set_bytes(int x) { return _mm512_set1_epi8((char)x); }
V_INLINE vi v_low_nibbles(vi x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
V_INLINE vi v_high_nibbles(vi x) { return v_low_nibbles(_mm512_srli_epi16(x, 4)); }
V_INLINE vi v_flip_signs(vi x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
V_INLINE vi v_same(__m128i x) { return _mm512_broadcast_i32x4(x); }
V_INLINE vi v_lookup_bytes(__m128i table, vi at) { return _mm512_shuffle_epi8(v_same(table), at); }
V_INLINE vi v_sub_i(vi a, vi b) { return _mm512_sub_epi32(a, b); }

/* 16 bytes of each of ROWS rows, and the same 16 bytes for each. */
V_INLINE vi v_load_rows(const uint8_t *p, int64_t stride)
{
    vi x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)p));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + stride)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 2 * stride)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(p + 3 * stride)), 3);
}
V_INLINE vi v_load_same(const void *p) { return v_same(_mm_loadu_si128((const __m128i *)p)); }
V_INLINE void v_store_same(void *p, vi x)
{
    _mm_storeu_si128((__m128i *)p, _mm512_castsi512_si128(x));
}
/* Numbers of VL blocks, a vector a row, so that those of a block are found together. */
V_INLINE void v_mix_rows(const vf *x, vf *mixed)
{
    vf a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
    vf c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    mixed[0] = _mm512_shuffle_ps(a, c, 0x44);
    mixed[1] = _mm512_shuffle_ps(a, c, 0xEE);
    mixed[2] = _mm512_shuffle_ps(b, d, 0x44);
    mixed[3] = _mm512_shuffle_ps(b, d, 0xEE);
}
/* Block b + i's number of each row, in the row's four lanes; at: v_places(b), b a multiple of 4, i below 4. */
V_INLINE vf v_mixed(const vf *mixed, int i, vi at) { return _mm512_permutexvar_ps(at, mixed[i]); }
V_INLINE vi v_places(int64_t b)
{
    const vi row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(row, _mm512_set1_epi32((int)b));
}
/* The sum of each row's four lanes, in the first of them. */
V_INLINE vf v_sum_rows(vf x)
{
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x0E));
    return _mm512_add_ps(x, _mm512_permute_ps(x, 0x01));
}
V_INLINE void v_store_rows(float *y, vf x)
{
    const vi first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}

/* Two halves of each of some blocks, `stride` bytes apart from p on, which lie in n vectors z; at: their places. Lanes
 * of other blocks mean nothing. */
V_INLINE vi v_fields(const uint8_t *p, int64_t stride, int64_t blocks, const vi *z, int n, vi at)
{
    (void)p, (void)stride, (void)blocks;
    vi found = v_zero_i(), group = _mm512_srli_epi16(at, 6);
#pragma GCC unroll 5
    for (int i = 0; i < n; i += 2) {
        __mmask32 here = _mm512_cmpeq_epi16_mask(group, _mm512_set1_epi16((short)(i / 2)));
        vi next = i + 1 < n ? z[i + 1] : v_zero_i();
        found = _mm512_or_si512(found, _mm512_maskz_permutex2var_epi16(here, z[i], at, next));
    }
    return found;
}
/* Places of the halves at p: the first ones of all blocks, then the second ones. */
V_INLINE vi v_half_places(int64_t stride)
{
    uint16_t at[2 * VL];
    for (int i = 0; i < VL; i++) {
        at[i] = (uint16_t)(i * stride / 2);
        at[i + VL] = (uint16_t)(at[i] + 1);
    }
    return v_load_bytes(at);
}
V_INLINE vf v_first_f16(vi fields) { return _mm512_cvtph_ps(_mm512_castsi512_si256(fields)); }
V_INLINE vf v_second_f16(vi fields)
{
    return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(fields, 1));
}
/* codes + 16 where the byte of x that `at` names, within its 16, has the bit that is set in `bit`. */
V_INLINE vi v_add_fifth(vi codes, vi x, vi at, vi bit)
{
    __mmask64 set = _mm512_test_epi8_mask(_mm512_shuffle_epi8(x, at), bit);
    return _mm512_mask_add_epi8(codes, set, codes, _mm512_set1_epi8(16));
}
