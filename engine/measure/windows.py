"""A text cut into windows that are evaluated one by one, each from an empty context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import DataError, OptionError

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


class Evaluator(Protocol):
    """The part of `engine.model.Context` that measuring needs."""

    def truncate(self, n_past: int) -> None:
        """Forget the positions from `n_past` on."""

    def logits(self, tokens: Tokens, first: int = 0) -> Iterator[Logits]:
        """Append tokens; the logits of those from `first` on, in blocks."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal length over a text.

    Attributes
    ----------
    tokens : ndarray of shape (n,), int32
    n_ctx : int
        Tokens of a window.
    step : int
        From the beginning of a window to that of the next.
    first : int
        Position in a window from which on the following token is scored.
    count : int
    bos : int or None
        Takes the place of each window's first token.
    """

    tokens: Tokens
    n_ctx: int
    step: int
    first: int
    count: int
    bos: int | None = None

    @property
    def n_scored(self) -> int:
        """Tokens of a window that are scored."""
        return self.n_ctx - 1 - self.first

    def at(self, number: int) -> Tokens:
        """Tokens of a window, its first one as in the text."""
        return self.tokens[number * self.step : number * self.step + self.n_ctx]

    def beginning_with(self, bos: int | None) -> Windows:
        """Give the same windows with another first token."""
        return replace(self, bos=bos)

    def evaluate(self, context: Evaluator, number: int) -> Iterator[tuple[Logits, Tokens]]:
        """Evaluate a window in an emptied context.

        Yields
        ------
        logits : ndarray of shape (n, n_vocab), float32
            In memory that the next block overwrites.
        targets : ndarray of shape (n,), int32
            The tokens that follow.
        """
        window = self.at(number)
        given = window[:-1].copy()
        if self.bos is not None:
            given[0] = self.bos
        targets = window[self.first + 1 :]
        context.truncate(0)
        for block in context.logits(given, self.first):
            yield block, targets[: len(block)]
            targets = targets[len(block) :]


def halves(tokens: ArrayLike, n_ctx: int, limit: int = -1, bos: int | None = None) -> Windows:
    """Cut a text into windows without overlap, of which the second half is scored.

    So a token has half a window of context at least. At most `limit` windows, where that is not
    negative; what is left over at the end is not used.

    Raises
    ------
    DataError
        If there are not two windows.
    OptionError
        If a window is too short for its half to hold a token.
    """
    text = np.asarray(tokens, np.int32)
    if n_ctx < 3:
        raise OptionError(
            f"--ctx-size: in a window of {n_ctx} no token can be scored; give 3 or more"
        )
    if len(text) < 2 * n_ctx:
        raise DataError(
            f"the text has {len(text)} tokens, {2 * n_ctx} are needed with a context of {n_ctx}; "
            "give a longer text or a smaller --ctx-size"
        )
    return Windows(text, n_ctx, n_ctx, n_ctx // 2, _limited(len(text) // n_ctx, limit), bos)


def strided(tokens: ArrayLike, n_ctx: int, stride: int, limit: int = -1) -> Windows:
    """Cut a text into windows that begin `stride` tokens apart; the last so many are scored.

    Raises
    ------
    DataError
        If there are not two windows' tokens.
    OptionError
        If the stride does not fit the window.
    """
    text = np.asarray(tokens, np.int32)
    if not 0 < stride < n_ctx:
        raise OptionError(f"--ppl-stride: {stride} does not fit windows of {n_ctx} tokens")
    if len(text) < 2 * n_ctx:
        raise DataError(
            f"the text has {len(text)} tokens, {2 * n_ctx} are needed with windows of {n_ctx}; "
            "give a longer text, or a smaller --ctx-size or --batch-size"
        )
    count = -(-(len(text) - n_ctx) // stride)
    return Windows(text, n_ctx, stride, n_ctx - stride - 1, _limited(count, limit))


def whole(tokens: ArrayLike, n_ctx: int, limit: int = -1, bos: int | None = None) -> Windows:
    """Cut a text into windows without overlap that are scored whole; a short text is one.

    Raises
    ------
    DataError
        If there are not two tokens.
    OptionError
        If a window is too short.
    """
    text = np.asarray(tokens, np.int32)
    if n_ctx < 2:
        raise OptionError(
            f"--ctx-size: in a window of {n_ctx} no token can be scored; give 2 or more"
        )
    if len(text) < 2:
        raise DataError(f"the text has {len(text)} tokens, 2 are needed; give a longer text")
    n_ctx = min(n_ctx, len(text))
    return Windows(text, n_ctx, n_ctx, 0, _limited(len(text) // n_ctx, limit), bos)


def _limited(count: int, limit: int) -> int:
    return count if limit < 0 else min(count, limit)
