"""Folders as publishers of llama models make them, to GGUF files.

```
config.json ──────────────► config.py ────────► keys of the architecture, divisors of angles
tokenizer.model / .json ──► vocab.py ─────────► keys of the tokenizer
   its patterns               pretokenizer.py     (their name)
   added tokens, template     special.py
*.safetensors, index ─────► folder.py ──► tensors.py ──► stored tensors, a piece at a time
```

Nothing is downloaded, and no model library is used: a folder is JSON and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.convert.config import Config, Key, config_keys, read_config, rope_divisors
from engine.convert.folder import read_sources
from engine.convert.tensors import Planned, choose_type, plan_tensors, stored_parts
from engine.convert.vocab import vocabulary_keys
from engine.dtypes import BF16, F16, F32, Q8_0, DType
from engine.errors import EngineError
from engine.gguf import ValueType, write_gguf
from engine.tokenizer import Tokenizer

OUTTYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
_FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, BF16: 32}
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True, slots=True)
class Conversion:
    """A folder that was read and found sound: what its GGUF file will hold.

    Attributes
    ----------
    config : Config
    dtype : DType
        Of the matrices.
    keys : list of (name, type, value)
    tensors : list of Planned
        Empty where only the vocabulary is wanted.
    warnings : list of str
    """

    folder: Path
    config: Config
    dtype: DType
    keys: list[Key]
    tensors: list[Planned]
    warnings: list[str] = field(default_factory=list)

    @property
    def outtype(self) -> str:
        """Name of the type, as options spell it."""
        return next(name for name, dtype in OUTTYPES.items() if dtype is self.dtype)

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors to write."""
        return sum(_n_bytes(tensor.shape, tensor.dtype) for tensor in self.tensors)

    def outfile(self, pattern: str = "") -> Path:
        """Name of the file to write: `pattern` with ``{ftype}`` replaced; the original's default.

        Raises
        ------
        EngineError
            If that is a file of the folder, which would be lost.
        """
        name = pattern or str(self.folder / "ggml-model-{ftype}.gguf")
        path = Path(name.replace("{ftype}", self.outtype))
        if path.is_dir():
            path /= f"ggml-model-{self.outtype}.gguf"
        inside = path.resolve().parent == self.folder.resolve()
        if inside and path.exists() and path.suffix != ".gguf":
            raise EngineError(f"{path}: is a file of the folder; choose another name")
        return path

    def write(self, path: Path, progress: Callable[[int], None] = lambda _n: None) -> None:
        """Write the file, beside and then renamed; a piece of a tensor is in memory at a time.

        Parameters
        ----------
        progress : callable
            Told the bytes of each piece.

        Raises
        ------
        EngineError
            If a value does not fit, or the file cannot be written; the former one is whole then.
        """

        def parts(tensor: Planned) -> Iterator[Any]:
            for piece in stored_parts(tensor):
                yield piece
                progress(piece.nbytes)

        entries: list[tuple[str, DType, tuple[int, ...], Any]] = []
        divisors = rope_divisors(self.config)
        if divisors is not None and self.tensors:
            entries.append(("rope_freqs.weight", F32, divisors.shape, divisors))
        for tensor in self.tensors:
            entries.append(
                (tensor.name, tensor.dtype, tensor.shape, lambda tensor=tensor: parts(tensor))
            )
        write_gguf(path, self.keys, entries)


def read_folder(
    folder: Path, outtype: str = "auto", *, name: str = "", vocab_only: bool = False
) -> Conversion:
    """Read a publisher's folder and plan its GGUF file; no tensor is read yet.

    Parameters
    ----------
    outtype : str
        A key of `OUTTYPES`; ``auto`` is bf16 for bf16 folders, f16 for others.
    name : str
        ``general.name``; the folder's own when empty.
    vocab_only : bool
        Plan no tensors.

    Raises
    ------
    EngineError
        Naming the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise EngineError(f"{folder}: is no folder; give the folder of a published model")
    config = read_config(folder)
    warnings = list(config.warnings)
    # A vocabulary may come without weights.
    sources = {} if vocab_only else read_sources(folder)
    dtype = choose_type(sources) if outtype == "auto" else OUTTYPES[outtype]
    tensors = [] if vocab_only else plan_tensors(sources, config, dtype, warnings.append)
    keys: list[Key] = [
        ("general.architecture", ValueType.STRING, "llama"),
        ("general.type", ValueType.STRING, "model"),
        ("general.name", ValueType.STRING, name or folder.resolve().name),
        *config_keys(config),
        ("general.file_type", ValueType.U32, _FILE_TYPES[dtype]),
        ("general.quantization_version", ValueType.U32, _QUANTIZATION_VERSION),
        *vocabulary_keys(folder, config, warnings.append),
    ]
    _try_tokenizer(folder, keys)
    return Conversion(folder, config, dtype, keys, tensors, warnings)


def _try_tokenizer(folder: Path, keys: list[Key]) -> None:
    """Make the tokenizer that the file will describe: what is wrong shows now, not when it runs."""
    read = {
        name: np.asarray(value, np.float32 if kind[1] is ValueType.F32 else np.int32)
        if isinstance(kind, tuple) and kind[1] is not ValueType.STRING
        else [text.encode() for text in value]
        if isinstance(kind, tuple)
        else value
        for name, kind, value in keys
    }
    Tokenizer.from_metadata(read, str(folder))


def _n_bytes(shape: tuple[int, ...], dtype: DType) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows * dtype.row_bytes(shape[-1])
