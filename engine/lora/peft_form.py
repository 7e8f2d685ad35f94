"""The folder of Hugging Face's PEFT: ``adapter_config.json`` beside safetensors.

Tensor ``base_model.model.MODULE.lora_A.weight`` is (rank, n_in), ``.lora_B.weight`` (n_out, rank);
the embedding's are ``.lora_embedding_A`` (rank, n_vocab) and ``_B`` (n_embd, rank). The scale of a
module is alpha / *its own* rank, or alpha / √rank, with ranks and alphas of single modules in the
configuration's patterns.

A publisher's model rotates the pairs (i, i + d/2) of a head of size d, a GGUF llama the neighbours
(2i, 2i + 1): rows of q and k, and so columns of B here, change places on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import regex  # type: ignore[import-untyped]
from numpy.typing import NDArray

from engine.errors import EngineError, FormatError
from engine.gguf import atomic_write
from engine.gguf_write import shown
from engine.lora.adapter import (
    Adapter,
    AdapterShape,
    BaseInfo,
    Factors,
    FloatArray,
    join_factors,
    kind_of,
    layer_of,
    norm_refusals,
    table_names,
)
from engine.safetensors import parse_json, read_safetensors, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
}
_PREFIX = "base_model.model."
_EMBEDDING = "token_embd"
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_LOOKUP = (".lora_embedding_A", ".lora_embedding_B")
# Whole tensors beside the factors: PEFT copies an adapted embedding's base weights there, mergers
# put whole norms. None can be applied beside the weights.
_UNUSED = regex.compile(r"(\.base_layer|_layernorm|\.norm)\.weight$")

_PERMUTED_ARCHITECTURES = {"llama"}
_MAX_CONFIG_BYTES = 2**20
_MAX_ALPHA = 1e30
_MAX_RANK = 2**31 - 1
_MAX_PATTERNS = 10_000
# Counted repeats, which compile to memory of their own choice, and the extensions behind "(?" are
# left out; what remains can still be slow, and is stopped by the clock.
_SAFE_PATTERN = regex.compile(r"(?!.*\(\?)[\w.\\^$|()*+?\[\]-]{1,200}")
_MATCH_SECONDS = 1.0

_T = TypeVar("_T")

# Settings that change what the tensors mean, each with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    # The other ways to begin change the base weights too.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def peft_refusals(shapes: Sequence[AdapterShape], alpha: float) -> list[str]:
    """Say what of an adapter the form cannot hold."""
    lines = norm_refusals(shapes, "the PEFT form")
    if alpha == 0:
        lines.append("alpha 0 leaves nothing to apply; give another --lora-alpha")
    return lines


def write_peft(adapter: Adapter, path: Path, base: BaseInfo, folder: bool) -> None:
    """Write an adapter's weights, then its configuration beside them.

    Parameters
    ----------
    adapter : Adapter
    path : Path
        Of the folder, which is made where it is missing, or of the safetensors file.
    base : BaseInfo
    folder : bool
        What `path` is.
    """
    if folder:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise EngineError(f"{path}: cannot be made: {error.strerror or error}") from error
        path = path / WEIGHTS
    tensors: list[tuple[str, FloatArray]] = []
    for pair in adapter.pairs.values():
        lookup = pair.name == _EMBEDDING
        stem = _PREFIX + _module_of(pair.name)
        order = _row_order(pair.name, pair.n_out, base, str(path))
        b = pair.b if order is None else pair.b[:, np.argsort(order)]
        a, b = (b, pair.a.T) if lookup else (pair.a, b.T)
        for suffix, factor in zip(_LOOKUP if lookup else _LINEAR, (a, b), strict=True):
            tensors.append((stem + suffix, factor))
    write_safetensors(path, tensors, {"format": "pt"})
    config = json.dumps(_config_of(adapter, base), indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path.with_name(CONFIG)) as out:
        out.write(config.encode())


def read_peft(path: Path, base: BaseInfo) -> Adapter:
    """Read an adapter from its folder, or from the safetensors file with its configuration beside.

    Pairs in the table's order. The scale is the configuration's r and alpha; where a module has
    another, B takes up the difference.
    """
    weights = _weights_file(path) if path.is_dir() else path
    config = _read_config(weights.with_name(CONFIG))
    tensors = read_safetensors(weights)
    found: dict[str, Factors] = {}
    for name in table_names(base.n_layer):
        if kind_of(name) not in _MODULES:
            continue
        module = _module_of(name)
        suffixes = _LOOKUP if name == _EMBEDDING else _LINEAR
        full_names = [_PREFIX + module + suffix for suffix in suffixes]
        there = [n for n in full_names if n in tensors]
        if not there:
            continue
        if len(there) == 1:
            missing = next(n for n in full_names if n not in tensors)
            raise FormatError(f"{weights}: tensor {missing} is missing")
        a, b = (_matrix(tensors.pop(n), n, weights) for n in full_names)
        _check_rank(config, module, a, b, weights)
        fold = config.fold(module, len(a))
        if name == _EMBEDDING:
            a, b = b.T, a.T
        order = _row_order(name, len(b), base, str(weights))
        found[name] = Factors(a, (b if order is None else b[order]).T, fold)
    unused = _unused(tensors, weights)
    adapter = join_factors(found, config.r, config.alpha, str(path), config.rslora)
    adapter.unused = unused
    return adapter


def _weights_file(folder: Path) -> Path:
    if not (folder / CONFIG).exists():
        raise FormatError(f"{folder}: is a folder without {CONFIG}; give an adapter")
    if not (folder / WEIGHTS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        mend = "; save the adapter with safe_serialization=True" if pickled else ""
        raise FormatError(f"{folder}: has no {WEIGHTS}{mend}")
    return folder / WEIGHTS


def _matrix(tensor: NDArray[np.floating], name: str, path: Path) -> NDArray[np.floating]:
    if tensor.ndim != 2:
        raise FormatError(f"{path}: tensor {name}: has {tensor.ndim} dimensions, expected two")
    return tensor


def _unused(left: Iterable[str], path: Path) -> list[str]:
    """List tensors that are known but cannot be applied; refuse all others."""
    unused = []
    for name in left:
        if not _UNUSED.search(name):
            raise FormatError(
                f"{path}: tensor {shown(name)}: is no LoRA factor of a tensor that the model has;"
                " the adapter is of another kind or was made for another model"
            )
        unused.append(name)
    return unused


def _module_of(name: str) -> str:
    """Name of a tensor's module in the publisher's model."""
    layer = layer_of(name)
    module = _MODULES[kind_of(name)]
    return module if layer < 0 else f"model.layers.{layer}.{module}"


def _row_order(name: str, n_out: int, base: BaseInfo, source: str) -> NDArray[np.intp] | None:
    """Give the publisher's row of each GGUF row, for the tensors in which they differ."""
    heads = {"attn_q": base.n_head, "attn_k": base.n_head_kv}.get(kind_of(name))
    if heads is None or base.architecture not in _PERMUTED_ARCHITECTURES:
        return None
    if n_out != heads * base.head_dim:
        raise FormatError(
            f"{source}: tensor {name}: adapts {n_out} rows, the model has {heads} heads of"
            f" {base.head_dim}; the adapter was made for another model"
        )
    rows = np.arange(n_out).reshape(heads, 2, base.head_dim // 2)
    return rows.swapaxes(1, 2).ravel()


# The configuration


@dataclass(frozen=True, slots=True)
class _Config:
    """What scales an adapter's modules."""

    path: Path
    r: int
    alpha: float
    rslora: bool
    rank_pattern: Sequence[tuple[regex.Pattern[str], int]]
    alpha_pattern: Sequence[tuple[regex.Pattern[str], float]]

    def rank(self, module: str) -> int:
        """Rank that a module is said to have."""
        return self._chosen(self.rank_pattern, module, self.r)

    def fold(self, module: str, rank: int) -> float:
        """Factor that B takes up, of a module of this rank."""
        alpha = self._chosen(self.alpha_pattern, module, self.alpha)
        return alpha / self.alpha * self._divisor(self.r) / self._divisor(rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rslora else rank

    def _chosen(
        self, patterns: Sequence[tuple[regex.Pattern[str], _T]], module: str, default: _T
    ) -> _T:
        for pattern, value in patterns:
            try:
                if pattern.match(module, timeout=_MATCH_SECONDS):
                    return value
            except TimeoutError:
                raise FormatError(
                    f"{self.path}: a pattern takes too long: {shown(pattern.pattern)}"
                ) from None
        return default


def _check_rank(
    config: _Config,
    module: str,
    a: NDArray[np.floating],
    b: NDArray[np.floating],
    weights: Path,
) -> None:
    rank = config.rank(module)
    if not len(a) == b.shape[1] == rank:
        raise FormatError(
            f"{weights}: module {module}: A has rank {len(a)}, B {b.shape[1]}, {CONFIG} says {rank}"
        )


def _read_config(path: Path) -> _Config:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > _MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: has more than {_MAX_CONFIG_BYTES} bytes")
    values = parse_json(content, str(path))
    for key, neutral in _NEUTRAL.items():
        value = values.get(key)
        # 1 and 0 equal True and False, but are no booleans.
        if not any(type(value) is type(n) and value == n for n in neutral):
            raise FormatError(f"{path}: {key} {shown(json.dumps(value))} is not supported")
    rslora = values.get("use_rslora", False)
    if rslora is not None and type(rslora) is not bool:
        raise FormatError(f"{path}: use_rslora {shown(json.dumps(rslora))} is not true or false")
    return _Config(
        path,
        _rank(values.get("r"), path, "r"),
        _alpha(values.get("lora_alpha"), path, "lora_alpha"),
        bool(rslora),
        _patterns(values, "rank_pattern", path, _rank),
        _patterns(values, "alpha_pattern", path, _alpha),
    )


def _patterns(
    values: Mapping[str, Any], key: str, path: Path, checked: Callable[[Any, Path, str], _T]
) -> list[tuple[regex.Pattern[str], _T]]:
    """Give the patterns of one setting, which match the ends of names, at a dot."""
    found = values.get(key) or {}
    if not isinstance(found, dict) or len(found) > _MAX_PATTERNS:
        raise FormatError(f"{path}: {key} is no JSON object of at most {_MAX_PATTERNS} patterns")
    patterns = []
    for name, value in found.items():
        try:
            if not _SAFE_PATTERN.fullmatch(name):
                raise regex.error("only names, . * + ? | ^ $ [ ] ( ) and \\ are supported")
            pattern = regex.compile(rf"(.*\.)?({name})$")
        except regex.error as error:
            raise FormatError(f"{path}: {key} {shown(name)}: is no pattern: {error}") from None
        patterns.append((pattern, checked(value, path, f"{key} {name}")))
    return patterns


def _rank(value: Any, path: Path, what: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise FormatError(
            f"{path}: {shown(what)} is {shown(json.dumps(value))}, expected a rank of at least 1"
        )
    return value


def _alpha(value: Any, path: Path, what: str) -> float:
    # Compared before it becomes a float, which a long integer may be too large for.
    if type(value) not in (int, float) or not 1 / _MAX_ALPHA <= abs(value) <= _MAX_ALPHA:
        raise FormatError(
            f"{path}: {shown(what)} is {shown(json.dumps(value))}, expected a number other than 0"
        )
    return value


def _config_of(adapter: Adapter, base: BaseInfo) -> dict[str, Any]:
    """Give the configuration with which PEFT applies what this engine does."""
    modules, ranks = _grouped(adapter, base.n_layer)
    others = {key: rank for key, rank in ranks.items() if rank != adapter.r}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name or None,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": _plain(adapter.alpha),
        "use_rslora": adapter.rslora,
        "target_modules": modules,
        "rank_pattern": others,
        # The scale is the same for every module here, and alpha / its own rank there.
        "alpha_pattern": {
            key: _plain(adapter.scale * (math.sqrt(rank) if adapter.rslora else rank))
            for key, rank in others.items()
        },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _plain(value: float) -> float:
    """Give a whole number as an integer, as most readers expect alpha to be."""
    return int(value) if value == int(value) else value


def _grouped(adapter: Adapter, n_layer: int) -> tuple[list[str], dict[str, int]]:
    """Name modules, each kind once where all layers have it; and the rank of each name.

    Names and patterns match the ends of modules' names, at a dot.
    """
    kinds: dict[str, list[str]] = {}
    for name in adapter.pairs:
        kinds.setdefault(kind_of(name), []).append(name)
    modules: list[str] = []
    ranks: dict[str, int] = {}
    for kind, names in kinds.items():
        short = _MODULES[kind].rpartition(".")[2]
        whole = [_module_of(name).removeprefix("model.") for name in names]
        everywhere = len(names) == n_layer or layer_of(names[0]) < 0
        modules += [short] if everywhere else whole
        of_kind = [adapter.pairs[name].rank for name in names]
        if len(set(of_kind)) == 1:
            ranks[short] = of_kind[0]
        else:
            ranks |= dict(zip(whole, of_kind, strict=True))
    return modules, ranks
