#define VARIANT avx512
#include "vec_avx512.h"

#include "families.h"
