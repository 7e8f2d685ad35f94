"""The generation loop: prompt tokens in, sampled tokens out, however long, in a bounded context.

A token is evaluated when the next one is wanted, not when it is made: the last token of a run
costs no evaluation, and a caller sees each token as early as possible.

When the context is full, half of what follows the first `n_keep` positions is dropped and the
rest moves down; keys are rotated to their new positions, nothing is evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError, ShapeError

# Room that the original leaves behind a prompt, and the grain and floor of its context sizes.
PROMPT_RESERVE = 4
CONTEXT_GRAIN = 32
SMALLEST_CONTEXT = 8

UNTIL_CONTEXT_FULL = -2


class Evaluator(Protocol):
    """The part of `engine.model.Context` that generation needs."""

    @property
    def n_ctx(self) -> int:
        """Positions that the cache has."""

    @property
    def n_past(self) -> int:
        """Positions that are filled."""

    def evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; returns the logits of the last, of shape (n_vocab,)."""

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Drop `n_discard` positions behind the first `n_keep` and move the rest down."""


class TokenSampler(Protocol):
    """The part of `engine.sampling.Sampler` that generation needs."""

    def accept(self, token: int) -> None:
        """Push a token into the history that penalties look at."""

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token."""


class StopReason(Enum):
    """Why a generation ended."""

    END_OF_GENERATION = "end of generation"
    ENOUGH_TOKENS = "enough tokens"
    CONTEXT_FULL = "context full"


@dataclass(slots=True)
class Phase:
    """Time spent on one kind of work, and how often it was done.

    Attributes
    ----------
    seconds : float
    count : int
        Tokens evaluated, or tokens sampled.
    """

    seconds: float = 0.0
    count: int = 0

    @property
    def ms(self) -> float:
        """Milliseconds in all."""
        return self.seconds * 1e3

    @property
    def ms_each(self) -> float:
        """Milliseconds for each; 0 when there was none."""
        return self.ms / self.count if self.count else 0.0

    @property
    def per_second(self) -> float:
        """How many in a second; 0 when there was none."""
        return self.count / self.seconds if self.seconds else 0.0

    def add(self, seconds: float, count: int) -> None:
        """Count some more work."""
        self.seconds += seconds
        self.count += count


@dataclass(slots=True)
class Timings:
    """Where the time of a generation went."""

    prompt: Phase = field(default_factory=Phase)
    evaluation: Phase = field(default_factory=Phase)
    sampling: Phase = field(default_factory=Phase)


def context_size(wanted: int, n_ctx_train: int) -> int:
    """Choose the size of a context as the original does: a multiple of 32, at least 8 asked for.

    Parameters
    ----------
    wanted : int
        Tokens asked for; 0: as many as the model was trained on.
    n_ctx_train : int
        Tokens the model was trained on.
    """
    tokens = max(wanted, SMALLEST_CONTEXT) if wanted else n_ctx_train
    return -(-tokens // CONTEXT_GRAIN) * CONTEXT_GRAIN


def kept_positions(n_keep: int, n_prompt: int, *, add_bos: bool) -> int:
    """Count the positions that survive a full context.

    Parameters
    ----------
    n_keep : int
        Tokens of the prompt to keep; negative, or more than there are: the whole prompt.
    n_prompt : int
        Tokens of the prompt, BOS included.
    add_bos : bool
        Whether the model begins prompts with BOS, which is then kept beside `n_keep` tokens.
    """
    if n_keep < 0 or n_keep > n_prompt:
        return n_prompt
    return n_keep + add_bos


def check_prompt_fits(n_prompt: int, n_ctx: int) -> None:
    """Refuse a prompt that leaves no room in the context.

    Raises
    ------
    ShapeError
        Says how long the prompt is and may be.
    """
    longest = n_ctx - PROMPT_RESERVE
    if n_prompt > longest:
        raise ShapeError(f"prompt is too long ({n_prompt} tokens, max {longest})")


class Generation:
    """One run from a prompt; iterating makes the tokens.

    Parameters
    ----------
    context : Evaluator
        The prompt is appended to what it holds.
    sampler : TokenSampler
        Sees the prompt's tokens, too.
    prompt : sequence of int
        At least one token.
    is_end : callable
        Whether a token ends the generation; such a token is still given to the caller.
    n_predict : int
        Tokens to make; negative: no limit; -2: until the context is full.
    n_keep : int
        Positions that survive when the context is full (`kept_positions`).

    Attributes
    ----------
    timings : Timings
    stopped : StopReason or None
        None while it runs.

    Raises
    ------
    DataError
        If the prompt is empty.
    ShapeError
        If the prompt does not fit into the context.
    """

    def __init__(
        self,
        context: Evaluator,
        sampler: TokenSampler,
        prompt: Sequence[int],
        *,
        is_end: Callable[[int], bool],
        n_predict: int = -1,
        n_keep: int = 0,
    ) -> None:
        if not prompt:
            raise DataError("the prompt is empty; give at least one token to begin with")
        check_prompt_fits(context.n_past + len(prompt), context.n_ctx)
        self.timings = Timings()
        self.stopped: StopReason | None = None
        self._context = context
        self._sampler = sampler
        self._prompt = list(prompt)
        self._is_end = is_end
        self._n_predict = n_predict
        self._n_keep = n_keep

    def __iter__(self) -> Iterator[int]:
        """Make tokens until one ends the text, there are enough, or the context is full."""
        pending = self._prompt
        for token in pending:
            self._sampler.accept(token)
        # A prompt that ends a text leaves nothing to generate.
        if self._is_end(pending[-1]):
            self.stopped = StopReason.END_OF_GENERATION
            return
        made = 0
        while made != self._n_predict:
            if not self._make_room(len(pending)):
                self.stopped = StopReason.CONTEXT_FULL
                return
            token = self._next(pending)
            yield token
            if self._is_end(token):
                self.stopped = StopReason.END_OF_GENERATION
                return
            made += 1
            pending = [token]
        self.stopped = StopReason.ENOUGH_TOKENS

    def _make_room(self, n_new: int) -> bool:
        """Shift a context that is full; False where the run is to end instead."""
        context = self._context
        if context.n_past + n_new < context.n_ctx:
            return True
        if self._n_predict == UNTIL_CONTEXT_FULL:
            return False
        context.shift(self._n_keep, (context.n_past - self._n_keep) // 2)
        return True

    def _next(self, pending: Sequence[int]) -> int:
        began = perf_counter()
        logits = self._context.evaluate(pending)
        evaluated = perf_counter()
        token = self._sampler.sample(logits)
        self._sampler.accept(token)
        sampled = perf_counter()
        phase = self.timings.prompt if pending is self._prompt else self.timings.evaluation
        phase.add(evaluated - began, len(pending))
        self.timings.sampling.add(sampled - evaluated, 1)
        return token
