"""Byte-level BPE (`tokenizer.ggml.model` = `gpt2`)."""

from __future__ import annotations

import re
from functools import cached_property

from engine.errors import DataError
from engine.tokenizer.merge import join_symbols
from engine.tokenizer.pretokenize import PreTokenizer
from engine.tokenizer.vocab import Vocabulary

_CACHE_PARTS = 1 << 16
_CACHE_PART_CHARACTERS = 64
_ESCAPED_BYTES = re.compile("[\udc80-\udcff]")


def _byte_characters() -> list[str]:
    """Give each byte a printable character: GPT-2's table.

    Printable bytes of Latin-1 stand for themselves, the other 68 are numbered from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    n_moved = 0
    for byte in range(256):
        characters.append(chr(byte if byte in printable else 0x100 + n_moved))
        n_moved += byte not in printable
    return characters


BYTE_TO_TEXT = [character.encode() for character in _byte_characters()]
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(_byte_characters())}


class BpeEncoder:
    """Text to ids with the merges of a BPE vocabulary."""

    def __init__(self, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        self._vocabulary = vocabulary
        self._pre_tokenizer = pre_tokenizer
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: bytes) -> list[int]:
        """Ids of a text without special tokens.

        Each byte that is not part of valid UTF-8 is taken as U+FFFD, as patterns need characters.
        """
        characters = text.decode("utf-8", "surrogateescape")
        if not characters.isascii():
            characters = _ESCAPED_BYTES.sub("\ufffd", characters)
        ids: list[int] = []
        cache = self._cache
        for part in self._pre_tokenizer.split(characters):
            part_ids = cache.get(part)
            if part_ids is None:
                part_ids = self._encode_part(part)
                if len(part) <= _CACHE_PART_CHARACTERS and len(cache) < _CACHE_PARTS:
                    cache[part] = part_ids
            ids += part_ids
        return ids

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """Merge as stored to rank. Backwards, so that the first of equal merges counts."""
        merges = self._vocabulary.merges
        return dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))

    def _encode_part(self, part: str) -> list[int]:
        ids = self._vocabulary.ids
        ranks = self._ranks
        symbols = [BYTE_TO_TEXT[byte] for byte in part.encode()]
        if self._pre_tokenizer.ignores_merges:
            token = ids.get(b"".join(symbols))
            if token is not None:
                return [token]

        # Mapped text has no space, so the stored form of a merge identifies its two sides.
        def priority(left: bytes, right: bytes) -> int | None:
            return ranks.get(b"%b %b" % (left, right))

        found: list[int] = []
        for symbol in join_symbols(symbols, priority):
            token = ids.get(symbol)
            found += self._fallback(symbol) if token is None else [token]
        return found

    def _fallback(self, symbol: bytes) -> list[int]:
        """Ids for a symbol that is no token; never happens with a complete vocabulary."""
        by_byte = [self._vocabulary.ids.get(bytes([byte])) for byte in symbol]
        found = [token for token in by_byte if token is not None]
        if len(found) == len(symbol):
            return found
        unknown = self._vocabulary.special_ids["unknown"]
        if unknown < 0:
            raise DataError(
                f"{self._vocabulary.source}: tokenizer.ggml.tokens: no token for "
                f"{text_to_bytes(symbol)!r} of the text, and no unknown token"
            )
        return [unknown]


def text_to_bytes(text: bytes) -> bytes:
    """Turn a token's mapped text back into the bytes it stands for.

    A text with anything outside of the table is returned as it is.
    """
    try:
        return bytes([CHARACTER_TO_BYTE[character] for character in text.decode()])
    except (KeyError, UnicodeDecodeError):
        return text
