/* AVX-512 with BF16: vec_avx512.h plus the pair product. */
#include "vec_avx512.h"

#define HAVE_PAIR_PRODUCT 1

/* a and b to nearest bf16, a in the low halves of 32-bit lanes. Subnormals become zero, as the product takes them. */
V_INLINE vi v_pair(vf a, vf b)
{
    vi both = (vi)_mm512_cvtne2ps_pbh(b, a);
    const vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const vi order =
        _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, both);
}

/* Elements of a row for the pair product: VL of them, and 2 VL by one store, which a load of a whole vector can take
 * over at once. */
V_INLINE void v_store_pairs(uint16_t *p, vf x)
{
    _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x));
}
V_INLINE void v_store_pairs_two(uint16_t *p, vf a, vf b)
{
    _mm512_storeu_si512(p, (vi)_mm512_cvtne2ps_pbh(b, a));
}

/* Lane i: acc + a[2i + 1] b[2i + 1] + a[2i] b[2i], bf16 pairs in 32-bit lanes. Subnormals count as zero. */
V_INLINE vf v_pair_fma(vi a, vi b, vf acc)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
