"""Windows over a text, the losses of their tokens, perplexity and its error."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.errors import DataError, OptionError
from engine.measure import Mean, Windows, halves, perplexity, strided, whole
from engine.measure.loss import token_losses
from tests.measure.scripted import ScriptedContext, log_softmax

N_VOCAB = 11


def losses_of(windows: Windows, context: ScriptedContext) -> np.ndarray:
    """Losses of the scored tokens in float64, window by window."""
    found = []
    for number in range(windows.count):
        window = windows.at(number)
        given = window.copy()
        given[0] = window[0] if windows.bos is None else windows.bos
        rows = log_softmax(context.rows(given))
        at = np.arange(windows.first, windows.n_ctx - 1)
        found.append(-rows[at, window[at + 1]])
    return np.concatenate(found)


@pytest.fixture
def context(rng: np.random.Generator) -> ScriptedContext:
    return ScriptedContext(rng.standard_normal((N_VOCAB, N_VOCAB), np.float32) * 3)


@pytest.fixture
def text(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1, N_VOCAB, 61, np.int32)


def test_the_second_half_of_each_window_is_scored(text: np.ndarray) -> None:
    windows = halves(text, 10)
    assert (windows.count, windows.step, windows.first, windows.n_scored) == (6, 10, 5, 4)
    assert windows.at(2).tolist() == text[20:30].tolist()
    assert halves(text, 10, 2).count == 2
    assert halves(text, 10, 99).count == 6


def test_strides_score_the_last_tokens_of_windows_that_overlap(text: np.ndarray) -> None:
    windows = strided(text, 20, 7)
    assert (windows.count, windows.step, windows.first, windows.n_scored) == (6, 7, 12, 7)
    assert windows.at(5).tolist() == text[35:55].tolist()
    scored = [windows.at(i)[windows.first + 1 :] for i in range(windows.count)]
    assert np.concatenate(scored).tolist() == text[13:55].tolist()


def test_a_short_text_is_one_whole_window(text: np.ndarray) -> None:
    windows = whole(text[:5], 512)
    assert (windows.n_ctx, windows.count, windows.n_scored) == (5, 1, 4)
    assert whole(text, 20).count == 3


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("make", [halves, whole])
def test_perplexity_is_what_the_formula_says(make, bos, context, text) -> None:
    windows = make(text, 10, bos=bos)
    expected = losses_of(windows, context)
    counts = []
    for loss in perplexity(context, windows):
        counts.append(loss.count)
        assert loss.value == pytest.approx(expected[: loss.count].mean(), rel=1e-6)
    assert counts == [windows.n_scored * (i + 1) for i in range(windows.count)]
    assert loss.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-6)
    error = expected.std(ddof=0) / math.sqrt(expected.size - 1)
    assert loss.perplexity_error == pytest.approx(loss.perplexity * error, rel=1e-5)


def test_the_bos_takes_the_place_of_a_windows_first_token_only_for_the_model(context, text) -> None:
    list(perplexity(context, halves(text, 10, bos=0)))
    assert [seen[0] for seen in context.seen] == [0] * 6
    assert context.seen[1][1:] == text[11:19].tolist()
    context.seen.clear()
    list(perplexity(context, halves(text, 10)))
    assert [seen[0] for seen in context.seen] == text[0:60:10].tolist()


def test_losses_stand_at_any_height_of_the_logits() -> None:
    row = np.array([[1e4, 1e4 - 1, -3e38], [-500, -501, -1e4]], np.float32)
    expected = math.log(1 + math.exp(-1)) + np.array([0, 1])
    np.testing.assert_allclose(token_losses(row, np.array([0, 1], np.int32)), expected, rtol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_an_error(broken: float) -> None:
    row = np.array([[0, broken, 1]], np.float32)
    with pytest.raises(DataError, match="scores are not finite"):
        token_losses(row, np.array([0], np.int32))


def test_a_mean_of_one_value_has_no_error() -> None:
    mean = Mean()
    assert (mean.value, mean.error) == (0, 0)
    mean.add(np.array([3.0]))
    assert (mean.value, mean.error) == (3, 0)
    mean.add(np.array([5.0]))
    assert (mean.value, mean.error) == (4, 1)


def test_a_loss_beyond_the_numbers_is_an_infinite_perplexity() -> None:
    mean = Mean()
    mean.add(np.array([1e5]))
    assert mean.perplexity == math.inf


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda t: halves(t, 31), DataError, "has 61 tokens, 62 are needed"),
        (lambda t: halves(t, 2), OptionError, "--ctx-size: in a window of 2 no token"),
        (lambda t: strided(t, 31, 5), DataError, "has 61 tokens, 62 are needed"),
        (lambda t: strided(t, 10, 10), OptionError, "--ppl-stride: 10 does not fit"),
        (lambda t: strided(t, 10, 0), OptionError, "--ppl-stride: 0 does not fit"),
        (lambda t: whole(t[:1], 10), DataError, "has 1 tokens, 2 are needed"),
        (lambda t: whole(t, 1), OptionError, "--ctx-size: in a window of 1 no token"),
    ],
)
def test_windows_that_score_nothing_are_refused(make, error, message, text) -> None:
    with pytest.raises(error, match=message):
        make(text)
