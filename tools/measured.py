"""What the commands that measure share: the model, the text's tokens, a context with adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.locate import locate_model

from .console import note

if TYPE_CHECKING:
    from engine.lora import Adapter
    from engine.model import Context, Model

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Computing:
    """How a model is computed: what of the options a context takes."""

    n_batch: int
    n_ubatch: int
    threads: tuple[int, int]
    bf16: str


def make_log(program: str, enabled: bool) -> Log:
    """Give a function that writes lines to standard error under the command's name, if wanted."""

    def log(line: str) -> None:
        if enabled:
            note(f"{program}: {line.removeprefix('main: ')}")  # what loads models is main's

    return log


def load_model(name: str, log: Log, *, check_tensors: bool = False) -> Model:
    """Load a model by its path or package, and tell of it."""
    from engine.model import Model

    path = locate_model(name)
    log(f"loading model from '{path}'")
    model = Model.load(path, check_tensors=check_tensors)
    for warning in model.warnings:
        log(f"warning: {warning}")
    return model


def text_tokens(model: Model, text: bytes, log: Log) -> list[int]:
    """Tokenize a text, plain, with the BOS where the model wants one and without the EOS."""
    log("tokenizing the input ..")
    began = time.perf_counter()
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(text, add_special=True, parse_special=False)
    if tokenizer.add_eos and tokens and tokens[-1] == tokenizer.eos_id:
        tokens = tokens[:-1]
    log(f"tokenization took {(time.perf_counter() - began) * 1e3:g} ms")
    return tokens


def window_bos(model: Model) -> int | None:
    """Token at the head of each window, where the model's texts begin with one."""
    tokenizer = model.tokenizer
    return tokenizer.bos_id if tokenizer.declares_bos else None


def warn_of_length(model: Model, n_ctx: int, log: Log) -> None:
    """Tell when windows are longer than what the model was trained on."""
    trained = model.hparams.n_ctx_train
    if n_ctx > trained:
        log(f"warning: model was trained on only {trained} context tokens ({n_ctx} specified)")


def make_context(
    model: Model,
    n_ctx: int,
    computing: Computing,
    adapters: Sequence[tuple[str, float]],
    log: Log,
) -> Context:
    """Load the adapters and make a context in which they are applied."""
    from engine.model import Context

    warn_of_length(model, n_ctx, log)
    return Context(
        model,
        n_ctx,
        n_batch=computing.n_batch,
        n_ubatch=computing.n_ubatch,
        n_threads=computing.threads[0],
        n_threads_batch=computing.threads[1],
        adapters=load_adapters(model, adapters, log),
        bf16=computing.bf16,
    )


def load_adapters(
    model: Model, named: Sequence[tuple[str, float]], log: Log
) -> list[tuple[Adapter, float]]:
    """Read adapters, each with its scale, and see that they fit the model."""
    from engine.lora import KINDS, BaseInfo, check_fits, read_adapter

    shapes = model.adapter_shapes(dict.fromkeys(KINDS, 1))
    adapters = []
    for name, scale in named:
        adapter = read_adapter(name, BaseInfo.of(model))
        check_fits(adapter, shapes)
        n = len(adapter.pairs)
        log(f"lora: '{name}': scale {scale:g}, applied {n} of {n + len(adapter.unused)} tensors")
        adapters.append((adapter, scale))
    return adapters


def time_to_go(seconds: float, passes: int) -> str:
    """Write how long one pass took and how long all will take."""
    whole = seconds * passes
    hours, rest = divmod(int(whole), 3600)
    ahead = f"{hours} hours " if hours else ""
    return f"{seconds:.2f} seconds per pass - ETA {ahead}{rest / 60:.2f} minutes"
