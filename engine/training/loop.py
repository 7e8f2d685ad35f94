"""One training run: the order in which batches are drawn, losses taken and weights moved.

The arithmetic is injected: `Run` calls an evaluation and an optimizer and decides when. It prints
and writes nothing; its owner is told what happened and when to save.

An evaluation comes before the first update and after each: N updates take N + 1 evaluations, and
the gradient of the last is dropped. What an iteration tells, and what is saved, is taken at the
start of an evaluation, before its batch is drawn, so that a resumed run draws the same batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

from engine.errors import EngineError
from engine.lora import FloatArray
from engine.training.data import Batch, Batches, IntArray
from engine.training.report import EvaluationReport, IterationReport
from engine.training.state import TrainingState


class Evaluate(Protocol):
    """Forward and backward pass of one batch."""

    def __call__(
        self, inputs: IntArray, targets: IntArray, weight: float, starts: IntArray | None
    ) -> float:
        """Return the mean loss; add `weight` times its gradient to the run's gradient array."""


class Optimizer(Protocol):
    """What moves the weights."""

    @property
    def m(self) -> FloatArray:
        """First moments, laid out like `Adapter.flat`; written in place."""

    @property
    def v(self) -> FloatArray:
        """Second moments."""

    def norm(self, grad: FloatArray) -> float:
        """Take the norm of the gradient."""

    def step(self, grad: FloatArray, sched: float, iteration: int, norm: float) -> Any:
        """Make update number `iteration`, from 1, with the learning rate times `sched`.

        `norm` is the gradient's, which is left zero.
        """


@dataclass(frozen=True, slots=True)
class RunOptions:
    """When a run ends and saves.

    Attributes
    ----------
    adam_iter : int
        Updates of this run.
    save_every : int
        Updates between saves; 0 or less: only at the end.
    grad_acc : int
        Evaluations of an update; below 1 is 1.
    epochs : int
        End after that many further epochs; 0 or less: off.
    adam_epsf : float
        End when the loss changes relatively by less; 0 or less: off.
    opt_delta : float
        End when the loss differs relatively by less from the one a window ago; the window is
        as long as `TrainingState.past_losses`, and 0 turns the test off.
    max_no_improvement : int
        End after that many updates in a row without a new best loss; 0 or less: off.
    eval_every : int
        Updates between validations; 0 or less: only at the end.
    early_stop : int
        End after that many validations in a row without a new best one; 0 or less: off.
    """

    adam_iter: int = 256
    save_every: int = 10
    grad_acc: int = 1
    epochs: int = -1
    adam_epsf: float = 0.0
    opt_delta: float = 1e-5
    max_no_improvement: int = 0
    eval_every: int = 10
    early_stop: int = 0


class End(Enum):
    """Why a run ended."""

    ITERATIONS = "all iterations are done"
    EPOCHS = "the epochs are completed"
    SMALL_CHANGE = "the loss changes less than --adam-epsf"
    SMALL_DELTA = "the loss changed less than --opt-delta over --opt-past iterations"
    NO_IMPROVEMENT = "the loss has not improved for --opt-max-no-improvement iterations"
    EARLY_STOP = "the validation loss has not improved for --early-stop validations"
    STOPPED = "stopped on request"


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended.

    Attributes
    ----------
    end : End
    iteration : int
        Updates done, over all runs.
    first_loss, last_loss : float
        Of the first and last evaluation of this run; 0 when there was none.
    elapsed_ms : float
        From begin to end, the final save not included.
    """

    end: End
    iteration: int
    first_loss: float
    last_loss: float
    elapsed_ms: float

    @property
    def cancelled(self) -> bool:
        """Whether the run was stopped on request."""
        return self.end is End.STOPPED


class NotFiniteError(EngineError):
    """A loss or a gradient became infinite or NaN; the weights are not to be saved.

    Attributes
    ----------
    iteration : int
        Updates done, over all runs.
    loss : float
    """

    def __init__(self, iteration: int, loss: float) -> None:
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        super().__init__(f"iteration {iteration}: {what}")
        self.iteration = iteration
        self.loss = loss


class _Finish(Exception):
    """Leaves an evaluation that will not be completed."""

    def __init__(self, end: End) -> None:
        super().__init__(end.value)
        self.end = end


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _nothing(*_: object) -> None:
    pass


class Run:
    """One run over `state`; call `run` once.

    Parameters
    ----------
    state : TrainingState
        Where to begin; kept up to date, so that it can be saved at every `on_save`. Its moments
        are copied into the optimizer and are afterwards the optimizer's own arrays.
    batches : Batches
        Made from ``state.shuffle``.
    evaluate : callable (inputs, targets, weight, starts) -> float
        Adds to `grad`.
    grad : ndarray of shape (n_parameters,), float32
        Zeroed here before the first evaluation, and by the optimizer in each update.
    optimizer : Optimizer
    schedule : callable (int) -> float
        Factor of the learning rate after so many updates.
    options : RunOptions, optional
    on_iteration : callable (IterationReport), optional
        At the start of each evaluation, after a save.
    on_reshuffle : callable (int), optional
        An epoch is completed; gets their number over all runs.
    on_end : callable (float), optional
        Training is over, the final save still to come; gets the elapsed milliseconds.
    on_evaluation : callable (EvaluationReport), optional
        After each evaluation.
    on_save : callable (int), optional
        `state` is to be saved as that iteration, without replacing anything before `on_commit`.
        If one of the two returns False nothing was saved, which is tried again at the next
        occasion, at the end of the run for one.
    on_commit : callable (), optional
        What was saved may replace what was saved before: its own evaluation was finite, or will
        not be made because the run ends.
    validate : callable () -> float, optional
        Loss on other data, without a trace in the gradient; needs ``state.validation``.
    on_best : callable (int), optional
        The validation loss of that iteration is the lowest so far.
    stop_requested : callable () -> bool, optional
        Asked after each update; true ends the run there, as if it had been the last, with a save.
    clock : callable () -> int, optional
        Milliseconds.
    """

    def __init__(
        self,
        state: TrainingState,
        batches: Batches,
        evaluate: Evaluate,
        grad: FloatArray,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        options: RunOptions = RunOptions(),
        *,
        on_iteration: Callable[[IterationReport], Any] = _nothing,
        on_reshuffle: Callable[[int], Any] = _nothing,
        on_end: Callable[[float], Any] = _nothing,
        on_evaluation: Callable[[EvaluationReport], Any] = _nothing,
        on_save: Callable[[int], Any] = _nothing,
        on_commit: Callable[[], Any] = _nothing,
        validate: Callable[[], float] | None = None,
        on_best: Callable[[int], Any] = _nothing,
        stop_requested: Callable[[], bool] = bool,
        clock: Callable[[], int] = _monotonic_ms,
    ) -> None:
        self.state = state
        self._batches = batches
        self._evaluate_batch = evaluate
        self._grad = grad
        self._optimizer = optimizer
        self._schedule = schedule
        self._options = options
        self._on_iteration = on_iteration
        self._on_reshuffle = on_reshuffle
        self._on_end = on_end
        self._on_evaluation = on_evaluation
        self._on_save = on_save
        self._on_commit = on_commit
        self._validate_now = validate
        self._on_best = on_best
        self._stop_requested = stop_requested
        self._stopwatch = _Stopwatch(clock)
        self._clock = clock
        self._first_iteration = state.opt_iteration
        self._saved_iteration = state.opt_iteration
        self._is_saved = True
        self._is_committed = True
        self._began = 0
        self._tokens = state.tokens
        self._epochs_seen_at: int | None = None
        self._sched = 0.0
        self._first_loss = self._last_loss = self._norm = 0.0
        optimizer.m[:], optimizer.v[:] = state.m, state.v
        state.m, state.v = optimizer.m, optimizer.v

    def run(self) -> RunResult:
        """Train until something ends the run, then save what is not saved yet.

        Raises
        ------
        NotFiniteError
            If a loss or a gradient is infinite or NaN; nothing is saved then, and what was saved
            at that iteration is not committed.
        """
        began = self._began = self._clock()
        try:
            end = self._optimize()
        except _Finish as finish:
            end = finish.end
        elapsed = float(self._clock() - began)
        self._on_end(elapsed)
        self._commit()
        if self.state.opt_iteration > self._saved_iteration or not self._is_saved:
            if end is not End.STOPPED:  # who interrupts does not want to wait for it
                self._validate()
            self._save()
            self._commit()
        iteration = self.state.opt_iteration
        return RunResult(end, iteration, self._first_loss, self._last_loss, elapsed)

    def _optimize(self) -> End:
        state, options = self.state, self._options
        self._grad.fill(0)
        loss = self._evaluate()
        self._first_loss = float(loss)
        state.just_initialized = False
        state.no_improvement = 0
        state.best_loss = state.previous_loss = float(loss)
        if len(state.past_losses):
            state.past_losses[state.opt_iteration % len(state.past_losses)] = loss
        for _ in range(options.adam_iter):
            before = state.opt_iteration
            state.opt_iteration += 1
            with np.errstate(over="ignore"):  # a rate that is too high shows in the next loss
                self._optimizer.step(self._grad, self._sched, state.opt_iteration, self._norm)
            loss = self._evaluate()
            end = self._converged(loss, before)
            if end is not None:
                return end
            state.previous_loss = float(loss)
        return End.ITERATIONS

    def _converged(self, loss: np.float32, before: int) -> End | None:
        """Apply the three tests to the loss after update number `before` + 1."""
        state, options = self.state, self._options
        if _relative(np.float32(state.previous_loss), loss) < options.adam_epsf:
            return End.SMALL_CHANGE
        n_past = len(state.past_losses)
        if n_past:
            past = state.past_losses[before % n_past]
            if n_past <= before and _relative(past, loss) < options.opt_delta:
                return End.SMALL_DELTA
            state.past_losses[before % n_past] = loss
        if options.max_no_improvement > 0:
            if loss < state.best_loss:
                state.best_loss = float(loss)
                state.no_improvement = 0
            else:
                state.no_improvement += 1
                if state.no_improvement >= options.max_no_improvement:
                    return End.NO_IMPROVEMENT
        return None

    # One evaluation

    def _evaluate(self) -> np.float32:
        """Take the mean loss over the accumulated batches; leaves its gradient in `grad`."""
        n = max(1, self._options.grad_acc)
        weight = np.float32(1) / np.float32(n)
        total = np.float32(0)
        self._begin_iteration()
        for _ in range(n):
            batch = self._draw()
            parts = batch.inputs, batch.targets, float(weight), batch.starts
            total += np.float32(self._evaluate_batch(*parts))
        loss = total * weight
        self._last_loss = float(loss)
        self._norm = self._optimizer.norm(self._grad)
        if not (math.isfinite(loss) and math.isfinite(self._norm)):
            raise NotFiniteError(self.state.opt_iteration, float(loss))
        self._commit()
        self._tell_evaluation()
        return loss

    def _tell_evaluation(self) -> None:
        state, n_tokens = self.state, self._n_tokens
        self._tokens += n_tokens
        now = self._clock()
        self._on_evaluation(
            EvaluationReport(
                iteration=state.opt_iteration,
                samples=state.samples,
                tokens=self._tokens,
                sched=self._sched,
                loss=self._last_loss,
                validation_loss=self._fresh_validation(),
                gradient_norm=self._norm,
                n_tokens=n_tokens,
                evaluation_ms=self._stopwatch.so_far(now),
                elapsed_ms=float(now - self._began),
            )
        )

    def _begin_iteration(self) -> None:
        iteration = self.state.opt_iteration
        if iteration > self._first_iteration and self._stop_requested():
            raise _Finish(End.STOPPED)
        self._stopwatch.stop()
        if self._validation_is_due(iteration):
            self._validate()
        save_every = self._options.save_every
        if save_every > 0 and iteration - self._saved_iteration >= save_every:
            self._save()
        self._stopwatch.start()  # the time of saving is left out
        self._sched = self._schedule(iteration)
        self._on_iteration(self._report(iteration))
        self._stop_early()

    def _validation_is_due(self, iteration: int) -> bool:
        every = self._options.eval_every
        last = iteration - self._first_iteration == self._options.adam_iter
        return last or (every > 0 and iteration % every == 0)

    def _validate(self) -> None:
        """Take the validation loss, unless it is there: a resumed run has that of its save."""
        validation, iteration = self.state.validation, self.state.opt_iteration
        if self._validate_now is None or validation is None or validation.iteration == iteration:
            return
        if validation.take(iteration, self._validate_now()):
            self._on_best(iteration)

    def _fresh_validation(self) -> float | None:
        validation = self.state.validation
        if validation is None or validation.iteration != self.state.opt_iteration:
            return None
        return validation.loss

    def _stop_early(self) -> None:
        validation, patience = self.state.validation, self._options.early_stop
        if validation is None or self._fresh_validation() is None:
            return
        if not math.isfinite(validation.loss):
            return  # the evaluation to come tells what is wrong
        moved_on = self.state.opt_iteration > self._first_iteration
        if moved_on and 0 < patience <= validation.no_improvement:
            raise _Finish(End.EARLY_STOP)

    def _report(self, iteration: int) -> IterationReport:
        shuffle = self.state.shuffle
        dt = self._stopwatch.smoothed_ms
        to_go = self._options.adam_iter - (iteration - self._first_iteration)
        return IterationReport(
            iteration=iteration,
            sample=min(1 + shuffle.next_sample, shuffle.sample_count),
            n_samples=shuffle.sample_count,
            sched=self._sched,
            loss=self._last_loss,
            first_loss=self._first_loss,
            dt_ms=dt,
            eta_ms=None if dt is None else to_go * dt,
            validation_loss=self._fresh_validation(),
        )

    def _draw(self) -> Batch:
        """Draw a batch; ends the run when its epochs are completed and used in an update."""
        state = self.state
        epochs = self._batches.epochs
        batch = self._batches.next()
        state.samples += batch.used
        if self._batches.epochs > epochs:
            state.epochs += 1
            self._on_reshuffle(state.epochs)
        if 0 < self._options.epochs <= self._batches.epochs:
            if self._epochs_seen_at is None:
                self._epochs_seen_at = state.opt_iteration
            elif state.opt_iteration > self._epochs_seen_at:
                raise _Finish(End.EPOCHS)
        return batch

    @property
    def _n_tokens(self) -> int:
        """Tokens of an update."""
        rows = self._batches.options.n_batch * max(1, self._options.grad_acc)
        return rows * self._batches.options.n_ctx

    def _save(self) -> None:
        state = self.state
        updates = state.opt_iteration - self._saved_iteration
        state.iterations += updates
        state.tokens += updates * self._n_tokens
        self._is_saved = self._on_save(state.opt_iteration) is not False
        self._is_committed = False
        self._saved_iteration = state.opt_iteration

    def _commit(self) -> None:
        """Let the last save replace the one before it."""
        if not self._is_committed:
            self._is_committed = True
            self._is_saved = self._on_commit() is not False and self._is_saved


def _relative(earlier: np.float32, loss: np.float32) -> float:
    """|earlier - loss| / loss in float32; NaN, which fails every comparison, where undefined."""
    with np.errstate(all="ignore"):
        return float(np.abs((earlier - loss) / loss))


class _Stopwatch:
    """Smoothed time of an iteration: 0.3 of the old value, 0.7 of the last."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._began: int | None = None
        self.smoothed_ms: float | None = None

    def stop(self) -> None:
        elapsed = 0 if self._began is None else self._clock() - self._began
        if elapsed > 0:
            old = self.smoothed_ms
            self.smoothed_ms = elapsed if old is None else 0.3 * old + 0.7 * elapsed

    def start(self) -> None:
        self._began = self._clock()

    def so_far(self, now: int) -> float:
        return 0.0 if self._began is None else float(now - self._began)
