"""Which form a file has: told by its content when reading, by its name when writing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from engine.errors import FormatError
from engine.gguf_write import MAGIC as GGUF_MAGIC
from engine.lora.adapter import Adapter, AdapterShape, BaseInfo, Factors, join_factors
from engine.lora.bin_form import BIN_MAGIC, bin_refusals, read_bin
from engine.lora.gguf_form import gguf_refusals, read_gguf_adapter, write_gguf_adapter
from engine.lora.peft_form import peft_refusals, read_peft, write_peft
from engine.safetensors import looks_like_safetensors

FORMS = ("bin", "gguf", "peft")


def read_adapter(path: Path | str, base: BaseInfo | None = None) -> Adapter:
    """Read an adapter, whatever its form.

    Parameters
    ----------
    path : path of a ``.bin`` or GGUF file, of a PEFT folder, or of a safetensors file in one
    base : BaseInfo, optional
        The model that it is for; the PEFT form cannot be read without.

    Raises
    ------
    FormatError
        If the file is of an unknown form, or contradicts itself; names the file, the tensor and
        the reason.
    EngineError
        If it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return read_peft(path, _needed(base, path))
    try:
        n_bytes = path.stat().st_size
        if not path.is_file():
            raise FormatError(f"{path}: is not a regular file; give an adapter")
        with path.open("rb") as file:
            head = file.read(9)
            if head[:4] == BIN_MAGIC:
                return _read_bin(head + file.read(), str(path))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head[:4] == GGUF_MAGIC:
        return read_gguf_adapter(path, base)
    if looks_like_safetensors(head, n_bytes):
        return read_peft(path, _needed(base, path))
    raise FormatError(
        f"{path}: not an adapter: begins with {head[:4]!r}, expected {BIN_MAGIC!r},"
        f" {GGUF_MAGIC!r} or safetensors"
    )


def form_of_path(path: Path | str) -> str:
    """Give the form that a name asks for: ``bin``, ``gguf`` or ``peft``.

    ``.gguf`` is the GGUF form; ``.safetensors``, a trailing slash (which only a str keeps) and an
    existing folder are PEFT's; every other name, and one that ends in ``.bin``, is the ``.bin``
    form's.
    """
    name = os.fspath(path)
    if name.endswith(".bin"):
        return "bin"
    if name.endswith(("/", os.sep, ".safetensors")) or Path(name).is_dir():
        return "peft"
    return "gguf" if name.endswith(".gguf") else "bin"


def refusals(
    shapes: Sequence[AdapterShape], form: str, base: BaseInfo | None, alpha: float = 1.0
) -> list[str]:
    """Say why a form cannot hold an adapter, before one is trained.

    Parameters
    ----------
    shapes : sequence of (name, n_in, n_out, rank)
        Of the adapter; those of rank 0 are left out of it.
    form : {"bin", "gguf", "peft"}
    base : BaseInfo
        None is enough for ``bin``.
    alpha : float

    Returns
    -------
    list of str
        A line for each reason, with the options of ``finetune`` that mend it. Empty: it can.
    """
    kept = [shape for shape in shapes if shape[3]]
    if form == "bin":
        return bin_refusals(alpha)
    if form == "gguf":
        return gguf_refusals(kept, _described(base, form), alpha)
    if form == "peft":
        return peft_refusals(kept, alpha)
    raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")


def write_adapter(
    adapter: Adapter, path: Path | str, base: BaseInfo | None = None, form: str | None = None
) -> None:
    """Write an adapter: beside the target, then renamed.

    Parameters
    ----------
    adapter : Adapter
    path : path of the file or folder
        In the PEFT form, a name that ends in ``.safetensors`` is the weights' file, with
        ``adapter_config.json`` beside it; any other is a folder, made where it is missing.
    base : BaseInfo
        The model that the adapter belongs to; None is enough for ``bin``.
    form : {"bin", "gguf", "peft"}, optional
        `form_of_path` when not given.

    Raises
    ------
    FormatError
        If the form cannot hold the adapter.
    EngineError
        If a file cannot be written; what was there is whole then.
    """
    form = form or form_of_path(path)
    problems = refusals(adapter.shapes, form, base, adapter.alpha)
    if problems:
        raise FormatError(f"{os.fspath(path)}: {'; '.join(problems)}")
    if form == "bin":
        adapter.write_bin(path)
    elif form == "gguf":
        write_gguf_adapter(adapter, path, _described(base, form))
    else:
        is_folder = not os.fspath(path).endswith(".safetensors") or Path(path).is_dir()
        write_peft(adapter, Path(path), _described(base, form), is_folder)


def _read_bin(content: bytes, source: str) -> Adapter:
    r, alpha, tensors = read_bin(content, source)
    found = {name: Factors(a.T, b.T) for name, (a, b) in tensors.items()}
    return join_factors(found, r, alpha, source)


def _needed(base: BaseInfo | None, path: Path) -> BaseInfo:
    if base is None:
        raise FormatError(f"{path}: the PEFT form can only be read for a model; give its BaseInfo")
    return base


def _described(base: BaseInfo | None, form: str) -> BaseInfo:
    if base is None:
        raise ValueError(f"the form {form} needs a description of the base model")
    return base
