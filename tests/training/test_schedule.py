"""The schedule: recorded factors, the formula in float64, and options that would never end."""

from __future__ import annotations

import json
import math

import pytest

from engine.errors import OptionError
from engine.training.schedule import Schedule

RUNS = {
    "a": Schedule(),
    "b": Schedule(warmup=4, decay_steps=10, decay_min=0.2, alpha=0.005),
    "c-epochs": Schedule(warmup=5, restart=True),
    "g-rtl": Schedule(warmup=5),
    "smollm2": Schedule(warmup=2),
}


@pytest.mark.parametrize("run", RUNS)
def test_factors_are_the_recorded_ones(data_dir, run):
    rows = json.loads((data_dir / f"finetune-{run}.json").read_text())["iters"]
    made = [f"{RUNS[run](row['iter']):f}" for row in rows]
    assert made == [f"{row['sched']:f}" for row in rows]
    assert len(set(made)) > 4


def test_warm_up_grows_evenly_and_the_floor_holds_in_it():
    plain = Schedule(warmup=10)
    assert [plain(i) for i in (0, 5)] == [0.0, 0.5]
    lifted = Schedule(warmup=10, alpha=1.0, min_alpha=0.5)
    assert [lifted(i) for i in (0, 5)] == [0.5, 0.75]


def test_without_restarts_the_cosine_has_run_since_step_0():
    schedule = Schedule(warmup=5, decay_steps=10, decay_min=0.0)
    assert schedule(5) == pytest.approx(0.5, abs=1e-6)
    assert schedule(10) == pytest.approx(0.0, abs=1e-6)
    assert schedule(10**6) == schedule(10)


def test_without_warm_up_the_cosine_begins_at_1():
    assert Schedule(warmup=0)(0) == 1.0


def reference(step, warmup, period, low, factor):
    """Restarts in plain float64."""
    q = step - warmup
    while q > period:
        q -= period
        period = int(factor * period)
    return (1 - low) * 0.5 * (1 + math.cos(math.pi * q / period)) + low


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
def test_restarts_agree_with_the_formula_step_by_step(factor):
    schedule = Schedule(warmup=3, decay_steps=4, restart=True, restart_factor=factor)
    for step in range(3, 60):
        expected = reference(step, 3, 4, 0.1, factor)
        assert schedule(step) == pytest.approx(expected, abs=1e-6), step


def test_a_period_that_truncation_never_lets_grow_ends_at_once():
    schedule = Schedule(warmup=0, decay_steps=5, restart=True, restart_factor=1.1)
    # 1.1 · 5 truncates to 5: every period is equal, and a huge step is as cheap as a small one.
    assert schedule(5 * 10**14 + 2) == schedule(2)
    assert schedule(5 * 10**14) == schedule(5)


def test_a_period_may_grow_beyond_any_run():
    schedule = Schedule(warmup=0, decay_steps=2, restart=True, restart_factor=3e38)
    assert schedule(3) == pytest.approx(1.0)


def test_a_learning_rate_of_0_has_the_factor_1():
    assert Schedule(alpha=0.0, min_alpha=0.5)(7) == 1.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay_steps": 0}, "--cos-decay-steps 0"),
        ({"decay_steps": -3}, "--cos-decay-steps -3"),
        ({"restart_factor": 0.99}, "--cos-decay-restart 0.99"),
        ({"restart_factor": math.inf}, "--cos-decay-restart inf"),
        ({"decay_min": math.nan}, "--cos-decay-min nan"),
        ({"alpha": math.nan}, "--adam-alpha nan"),
        ({"min_alpha": math.inf}, "--adam-min-alpha inf"),
    ],
)
def test_options_without_a_schedule_are_refused_by_name(options, named):
    with pytest.raises(OptionError, match=named):
        Schedule(**options)
