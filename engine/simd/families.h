/* One variant of every family, and its table. Included by variant_*.c after VARIANT and the vector header
 * are set; families see nothing else. */
#include "kernels.h"

#include <math.h>

#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define STR_(x) #x
#define STR(x) STR_(x)
#define FN(name) CAT(name, VARIANT)

#include "vec_math.h"

#include "codes.h"

#include "convert.c"
#include "encode.c"
#include "fit.c"
#include "quantize.c"
#include "linear.c"
#include "heads.c"
#include "precision.h"
#define PRECISION f32
#include "tile.c"
#include "gemm.c"
#include "attend.c"
#undef PRECISION
#ifdef HAVE_PAIR_PRODUCT
#define PRECISION bf16
#include "tile.c"
#include "gemm.c"
#include "attend.c"
#undef PRECISION
#endif
#include "quant.c"
#include "rowwise.c"
#include "gemv.c"
#include "lora.c"
#include "attention.c"
#include "loss.c"
#include "adamw.c"
#include "probe.c"

const struct kernels CAT(kernels, VARIANT) = {
    .isa = STR(VARIANT),
    .lanes = VL,
#if defined HAVE_MATRIX_TILES
    .pairs = 2,
#elif defined HAVE_PAIR_PRODUCT
    .pairs = 1,
#endif
#define KERNEL(name) .name = FN(name),
#include "kernels.def"
#undef KERNEL
};
