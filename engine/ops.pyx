"""Every op: shape rule, lowering to its kernel, gradient, side by side.

The formulas are in simd/kernels.h. The functions at the end of each section are the way to make
nodes: they take the graph and tensors and return the tensors written. `gradient` receives a
`Gradients` (autograd.pyx): ``grads[t]`` is the gradient of an output, ``grads.add(t, g)`` adds one
to an input's, and ``grads.into(t)`` gives the tensor into which an accumulating kernel may write,
or None.
"""

import numpy as np

from engine.errors import ShapeError

from engine.graph cimport Graph, Node
from engine.kernels cimport (
    ATTENTION_MAX_DIM, ATTENTION_MAX_GROUP, GEMV_TOKENS, LORA_PARTS, MAX_ROW, PROBE_FMA_FLOPS,
    PROBE_TILES_FLOPS, add_args, attention_args,
    attention_back_args, attention_part_bytes, back_packed_bytes, block_elements,
    cache_store_args, cross_entropy_args, embed_args, feed_forward_args, has_encoder,
    has_quant_dot, kernels, linear_args, linear_back_args, linear_packed_bytes, lora_down_args,
    lora_gather_args, lora_outer_args, lora_part, lora_scatter_args, lora_up_args, op_fn, pack_args,
    probe_args, rms_norm_args, rms_norm_back_args, rope_args, silu_mul_args, silu_mul_back_args,
    zero_args,
)
from engine.tensor cimport Tensor
from libc.stdint cimport int32_t, int64_t

# Up to so many tokens together have the bits that each has alone.
DOT_TOKENS = GEMV_TOKENS
# A product of so few tokens makes x A' of adapters up to this rank itself.
DOT_RANK = 64

cdef enum:
    F32 = 0
    F16 = 1
    BF16 = 30


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


cdef int require_pairs(Tensor t, const kernels *table) except -1:
    """Products take BF16 activations in pairs, and only as such."""
    fits = t.type == F32 or (table.pairs and t.cols % 2 == 0)
    require(fits, f"{t.name}: without bf16 pairs a product takes F32")
    return 0


cdef int require_numbers(Tensor t, bint dense=True) except -1:
    """Activations and their gradients are F32, or BF16 where products would round them."""
    require(t.type in (F32, BF16), f"{t.name}: activations must be F32 or BF16")
    require(not dense or t.stride == t.cols, f"{t.name}: there must be no room between its rows")
    return 0


cdef bint in_pairs(Tensor w, bint partner, bint pairs):
    """Whether products with w go in bf16 pairs.

    Never with F32 weights; in inference, not with any that bf16 would change: SmolLM2 in Q4_1 on
    matrix tiles had a perplexity 0.3 % away from the original's.
    """
    return pairs and w.type != F32 and (w.type == BF16 or not partner)


cdef str weight_label(str what, Tensor w):
    """`what` and the kind of the weight: the last part of its name."""
    return f"{what} {w.name.rpartition(".")[2]}"


cdef double pairs_seen(int64_t n_seq, int64_t n_query, n_past):
    """Pairs of query and visible key."""
    before = 0 if n_past is None else int(n_past[0])
    return n_seq * (n_query * before + n_query * (n_query + 1) / 2.0)


def multiplies_pairs(Graph graph, Tensor w) -> bool:
    """Whether the graph multiplies with a weight in bf16 pairs, where the variant has them."""
    return in_pairs(w, graph.partner, graph.pairs)


def kept_type(Graph graph, int64_t n_tokens, weights) -> int:
    """Type of what is kept for the way back and meets nothing but these weights: F32 or BF16.

    BF16 where the graph keeps it so (`Graph.rounded`) and every product rounds it anyway.
    """
    cdef Tensor w
    if not graph.rounded or n_tokens <= GEMV_TOKENS:
        return F32
    rounded = all([multiplied_in_pairs(graph, w) and w.rows % 2 == 0 for w in weights])
    return BF16 if rounded else F32


# ---------------------------------------------------------------- embedding

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


# ---------------------------------------------------------------- products with frozen weights

cdef class Pack(Node):
    """x in panels of tokens, as products of many tokens with weights of a type take it"""

    cdef pack_args a

    def __init__(self, Tensor x, int type, bint partner, bint pairs):
        require_numbers(x)
        require(x.type == F32 or pairs, f"{x.name}: its product does not round to BF16")
        require(x.cols <= MAX_ROW, f"{x.name}: rows of {x.cols} are longer than {MAX_ROW}")
        self.inputs = (x,)
        n_bytes = linear_packed_bytes(x.rows, x.cols, pairs)
        self.outputs = (result(x.name + ".packed", 1, n_bytes // sizeof(float)),)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x = self.inputs[0], packed = self.outputs[0]
        _, type, partner, pairs = self.recipe
        require_pairs(x, table)
        self.a = pack_args(x.rows, x.cols, x.data, type, partner, pairs, packed.data, x.type)
        self.args = &self.a
        return table.pack


cdef bint multiplied_in_pairs(Graph graph, Tensor w):
    """`in_pairs`, where the variant can."""
    return graph.table.pairs and w.cols % 2 == 0 and in_pairs(w, graph.partner, graph.pairs)


cdef bint in_floats(Graph graph, Tensor w):
    """Whether nothing is rounded when w is multiplied."""
    return not multiplied_in_pairs(graph, w) and not (graph.partner and has_quant_dot(w.type))


cdef Tensor packed_for(Graph graph, Tensor x, Tensor w):
    """x as its product with w takes it, made once for all weights that want the same."""
    if x.rows <= GEMV_TOKENS:
        return None
    pairs = multiplied_in_pairs(graph, w)
    form = F32 if pairs or in_floats(graph, w) else w.type
    key = (x, form, pairs)
    if key not in graph.packed:
        graph.packed[key] = graph.add(Pack, x, form, graph.partner, pairs)[0]
    return graph.packed[key]


cdef linear_args product(
    int64_t n_tokens, const void *x, Tensor w, void *y, void *packed, bint partner, bint pairs
):
    """What the product of x and w is told, without adapter and base; x and y are F32."""
    return linear_args(
        n_tokens, w.cols, w.rows, x, w.data, w.type, y, 0, NULL, NULL, 0, partner, pairs, packed,
        NULL, NULL, F32, F32, F32)


cdef int adapt(linear_args *a, adapter) except -1:
    """Let the product make both products of an adapter (A, B, scale), if there is one."""
    cdef Tensor down, up
    if adapter is not None:
        down, up, a.scale = adapter
        require(down.type == up.type and down.type in (F32, F16), f"{down.name}: of another type")
        a.rank, a.a, a.b = down.rows, <float *>down.data, <float *>up.data
        a.factor_type = down.type
    return 0


cdef bint fits_adapter(Tensor w, Tensor down, Tensor up):
    return down.cols == w.cols and up.cols == w.rows and up.rows == down.rows


cdef void *place_of(Tensor packed):
    return NULL if packed is None else packed.data


cdef class Linear(Node):
    """y = x W' (+ scale u b) (+ base): W stored and frozen, (u, b) the end of an adapter."""

    cdef linear_args a

    def __init__(
        self, Tensor x, Tensor w, Tensor packed, Tensor a, Tensor u, Tensor b, Tensor base,
        float scale, bint partner, bint pairs, int type,
    ):
        require(x.cols == w.cols, f"{w.name}: rows of {w.cols} meet activations of {x.cols}")
        require_numbers(x)
        wide = packed is not None or x.type == type == F32
        require(wide, f"{w.name}: products of {x.rows} tokens are F32")
        floats = pairs or not (partner and has_quant_dot(w.type))
        require(floats or type == F32, f"{w.name}: products in bytes are F32")
        require(w.cols <= MAX_ROW, f"{w.name}: rows of {w.cols} are longer than {MAX_ROW}")
        if u is not None:
            fits = u.rows == x.rows and b.cols == w.rows and b.rows == u.cols
            require(fits, f"{w.name}: adapter of {b.rows} x {b.cols} does not fit {w.rows} outputs")
        if a is not None:
            require(fits_adapter(w, a, b), f"{w.name}: its adapter does not fit")
        if base is not None:
            fits = base.rows == x.rows and base.cols == w.rows and base.type == F32
            require(fits, f"{w.name}: {base.rows} x {base.cols} cannot be added to the product")
        self.inputs = tuple([t for t in (x, w, packed, a, u, b, base) if t is not None])
        self.outputs = (result(w.name + ".out", x.rows, w.rows, type),)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x, w, packed, a, u, b, base, y = self.outputs[0]
        x, w, packed, a, u, b, base, scale, partner, pairs, _ = self.recipe
        self.a = product(x.rows, x.data, w, y.data, place_of(packed), partner, pairs)
        self.a.x_type, self.a.y_type = x.type, y.type
        if a is not None:
            adapt(&self.a, (a, b, scale))
        if u is not None:
            self.a.rank, self.a.scale = u.cols, scale
            self.a.u, self.a.b = u.floats(), b.floats()
        if base is not None:
            self.a.base = base.floats()
        self.args = &self.a
        return table.linear

    @property
    def label(self) -> str:
        return weight_label("linear", self.inputs[1])

    def work(self) -> tuple[float, float]:
        cdef Tensor w = self.inputs[1]
        _, n_bytes = super().work()
        return 2.0 * (<Tensor>self.inputs[0]).rows * w.rows * w.cols, n_bytes

    def gradient(self, grads):
        cdef Tensor x, w, u, b, base
        x, w, _, _, u, b, base, scale, _, _, _ = self.recipe
        dy = grads[self.outputs[0]]
        if u is not None:
            if u.needs_grad:
                into = grads.into(u)
                grads.add(u, grads.graph.add(LoraDown, dy, scale, into, b)[0])
            if b.needs_grad:
                grads.graph.add(LoraOuter, dy, scale, u, b.grad)
        if x.needs_grad:
            into = grads.into(x)
            grads.add(x, grads.graph.add(LinearBack, dy, w, into, grads.graph.pairs)[0])
        if base is not None and base.needs_grad:
            grads.add(base, dy)


cdef class LinearBack(Node):
    """dx (+)= dy W, and what adapters add to it"""

    cdef linear_back_args a
    cdef tuple up  # scale, u, m, u, m ...

    def add_up(self, float scale, *parts):
        """Let dx grow by scale u m for pairs (u, m) besides; u is made by earlier nodes."""
        require(self.up is None, "adapters add to a product once")
        require_up(self.outputs[0], parts)
        self.up = (scale, *parts)
        self.inputs += parts

    def __init__(self, Tensor dy, Tensor w, Tensor into, bint pairs=False):
        require(dy.cols == w.rows, f"{w.name}: {w.rows} outputs meet gradients of {dy.cols}")
        require_numbers(dy, dense=False)
        rounds = dy.cols % 2 == 0 and in_pairs(w, False, pairs)
        require(dy.type == F32 or rounds, f"{dy.name}: its product does not round to BF16")
        self.inputs = (dy, w)
        self.outputs = (into if into is not None else result(w.name + ".dx", dy.rows, w.cols),)

    cdef bint pairs(self):
        return len(self.recipe) > 3 and in_pairs(self.inputs[1], False, self.recipe[3])

    cdef int64_t shared_bytes(self) except -1:
        cdef Tensor dy = self.inputs[0]
        return back_packed_bytes(dy.rows, dy.cols) if self.pairs() and dy.type == F32 else 0

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor dy = self.inputs[0], w = self.inputs[1], dx = self.outputs[0]
        scale, *parts = self.up or (0.0,)
        require_pairs(dy, table)
        self.a = linear_back_args(
            dy.rows, w.cols, w.rows, dy.data, w.data, w.type, dx.floats(),
            self.recipe[2] is not None, self.pairs(), self.shared, dy.type, dy.stride,
            lora_up_of(dx, dx, scale, tuple(parts)))
        self.args = &self.a
        return table.linear_back

    @property
    def label(self) -> str:
        return weight_label("linear back", self.inputs[1])

    def work(self) -> tuple[float, float]:
        cdef Tensor w = self.inputs[1]
        _, n_bytes = super().work()
        return 2.0 * (<Tensor>self.inputs[0]).rows * w.rows * w.cols, n_bytes


def linear(
    Graph graph, Tensor x, Tensor w, adapter=None, Tensor base=None, int type=F32, Tensor u=None
) -> Tensor:
    """x W', and scale (x A') B beside it where `adapter` is (A, B, scale); `base` is added.

    Parameters
    ----------
    x : Tensor of shape (n_tokens, n_in)
        F32, or BF16 where the product is made in pairs of more than DOT_TOKENS tokens.
    w : Tensor of shape (n_out, n_in), any stored type
    adapter : tuple (A of shape (rank, n_in), B of shape (rank, n_out), float), optional
    base : Tensor of shape (n_tokens, n_out), optional
    type : int
        Of the result: F32, or BF16 with more than DOT_TOKENS tokens.
    u : Tensor of shape (n_tokens, rank), optional
        x A' of the adapter, where it has been made already (see `linears`).

    Returns
    -------
    Tensor of shape (n_tokens, n_out)
    """
    a = b = None
    scale = 0.0
    if adapter is not None:
        a, b, scale = adapter
        if not meets_within(x, adapter):
            a, u = None, lora_down(graph, x, a) if u is None else u
    packed, pairs = packed_for(graph, x, w), multiplied_in_pairs(graph, w)
    return graph.add(Linear, x, w, packed, a, u, b, base, scale, graph.partner, pairs, type)[0]


def linears(Graph graph, Tensor x, weights, adapters, types) -> list[Tensor]:
    """Products of the same x: x A' of all their adapters is made, and differentiated, in one step.

    Parameters
    ----------
    x : Tensor of shape (n_tokens, n_in)
    weights : sequence of Tensor
    adapters : sequence of tuple or None
        One a weight, as in `linear`.
    types : sequence of int
        Of the results.

    Returns
    -------
    list of Tensor
    """
    beside = [i for i, a in enumerate(adapters) if a is not None and not meets_within(x, a)]
    us = {}
    for first in range(0, len(beside), LORA_PARTS):
        some = beside[first : first + LORA_PARTS]
        us.update(zip(some, graph.add(LoraDown, x, 1.0, None, *[adapters[i][0] for i in some])))
    rows = enumerate(zip(weights, adapters, types))
    return [linear(graph, x, w, a, None, type, us.get(i)) for i, (w, a, type) in rows]


def meets_within(Tensor x, adapter) -> bool:
    """Whether the product itself makes x A' of an adapter: few tokens, nothing to learn.

    Each worker then makes all of it, for waiting takes longer, so the rank is bounded, too.
    """
    cdef Tensor a = adapter[0], b = adapter[1]
    learns = x.needs_grad or a.needs_grad or b.needs_grad
    return x.rows <= GEMV_TOKENS and a.rows <= DOT_RANK and not learns


cdef class FeedForward(Node):
    """y = base + (silu(x G') (x U')) D'"""

    cdef feed_forward_args a

    def __init__(
        self, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor packed, Tensor base,
        bint partner, bint pairs, bint down_pairs, bint panels, tuple adapters,
    ):
        require_numbers(x)
        require(packed is not None or x.type == F32, f"{x.name}: few activations must be F32")
        fits = gate.cols == up.cols == x.cols and gate.rows == up.rows == down.cols
        require(fits, f"{gate.name}: its shape is not that of {up.name} and {down.name}")
        fits = base.rows == x.rows and base.cols == down.rows
        require(fits, f"{down.name}: {base.rows} x {base.cols} cannot be added to the product")
        tensors = [t for t in (x, gate, up, down, packed, base) if t is not None]
        for w, adapter in zip((gate, up, down), adapters):
            if adapter is not None:
                require(meets_within(x, adapter), f"{w.name}: its adapter wants a step of its own")
                fits = fits_adapter(w, adapter[0], adapter[1])
                require(fits, f"{w.name}: its adapter does not fit")
                tensors += adapter[:2]
        self.inputs = tuple(tensors)
        self.outputs = (result(down.name + ".out", x.rows, down.rows),)

    cdef int64_t rows_bytes(self):
        """Of gate and up as rows, where they are not panels."""
        cdef Tensor x = self.inputs[0], gate = self.inputs[1]
        return 0 if self.recipe[9] else 2 * x.rows * gate.rows * <int64_t>sizeof(float)

    cdef int64_t shared_bytes(self) except -1:
        cdef Tensor x = self.inputs[0], gate = self.inputs[1]
        if x.rows <= GEMV_TOKENS:
            return self.rows_bytes()
        return self.rows_bytes() + linear_packed_bytes(x.rows, gate.rows, self.recipe[8])

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor x, gate, up, down, packed, base, y = self.outputs[0]
        x, gate, up, down, packed, base, partner, pairs, down_pairs, panels, adapters = self.recipe
        cdef float *g = NULL if panels else <float *>self.shared
        cdef float *u = NULL if panels else g + x.rows * gate.rows
        cdef void *between = <char *>self.shared + self.rows_bytes()
        cdef void *place = place_of(packed)
        self.a.panels = panels
        self.a.gate = product(x.rows, x.data, gate, g, place, partner, pairs)
        self.a.up = product(x.rows, x.data, up, u, place, partner, pairs)
        self.a.gate.x_type = self.a.up.x_type = x.type
        self.a.down = product(x.rows, g, down, y.floats(), between, partner, down_pairs)
        self.a.down.base = base.floats()
        adapt(&self.a.gate, adapters[0])
        adapt(&self.a.up, adapters[1])
        adapt(&self.a.down, adapters[2])
        self.args = &self.a
        return table.feed_forward

    @property
    def label(self) -> str:
        return "feed forward"

    def work(self) -> tuple[float, float]:
        cdef Tensor x = self.inputs[0], w
        _, n_bytes = super().work()
        return sum([2.0 * x.rows * w.rows * w.cols for w in self.inputs[1:4]]), n_bytes


def feed_forward(
    Graph graph, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor base,
    tuple adapters=(None, None, None),
):
    """base + (silu(x G') (x U')) D' in one step: what lies between the products stays packed.

    It has no gradient. The values are those of the single steps, bit by bit.

    Parameters
    ----------
    x : Tensor of shape (n_tokens, n_in)
    gate, up : Tensor of shape (n_between, n_in), of one stored type
    down : Tensor of shape (n_out, n_between)
    base : Tensor of shape (n_tokens, n_out)
    adapters : tuple of three (A, B, scale) or None
        Of gate, up and down; only where `meets_within` allows it.

    Returns
    -------
    Tensor of shape (n_tokens, n_out)
    """
    require(gate.type == up.type, f"{gate.name} and {up.name} are of two types")
    packed = packed_for(graph, x, gate)
    pairs, down_pairs = multiplied_in_pairs(graph, gate), multiplied_in_pairs(graph, down)
    floats = in_floats(graph, gate) and in_floats(graph, down)
    panels = packed is not None and gate.rows % 2 == 0 and (floats or (pairs and down_pairs))
    return graph.add(
        FeedForward, x, gate, up, down, packed, base, graph.partner, pairs, down_pairs, panels,
        adapters)[0]


# ---------------------------------------------------------------- adapters

cdef lora_part lora_part_of(Tensor u, Tensor m) except *:
    """An adapter's part of a thin product: ranks of u meet those of m."""
    require(u.cols == m.rows, f"{m.name}: rank {m.rows} meets {u.cols}")
    return lora_part(m.rows, u.floats(), m.floats())


cdef int require_parts(tuple parts) except -1:
    require(0 < len(parts) <= LORA_PARTS, f"{len(parts)} adapters: 1 to {LORA_PARTS} go together")
    return 0


cdef class LoraDown(Node):
    """u (+)= scale x m' for each m; accumulated into a tensor if there is one m."""

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


cdef LinearBack product_into(Graph graph, Tensor dx, us):
    """The product that wrote dx last, if nothing has touched it since and all of `us` came before."""
    for node in reversed(graph.nodes):
        if dx in node.outputs or dx in node.inputs:
            alone = isinstance(node, LinearBack) and (<LinearBack>node).up is None
            return node if alone else None
        if any([u in node.outputs for u in us]):
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


# ---------------------------------------------------------------- norm, rotation, gate, sum

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


# ---------------------------------------------------------------- attention

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


cdef class Attention(Node):
    """Causal attention; rows are n_seq sequences of equal length."""

    cdef attention_args a

    def __init__(
        self, Tensor q, Tensor k, Tensor v, int64_t n_seq, int64_t n_head, int64_t n_head_kv,
        float scale, n_past, first_key, bint pairs, int type
    ):
        require(n_seq > 0 and n_head > 0 and n_head_kv > 0, "there must be sequences and heads")
        head_dim = q.cols // n_head
        fits = head_dim * n_head == q.cols and head_dim * n_head_kv == k.cols == v.cols
        require(fits, "heads do not fit the columns")
        require(n_head % n_head_kv == 0 and q.rows % n_seq == 0, "heads or sequences do not divide")
        group = n_head // n_head_kv
        require(group <= ATTENTION_MAX_GROUP, f"{group} query heads share a key head")
        require(head_dim <= ATTENTION_MAX_DIM, f"head size {head_dim} is above {ATTENTION_MAX_DIM}")
        require(n_past is not None or k.rows == q.rows, "keys and queries differ in number")
        require_numbers(q)
        for cache in (k, v):
            block = block_elements((<Tensor>cache).type)
            fits = block > 0 and head_dim % block == 0
            require(fits, f"{cache.name}: heads of {head_dim} are no whole blocks of its type")
        self.inputs = (q, k, v)
        out = result("attention", q.rows, q.cols, type)
        self.outputs = (out, result("attention.lse", q.rows, n_head))

    cdef int64_t shared_bytes(self) except -1:
        cdef Tensor q = self.inputs[0], k = self.inputs[1]
        n_seq, n_head = self.recipe[3], self.recipe[4]
        return attention_part_bytes(
            n_seq, q.rows // <int64_t>n_seq, n_head, q.cols // <int64_t>n_head,
            k.rows // <int64_t>n_seq)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor q = self.inputs[0], k = self.inputs[1], v = self.inputs[2]
        cdef Tensor out = self.outputs[0], lse = self.outputs[1]
        n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, _ = self.recipe[3:]
        self.a = attention_args(
            n_seq, q.rows // <int64_t>n_seq, n_head, n_head_kv, q.cols // <int64_t>n_head,
            q.data, k.data, v.data, q.type, k.type, v.type, k.rows // <int64_t>n_seq, NULL, NULL,
            scale, out.data, out.type, lse.floats(), <float *>self.shared, pairs)
        if n_past is not None:
            self.a.n_past = ints(n_past, 1)
        if first_key is not None:
            self.a.first_key = ints(first_key, q.rows)
        self.args = &self.a
        return table.attention

    @property
    def varies(self) -> bool:
        return self.recipe[7] is not None

    def work(self) -> tuple[float, float]:
        cdef Tensor q = self.inputs[0], k = self.inputs[1]
        n_seq, n_past = self.recipe[3], self.recipe[7]
        seen = pairs_seen(n_seq, q.rows // n_seq, n_past)
        n_key = q.rows // n_seq + (0 if n_past is None else int(n_past[0]))
        cached = 2.0 * k.n_bytes() // k.rows * n_seq * n_key
        return 4.0 * q.cols * seen, cached + 2.0 * q.n_bytes()

    def gradient(self, grads):
        q, k, v, n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, _ = self.recipe
        require(n_past is None, "attention over a cache has no gradient")
        dout = grads[self.outputs[0]]
        dq, dk, dv = grads.graph.add(
            AttentionBack, q, k, v, *self.outputs, dout, n_seq, n_head, n_head_kv, scale,
            first_key, pairs)[:3]
        grads.add(q, dq)
        grads.add(k, dk)
        grads.add(v, dv)


cdef class AttentionBack(Node):
    cdef attention_back_args a

    def __init__(self, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, *sizes):
        for tensor in (q, k, v, out):
            require_numbers(tensor)
        self.inputs = (q, k, v, out, lse, dout)
        shapes = [("dq", q), ("dk", k), ("dv", v), ("delta", lse)]
        self.outputs = tuple([result("attention." + name, t.rows, t.cols) for name, t in shapes])

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor q, k, v, out, lse, dout, dq, dk, dv, delta
        q, k, v, out, lse, dout = self.inputs
        dq, dk, dv, delta = self.outputs
        n_seq, n_head, n_head_kv, scale, first_key, pairs = self.recipe[6:]
        self.a = attention_back_args(
            n_seq, q.rows // <int64_t>n_seq, n_head, n_head_kv, q.cols // <int64_t>n_head,
            q.data, k.data, v.data, out.data, q.type, k.type, v.type, out.type, lse.floats(),
            dout.floats(), NULL, scale, delta.floats(), dq.floats(), dk.floats(), dv.floats(), pairs)
        if first_key is not None:
            self.a.first_key = ints(first_key, q.rows)
        self.args = &self.a
        return table.attention_back

    def work(self) -> tuple[float, float]:
        cdef Tensor q = self.inputs[0]
        n_seq = self.recipe[6]
        return 10.0 * q.cols * pairs_seen(n_seq, q.rows // n_seq, None), super().work()[1]


def attention(
    Graph graph, Tensor q, Tensor k, Tensor v, int64_t n_seq, int64_t n_head, int64_t n_head_kv,
    float scale, n_past=None, first_key=None, bint pairs=False, int type=F32
) -> Tensor:
    """Causal attention with grouped heads.

    Parameters
    ----------
    q : Tensor of shape (n_seq * n_query, n_head * head_dim)
        F32 or BF16.
    k, v : Tensor of shape (n_seq * n_key, n_head_kv * head_dim)
        Of any stored type whose blocks divide a head, each its own.
    n_past : int32 array of one element, optional
        Position of the first query, read at each run. With it k and v are caches; without it there
        are as many keys as queries, all F32 or BF16, and the op has a gradient.
    first_key : int32 array, one a row of q, optional
        The first key that each query sees, counted within its sequence; read at each run.
    pairs : bool
        Multiply in bf16 where the variant has a pair product (see `multiplies_pairs`).
    type : int
        Of the result: F32 or BF16.
    """
    return graph.add(
        Attention, q, k, v, n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, type)[0]


# ---------------------------------------------------------------- loss

cdef class CrossEntropy(Node):
    """Loss of each row and, in place of the logits, their gradient."""

    cdef cross_entropy_args a

    def __init__(self, Tensor logits, targets, weight, int type):
        self.inputs = (logits,)
        stride = 2 * logits.cols if type == BF16 else logits.cols
        dlogits = Tensor("dlogits", logits.rows, logits.cols, type, stride)
        self.outputs = (result("loss", logits.rows, 1), dlogits)
        self.aliases = {1: 0}
        self.must_alias = True

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor logits = self.inputs[0], loss = self.outputs[0]
        cdef const float[::1] weight = self.recipe[2]
        self.a = cross_entropy_args(
            logits.rows, logits.cols, logits.floats(), ints(self.recipe[1], logits.rows),
            &weight[0], loss.floats(), self.recipe[3])
        self.args = &self.a
        return table.cross_entropy


def cross_entropy(Graph graph, Tensor logits, targets, weight, int type=F32):
    """Loss of each row and the gradient of weight times their sum with respect to the logits.

    The gradient takes the logits' place, so it comes with the value and no softmax is kept.

    Parameters
    ----------
    targets : int32 array of n_tokens, read at each run; -1 leaves a row out
    weight : float32 array of one element, read at each run
    type : int
        Of the gradient: F32, or BF16 with room between its rows.

    Returns
    -------
    loss : Tensor of shape (n_tokens, 1)
    dlogits : Tensor of the logits' shape
    """
    return graph.add(CrossEntropy, logits, targets, weight, type)


# ---------------------------------------------------------------- the machine's peaks

cdef class Probe(Node):
    cdef probe_args a

    def __init__(self, Tensor data, int64_t steps, unit, sink):
        self.inputs = () if data is None else (data,)
        self.outputs = ()

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor data
        cdef float[::1] sink = self.recipe[3]
        self.a = probe_args(self.recipe[1], NULL, &sink[0])
        self.args = &self.a
        if self.inputs:
            data = self.inputs[0]
            self.a.data, self.a.n = data.floats(), data.rows * data.cols
            return table.probe_read
        if self.recipe[2] == "tiles":
            return table.probe_tiles
        return table.probe_pairs if self.recipe[2] == "pairs" else table.probe_fma


def probe(Graph graph, int64_t steps=0, Tensor data=None, unit="fma") -> int:
    """Arithmetic of `steps` steps without memory, or reading `data`: for measuring peaks.

    Parameters
    ----------
    graph : Graph
    steps : int
    data : Tensor, optional
        Read instead, split among the threads.
    unit : str
        What computes: "fma" (float32 multiply-adds), "pairs" (products of bf16 pairs), "tiles".

    Returns
    -------
    int
        FLOPs of each thread; 0 where the variant has no such unit, and of reading.
    """
    cdef const kernels *table = graph.table
    flops = {"fma": PROBE_FMA_FLOPS * table.lanes,
             "pairs": 2 * PROBE_FMA_FLOPS * table.lanes * (table.pairs >= 1),
             "tiles": PROBE_TILES_FLOPS * (table.pairs == 2)}
    require(unit in flops, f"no unit {unit!r} computes; there are {', '.join(flops)}")
    graph.add(Probe, data, steps, unit, np.zeros(graph.n_threads, np.float32))
    return steps * flops[unit]
