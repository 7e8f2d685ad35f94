"""Row functions for extensions outside of the engine, of the kernel variant in force."""

from libc.stdint cimport int64_t, uint16_t

# Bytes of n stored elements; -1 for a type that no kernel knows, or an n that is not whole blocks.
cdef int64_t row_bytes(int type, int64_t n) noexcept nogil

# Decodes n elements, whole blocks of a known type, from row_bytes(type, n) unaligned bytes.
cdef void decode_row(int type, const void *row, int64_t n, float *out) noexcept nogil

# Round n floats to the nearest bf16 or half, ties to even.
cdef void encode_bf16(const float *x, int64_t n, uint16_t *out) noexcept nogil
cdef void encode_f16(const float *x, int64_t n, uint16_t *out) noexcept nogil
