"""The order of events of a run, against records and against the rules written out."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.training.checkpoint import TrainingState
from engine.training.data import Batches, BatchOptions, Samples, samples_hash
from engine.training.loop import End, NotFiniteError, Run, RunOptions
from engine.training.report import bar_text, duration_text, output_name
from engine.training.schedule import Schedule
from engine.training.state import ValidationState

from .plain_adamw import PlainAdamW

N_PARAMETERS = 6
BOS, EOS = 1, 2


class Bowl:
    """A loss with a minimum for each batch: half the mean square distance from its tokens."""

    def __init__(self, x, grad):
        self.x, self.grad = x, grad
        self.losses = []

    def __call__(self, inputs, targets, weight, starts=None):
        wanted = targets.ravel()[: self.x.size].astype(np.float64) / 10
        distance = self.x.astype(np.float64) - wanted
        self.grad += weight * distance / distance.size
        self.losses.append(float(np.float32(np.mean(distance**2) / 2)))
        return self.losses[-1]


class Script:
    """An evaluation that returns given losses, the last one for ever."""

    def __init__(self, losses):
        self.losses = list(losses)

    def __call__(self, inputs, targets, weight, starts=None):
        return self.losses.pop(0) if len(self.losses) > 1 else self.losses[0]


@dataclass
class Bench:
    """A run with all its parts, and everything that it told."""

    run: Run
    state: TrainingState
    x: np.ndarray
    evaluate: Bowl | Script
    optimizer: PlainAdamW
    batches: Batches
    events: list = field(default_factory=list)
    saves: dict = field(default_factory=dict)

    def told(self, kind):
        return [event[1] for event in self.events if event[0] == kind]


def made_samples(count=47, size=4):
    tokens = np.arange(3, 3 + count * size, dtype=np.int32) % 90
    begin = np.arange(count, dtype=np.int64) * size
    sizes = np.full(count, size, dtype=np.int64)
    return Samples(tokens, begin, sizes, samples_hash("x", begin, sizes))


DEFAULT_OPTIONS = RunOptions(adam_iter=5)
DEFAULT_SCHEDULE = Schedule(warmup=4)


def bench(
    *,
    options=DEFAULT_OPTIONS,
    samples=None,
    state=None,
    x=None,
    losses=None,
    n_past=0,
    schedule=DEFAULT_SCHEDULE,
    stop_after=None,
    clock=lambda: 0,
):
    """Set up a run; `stop_after` asks it to stop from that many evaluations on."""
    samples = samples or made_samples()
    if state is None:
        state = TrainingState.fresh(N_PARAMETERS, n_past)
        state.shuffle.restart(samples, 5)
    x = np.zeros(N_PARAMETERS, dtype=np.float32) if x is None else x
    grad = np.full(N_PARAMETERS, 1e6, dtype=np.float32)  # what is left from before must not count
    batches = Batches(samples, state.shuffle, BatchOptions(4, 4, BOS, EOS))
    optimizer = PlainAdamW(x, alpha=0.05)
    evaluate = Bowl(x, grad) if losses is None else Script(losses)
    events, saves = [], {}
    evaluations = 0

    def counted(*args):
        nonlocal evaluations
        evaluations += 1
        events.append(("evaluate", evaluations))
        return evaluate(*args)

    def commit():
        events.append(("commit", state.opt_iteration))

    def save(iteration):
        events.append(("save", iteration))
        saves[iteration] = (copy.deepcopy(state), x.copy())

    run = Run(
        state,
        batches,
        counted,
        grad,
        optimizer,
        schedule,
        options,
        on_iteration=lambda report: events.append(("line", report)),
        on_evaluation=lambda report: events.append(("figures", report)),
        on_reshuffle=lambda epochs: events.append(("reshuffle", epochs)),
        on_end=lambda ms: events.append(("end", ms)),
        on_save=save,
        on_commit=commit,
        stop_requested=lambda: stop_after is not None and evaluations >= stop_after,
        clock=clock,
    )
    return Bench(run, state, x, evaluate, optimizer, batches, events, saves)


# Order of events


def test_n_updates_take_n_plus_1_evaluations_and_lines():
    b = bench(options=RunOptions(adam_iter=3))
    result = b.run.run()
    lines = [report.iteration for report in b.told("line")]
    assert lines == [0, 1, 2, 3]
    assert b.told("evaluate") == [1, 2, 3, 4]
    assert (result.end, result.iteration, result.cancelled) == (End.ITERATIONS, 3, False)


def test_a_line_tells_the_last_loss_and_the_next_factor():
    b = bench(options=RunOptions(adam_iter=3))
    result = b.run.run()
    lines = b.told("line")
    assert [line.loss for line in lines] == [0.0, *b.evaluate.losses[:3]]
    assert [line.first_loss for line in lines] == [0.0] + 3 * [b.evaluate.losses[0]]
    assert [line.sched for line in lines] == [0.0, 0.25, 0.5, 0.75]
    assert [line.sample for line in lines] == [1, 5, 9, 13]
    assert {line.n_samples for line in lines} == {47}
    assert (result.first_loss, result.last_loss) == (b.evaluate.losses[0], b.evaluate.losses[3])


def test_an_update_uses_the_factor_of_the_line_before_it():
    # With warm-up the first factor is 0: moments move, weights do not.
    b = bench(options=RunOptions(adam_iter=1))
    b.run.run()
    assert not b.x.any()
    assert b.state.m.all() and b.state.v.all()
    assert b.state.opt_iteration == 1


def test_the_run_is_the_rules_written_out():
    b = bench(options=RunOptions(adam_iter=8, grad_acc=2, save_every=0))
    b.run.run()
    x = np.zeros(N_PARAMETERS, dtype=np.float32)
    plain = PlainAdamW(x, alpha=0.05)
    samples, schedule = made_samples(), DEFAULT_SCHEDULE
    state = TrainingState.fresh(N_PARAMETERS)
    state.shuffle.restart(samples, 5)
    batches = Batches(samples, state.shuffle, BatchOptions(4, 4, BOS, EOS))
    for iteration in range(1, 9):
        grad = np.zeros_like(x)
        bowl = Bowl(x, grad)
        for _ in range(2):
            batch = batches.next()
            bowl(batch.inputs, batch.targets, 0.5)
        plain.step(grad, schedule(iteration - 1), iteration, plain.norm(grad))
    assert x.any()
    assert np.array_equal(b.x, x)
    assert np.array_equal(b.state.m, plain.m)
    assert np.array_equal(b.state.v, plain.v)


def test_the_loss_of_accumulated_batches_is_their_mean():
    b = bench(options=RunOptions(adam_iter=1, grad_acc=4))
    b.run.run()
    total = np.float32(0)
    for loss in b.evaluate.losses[:4]:
        total += np.float32(loss)
    assert b.told("line")[1].loss == float(total * np.float32(0.25))
    assert len(b.told("line")) == 2
    assert len(b.told("evaluate")) == 8


def test_no_updates_are_one_evaluation_one_line_and_no_save():
    b = bench(options=RunOptions(adam_iter=0))
    b.run.run()
    kinds = [event[0] for event in b.events]
    assert kinds == ["line", "evaluate", "figures", "end"]


# Saving


def test_saves_precede_the_line_of_their_iteration_and_the_end_saves_the_rest():
    b = bench(options=RunOptions(adam_iter=7, save_every=3))
    b.run.run()
    order = [(kind, getattr(what, "iteration", what)) for kind, what in b.events]
    assert [what for kind, what in order if kind == "save"] == [3, 6, 7]
    for iteration in (3, 6):
        assert order[order.index(("save", iteration)) + 1] == ("line", iteration)
    assert order[-3][0] == "end" and order[-2:] == [("save", 7), ("commit", 7)]


def test_a_run_whose_last_update_was_just_saved_writes_nothing_more():
    b = bench(options=RunOptions(adam_iter=6, save_every=3))
    b.run.run()
    assert b.told("save") == [3, 6]


@pytest.mark.parametrize("save_every", [0, -1])
def test_without_save_every_only_the_end_saves(save_every):
    b = bench(options=RunOptions(adam_iter=6, save_every=save_every))
    b.run.run()
    assert b.told("save") == [6]


def test_counters_grow_at_saves_and_draws():
    b = bench(options=RunOptions(adam_iter=5, save_every=2, grad_acc=3))
    b.run.run()
    counts = {i: (s.iterations, s.tokens, s.samples) for i, (s, _) in b.saves.items()}
    # Tokens: updates · 3 accumulated · 4 rows · 4 tokens. Samples: 12 an evaluation, and the
    # save at the end has drawn one evaluation more.
    assert counts == {2: (2, 96, 24), 4: (4, 192, 48), 5: (5, 240, 72)}


def test_a_save_holds_the_loss_of_the_line_and_the_first_loss_as_best():
    b = bench(options=RunOptions(adam_iter=4, save_every=2))
    b.run.run()
    lines = {line.iteration: line for line in b.told("line")}
    state, _ = b.saves[2]
    assert state.previous_loss == lines[2].loss
    assert state.best_loss == b.evaluate.losses[0] > b.evaluate.losses[1]
    assert not state.just_initialized
    assert b.saves[4][0].previous_loss == lines[4].loss


def test_the_end_holds_the_loss_that_no_line_tells():
    b = bench(options=RunOptions(adam_iter=3, save_every=0))
    b.run.run()
    assert b.saves[3][0].previous_loss == b.evaluate.losses[3]


# Resuming


def test_a_resumed_run_repeats_the_interrupted_one_exactly():
    options = RunOptions(adam_iter=30, save_every=10, grad_acc=2)
    whole = bench(options=options, n_past=2)
    whole.run.run()
    for at in (10, 20):
        state, x = copy.deepcopy(whole.saves[at])
        rest = RunOptions(adam_iter=30 - at, save_every=10, grad_acc=2)
        again = bench(options=rest, state=state, x=x)
        again.run.run()
        lines = [r for r in whole.told("line") if r.iteration >= at]
        resumed = again.told("line")
        assert [r.iteration for r in resumed] == [r.iteration for r in lines]
        assert [r.loss for r in resumed] == [0.0] + [r.loss for r in lines[1:]]
        assert [r.sched for r in resumed] == [r.sched for r in lines]
        assert [r.sample for r in resumed] == [r.sample for r in lines]
        assert np.array_equal(again.x, whole.x)
        assert np.array_equal(again.state.v, whole.state.v)
        assert again.state.shuffle == whole.state.shuffle
        assert again.state.tokens == whole.state.tokens


def test_a_run_resumed_from_its_end_skips_the_batch_that_was_drawn():
    first = bench(options=RunOptions(adam_iter=3, save_every=0))
    first.run.run()
    state, x = copy.deepcopy(first.saves[3])
    again = bench(options=RunOptions(adam_iter=1), state=state, x=x)
    again.run.run()
    assert first.told("line")[-1].sample == 13
    assert again.told("line")[0].sample == 17


def test_iteration_numbers_go_on_and_the_first_save_counts_from_there():
    state = TrainingState.fresh(N_PARAMETERS)
    state.shuffle.restart(made_samples(), 5)
    state.opt_iteration = state.iterations = 7
    b = bench(options=RunOptions(adam_iter=5, save_every=3), state=state)
    b.run.run()
    assert [line.iteration for line in b.told("line")] == [7, 8, 9, 10, 11, 12]
    assert b.told("save") == [10, 12]
    assert b.state.iterations == 12


def test_a_loaded_count_without_improvement_is_forgotten():
    state = TrainingState.fresh(N_PARAMETERS)
    state.shuffle.restart(made_samples(), 5)
    state.no_improvement = 4
    b = bench(options=RunOptions(adam_iter=9, max_no_improvement=5), state=state, losses=[3.0])
    result = b.run.run()
    assert (result.end, result.iteration) == (End.NO_IMPROVEMENT, 5)


# Ends


def recorded_lines(data_dir, name):
    return json.loads((data_dir / f"finetune-{name}.json").read_text())["iters"]


def test_the_recorded_run_of_two_epochs_ends_where_it_did(data_dir):
    recorded = recorded_lines(data_dir, "c-epochs")
    b = bench(
        options=RunOptions(adam_iter=400, save_every=50, epochs=2),
        schedule=Schedule(warmup=5, restart=True),
    )
    result = b.run.run()
    lines = [(r.iteration, r.sample, r.n_samples, f"{r.sched:f}") for r in b.told("line")]
    assert lines == [(r["iter"], r["sample"], r["samples"], f"{r['sched']:f}") for r in recorded]
    assert (result.end, result.iteration) == (End.EPOCHS, 24)
    assert b.told("save") == [24]
    # The line, the batch that was drawn, no evaluation of it.
    assert b.told("reshuffle") == [1, 2]
    assert len(b.told("evaluate")) == 24
    assert b.saves[24][0].samples == 25 * 4
    assert b.saves[24][0].epochs == 2


def test_an_epoch_that_ends_within_accumulation_ends_the_run_after_its_update():
    b = bench(
        options=RunOptions(adam_iter=50, grad_acc=3, epochs=1), samples=made_samples(count=25)
    )
    result = b.run.run()
    assert (result.end, result.iteration) == (End.EPOCHS, 3)
    assert [line.iteration for line in b.told("line")] == [0, 1, 2, 3]


def test_the_reshuffle_is_told_after_the_line_of_its_iteration():
    b = bench(options=RunOptions(adam_iter=12))
    b.run.run()
    kinds = [event[0] for event in b.events]
    place = kinds.index("reshuffle")
    assert b.events[place - 1][1].iteration == 11
    assert kinds[place + 1] == "evaluate"


def test_epochs_are_counted_over_all_runs_but_asked_for_further():
    first = bench(options=RunOptions(adam_iter=50, epochs=1))
    first.run.run()
    state, x = copy.deepcopy(first.saves[first.state.opt_iteration])
    again = bench(options=RunOptions(adam_iter=50, epochs=1), state=state, x=x)
    again.run.run()
    assert again.told("reshuffle") == [2]
    assert again.state.epochs == 2


def test_small_changes_of_the_loss_end_the_run():
    losses = [8.0, 4.0, 3.0, 2.99, 2.0]
    b = bench(options=RunOptions(adam_iter=9, adam_epsf=0.01), losses=losses)
    result = b.run.run()
    assert (result.end, result.iteration) == (End.SMALL_CHANGE, 3)
    # The update is done, the loss before it is kept.
    assert b.saves[3][0].previous_loss == 3.0


def test_a_loss_that_stands_still_does_not_end_a_run_without_tests():
    b = bench(options=RunOptions(adam_iter=9), losses=[3.0])
    assert b.run.run().iteration == 9


@pytest.mark.parametrize(("n_past", "ended"), [(1, 2), (2, 3), (4, 5)])
def test_a_loss_equal_to_that_of_a_window_ago_ends_the_run(n_past, ended):
    b = bench(options=RunOptions(adam_iter=20), losses=[3.0], n_past=n_past)
    result = b.run.run()
    assert (result.end, result.iteration) == (End.SMALL_DELTA, ended)


def test_the_window_keeps_the_losses_by_iteration():
    losses = [9.0, 8.0, 7.0, 6.0, 5.0]
    b = bench(options=RunOptions(adam_iter=4), losses=losses, n_past=3)
    b.run.run()
    # Place 0 held the first loss until update 1; update t goes to place (t - 1) mod 3.
    assert b.state.past_losses.tolist() == [5.0, 7.0, 6.0]


def test_after_resuming_the_window_holds_the_old_losses_but_one():
    state = TrainingState.fresh(N_PARAMETERS, 3)
    state.shuffle.restart(made_samples(), 5)
    state.opt_iteration, state.past_losses[:] = 4, [5.0, 7.0, 6.0]
    b = bench(options=RunOptions(adam_iter=5), state=state, losses=[4.0, 3.0, 6.0])
    result = b.run.run()
    # At iteration 4 place 1 takes 4.0; update 5 finds it, update 6 finds 6.0 at place 2.
    assert (result.end, result.iteration) == (End.SMALL_DELTA, 6)
    assert b.state.past_losses.tolist() == [5.0, 3.0, 6.0]


def test_no_better_loss_for_long_ends_the_run():
    losses = [5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 9.0]
    b = bench(options=RunOptions(adam_iter=20, max_no_improvement=3), losses=losses)
    result = b.run.run()
    assert (result.end, result.iteration) == (End.NO_IMPROVEMENT, 6)
    assert (b.state.best_loss, b.state.no_improvement) == (3.0, 3)


def test_losses_of_zero_cannot_be_compared_and_end_nothing():
    options = RunOptions(adam_iter=6, adam_epsf=0.5, opt_delta=0.5)
    b = bench(options=options, losses=[0.0], n_past=1)
    assert b.run.run().end is End.ITERATIONS


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_and_saves_nothing_more(loss):
    losses = [3.0, 3.0, 3.0, 3.0, 3.0, loss]
    b = bench(options=RunOptions(adam_iter=9, save_every=3), losses=losses)
    with pytest.raises(NotFiniteError, match=f"iteration 5: the loss is {loss}") as caught:
        b.run.run()
    assert caught.value.iteration == 5
    assert b.told("save") == [3]


@pytest.mark.parametrize("n_good", [3, 6])
def test_a_save_is_committed_once_its_own_evaluation_is_finite(n_good):
    losses = [3.0] * n_good + [float("nan")]
    b = bench(options=RunOptions(adam_iter=9, save_every=3), losses=losses)
    with pytest.raises(NotFiniteError, match=f"iteration {n_good}: "):
        b.run.run()
    assert b.told("save") == list(range(3, n_good + 1, 3))
    assert b.told("commit") == list(range(3, n_good, 3))


def test_every_save_of_a_good_run_is_committed_after_the_line_of_its_iteration():
    b = bench(options=RunOptions(adam_iter=7, save_every=3))
    b.run.run()
    assert b.told("commit") == b.told("save") == [3, 6, 7]
    kinds = [kind for kind, *_ in b.events]
    first = kinds.index("save")
    assert kinds[first : kinds.index("commit")] == ["save", "line", "evaluate"]


def test_a_save_that_a_stop_or_the_last_epoch_follows_is_committed():
    for epochs, stop_after in ((1, None), (0, 3)):
        options = RunOptions(adam_iter=50, save_every=1, epochs=epochs)
        b = bench(options=options, stop_after=stop_after)
        b.run.run()
        assert b.told("commit") == b.told("save") != []


def test_a_commit_that_failed_is_made_good_at_the_end():
    b = bench(options=RunOptions(adam_iter=3, save_every=3))
    b.run._on_commit = lambda: False
    b.run.run()
    assert b.told("save") == [3, 3]


def test_a_validation_loss_that_is_not_finite_ends_as_an_evaluation_does():
    b = validated([float("nan")], RunOptions(adam_iter=9, save_every=1, eval_every=1, early_stop=1))
    b.run._evaluate_batch = Script([3.0, float("nan")])
    with pytest.raises(NotFiniteError, match="iteration 1: "):
        b.run.run()
    assert b.told("commit") == []


def test_a_gradient_that_is_not_finite_raises_before_it_is_used():
    b = bench(options=RunOptions(adam_iter=9, grad_acc=2))
    good = b.evaluate

    class Spoiled:
        calls = 0

        def __call__(self, *arguments):
            loss = good(*arguments)
            self.calls += 1
            if self.calls == 6:
                good.grad[2] = np.inf
            return loss

    b.run._evaluate_batch = Spoiled()
    with pytest.raises(NotFiniteError, match="iteration 2: the gradient is not finite"):
        b.run.run()
    assert np.isfinite(b.x).all() and np.isfinite(b.state.m).all()


# Figures of evaluations


def test_an_evaluation_tells_the_loss_of_its_own_weights():
    b = bench(options=RunOptions(adam_iter=3, grad_acc=2))
    b.run.run()
    reports = b.told("figures")
    assert [r.iteration for r in reports] == [0, 1, 2, 3]
    assert [r.loss for r in reports[:3]] == [line.loss for line in b.told("line")[1:]]
    assert [r.sched for r in reports] == [line.sched for line in b.told("line")]
    assert [r.samples for r in reports] == [8, 16, 24, 32]
    assert [r.tokens for r in reports] == [32, 64, 96, 128]
    assert {r.n_tokens for r in reports} == {32}
    assert {r.validation_loss for r in reports} == {None}
    assert {r.tokens_per_second for r in reports} == {0.0}


def test_the_norm_of_the_gradient_is_told_before_it_is_clipped():
    b = bench(options=RunOptions(adam_iter=0))
    b.run.run()
    # The one evaluation leaves its gradient: no update has taken it.
    assert b.told("figures")[0].gradient_norm == pytest.approx(np.linalg.norm(b.evaluate.grad))


def test_figures_of_a_resumed_run_go_on_where_the_saved_run_was():
    whole = bench(options=RunOptions(adam_iter=6, save_every=3))
    whole.run.run()
    state, x = copy.deepcopy(whole.saves[3])
    again = bench(options=RunOptions(adam_iter=3), state=state, x=x)
    again.run.run()
    assert again.told("figures") == [r for r in whole.told("figures") if r.iteration >= 3]


# Validation


def validated(losses, options, state=None):
    """A run whose validation losses are given; returns it with what was the best when."""
    if state is None:
        state = TrainingState.fresh(N_PARAMETERS)
        state.shuffle.restart(made_samples(), 5)
        state.validation = ValidationState(samples_hash=9)
    b = bench(options=options, state=state)
    script = Script(losses)
    b.run._validate_now = lambda: script(None, None, 1.0)
    b.run._on_best = lambda iteration: b.events.append(("best", iteration))
    return b


def validations(b):
    return {r.iteration: r.validation_loss for r in b.told("line") if r.validation_loss is not None}


def test_validation_comes_every_so_often_and_at_the_end():
    b = validated([5.0, 4.0, 4.5, 3.0], RunOptions(adam_iter=7, eval_every=3))
    b.run.run()
    assert validations(b) == {0: 5.0, 3: 4.0, 6: 4.5, 7: 3.0}
    assert b.told("best") == [0, 3, 7]
    figures = {r.iteration: r.validation_loss for r in b.told("figures")}
    assert figures == {**dict.fromkeys(range(8)), 0: 5.0, 3: 4.0, 6: 4.5, 7: 3.0}


def test_without_eval_every_only_the_end_is_validated():
    b = validated([5.0], RunOptions(adam_iter=4, eval_every=0))
    b.run.run()
    assert validations(b) == {4: 5.0}


def test_a_save_holds_the_validation_loss_of_its_iteration():
    b = validated([5.0, 4.0, 4.5], RunOptions(adam_iter=5, eval_every=2, save_every=2))
    b.run.run()
    saved = b.saves[2][0].validation
    assert (saved.iteration, saved.loss, saved.best_loss, saved.no_improvement) == (2, 4.0, 4.0, 0)
    saved = b.saves[4][0].validation
    assert (saved.iteration, saved.loss, saved.best_loss, saved.no_improvement) == (4, 4.5, 4.0, 1)


def test_an_end_by_another_test_is_validated_before_it_is_saved():
    options = RunOptions(adam_iter=50, epochs=1, save_every=0, eval_every=0)
    b = validated([5.0], options)
    assert b.run.run().end is End.EPOCHS
    (saved,) = b.saves.values()
    assert saved[0].validation.iteration == b.state.opt_iteration


def test_no_better_validation_loss_for_long_ends_the_run():
    losses = [5.0, 4.0, 4.125, 4.25, 1.0]
    b = validated(losses, RunOptions(adam_iter=50, eval_every=2, early_stop=2))
    result = b.run.run()
    assert (result.end, result.iteration) == (End.EARLY_STOP, 6)
    assert validations(b) == {0: 5.0, 2: 4.0, 4: 4.125, 6: 4.25}
    assert b.told("save") == [6]


def test_a_resumed_run_goes_on_with_its_validation():
    losses = [5.0, 4.0, 4.125, 4.25, 4.5]
    options = RunOptions(adam_iter=50, eval_every=2, save_every=4, early_stop=3)
    whole = validated(losses, options)
    whole.run.run()
    state, _ = copy.deepcopy(whole.saves[4])
    again = validated(losses[3:], options, state)
    assert (again.run.run().end, again.run.state.opt_iteration) == (End.EARLY_STOP, 8)
    assert validations(again) == {4: 4.125, 6: 4.25, 8: 4.5}


def test_validation_leaves_no_trace_in_the_training():
    plain = bench(options=RunOptions(adam_iter=9))
    plain.run.run()
    b = validated([5.0], RunOptions(adam_iter=9, eval_every=1))
    b.run.run()
    assert np.array_equal(b.x, plain.x)
    assert b.state.shuffle == plain.state.shuffle


def test_a_save_that_failed_is_tried_again_at_the_end():
    b = bench(options=RunOptions(adam_iter=4, save_every=2))
    tries = []
    b.run._on_save = lambda iteration: (tries.append(iteration), len(tries) != 2)[1]
    b.run.run()
    assert tries == [2, 4, 4]
    assert (b.state.iterations, b.state.tokens) == (4, 64)


# Stopping on request


def test_a_stop_is_obeyed_after_the_update_and_saves():
    b = bench(options=RunOptions(adam_iter=50, save_every=10), stop_after=4)
    result = b.run.run()
    assert (result.end, result.cancelled, result.iteration) == (End.STOPPED, True, 4)
    assert b.told("save") == [4]
    assert [line.iteration for line in b.told("line")] == [0, 1, 2, 3]
    assert [event[0] for event in b.events[-3:]] == ["end", "save", "commit"]


def test_a_stopped_run_resumes_exactly():
    whole = bench(options=RunOptions(adam_iter=12, save_every=0, grad_acc=2))
    whole.run.run()
    stopped = bench(options=RunOptions(adam_iter=12, save_every=0, grad_acc=2), stop_after=9)
    stopped.run.run()
    ((at, (state, x)),) = stopped.saves.items()
    assert at == 5
    again = bench(options=RunOptions(adam_iter=12 - at, save_every=0, grad_acc=2), state=state, x=x)
    again.run.run()
    assert np.array_equal(again.x, whole.x)
    assert again.state.shuffle == whole.state.shuffle


def test_a_stop_asked_for_before_the_first_evaluation_still_makes_one_update():
    b = bench(options=RunOptions(adam_iter=5), stop_after=0)
    assert b.run.run().iteration == 1


# Times and texts


class Ticks:
    """A clock that shows given times, one a call."""

    def __init__(self, times):
        self.times = iter(times)

    def __call__(self):
        return next(self.times)


def test_times_are_smoothed_and_saving_is_not_measured():
    # begin | start of line 0, end of its evaluation | stop and start of iterations 1, 2 and 3,
    # end of their evaluations | end. Iteration 2 saves for 900 ms.
    clock = Ticks([0, 10, 90, 110, 110, 290, 310, 1210, 1300, 1310, 1310, 1390, 1400])
    b = bench(options=RunOptions(adam_iter=3, save_every=2), clock=clock)
    b.run.run()
    lines = b.told("line")
    smoothed = 0.3 * 100 + 0.7 * 200
    last = 0.3 * smoothed + 0.7 * 100
    assert lines[0].dt_ms is None and lines[0].eta_ms is None
    assert [line.dt_ms for line in lines[1:]] == pytest.approx([100, smoothed, last])
    assert [line.eta_ms for line in lines[1:]] == pytest.approx([200, smoothed, 0])
    assert b.told("end") == [1400.0]
    figures = b.told("figures")
    assert [f.evaluation_ms for f in figures] == [80, 180, 90, 80]
    assert [f.elapsed_ms for f in figures] == [90, 290, 1300, 1390]
    assert figures[0].tokens_per_second == 16 / 0.080


def test_a_clock_that_has_not_ticked_tells_no_time():
    b = bench()
    b.run.run()
    assert {line.dt_ms for line in b.told("line")} == {None}


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0.0ms"),
        (12.34, "12.3ms"),
        (999.9, "999.9ms"),
        (1000, "00:00:01"),
        (3_723_900, "01:02:03"),
        (86_399_999, "23:59:59"),
        (86_400_000, "1d 00:00:00"),
        (4 * 86_400_000 + 3_723_000, "4d 01:02:03"),
    ],
)
def test_durations_are_written(ms, text):
    assert duration_text(ms) == text


@pytest.mark.parametrize(
    ("first", "loss", "dashes"),
    [(0.0, 0.0, 1), (9.5, 9.5, 1), (9.5, 8.5, 11), (9.5, 9.46, 1), (9.5, 9.44, 2), (9.5, 9.7, 0)],
)
def test_the_bar_grows_by_ten_dashes_for_each_unit_of_loss(first, loss, dashes):
    assert bar_text(first, loss) == "-" * dashes


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_draws_no_bar(loss):
    assert bar_text(9.5, loss) == ""


@pytest.mark.parametrize(
    ("pattern", "placeholder", "value", "name"),
    [
        ("chk-ITERATION.gguf", "ITERATION", 10, "chk-10.gguf"),
        ("chk-ITERATION.gguf", "ITERATION", "LATEST", "chk-LATEST.gguf"),
        ("L-ITERATION-ITERATION.bin", "ITERATION", 3, "L-3-ITERATION.bin"),
        ("ITERATION/x.bin", "ITERATION", 3, "3/x.bin"),
        ("x.bin", "ITERATION", 3, "x.bin"),
        ("x.bin", "", 3, "3x.bin"),
    ],
)
def test_the_first_placeholder_of_a_name_is_replaced(pattern, placeholder, value, name):
    assert output_name(pattern, placeholder, value) == name
