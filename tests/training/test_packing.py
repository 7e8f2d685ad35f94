"""Several samples a row: each as in a row of its own, in the data, the loss and the gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import DataError
from engine.lora import KINDS, create_adapter
from engine.model import Model
from engine.training.data import (
    NO_TARGET,
    Batches,
    BatchOptions,
    Samples,
    ShuffleState,
    samples_hash,
)
from engine.training.trainer import Trainer

MODEL = Path(__file__).parents[1] / "data" / "mini-gqa-f32.gguf"
BOS, EOS = 1, 2
N_BATCH, N_CTX = 3, 16


def made_samples(rng, sizes, n_vocab, masked=False):
    size = np.array(sizes, dtype=np.int64)
    begin = np.cumsum(size) - size
    tokens = rng.integers(3, n_vocab, size.sum(), dtype=np.int32)
    mask = rng.random(size.sum()) < 0.7 if masked else None
    return Samples(tokens, begin, size, samples_hash("t", begin, size), mask=mask)


def stream(samples, n_batch=N_BATCH, seed=3, **options):
    state = ShuffleState()
    state.restart(samples, seed)
    return Batches(samples, state, BatchOptions(n_batch, N_CTX, BOS, EOS, **options))


def pieces(batch):
    """Inputs and targets of each sample of packed rows, in order, without the padding."""
    found = []
    for inputs, targets, starts in zip(batch.inputs, batch.targets, batch.starts, strict=True):
        for start in np.unique(starts):
            here = np.flatnonzero(starts == start)
            assert here.tolist() == list(range(start, here[-1] + 1))
            if inputs[start] == BOS:
                found.append((inputs[here].tolist(), targets[here].tolist()))
            else:
                assert (inputs[here] == EOS).all() and (targets[here] == NO_TARGET).all()
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_each_sample_is_what_it_would_be_in_a_row_of_its_own(rng, masked):
    sizes = [*rng.integers(1, N_CTX, 20).tolist(), N_CTX, N_CTX + 1, 3 * N_CTX]
    samples = made_samples(rng, sizes, 99, masked)
    packed, alone = stream(samples, pack_samples=True), stream(samples, n_batch=1)
    n_used = 0
    while packed.epochs == 0:
        batch = packed.next()
        found = pieces(batch)
        assert len(found) == batch.used >= N_BATCH
        for inputs, targets in found:
            if n_used == len(samples):
                break  # the last rows wrap around
            row = alone.next()
            n = len(inputs)
            assert row.inputs[0, :n].tolist() == inputs
            expected = row.targets[0, :n]
            assert expected.tolist() == targets
            n_used += 1
    assert n_used == len(samples)


def test_rows_take_samples_as_long_as_they_fit_whole(rng):
    samples = made_samples(rng, [5] * 12, 99)
    batch = stream(samples, pack_samples=True).next()
    assert batch.used == 9
    assert batch.starts.tolist() == [[0] * 5 + [5] * 5 + [10] * 5 + [15]] * N_BATCH
    exact = stream(made_samples(rng, [8] * 12, 99), pack_samples=True).next()
    assert exact.used == 6
    assert exact.starts.tolist() == [[0] * 8 + [8] * 8] * N_BATCH


def test_a_sample_that_begins_with_its_own_token_keeps_it(rng):
    samples = replace(made_samples(rng, [4, 4], 99), begin_token=7)
    batch = stream(samples, n_batch=1, pack_samples=True).next()
    assert batch.inputs[0, [0, 4]].tolist() == [7, 7]


def test_a_packed_stream_is_resumed_where_it_stood(rng):
    samples = made_samples(rng, rng.integers(1, N_CTX, 30).tolist(), 99)
    first = stream(samples, pack_samples=True)
    for _ in range(4):
        first.next()
    state = first.state
    copy = ShuffleState(state.rng_state, state.samples_hash, state.sample_count, state.next_sample)
    again = Batches(samples, copy, first.options)
    for _ in range(5):
        expected, made = first.next(), again.next()
        assert np.array_equal(made.inputs, expected.inputs)
        assert np.array_equal(made.starts, expected.starts)


# ---------------------------------------------------------------- loss and gradient


def trained(model, n_rows, **options):
    ranks = {kind: 1 if "norm" in kind else 3 for kind in KINDS}
    adapter = create_adapter(model.adapter_shapes(ranks), 4, 4, 1)
    adapter.flat[:] = np.random.default_rng(5).standard_normal(adapter.flat.size, np.float32) * 0.1
    return Trainer(model, adapter, n_rows, N_CTX, n_threads=2, compute="f32", **options)


@pytest.fixture(scope="module")
def model():
    return Model.load(MODEL)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_samples_have_the_loss_and_gradient_of_rows_of_their_own(model, rng, checkpointing):
    n_vocab = model.hparams.n_vocab
    samples = made_samples(rng, rng.integers(2, 9, 40).tolist(), n_vocab, masked=True)
    batch = stream(samples, pack_samples=True).next()
    assert batch.used > N_BATCH
    packed = trained(model, N_BATCH, packed=True, checkpointing=checkpointing)
    loss = packed.evaluate(batch.inputs, batch.targets, 1.0, batch.starts)
    alone = trained(model, batch.used)
    rows = stream(samples, n_batch=batch.used).next()
    assert loss == pytest.approx(alone.evaluate(rows.inputs, rows.targets), rel=1e-5)
    scale = np.abs(alone.grad).max()
    assert scale > 0
    assert np.abs(packed.grad - alone.grad).max() <= 2e-5 * scale


def test_without_starts_the_wall_between_samples_is_missing(model, rng):
    samples = made_samples(rng, [5] * 12, model.hparams.n_vocab)
    batch = stream(samples, pack_samples=True).next()
    packed = trained(model, N_BATCH, packed=True)
    right = packed.evaluate(batch.inputs, batch.targets, 1.0, batch.starts)
    wrong = packed.evaluate(batch.inputs, batch.targets)
    assert abs(right - wrong) > 3e-5 * right  # ten times what order of summation may do
    assert wrong == pytest.approx(trained(model, N_BATCH).evaluate(*batch[:2]), rel=1e-6)


def test_starts_that_cannot_be_are_refused(model, rng):
    batch = stream(made_samples(rng, [5] * 12, 9), pack_samples=True).next()
    rows = batch.inputs, batch.targets, 1.0
    with pytest.raises(DataError, match="not for this trainer"):
        trained(model, N_BATCH).evaluate(*rows, batch.starts)
    packed = trained(model, N_BATCH, packed=True)
    with pytest.raises(DataError, match="not for this trainer"):
        packed.evaluate(*rows, batch.starts[:1])
    for bad in (batch.starts + 1, batch.starts - 1):
        with pytest.raises(DataError, match="begins behind"):
            packed.evaluate(*rows, bad.astype(np.int32))
