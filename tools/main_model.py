"""The model and the context that the options of `main`, or some of them, ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import OptionError, ShapeError

from .main_model_options import ModelOptions
from .main_options import MainOptions

if TYPE_CHECKING:
    from engine.lora import Adapter
    from engine.model import Context, Model
    from engine.rope import RopeOptions
    from engine.self_extend import GroupAttention
    from engine.tensor import Tensor

Log = Callable[[str], None]
Options = MainOptions | ModelOptions


def load_model(
    path: Path, options: Options, log: Log, *, mapped: bool = True, locked: bool = False
) -> Model:
    """Load the model with the metadata and the rotation that were asked for, and tell of it.

    Parameters
    ----------
    mapped : bool
        Map the file; else read it into memory.
    locked : bool
        Keep it in memory; told where the system does not let the process.
    """
    from engine.model import Model

    log(f"main: loading model from '{path}'")
    overrides: dict[str, int | float | bool | str] = {}
    for key, value in options.overrides:
        overrides.setdefault(key, value)
    for key, value in overrides.items():
        log(f"main: override: {key} = {value!r}")
    if options.rope_freq_base is not None:
        log(f"main: warning: changing RoPE frequency base to {options.rope_freq_base:g}.")
    if options.rope_freq_scale is not None:
        log(f"main: warning: scaling RoPE frequency by {options.rope_freq_scale:g}.")
    model = Model.load(
        path,
        check_tensors=options.check_tensors,
        mapped=mapped,
        rope=_rope_options(options),
        overrides=overrides,
    )
    for warning in model.warnings:
        log(f"warning: {warning}")
    problem = model.file.lock() if locked else ""
    if problem:
        log(
            f"warning: --mlock: the model cannot be kept in memory: {problem}; "
            "raise the limit of locked memory (ulimit -l)"
        )
    h = model.hparams
    log(
        f"main: model: {h.n_layer} layers, n_embd = {h.n_embd}, n_head = {h.n_head}, "
        f"n_head_kv = {h.n_head_kv}, n_vocab = {h.n_vocab}, n_ctx_train = {h.n_ctx_train}"
    )
    return model


def context_size(model: Model, options: Options, log: Log) -> int:
    """Choose the size of the context as the original does."""
    from engine.generate import SMALLEST_CONTEXT, context_size

    wanted, trained = options.n_ctx, model.hparams.n_ctx_train
    if 0 < wanted < SMALLEST_CONTEXT:
        log(f"main: warning: minimum context size is {SMALLEST_CONTEXT}, using minimum size.")
    n_ctx = context_size(wanted, trained, flash=options.flash_attention)
    if n_ctx > trained and wanted:
        log(
            f"main: warning: model was trained on only {trained} context tokens ({n_ctx} specified)"
        )
    return n_ctx


def make_context(
    model: Model,
    n_ctx: int,
    threads: tuple[int, int],
    options: Options,
    log: Log,
    *,
    measure: bool = False,
) -> Context:
    """Load what is applied beside the model and make a context with all of it.

    Parameters
    ----------
    threads : (int, int)
        For single tokens, and for longer chunks.
    measure : bool
        Count the time of each op.
    """
    from engine.dtypes import CACHE_TYPES
    from engine.model import Context

    return Context(
        model,
        n_ctx,
        n_batch=options.n_batch,
        n_ubatch=options.n_ubatch,
        n_threads=threads[0],
        n_threads_batch=threads[1],
        adapters=_load_adapters(model, options, log),
        bf16=options.bf16,
        cache_types=(CACHE_TYPES[options.cache_type_k], CACHE_TYPES[options.cache_type_v]),
        group=_group(model, options, log),
        directions=_load_directions(model, options, log),
        measure=measure,
    )


def _rope_options(options: Options) -> RopeOptions:
    from engine.rope import RopeOptions

    return RopeOptions(
        scaling=options.rope_scaling,
        freq_base=options.rope_freq_base,
        freq_scale=options.rope_freq_scale,
        original_context=options.yarn_orig_ctx,
        ext_factor=options.yarn_ext_factor,
        attn_factor=options.yarn_attn_factor,
        beta_fast=options.yarn_beta_fast,
        beta_slow=options.yarn_beta_slow,
    )


def _load_adapters(model: Model, options: Options, log: Log) -> list[tuple[Adapter, float]]:
    from engine.lora import KINDS, BaseInfo, check_fits, read_adapter

    if options.lora_base:
        log(
            "main: warning: --lora-base is not needed: adapters are applied beside the weights, "
            "not rounded into them"
        )
    shapes = model.adapter_shapes(dict.fromkeys(KINDS, 1))
    adapters = []
    for name, scale in options.adapters:
        adapter = read_adapter(name, BaseInfo.of(model))
        check_fits(adapter, shapes)
        n = len(adapter.pairs)
        n_all = n + len(adapter.unused)
        log(f"main: lora: '{name}': scale {scale:g}, applied {n} of {n_all} tensors")
        adapters.append((adapter, scale))
    return adapters


def _group(model: Model, options: Options, log: Log) -> GroupAttention | None:
    from engine.self_extend import GroupAttention

    factor, width = options.group_factor, options.group_width
    if factor == 1:
        return None
    log(
        f"self-extend: n_ctx_train = {model.hparams.n_ctx_train}, grp_attn_n = {factor}, "
        f"grp_attn_w = {width}"
    )
    try:
        return GroupAttention(factor, width)
    except ShapeError as error:
        raise OptionError(f"--grp-attn-w: {error}") from None


def _load_directions(model: Model, options: Options, log: Log) -> Mapping[int, Tensor]:
    from engine.control_vector import read_control_vector, sum_directions

    n_layer = model.hparams.n_layer
    first, last = options.control_layers
    steered = range(max(first, 1), min(last, n_layer - 1) + 1 if last > 0 else n_layer)
    vectors = []
    for name, scale in options.control_vectors:
        directions = read_control_vector(name)
        n = sum(layer in steered for layer in directions)
        log(
            f"main: control vector: '{name}': scale {scale:g}, applied {n} of "
            f"{len(directions)} directions"
        )
        vectors.append((name, directions, scale))
    return sum_directions(vectors, model.hparams.n_embd, steered)
