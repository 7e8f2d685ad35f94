"""The plan that fits a budget: as many layers kept as can be, and no bit changed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from engine.errors import EngineError
from engine.training.memory_plan import fastest_plan

N_LAYER = 12
GRADIENT = 40


@dataclass
class Planned:
    """A trainer of 100 bytes, and 50 for each layer kept."""

    kept: int
    memory_bytes: int
    flops: int
    repeated_flops: int


def made(kept: int) -> Planned:
    repeated = 10 * (N_LAYER - kept)
    return Planned(kept, 100 + 50 * kept, 400 + repeated, repeated)


def plan(limit, make=made):
    return fastest_plan(make, N_LAYER, limit, lambda t: t.memory_bytes + GRADIENT, "--batch (4)")


@pytest.mark.parametrize(
    "limit, kept", [(140, 0), (189, 0), (190, 1), (441, 6), (739, 11), (740, 12), (10**9, 12)]
)
def test_as_many_layers_are_kept_as_fit(limit, kept):
    trainer, chosen = plan(limit)
    assert (trainer.kept, chosen.kept_layers) == (kept, kept)
    assert chosen.n_bytes == 140 + 50 * kept <= limit
    assert chosen.extra == pytest.approx((N_LAYER - kept) * 10 / 400)


def test_a_limit_below_the_least_is_refused_with_both():
    with pytest.raises(EngineError) as caught:
        plan(139)
    assert str(caught.value).startswith("--memory-limit: this run takes 0.0 MB at the least")
    assert "lower --batch (4)" in str(caught.value)


def test_a_plan_that_the_system_cannot_hold_does_not_fit():
    def make(kept):
        if kept > 7:
            raise MemoryError
        return made(kept)

    assert plan(10**9, make)[1].kept_layers == 7


@pytest.mark.parametrize(
    "limit, text",
    [
        (10**9, "no checkpointing, 0.0 MB of 953.7 MB, 0 % more time"),
        (441, "activations of 6 of 12 layers kept, 0.0 MB of 0.0 MB, 15 % more time"),
        (140, "checkpointing of every layer, 0.0 MB of 0.0 MB, 30 % more time"),
    ],
)
def test_a_plan_says_what_it_chose(limit, text):
    assert plan(limit)[1].text().startswith(text)
