"""Which type each tensor of a model gets: the mixtures of llama.cpp's quantize of June 2024."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from engine.dtypes import (
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    DType,
)
from engine.errors import FormatError
from engine.file_types import Target
from engine.gguf import GGUFFile, TensorInfo
from engine.gguf_write import shown

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"

# Two-dimensional tensors that are small, or whose errors cost too much.
_NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d.weight",
    "ssm_x.weight",
    "ssm_dt.weight",
)
_NEVER_WHOLE = ("position_embd.weight", "token_types.weight")

# What takes the place of a type whose blocks of 256 do not fill the rows.
_FALLBACK = {Q2_K: IQ4_NL, Q3_K: IQ4_NL, IQ4_XS: IQ4_NL, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a mixture needs to know of a model."""

    n_layer: int
    n_head: int
    n_head_kv: int


def read_sizes(file: GGUFFile) -> Sizes:
    """Read layers and heads.

    Raises
    ------
    FormatError
        If a key is missing or out of range, or the architecture's mixtures are others.
    """
    architecture = file.get_str("general.architecture")
    if architecture == "falcon" or file.get_int(f"{architecture}.expert_count", 0) > 0:
        what = "falcon models" if architecture == "falcon" else "mixtures of experts"
        raise FormatError(f"{file.path}: {what} cannot be quantized; give another model")
    n_head = file.get_int(f"{architecture}.attention.head_count")
    sizes = Sizes(
        file.get_int(f"{architecture}.block_count"),
        n_head,
        file.get_int(f"{architecture}.attention.head_count_kv", n_head),
    )
    if min(sizes.n_layer, sizes.n_head, sizes.n_head_kv) < 1:
        raise FormatError(f"{file.path}: layers or heads are none; convert the model again")
    return sizes


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for.

    Attributes
    ----------
    target : Target
    pure : bool
        Every matrix gets the main type.
    leave_output : bool
        ``output.weight`` stays as it is.
    output_type, embedding_type : DType, optional
        Of ``output.weight`` (a shared embedding too) and ``token_embd.weight``.
    important : bool
        There is an importance matrix.
    """

    target: Target
    pure: bool = False
    leave_output: bool = False
    output_type: DType | None = None
    embedding_type: DType | None = None
    important: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The type that a tensor gets, and the one that its rows cannot hold, if there is one."""

    dtype: DType
    instead_of: DType | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is among those of its kind."""

    i: int
    n: int
    heads_a_key: int
    important: bool

    @property
    def more_bits(self) -> bool:
        """The first and last eighth, and every third between."""
        first = self.n // 8
        return self.i < first or self.i >= 7 * self.n // 8 or (self.i - first) % 3 == 2


_Rule = Callable[[_Place], DType | None]


def _always(dtype: DType) -> _Rule:
    return lambda _place: dtype


def _more_bits(place: _Place) -> DType | None:
    return Q6_K if place.more_bits else None


def _first_part(dtype: DType, part: int, otherwise: DType | None = None) -> _Rule:
    return lambda place: dtype if place.i < place.n // part else otherwise


def _first(dtype: DType, count: int, otherwise: DType | None = None) -> _Rule:
    return lambda place: dtype if place.i < count else otherwise


def _grouped(dtype: DType, otherwise: DType | None = None) -> _Rule:
    return lambda place: dtype if place.heads_a_key >= 4 else otherwise


def _when(important: bool, rule: _Rule) -> _Rule:
    return lambda place: rule(place) if place.important is important else None


# By a part of the tensor's name, looked for in this order, and the target; None: the main type.
_RULES: Mapping[str, Mapping[str, _Rule]] = {
    "attn_v.weight": {
        "Q2_K": _grouped(Q4_K, Q3_K),
        "Q2_K_S": _grouped(Q4_K),
        "Q3_K_M": _first(Q5_K, 2, Q4_K),
        "Q3_K_L": _always(Q5_K),
        "Q4_K_S": _first(Q5_K, 4),
        "Q4_K_M": _more_bits,
        "Q5_K_M": _more_bits,
        "IQ4_NL": _grouped(Q5_K),
        "IQ4_XS": _grouped(Q5_K),
    },
    "ffn_down": {
        "Q2_K": _always(Q3_K),
        "Q2_K_S": _first_part(Q4_K, 8),
        "Q3_K_M": _first_part(Q5_K, 16, Q4_K),
        "Q3_K_L": _always(Q5_K),
        "Q4_K_S": _first_part(Q5_K, 8),
        "Q4_K_M": _more_bits,
        "Q5_K_M": _more_bits,
        "IQ4_NL": _when(False, _first_part(Q5_K, 8)),
        "IQ4_XS": _when(False, _first_part(Q5_K, 8)),
        "Q4_0": _when(True, _first_part(Q4_1, 8)),
        "Q5_0": _when(True, _first_part(Q5_1, 8)),
    },
    "attn_output.weight": {
        "Q2_K": _always(Q3_K),
        "Q3_K_M": _always(Q4_K),
        "Q3_K_L": _always(Q5_K),
    },
    "attn_qkv.weight": {
        "Q3_K_M": _always(Q4_K),
        "Q3_K_L": _always(Q4_K),
        "Q4_K_M": _always(Q5_K),
        "Q5_K_M": _always(Q6_K),
    },
}


def is_matrix(info: TensorInfo) -> bool:
    """Tell whether a tensor is one of those that are quantized."""
    name = info.name
    return (
        name.endswith("weight")
        and any(size > 1 for size in info.shape[:-1])
        and not any(part in name for part in _NEVER)
        and name not in _NEVER_WHOLE
    )


def choose_types(
    tensors: Iterable[TensorInfo], sizes: Sizes, wish: Wish, where: str = "model"
) -> dict[str, Choice]:
    """Choose the type of every tensor.

    Parameters
    ----------
    tensors : iterable of TensorInfo
        In the order of the file, on which mixtures depend.
    sizes : Sizes
    wish : Wish
    where : str
        The file's name, for messages.

    Raises
    ------
    FormatError
        If rows of a matrix are whole blocks of no type that it could get; names it.
    """
    infos = list(tensors)
    mixture = _Mixture(infos, sizes, wish)
    chosen = {}
    for info in infos:
        choice = mixture.choose(info)
        if info.shape and info.shape[-1] % choice.dtype.block:
            raise FormatError(
                f"{where}: tensor {shown(info.name)}: rows of {info.shape[-1]} are not whole "
                f"{choice.dtype.name} blocks of {choice.dtype.block}; choose another type"
            )
        chosen[info.name] = choice
    return chosen


class _Mixture:
    """Counts tensors of each kind as they come."""

    def __init__(self, infos: list[TensorInfo], sizes: Sizes, wish: Wish) -> None:
        self.sizes, self.wish = sizes, wish
        self.has_output = any(info.name == OUTPUT for info in infos)
        self.n_values = sum("attn_v.weight" in i.name or "attn_qkv.weight" in i.name for i in infos)
        self.met = dict.fromkeys(_RULES, 0)

    def choose(self, info: TensorInfo) -> Choice:
        wish, main = self.wish, self.wish.target.dtype
        left = wish.target.is_copy or (wish.leave_output and info.name == OUTPUT)
        if left or not is_matrix(info):
            return Choice(info.dtype)
        choice = Choice(main)
        if main.block > 1 and not wish.pure:
            choice = _fitting(self._mixed(info), info.shape[-1])
        if info.name == EMBEDDING and wish.embedding_type:
            choice = Choice(wish.embedding_type)
        if info.name == OUTPUT and wish.output_type:
            choice = Choice(wish.output_type)
        return choice

    def _mixed(self, info: TensorInfo) -> DType:
        main = self.wish.target.dtype
        if info.name == (OUTPUT if self.has_output else EMBEDDING):
            if self.wish.output_type:
                return self.wish.output_type
            return Q8_0 if main is Q8_0 or info.shape[-1] % Q6_K.block else Q6_K
        kind = next((kind for kind in _RULES if kind in info.name), None)
        if kind is None or info.name == EMBEDDING:
            return main
        dtype = self._by_rule(kind) or main
        self.met[kind] += 1
        is_70b = self.sizes.n_layer == 80 and self.sizes.n_head != self.sizes.n_head_kv
        if kind == "attn_v.weight" and is_70b and dtype in (Q3_K, Q4_K):
            return Q5_K
        return dtype

    def _by_rule(self, kind: str) -> DType | None:
        rule = _RULES[kind].get(self.wish.target.name)
        if rule is None:
            return None
        n = self.n_values if kind == "attn_v.weight" else self.sizes.n_layer
        heads = self.sizes.n_head // self.sizes.n_head_kv
        return rule(_Place(self.met[kind], n, heads, self.wish.important))


def _fitting(dtype: DType, row: int) -> Choice:
    """Fall back to blocks of 32 where those of 256 do not fill the rows."""
    if row % dtype.block == 0 or dtype not in _FALLBACK:
        return Choice(dtype)
    return Choice(_FALLBACK[dtype], dtype)
