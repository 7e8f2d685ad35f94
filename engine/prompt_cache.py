"""A file of keys and values, so that a prompt met before is not evaluated again.

Layout, little-endian: magic; u32, the length of a header in JSON; the header; token ids (i32); then
the bytes of the first `rows` rows of each layer's keys and values. There are as many tokens as the
text has, and at most as many rows: what follows the rows has to be evaluated.

Rows are of use only where evaluating the same tokens would give the same. The header has a digest
of each thing that decides this, by a name that a message can tell.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError, EngineError, FormatError
from engine.gguf import GGUFFile, atomic_write
from engine.model import Context

MAGIC = b"cylora prompt 1\n"
# What llama.cpp's own files of this kind begin with.
_FOREIGN = b"nsgg"
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 1 << 16

# Bytes of a tensor that its digest looks at, at each of its ends and in the middle: reading every
# weight of a large model would take longer than the prompt.
_SAMPLE = 512


class UnusableCacheError(EngineError):
    """A prompt cache that does not fit; its text says why. It may be written anew."""


class PromptCache:
    """A text whose keys and values are in a file.

    Attributes
    ----------
    tokens : list of int
        The whole text.
    n_rows : int
        Tokens at its beginning whose keys and values are there.
    """

    def __init__(self, tokens: list[int], n_rows: int, parts: Sequence[NDArray[np.uint8]]) -> None:
        self.tokens = tokens
        self.n_rows = n_rows
        self._parts = parts

    def common(self, tokens: Sequence[int]) -> int:
        """Count the tokens with which another text begins like this one."""
        pairs = zip(self.tokens, tokens, strict=False)
        return next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(self.tokens), len(tokens)),
        )

    def restore(self, context: Context, n_rows: int) -> None:
        """Put the first `n_rows` rows into an empty context, as if it had evaluated the tokens."""
        if context.n_past or n_rows > self.n_rows:
            raise DataError(f"{n_rows} positions cannot be restored after {context.n_past}")
        for target, source in zip(context.cache.rows(n_rows), self._parts, strict=True):
            target[:] = source[: len(target)]
        context.cache.append(n_rows)


class PromptCacheFile:
    """Where the text of a context is kept between runs.

    Parameters
    ----------
    path : Path
    context : Context
        As it is now: a later change of an adapter's scale does not change what the file fits.
    """

    def __init__(self, path: Path, context: Context) -> None:
        self.path = path
        self._context = context
        self._fits = _signature(context)

    def load(self) -> PromptCache:
        """Read what was written for the same model, adapters and types.

        Raises
        ------
        UnusableCacheError
            If it is a cache of another model or version, or damaged.
        FormatError
            If the file is something else, which must not be overwritten.
        OSError
            If it cannot be read; also if there is none.
        """
        path, content = self.path, np.fromfile(self.path, np.uint8)
        start = content[: len(MAGIC)].tobytes()
        if not start:
            raise UnusableCacheError(f"{path}: is empty")
        if start[: len(_FOREIGN)] == _FOREIGN:
            raise UnusableCacheError(f"{path}: is a cache of another program")
        if start != MAGIC:
            raise FormatError(f"{path}: is no prompt cache; give another name to --prompt-cache")
        header, at = _header(path, content)
        found = header.get("fits")
        if not isinstance(found, dict):
            raise _damaged(path)
        for name, wanted in self._fits.items():
            if found.get(name) != wanted:
                raise UnusableCacheError(f"{path}: is of another {name}")
        return self._parts(header, content[at:])

    def _parts(self, header: dict[str, Any], content: NDArray[np.uint8]) -> PromptCache:
        n_tokens, n_rows = header.get("tokens"), header.get("rows")
        if type(n_tokens) is not int or type(n_rows) is not int or not 0 <= n_rows <= n_tokens:
            raise _damaged(self.path)
        sizes = [len(part) for part in self._context.cache.rows(1)]
        if len(content) != 4 * n_tokens + n_rows * sum(sizes):
            raise _damaged(self.path)
        tokens = np.frombuffer(content[: 4 * n_tokens].tobytes(), "<i4").tolist()
        if any(not 0 <= token < self._context.model.hparams.n_vocab for token in tokens):
            raise _damaged(self.path)
        ends = np.cumsum([4 * n_tokens, *(n_rows * size for size in sizes)])
        return PromptCache(tokens, n_rows, np.split(content, ends)[1:-1])

    def save(self, tokens: Sequence[int], n_rows: int) -> None:
        """Write a text and the keys and values of its beginning, in one go or not at all.

        Parameters
        ----------
        tokens : sequence of int
        n_rows : int
            Tokens at the beginning whose keys and values the context holds as if they had been
            evaluated from the start.

        Raises
        ------
        EngineError
            If the file cannot be written; names it.
        """
        numbers = {"fits": self._fits, "tokens": len(tokens), "rows": n_rows}
        header = json.dumps(numbers).encode()
        with atomic_write(self.path) as file:
            file.write(MAGIC + _LENGTH.pack(len(header)) + header)
            file.write(np.asarray(tokens, "<i4").tobytes())
            for part in self._context.cache.rows(n_rows):
                file.write(part.data)


def _header(path: Path, content: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    """Read the header and where it ends."""
    at = len(MAGIC) + _LENGTH.size
    if len(content) < at:
        raise _damaged(path)
    (length,) = _LENGTH.unpack(content[len(MAGIC) : at].tobytes())
    if length > min(_LONGEST_HEADER, len(content) - at):
        raise _damaged(path)
    try:
        header = json.loads(content[at : at + length].tobytes())
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(header, dict):
        raise _damaged(path)
    return header, at + length


def _damaged(path: Path) -> UnusableCacheError:
    return UnusableCacheError(f"{path}: is cut off or damaged")


def _signature(context: Context) -> dict[str, str]:
    """Tell what decides the keys and values of a text, in the words of a message."""
    cache, model = context.cache, context.model
    adapters = context.adapters
    return {
        "model": _model_digest(model.file),
        "shape or rotation": _digest([repr(model.hparams).encode()]),
        "adapter or scale": _digest(
            part for name in sorted(adapters) for part in (name.encode(), *_bytes(adapters[name]))
        ),
        "control vector": _digest(
            part
            for layer, direction in sorted(context.directions.items())
            for part in (str(layer).encode(), direction.numpy().tobytes())
        ),
        "type of cache": f"{cache.key_type.name} {cache.value_type.name}",
    }


def _bytes(adapter: Any) -> Iterable[bytes]:
    yield from (factor.numpy().tobytes() for factor in (adapter.a, adapter.b))
    yield repr(adapter.scale).encode()


def _model_digest(file: GGUFFile) -> str:
    def parts() -> Iterable[Any]:
        yield file.header
        for name in file.tensors:
            data = file.data(name)
            middle = len(data) // 2
            yield data[:_SAMPLE]
            yield data[middle : middle + _SAMPLE]
            yield data[-_SAMPLE:]

    return _digest(parts())


def _digest(parts: Iterable[Any]) -> str:
    total = blake2b(digest_size=16)
    for part in parts:
        total.update(part)
    return total.hexdigest()
