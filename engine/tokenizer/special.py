"""Cutting whole tokens out of a text before an algorithm sees the rest."""

from __future__ import annotations

from collections.abc import Sequence

from engine.tokenizer.vocab import TokenType, Vocabulary

# A part of a text: what is still text, or the id of the token that was found there.
Part = bytes | int

# Phi-3 files lack the flags of their tokens; these three keep the white space behind them.
_NEVER_STRIPPED = (b"<unk>", b"<s>", b"<|endoftext|>")

ALWAYS_CUT = (TokenType.USER_DEFINED,)
# llama.cpp of June 2024 takes the texts of byte tokens (`<0x0A>`) too.
CUT_WHEN_PARSED = (
    TokenType.UNKNOWN,
    TokenType.CONTROL,
    TokenType.USER_DEFINED,
    TokenType.BYTE,
)


class SpecialCutter:
    """Find tokens of some kinds as whole texts, longest first.

    Parameters
    ----------
    vocabulary : Vocabulary
    types : sequence of TokenType
        The kinds to find.
    """

    def __init__(self, vocabulary: Vocabulary, types: Sequence[TokenType]) -> None:
        texts = vocabulary.texts
        found = [token for token in vocabulary.ids_of_type(*types) if texts[token]]
        found.sort(key=lambda token: (-len(texts[token]), token))
        self._tokens = [(token, texts[token]) for token in found]
        self._strip_right = vocabulary.strip_right

    def cut(self, text: bytes) -> list[Part]:
        """Split a text into stretches of text, never empty, and ids of tokens.

        A longer token wins over a shorter one even where the shorter begins further left, so this
        is one pass a token, not one expression for all.
        """
        parts: list[Part] = [text] if text else []
        for token, token_text in self._tokens:
            if token_text not in text:
                continue
            strip = self._strip_right and token_text not in _NEVER_STRIPPED
            parts = [
                piece
                for part in parts
                for piece in (
                    [part] if isinstance(part, int) else _cut(part, token, token_text, strip)
                )
            ]
        return parts


def _cut(text: bytes, token: int, token_text: bytes, strip_right: bool) -> list[Part]:
    first, *others = text.split(token_text)
    parts: list[Part] = [first] if first else []
    for stretch in others:
        parts.append(token)
        # White space in C's sense, which is also what bytes.lstrip means.
        stretch = stretch.lstrip() if strip_right else stretch
        if stretch:
            parts.append(stretch)
    return parts
