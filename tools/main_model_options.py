"""The options of `main` that say which model runs and in what context: one row each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from engine.dtypes import CACHE_TYPES

from .options import Option, Value, choice, in_group, leading_float, real, text, whole


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model runs and in what context: for commands that take what `main` takes."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    check_tensors: bool
    bf16: str
    adapters: tuple[tuple[str, float], ...]
    lora_base: str
    control_vectors: tuple[tuple[str, float], ...]
    control_layers: tuple[int, int]
    overrides: tuple[tuple[str, int | float | bool | str], ...]
    cache_type_k: str
    cache_type_v: str
    flash_attention: bool
    group_factor: int
    group_width: int
    rope_scaling: str | None
    rope_freq_base: float | None
    rope_freq_scale: float | None
    yarn_orig_ctx: int | None
    yarn_ext_factor: float | None
    yarn_attn_factor: float
    yarn_beta_slow: float
    yarn_beta_fast: float


_OVERRIDE = re.compile(r"([^=]+)=(int|float|bool|str):(.*)", re.DOTALL)
_NO_DEVICE = "everything is computed on this processor"
_ONE_SEQUENCE = "one sequence is made"


def key_override() -> Value:
    """Make a metadata key with a type and a value."""
    expected = "KEY=TYPE:VALUE with one of the types int, float, bool and str"

    def value_of(kind: str, written: str) -> Any:
        if kind == "str":
            return written
        if kind == "bool":
            return {"true": True, "false": False}[written]
        return int(written) if kind == "int" else float(written)

    def convert(argument: str) -> tuple[tuple[str, Any], str]:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            raise ValueError(expected)
        key, kind, written = match.groups()
        try:
            return (key, value_of(kind, written)), ""
        except (ValueError, KeyError):
            raise ValueError(f"{expected}, and {written!r} is no {kind}") from None

    return Value("KEY=TYPE:VALUE", convert)


def _parts() -> Value:
    def convert(argument: str) -> tuple[list[float], str]:
        return [leading_float(part)[0] for part in re.split("[,/]+", argument)], ""

    return Value("SPLIT", convert)


def _without_effect(spellings: tuple[str, ...], why: str, *values: Value) -> Option:
    """Make the row of an option that is accepted and does nothing here; a run says so."""
    line = f"{spellings[-1]} has no effect: {why}"
    return Option(spellings, "without_effect", f"accepted, without effect: {why}", values,
                  constant=line, make=lambda *_: line, repeat=True, shown_default="")  # fmt: skip


MODEL = in_group(
    "model",
    Option(("--override-kv",), "overrides",
           "metadata instead of the model's; may be repeated, the first of a key counts",
           (key_override(),), repeat=True),
    Option(("--lora",), "adapters",
           "apply an adapter: .bin, GGUF or PEFT, told apart by content; may be repeated",
           (text("FNAME"),), repeat=True, make=lambda name: (name, 1.0)),
    Option(("--lora-scaled",), "adapters", "apply an adapter with a scale; may be repeated",
           (text("FNAME"), real("S")), repeat=True),
    Option(("--lora-base",), "lora_base",
           "accepted, not needed: adapters stand beside the weights and are not rounded",
           (text("FNAME"),), default="", shown_default=""),
    Option(("--control-vector",), "control_vectors", "add a control vector; may be repeated",
           (text("FNAME"),), repeat=True, make=lambda name: (name, 1.0)),
    Option(("--control-vector-scaled",), "control_vectors",
           "add a control vector with a scale; may be repeated", (text("FNAME"), real("S")),
           repeat=True),
    Option(("--control-vector-layer-range",), "control_layers",
           "first and last layer that control vectors steer, from 1 on; 0: all",
           (whole("A"), whole("B")), default=(0, 0), shown_default="all"),
)  # fmt: skip

CONTEXT = in_group(
    "context",
    Option(("-ctk", "--cache-type-k"), "cache_type_k", "how keys are kept",
           (choice(*CACHE_TYPES),), default="f16"),
    Option(("-ctv", "--cache-type-v"), "cache_type_v", "how values are kept",
           (choice(*CACHE_TYPES),), default="f16"),
    Option(("-fa", "--flash-attn"), "flash_attention",
           "make the context a multiple of 256; attention never holds all scores anyway",
           default=False),
    Option(("-gan", "--grp-attn-n"), "group_factor",
           "Self-Extend: positions that become one as the text grows; 1: off", (whole(low=1),),
           default=1),
    Option(("-gaw", "--grp-attn-w"), "group_width",
           "Self-Extend: positions that are grouped together", (whole(low=1),), default=512),
    Option(("--rope-scaling",), "rope_scaling", "how RoPE's angles are stretched",
           (choice("none", "linear", "yarn"),), shown_default="the model's"),
    Option(("--rope-scale",), "rope_freq_scale", "stretch the context to N times its length",
           (real(above=0),), make=lambda n: 1 / n if n else None, shown_default="the model's"),
    Option(("--rope-freq-scale",), "rope_freq_scale", "factor on RoPE's angles; 0: the model's",
           (real(low=0),), make=lambda n: n or None, shown_default="the model's"),
    Option(("--rope-freq-base",), "rope_freq_base", "base of RoPE's frequencies; 0: the model's",
           (real(low=0),), make=lambda n: n or None, shown_default="the model's"),
    Option(("--yarn-orig-ctx",), "yarn_orig_ctx",
           "YaRN: context that the model was trained on before it was stretched; 0: the model's",
           (whole(low=0),), make=lambda n: n or None, shown_default="the model's"),
    Option(("--yarn-ext-factor",), "yarn_ext_factor",
           "YaRN: how much of its mixture is taken; below 0: all of it with yarn, else none",
           (real(),), make=lambda n: None if n < 0 else n, shown_default="-1"),
    Option(("--yarn-attn-factor",), "yarn_attn_factor",
           "factor on the magnitude of rotated queries and keys", (real(),), default=1.0),
    Option(("--yarn-beta-slow",), "yarn_beta_slow",
           "YaRN: turns over the original context up to which angles are stretched",
           (real(above=0),), default=1.0),
    Option(("--yarn-beta-fast",), "yarn_beta_fast",
           "YaRN: turns over the original context from which angles are kept", (real(above=0),),
           default=32.0),
)  # fmt: skip

ACCEPTED = in_group(
    "accepted, without effect",
    Option(("-ngl", "--gpu-layers", "--n-gpu-layers"), "gpu_layers",
           "accepted with a warning, without effect", (whole(),), default=-1, shown_default=""),
    _without_effect(("-sm", "--split-mode"), _NO_DEVICE, choice("none", "layer", "row")),
    _without_effect(("-ts", "--tensor-split"), _NO_DEVICE, _parts()),
    _without_effect(("-mg", "--main-gpu"), _NO_DEVICE, whole("I")),
    _without_effect(("-nkvo", "--no-kv-offload"), _NO_DEVICE),
    _without_effect(("-dt", "--defrag-thold"), "the cache has no gaps", real()),
    _without_effect(("-np", "--parallel"), _ONE_SEQUENCE, whole()),
    _without_effect(("-ns", "--sequences"), _ONE_SEQUENCE, whole()),
    _without_effect(("-cb", "--cont-batching"), _ONE_SEQUENCE),
    _without_effect(("-pps",), _ONE_SEQUENCE),
)  # fmt: skip
