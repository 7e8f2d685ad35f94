from engine.kernels cimport kernels
from engine.tensor cimport Tensor
from libc.stdint cimport int32_t, int64_t

cdef enum:
    F32 = 0
    F16 = 1
    BF16 = 30

cdef int require(bint condition, str message) except -1
cdef const int32_t *ints(object array, int64_t n) except NULL
cdef Tensor result(str name, int64_t rows, int64_t cols, int type=*)
cdef int require_numbers(Tensor t, bint dense=*) except -1
cdef int require_pairs(Tensor t, const kernels *table) except -1
