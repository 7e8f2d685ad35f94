/* The vector layer for AVX2 + FMA + F16C: 8 floats. Each operation has a twin of the same name in
 * vec_avx512.h; families are written against these names only. tests/simd/ exercises them through
 * the kernels at every tail length. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    VL = 8,        /* floats of a vector */
    TILE_ROWS = 6, /* 6 x 2 accumulators + 2 loads + 1 broadcast fill 15 of 16 registers */
    TILE_VECS = 2,
};

typedef __m256 vf;
typedef __m256i vi;

#define V_INLINE static inline __attribute__((always_inline, unused))

V_INLINE vi v_mask(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

V_INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
/* The first n of VL lanes, 0 <= n <= VL; the others read as zero and are not written. */
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, v_mask(n)); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, v_mask(n), x); }
/* Lanes from n on become zero. */
V_INLINE vf v_keep_n(vf x, int64_t n) { return _mm256_and_ps(x, _mm256_castsi256_ps(v_mask(n))); }
/* Lanes from n on become y's. */
V_INLINE vf v_blend_n(vf x, vf y, int64_t n)
{
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(v_mask(n)));
}

/* Lanes of x where a < b, of y elsewhere. */
V_INLINE vf v_select_less(vf a, vf b, vf x, vf y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
V_INLINE int v_any_less(vf a, vf b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)) != 0;
}

V_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
V_INLINE vf v_sqrt(vf a) { return _mm256_sqrt_ps(a); }
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
V_INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf v_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
V_INLINE vf v_trunc(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
/* Lanes of x where a < b, of y elsewhere and where either is NaN. */
V_INLINE vf v_if_less(vf a, vf b, vf x, vf y)
{
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

/* Sum and maximum of the lanes, in pairs: the same order in every call. */
V_INLINE float v_sum(vf a)
{
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
V_INLINE float v_max_lane(vf a)
{
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
/* Sums in double: acc plus the lanes of a, and the sum of what has come together so. */
typedef __m256d vd;
V_INLINE vd v_zero_double(void) { return _mm256_setzero_pd(); }
V_INLINE vd v_add_double(vd acc, vf a)
{
    vd low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
    return _mm256_add_pd(acc, _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))));
}
V_INLINE double v_sum_double(vd x)
{
    __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
}

/* x * 2^n for integral n in -126 ... 127; n below that gives zero, 128 infinity, NaN NaN. */
V_INLINE vf v_scale2(vf x, vf n)
{
    vi e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    vf y = _mm256_mul_ps(x, _mm256_castsi256_ps(e));
    return _mm256_and_ps(y, _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

/* (a0, b0, a1, b1, ...) -> (b0, a0, b1, a1, ...) */
V_INLINE vf v_swap_pairs(vf a) { return _mm256_permute_ps(a, 0xB1); }

V_INLINE vf v_from_f16(__m128i h) { return _mm256_cvtph_ps(h); }
V_INLINE __m128i v_to_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
V_INLINE vf v_load_f16(const uint16_t *p)
{
    return v_from_f16(_mm_loadu_si128((const __m128i *)p));
}
V_INLINE void v_store_f16(uint16_t *p, vf x) { _mm_storeu_si128((__m128i *)p, v_to_f16(x)); }
V_INLINE vf v_load_bf16(const uint16_t *p)
{
    vi x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}

/* The bf16 nearest to each lane (ties to even, NaN quiet, subnormals rounded like the rest), in the low
 * halves of 32-bit lanes. */
V_INLINE vi v_round_bf16(vf x)
{
    vi bits = _mm256_castps_si256(x);
    vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    vi near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    vi quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    vf nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, _mm256_castps_si256(nan)), 16);
}
V_INLINE void v_store_bf16(uint16_t *p, vf x)
{
    vi r = v_round_bf16(x);
    __m128i y = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128((__m128i *)p, y);
}

V_INLINE vf v_from_u8(const uint8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
V_INLINE vf v_from_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* dst[j][i] = src[i][j] for VL x VL elements of 32 bits. */
/* out[j]: column j of VL rows. */
V_INLINE void v_turn(const float *src, int64_t src_stride, vf out[VL])
{
    vf r[8], s[8];
    for (int i = 0; i < 8; i++)
        r[i] = v_load(src + i * src_stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xEE);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        out[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

/* Byte products without VNNI: sums of four products a 32-bit lane, unsigned by signed. The products of neighbours
 * meet in 16 bits, so u must stay below 129: signed codes stay as they are and go by magnitude and moved sign. */
V_INLINE vi v_zero_i(void) { return _mm256_setzero_si256(); }
V_INLINE vi v_load_bytes(const void *p) { return _mm256_loadu_si256(p); }
V_INLINE vi v_load_halves(const void *p) { return v_load_bytes(p); }
V_INLINE vi v_dot_bytes(vi acc, vi u, vi s)
{
    vi pairs = _mm256_maddubs_epi16(u, s);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
V_INLINE vf v_from_i32(vi x) { return _mm256_cvtepi32_ps(x); }
enum { SIGNED_BIAS = 0 };
V_INLINE __m256i v_shift_signed(__m256i a) { return a; }
V_INLINE vi v_dot_shifted(vi acc, vi a, vi s)
{
    return v_dot_bytes(acc, _mm256_abs_epi8(a), _mm256_sign_epi8(s, a));
}
V_INLINE __m256 v_half(vf a, int high)
{
    (void)high;
    return a;
}

/* Four bytes at each of n places `stride` bytes apart, n <= VL; other lanes zero. */
V_INLINE vi v_gather_words(const uint8_t *p, int64_t stride, int64_t n)
{
    int32_t words[VL] = {0};
    for (int64_t i = 0; i < n; i++)
        memcpy(words + i, p + i * stride, sizeof *words);
    return _mm256_loadu_si256((const __m256i *)words);
}
/* The half-precision numbers in the low and the high halves of 32-bit lanes. */
V_INLINE vf v_low_f16(vi x)
{
    vi low = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
    __m128i packed =
        _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    return _mm256_cvtph_ps(packed);
}
V_INLINE vf v_high_f16(vi x) { return v_low_f16(_mm256_srli_epi32(x, 16)); }
/* p[0] p[0] p[1] p[1] ... */
V_INLINE vf v_load_twice(const float *p)
{
    const vi order = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), order);
}
/* Integral values of at most 127 as bytes. */
V_INLINE void v_store_i8(int8_t *p, vf x)
{
    vi codes = _mm256_cvtps_epi32(x);
    __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}

/* What the rows of simple blocks need (quant.c): vectors of stored bytes as they stand. */

/* The first n bytes of a vector, an even number above 0: v_load_first gives them and zeros behind, and reads no
 * others: whole lanes, then two bytes into the lane that `last` leaves of them all. */
typedef struct {
    vi whole, last;
    int64_t last_at;
} v_first;
V_INLINE v_first v_first_bytes(int64_t n)
{
    vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), lanes = _mm256_set1_epi32((int)n / 4);
    v_first first = {.whole = _mm256_cmpgt_epi32(lanes, lane), .last = _mm256_setzero_si256()};
    if (n % 4 != 0 && n < 32) {
        first.last = _mm256_and_si256(_mm256_cmpeq_epi32(lanes, lane), _mm256_set1_epi32(0xFFFF));
        first.last_at = n - 2;
    }
    return first;
}
V_INLINE vi v_load_first(const void *p, v_first n)
{
    uint16_t last;
    memcpy(&last, (const char *)p + n.last_at, sizeof last);
    return _mm256_or_si256(
        _mm256_maskload_epi32(p, n.whole), _mm256_and_si256(n.last, _mm256_set1_epi32(last)));
}
V_INLINE void v_store_bytes(void *p, vi x) { _mm256_storeu_si256(p, x); }
V_INLINE vi v_set_bytes(int x) { return _mm256_set1_epi8((char)x); }
V_INLINE vi v_low_nibbles(vi x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
V_INLINE vi v_high_nibbles(vi x) { return v_low_nibbles(_mm256_srli_epi16(x, 4)); }
V_INLINE vi v_flip_signs(vi x) { return x; } /* as v_shift_signed */
V_INLINE vi v_same(__m128i x) { return _mm256_broadcastsi128_si256(x); }
V_INLINE vi v_lookup_bytes(__m128i table, vi at) { return _mm256_shuffle_epi8(v_same(table), at); }
V_INLINE vi v_sub_i(vi a, vi b) { return _mm256_sub_epi32(a, b); }

/* 16 bytes of each of ROWS rows, and the same 16 bytes for each. */
V_INLINE vi v_load_rows(const uint8_t *p, int64_t stride)
{
    vi x = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_inserti128_si256(x, _mm_loadu_si128((const __m128i *)(p + stride)), 1);
}
V_INLINE vi v_load_same(const void *p) { return v_same(_mm_loadu_si128((const __m128i *)p)); }
V_INLINE void v_store_same(void *p, vi x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(x));
}
/* Numbers of VL blocks, a vector a row, so that those of a block are found together. */
V_INLINE void v_mix_rows(const vf *x, vf *mixed)
{
    mixed[0] = _mm256_unpacklo_ps(x[0], x[1]);
    mixed[1] = _mm256_unpackhi_ps(x[0], x[1]);
}
/* Block b + i's number of each row, in the row's four lanes; at: v_places(b), b a multiple of 4, i below 4. */
V_INLINE vf v_mixed(const vf *mixed, int i, vi at)
{
    vi lane = i % 2 ? _mm256_add_epi32(at, _mm256_set1_epi32(2)) : at;
    return _mm256_permutevar8x32_ps(mixed[i / 2], lane);
}
V_INLINE vi v_places(int64_t b)
{
    return _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1), _mm256_set1_epi32((int)b));
}
/* The sum of each row's four lanes, in the first of them. */
V_INLINE vf v_sum_rows(vf x)
{
    x = _mm256_add_ps(x, _mm256_permute_ps(x, 0x0E));
    return _mm256_add_ps(x, _mm256_permute_ps(x, 0x01));
}
V_INLINE void v_store_rows(float *y, vf x)
{
    __m128 pair = _mm_unpacklo_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    _mm_storel_pi((__m64 *)(void *)y, pair);
}

/* Two halves of each of some blocks, `stride` bytes apart from p on. Lanes of other blocks mean nothing. */
V_INLINE vi v_fields(const uint8_t *p, int64_t stride, int64_t blocks, const vi *z, int n, vi at)
{
    (void)z, (void)n, (void)at;
    int32_t w[VL];
    for (int i = 0; i < VL; i++)
        memcpy(w + i, p + (i < blocks ? i * stride : 0), sizeof *w);
    return _mm256_setr_epi32(w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]);
}
V_INLINE vi v_half_places(int64_t stride)
{
    (void)stride;
    return v_zero_i();
}
V_INLINE vf v_first_f16(vi fields) { return v_low_f16(fields); }
V_INLINE vf v_second_f16(vi fields) { return v_high_f16(fields); }
/* codes + 16 where the byte of x that `at` names, within its 16, has the bit that is set in `bit`. */
V_INLINE vi v_add_fifth(vi codes, vi x, vi at, vi bit)
{
    vi set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(x, at), bit), bit);
    return _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}
