"""Checkpoints: an adapter with everything that a run needs to go on as if never interrupted.

The file is GGUF with the keys and tensors of the original program, in its order, so that either
program resumes what the other wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.dtypes import F32, DType
from engine.errors import EngineError, FormatError, ShapeError
from engine.gguf import GGUFFile, ValueType, read_gguf, write_gguf
from engine.lora import (
    KINDS,
    Adapter,
    AdapterShape,
    FloatArray,
    file_order,
    kind_of,
    table_position,
)
from engine.mt19937 import MT19937
from engine.training.data import ShuffleState
from engine.training.moments import MomentOrder, find_order, moments_from_file, moments_to_file
from engine.training.state import TrainingState, ValidationState

U32, U64, REAL = ValueType.U32, ValueType.U64, ValueType.F32
TEXT, BOOL = ValueType.STRING, ValueType.BOOL

DEFAULT_R = 4
ANEW = 'give the same, or --checkpoint-in "" to start anew'

_FIRST = "optimizer.adam.first_moments"
_SECOND = "optimizer.adam.second_moments"
_PAST = "optimizer.adam.past_loss_values"
_R_KEY, _ALPHA_KEY = "training.lora.r", "training.lora.alpha"
_RSLORA_KEY = "training.lora.rslora"
_VALIDATION = "training.validation."
_RANK_KEY = "training.lora.rank."

# Sizes that must be the model's: key of the file, attribute of the hyperparameters.
_SIZE_KEYS = {
    "llama.embedding_length": "n_embd",
    "llama.feed_forward_length": "n_ff",
    "llama.attention.head_count": "n_head",
    "llama.attention.head_count_kv": "n_head_kv",
    "llama.block_count": "n_layer",
}


class Hyperparameters(Protocol):
    """What a checkpoint tells of its model."""

    @property
    def n_embd(self) -> int:
        """Width of the model."""

    @property
    def n_ff(self) -> int:
        """Width of the feed-forward part."""

    @property
    def n_head(self) -> int:
        """Attention heads."""

    @property
    def n_head_kv(self) -> int:
        """Heads of keys and values."""

    @property
    def n_layer(self) -> int:
        """Layers."""

    @property
    def n_rot(self) -> int:
        """Dimensions of a head that are rotated."""

    @property
    def rms_eps(self) -> float:
        """Epsilon of the norms."""

    @property
    def rope_freq_base(self) -> float:
        """Base of the rotation's frequencies."""

    @property
    def rope_freq_scale(self) -> float:
        """Factor on positions."""


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes
    ----------
    path : str
    adapter : Adapter
        Its r, alpha and rslora are those of the file; 4, 4 and false when the file does not tell
        (`has_header`).
    state : TrainingState
    n_ctx : int
        Tokens of a row in the run that wrote it.
    has_header : bool
        The file holds r and alpha.
    sizes : dict of str to int
        The model's sizes, by key of the file.
    ranks : dict of str to int
        Rank of each kind of tensor (``attn_q``); 0 when the file does not tell.
    order : MomentOrder
        In which the file's moments were.
    warnings : list of str
        For a person, one line each.
    """

    path: str
    adapter: Adapter
    state: TrainingState
    n_ctx: int
    has_header: bool
    sizes: dict[str, int]
    ranks: dict[str, int]
    order: MomentOrder
    warnings: list[str] = field(default_factory=list)

    def check_model(self, hparams: Hyperparameters) -> None:
        """Refuse a model of other sizes (`check_fits` compares the tensors).

        Raises
        ------
        ShapeError
            Names the key and both values.
        """
        for key, attribute in _SIZE_KEYS.items():
            if self.sizes[key] != getattr(hparams, attribute):
                raise ShapeError(
                    f"{self.path}: {key} is {self.sizes[key]}, the model's is"
                    f" {getattr(hparams, attribute)}; the checkpoint was made for another model"
                )

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """Refuse other ranks than the checkpoint's.

        Parameters
        ----------
        ranks : mapping of kind to rank
            What was asked for; kinds that are absent may have any rank.

        Raises
        ------
        ShapeError
            Names the first tensor that differs and both ranks.
        """
        for pair in self.adapter.pairs.values():
            kind = kind_of(pair.name)
            if ranks.get(kind, pair.rank) != pair.rank:
                raise ShapeError(self._other_rank(pair.name, pair.rank, ranks[kind]))
        present = {kind_of(name) for name in self.adapter.pairs}
        for kind, rank in ranks.items():
            if kind not in present and rank:
                raise ShapeError(self._other_rank(kind, 0, rank))

    def _other_rank(self, name: str, here: int, asked: int) -> str:
        return f"{self.path}: tensor {name} has rank {here}, {asked} was asked for; {ANEW}"

    def check_opt_past(self, opt_past: int) -> None:
        """Refuse another window of the delta test than the checkpoint's.

        Raises
        ------
        ShapeError
            Names the key and both values.
        """
        here = len(self.state.past_losses)
        if here != opt_past:
            raise ShapeError(
                f"{self.path}: optimizer.convergence_past_count is {here}, --opt-past is"
                f" {opt_past}; {ANEW}"
            )


def write_checkpoint(
    path: Path | str,
    state: TrainingState,
    adapter: Adapter,
    hparams: Hyperparameters,
    n_ctx: int,
) -> None:
    """Write a checkpoint beside `path`, then rename.

    Parameters
    ----------
    path : Path or str
    state : TrainingState
    adapter : Adapter
        In the table's order of tensors.
    hparams : Hyperparameters
        Of the base model, as used in this run.
    n_ctx : int
        Tokens of a row.

    Raises
    ------
    EngineError
        If the file cannot be written; an earlier one is left whole.
    """
    keys = [
        *_model_keys(adapter, hparams, n_ctx),
        *_state_keys(state),
        *_header_keys(adapter),
        *_validation_keys(state.validation),
    ]
    write_gguf(path, keys, _tensors(state, adapter))


_Key = tuple[str, ValueType, Any]


def _model_keys(adapter: Adapter, hparams: Hyperparameters, n_ctx: int) -> list[_Key]:
    ranks = dict.fromkeys(KINDS, 0)
    ranks |= {kind_of(pair.name): pair.rank for pair in adapter.pairs.values()}
    return [
        ("training.type", TEXT, "finetune_lora"),
        ("general.architecture", TEXT, "llama"),
        ("general.file_type", U32, F32.id),
        ("llama.context_length", U32, n_ctx),
        *((key, U32, getattr(hparams, attribute)) for key, attribute in _SIZE_KEYS.items()),
        ("llama.rope.dimension_count", U32, hparams.n_rot),
        ("llama.attention.layer_norm_rms_epsilon", REAL, hparams.rms_eps),
        ("llama.rope.freq_base", REAL, hparams.rope_freq_base),
        # The original takes the reciprocal when it reads: both then agree on the scale.
        ("llama.rope.scale_linear", REAL, 1 / hparams.rope_freq_scale),
        *((_RANK_KEY + kind, U32, rank) for kind, rank in ranks.items()),
    ]


def _state_keys(state: TrainingState) -> list[_Key]:
    return [
        ("training.file_version", U32, 1),
        ("training.iteration_count", U64, state.iterations),
        ("training.sample_count", U64, state.samples),
        ("training.token_count", U64, state.tokens),
        ("training.epoch_count", U64, state.epochs),
        ("training.shuffle.samples_hash", U64, state.shuffle.samples_hash),
        ("training.shuffle.rng_state", TEXT, state.shuffle.rng_state),
        ("training.shuffle.sample_count", U64, state.shuffle.sample_count),
        ("training.shuffle.next_sample", U64, state.shuffle.next_sample),
        ("optimizer.file_version", U32, 0),
        ("optimizer.convergence_past_count", U32, len(state.past_losses)),
        ("optimizer.parameter_count", U64, state.m.size),
        ("optimizer.iteration_count", U32, state.opt_iteration),
        ("optimizer.just_initialized", BOOL, state.just_initialized),
        ("optimizer.type", TEXT, "adam"),
        ("optimizer.adam.best_loss", REAL, state.best_loss),
        ("optimizer.adam.previous_loss", REAL, state.previous_loss),
        ("optimizer.adam.no_improvement_count", U32, state.no_improvement),
    ]


def _header_keys(adapter: Adapter) -> list[_Key]:
    """Return r and alpha, unless a reader that knows nothing of them would guess both right."""
    if adapter.r == DEFAULT_R and adapter.alpha == adapter.r and not adapter.rslora:
        return []
    rslora: list[_Key] = [(_RSLORA_KEY, BOOL, True)] if adapter.rslora else []
    return [(_R_KEY, U32, adapter.r), (_ALPHA_KEY, REAL, adapter.alpha), *rslora]


def _validation_keys(validation: ValidationState | None) -> list[_Key]:
    """Return what is known of a validation loss; nothing before one was taken."""
    if validation is None or validation.iteration < 0:
        return []
    return [
        (_VALIDATION + "samples_hash", U64, validation.samples_hash),
        (_VALIDATION + "iteration", U64, validation.iteration),
        (_VALIDATION + "loss", REAL, validation.loss),
        (_VALIDATION + "best_loss", REAL, validation.best_loss),
        (_VALIDATION + "no_improvement_count", U32, validation.no_improvement),
    ]


_Tensor = tuple[str, DType, tuple[int, ...], Callable[[], Iterable[FloatArray]]]


def _tensors(state: TrainingState, adapter: Adapter) -> list[_Tensor]:
    """List what a file holds; each factor is copied into the file's order when its turn comes."""
    tensors: list[_Tensor] = []
    for pair in adapter.pairs.values():
        for suffix, factor in ((".weight.lora_a", pair.a), (".weight.lora_b", pair.b)):
            # A norm's B is one row of `rank` numbers, which GGUF knows as one-dimensional.
            shape = factor.shape[::-1] if factor.shape[1] > 1 else factor.shape[:1]
            tensors.append((pair.name + suffix, F32, shape, partial(_file_order_alone, factor)))
    for name, moment in ((_FIRST, state.m), (_SECOND, state.v)):
        tensors.append((name, F32, moment.shape, partial(moments_to_file, moment, adapter)))
    past = state.past_losses
    if len(past):
        tensors.append((_PAST, F32, past.shape, lambda: [np.ascontiguousarray(past, "<f4")]))
    return tensors


def _file_order_alone(factor: FloatArray) -> list[FloatArray]:
    return [file_order(factor)]


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint of this program or of the original, of versions 0 and 1.

    Raises
    ------
    FormatError
        If the file is no such checkpoint, or contradicts itself; names the file, the key or
        tensor, and both values.
    """
    with read_gguf(path) as file:
        return _Reader(file, str(path)).checkpoint()


class _Reader:
    """Reads one checkpoint; copies all it keeps, so that the file may be closed or replaced."""

    def __init__(self, file: GGUFFile, path: str) -> None:
        self.file = file
        self.path = path

    def checkpoint(self) -> Checkpoint:
        for key, wanted in (("training.type", "finetune_lora"), ("general.architecture", "llama")):
            found = self.file.get_str(key, "")
            if found != wanted:
                raise FormatError(
                    f"{self.path}: key {key} is {found or 'missing'!r}, not {wanted!r}; "
                    "give a checkpoint of finetune"
                )
        sizes = {key: self.file.get_int(key) for key in _SIZE_KEYS}
        ranks = {kind: self.count(_RANK_KEY + kind) for kind in KINDS}
        has_header = _R_KEY in self.file.metadata
        adapter = self.adapter(has_header)
        self.check_declared(adapter, sizes, ranks)
        order, warnings, state = self.state(adapter)
        return Checkpoint(
            self.path,
            adapter,
            state,
            self.file.get_int("llama.context_length"),
            has_header,
            sizes,
            ranks,
            order,
            warnings,
        )

    def count(self, key: str, limit: int = 2**63 - 1, default: int | None = None) -> int:
        """Read a number that must not be negative, nor larger than `limit`."""
        found = self.file.get_int(key) if default is None else self.file.get_int(key, default)
        if not 0 <= found <= limit:
            raise FormatError(f"{self.path}: {key} is {found}, expected 0 to {limit}")
        return found

    # The adapter

    def adapter(self, has_header: bool) -> Adapter:
        """Read the factors, in the table's order whatever the file's."""
        names = sorted(self.pair_names(), key=table_position)
        factors = {name: (self.factor(name, "a"), self.factor(name, "b")) for name in names}
        shapes: list[AdapterShape] = []
        for name, (a, b) in factors.items():
            if a.shape[1] != b.shape[1]:
                raise FormatError(
                    f"{self.path}: tensor {name}.weight: lora_a has rank {a.shape[1]},"
                    f" lora_b {b.shape[1]}"
                )
            shapes.append((name, len(a), len(b), a.shape[1]))
        r, alpha = DEFAULT_R, float(DEFAULT_R)
        if has_header:
            r, alpha = self.count(_R_KEY, 2**31 - 1), self.file.get_float(_ALPHA_KEY)
            if r == 0 or not np.isfinite(alpha):
                raise FormatError(f"{self.path}: {_R_KEY} is {r} and {_ALPHA_KEY} {alpha}")
        adapter = Adapter(shapes, r, alpha, self.path)
        adapter.rslora = has_header and self.file.get_bool(_RSLORA_KEY, False)
        for name, (a, b) in factors.items():
            adapter.pairs[name].a[:] = a.T
            adapter.pairs[name].b[:] = b.T
        return adapter

    def pair_names(self) -> set[str]:
        names = set()
        for tensor in self.file.tensors:
            name, _, half = tensor.rpartition(".weight.")
            if half in ("lora_a", "lora_b"):
                try:
                    table_position(name)
                except ValueError:
                    raise FormatError(
                        f"{self.path}: tensor {tensor}: no tensor of that name can be adapted"
                    ) from None
                names.add(name)
        if not names:
            raise FormatError(f"{self.path}: the checkpoint holds no adapter tensors")
        return names

    def factor(self, name: str, half: str) -> FloatArray:
        """One factor as in the file: (n, rank)."""
        full_name = f"{name}.weight.lora_{half}"
        values = self.floats(full_name)
        shape = self.file.tensors[full_name].shape
        if len(shape) > 2:
            raise FormatError(
                f"{self.path}: tensor {full_name} has {len(shape)} dimensions, expected 1 or 2"
            )
        return values.reshape(-1, shape[-1])

    def floats(self, name: str) -> FloatArray:
        """Copy a tensor's elements, one after another."""
        if name not in self.file.tensors:
            raise FormatError(f"{self.path}: tensor {name} is missing")
        info = self.file.tensors[name]
        if info.dtype != F32:
            raise FormatError(f"{self.path}: tensor {name} is {info.dtype.name}, expected F32")
        values = self.file.data(name).view("<f4").astype(np.float32)
        if not np.isfinite(values).all():
            raise FormatError(
                f"{self.path}: tensor {name} holds NaN or infinity; give an earlier one"
            )
        return values

    def check_declared(
        self, adapter: Adapter, sizes: Mapping[str, int], ranks: Mapping[str, int]
    ) -> None:
        """Compare the tensors with the ranks and the number of layers that the keys tell."""
        n_layer = sizes["llama.block_count"]
        for pair in adapter.pairs.values():
            kind = kind_of(pair.name)
            if ranks[kind] != pair.rank:
                raise FormatError(
                    f"{self.path}: tensor {pair.name}.weight has rank {pair.rank},"
                    f" {_RANK_KEY}{kind} is {ranks[kind]}"
                )
            if table_position(pair.name)[0] >= n_layer:
                raise FormatError(
                    f"{self.path}: tensor {pair.name}.weight is beyond llama.block_count {n_layer}"
                )

    # The state

    def state(self, adapter: Adapter) -> tuple[MomentOrder, list[str], TrainingState]:
        version = self.count("training.file_version")
        if version > 1:
            raise FormatError(f"{self.path}: training.file_version is {version}, expected 0 or 1")
        self.check_optimizer()
        order, warnings, m, v = self.moments(adapter)
        n_past = self.count("optimizer.convergence_past_count")
        past = self.vector(_PAST, n_past, "optimizer.convergence_past_count") if n_past else v[:0]
        state = TrainingState(
            m,
            v,
            past.copy(),
            iterations=self.count("training.iteration_count"),
            samples=self.count("training.sample_count"),
            tokens=self.count("training.token_count"),
            epochs=self.count("training.epoch_count") if version else 0,
            shuffle=self.shuffle() if version else ShuffleState(),
            opt_iteration=self.count("optimizer.iteration_count", 2**31 - 1),
            just_initialized=self.file.get_bool("optimizer.just_initialized"),
            best_loss=self.file.get_float("optimizer.adam.best_loss"),
            previous_loss=self.file.get_float("optimizer.adam.previous_loss"),
            no_improvement=self.count("optimizer.adam.no_improvement_count"),
            validation=self.validation(),
        )
        return order, warnings, state

    def validation(self) -> ValidationState | None:
        if _VALIDATION + "iteration" not in self.file.metadata:
            return None
        return ValidationState(
            self.count(_VALIDATION + "samples_hash", 2**64 - 1),
            self.count(_VALIDATION + "iteration"),
            self.file.get_float(_VALIDATION + "loss"),
            self.file.get_float(_VALIDATION + "best_loss"),
            self.count(_VALIDATION + "no_improvement_count"),
        )

    def check_optimizer(self) -> None:
        version = self.file.get_int("optimizer.file_version")
        if version != 0:
            raise FormatError(f"{self.path}: optimizer.file_version is {version}, expected 0")
        kind = self.file.get_str("optimizer.type")
        if kind != "adam":
            raise FormatError(f"{self.path}: optimizer.type is {kind!r}, expected 'adam'")

    def moments(self, adapter: Adapter) -> tuple[MomentOrder, list[str], FloatArray, FloatArray]:
        declared = self.count("optimizer.parameter_count")
        if declared != adapter.flat.size:
            raise FormatError(
                f"{self.path}: optimizer.parameter_count is {declared}, the tensors hold"
                f" {adapter.flat.size}"
            )
        first, second = (
            self.vector(name, declared, "optimizer.parameter_count") for name in (_FIRST, _SECOND)
        )
        order, certain = find_order(second, adapter)
        warnings = []
        if not certain:
            warnings.append(
                f"{self.path}: the order of the moments cannot be told; {order.value} is assumed"
            )
        m, v = (moments_from_file(vector, adapter, order) for vector in (first, second))
        return order, warnings, m, v

    def vector(self, name: str, length: int, key: str) -> FloatArray:
        values = self.floats(name)
        if values.size != length:
            raise FormatError(
                f"{self.path}: tensor {name} has {values.size} elements, {key} is {length}"
            )
        return values

    def shuffle(self) -> ShuffleState:
        shuffle = ShuffleState(
            self.file.get_str("training.shuffle.rng_state"),
            self.count("training.shuffle.samples_hash", 2**64 - 1),
            self.count("training.shuffle.sample_count"),
            self.count("training.shuffle.next_sample"),
        )
        if shuffle.next_sample >= max(1, shuffle.sample_count):
            raise FormatError(
                f"{self.path}: training.shuffle.next_sample is {shuffle.next_sample}, there are"
                f" {shuffle.sample_count} samples"
            )
        if shuffle.rng_state:
            try:
                MT19937.from_text(shuffle.rng_state)
            except EngineError as error:
                raise FormatError(f"{self.path}: training.shuffle.rng_state: {error}") from error
        return shuffle
