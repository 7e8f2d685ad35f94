#define VARIANT avx2
#include "vec_avx2.h"

#include "families.h"
