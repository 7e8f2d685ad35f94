"""How far a model's predictions are from a base's: KL divergence, and what goes with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError
from engine.measure.logit_file import LogitFile
from engine.measure.loss import Mean
from engine.measure.softmax import log_sum_exp
from engine.measure.windows import Evaluator, Logits, Windows

# Log-probabilities of the base at or below this are left out: files hold no difference there.
_FLOOR = -16.0


@dataclass(slots=True)
class Divergence:
    """Statistics of scored tokens that come one after another.

    Attributes
    ----------
    loss, base_loss : Mean
        Negative log-likelihoods of the text, in nats.
    products : float
        Sum of the products of both.
    divergence : Mean
        KL divergence of the model's prediction from the base's, in nats.
    change, squared_change : Mean
        Difference in the probability of the text's token, model less base, and its square.
    same_top : int
        How often both find the same token likeliest.
    """

    loss: Mean = field(default_factory=Mean)
    base_loss: Mean = field(default_factory=Mean)
    products: float = 0.0
    divergence: Mean = field(default_factory=Mean)
    change: Mean = field(default_factory=Mean)
    squared_change: Mean = field(default_factory=Mean)
    same_top: int = 0
    _divergences: list[NDArray[np.float32]] = field(default_factory=list)
    _changes: list[NDArray[np.float32]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Tokens scored."""
        return self.loss.count

    def add(self, tokens: list[_Scored]) -> None:
        """Count some more tokens."""
        loss, base, divergence, same = (np.array(column) for column in zip(*tokens, strict=True))
        change = np.exp(-loss) - np.exp(-base)
        self.loss.add(loss)
        self.base_loss.add(base)
        self.products += float(np.dot(loss, base))
        self.divergence.add(divergence)
        self.change.add(change)
        self.squared_change.add(change**2)
        self.same_top += int(same.sum())
        self._divergences.append(divergence.astype(np.float32))
        self._changes.append(change.astype(np.float32))

    @property
    def covariance(self) -> float:
        """Of the two mean losses."""
        if self.count < 2:
            return 0.0
        spread = self.products / self.count - self.loss.value * self.base_loss.value
        return spread / (self.count - 1)

    @property
    def log_ratio(self) -> tuple[float, float]:
        """Logarithm of the ratio of the perplexities, model to base, and its error."""
        variance = self.loss.error**2 + self.base_loss.error**2 - 2 * self.covariance
        return self.loss.value - self.base_loss.value, math.sqrt(max(variance, 0.0))

    @property
    def rms_change(self) -> tuple[float, float]:
        """Root of the mean squared change of probability, and its error."""
        rms = math.sqrt(self.squared_change.value)
        return rms, 0.5 / rms * self.squared_change.error if rms else 0.0

    @property
    def same_top_share(self) -> tuple[float, float]:
        """Share of tokens where both find the same one likeliest, and its error."""
        share = self.same_top / self.count
        return share, math.sqrt(share * (1 - share) / (self.count - 1)) if self.count > 1 else 0.0

    def summary(self) -> Summary:
        """Sum up what was counted."""
        return Summary(self, np.concatenate(self._divergences), np.concatenate(self._changes))


class Summary:
    """What a whole text has shown.

    Attributes
    ----------
    divergences, changes : ndarray of shape (n_tokens,), float32
        Of each token, sorted.
    correlation : float
        Of the two mean losses.
    ratio, difference : tuple of float
        Of the perplexities, model to base and model less base, with their errors.
    """

    def __init__(
        self,
        seen: Divergence,
        divergences: NDArray[np.float32],
        changes: NDArray[np.float32],
    ) -> None:
        self.divergences = np.sort(divergences)
        self.changes = np.sort(changes)
        loss, base, covariance = seen.loss, seen.base_loss, seen.covariance
        errors = loss.error * base.error
        self.correlation = covariance / errors if errors else 1.0
        log_ratio, error = seen.log_ratio
        ratio = math.exp(log_ratio)
        self.ratio = (ratio, ratio * error)
        variance = (
            loss.perplexity_error**2
            + base.perplexity_error**2
            - 2 * covariance * loss.perplexity * base.perplexity
        )
        self.difference = (loss.perplexity - base.perplexity, math.sqrt(max(variance, 0.0)))

    def divergence_percentiles(self) -> list[tuple[str, float]]:
        """Name and value of some percentiles of `divergences`, from the largest to the smallest."""
        return _percentiles(self.divergences, (99.9, 99, 95, 90, 50, 10, 5, 1))

    def change_percentiles(self) -> list[tuple[str, float]]:
        """Name and value of some percentiles of `changes`, from the largest to the smallest."""
        return _percentiles(self.changes, (99.9, 99, 95, 90, 75, 50, 25, 10, 5, 1, 0.1))


def _percentiles(
    ordered: NDArray[np.float32], percents: tuple[float, ...]
) -> list[tuple[str, float]]:
    named = [
        ("Median " if p == 50 else f"{p:4.1f}%  ", percentile(ordered, p / 100)) for p in percents
    ]
    return [("Maximum", float(ordered[-1])), *named, ("Minimum", float(ordered[0]))]


def percentile(ordered: NDArray[np.float32], share: float) -> float:
    """Value below which so large a share of sorted values is, between two by interpolation."""
    return float(np.quantile(ordered, share))


# Loss, base's loss, divergence, whether the likeliest tokens agree.
_Scored = tuple[float, float, float, bool]


def _score(
    base: Logits, row: Logits, target: int, scratch: Logits, floor: float = -math.inf
) -> _Scored:
    """Compare a row of logits with the base's log-probabilities, those above a floor."""
    total = log_sum_exp(row, scratch)
    same = bool(row.argmax() == base.argmax())
    divergence = _divergence(base, row, total, floor)
    return total - float(row[target]), -float(base[target]), divergence, same


def _divergence(base: Logits, row: Logits, total: float, floor: float) -> float:
    """KL divergence of softmax(row), whose log-sum-exp is `total`, from exp(base)."""
    kept = np.flatnonzero(base > floor)
    log_p = base[kept]
    terms = np.exp(log_p) * (log_p - (row[kept] - np.float32(total)))
    return float(terms.sum(dtype=np.float64))


def divergence(
    context: Evaluator, n_vocab: int, base: LogitFile, bos: int | None = None
) -> Iterator[Divergence]:
    """Compare a model's predictions with a file of a base's, window by window.

    Parameters
    ----------
    context : Context
        Of the model; the windows of the file must fit.
    n_vocab : int
        The model's.
    base : LogitFile
    bos : int, optional
        Takes the place of each window's first token.

    Yields
    ------
    Divergence
        The same one each time.

    Raises
    ------
    DataError
        If the vocabularies differ.
    """
    if base.n_vocab != n_vocab:
        raise DataError(
            f"{base.path}: is of a vocabulary of {base.n_vocab} tokens, the model has {n_vocab}; "
            "compare models of one vocabulary"
        )
    windows = base.windows.beginning_with(bos)
    seen = Divergence()
    scratch = np.empty(n_vocab, np.float32)
    index = 0
    for number in range(windows.count):
        for logits, targets in windows.evaluate(context, number):
            scored = []
            for row, target in zip(logits, targets, strict=True):
                stored = base.log_probabilities(index)
                scored.append(_score(stored, row, int(target), scratch, _FLOOR))
                index += 1
            seen.add(scored)
        yield seen


@dataclass(slots=True)
class Comparison:
    """What two models, or two ways of computing one, make of a text.

    Attributes
    ----------
    divergence : Divergence
        Of the second from the first.
    largest_error : float
        Largest difference between two logits.
    place : tuple of int
        Token of the text after which, and token of the vocabulary for which, it stands.
    squared_error : Mean
        Squared differences of logits, a mean for each token.
    """

    divergence: Divergence = field(default_factory=Divergence)
    largest_error: float = 0.0
    place: tuple[int, int] = (0, 0)
    squared_error: Mean = field(default_factory=Mean)

    @property
    def rms_error(self) -> float:
        """Root of the mean squared difference of logits."""
        return math.sqrt(self.squared_error.value)


def compare(first: Evaluator, second: Evaluator, windows: Windows) -> Iterator[Comparison]:
    """Compare two contexts on the same windows.

    Yields
    ------
    Comparison
        The same one each time.
    """
    result = Comparison()
    for number in range(windows.count):
        at = number * windows.step + windows.first
        pairs = zip(windows.evaluate(first, number), windows.evaluate(second, number), strict=True)
        for (ours, targets), (theirs, _) in pairs:
            _compare_block(result, ours, theirs, targets, at)
            at += len(targets)
        yield result


def _compare_block(
    result: Comparison, ours: Logits, theirs: Logits, targets: NDArray[np.int32], at: int
) -> None:
    scratch = np.empty(ours.shape[1], np.float32)
    scored, squares = [], []
    for i, (a, b, target) in enumerate(zip(ours, theirs, targets, strict=True)):
        base = a - np.float32(log_sum_exp(a, scratch))
        scored.append(_score(base, b, int(target), scratch))
        error = np.abs(np.subtract(b, a, out=scratch), out=scratch)
        worst = int(error.argmax())
        if error[worst] > result.largest_error:
            result.largest_error = float(error[worst])
            result.place = (at + i, worst)
        squares.append(float(np.dot(error, error)) / len(error))
    result.divergence.add(scored)
    result.squared_error.add(np.array(squares))
