from engine.kernels cimport kernels, op_fn, step, team_clock
from engine.tensor cimport Tensor
from libc.stdint cimport int64_t


cdef class Node:
    cdef readonly tuple inputs      # tensors read
    cdef readonly tuple outputs     # written; may be external (a cache) or accumulated into
    cdef readonly tuple recipe      # constructor's arguments, to make the node again
    cdef readonly object segment    # what is computed again together on the way back
    cdef dict aliases               # output number -> input number whose buffer it may take over
    cdef bint must_alias            # the kernel works in place only
    cdef void *args
    cdef void *shared               # the graph's buffer that workers share within a step

    cdef int64_t shared_bytes(self) except -1
    cdef op_fn lower(self, const kernels *table) except NULL


cdef class Graph:
    cdef readonly list nodes
    cdef readonly object isa
    cdef readonly int n_threads
    cdef public object segment      # given to nodes as they are added
    cdef public bint pairs          # weights that are not F32 may be multiplied in bf16 pairs
    cdef public bint rounded        # what pairs would round is kept so for the way back
    cdef public bint partner        # quantized weights meet activations rounded as they are
    cdef readonly int64_t arena_bytes
    cdef dict packed                # tensors in the forms that products take, by what asks for them
    cdef set kept
    cdef const kernels *table
    cdef step *steps
    cdef int64_t n_steps
    cdef team_clock clock           # both NULL: unmeasured
    cdef object step_ns, wait_ns    # what it points to
    cdef dict worked                # FLOPs and bytes since then of the steps whose work varies
    cdef readonly int64_t n_runs    # begun since `measure`
    cdef object arena, scratch
    cdef char *scratch_start

    cdef dict place(self)
    cdef int count_work(self, int64_t first, int64_t last) except -1
    cdef object memory(self, int64_t n_bytes, lent)
    cdef int lower(self, step *steps, void *shared) except -1
    cdef int set_barriers(self, step *steps) except -1
