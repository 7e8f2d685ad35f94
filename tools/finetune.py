"""The command `finetune`: train a LoRA adapter on a text, or go on with a checkpoint.

Progress goes to standard output, a line at a time; remarks and errors go to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import OptionError
from engine.escapes import resolve_escapes
from engine.locate import locate_model

from . import finetune_options
from .console import (
    CLOSED_OUTPUT,
    GPU_WARNINGS,
    INTERRUPTED,
    discard_output,
    note,
    run_command,
    say,
    usable_cores,
)
from .finetune_options import FinetuneOptions
from .options import Parsed

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.lora import Adapter
    from engine.model import Model
    from engine.training.checkpoint import Checkpoint, TrainingState
    from engine.training.data import Batches, Samples
    from engine.training.loop import Run, RunOptions, RunResult
    from engine.training.optimizer import AdamW
    from engine.training.report import IterationReport
    from engine.training.schedule import Schedule
    from engine.training.trainer import Trainer

# The names under which ranks are listed, and the tensors they are of.
_LISTED_RANKS = (
    ("n_rank_attention_norm", "attn_norm"),
    ("n_rank_wq", "attn_q"),
    ("n_rank_wk", "attn_k"),
    ("n_rank_wv", "attn_v"),
    ("n_rank_wo", "attn_output"),
    ("n_rank_ffn_norm", "ffn_norm"),
    ("n_rank_ffn_gate", "ffn_gate"),
    ("n_rank_ffn_down", "ffn_down"),
    ("n_rank_ffn_up", "ffn_up"),
    ("n_rank_tok_embeddings", "token_embd"),
    ("n_rank_norm", "output_norm"),
    ("n_rank_output", "output"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the program's name; those of the process when absent.

    Returns
    -------
    int
        Exit status: 0; 1 for bad input; 130 when interrupted; 141 when standard output is closed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(finetune_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    options, parsed = finetune_options.parse(arguments)
    if parsed.stopped_by:
        note(finetune_options.TABLE.usage(), end="")
        return 0
    _warn(options, parsed)
    return _Job(options).run()


def _warn(options: FinetuneOptions, parsed: Parsed) -> None:
    for warning in parsed.warnings:
        note(f"warning: {warning}")
    if "gpu_layers" in options.given:
        for line in GPU_WARNINGS:
            note(line.format(option="--n-gpu-layers"))


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Names of the files that a run writes; an empty pattern writes none."""

    checkpoint: str
    adapter: str
    placeholder: str
    latest: str

    def names(self, pattern: str, iteration: int) -> list[str]:
        """Name the copy of an iteration and the latest copy."""
        from engine.training.report import output_name

        if not pattern:
            return []
        values = (iteration, self.latest)
        return [output_name(pattern, self.placeholder, value) for value in values]

    def check(self, iteration: int, inputs: Sequence[str]) -> None:
        """Refuse names that cannot be written, or that are files still needed.

        Raises
        ------
        OptionError
            Names the option and the file.
        """
        taken = {os.path.realpath(name): name for name in inputs if name}
        for option, pattern in (
            ("--checkpoint-out", self.checkpoint),
            ("--lora-out", self.adapter),
        ):
            names = self.names(pattern, iteration)
            for name in names:
                if os.path.realpath(name) in taken:
                    raise OptionError(f"{option}: {name}: would overwrite a file that is in use")
                _check_writable(option, name)
            taken |= {os.path.realpath(name): name for name in names}


def _check_writable(option: str, name: str) -> None:
    target = os.path.realpath(name)
    if os.path.isdir(target):
        raise OptionError(f"{option}: {name}: cannot be written: it is a folder")
    try:
        with tempfile.TemporaryFile(dir=os.path.dirname(target)):
            pass
    except OSError as error:
        raise OptionError(f"{option}: {name}: cannot be written: {error.strerror}") from None


class _Job:
    """One run: load, tell, train, save."""

    def __init__(self, options: FinetuneOptions) -> None:
        self.options = options
        clock = options.seed == finetune_options.CLOCK_SEED
        self.seed = int(time.time()) if clock else options.seed
        self.outputs = _Outputs(
            "" if options.only_write_lora else options.checkpoint_out,
            options.lora_out,
            options.pattern_fn_it,
            options.fn_latest,
        )
        self.stop = threading.Event()
        self.output_closed = False

    def run(self) -> int:
        from engine.training.data import read_training_text

        options = self.options
        # Cheap refusals come before the model is loaded.
        text = b"" if options.only_write_lora else read_training_text(options.train_data)
        if not options.model_base:
            raise OptionError("--model-base: give the base model")
        path = locate_model(options.model_base)
        self.say(f"main: seed: {self.seed}")
        self.say(f"main: model base = '{options.model_base}'")
        model = self._load_model(path)
        self.say("main: init model")
        checkpoint = self._read_checkpoint(model)
        adapter = self._adapter(model, checkpoint)
        state = self._state(adapter, checkpoint)
        n_ctx = self._context_length(checkpoint)
        self._check_outputs(model, state)
        self._tell_sizes(model, adapter, state, n_ctx)
        if options.only_write_lora:
            self._save_adapter(adapter, state.opt_iteration)
            return self._status()
        return self._train(model, adapter, state, n_ctx, text)

    def say(self, line: str) -> None:
        """Print a line; once nobody listens any more the run is brought to its end."""
        if self.output_closed:
            return
        try:
            say(line)
        except BrokenPipeError:
            discard_output()
            self.output_closed = True
            self.stop.set()

    def _status(self) -> int:
        return CLOSED_OUTPUT if self.output_closed else 0

    # What is loaded

    def _load_model(self, path: Path) -> Model:
        from engine.model import Model

        options = self.options
        model = Model.load(
            path,
            n_threads=self._threads(),
            rms_eps=options.norm_rms_eps,
            rope_freq_base=options.rope_freq_base,
            rope_freq_scale=options.rope_freq_scale,
        )
        for warning in model.warnings:
            note(f"warning: {warning}")
        return model

    def _threads(self) -> int:
        # The original's default of 6 would have threads wait for each other on fewer cores.
        if "threads" in self.options.given:
            return self.options.threads
        return min(self.options.threads, usable_cores())

    def _read_checkpoint(self, model: Model) -> Checkpoint | None:
        from engine.lora import KINDS, check_fits
        from engine.training.checkpoint import read_checkpoint

        options = self.options
        if not options.checkpoint_in or not Path(options.checkpoint_in).exists():
            return None
        checkpoint = read_checkpoint(options.checkpoint_in)
        checkpoint.check_model(model.hparams)
        check_fits(checkpoint.adapter, model.adapter_shapes(dict.fromkeys(KINDS, 1)))
        if options.names_a_rank():
            checkpoint.check_ranks(options.ranks())
        if "opt_past" in options.given:
            checkpoint.check_opt_past(options.opt_past)
        for warning in checkpoint.warnings:
            note(f"warning: {warning}")
        return checkpoint

    def _adapter(self, model: Model, checkpoint: Checkpoint | None) -> Adapter:
        from engine.lora import create_adapter

        options = self.options
        if checkpoint is None:
            alpha = options.lora_r if options.lora_alpha is None else options.lora_alpha
            shapes = model.adapter_shapes(options.ranks())
            adapter = create_adapter(shapes, options.lora_r, alpha, self.seed)
        else:
            adapter = checkpoint.adapter
            adapter.r, adapter.alpha = self._resumed_header(checkpoint)
        if not adapter.pairs:
            raise OptionError("--lora-r: every rank is 0, there is nothing to train")
        return adapter

    def _resumed_header(self, checkpoint: Checkpoint) -> tuple[int, float]:
        """Give r and alpha: what the user says, else what the checkpoint knows."""
        options, adapter = self.options, checkpoint.adapter
        r = options.lora_r if "lora_r" in options.given else adapter.r
        if options.lora_alpha is not None:
            return r, options.lora_alpha
        return r, adapter.alpha if checkpoint.has_header and r == adapter.r else r

    def _state(self, adapter: Adapter, checkpoint: Checkpoint | None) -> TrainingState:
        from engine.training.checkpoint import TrainingState

        if checkpoint is not None:
            return checkpoint.state
        return TrainingState.fresh(adapter.flat.size, self.options.opt_past)

    def _context_length(self, checkpoint: Checkpoint | None) -> int:
        if checkpoint is None or "ctx" in self.options.given:
            return self.options.ctx
        return checkpoint.n_ctx

    def _check_outputs(self, model: Model, state: TrainingState) -> None:
        options = self.options
        inputs = [str(model.file.path)]
        if not options.only_write_lora:
            inputs.append(options.train_data)
        self.outputs.check(state.opt_iteration, inputs)

    # What is told before training

    def _tell_sizes(self, model: Model, adapter: Adapter, state: TrainingState, n_ctx: int) -> None:
        from engine.lora import kind_of

        h = model.hparams
        for name in ("n_vocab", "n_ctx", "n_embd", "n_ff", "n_head", "n_head_kv", "n_layer"):
            value = n_ctx if name == "n_ctx" else getattr(h, name)
            self.say(f"print_params: {name:<22}: {value}")
        for name, real in (
            ("norm_rms_eps", h.rms_eps),
            ("rope_freq_base", h.rope_freq_base),
            ("rope_freq_scale", h.rope_freq_scale),
        ):
            self.say(f"print_params: {name:<22}: {real:f}")
        ranks = {kind_of(pair.name): pair.rank for pair in adapter.pairs.values()}
        for name, kind in _LISTED_RANKS:
            self.say(f"print_lora_params: {name:<22}: {ranks.get(kind, 0)}")
        self.say(f"main: total train_iterations {state.iterations}")
        self.say(f"main: seen train_samples     {state.samples}")
        self.say(f"main: seen train_tokens      {state.tokens}")
        self.say(f"main: completed train_epochs {state.epochs}")
        self._tell_bytes("lora_size", adapter.n_bytes)

    def _tell_bytes(self, name: str, n_bytes: int) -> None:
        self.say(f"main: {name} = {n_bytes} bytes ({n_bytes / 2**20:.1f} MB)")

    def _samples(self, model: Model, text: bytes, n_ctx: int) -> Samples:
        from engine.training.data import SplitOptions, split_samples

        options = self.options
        start = os.fsencode(options.sample_start)
        if options.escape:
            start = resolve_escapes(start)
        self.say(f"main: tokenize training data from {options.train_data}")
        self.say(f"main: sample-start: {os.fsdecode(start)}")
        self.say(f"main: include-sample-start: {str(options.include_sample_start).lower()}")
        split = SplitOptions(start, options.include_sample_start, options.overlapping_samples)
        samples = split_samples(text, options.train_data, model.tokenizer, n_ctx, split)
        for warning in samples.warnings:
            self.say(f"tokenize_file: warning: {warning}")
        self.say(f"tokenize_file: total number of samples: {len(samples)}")
        self.say(f"main: number of training tokens: {len(samples.tokens)}")
        self.say(f"main: number of unique tokens: {samples.n_unique_tokens}")
        return samples

    def _batches(self, model: Model, state: TrainingState, samples: Samples, n_ctx: int) -> Batches:
        from engine.training.data import Batches, BatchOptions, begin_and_end_tokens

        options = self.options
        fits = state.shuffle.fits(samples)
        if not fits:
            self.say("main: train data seems to have changed. restarting shuffled epoch.")
        if options.force_reshuffle:
            self.say("main: forced reshuffling of data. restarting with newly shuffled epoch.")
        if not fits or options.force_reshuffle:
            state.shuffle.restart(samples, self.seed)
        bos, eos = begin_and_end_tokens(model.tokenizer, str(model.file.path))
        rows = BatchOptions(
            n_batch=options.batch,
            n_ctx=n_ctx,
            bos=bos,
            eos=eos,
            fill_with_next_samples=options.fill_with_next_samples,
            separate_with_eos=options.separate_with_eos,
            separate_with_bos=options.separate_with_bos,
            sample_random_offsets=options.sample_random_offsets,
        )
        return Batches(samples, state.shuffle, rows)

    # The training

    def _train(
        self, model: Model, adapter: Adapter, state: TrainingState, n_ctx: int, text: bytes
    ) -> int:
        from engine.training.trainer import Trainer

        options = self.options
        n_opt_bytes = state.m.nbytes + state.v.nbytes + state.past_losses.nbytes
        self._tell_bytes("opt_size ", n_opt_bytes)
        self.say(f"main: opt iter {state.opt_iteration}")
        trainer = Trainer(
            model,
            adapter,
            options.batch,
            n_ctx,
            checkpointing=options.use_checkpointing,
            n_threads=self._threads(),
            compute=options.compute,
        )
        self._tell_bytes("input_size", trainer.input_bytes)
        self._tell_bytes("compute_size", trainer.memory_bytes)
        self.say("main: evaluation order = LEFT_TO_RIGHT")
        samples = self._samples(model, text, n_ctx)
        batches = self._batches(model, state, samples, n_ctx)
        run = self._make_run(model, adapter, state, batches, trainer)
        self.say("main: begin training")
        self._tell_bytes("work_size", trainer.work_bytes)
        result = self._run_interruptibly(run)
        if self.stop.is_set() and not self.output_closed:
            return self._tell_interrupted(result)
        return self._status()

    def _make_run(
        self,
        model: Model,
        adapter: Adapter,
        state: TrainingState,
        batches: Batches,
        trainer: Trainer,
    ) -> Run:
        from engine.training.checkpoint import write_checkpoint
        from engine.training.loop import Run
        from engine.training.report import duration_text

        n_ctx = batches.options.n_ctx

        def save(iteration: int) -> None:
            for name in self.outputs.names(self.outputs.checkpoint, iteration):
                self.say(f"save_checkpoint_lora_file: saving to {name}")
                write_checkpoint(name, state, adapter, model.hparams, n_ctx)
            self._save_adapter(adapter, iteration)

        return Run(
            state,
            batches,
            trainer.evaluate,
            trainer.grad,
            self._optimizer(adapter),
            self._schedule(),
            self._run_options(),
            on_iteration=self._tell_iteration,
            on_reshuffle=lambda epochs: self.say(
                f"train_opt_callback: reshuffle samples. completed epochs: {epochs}"
            ),
            on_end=lambda ms: self.say(f"main: total training time: {duration_text(ms)}"),
            on_save=save,
            stop_requested=self.stop.is_set,
        )

    def _save_adapter(self, adapter: Adapter, iteration: int) -> None:
        for name in self.outputs.names(self.outputs.adapter, iteration):
            self.say(f"save_as_llama_lora: saving to {name}")
            adapter.write_bin(name)

    def _optimizer(self, adapter: Adapter) -> AdamW:
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
        return AdamW(adapter, params)

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
        )

    def _tell_iteration(self, report: IterationReport) -> None:
        from engine.training.report import bar_text, duration_text

        times = ""
        if report.dt_ms is not None and report.eta_ms is not None:
            times = f" dt={duration_text(report.dt_ms)} eta={duration_text(report.eta_ms)}"
        self.say(
            f"train_opt_callback: iter={report.iteration:6d} "
            f"sample={report.sample}/{report.n_samples} sched={report.sched:f} "
            f"loss={report.loss:f}{times} |{bar_text(report.first_loss, report.loss)}>"
        )

    def _run_interruptibly(self, run: Run) -> RunResult:
        from concurrent.futures import ThreadPoolExecutor

        # A step may take long and Python handles signals between the main thread's bytecodes
        # only: while another thread computes, the main thread is free to answer at once.
        with self._interrupts_stop_the_run(), ThreadPoolExecutor(1) as executor:
            return executor.submit(run.run).result()

    @contextmanager
    def _interrupts_stop_the_run(self) -> Iterator[None]:
        def handle(_number: int, _frame: object) -> None:
            if self.stop.is_set():
                os._exit(INTERRUPTED)
            self.stop.set()
            note("interrupted: finishing this iteration, then saving; once more quits at once")

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _tell_interrupted(self, result: RunResult) -> int:
        patterns = [self.outputs.checkpoint, self.outputs.adapter]
        latest = [name for pattern in patterns for name in self.outputs.names(pattern, 0)[1:]]
        saved = " and ".join(latest) or "nothing, as no output is named"
        note(f"interrupted after iteration {result.iteration}; saved {saved}")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
