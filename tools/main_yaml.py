"""The record of a run of `main` in a folder: what was asked for, made and measured, as YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError

from .console import note, version_line
from .main_options import MainOptions

if TYPE_CHECKING:
    from engine.generate import Generation


def write_record(
    folder: Path,
    options: MainOptions,
    facts: Mapping[str, Any],
    prompt: Sequence[int],
    made: Sequence[int],
    output: bytes,
    generation: Generation,
) -> None:
    """Write the record of a run; a folder that cannot be written is told and no reason to fail.

    Parameters
    ----------
    folder : Path
        Made if there is none.
    facts : mapping
        What the options do not say: seed, threads, context.
    prompt, made : sequence of int
        Tokens.
    output : bytes
        Text of `made`.
    """
    from engine.gguf_write import atomic_write

    now = datetime.now()
    timings = generation.timings
    given = {name: getattr(options, name) for name in sorted(options.given)}
    record = {
        "binary": "main",
        "version": version_line(),
        "time": now.isoformat(),
        "model": options.model,
        **facts,
        "options": given,
        "prompt_tokens": list(prompt),
        "output": output.decode("utf-8", "replace"),
        "output_tokens": list(made),
        "n_eval": timings.evaluation.count,
        "n_p_eval": timings.prompt.count,
        "n_sample": timings.sampling.count,
        "t_eval_us": round(timings.evaluation.seconds * 1e6),
        "t_p_eval_us": round(timings.prompt.seconds * 1e6),
        "t_sample_us": round(timings.sampling.seconds * 1e6),
    }
    path = folder / f"{now:%Y_%m_%d-%H_%M_%S}.{now.microsecond:06d}000.yml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            for name, value in record.items():
                # JSON is YAML, and quotes whatever needs it.
                file.write(f"{name}: {json.dumps(value, default=str)}\n".encode())
    except (OSError, EngineError) as error:
        note(f"warning: --logdir: {error}")
