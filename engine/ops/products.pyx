"""Products with frozen weights, of many tokens and of a few, and the way back."""

from engine.ops.adapters import LoraDown, LoraOuter, lora_down

from engine.graph cimport Graph, Node
from engine.kernels cimport (
    GEMV_TOKENS, LORA_PARTS, MAX_ROW, back_packed_bytes, feed_forward_args, has_quant_dot, kernels,
    linear_args, linear_back_args, linear_packed_bytes, op_fn, pack_args,
)
from engine.ops.adapters cimport lora_up_of, require_up
from engine.ops.checks cimport BF16, F16, F32, require, require_numbers, require_pairs, result
from engine.tensor cimport Tensor
from libc.stdint cimport int64_t

# Up to so many tokens together have the bits that each has alone.
DOT_TOKENS = GEMV_TOKENS
# A product of so few tokens makes x A' of adapters up to this rank itself.
DOT_RANK = 64


cdef bint in_pairs(Tensor w, bint partner, bint pairs):
    """Whether products with w go in bf16 pairs.

    Never with F32 weights; in inference, not with any that bf16 would change: SmolLM2 in Q4_1 on
    matrix tiles had a perplexity 0.3 % away from the original's.
    """
    return pairs and w.type != F32 and (w.type == BF16 or not partner)


def multiplies_pairs(Graph graph, Tensor w) -> bool:
    """Whether the graph multiplies with a weight in bf16 pairs, where the variant has them."""
    return in_pairs(w, graph.partner, graph.pairs)


def kept_type(Graph graph, int64_t n_tokens, weights) -> int:
    """Type of what is kept for the way back and meets these weights, or comes from them.

    BF16 where the graph keeps it so (`Graph.rounded`) and all their products are made in pairs,
    F32 else.
    """
    cdef Tensor w
    if not graph.rounded or n_tokens <= GEMV_TOKENS:
        return F32
    rounded = all([multiplied_in_pairs(graph, w) and w.rows % 2 == 0 for w in weights])
    return BF16 if rounded else F32


cdef str weight_label(str what, Tensor w):
    """`what` and the kind of the weight: the last part of its name."""
    return f"{what} {w.name.rpartition(".")[2]}"


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


cdef double product_flops(Tensor rows, Tensor w):
    """Of rows, of activations or gradients, that meet all of w."""
    return 2.0 * rows.rows * w.rows * w.cols


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
        return product_flops(self.inputs[0], self.inputs[1]), super().work()[1]

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

    def __init__(self, Tensor dy, Tensor w, Tensor into, bint pairs=False):
        require(dy.cols == w.rows, f"{w.name}: {w.rows} outputs meet gradients of {dy.cols}")
        require_numbers(dy, dense=dy.type == F32)
        rounds = dy.cols % 2 == 0 and in_pairs(w, False, pairs)
        require(dy.type == F32 or rounds, f"{dy.name}: its product does not round to BF16")
        self.inputs = (dy, w)
        self.outputs = (into if into is not None else result(w.name + ".dx", dy.rows, w.cols),)

    @property
    def adds_up(self) -> bool:
        """Whether `add_up` may be called, once."""
        return self.up is None

    def add_up(self, float scale, *parts):
        """Let dx grow by scale u m for pairs (u, m) besides; u is made by earlier nodes."""
        require(self.adds_up, "adapters add to a product once")
        require_up(self.outputs[0], parts)
        self.up = (scale, *parts)
        self.inputs += parts

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
        return product_flops(self.inputs[0], self.inputs[1]), super().work()[1]


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
        return sum([product_flops(x, w) for w in self.inputs[1:4]]), n_bytes


def feed_forward(
    Graph graph, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor base,
    tuple adapters=(None, None, None),
):
    """base + (silu(x G') (x U')) D' in one step: what lies between the products stays packed.

    It has no gradient. The values are those of the single steps, bit by bit, where these keep F32
    between them.

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
