"""A batch that goes through the graph some rows after others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.lora import create_adapter
from engine.model import Model
from engine.training import trainer as trainers
from engine.training.trainer import PASS_TOKENS, Trainer, rows_at_once

MODEL = Path(__file__).parents[1] / "data" / "mini-f32.gguf"
N_BATCH, N_CTX = 6, 8


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(MODEL)


def trained(model: Model, **options: bool) -> Trainer:
    """A trainer of an adapter that is the same each time."""
    ranks = {"token_embd": 2, "attn_q": 3, "ffn_down": 2, "attn_norm": 1, "output": 4}
    adapter = create_adapter(model.adapter_shapes(ranks), 4, 4, 1)
    adapter.flat[:] = np.random.default_rng(5).standard_normal(adapter.flat.size, np.float32) * 0.1
    return Trainer(model, adapter, N_BATCH, N_CTX, compute="f32", **options)


def batch(model: Model, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, model.hparams.n_vocab, (N_BATCH, N_CTX), np.int32) for _ in range(2)]


@pytest.mark.parametrize(
    ("n_batch", "n_ctx", "expected"),
    [
        (4, 64, 4),  # few tokens: at once
        (8, 512, PASS_TOKENS // 512),
        (8, 4096, 1),  # a row is never cut
        (7, 128, 7),  # single rows would be too few tokens
        (31, 512, 1),
        (1, 1, 1),
        (12, PASS_TOKENS // 4, 4),
    ],
)
def test_rows_that_go_together_divide_the_batch(n_batch: int, n_ctx: int, expected: int) -> None:
    assert rows_at_once(n_batch, n_ctx) == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_give_the_loss_and_gradient_of_one(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    inputs, targets = batch(model, rng)
    targets[1, 3:] = targets[4, ::2] = -1  # rows do not weigh the same
    whole = trained(model, checkpointing=checkpointing)
    loss = whole.evaluate(inputs, targets)
    monkeypatch.setattr(trainers, "PASS_TOKENS", 2 * N_CTX)
    parts = trained(model, checkpointing=checkpointing)
    assert parts.memory_bytes < whole.memory_bytes
    assert (parts.flops, parts.input_bytes) == (whole.flops, whole.input_bytes)
    assert parts.evaluate(inputs, targets) == pytest.approx(loss, rel=1e-6)
    assert parts.loss(inputs, targets) == pytest.approx(whole.loss(inputs, targets), rel=1e-6)
    np.testing.assert_allclose(
        parts.grad, whole.grad, rtol=1e-4, atol=1e-6 * float(np.abs(whole.grad).max())
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_in_between_takes_no_memory_and_changes_no_bit(
    model: Model, rng: np.random.Generator, checkpointing: bool
) -> None:
    inputs, targets = batch(model, rng)
    alone, watched = (trained(model, checkpointing=checkpointing) for _ in range(2))
    losses = [alone.evaluate(inputs, targets) for _ in range(2)]
    total, n_counted = watched.loss(inputs, targets)
    assert total / n_counted == pytest.approx(losses[0], rel=1e-6)
    found = []
    for _ in range(2):
        found.append(watched.evaluate(inputs, targets))
        assert watched.loss(inputs, targets) == (total, n_counted)
    assert found == losses
    assert watched.grad.tobytes() == alone.grad.tobytes()
    training, forward = watched._training, watched._forward
    assert forward is not None and forward.losses[0].owner is training.losses[0].owner


def test_the_gradient_is_told_of_when_the_last_pass_has_added_to_it(
    model: Model, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainers, "PASS_TOKENS", 2 * N_CTX)
    monkeypatch.setattr(trainers, "PART_BYTES", 400)
    trainer, told = trained(model), []
    trainer.accumulate(
        *batch(model, rng), 1.0, None, lambda a, b: told.append((a, b, trainer.grad[a:b].copy()))
    )
    assert len(told) > 2 and sum(b - a for a, b, _ in told) == trainer.grad.size
    assert all(np.array_equal(value, trainer.grad[a:b]) for a, b, value in told)
