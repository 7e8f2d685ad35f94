"""Published tensors as GGUF stores them: names, shapes, order of rows, type; a piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from engine.convert.config import Config
from engine.convert.folder import Source
from engine.dtypes import BF16, F16, F32, Q8_0, DType
from engine.errors import DataError, EngineError, FormatError
from engine.kernels import decode, encode, find_invalid

PIECE_BYTES = 1 << 22  # of the source: what is in memory at a time, with its copies

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Buffers that older versions of transformers saved; a config says the same.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_STORED = {"F32": F32, "F16": F16, "BF16": BF16}
_SOURCE_TYPES = (*_STORED, "F64")


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write.

    Attributes
    ----------
    name : str
        In the GGUF file.
    published : str
    source : Source
    dtype : DType
        That it gets.
    heads : int
        Heads whose rows are reordered for the rotation; 0 for none.
    """

    name: str
    published: str
    source: Source
    dtype: DType
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """NumPy order."""
        return self.source.entry.shape


def choose_type(sources: Mapping[str, Source]) -> DType:
    """Give the type of ``auto``: BF16 where the first matrix has it, F16 for anything else."""
    for source in sources.values():
        if len(source.entry.shape) > 1:
            return BF16 if source.entry.dtype == "BF16" else F16
    return F16


def plan_tensors(
    sources: Mapping[str, Source], config: Config, dtype: DType, warn: Callable[[str], None]
) -> list[Planned]:
    """Find, for each tensor of the model, the published one, and check its shape and type.

    Vectors become F32, whatever `dtype` is: all runtimes want them so. Rows that are no whole
    blocks of Q8_0 become F16.

    Raises
    ------
    FormatError
        If one is missing, has another shape than the config says, or has no place in the model.
    """
    planned = []
    left = {name: s for name, s in sources.items() if not name.endswith(_BUFFERS)}
    if config.tied and "lm_head.weight" in left:
        del left["lm_head.weight"]
        warn("lm_head.weight is left out: the config ties the output to the embedding")
    for published, name, shape, heads, needed in _expected(config):
        source = left.pop(published, None)
        if source is None:
            if not needed:
                continue
            raise FormatError(f"{_where(sources)}: tensor {published}: is missing")
        _check(source, shape)
        chosen = F32 if len(shape) == 1 else dtype
        if chosen is Q8_0 and shape[-1] % Q8_0.block:
            warn(f"{published}: rows of {shape[-1]} are not whole Q8_0 blocks, stored as F16")
            chosen = F16
        planned.append(Planned(name, published, source, chosen, heads))
    if left:
        name, source = next(iter(left.items()))
        raise FormatError(
            f"{source.path}: tensor {name[:80]}: has no place in a llama of {config.n_layer} "
            "layers; config.json may be of another model"
        )
    return planned


def _expected(config: Config) -> Iterator[tuple[str, str, tuple[int, ...], int, bool]]:
    """Give published name, GGUF name, shape, heads to reorder, and whether it must be there."""
    n_q, n_kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    n_embd, n_ff = config.n_embd, config.n_ff
    shapes = {
        "attn_norm": (n_embd,),
        "attn_q": (n_q, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_q),
        "ffn_norm": (n_embd,),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }
    heads = {"attn_q": config.n_head, "attn_k": config.n_head_kv}
    biased = {
        name
        for name in shapes
        if (name.startswith("attn_") and config.raw.get("attention_bias"))
        or (name.startswith("ffn_") and config.raw.get("mlp_bias"))
    }
    table = (config.n_vocab, n_embd)
    yield "model.embed_tokens.weight", "token_embd.weight", table, 0, True
    for layer in range(config.n_layer):
        for published, name in _LAYER.items():
            before, after = f"model.layers.{layer}.{published}", f"blk.{layer}.{name}"
            shape, h = shapes[name], heads.get(name, 0)
            yield f"{before}.weight", f"{after}.weight", shape, h, True
            if len(shape) > 1:
                yield f"{before}.bias", f"{after}.bias", shape[:1], h, name in biased
    yield "model.norm.weight", "output_norm.weight", (n_embd,), 0, True
    if not config.tied:
        yield "lm_head.weight", "output.weight", table, 0, True


def _where(sources: Mapping[str, Source]) -> str:
    return str(next(iter(sources.values())).path.parent) if sources else "the folder"


def _check(source: Source, shape: tuple[int, ...]) -> None:
    entry = source.entry
    where = f"{source.path}: tensor {entry.name}"
    if entry.dtype not in _SOURCE_TYPES:
        raise FormatError(
            f"{where}: has type {entry.dtype}; {', '.join(_SOURCE_TYPES)} can be converted"
        )
    if entry.shape != shape:
        have, want = (" × ".join(map(str, sizes)) for sizes in (entry.shape, shape))
        raise FormatError(f"{where}: has shape {have}, config.json says {want}")


def stored_parts(tensor: Planned) -> Iterator[NDArray[np.uint8]]:
    """Read, reorder and encode a tensor, piece by piece, in the order of the file.

    Raises
    ------
    DataError
        If a value does not fit the type; names the tensor and the row.
    EngineError
        If the file cannot be read, or ends before it should.
    """
    entry = tensor.source.entry
    rows = entry.shape[0]
    row_bytes = entry.n_bytes // rows
    unit = rows // tensor.heads if tensor.heads else 1  # a head's rows belong together
    step = max(1, PIECE_BYTES // (row_bytes * unit)) * unit
    try:
        with tensor.source.path.open("rb") as file:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                file.seek(entry.offset + first * row_bytes)
                piece = np.fromfile(file, np.uint8, count * row_bytes)
                if piece.size < count * row_bytes:
                    raise EngineError(f"{tensor.source.path}: has become shorter while it was read")
                if tensor.heads:
                    piece = _rotation_order(piece.reshape(count, row_bytes), unit)
                yield _encoded(tensor, piece, first)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"{tensor.source.path}: cannot be read: {reason}") from error


def _rotation_order(rows: NDArray[np.uint8], head_dim: int) -> NDArray[np.uint8]:
    """Rows of whole heads: the pair (i, i + d/2), which publishers rotate, becomes (2i, 2i + 1)."""
    n, row_bytes = rows.shape
    halves = rows.reshape(n // head_dim, 2, head_dim // 2, row_bytes)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)


def _encoded(tensor: Planned, piece: NDArray[np.uint8], first_row: int) -> NDArray[np.uint8]:
    dtype, stored = tensor.dtype, _STORED.get(tensor.source.entry.dtype)
    flat = piece.reshape(-1)
    if stored is dtype:
        return flat  # the same bits
    if stored is None:
        with np.errstate(over="ignore", invalid="ignore"):
            values = flat.view("<f8").astype(np.float32)
    else:
        values = decode(stored.id, flat, flat.size // stored.block_bytes)
    out = encode(dtype.id, values)
    block = find_invalid(dtype.id, out, values.size)
    if block >= 0:
        row = first_row + block * dtype.block // prod(tensor.shape[1:])
        raise DataError(
            f"{tensor.source.path}: tensor {tensor.published}: row {row}: a value does not fit "
            f"{dtype.name}, or is infinite or NaN; use --outtype bf16 or f32"
        )
    return out
