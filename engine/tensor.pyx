"""Tensors: a shape, a stored type, bytes, and whoever owns them.

Every tensor is a matrix of ``rows`` x ``cols`` whose rows lie one behind the other, with room
between them only where `stride` says so. A tensor is one of

- *external*: bytes of somebody else (a weight in a mapped file, a parameter in an array),
- *planned*: written by a node of a graph, its place given by the graph's plan,
- a *view*: some rows of another tensor.
"""

import numpy as np

from engine.errors import ShapeError

from engine.kernels cimport block_elements, row_offset


cdef class Tensor:
    """A matrix in memory; see the module's text for its kinds.

    Attributes
    ----------
    name : str
    rows, cols : int
    type : int
        GGUF type id of the stored elements.
    stride : int
        Elements from one row to the next, `cols` unless more are asked for.
    """

    def __init__(self, str name, int64_t rows, int64_t cols, int type=0, int64_t stride=0):
        block = block_elements(type)
        self.stride = max(stride, cols)
        if rows <= 0 or cols <= 0 or block == 0 or cols % block or self.stride % block:
            raise ShapeError(f"tensor {name}: {rows} x {cols} elements of type {type} cannot be")
        self.name = name
        self.rows = rows
        self.cols = cols
        self.type = type
        self.data = NULL

    @staticmethod
    def external(str name, array, int64_t rows, int64_t cols, int type=0, bint writable=False):
        """Wrap the bytes of `array` (C-contiguous, kept alive) as a rows x cols tensor.

        Raises
        ------
        ShapeError
            If `array` has fewer bytes than that.
        """
        cdef Tensor self = Tensor(name, rows, cols, type)
        array = np.asarray(array)
        if not array.flags.c_contiguous:
            raise ShapeError(f"tensor {name}: its memory is not contiguous")
        flat = array.reshape(-1).view(np.uint8)
        if flat.nbytes < self.n_bytes():
            raise ShapeError(
                f"tensor {name}: {self.n_bytes()} bytes expected, there are {flat.nbytes}"
            )
        cdef const unsigned char[::1] bytes_ = flat
        if writable and not flat.flags.writeable:
            raise ShapeError(f"tensor {name}: its memory cannot be written")
        self.data = <char *>&bytes_[0]
        self.owner = flat
        return self

    @staticmethod
    def parameter(str name, value, grad):
        """Wrap a float32 matrix to be trained and the matrix in which its gradient is summed.

        Parameters
        ----------
        value, grad : ndarray of shape (rows, cols), float32, C-contiguous, writable
        """
        for array in (value, grad):
            if array.dtype != np.float32 or array.ndim != 2 or array.shape != value.shape:
                raise ShapeError(
                    f"parameter {name}: value and gradient must be float32 of one shape"
                )
        rows, cols = value.shape
        cdef Tensor self = Tensor.external(name, value, rows, cols, 0, True)
        self.grad = Tensor.external(name + ".grad", grad, rows, cols, 0, True)
        self.needs_grad = True
        return self

    def view(self, int64_t first, int64_t rows):
        """Rows first ... first + rows as a tensor of their own."""
        if first < 0 or rows <= 0 or first + rows > self.rows:
            raise ShapeError(f"tensor {self.name}: rows {first} to {first + rows} of {self.rows}")
        name = f"{self.name}[{first}:{first + rows}]"
        cdef Tensor view = Tensor(name, rows, self.cols, self.type, self.stride)
        view.base = self
        view.first_row = first
        view.needs_grad = self.needs_grad
        if self.data != NULL:
            view.data = self.data + row_offset(self.type, self.stride) * first
            view.owner = self.owner
        return view

    cdef int64_t n_bytes(self):
        return self.rows * row_offset(self.type, self.stride)

    cdef float *floats(self) except? NULL:
        if self.type != 0 or self.stride != self.cols:
            raise ShapeError(f"tensor {self.name}: its elements must be F32, row behind row")
        return <float *>self.data

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.n_bytes()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)"""
        return self.rows, self.cols

    def numpy(self):
        """The values as a float32 array of shape (rows, cols) that shares memory with the tensor.

        Raises
        ------
        ShapeError
            If the tensor is stored in another type, with room between rows, or has no place yet.
        """
        if self.type != 0 or self.data == NULL or self.stride != self.cols:
            raise ShapeError(f"tensor {self.name}: no float32 values to show")
        start = <size_t>self.data - <size_t>self.owner.ctypes.data
        values = self.owner[start : start + self.n_bytes()].view(np.float32)
        return values.reshape(self.rows, self.cols)

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, {self.rows} x {self.cols}, type {self.type})"
