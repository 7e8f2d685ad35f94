"""The llama architecture: hyperparameters, weights by name, the model as a graph.

Another architecture is a file like this one and a row in `model.ARCHITECTURES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.dtypes import F32
from engine.errors import FormatError, ShapeError
from engine.gguf import GGUFFile, TensorInfo
from engine.graph import Graph
from engine.rope import SCALINGS, Rope, RopeOptions, Tables
from engine.tensor import Tensor

ARCHITECTURE = "llama"  # general.architecture, and the prefix of its keys
MAX_LAYERS = 4096

# The adapted tensors of a layer, in the order of files and of the generator's draws.
LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_down",
    "ffn_up",
)
BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class AdapterTensors(NamedTuple):
    """An adapter's factors for one weight: A (rank, n_in), B (rank, n_out), the scale of A'B."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Sizes and constants of a model, checked against each other."""

    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_layer: int
    head_dim: int
    rms_eps: float
    rope: Rope

    @property
    def n_embd_kv(self) -> int:
        """Columns of keys and values."""
        return self.n_head_kv * self.head_dim

    @property
    def n_rot(self) -> int:
        """Rotated elements of a head."""
        return self.rope.n_rot

    @property
    def rope_freq_base(self) -> float:
        """Base of the rotation's frequencies."""
        return self.rope.freq_base

    @property
    def rope_freq_scale(self) -> float:
        """Factor on the rotation's angles: the reciprocal of the linear scaling's."""
        return self.rope.scale

    def overridden(self, rms_eps: float | None, rope: RopeOptions | None) -> Hyperparameters:
        """Give a copy in which the values that are not None replace the model's."""
        return replace(
            self,
            rms_eps=self.rms_eps if rms_eps is None else rms_eps,
            rope=self.rope if rope is None else self.rope.overridden(rope),
        )


def read_hyperparameters(file: GGUFFile, n_vocab: int) -> Hyperparameters:
    """Read and check the keys of architecture ``llama``.

    Raises
    ------
    FormatError
        Naming the key, when one is missing, out of range, or contradicts another.
    """
    arch = ARCHITECTURE

    def positive(key: str, default: int | None = None, limit: int = 2**31 - 1) -> int:
        value = file.get_int(f"{arch}.{key}", *([] if default is None else [default]))
        if not 0 < value <= limit:
            raise FormatError(
                f"{file.path}: key {arch}.{key}: {value} is out of range 1 to {limit}"
            )
        return value

    def real(key: str, *default: float) -> float:
        value = file.get_float(f"{arch}.{key}", *default)
        if not math.isfinite(value) or value < 0:
            raise FormatError(f"{file.path}: key {arch}.{key}: {value} cannot be used")
        return value

    experts = file.get_int(f"{arch}.expert_count", 0)
    if experts > 0:
        raise FormatError(
            f"{file.path}: {experts} experts: mixture-of-experts models cannot be run"
        )
    n_embd = positive("embedding_length", limit=2**20)
    n_head = positive("attention.head_count", limit=2**16)
    n_head_kv = positive("attention.head_count_kv", n_head, limit=2**16)
    head_dim = positive("attention.key_length", max(n_embd // n_head, 1))
    value_dim = positive("attention.value_length", head_dim)
    n_rot = positive("rope.dimension_count", head_dim)
    for wrong, text in (
        (n_head % n_head_kv != 0, f"{n_head} heads are not divided by {n_head_kv} key/value heads"),
        (head_dim % 2 != 0, f"head size {head_dim} is odd"),
        (value_dim != head_dim, f"keys of {head_dim} and values of {value_dim} differ"),
        (
            n_rot != head_dim,
            f"key llama.rope.dimension_count: invalid n_rot: {n_rot}, expected {head_dim}",
        ),
    ):
        if wrong:
            raise FormatError(f"{file.path}: {text}")
    n_ctx_train = positive("context_length")
    return Hyperparameters(
        n_vocab=n_vocab,
        n_ctx_train=n_ctx_train,
        n_embd=n_embd,
        n_ff=positive("feed_forward_length", limit=2**20),
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_layer=positive("block_count", limit=MAX_LAYERS),
        head_dim=head_dim,
        rms_eps=real("attention.layer_norm_rms_epsilon"),
        rope=_read_rope(file, n_rot, n_ctx_train, real),
    )


def _read_rope(file: GGUFFile, n_rot: int, n_ctx_train: int, real: Callable[..., float]) -> Rope:
    prefix = f"{ARCHITECTURE}.rope."
    scaling = file.get_str(prefix + "scaling.type", "linear")
    if scaling not in SCALINGS:
        raise FormatError(f"{file.path}: key {prefix}scaling.type: {scaling!r} is not known")
    factor = real("rope.scaling.factor", 0.0) or real("rope.scale_linear", 0.0) or 1.0
    original = file.get_int(prefix + "scaling.original_context_length", n_ctx_train)
    if original <= 0:
        raise FormatError(f"{file.path}: the original context length {original} cannot be used")
    try:
        return Rope(
            n_rot,
            freq_base=real("rope.freq_base", 10000.0),
            scaling=scaling,
            freq_scale=1.0 / factor,
            original_context=original,
            attn_factor=real("rope.scaling.attn_factor", 1.0),
        )
    except ShapeError as error:
        raise FormatError(f"{file.path}: keys {prefix}…: {error}") from None


class Weights:
    """The stored tensors of a model, checked for shape, each a view into the mapped file.

    Attributes
    ----------
    by_name : dict of str to Tensor
        Without the ``.weight`` suffix; biases keep ``.bias``.
    rope_factors : ndarray or None
    unused : list of str
        Tensors of the file that nothing asks for.
    tied : bool
        Whether the output takes the embedding's weights.
    """

    def __init__(self, file: GGUFFile, h: Hyperparameters) -> None:
        self._file = file
        self._left = dict(file.tensors)
        self.by_name: dict[str, Tensor] = {}
        self._add("token_embd", (h.n_vocab, h.n_embd))
        self._add("output_norm", (h.n_embd,))
        self.tied = "output.weight" not in file.tensors
        if self.tied:
            self.by_name["output"] = self.by_name["token_embd"]
        else:
            self._add("output", (h.n_vocab, h.n_embd))
        self.rope_factors = self._read_rope_factors(h)
        for layer in range(h.n_layer):
            self._add_layer(f"blk.{layer}.", h)
            self._left.pop(f"blk.{layer}.attn_rot_embd.weight", None)
        self.unused = list(self._left)

    def _add_layer(self, prefix: str, h: Hyperparameters) -> None:
        n_q, n_kv = h.n_head * h.head_dim, h.n_embd_kv
        shapes = {
            "attn_norm": (h.n_embd,),
            "attn_q": (n_q, h.n_embd),
            "attn_k": (n_kv, h.n_embd),
            "attn_v": (n_kv, h.n_embd),
            "attn_output": (h.n_embd, n_q),
            "ffn_norm": (h.n_embd,),
            "ffn_gate": (h.n_ff, h.n_embd),
            "ffn_up": (h.n_ff, h.n_embd),
            "ffn_down": (h.n_embd, h.n_ff),
        }
        if prefix + "attn_qkv.weight" in self._left:
            joint = self._take(prefix + "attn_qkv.weight", (n_q + 2 * n_kv, h.n_embd))
            first = 0
            for name in ("attn_q", "attn_k", "attn_v"):
                rows = shapes.pop(name)[0]
                self.by_name[prefix + name] = joint.view(first, rows)
                first += rows
        for name, shape in shapes.items():
            self._add(prefix + name, shape)
        for name in BIASES:
            if f"{prefix}{name}.bias" in self._left:
                rows = self.by_name[prefix + name].rows
                self.by_name[f"{prefix}{name}.bias"] = self._take(f"{prefix}{name}.bias", (rows,))

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        self.by_name[name] = self._take(name + ".weight", shape)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        info = self._left.pop(name, None)
        if info is None:
            raise FormatError(f"{self._file.path}: tensor {name} is missing")
        self._check_shape(info, shape)
        rows, cols = (1, *shape)[-2:]
        data = self._file.data(name)
        if len(shape) == 1 and info.dtype.id != 0:
            data, type_id = _decoded(info, data), 0  # the row kernels take F32 vectors
        else:
            type_id = info.dtype.id
        return Tensor.external(name.removesuffix(".weight"), data, rows, cols, type_id)

    def _check_shape(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        have = tuple(
            n for i, n in enumerate(info.shape) if n != 1 or i >= len(info.shape) - len(shape)
        )
        if have != shape:
            raise FormatError(
                f"{self._file.path}: tensor {info.name}: has wrong shape; expected "
                f"{list(reversed(shape))}, got {list(reversed(info.shape))}"
            )

    def _read_rope_factors(self, h: Hyperparameters) -> NDArray[np.float32] | None:
        info = self._left.pop("rope_freqs.weight", None)
        if info is None:
            return None
        self._check_shape(info, (h.n_rot // 2,))
        factors = _decoded(info, self._file.data(info.name))
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise FormatError(
                f"{self._file.path}: tensor rope_freqs.weight: a divisor is not positive"
            )
        return factors


def _decoded(info: TensorInfo, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    from engine.kernels import decode

    return decode(info.dtype.id, data, math.prod(info.shape))


def adapter_shapes(h: Hyperparameters, ranks: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
    """Name, n_in, n_out and rank of every adapted tensor, in the files' order.

    Parameters
    ----------
    ranks : mapping of kind (``attn_q``) to rank
        0 or absent: no adapter for that kind.
    """
    n_q = h.n_head * h.head_dim
    sizes = {
        "token_embd": (h.n_embd, h.n_vocab),
        "output_norm": (h.n_embd, 1),
        "output": (h.n_embd, h.n_vocab),
        "attn_norm": (h.n_embd, 1),
        "attn_q": (h.n_embd, n_q),
        "attn_k": (h.n_embd, h.n_embd_kv),
        "attn_v": (h.n_embd, h.n_embd_kv),
        "attn_output": (n_q, h.n_embd),
        "ffn_norm": (h.n_embd, 1),
        "ffn_gate": (h.n_embd, h.n_ff),
        "ffn_down": (h.n_ff, h.n_embd),
        "ffn_up": (h.n_embd, h.n_ff),
    }
    names = [("token_embd",) * 2, ("output_norm",) * 2, ("output",) * 2]
    names += [(f"blk.{i}.{kind}", kind) for i in range(h.n_layer) for kind in LAYER_TENSORS]
    return [(name, *sizes[kind], ranks[kind]) for name, kind in names if ranks.get(kind, 0) > 0]


# Stores or passes on a layer's keys and values and attends: (layer, q, k, v) -> heads' outputs.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Builder:
    """Writes the model into a graph; one builder, one graph.

    Parameters
    ----------
    graph : Graph
    h : Hyperparameters
    weights : mapping of str to Tensor
    adapters : mapping of str to AdapterTensors
        By the adapted tensor's name; applied beside the weights.
    ids, positions : ndarray of shape (n_tokens,), int32
        Read at each run.
    tables : (cos, sin)
        From `Rope.tables`, for all positions that occur.
    attend : callable
    directions : mapping of int to Tensor of one row
        Added to the output of a layer: control vectors.
    round_query : bool
        Round queries to half precision, as a cache of keys in F16 asks.
    """

    def __init__(
        self,
        graph: Graph,
        h: Hyperparameters,
        weights: Mapping[str, Tensor],
        adapters: Mapping[str, AdapterTensors],
        ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        tables: Tables,
        attend: Attend,
        *,
        directions: Mapping[int, Tensor] = MappingProxyType({}),
        round_query: bool = False,
    ) -> None:
        self.graph = graph
        self.h = h
        self.weights = weights
        self.adapters = adapters
        self.ids = ids
        self.positions = positions
        self.tables = tables
        self.attend = attend
        self.directions = directions
        self.round_query = round_query
        self._ones = Tensor.external("ones", np.ones(len(ids), np.float32), len(ids), 1)

    def embed(self) -> Tensor:
        """Rows of the embedding, with its adapter: (n_tokens, n_embd)."""
        n = len(self.ids)
        x = ops.embed(self.graph, self.weights["token_embd"], self.ids, n)
        adapter = self.adapters.get("token_embd")
        if adapter is None:
            return x
        u = ops.lora_gather(self.graph, adapter.b, self.ids, n)
        return ops.lora_up(self.graph, x, u, adapter.a, adapter.scale)

    def norm(self, x: Tensor, name: str, meets: Sequence[str] = ()) -> Tensor:
        """RMS norm by the named weights, adapted first where they are: w + scale B'A.

        `meets` names all weights that its result meets, if it is to be kept as they take it.
        """
        w = self.weights[name]
        adapter = self.adapters.get(name)
        if adapter is not None:
            learns = adapter.a.needs_grad or adapter.b.needs_grad
            w = self.adapted_norm(self.graph, w, adapter) if learns else self.fixed_norm(w, adapter)
        return ops.rms_norm(self.graph, x, w, self.h.rms_eps, self.kept_type(meets))

    def adapted_norm(self, graph: Graph, w: Tensor, adapter: AdapterTensors) -> Tensor:
        """Weights of a norm as the adapter changes them."""
        # B of a norm is one number a rank: a column in memory, and the row that this needs.
        return ops.lora_up(graph, w, adapter.b, adapter.a, adapter.scale)

    def fixed_norm(self, w: Tensor, adapter: AdapterTensors) -> Tensor:
        """Make the same once: a step a norm would be two waits a token."""
        graph = Graph(isa=self.graph.isa)
        changed = graph.keep(self.adapted_norm(graph, w, adapter))
        graph.run()
        return Tensor.external(w.name, changed.numpy().copy(), *changed.shape)

    def kept_type(self, names: Sequence[str]) -> int:
        """Type in which that is kept which meets nothing but these weights."""
        weights = [self.weights[name] for name in names]
        return ops.kept_type(self.graph, len(self.ids), weights) if names else F32.id

    def linear(self, x: Tensor, name: str, base: Tensor | None = None) -> Tensor:
        """Named projection with its adapter and bias, added to `base`."""
        w, bias = self.weights[name], self.weights.get(name + ".bias")
        if bias is None:
            return ops.linear(self.graph, x, w, self.adapters.get(name), base)
        y = self.add_row(ops.linear(self.graph, x, w, self.adapters.get(name)), bias)
        return y if base is None else ops.add(self.graph, base, y)

    def linears(self, x: Tensor, names: Sequence[str], dtypes: Sequence[int]) -> list[Tensor]:
        """Several projections of the same x; where there is a bias, in F32."""
        weights = [self.weights[name] for name in names]
        biases = [self.weights.get(name + ".bias") for name in names]
        adapters = [self.adapters.get(name) for name in names]
        types = [t if bias is None else F32.id for t, bias in zip(dtypes, biases, strict=True)]
        results = ops.linears(self.graph, x, weights, adapters, types)
        pairs = zip(results, biases, strict=True)
        return [y if bias is None else self.add_row(y, bias) for y, bias in pairs]

    def add_row(self, y: Tensor, row: Tensor) -> Tensor:
        """Every row of y and one row."""
        return ops.lora_up(self.graph, y, self._ones.view(0, y.rows), row, 1.0)

    def block(self, x: Tensor, layer: int, n_last: int | None = None) -> Tensor:
        """One layer; with `n_last` only so many last rows go on after the attention."""
        p, h = f"blk.{layer}.", self.h
        names = [p + "attn_q", p + "attn_k", p + "attn_v"]
        kept = self.kept_type(names)
        y = self.norm(x, p + "attn_norm", names)
        q, k, v = self.linears(y, names, [F32.id, F32.id, kept])
        turn = (self.positions, self.tables)
        q = ops.rope(self.graph, q, *turn, h.n_head, self.round_query, kept)
        k = ops.rope(self.graph, k, *turn, h.n_head_kv, type=kept)
        y = self.attend(layer, q, k, v)
        if n_last is not None and n_last < x.rows:
            x, y = (t.view(t.rows - n_last, n_last) for t in (x, y))
        x = self.linear(y, p + "attn_output", x)
        x = self.feed_forward(x, p)
        direction = self.directions.get(layer)
        return x if direction is None else self.add_row(x, direction)

    def feed_forward(self, base: Tensor, p: str) -> Tensor:
        """Norm, gate, up and down, added to `base`: in one step where there is nothing to learn."""
        names = [p + "ffn_gate", p + "ffn_up", p + "ffn_down"]
        gate, up, down = (self.weights[name] for name in names)
        x = self.norm(base, p + "ffn_norm", names[:2])
        adapters = tuple(self.adapters.get(name) for name in names)
        plain = not x.needs_grad and not any(name + ".bias" in self.weights for name in names)
        within = all(a is None or ops.meets_within(x, a) for a in adapters)
        if plain and within and gate.type == up.type:
            return ops.feed_forward(self.graph, x, gate, up, down, base, adapters)
        biased = any(name + ".bias" in self.weights for name in names[:2])
        between, kept = self.kept_type([] if biased else names), self.kept_type(names[2:])
        g, u = self.linears(x, names[:2], [between, between])
        return self.linear(ops.silu_mul(self.graph, g, u, kept), names[2], base)

    def hidden(self, n_last: int | None = None) -> Tensor:
        """All layers and the last norm: what the output weights multiply."""
        x = self.embed()
        for layer in range(self.h.n_layer):
            self.graph.segment = layer
            x = self.block(x, layer, n_last if layer == self.h.n_layer - 1 else None)
        self.graph.segment = None
        return self.norm(x, "output_norm")

    def logits(self, x: Tensor) -> Tensor:
        """Scores of every token: (rows of x, n_vocab)."""
        return self.linear(x, "output")
