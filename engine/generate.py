"""The generation loop: prompt tokens in, sampled tokens out, however long, in a bounded context.

A token is evaluated when the next one is wanted, not when it is made: the last token of a run
costs no evaluation, and a caller sees each token as early as possible. Between two tokens others
can be fed, which is how people take their turns (`engine.dialogue`).

When the context is full, half of what follows the first `n_keep` positions is dropped and the
rest moves down; keys are rotated to their new positions, nothing is evaluated again.
"""

from __future__ import annotations

from collections import deque
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
FLASH_GRAIN = 256
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

    @property
    def shifts(self) -> bool:
        """Whether room is made by dropping positions; else a full context ends the run."""

    def evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; returns the logits of the last, of shape (n_vocab,)."""

    def evaluate_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; returns the logits of each, of shape (n_tokens, n_vocab)."""

    def truncate(self, n_past: int) -> None:
        """Forget the positions from `n_past` on."""

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Drop `n_discard` positions behind the first `n_keep` and move the rest down."""


class TokenSampler(Protocol):
    """The part of `engine.sampling.Sampler` that generation needs."""

    def accept(self, token: int, chosen: bool = False) -> None:
        """Push a token into the history of penalties; a grammar goes on with chosen ones."""

    def reset(self) -> None:
        """Forget that history, and begin the grammar anew."""

    def sample(
        self, logits: NDArray[np.float32], guidance: NDArray[np.float32] | None = None
    ) -> int:
        """Choose a token, led away from what the guidance finds likely."""


class Drafter(Protocol):
    """Somebody who guesses how a text goes on; see `engine.lookup`."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that the text has got."""

    def propose(self, n_most: int) -> list[int]:
        """Guess at most `n_most` tokens."""


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


def context_size(wanted: int, n_ctx_train: int, *, flash: bool = False) -> int:
    """Choose the size of a context as the original does: a multiple of 32, at least 8 asked for.

    Parameters
    ----------
    wanted : int
        Tokens asked for; 0: as many as the model was trained on.
    n_ctx_train : int
        Tokens the model was trained on.
    flash : bool
        With the original's flash attention: a multiple of 256.
    """
    tokens = max(wanted, SMALLEST_CONTEXT) if wanted else n_ctx_train
    grain = FLASH_GRAIN if flash else CONTEXT_GRAIN
    return -(-tokens // grain) * grain


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


def check_prompt_fits(n_prompt: int, n_ctx: int, what: str = "prompt") -> None:
    """Refuse a prompt that leaves no room in the context.

    Raises
    ------
    ShapeError
        Says how long the prompt is and may be.
    """
    longest = n_ctx - PROMPT_RESERVE
    if n_prompt > longest:
        raise ShapeError(f"{what} is too long ({n_prompt} tokens, max {longest})")


class Guidance:
    """A second context: a negative prompt in place of the prompt, then the same tokens.

    Parameters
    ----------
    context : Evaluator
        Empty.
    prompt : sequence of int
        The negative prompt: at least one token.
    n_replaced : int
        Tokens of the prompt that it stands for.

    Attributes
    ----------
    tokens : list of int
        All that the context holds or is to hold.

    Raises
    ------
    ShapeError
        If the negative prompt does not fit into the context.
    """

    def __init__(self, context: Evaluator, prompt: Sequence[int], n_replaced: int) -> None:
        check_prompt_fits(len(prompt), context.n_ctx, "negative prompt")
        self.tokens = list(prompt)
        self._context = context
        self._n_prompt = len(prompt)
        self._n_replaced = n_replaced

    def evaluate(self) -> NDArray[np.float32]:
        """Evaluate what is pending; returns the logits of the last token."""
        return self._context.evaluate(self.tokens[self._context.n_past :])

    def has_room(self) -> bool:
        """Whether the tokens leave a position of the context free."""
        return len(self.tokens) < self._context.n_ctx

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Drop as much as the first context, which keeps `n_keep` positions."""
        n_behind = n_keep - self._n_replaced
        kept = self._n_prompt + n_behind if n_behind >= 0 else min(n_keep, self._n_prompt)
        dropped = min(n_discard, self._context.n_past - kept)
        if dropped > 0:
            self._context.shift(kept, dropped)
            del self.tokens[kept : kept + dropped]

    def rewind(self, n_dropped: int) -> None:
        """Drop the last tokens; the one before them is evaluated again if they were."""
        del self.tokens[max(0, len(self.tokens) - n_dropped) :]
        if self._context.n_past > len(self.tokens):
            self._context.truncate(max(0, len(self.tokens) - 1))


class Generation:
    """Tokens in and out of a context; iterating makes a whole run from a prompt.

    Parameters
    ----------
    context : Evaluator
        Holds the first `n_cached` tokens of the prompt, and nothing else.
    sampler : TokenSampler
        Sees the prompt's tokens, too.
    prompt : sequence of int
        May be empty where more is fed before the first token is wanted.
    is_end : callable
        Whether a token ends the generation; such a token is still given to the caller.
    n_predict : int
        Tokens to make; negative: no limit; -2: until the context is full.
    n_keep : int
        Positions that survive when the context is full (`kept_positions`).
    n_cached : int
        Tokens of the prompt that need no evaluation; less than there are.
    drafter : Drafter, optional
        Guesses tokens, which are then evaluated together. Those that are not what the sampler
        chooses are dropped, so the text is the same, if an evaluation of several tokens gives the
        same bits as one of each. None is asked where there is guidance.
    guidance : Guidance, optional
        What the sampler leads away from.

    Attributes
    ----------
    tokens : list of int
        All that were fed and made and not dropped; the context holds the first of them.
    n_whole : int or None
        Positions whose keys and values are those of `tokens` evaluated from the start. None: all;
        less after the context was full, as later ones have seen tokens that are gone.
    remaining : int
        Tokens still to make; below zero: no limit.
    drafted, confirmed : int
        Tokens that were guessed, and those of them that were right.
    timings : Timings
    stopped : StopReason or None
        None while it runs.

    Raises
    ------
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
        n_cached: int = 0,
        drafter: Drafter | None = None,
        guidance: Guidance | None = None,
    ) -> None:
        check_prompt_fits(len(prompt), context.n_ctx)
        self.timings = Timings()
        self.stopped: StopReason | None = None
        self.tokens: list[int] = []
        self.n_whole: int | None = None
        self.n_predict = self.remaining = n_predict
        self.drafted = self.confirmed = 0
        self.n_keep = n_keep
        self._context = context
        self._sampler = sampler
        self._is_end = is_end
        self._drafter = drafter
        self._logits: NDArray[np.float32] | None = None
        # Guesses that are evaluated but not confirmed, and the logits behind each.
        self._draft: deque[tuple[int, NDArray[np.float32]]] = deque()
        self._n_evaluated = n_cached
        self._guidance: Guidance | None = None
        self._guidance_logits: NDArray[np.float32] | None = None
        self.feed(prompt)
        self._guidance = guidance  # which has a prompt of its own

    def __iter__(self) -> Iterator[int]:
        """Make tokens until one ends the text, there are enough, or the context is full.

        Raises
        ------
        DataError
            If the prompt is empty.
        """
        # A prompt that ends a text leaves nothing to generate.
        if self.tokens and self._is_end(self.tokens[-1]):
            self.stopped = StopReason.END_OF_GENERATION
            return
        while self.remaining != 0:
            token = self.step()
            if token is None:
                return
            yield token
            if self._is_end(token):
                self.stopped = StopReason.END_OF_GENERATION
                return
        self.stopped = StopReason.ENOUGH_TOKENS

    def feed(self, tokens: Sequence[int]) -> None:
        """Append tokens that somebody else has chosen; they are evaluated when one is wanted."""
        for token in tokens:
            self._sampler.accept(token)
        self._append(tokens)

    def step(self) -> int | None:
        """Make one token; None, with the reason in `stopped`, where the context is full.

        Raises
        ------
        DataError
            If there are no tokens to begin with.
        ShapeError
            As `settle` does.
        """
        if not self.settle():
            return None
        if self._logits is None:
            raise DataError("the prompt is empty; give at least one token to begin with")
        began = perf_counter()
        token = self._sampler.sample(self._logits, self._guidance_logits)
        self._sampler.accept(token, chosen=True)
        self.timings.sampling.add(perf_counter() - began, 1)
        self.remaining -= 1
        self._append([token])
        self._confirm(token)
        return token

    def settle(self) -> bool:
        """Evaluate what is pending; False where the context is full and the run is to end.

        Raises
        ------
        ShapeError
            If the context has no room, even without all that may be dropped.
        """
        pending = self.tokens[self._n_evaluated :]
        if not pending:
            return True
        self._forget_draft()
        if not self._make_room(len(pending)):
            self.stopped = StopReason.CONTEXT_FULL
            return False
        began = perf_counter()
        draft = self._guess() if len(pending) == 1 else []
        if draft:
            rows = self._context.evaluate_each(pending + draft)
            self._logits, *behind = rows
            self._draft.extend(zip(draft, behind, strict=True))
        else:
            self._logits = self._context.evaluate(pending)
        if self._guidance is not None:
            self._guidance_logits = self._guidance.evaluate()
        self._n_evaluated += len(pending)
        phase = self.timings.prompt if self._is_prompt(pending) else self.timings.evaluation
        phase.add(perf_counter() - began, len(pending))
        return True

    def rewind(self, n_tokens: int) -> None:
        """Drop all tokens but the first `n_tokens`; the sampler's history stays as it is."""
        self._forget_draft()
        if self._guidance is not None:
            self._guidance.rewind(max(0, len(self.tokens) - n_tokens))
        del self.tokens[n_tokens:]
        if self._n_evaluated > n_tokens:
            # The logits of the last token are gone: it is evaluated again.
            self._n_evaluated = max(0, n_tokens - 1)
            self._context.truncate(self._n_evaluated)
            self._logits = None

    def forget_history(self) -> None:
        """Let penalties look at what comes from here on only."""
        self._sampler.reset()

    def keep_whole(self) -> None:
        """Note that what comes will be evaluated otherwise, with other weights say."""
        n = self.evaluated()
        self.n_whole = n if self.n_whole is None else min(self.n_whole, n)

    def evaluated(self) -> int:
        """Count the tokens whose keys and values the context holds, guesses forgotten."""
        self._forget_draft()
        return self._n_evaluated

    def _append(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        if self._drafter is not None:
            self._drafter.extend(tokens)
        if self._guidance is not None:
            self._guidance.tokens += tokens

    def _is_prompt(self, pending: Sequence[int]) -> bool:
        return len(pending) > 1 or len(self.tokens) == 1

    def _guess(self) -> list[int]:
        if self._drafter is None or self._guidance is not None or not self._context.shifts:
            return []  # positions that are grouped in between would differ
        room = self._context.n_ctx - self._context.n_past - 2
        wanted = self.remaining - 1 if self.remaining >= 0 else room
        draft = self._drafter.propose(max(0, min(room, wanted)))
        self.drafted += len(draft)
        return draft

    def _confirm(self, token: int) -> None:
        """Take a guess for evaluated if it is the token that was chosen."""
        if self._draft and self._draft[0][0] == token:
            _, self._logits = self._draft.popleft()
            self._n_evaluated += 1
            self.confirmed += 1
            self.timings.evaluation.add(0.0, 1)

    def _forget_draft(self) -> None:
        if self._draft:
            self._draft.clear()
            self._context.truncate(self._n_evaluated)

    def _make_room(self, n_new: int) -> bool:
        """Shift a context that is full; False where the run is to end instead."""
        context, guidance = self._context, self._guidance
        if not context.shifts:
            is_guided = guidance is None or guidance.has_room()
            return context.n_past + n_new <= context.n_ctx and is_guided
        while context.n_past + n_new >= context.n_ctx or not (
            guidance is None or guidance.has_room()
        ):
            if self.n_predict == UNTIL_CONTEXT_FULL:
                return False
            n_discard = (context.n_past - self.n_keep) // 2
            if n_discard < 1:
                raise ShapeError(
                    f"{n_new} tokens more do not fit a context of {context.n_ctx} of which "
                    f"{self.n_keep} are kept; give a larger one with -c, or keep less"
                )
            context.shift(self.n_keep, n_discard)
            if guidance is not None:
                guidance.shift(self.n_keep, n_discard)
            del self.tokens[self.n_keep : self.n_keep + n_discard]
            self._n_evaluated -= n_discard
            self.n_whole = self.n_keep if self.n_whole is None else min(self.n_whole, self.n_keep)
        return True
