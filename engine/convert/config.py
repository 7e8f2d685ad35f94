"""What a model's config.json says, checked, and the GGUF keys and divisors of angles it makes.

Key names and types: gguf's constants of architecture ``llama``. Transformers 5 writes the rotation
as ``rope_parameters``, earlier versions as ``rope_theta`` and ``rope_scaling``; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.convert.folder import read_json
from engine.errors import FormatError
from engine.gguf import KeyType, ValueType

Key = tuple[str, KeyType, Any]

# What a current transformers, or an earlier one, calls the models that llama's graph computes.
ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Rope:
    """The rotation: base, kind of scaling (empty for none), and what that kind says."""

    base: float
    kind: str
    factor: float
    original_context: int
    attn_factor: float | None  # beyond YaRN's own
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, slots=True)
class Config:
    """Sizes and constants of a published model.

    Attributes
    ----------
    explicit_head_dim : bool
        Whether the config names the head size, which is written then.
    warnings : tuple of str
        What the engines do otherwise than the publisher's code, one line each.
    raw : dict
        The whole of config.json.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    explicit_head_dim: bool
    rms_eps: float
    tied: bool
    rope: Rope
    warnings: tuple[str, ...]
    raw: dict[str, Any]


def read_config(folder: Path) -> Config:
    """Read and check config.json.

    Raises
    ------
    FormatError
        If it is missing, is of a model that cannot be converted, or contradicts itself.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if not raw:
        raise FormatError(f"{path}: is missing or empty; give the folder of a published model")
    reader = _Reader(path, raw)
    _refuse_other_models(reader)
    n_embd, n_head = reader.size("hidden_size"), reader.size("num_attention_heads")
    n_head_kv = reader.size("num_key_value_heads", n_head)
    head_dim = reader.size("head_dim", max(n_embd // n_head, 1))
    if n_head % n_head_kv:
        raise reader.error("num_key_value_heads", f"{n_head_kv} does not divide {n_head} heads")
    if head_dim % 2:
        raise reader.error("head_dim", f"{head_dim} is odd: pairs are rotated")
    n_ctx = reader.size("max_position_embeddings")
    rms_eps = reader.real("rms_norm_eps", 1e-6)
    tied = reader.flag("tie_word_embeddings", False)
    rope = _read_rope(reader, n_ctx)
    window = raw.get("sliding_window")
    if isinstance(window, int) and window < n_ctx and raw.get("use_sliding_window", True):
        reader.warn(f"a window of {window} tokens is not applied: attention sees all {n_ctx}")
    return Config(
        n_vocab=reader.size("vocab_size"),
        n_ctx=n_ctx,
        n_embd=n_embd,
        n_ff=reader.size("intermediate_size"),
        n_layer=reader.size("num_hidden_layers"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        explicit_head_dim=raw.get("head_dim") is not None,
        rms_eps=rms_eps,
        tied=tied,
        rope=rope,
        warnings=tuple(reader.warnings),
        raw=raw,
    )


class _Reader:
    """Typed access to config.json."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.raw = path, raw
        self.warnings: list[str] = []

    def error(self, key: str, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {key}: {problem}")

    def warn(self, line: str) -> None:
        self.warnings.append(f"{self.path}: {line}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= _MAX_SIZE:
            raise self.error(key, f"{_shown(value)} is no size; a positive whole number is needed")
        return value

    def real(self, key: str, default: float) -> float:
        return self.number(key, self.raw.get(key), default)

    def number(self, key: str, value: Any, default: float | None) -> float:
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, f"{_shown(value)} cannot be used; a positive number is needed")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if type(value) is not bool:
            raise self.error(key, f"{_shown(value)} is neither true nor false")
        return value


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _refuse_other_models(reader: _Reader) -> None:
    raw = reader.raw
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else raw.get("model_type")
    for key in _EXPERTS:
        if raw.get(key):
            raise reader.error(key, f"{_shown(raw[key])}: mixtures of experts cannot be converted")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise reader.error("architectures", f"{_shown(name)} cannot be converted; known: {known}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise reader.error("hidden_act", f"{_shown(raw['hidden_act'])} cannot be run, silu can")
    if raw.get("quantization_config"):
        raise reader.error("quantization_config", "quantized folders cannot be converted; "
                           "give the model they were made from")  # fmt: skip


def _read_rope(reader: _Reader, n_ctx: int) -> Rope:
    raw = reader.raw
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    if not isinstance(given, dict):
        raise reader.error(key, f"{_shown(given)} is no object")
    base = reader.number("rope_theta", given.get("rope_theta", raw.get("rope_theta")), 10000.0)
    for source in (given, raw):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise reader.error("partial_rotary_factor", "heads rotated in part cannot be run")

    def number(name: str, default: float | None = None) -> float:
        return reader.number(f"{key}.{name}", given.get(name), default)

    kind = given.get("rope_type", given.get("type")) or "default"
    original = given.get("original_max_position_embeddings") or raw.get(
        "original_max_position_embeddings"
    )
    context = int(reader.number(f"{key}.original_max_position_embeddings", original, n_ctx))
    plain = Rope(base, "", 1.0, context, None, 1.0, 4.0)
    if kind == "default":
        return plain
    if kind == "dynamic":
        reader.warn(f"{key}: type dynamic changes nothing up to {n_ctx} tokens, and is left out")
        return plain
    if kind == "linear":
        return Rope(base, kind, number("factor"), context, None, 1.0, 4.0)
    if kind == "yarn":
        factor = number("factor")
        attn = _yarn_attn_factor(reader, key, given, factor, number)
        return Rope(base, kind, factor, context, attn, 1.0, 4.0)
    if kind == "llama3":
        low, high = number("low_freq_factor", 1.0), number("high_freq_factor", 4.0)
        if not low < high:
            raise reader.error(key, f"low_freq_factor {low:g} is not below {high:g}")
        return Rope(base, kind, number("factor"), context, None, low, high)
    raise reader.error(key, f"type {_shown(kind)} cannot be converted; known: default, dynamic, "
                       "linear, yarn, llama3")  # fmt: skip


def _yarn_attn_factor(
    reader: _Reader,
    key: str,
    given: dict[str, Any],
    factor: float,
    number: Callable[..., float],
) -> float | None:
    """Magnitude on top of 1 + 0.1 ln(factor), which runtimes apply by themselves; None is 1."""
    for name, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        if given.get(name) not in (None, value):
            raise reader.error(key, f"{name} {_shown(given[name])} cannot be run, {value} can")
    own = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
    if given.get("attention_factor") is not None:
        return number("attention_factor") / own
    if given.get("mscale") and given.get("mscale_all_dim"):
        top, bottom = (
            1 + 0.1 * number(name) * math.log(factor) if factor > 1 else 1.0
            for name in ("mscale", "mscale_all_dim")
        )
        return top / bottom / own
    return None


def config_keys(config: Config) -> list[Key]:
    """Write a config as keys of architecture ``llama``."""

    def u32(name: str, value: int) -> Key:
        return f"llama.{name}", ValueType.U32, value

    def f32(name: str, value: float) -> Key:
        return f"llama.{name}", ValueType.F32, value

    rope = config.rope
    keys = [
        u32("block_count", config.n_layer),
        u32("context_length", config.n_ctx),
        u32("embedding_length", config.n_embd),
        u32("feed_forward_length", config.n_ff),
        u32("attention.head_count", config.n_head),
        u32("attention.head_count_kv", config.n_head_kv),
        f32("rope.freq_base", rope.base),
        f32("attention.layer_norm_rms_epsilon", config.rms_eps),
        u32("vocab_size", config.n_vocab),
        u32("rope.dimension_count", config.head_dim),
    ]
    if config.explicit_head_dim:
        keys.append(u32("attention.key_length", config.head_dim))
        keys.append(u32("attention.value_length", config.head_dim))
    if rope.kind in ("linear", "yarn"):
        keys.append(("llama.rope.scaling.type", ValueType.STRING, rope.kind))
        keys.append(f32("rope.scaling.factor", rope.factor))
    if rope.kind == "yarn":
        keys.append(u32("rope.scaling.original_context_length", rope.original_context))
        if rope.attn_factor is not None:
            keys.append(f32("rope.scaling.attn_factor", rope.attn_factor))
    return keys


def rope_divisors(config: Config) -> NDArray[np.float32] | None:
    """Divisors of the angles, one a pair, of Llama 3's scaling; None for the other kinds.

    Short waves stay, long ones are divided by the factor, those between by something between.
    Source: Llama 3.1's reference code; Grattafiori et al., arXiv:2407.21783.
    """
    rope = config.rope
    if rope.kind != "llama3":
        return None
    pair = np.arange(0, config.head_dim, 2) / config.head_dim
    turns = rope.original_context / (2 * math.pi * rope.base**pair)  # over the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / rope.factor + share)).astype(np.float32)
