"""The GGUF form, which llama.cpp loads since July 2024.

Tensor ``NAME.weight.lora_a`` is (rank, n_in) in NumPy's order and ``.lora_b`` (n_out, rank); only
the token embedding has its two exchanged and turned: ``lora_a`` (n_vocab, rank), ``lora_b``
(n_embd, rank). The scale of a tensor is alpha / *its own* rank, or 1 where alpha is 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F32
from engine.errors import FormatError
from engine.gguf import GGUFFile, KeyType, ValueType, read_gguf, write_gguf
from engine.gguf_write import shown
from engine.kernels import decode
from engine.lora.adapter import (
    Adapter,
    AdapterShape,
    BaseInfo,
    Factors,
    LoraPair,
    join_factors,
    kind_of,
    norm_refusals,
    table_position,
)

_A, _B = ".weight.lora_a", ".weight.lora_b"
_ALPHA = "adapter.lora.alpha"
_ACTIVATED = "adapter.alora.invocation_tokens"
_EMBEDDING = "token_embd"
# The option of finetune that leaves one of two tied tensors out.
_TIED_OPTIONS = {_EMBEDDING: "--rank-tok-embd 0", "output": "--rank-out 0"}


def gguf_refusals(shapes: Sequence[AdapterShape], base: BaseInfo, alpha: float) -> list[str]:
    """Say what of an adapter the form cannot hold, or its readers cannot apply."""
    lines = norm_refusals(shapes, "the GGUF form")
    kinds = {kind_of(name) for name, *_ in shapes}
    # A tied output has the embedding's tensor and name there: the reader looks for an output's
    # pair in vain, and takes the embedding's pair, which has other sizes, for the output's.
    tied = [option for kind, option in _TIED_OPTIONS.items() if kind in kinds]
    if base.tied and tied:
        lines.append(
            "llama.cpp cannot apply adapters of the embedding or the output of a model where both"
            f" are one tensor; add {' '.join(tied)}"
        )
    if alpha == 0:
        lines.append("alpha 0 means a scale of 1 in the GGUF form; give another --lora-alpha")
    return lines


def write_gguf_adapter(adapter: Adapter, path: Path | str, base: BaseInfo) -> None:
    """Write the GGUF form beside `path`, then rename.

    Readers scale by each tensor's own rank, this engine by the adapter's r: where they differ B
    takes up the factor rank / r. That of √r of a rank-stabilized adapter goes into alpha.
    """
    alpha = adapter.scale * adapter.r
    keys: list[tuple[str, KeyType, object]] = [
        ("general.architecture", ValueType.STRING, base.architecture),
        ("general.type", ValueType.STRING, "adapter"),
        ("adapter.type", ValueType.STRING, "lora"),
        (_ALPHA, ValueType.F32, alpha),
    ]
    tensors = []
    for pair in adapter.pairs.values():
        for suffix, factor in zip((_A, _B), _stored(pair, adapter.r), strict=True):
            stored = np.ascontiguousarray(factor, "<f4")
            tensors.append((pair.name + suffix, F32, stored.shape, stored))
    write_gguf(path, keys, tensors)


def read_gguf_adapter(path: Path, base: BaseInfo | None) -> Adapter:
    """Read a GGUF adapter; pairs in the table's order.

    Where tensors have several ranks, r is the commonest and the others' B take up the difference.
    """
    with read_gguf(path) as file:
        alpha = _checked_alpha(file, base)
        found, unused = _paired(file)
    if not found:
        raise FormatError(f"{path}: the adapter holds no tensors that can be applied")
    (r, _), *_ = Counter(len(factors.a) for factors in found.values()).most_common()
    if alpha == 0:
        adapter = join_factors(found, r, r, str(path))
    else:
        folded = {n: Factors(f.a, f.b, r / len(f.a)) for n, f in found.items()}
        adapter = join_factors(folded, r, alpha, str(path))
    adapter.unused = unused
    return adapter


def _stored(pair: LoraPair, r: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Give lora_a and lora_b of a pair."""
    b = pair.b if pair.rank == r else pair.b * np.float32(pair.rank / r)
    return (b.T, pair.a.T) if pair.name == _EMBEDDING else (pair.a, b.T)


def _checked_alpha(file: GGUFFile, base: BaseInfo | None) -> float:
    if file.kind != "adapter":
        mend = "; write its adapter with finetune --only-write-lora" * (file.kind == "checkpoint")
        raise FormatError(f"{file.path}: this is a {file.kind} file, an adapter is needed{mend}")
    kind = file.get_str("adapter.type")
    if kind != "lora":
        raise FormatError(f"{file.path}: adapter.type is {shown(kind)}, only lora can be applied")
    if _ACTIVATED in file.metadata:
        raise FormatError(
            f"{file.path}: key {_ACTIVATED}: adapters that begin to act at certain tokens are not"
            " supported"
        )
    architecture = file.get_str("general.architecture")
    if base is not None and architecture != base.architecture:
        raise FormatError(
            f"{file.path}: the adapter is for architecture {shown(architecture)}, the model has"
            f" {base.architecture}"
        )
    alpha = file.get_float(_ALPHA, 0.0)
    if not math.isfinite(alpha):
        raise FormatError(f"{file.path}: key {_ALPHA}: {alpha} cannot be used")
    return alpha


def _paired(file: GGUFFile) -> tuple[dict[str, Factors], list[str]]:
    """Join the tensors of each name; what cannot be applied is listed beside."""
    names: dict[str, None] = {}
    unused = []
    for full_name in file.tensors:
        if full_name.endswith((_A, _B)):
            names[full_name[: -len(_A)]] = None
        elif full_name.endswith("_norm.weight"):
            unused.append(full_name)
        else:
            raise FormatError(
                f"{file.path}: tensor {shown(full_name)}: expected a name that ends in {_A} or {_B}"
            )
    try:
        ordered = sorted(names, key=table_position)
    except ValueError as error:
        raise FormatError(
            f"{file.path}: tensor {shown(str(error))}.weight cannot be adapted by this engine"
        ) from None
    found = {}
    for name in ordered:
        a, b = _matrix(file, name + _A), _matrix(file, name + _B)
        if name == _EMBEDDING:
            a, b = b.T, a
        found[name] = Factors(a, b.T)
    return found, unused


def _matrix(file: GGUFFile, name: str) -> NDArray[np.float32]:
    """Give a tensor as (rows, columns) of float32."""
    data = file.data(name)
    info = file.tensors[name]
    rows, columns = (1, 1, *info.shape)[-2:]
    n = math.prod(info.shape)
    if rows * columns != n:
        raise FormatError(f"{file.path}: tensor {name}: has {len(info.shape)} dimensions, not two")
    return decode(info.dtype.id, data, n).reshape(rows, columns)
