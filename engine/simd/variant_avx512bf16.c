#define VARIANT avx512bf16
#include "vec_avx512bf16.h"

#include "families.h"
