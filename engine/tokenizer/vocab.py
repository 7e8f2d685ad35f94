"""A vocabulary as the metadata of a model file gives it, checked before anything uses it.

Everything here distrusts the file: lengths, element types, ids and spellings are looked at once, so
that the algorithms may index without asking.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from engine.errors import FormatError

MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"

# What other models' names stand for, so that a refusal says more than a word.
REFUSED_MODELS = {
    "bert": "WordPiece",
    "t5": "unigram",
    "rwkv": "RWKV",
    "plamo2": "PLaMo-2",
    "gemma4": "Gemma 4",
}

# Ids that keys may name; the defaults are those of the two algorithms, −1 is none.
ID_NAMES = ("bos", "eos", "unknown", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "gpt2": {"bos": 11, "eos": 11},
}

_BYTE_TEXT = re.compile(rb"<0x[0-9A-Fa-f]{2}>")


class TokenType(IntEnum):
    """Kinds of tokens, numbered as in files."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Texts, kinds and special ids of a model's tokens.

    Attributes
    ----------
    source : str
        Name of the file, for messages.
    model : str
        ``"llama"`` (SPM) or ``"gpt2"`` (BPE).
    pre : str
        Name of BPE's pre-tokenizer.
    texts : list of bytes
        Text of each token as stored; the place is the id. Not always valid UTF-8.
    ids : dict
        Text to id; empty texts are left out.
    types : ndarray of shape (n_vocab,), int8
        `TokenType` of each token; numbers that have no meaning become ``UNDEFINED``.
    scores : ndarray of shape (n_vocab,), float32
        SPM's scores; empty for BPE.
    merges : list of bytes
        BPE's merges by rank, left and right side separated by a space; empty for SPM.
    special_ids : dict
        Id of each of `ID_NAMES`, −1 where there is none.
    add_bos, add_eos, add_space_prefix : bool or None
        The keys' values; None where the key is absent.
    strip_right : bool
        White space after a special token is dropped (the Phi-3 family).
    warnings : tuple of str
        What was ignored or assumed, one line each.
    """

    source: str
    model: str
    pre: str
    texts: list[bytes]
    ids: dict[bytes, int]
    types: np.ndarray
    scores: np.ndarray
    merges: list[bytes]
    special_ids: dict[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    strip_right: bool
    warnings: tuple[str, ...]

    def ids_of_type(self, *types: TokenType) -> list[int]:
        """Ids of the tokens of the given kinds, ascending."""
        return np.flatnonzero(np.isin(self.types, types)).tolist()


def read_vocabulary(metadata: Mapping[str, Any], source: str) -> Vocabulary:
    """Take the vocabulary out of a file's metadata.

    Parameters
    ----------
    metadata : mapping
        Key to value as `engine.gguf` reads them: string arrays are lists of bytes, numeric arrays
        are one-dimensional ndarrays.
    source : str
        Name of the file, for messages.

    Raises
    ------
    FormatError
        If a key is missing, has the wrong type, or contradicts another; names file and key.
    """
    keys = _Keys(metadata, source)
    model = _read_model(keys)
    texts, ids = _read_texts(keys)
    types = _read_types(keys, texts)
    is_spm = model == "llama"
    return Vocabulary(
        source=source,
        model=model,
        pre="" if is_spm else _read_pre(keys),
        texts=texts,
        ids=ids,
        types=types,
        scores=_read_scores(keys, len(texts)) if is_spm else np.empty(0, np.float32),
        merges=[] if is_spm else _read_merges(keys),
        special_ids=_read_special_ids(keys, model, len(texts)),
        add_bos=keys.flag(ADD_BOS),
        add_eos=keys.flag(ADD_EOS),
        add_space_prefix=keys.flag(ADD_SPACE_PREFIX),
        strip_right=_is_phi3(metadata),
        warnings=tuple(keys.warnings),
    )


def quoted(value: object) -> str:
    """Show an untrusted value inside a one-line message: escaped, and cut when long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} …"


class _Keys:
    """Typed access to metadata, and the warnings met on the way."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source
        self.warnings: list[str] = []

    def error(self, key: str, reason: str) -> FormatError:
        return FormatError(f"{self.source}: {key}: {reason}")

    def warn(self, key: str, reason: str) -> None:
        self.warnings.append(f"{self.source}: {key}: {reason}")

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, f"a string is needed, not {_kind(value)}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, f"a bool is needed, not {_kind(value)}")
        return value

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.error(key, f"an integer is needed, not {_kind(value)}")
        return value

    def strings(self, key: str) -> list[bytes]:
        value = self.metadata.get(key)
        if value is None:
            raise self.error(key, "missing; the file is no complete model")
        if not isinstance(value, list) or not set(map(type, value)) <= {bytes}:
            raise self.error(key, f"an array of strings is needed, not {_kind(value)}")
        return value

    def numbers(self, key: str, kinds: str, wanted: str, at_least: int) -> np.ndarray | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        is_array = isinstance(value, np.ndarray) and value.ndim == 1
        if not is_array or value.dtype.kind not in kinds:
            raise self.error(key, f"an array of {wanted} is needed, not {_kind(value)}")
        if len(value) < at_least:
            raise self.error(key, f"{len(value)} entries for {at_least} tokens")
        return value[:at_least]


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list):
        return "an array of strings"
    return f"{type(value).__name__} {quoted(value)}"


def _read_model(keys: _Keys) -> str:
    model = keys.text(MODEL)
    if model is None:
        raise keys.error(MODEL, "missing; the file carries no tokenizer")
    if model not in DEFAULT_IDS:
        kind = REFUSED_MODELS.get(model)
        name = f"{quoted(model)} ({kind})" if kind else quoted(model)
        raise keys.error(MODEL, f"{name} is not supported; only 'llama' (SPM) and 'gpt2' (BPE) are")
    return model


def _read_pre(keys: _Keys) -> str:
    pre = keys.text(PRE)
    if not pre:
        keys.warn(PRE, "missing, 'default' is used and results get worse; convert the model again")
        return "default"
    return pre


def _read_texts(keys: _Keys) -> tuple[list[bytes], dict[bytes, int]]:
    texts = keys.strings(TOKENS)
    if not texts:
        raise keys.error(TOKENS, "the vocabulary is empty")
    ids = dict(zip(texts, range(len(texts)), strict=True))
    n_empty = texts.count(b"")
    ids.pop(b"", None)
    if len(ids) + n_empty != len(texts):
        # The dict holds the last id of each text: the first that differs is a duplicate.
        first = next(i for i, text in enumerate(texts) if text and ids[text] != i)
        again = texts.index(texts[first], first + 1)
        text = quoted(texts[first])
        raise keys.error(TOKENS, f"tokens {first} and {again} have the same text {text}")
    return texts, ids


def _read_types(keys: _Keys, texts: list[bytes]) -> np.ndarray:
    stored = keys.numbers(TYPES, "iu", "integers", len(texts))
    if stored is None:
        return np.full(len(texts), TokenType.NORMAL, np.int8)
    known = (stored >= TokenType.UNDEFINED) & (stored <= TokenType.BYTE)
    types = np.where(known, stored, TokenType.UNDEFINED).astype(np.int8)
    for token in np.flatnonzero(types == TokenType.BYTE).tolist():
        if not _BYTE_TEXT.fullmatch(texts[token]):
            text = quoted(texts[token])
            raise keys.error(TOKENS, f"token {token} is a byte but is spelled {text}, not <0xXX>")
    return types


def _read_scores(keys: _Keys, n_vocab: int) -> np.ndarray:
    stored = keys.numbers(SCORES, "fiu", "numbers", n_vocab)
    if stored is None:
        keys.warn(SCORES, "missing, every score is taken as 0; convert the model again")
        return np.zeros(n_vocab, np.float32)
    scores = stored.astype(np.float32)
    if np.isnan(scores).any():
        raise keys.error(SCORES, f"the score of token {int(np.isnan(scores).argmax())} is NaN")
    return scores


def _read_merges(keys: _Keys) -> list[bytes]:
    merges = keys.strings(MERGES)
    # The separator is the first space after the first byte: a left side is never empty.
    for rank, merge in enumerate(merges):
        if merge.find(b" ", 1) < 0:
            raise keys.error(MERGES, f"merge {rank} is {quoted(merge)}, without a space inside")
    return merges


def _read_special_ids(keys: _Keys, model: str, n_vocab: int) -> dict[str, int]:
    found = {}
    for name in ID_NAMES:
        default = DEFAULT_IDS[model].get(name, -1)
        default = default if default < n_vocab else -1
        key = f"tokenizer.ggml.{name}_token_id"
        token = keys.integer(key)
        if token is not None and not 0 <= token < n_vocab:
            instead = "none" if default < 0 else str(default)
            keys.warn(key, f"{token} is outside of the {n_vocab} tokens, ignored: {instead}")
            token = None
        found[name] = default if token is None else token
    return found


def _is_phi3(metadata: Mapping[str, Any]) -> bool:
    name = metadata.get("general.name")
    return isinstance(name, str) and re.search("phi-?3", name, re.IGNORECASE) is not None
