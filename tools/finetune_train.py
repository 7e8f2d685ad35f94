"""The training of `finetune`: the run with all that watches it, and how it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from engine.errors import EngineError

from .console import INTERRUPTED
from .finetune_data import Data
from .finetune_files import Saver
from .finetune_lines import Lines
from .finetune_options import FinetuneOptions
from .finetune_ranks import Ranks

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from engine.lora import Adapter
    from engine.model import Model
    from engine.training.data import Batches
    from engine.training.learning import Learning
    from engine.training.log import CsvLog, LossCurves
    from engine.training.loop import NotFiniteError, Run, RunOptions, RunResult
    from engine.training.optimizer import AdamW
    from engine.training.report import EvaluationReport, IterationReport
    from engine.training.schedule import Schedule
    from engine.training.state import TrainingState
    from engine.training.trainer import Trainer
    from engine.training.validation import Validation

NOTHING_MOVED = 2
FORECAST_AFTER = 2


class Training:
    """Trains, watches and reports.

    Parameters
    ----------
    options : FinetuneOptions
    lines : Lines
    ranks : Ranks
        That train together.
    model, adapter, state, trainer
        What is trained, and with what; the trainer is of this rank's rows.
    data : Data
        Loaded.
    batches : Batches
    saver : Saver
    n_updates : int
        That are expected.
    """

    def __init__(
        self,
        options: FinetuneOptions,
        lines: Lines,
        ranks: Ranks,
        model: Model,
        adapter: Adapter,
        state: TrainingState,
        trainer: Trainer,
        data: Data,
        batches: Batches,
        saver: Saver,
        n_updates: int,
    ) -> None:
        self.options = options
        self.lines = lines
        self.ranks = ranks
        self.model = model
        self.adapter = adapter
        self.state = state
        self.trainer = trainer
        self.data = data
        self.batches = batches
        self.saver = saver
        from engine.training.parallel import DataParallel
        from engine.training.report import Progress

        n_evaluations = max(1, options.grad_acc)
        self._parallel = DataParallel(
            trainer, ranks.comm, options.batch, n_evaluations, lines.stop.is_set
        )
        self._first = state.opt_iteration
        self._validation = data.validation(state)
        self._validation_ms = 0.0
        self._optimizer = self._make_optimizer()
        self._forecast_told = False
        self._n_updates = n_updates
        self._progress = Progress(self._first, n_updates)
        self._csv: CsvLog | None = None
        self._plot: LossCurves | None = None

    def facts(self) -> dict[str, object]:
        """Give what must be equal on all ranks, by the word for it."""
        import hashlib
        from dataclasses import replace

        from engine.kernels import active_isa

        options = replace(self.ranks.without_outputs(self.options), threads=0, given=frozenset())
        state, samples = self.state, self.data.samples

        def digest(*arrays: NDArray[Any]) -> str:
            return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()

        return {
            "options": repr(options),
            "kernel variant": active_isa(),
            "model": (self.model.file.path.stat().st_size, repr(self.model.hparams)),
            "adapter": digest(self.adapter.flat, state.m, state.v),
            "training data": (samples.hash, digest(samples.tokens), repr(state.shuffle)),
        }

    def run(self) -> int:
        """Train to the end; returns the exit status.

        Raises
        ------
        EngineError
            If the loss or a gradient is not finite, or the end could not be saved.
        """
        from concurrent.futures import ThreadPoolExecutor

        # A step may take long and Python handles signals between the main thread's bytecodes
        # only: while another thread computes, the main thread is free to answer at once.
        self.ranks.end_when_told(lambda: self.saver.last_checkpoint)
        with self._interrupts_stop_the_run(), ThreadPoolExecutor(1) as executor:
            return executor.submit(self._run).result()

    def _run(self) -> int:
        from engine.training.loop import NotFiniteError

        self._open_logs()
        learning = self._learning()
        run = self._make_run()
        self.lines.say("main: begin training")
        self.lines.say_bytes("work_size", self.trainer.work_bytes)
        try:
            result = run.run()
        except NotFiniteError as error:
            self.saver.drop()
            raise self._not_finite(error) from None
        finally:
            self.saver.commit()
            self.lines.progress("")
            self._close_logs()
        self._tell_perf()
        return self._finish(result, learning)

    # Before the first step

    def _open_logs(self) -> None:
        from engine.training.log import CsvLog, LossCurves

        options = self.options
        if options.plot:
            self._plot = LossCurves(options.plot)
        if options.log_csv:
            self._csv = CsvLog(options.log_csv, options.adam_alpha, self._first)

    def _learning(self) -> Learning | None:
        from engine.training.learning import Learning

        if not self.options.report or self.options.adam_iter == 0:
            return None
        self._measured_on, measured = self.data.measured()
        self._n_measured = measured.n_tokens if measured else 0
        return Learning(self.adapter, self.model.weights.by_name, self._mean_loss(measured))

    def _mean_loss(self, validation: Validation | None) -> Callable[[], float] | None:
        if validation is None:
            return None
        return lambda: validation.loss(self._parallel.loss)

    def _validate(self) -> float:
        assert self._validation is not None
        began = time.monotonic()
        loss = self._validation.loss(self._parallel.loss)
        self._validation_ms = 1000 * (time.monotonic() - began)
        return loss

    def _make_run(self) -> Run:
        from engine.training.loop import Run
        from engine.training.report import duration_text

        lines = self.lines
        return Run(
            self.state,
            self.batches,
            self._parallel.evaluate,
            self._parallel.grad,
            self._optimizer,
            self._schedule(),
            self._run_options(),
            on_iteration=self._tell_iteration,
            on_reshuffle=lambda epochs: lines.say(
                f"train_opt_callback: reshuffle samples. completed epochs: {epochs}"
            ),
            on_end=lambda ms: lines.say(f"main: total training time: {duration_text(ms)}"),
            on_evaluation=self._log,
            on_save=self._save,
            on_commit=self._commit,
            validate=self._validate if self._validation else None,
            on_best=lambda _: self.saver.save_best(),
            stop_requested=self._parallel.stop_requested,
        )

    def _save(self, iteration: int) -> bool:
        """Save where it is done, and know everywhere whether it could be."""
        return self.ranks.comm.from_root(self.saver.save(iteration))

    def _commit(self) -> bool:
        return self.ranks.comm.from_root(self.saver.commit())

    def _make_optimizer(self) -> AdamW:
        from engine.training.optimizer import AdamW, AdamWParams

        options = self.options
        params = AdamWParams(
            alpha=options.adam_alpha,
            beta1=options.adam_beta1,
            beta2=options.adam_beta2,
            decay=options.adam_decay,
            decay_min_ndim=options.adam_decay_min_ndim,
            gclip=options.adam_gclip,
        )
        return AdamW(self.adapter, params, self.trainer.n_threads, measure=options.perf)

    def _schedule(self) -> Schedule:
        from engine.training.schedule import Schedule

        options = self.options
        return Schedule(
            warmup=options.warmup,
            decay_steps=options.cos_decay_steps,
            decay_min=options.cos_decay_min,
            restart=options.enable_restart,
            restart_factor=options.cos_decay_restart,
            alpha=options.adam_alpha,
            min_alpha=options.adam_min_alpha,
        )

    def _run_options(self) -> RunOptions:
        from engine.training.loop import RunOptions

        options = self.options
        return RunOptions(
            adam_iter=options.adam_iter,
            save_every=options.save_every,
            grad_acc=options.grad_acc,
            epochs=options.epochs,
            adam_epsf=options.adam_epsf,
            opt_delta=options.opt_delta,
            max_no_improvement=options.opt_max_no_improvement,
            eval_every=options.eval_every,
            early_stop=options.early_stop,
        )

    # While it runs

    def _tell_iteration(self, report: IterationReport) -> None:
        from engine.training.report import bar_text, duration_text

        times = ""
        if report.dt_ms is not None and report.eta_ms is not None:
            times = f" dt={duration_text(report.dt_ms)} eta={duration_text(report.eta_ms)}"
        validation = ""
        if report.validation_loss is not None:
            validation = f" val={report.validation_loss:f}"
        self.lines.say(
            f"train_opt_callback: iter={report.iteration:6d} "
            f"sample={report.sample}/{report.n_samples} sched={report.sched:f} "
            f"loss={report.loss:f}{times} |{bar_text(report.first_loss, report.loss)}>{validation}"
        )
        self._forecast(report)

    def _forecast(self, report: IterationReport) -> None:
        from engine.training.report import forecast_text

        n_done = report.iteration - self._first
        if self._forecast_told or n_done < FORECAST_AFTER or report.dt_ms is None:
            return
        self._forecast_told = True
        more_ms = self._n_validations() * self._validation_ms
        self.lines.note(forecast_text(self._n_updates, n_done, report.dt_ms, more_ms))

    def _n_validations(self) -> int:
        every = self.options.eval_every
        if self._validation is None:
            return 0
        return 1 + (self._n_updates // every if every > 0 else 0)

    def _log(self, report: EvaluationReport) -> None:
        self.lines.progress(self._progress.text(report))
        if self._plot is not None:
            self._plot.add(report)
        if self._csv is None:
            return
        try:
            self._csv.add(report)
        except EngineError as error:
            self.lines.note(f"warning: {error}; training goes on without it")
            self._csv.close()
            self._csv = None

    @contextmanager
    def _interrupts_stop_the_run(self) -> Iterator[None]:
        stop = self.lines.stop

        def handle(_number: int, _frame: object) -> None:
            if stop.is_set():
                self.saver.commit()
                os._exit(INTERRUPTED)
            stop.set()
            self.lines.note(
                "interrupted: finishing this iteration, then saving; once more quits at once"
            )

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # How it ends

    def _close_logs(self) -> None:
        if self._csv is not None:
            self._csv.close()
        if self._plot is not None:
            try:
                self._plot.write()
            except EngineError as error:
                self.lines.note(f"warning: {error}")

    def _not_finite(self, error: NotFiniteError) -> EngineError:
        from engine.training.learning import not_finite_tensor
        from engine.training.parallel import AgreedError

        tensor = not_finite_tensor(self.adapter, self.trainer.grad)
        first = (
            f"the gradient of {tensor} is the first that is not finite"
            if tensor
            else ("every element of the gradient is finite")
        )
        saved = self.saver.last_checkpoint
        kept = f"go on from {saved}" if saved else "nothing was saved"
        return AgreedError(f"{error}; {first}; {kept}; a lower --adam-alpha may help")

    def _finish(self, result: RunResult, learning: Learning | None) -> int:
        from engine.training.loop import End
        from engine.training.parallel import AgreedError

        lines = self.lines
        closed, problem = self.ranks.comm.from_root((lines.closed, self.saver.problem))
        interrupted = lines.stop.is_set() and not lines.closed
        if interrupted:
            self._tell_interrupted(result)
        elif result.end not in (End.ITERATIONS, End.STOPPED):
            lines.note(f"ended after iteration {result.iteration}: {result.end.value}")
        if problem:
            also = f"; {lines.failure}" if lines.failure else ""
            raise AgreedError(f"{problem}; the end of the run is not saved{also}")
        moved = learning is None or closed or self._tell_proof(learning)
        if interrupted:
            return INTERRUPTED
        return lines.status() or (0 if moved else NOTHING_MOVED)

    def _tell_perf(self) -> None:
        """Tell where the time went, if that was asked for."""
        from engine.perf import OpTimes, measure_peaks

        if not self.options.perf or not self.ranks.is_root:
            return
        times = OpTimes()
        self.trainer.add_times(times)
        self._optimizer.add_times(times)
        for line in times.lines(measure_peaks(self.trainer.n_threads), "evaluations"):
            self.lines.note(line)

    def _tell_interrupted(self, result: RunResult) -> None:
        outputs = self.saver.outputs
        patterns = [outputs.checkpoint, outputs.adapter]
        latest = [name for pattern in patterns for name in outputs.names(pattern, 0)[1:]]
        saved = " and ".join(latest) or "nothing, as no output is named"
        self.lines.note(f"interrupted after iteration {result.iteration}; saved {saved}")

    def _tell_proof(self, learning: Learning) -> bool:
        """Say what the run has changed, and whether it has changed anything."""
        proof = learning.proof()
        note = self.lines.note
        if proof.before is not None and proof.after is not None:
            note(
                f"report: loss on {self._measured_on} ({self._n_measured} tokens):"
                f" {proof.before:.6f} before, {proof.after:.6f} after"
            )
        note(f"report: {proof.n_moved} of {proof.n_tensors} adapter tensors moved")
        if proof.largest:
            shown = ", ".join(f"{size.name} {size.ratio:.3g}" for size in proof.largest)
            note(f"report: largest relative size |s*BA|/|W|: {shown}")
        if not proof.n_moved:
            note(
                "report: nothing moved: the adapter adds what it added before; raise --adam-iter or"
                " --adam-alpha (while warming up, the first update has a rate of 0)"
            )
        return proof.n_moved > 0
