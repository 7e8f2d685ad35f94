"""Steps that walk rows: embedding, norm, rotation, gate, sum, zeros, the entry into a cache."""

from engine.graph cimport Graph, Node
from engine.kernels cimport (
    add_args, cache_store_args, embed_args, has_encoder, kernels, op_fn, rms_norm_args,
    rms_norm_back_args, rope_args, silu_mul_args, silu_mul_back_args, zero_args,
)
from engine.ops.checks cimport BF16, F32, ints, require, require_numbers, result
from engine.tensor cimport Tensor
from libc.stdint cimport int32_t, int64_t


cdef class Embed(Node):
    """y[t] = W[ids[t]]; W is frozen."""

    cdef embed_args a

    def __init__(self, Tensor w, ids, int64_t n_tokens):
        require(w.stride == w.cols, f"{w.name}: there must be no room between its rows")
        self.inputs = (w,)
        self.outputs = (result("embedding", n_tokens, w.cols),)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor w = self.inputs[0], y = self.outputs[0]
        cdef const int32_t *ids = ints(self.recipe[1], y.rows)
        self.a = embed_args(y.rows, y.cols, w.data, w.type, ids, y.floats())
        self.args = &self.a
        return table.embed

    def work(self) -> tuple[float, float]:
        cdef Tensor w = self.inputs[0], y = self.outputs[0]
        return 0.0, y.rows * <double>w.n_bytes() / w.rows + y.n_bytes()


def embed(Graph graph, Tensor w, ids, int64_t n_tokens) -> Tensor:
    """Rows of a stored matrix by token; `ids` is an int32 array that is read at each run."""
    return graph.add(Embed, w, ids, n_tokens)[0]


cdef class RmsNorm(Node):
    """y = w x / sqrt(mean(x^2) + eps), and the reciprocal root of each row"""

    cdef rms_norm_args a

    def __init__(self, Tensor x, Tensor w, float eps, int type):
        fits = w.type == F32 and w.rows == 1 and w.cols == x.cols
        require(fits, f"{w.name}: {w.cols} weights for {x.cols} columns")
        self.inputs = (x, w)
        y = result(w.name + ".out", x.rows, x.cols, type)
        self.outputs = (y, result(w.name + ".inv", x.rows, 1))
        self.aliases = {0: 0} if type == F32 else {}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0], w = self.inputs[1]
        cdef Tensor y = self.outputs[0], inv = self.outputs[1]
        self.a = rms_norm_args(
            x.rows, x.cols, x.floats(), w.floats(), self.recipe[2], y.data, inv.floats(), y.type)
        self.args = &self.a
        return table.rms_norm

    def gradient(self, grads):
        cdef Tensor x = self.inputs[0], w = self.inputs[1]
        dy = grads[self.outputs[0]]
        into = grads.into(x)
        outputs = grads.graph.add(RmsNormBack, x, w, self.outputs[1], dy, into, w.needs_grad)
        grads.add(x, outputs[0])
        if w.needs_grad:
            grads.add(w, outputs[1])


cdef class RmsNormBack(Node):
    cdef rms_norm_back_args a

    def __init__(self, Tensor x, Tensor w, Tensor inv, Tensor dy, Tensor into, bint weight_too):
        self.inputs = (x, w, inv, dy)
        dx = into if into is not None else result(w.name + ".dx", x.rows, x.cols)
        self.outputs = (dx, result(w.name + ".dw", 1, x.cols)) if weight_too else (dx,)
        self.aliases = {0: 3} if into is None else {}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x, w, inv, dy, dw, dx = self.outputs[0]
        x, w, inv, dy = self.inputs
        self.a = rms_norm_back_args(
            x.rows, x.cols, x.floats(), w.floats(), inv.floats(), dy.floats(), dx.floats(), NULL,
            self.recipe[4] is not None, 0)
        if len(self.outputs) == 2:
            dw = self.outputs[1]
            self.a.dw = dw.floats()
        self.args = &self.a
        return table.rms_norm_back


def rms_norm(Graph graph, Tensor x, Tensor w, float eps, int type=F32) -> Tensor:
    """RMSNorm of each row (arXiv:1910.07467), as F32 or BF16."""
    return graph.add(RmsNorm, x, w, eps, type)[0]


cdef class Rope(Node):
    """Rotation of pairs by position; sign -1 rotates back."""

    cdef rope_args a

    def __init__(
        self, Tensor x, positions, tables, int64_t n_head, int sign, bint round_f16, int type
    ):
        require(n_head > 0 and x.cols % n_head == 0, f"{x.cols} columns are not {n_head} heads")
        n_rot, head_dim = tables[0].shape[1], x.cols // n_head
        fits = n_rot % 2 == 0 and n_rot <= head_dim
        require(fits, f"{n_rot} rotated dimensions in heads of {head_dim}")
        self.inputs = (x,)
        self.outputs = (result("rope", x.rows, x.cols, type),)
        self.aliases = {0: 0} if type == F32 else {}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0], y = self.outputs[0]
        positions, (cosines, sines), n_head, sign, round_f16, type = self.recipe[1:]
        cdef const float[:, ::1] cos = cosines, sin = sines
        self.a = rope_args(
            x.rows, n_head, x.cols // <int64_t>n_head, cos.shape[1], x.floats(),
            ints(positions, x.rows), &cos[0, 0], &sin[0, 0], sign, round_f16, y.data, type)
        self.args = &self.a
        return table.rope

    def gradient(self, grads):
        _, positions, tables, n_head, sign, _, type = self.recipe
        dy = grads[self.outputs[0]]
        dx = grads.graph.add(Rope, dy, positions, tables, n_head, -sign, False, type)[0]
        grads.add(self.inputs[0], dx)


def rope(
    Graph graph, Tensor x, positions, tables, int64_t n_head, bint round_f16=False, int type=F32
) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of neighbouring pairs.

    Parameters
    ----------
    positions : int32 array, one a row of x, read at each run
    tables : (cos, sin), float32 arrays of shape (n_positions, n_rot)
        Values doubled for pairs, sines signed.
    round_f16 : round the result to half precision, as an f16 cache of keys asks of queries
    type : int
        Of the result, and of the gradient of x: F32 or BF16.
    """
    return graph.add(Rope, x, positions, tables, n_head, 1, round_f16, type)[0]


cdef class SiluMul(Node):
    """y = silu(g) u"""

    cdef silu_mul_args a

    def __init__(self, Tensor g, Tensor u, int type):
        require(g.rows == u.rows and g.cols == u.cols, f"gate of {g.cols} columns meets {u.cols}")
        require_numbers(g)
        require_numbers(u)
        require(g.type == u.type, f"{g.name} and {u.name} are of two types")
        require(type == BF16 or g.type == F32, "what is gated in BF16 stays so")
        self.inputs = (g, u)
        self.outputs = (result("silu_mul", g.rows, g.cols, type),)
        self.aliases = {0: 0} if type == g.type else {}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor g = self.inputs[0], u = self.inputs[1], y = self.outputs[0]
        self.a = silu_mul_args(g.rows * g.cols, g.data, u.data, g.type, y.data, y.type)
        self.args = &self.a
        return table.silu_mul

    def gradient(self, grads):
        g, u = self.inputs
        dg, du = grads.graph.add(SiluMulBack, g, u, grads[self.outputs[0]])
        grads.add(self.inputs[0], dg)
        grads.add(self.inputs[1], du)


cdef class SiluMulBack(Node):
    cdef silu_mul_back_args a

    def __init__(self, Tensor g, Tensor u, Tensor dy):
        require_numbers(g)
        require_numbers(u)
        self.inputs = (g, u, dy)
        names = ("silu.dg", "silu.du")
        self.outputs = tuple([result(name, g.rows, g.cols, g.type) for name in names])
        self.aliases = {0: 0, 1: 1}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor g = self.inputs[0], u = self.inputs[1], dy = self.inputs[2]
        cdef Tensor dg = self.outputs[0], du = self.outputs[1]
        self.a = silu_mul_back_args(
            g.rows * g.cols, g.data, u.data, g.type, dy.floats(), dg.data, du.data)
        self.args = &self.a
        return table.silu_mul_back


def silu_mul(Graph graph, Tensor g, Tensor u, int type=F32) -> Tensor:
    """silu(g) u, the gate of the feed-forward part (arXiv:2002.05202).

    Parameters
    ----------
    g, u : Tensor of shape (n_tokens, n_between)
        Both F32, or both BF16; their gradients are of the same type.
    type : int
        Of the result: F32, or BF16, as it must be where they are.
    """
    return graph.add(SiluMul, g, u, type)[0]


cdef class Add(Node):
    """y = a + b"""

    cdef add_args a

    def __init__(self, Tensor a, Tensor b):
        fits = a.rows == b.rows and a.cols == b.cols
        require(fits, f"sum of {a.rows} x {a.cols} and {b.rows} x {b.cols}")
        self.inputs = (a, b)
        self.outputs = (result("sum", a.rows, a.cols),)
        self.aliases = {0: 1}

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor a = self.inputs[0], b = self.inputs[1], y = self.outputs[0]
        self.a = add_args(a.rows * a.cols, a.floats(), b.floats(), y.floats())
        self.args = &self.a
        return table.add

    def gradient(self, grads):
        dy = grads[self.outputs[0]]
        for tensor in self.inputs:
            if (<Tensor>tensor).needs_grad:
                grads.add(tensor, dy)


def add(Graph graph, Tensor a, Tensor b) -> Tensor:
    """a + b"""
    return graph.add(Add, a, b)[0]


cdef class Zero(Node):
    """y = 0, to be accumulated into"""

    cdef zero_args a

    def __init__(self, str name, int64_t rows, int64_t cols):
        self.inputs = ()
        self.outputs = (result(name, rows, cols),)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor y = self.outputs[0]
        self.a = zero_args(y.rows * y.cols, y.floats())
        self.args = &self.a
        return table.zero


def zero(Graph graph, str name, int64_t rows, int64_t cols) -> Tensor:
    """A matrix of zeros that later nodes accumulate into."""
    return graph.add(Zero, name, rows, cols)[0]


cdef class CacheStore(Node):
    """Appends rows to a cache behind its n_past rows."""

    cdef cache_store_args a

    def __init__(self, Tensor x, Tensor cache, n_past):
        require(x.cols == cache.cols, f"{cache.name}: rows of {cache.cols} meet {x.cols}")
        require(has_encoder(cache.type), f"{cache.name}: rows of its type cannot be written")
        self.inputs = (x,)
        self.outputs = (cache,)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0], cache = self.outputs[0]
        cdef const int32_t *n_past = ints(self.recipe[2], 1)
        self.a = cache_store_args(x.rows, x.cols, x.floats(), cache.data, cache.type, n_past)
        self.args = &self.a
        return table.cache_store

    def work(self) -> tuple[float, float]:
        cdef Tensor x = self.inputs[0], cache = self.outputs[0]
        return 0.0, x.n_bytes() + x.rows * <double>cache.n_bytes() / cache.rows


def cache_store(Graph graph, Tensor x, Tensor cache, n_past):
    """Write x behind row n_past[0] of a stored matrix; the caller sees that they fit."""
    graph.add(CacheStore, x, cache, n_past)
