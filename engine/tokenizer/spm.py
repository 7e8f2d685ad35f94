"""SentencePiece-style BPE over characters (`tokenizer.ggml.model` = `llama`)."""

from __future__ import annotations

import re
from functools import cached_property

from engine.errors import DataError
from engine.tokenizer.merge import join_symbols
from engine.tokenizer.vocab import Vocabulary

SPACE_MARK = "\u2581".encode()

# Length of a character by its first byte; continuation bytes that come first count as characters.
_CHARACTER_BYTES = bytes([1] * 0xC0 + [2] * 0x20 + [3] * 0x10 + [4] * 0x10)
_WORDS = re.compile(rb" *[^ ]+| +")
_CACHE_WORDS = 1 << 16
_CACHE_WORD_BYTES = 64


class SpmEncoder:
    """Text to ids with the scores of an SPM vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._cache: dict[bytes, list[int]] = {}

    def encode(self, text: bytes) -> list[int]:
        """Ids of a text without special tokens; the space before it, if any, is the caller's."""
        text = text.replace(SPACE_MARK, b" ")
        if not (self._words_are_independent and _is_utf8(text)):
            return self._encode_run(text)
        ids: list[int] = []
        cache = self._cache
        for word in _WORDS.findall(text):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = self._encode_run(word)
                if len(word) <= _CACHE_WORD_BYTES and len(cache) < _CACHE_WORDS:
                    cache[word] = word_ids
            ids += word_ids
        return ids

    @cached_property
    def _negated_scores(self) -> list[float]:
        return (-self._vocabulary.scores).tolist()

    @cached_property
    def _words_are_independent(self) -> bool:
        """Whether no token holds a space mark behind another character.

        Then no join crosses from a word into the blanks behind it, and words can be encoded one by
        one, which lets a cache answer for most of a text. Invalid UTF-8 is excepted: there a
        character may swallow the mark. 0xFF separates the texts since valid text never has it.
        """
        texts = b"\xff".join(self._vocabulary.texts).replace(SPACE_MARK, b" ")
        return re.search(rb"[^ \xff] ", texts) is None

    def _encode_run(self, text: bytes) -> list[int]:
        ids = self._vocabulary.ids
        negated_scores = self._negated_scores

        def priority(left: bytes, right: bytes) -> float | None:
            token = ids.get(left + right)
            return None if token is None else negated_scores[token]

        found: list[int] = []
        for symbol in join_symbols(_characters(text.replace(b" ", SPACE_MARK)), priority):
            token = ids.get(symbol)
            if token is None:
                found += [self._byte_token(byte) for byte in symbol]
            else:
                found.append(token)
        return found

    def _byte_token(self, byte: int) -> int:
        ids = self._vocabulary.ids
        token = ids.get(b"<0x%02X>" % byte)
        if token is None:
            token = ids.get(bytes([byte]), self._vocabulary.special_ids["unknown"])
        if token < 0:
            raise DataError(
                f"{self._vocabulary.source}: tokenizer.ggml.tokens: no token for byte "
                f"0x{byte:02X} of the text, and no unknown token"
            )
        return token


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _characters(text: bytes) -> list[bytes]:
    found = []
    start = 0
    while start < len(text):
        end = start + _CHARACTER_BYTES[text[start]]
        found.append(text[start:end])
        start = end
    return found
