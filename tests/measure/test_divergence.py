"""KL divergence and its kin against float64, from a file and between two contexts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.errors import DataError
from engine.measure import (
    Divergence,
    compare,
    divergence,
    halves,
    open_logit_writer,
    perplexity,
    read_logit_file,
    whole,
)
from engine.measure.divergence import percentile
from tests.measure.scripted import ScriptedContext, log_softmax

N_VOCAB, N_CTX = 13, 10


@pytest.fixture
def text(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(1, N_VOCAB, 64, np.int32)


@pytest.fixture
def pair(rng: np.random.Generator) -> tuple[ScriptedContext, ScriptedContext]:
    table = rng.standard_normal((N_VOCAB, N_VOCAB), np.float32) * 2
    other = table + rng.standard_normal(table.shape, np.float32) * np.float32(0.3)
    return ScriptedContext(table), ScriptedContext(other)


def expected_values(windows, pair) -> dict[str, np.ndarray]:
    """Losses, divergences and probabilities of the scored tokens, in float64."""
    columns = {name: [] for name in ("loss", "base", "divergence", "same")}
    for number in range(windows.count):
        window = windows.at(number)
        scored = slice(windows.first, windows.n_ctx - 1)
        p, q = (log_softmax(context.rows(window))[scored] for context in pair)
        targets = window[windows.first + 1 :]
        at = np.arange(len(targets))
        columns["loss"].append(-q[at, targets])
        columns["base"].append(-p[at, targets])
        columns["divergence"].append((np.exp(p) * (p - q)).sum(axis=1))
        columns["same"].append(p.argmax(axis=1) == q.argmax(axis=1))
    return {name: np.concatenate(values) for name, values in columns.items()}


def check(found: Divergence, expected: dict[str, np.ndarray], atol: float) -> None:
    n = len(expected["loss"])
    loss, base = expected["loss"], expected["base"]
    change = np.exp(-loss) - np.exp(-base)
    assert found.count == n
    assert found.loss.value == pytest.approx(loss.mean(), abs=atol)
    assert found.base_loss.value == pytest.approx(base.mean(), abs=atol)
    assert found.divergence.value == pytest.approx(expected["divergence"].mean(), abs=atol)
    error = expected["divergence"].std() / math.sqrt(n - 1)
    assert found.divergence.error == pytest.approx(error, abs=atol)
    ratio, ratio_error = found.log_ratio
    assert ratio == pytest.approx((loss - base).mean(), abs=atol)
    assert ratio_error == pytest.approx((loss - base).std() / math.sqrt(n - 1), abs=atol)
    assert found.rms_change[0] == pytest.approx(math.sqrt((change**2).mean()), abs=atol)
    share, share_error = found.same_top_share
    assert share == expected["same"].mean()
    assert share_error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)))
    summary = found.summary()
    np.testing.assert_allclose(summary.divergences, np.sort(expected["divergence"]), atol=atol)
    np.testing.assert_allclose(summary.changes, np.sort(change), atol=atol)
    assert summary.correlation == pytest.approx(np.corrcoef(loss, base)[0, 1], abs=10 * atol)
    assert summary.ratio[0] == pytest.approx(math.exp(loss.mean() - base.mean()), rel=atol * 10)
    difference = math.exp(loss.mean()) - math.exp(base.mean())
    assert summary.difference[0] == pytest.approx(difference, abs=100 * atol)


def test_divergence_from_a_file_is_what_the_formula_says(pair, text, tmp_path) -> None:
    windows = halves(text, N_CTX)
    with open_logit_writer(tmp_path / "base.kld", windows, N_VOCAB) as writer:
        list(perplexity(pair[0], windows, writer))
    base = read_logit_file(tmp_path / "base.kld")
    counts = [found.count for found in divergence(pair[1], N_VOCAB, base)]
    assert counts == [windows.n_scored * (i + 1) for i in range(windows.count)]
    *_, found = divergence(pair[1], N_VOCAB, base)
    check(found, expected_values(windows, pair), 2e-4)  # steps of 16 bits


def test_a_model_does_not_differ_from_its_own_file(pair, text, tmp_path) -> None:
    windows = halves(text, N_CTX)
    with open_logit_writer(tmp_path / "base.kld", windows, N_VOCAB) as writer:
        list(perplexity(pair[0], windows, writer))
    *_, found = divergence(pair[0], N_VOCAB, read_logit_file(tmp_path / "base.kld"))
    assert abs(found.divergence.value) < 16 / 65535 / 2  # half a step of the file
    assert found.same_top_share == (1.0, 0.0)


def test_a_file_of_another_vocabulary_is_refused(pair, text, tmp_path) -> None:
    windows = halves(text, N_CTX)
    with open_logit_writer(tmp_path / "base.kld", windows, N_VOCAB) as writer:
        list(perplexity(pair[0], windows, writer))
    with pytest.raises(DataError, match="vocabulary of 13 tokens, the model has 14"):
        next(divergence(pair[1], 14, read_logit_file(tmp_path / "base.kld")))


def test_the_first_token_of_a_files_windows_is_the_models_own(pair, text, tmp_path) -> None:
    windows = halves(text, N_CTX, bos=0)
    with open_logit_writer(tmp_path / "base.kld", windows, N_VOCAB) as writer:
        list(perplexity(pair[0], windows, writer))
    base = read_logit_file(tmp_path / "base.kld")
    assert base.windows.tokens.tolist() == text[:60].tolist()
    pair[0].seen.clear()
    list(divergence(pair[0], N_VOCAB, base, bos=0))
    assert {seen[0] for seen in pair[0].seen} == {0}


def test_two_contexts_are_compared_on_every_token(pair, text) -> None:
    windows = whole(text, N_CTX)
    *_, found = compare(*pair, windows)
    check(found.divergence, expected_values(windows, pair), 1e-5)
    differences = [
        pair[1].rows(w[:-1]).astype(np.float64) - pair[0].rows(w[:-1])
        for w in map(windows.at, range(windows.count))
    ]
    size = np.abs(np.array(differences))
    window, position, token = np.unravel_index(size.argmax(), size.shape)
    assert found.largest_error == pytest.approx(size.max(), rel=1e-5)
    assert found.place == (window * N_CTX + position, token)
    assert found.rms_error == pytest.approx(math.sqrt((size**2).mean()), rel=1e-5)


def test_a_context_does_not_differ_from_itself(pair, text) -> None:
    *_, found = compare(pair[0], ScriptedContext(pair[0].table), whole(text, N_CTX))
    assert (found.largest_error, found.rms_error) == (0, 0)
    assert abs(found.divergence.divergence.value) < 1e-6
    assert found.divergence.summary().correlation == pytest.approx(1)


def test_contexts_that_give_blocks_of_other_sizes_are_noticed(pair, text) -> None:
    other = ScriptedContext(pair[1].table, block=4)
    with pytest.raises(ValueError, match="zip"):
        list(compare(pair[0], other, whole(text, N_CTX)))


def test_percentiles_lie_between_values() -> None:
    values = np.array([0, 1, 2, 10], np.float32)
    assert percentile(values, 0) == 0
    assert percentile(values, 0.5) == pytest.approx(1.5)
    assert percentile(values, 0.9) == pytest.approx(7.6)
    assert percentile(values, 1) == 10
