"""What every op asks of its tensors."""

from engine.errors import ShapeError

from engine.kernels cimport kernels
from engine.tensor cimport Tensor
from libc.stdint cimport int32_t, int64_t


cdef int require(bint condition, str message) except -1:
    if not condition:
        raise ShapeError(message)
    return 0


cdef const int32_t *ints(object array, int64_t n) except NULL:
    """Address of an int32 array that the node keeps alive, checked for length."""
    cdef const int32_t[::1] view = array
    require(view.shape[0] >= n, f"{n} integers expected, there are {view.shape[0]}")
    return &view[0]


cdef Tensor result(str name, int64_t rows, int64_t cols, int type=F32):
    require(type in (F32, BF16), f"{name}: results are F32 or BF16")
    return Tensor(name, rows, cols, type)


cdef int require_numbers(Tensor t, bint dense=True) except -1:
    """Activations and their gradients are F32, or BF16 where products would round them."""
    require(t.type in (F32, BF16), f"{t.name}: activations must be F32 or BF16")
    require(not dense or t.stride == t.cols, f"{t.name}: there must be no room between its rows")
    return 0


cdef int require_pairs(Tensor t, const kernels *table) except -1:
    """Products take BF16 activations in pairs, and only as such."""
    fits = t.type == F32 or (table.pairs and t.cols % 2 == 0)
    require(fits, f"{t.name}: without bf16 pairs a product takes F32")
    return 0
