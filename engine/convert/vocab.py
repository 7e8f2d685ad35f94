"""A publisher's tokenizer as GGUF keys: SentencePiece's tokenizer.model, or tokenizer.json.

tokenizer.json holds a BPE of one of two kinds. With byte fallback it was made from a SentencePiece
model, and its merges tell the order of that model's scores; byte-level ones keep their merges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.convert.config import Config, Key
from engine.convert.pretokenizer import recognise
from engine.convert.special import Added, Files, added_tokens, special_keys, template_keys
from engine.errors import EngineError, FormatError
from engine.gguf import ValueType
from engine.tokenizer.vocab import TokenType

Warn = Callable[[str], None]

PADDING_SCORE, ADDED_SCORE = -10000.0, -1000.0
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BLANK = "\u2581"  # SentencePiece's for a space
_STRINGS = (ValueType.ARRAY, ValueType.STRING)
_FLOATS = (ValueType.ARRAY, ValueType.F32)
_INTEGERS = (ValueType.ARRAY, ValueType.I32)


class _Table:
    """Texts, scores and types of the tokens; ids that nobody names are padding."""

    def __init__(self, n_vocab: int) -> None:
        self.texts = [f"[PAD{i}]" for i in range(n_vocab)]
        self.scores = [PADDING_SCORE] * n_vocab
        self.types = [TokenType.UNUSED] * n_vocab

    def put(self, token: int, text: str, score: float, kind: TokenType) -> None:
        self.texts[token], self.scores[token], self.types[token] = text, score, kind

    def add(self, added: Mapping[int, Added], where: Path, warn: Warn) -> None:
        """Let added tokens take their places."""
        n_vocab = len(self.texts)
        for token in added.values():
            if token.id >= n_vocab:
                warn(f"{where}: token {token.id} is left out: the model has {n_vocab}")
            elif token.text == self.texts[token.id] and self.types[token.id] in (
                TokenType.UNKNOWN,
                TokenType.BYTE,
            ):
                continue  # what the vocabulary says of these says more
            elif token.special:
                self.put(token.id, token.text, ADDED_SCORE, TokenType.CONTROL)
            else:
                text = token.text.replace(_BLANK, " ")
                self.put(token.id, text, ADDED_SCORE, TokenType.USER_DEFINED)

    def ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def keys(self, model: str, pre: str) -> list[Key]:
        keys: list[Key] = [
            ("tokenizer.ggml.model", ValueType.STRING, model),
            ("tokenizer.ggml.pre", ValueType.STRING, pre),
            ("tokenizer.ggml.tokens", _STRINGS, self.texts),
        ]
        if model == "llama":
            keys.append(("tokenizer.ggml.scores", _FLOATS, self.scores))
        keys.append(("tokenizer.ggml.token_type", _INTEGERS, [int(t) for t in self.types]))
        return keys


def vocabulary_keys(folder: Path, config: Config, warn: Warn) -> list[Key]:
    """Read the folder's tokenizer and write it as keys, special ids and chat template included.

    Parameters
    ----------
    warn : callable
        Takes lines about what is lost or assumed.

    Raises
    ------
    FormatError
        If there is none, or of a kind that GGUF files of this family do not know.
    EngineError
        If tokenizer.model is there and the package sentencepiece is not.
    """
    files = Files.read(folder, config.raw)
    model_file = folder / "tokenizer.model"
    if model_file.exists():
        table, keys = _from_sentencepiece(model_file, config.n_vocab, files, warn)
    elif files.tokenizer:
        table, keys = _from_json(folder / "tokenizer.json", config.n_vocab, files, warn)
    else:
        raise FormatError(f"{folder}: has neither tokenizer.model nor tokenizer.json")
    byte_level = keys[0][2] == "gpt2"
    keys += special_keys(files, table.ids(), config.n_vocab, byte_level)
    return keys + template_keys(files)


def _from_sentencepiece(
    path: Path, n_vocab: int, files: Files, warn: Warn
) -> tuple[_Table, list[Key]]:
    table = _Table(n_vocab)
    pieces = _read_pieces(path)
    if len(pieces) > n_vocab:
        warn(f"{path}: {len(pieces) - n_vocab} pieces are left out: the model has {n_vocab}")
    for token, piece in enumerate(pieces[:n_vocab]):
        table.put(token, *piece)
    table.add(added_tokens(files), path, warn)
    return table, table.keys("llama", "default") + _prefix_key(files)


def _prefix_key(files: Files) -> list[Key]:
    prefix = files.tokenizer_config.get("add_prefix_space")
    if not isinstance(prefix, bool):
        return []
    return [("tokenizer.ggml.add_space_prefix", ValueType.BOOL, prefix)]


def _read_pieces(path: Path) -> list[tuple[str, float, TokenType]]:
    try:
        import sentencepiece
    except ImportError:
        raise EngineError(
            f"{path}: reading it needs the package sentencepiece; pip install 'cylora[convert]'"
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "unknown content"
        raise FormatError(f"{path}: is no SentencePiece model: {reason}") from None
    kinds = (
        (processor.IsUnknown, TokenType.UNKNOWN),
        (processor.IsControl, TokenType.CONTROL),
        (processor.IsUnused, TokenType.UNUSED),
        (processor.IsByte, TokenType.BYTE),
    )
    return [
        (
            processor.IdToPiece(token),
            processor.GetScore(token),
            next((kind for has, kind in kinds if has(token)), TokenType.NORMAL),
        )
        for token in range(processor.GetPieceSize())
    ]


def _from_json(path: Path, n_vocab: int, files: Files, warn: Warn) -> tuple[_Table, list[Key]]:
    model = files.tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE":
        kind = str(model.get("type"))[:40]
        raise FormatError(f"{path}: model: type {kind!r} cannot be converted, BPE can")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise FormatError(f"{path}: model: {name} {model[name]!r:.40} cannot be converted")
    vocab, merges = _read_vocab(path, model, n_vocab), _read_merges(path, model)
    table = _Table(n_vocab)
    for text, token in vocab.items():
        table.put(token, text, 0.0, TokenType.NORMAL)
    if model.get("byte_fallback"):
        return table, _spm_keys(path, table, files, vocab, merges, warn)
    table.add(added_tokens(files), path, warn)
    name, warning = recognise(files.tokenizer, str(path))
    if warning:
        warn(warning)
    if files.tokenizer.get("normalizer"):
        kind = files.tokenizer["normalizer"].get("type", "?")
        warn(f"{path}: normalizer {kind} is not applied by the engines")
    keys = table.keys("gpt2", name) + _prefix_key(files)
    # A space inside would read as the separator: as a mapped byte it is another character.
    lines = [" ".join(side.replace(" ", "\u0120") for side in pair) for pair in merges]
    keys.append(("tokenizer.ggml.merges", _STRINGS, lines))
    return table, keys


def _read_vocab(path: Path, model: dict[str, Any], n_vocab: int) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{path}: model: has no vocab")
    seen: dict[int, str] = {}
    for text, token in vocab.items():
        if type(token) is not int or not 0 <= token < n_vocab:
            raise FormatError(
                f"{path}: token {text[:40]!r} has the id {str(token)[:20]}, config.json has "
                f"{n_vocab} tokens"
            )
        if token in seen:
            raise FormatError(f"{path}: tokens {seen[token][:40]!r} and {text[:40]!r} share an id")
        seen[token] = text
    return vocab


def _read_merges(path: Path, model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs by rank; files before 2024 join the sides by a space."""
    pairs = []
    for rank, merge in enumerate(model.get("merges") or []):
        sides = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not (isinstance(sides, list) and len(sides) == 2 and all(map(_is_text, sides))):
            raise FormatError(f"{path}: merge {rank}: {str(merge)[:60]!r} is no pair")
        pairs.append((sides[0], sides[1]))
    if not pairs:
        raise FormatError(f"{path}: model: has no merges")
    return pairs


def _is_text(side: Any) -> bool:
    return isinstance(side, str) and bool(side)


def _spm_keys(
    path: Path,
    table: _Table,
    files: Files,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    warn: Warn,
) -> list[Key]:
    """SPM joins the pair whose text has the highest score: minus the rank of the text's merge."""
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        text = left + right
        if text in ranks and text != last:
            warn(f"{path}: merges of {text[:40]!r} are not together; it may be cut differently")
        ranks.setdefault(text, rank)
        last = text
    unknown = files.tokenizer["model"].get("unk_token")
    for text, token in vocab.items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == unknown else kind
        # Single characters have no merge, and their scores are never compared.
        score = -float(ranks.get(text, len(merges))) if kind is TokenType.NORMAL else 0.0
        table.put(token, text, score, kind)
    table.add(added_tokens(files), path, warn)
    keys = table.keys("llama", "default")
    prefix = _prepends_blank(files.tokenizer)
    keys.append(("tokenizer.ggml.add_space_prefix", ValueType.BOOL, prefix))
    return keys


def _prepends_blank(tokenizer: dict[str, Any]) -> bool:
    """Whether the normalizer or the pre-tokenizer puts a blank before a text."""
    steps = [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
    for step in steps:
        if isinstance(step, dict):
            steps += step.get("normalizers") or step.get("pretokenizers") or []
            if step.get("type") == "Prepend":
                return True
            if step.get("type") == "Metaspace":
                return step.get("prepend_scheme", "always") != "never" and (
                    step.get("add_prefix_space", True) is not False
                )
    return False
