"""Random words and normal deviates, for modules that draw without the GIL."""

cimport cython
from libc.stdint cimport uint32_t


@cython.final
cdef class MT19937:
    cdef uint32_t x[624]
    cdef int p

    cdef void seed(self, uint32_t seed) noexcept nogil
    cdef uint32_t next(self) noexcept nogil


@cython.final
cdef class NormalFloat:
    cdef MT19937 generator
    cdef float saved
    cdef bint has_saved

    cdef float next(self) noexcept nogil
