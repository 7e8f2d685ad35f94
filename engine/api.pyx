"""Row functions for extensions outside of the engine.

They are functions, not the table of pointers that they read, so that a kernel more or less in the
table does not break what was compiled against an earlier one.
"""

from engine.kernels cimport block_elements, kernels, row_offset, table
from libc.stdint cimport int64_t, uint16_t

cdef const kernels *active = table()


cdef int64_t row_bytes(int type, int64_t n) noexcept nogil:
    cdef int64_t block = block_elements(type)
    if block == 0 or n < 0 or n % block != 0:
        return -1
    return row_offset(type, n)


cdef void decode_row(int type, const void *row, int64_t n, float *out) noexcept nogil:
    active.decode_row(type, row, n, out)


cdef void encode_bf16(const float *x, int64_t n, uint16_t *out) noexcept nogil:
    active.encode_bf16(x, n, out)


cdef void encode_f16(const float *x, int64_t n, uint16_t *out) noexcept nogil:
    active.encode_f16(x, n, out)
