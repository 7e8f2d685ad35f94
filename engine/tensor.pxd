from libc.stdint cimport int64_t


cdef class Tensor:
    cdef readonly str name
    cdef readonly int64_t rows, cols
    cdef readonly int type          # stored type id; 0 (F32) of most that is not a weight
    cdef readonly int64_t stride    # elements from one row to the next
    cdef char *data                 # NULL until a plan gives it a place in the arena
    cdef readonly object owner      # keeps `data` alive: an array, a map, or the graph's arena
    cdef readonly Tensor base       # for a view: the tensor whose rows it shows
    cdef readonly int64_t first_row
    cdef readonly object producer   # the node that writes it; None for what comes from outside
    cdef readonly bint needs_grad
    cdef readonly Tensor grad       # for a parameter: where its gradient is summed

    cdef int64_t n_bytes(self)
    cdef float *floats(self) except? NULL
