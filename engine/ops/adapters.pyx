"""Adapters: their thin products with many rows, and the gradients of both factors."""

from engine.graph cimport Graph, Node
from engine.kernels cimport (
    LORA_PARTS, kernels, lora_down_args, lora_gather_args, lora_outer_args, lora_part,
    lora_scatter_args, lora_up_args, op_fn,
)
from engine.ops.checks cimport ints, require, require_numbers, result
from engine.tensor cimport Tensor
from libc.stdint cimport int32_t, int64_t


cdef lora_part lora_part_of(Tensor u, Tensor m) except *:
    """An adapter's part of a thin product: ranks of u meet those of m."""
    require(u.cols == m.rows, f"{m.name}: rank {m.rows} meets {u.cols}")
    return lora_part(m.rows, u.floats(), m.floats())


cdef int require_parts(tuple parts) except -1:
    require(0 < len(parts) <= LORA_PARTS, f"{len(parts)} adapters: 1 to {LORA_PARTS} go together")
    return 0


cdef class LoraDown(Node):
    """u = scale x m' for each m; a single one may be added to `into`."""

    cdef lora_down_args a

    def __init__(self, Tensor x, float scale, Tensor into, *ms):
        cdef Tensor m
        require_numbers(x, dense=False)
        require_parts(ms)
        require(into is None or len(ms) == 1, "one product is accumulated at a time")
        for m in ms:
            require(x.cols == m.cols, f"{m.name}: rows of {m.cols} meet activations of {x.cols}")
        self.inputs = (x, *ms)
        results = tuple([result(m.name + ".down", x.rows, m.rows) for m in ms])
        self.outputs = results if into is None else (into,)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0], m, u
        _, scale, into, *ms = self.recipe
        self.a.n_tokens, self.a.n_cols = x.rows, x.cols
        self.a.x, self.a.x_type, self.a.x_stride = x.data, x.type, x.stride
        self.a.scale, self.a.accumulate, self.a.n_parts = scale, into is not None, len(ms)
        for i, (u, m) in enumerate(zip(self.outputs, ms)):
            require(u.rows == x.rows, f"{m.name}: {u.rows} rows cannot take its product")
            self.a.parts[i] = lora_part_of(u, m)
        self.args = &self.a
        return table.lora_down

    def gradient(self, grads):
        cdef Tensor x = self.inputs[0], m
        _, scale, _, *ms = self.recipe
        pairs = [(grads[u], m) for u, m in zip(self.outputs, ms) if u in grads]
        learning = [(du, m.grad) for du, m in pairs if m.needs_grad]
        if learning:
            grads.graph.add(LoraOuter, x, scale, *flat(learning))
        if x.needs_grad:
            into = grads.into(x)
            us = [du for du, _ in pairs]
            product = None if into is None else product_into(grads.graph, into, us)
            if product is None:
                into = grads.graph.add(LoraUp, into, scale, into is not None, *flat(pairs))[0]
            else:
                product.add_up(scale, *flat(pairs))
            grads.add(x, into)


cdef list flat(pairs):
    return [t for pair in pairs for t in pair]


cdef int require_up(Tensor base, tuple parts) except -1:
    cdef Tensor u, m
    require_parts(parts[::2])
    for u, m in zip(parts[::2], parts[1::2]):
        require(u.cols == m.rows, f"{m.name}: rank {m.rows} meets {u.cols}")
        fits = base is None or (base.rows == u.rows and base.cols == m.cols)
        require(fits, f"{m.name}: an adapter of {m.cols} columns does not fit its tensor")
    return 0


cdef lora_up_args lora_up_of(Tensor base, Tensor y, float scale, tuple parts) except *:
    cdef lora_up_args a
    a.n_tokens, a.n_cols, a.scale = y.rows, y.cols, scale
    a.base = NULL if base is None else base.floats()
    a.y, a.n_parts = y.floats(), len(parts) // 2
    for i in range(len(parts) // 2):
        a.parts[i] = lora_part_of(parts[2 * i], parts[2 * i + 1])
    return a


cdef object product_into(Graph graph, Tensor dx, us):
    """The product that wrote dx last, if it can add to it and all of `us` came before.

    Nothing has touched dx since, then. Such a node has `add_up` (see `LinearBack` in products.pyx).
    """
    for node in reversed(graph.nodes):
        if dx in node.outputs:
            return node if getattr(node, "adds_up", False) else None
        if dx in node.inputs or any([u in node.outputs for u in us]):
            return None
    return None


cdef class LoraUp(Node):
    """y = base + scale u m over pairs (u, m)

    `base` may be None for zero, and is written itself if `in_place`.
    """

    cdef lora_up_args a

    def __init__(self, Tensor base, float scale, bint in_place, *parts):
        cdef Tensor u = parts[0], m = parts[1]
        require_up(base, parts)
        self.inputs = parts if base is None else (*parts, base)
        self.outputs = (base if in_place else result(m.name + ".up", u.rows, m.cols),)
        self.aliases = {0: len(parts)} if base is not None else {}

    cdef op_fn lower(self, const kernels *table) except NULL:
        base, scale, _, *parts = self.recipe
        self.a = lora_up_of(base, self.outputs[0], scale, tuple(parts))
        self.args = &self.a
        return table.lora_up

    def gradient(self, grads):
        cdef Tensor u, m, base
        base, scale, _, *parts = self.recipe
        dy = grads[self.outputs[0]]
        for u, m in zip(parts[::2], parts[1::2]):
            if u.needs_grad:
                into = grads.into(u)
                grads.add(u, grads.graph.add(LoraDown, dy, scale, into, m)[0])
            if m.needs_grad:
                grads.graph.add(LoraOuter, dy, scale, u, m.grad)
        if base is not None and base.needs_grad:
            grads.add(base, dy)


cdef class LoraOuter(Node):
    """g += scale u' x for pairs (u, g), into parameters' gradients"""

    cdef lora_outer_args a

    def __init__(self, Tensor x, float scale, *parts):
        cdef Tensor u, g
        require_numbers(x, dense=False)
        require_parts(parts[::2])
        for u, g in zip(parts[::2], parts[1::2]):
            fits = u.rows == x.rows and g.rows == u.cols and g.cols == x.cols
            require(fits, f"{g.name}: {g.rows} x {g.cols} cannot take {u.cols} x {x.cols}")
        self.inputs = (x, *parts[::2])
        self.outputs = parts[1::2]

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0]
        self.a.n_tokens, self.a.n_cols = x.rows, x.cols
        self.a.x, self.a.x_type, self.a.x_stride = x.data, x.type, x.stride
        self.a.scale, self.a.n_parts = self.recipe[1], len(self.outputs)
        for i, (u, g) in enumerate(zip(self.inputs[1:], self.outputs)):
            self.a.parts[i] = lora_part_of(u, g)
        self.args = &self.a
        return table.lora_outer


cdef class LoraGather(Node):
    """u[t] = column ids[t] of m"""

    cdef lora_gather_args a

    def __init__(self, Tensor m, ids, int64_t n_tokens):
        self.inputs = (m,)
        self.outputs = (result(m.name + ".gather", n_tokens, m.rows),)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor m = self.inputs[0], u = self.outputs[0]
        cdef const int32_t *ids = ints(self.recipe[1], u.rows)
        self.a = lora_gather_args(u.rows, m.cols, m.rows, ids, m.floats(), u.floats())
        self.args = &self.a
        return table.lora_gather

    def work(self) -> tuple[float, float]:
        return 0.0, 2.0 * (<Tensor>self.outputs[0]).n_bytes()

    def gradient(self, grads):
        cdef Tensor m = self.inputs[0]
        grads.graph.add(LoraScatter, grads[self.outputs[0]], self.recipe[1], 1.0, m.grad)


cdef class LoraScatter(Node):
    """column ids[t] of g += scale du[t], into a parameter's gradient"""

    cdef lora_scatter_args a

    def __init__(self, Tensor du, ids, float scale, Tensor g):
        require(g.rows == du.cols, f"{g.name}: rank {g.rows} meets {du.cols}")
        self.inputs = (du,)
        self.outputs = (g,)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor du = self.inputs[0], g = self.outputs[0]
        cdef const int32_t *ids = ints(self.recipe[1], du.rows)
        self.a = lora_scatter_args(
            du.rows, g.cols, g.rows, ids, du.floats(), self.recipe[2], g.floats())
        self.args = &self.a
        return table.lora_scatter

    def work(self) -> tuple[float, float]:
        return 0.0, 3.0 * (<Tensor>self.inputs[0]).n_bytes()


def lora_down(Graph graph, Tensor x, Tensor m) -> Tensor:
    """x m' of activations (n_tokens, n_in) and A of shape (rank, n_in): (n_tokens, rank)."""
    return graph.add(LoraDown, x, 1.0, None, m)[0]


def lora_up(Graph graph, Tensor base, Tensor u, Tensor m, float scale) -> Tensor:
    """base + scale u m, for norms (u = B, m = A) and the embedding (u = B's columns, m = A)."""
    return graph.add(LoraUp, base, scale, False, u, m)[0]


def lora_gather(Graph graph, Tensor m, ids, int64_t n_tokens) -> Tensor:
    """Columns of m by token, as rows: (n_tokens, rank)."""
    return graph.add(LoraGather, m, ids, n_tokens)[0]
