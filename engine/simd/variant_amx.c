#define VARIANT amx
#include "vec_amx.h"

#include "families.h"
