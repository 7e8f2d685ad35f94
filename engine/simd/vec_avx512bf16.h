/* AVX-512 with BF16: vec_avx512.h plus the pair product. */
#include "vec_avx512.h"

#define HAVE_PAIR_PRODUCT 1

/* Lane i: acc + a[2i + 1] b[2i + 1] + a[2i] b[2i], bf16 pairs in 32-bit lanes. Subnormals count as zero. */
V_INLINE vf v_pair_fma(vi a, vi b, vf acc)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
