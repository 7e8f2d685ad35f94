"""The command `finetune`: train a LoRA adapter on a text, or go on with a checkpoint.

Progress goes to standard output, a line at a time; remarks and errors go to standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError, OptionError
from engine.locate import locate_model

from . import finetune_options
from .console import FAILED, GPU_WARNINGS, note, run_command
from .finetune_data import Data
from .finetune_files import Outputs, Saver
from .finetune_lines import Lines
from .finetune_options import FinetuneOptions
from .finetune_ranks import Ranks, is_another_rank
from .finetune_train import Training
from .options import Parsed

# Everything that loads numpy is imported where it is used: `--help` must not wait for it.
if TYPE_CHECKING:
    from engine.lora import Adapter
    from engine.model import Model
    from engine.training.checkpoint import Checkpoint
    from engine.training.data import Batches
    from engine.training.state import TrainingState
    from engine.training.trainer import Trainer

# Below this factor on what an adapter adds, learning crawls.
_SMALL_SCALE = 0.25

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
        Exit status: 0; 1 for bad input; 2 when nothing was learnt; 130 when interrupted; 141 when
        standard output is closed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    return run_command(finetune_options.TABLE, lambda: _run(given))


def _run(arguments: Sequence[str]) -> int:
    try:
        options, parsed = finetune_options.parse(arguments)
    except OptionError:
        if is_another_rank():
            return FAILED
        raise
    if parsed.stopped_by:
        note(finetune_options.TABLE.usage(), end="")
        return 0
    ranks = Ranks()
    if ranks.is_root:
        _warn(options, parsed)
    else:
        options = ranks.without_outputs(options)
    return ranks.run(_Job(options, ranks).run)


def _warn(options: FinetuneOptions, parsed: Parsed) -> None:
    for warning in parsed.warnings:
        note(f"warning: {warning}")
    if "gpu_layers" in options.given:
        for line in GPU_WARNINGS:
            note(line.format(option="--n-gpu-layers"))


class _Job:
    """One run: load, tell, then write, try or train; on each rank, if there are several."""

    def __init__(self, options: FinetuneOptions, ranks: Ranks) -> None:
        self.options = options
        self.ranks = ranks
        clock = options.seed == finetune_options.CLOCK_SEED
        self.seed = ranks.comm.from_root(int(time.time())) if clock else options.seed
        self.outputs = Outputs.of(options)
        self.lines = Lines(quiet=not ranks.is_root)
        self._n_own_cores = ranks.own_cores()

    def run(self) -> int:
        """Prepare, and train if nothing else was asked for."""
        ready = self.ranks.together(self._prepare)
        if isinstance(ready, int):
            return ready
        self.ranks.agree(ready.facts())
        return ready.run()

    def _prepare(self) -> Training | int:
        """Do all that can fail before training; a status when that is all."""
        options, lines = self.options, self.lines
        # Cheap refusals come before the model is loaded.
        data = None if options.only_write_lora else Data(options, lines)
        if not options.model_base:
            raise OptionError("--model-base: give the base model")
        path = locate_model(options.model_base)
        if options.plot:
            from engine.training.log import LossCurves

            LossCurves(options.plot)
        lines.say(f"main: seed: {self.seed}")
        lines.say(f"main: model base = '{options.model_base}'")
        model = self._load_model(path)
        lines.say("main: init model")
        checkpoint = self._read_checkpoint(model)
        n_ctx = self._context_length(checkpoint)
        adapter = self._adapter(model, checkpoint, n_ctx)
        state = self._state(adapter, checkpoint)
        self._check_outputs(model, adapter, state, data)
        self._tell_sizes(model, adapter, state, n_ctx)
        saver = Saver(self.outputs, model, adapter, state, n_ctx, lines.say, lines.note)
        saver.last_checkpoint = checkpoint.path if checkpoint else ""
        if data is None:
            for name in self.outputs.names(self.outputs.adapter, state.opt_iteration):
                saver.write_adapter(name)
            return lines.status()
        return self._ready(model, adapter, state, n_ctx, data, saver)

    # What is loaded

    @property
    def _n_rows(self) -> int:
        """Rows of a batch that are computed here."""
        rows = self.ranks.rows(self.options.batch)
        return rows.stop - rows.start

    def _load_model(self, path: Path) -> Model:
        from engine.model import Model
        from engine.rope import RopeOptions

        options = self.options
        model = Model.load(
            path,
            rms_eps=options.norm_rms_eps,
            rope=RopeOptions(freq_base=options.rope_freq_base, freq_scale=options.rope_freq_scale),
        )
        for warning in model.warnings:
            self.lines.note(f"warning: {warning}")
        return model

    def _threads(self) -> int:
        # The original's default of 6 would have threads wait for each other on fewer cores.
        if "threads" in self.options.given:
            return self.options.threads
        return min(self.options.threads, self._n_own_cores)

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
            left_out = options.left_out()
            asked = {kind: rank for kind, rank in options.ranks().items() if kind not in left_out}
            checkpoint.check_ranks(asked)
        if "opt_past" in options.given:
            checkpoint.check_opt_past(options.opt_past)
        for warning in checkpoint.warnings:
            self.lines.note(f"warning: {warning}")
        return checkpoint

    def _adapter(self, model: Model, checkpoint: Checkpoint | None, n_ctx: int) -> Adapter:
        from engine.lora import create_adapter

        options = self.options
        if checkpoint is None:
            alpha = options.lora_r if options.lora_alpha is None else options.lora_alpha
            shapes = model.adapter_shapes(options.ranks())
            self._check_least_memory(model, n_ctx, sum(r * (n + m) for _, n, m, r in shapes))
            adapter = create_adapter(
                shapes, options.lora_r, alpha, self.seed, rslora=options.rslora
            )
        else:
            adapter = self._without_left_out(checkpoint.adapter)
            self._check_least_memory(model, n_ctx, adapter.flat.size)
            adapter.r, adapter.alpha = self._resumed_header(checkpoint)
            adapter.rslora = adapter.rslora or options.rslora
        if not adapter.pairs:
            raise OptionError("--lora-r: every rank is 0, there is nothing to train")
        if adapter.scale <= _SMALL_SCALE:
            self._warn_of_scale(adapter)
        return adapter

    def _without_left_out(self, adapter: Adapter) -> Adapter:
        """Drop from a checkpoint's adapter what is not to be converted, and say so."""
        from engine.lora import kind_of

        present = {kind_of(name) for name in adapter.pairs}
        dropped = sorted(present & self.options.left_out())
        if not dropped:
            return adapter
        names = ", ".join(dropped)
        self.lines.note(f"note: {names}: left out of the adapter written, as rank 0 says")
        return adapter.without(dropped)

    def _warn_of_scale(self, adapter: Adapter) -> None:
        root = "√" if adapter.rslora else ""
        mend = "raise --lora-alpha" if adapter.rslora else "raise --lora-alpha, or give --rslora"
        self.lines.note(
            f"warning: --lora-r: {adapter.r} is far above an alpha of {adapter.alpha:g}: what is"
            f" learnt is scaled by alpha / {root}r = {adapter.scale:.3g}; {mend}"
        )

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

    def _check_outputs(
        self, model: Model, adapter: Adapter, state: TrainingState, data: Data | None
    ) -> None:
        from engine.lora import BaseInfo

        inputs = [str(model.file.path), *(data.inputs if data else [])]
        self.outputs.check_form(adapter.shapes, BaseInfo.of(model), adapter.alpha)
        self.outputs.check(state.opt_iteration, inputs)
        if self.outputs.loses_best():
            self.lines.note(
                f"warning: --lora-out: no {self.outputs.placeholder or 'place for a word'} in"
                f" {self.outputs.adapter},"
                " so that the best adapter is not kept apart"
            )

    # What is told before training

    def _tell_sizes(self, model: Model, adapter: Adapter, state: TrainingState, n_ctx: int) -> None:
        from engine.lora import kind_of

        h = model.hparams
        for name in ("n_vocab", "n_ctx", "n_embd", "n_ff", "n_head", "n_head_kv", "n_layer"):
            value = n_ctx if name == "n_ctx" else getattr(h, name)
            self.lines.say(f"print_params: {name:<22}: {value}")
        for name, real in (
            ("norm_rms_eps", h.rms_eps),
            ("rope_freq_base", h.rope_freq_base),
            ("rope_freq_scale", h.rope_freq_scale),
        ):
            self.lines.say(f"print_params: {name:<22}: {real:f}")
        ranks = {kind_of(pair.name): pair.rank for pair in adapter.pairs.values()}
        for name, kind in _LISTED_RANKS:
            self.lines.say(f"print_lora_params: {name:<22}: {ranks.get(kind, 0)}")
        self.lines.say(f"main: total train_iterations {state.iterations}")
        self.lines.say(f"main: seen train_samples     {state.samples}")
        self.lines.say(f"main: seen train_tokens      {state.tokens}")
        self.lines.say(f"main: completed train_epochs {state.epochs}")
        self.lines.say_bytes("lora_size", adapter.n_bytes)

    # Memory

    def _check_least_memory(self, model: Model, n_ctx: int, n_parameters: int) -> None:
        """Refuse what no plan can do before it is planned, which alone could take it all."""
        from engine.training.resources import least_memory

        if not self.options.only_write_lora:
            needed = least_memory(model.hparams, self._n_rows, n_ctx, n_parameters)
            self._check_memory(needed, n_ctx)

    def _check_memory(self, needed: int, n_ctx: int) -> None:
        from engine.training.resources import available_memory, check_memory

        options = self.options
        settings = {"--batch": options.batch, "--ctx": n_ctx, "--lora-r": options.lora_r}
        also = "" if options.use_checkpointing else " or leave out --no-checkpointing"
        check_memory(needed, available_memory(), settings, also)

    def _trainer(self, model: Model, adapter: Adapter, n_ctx: int) -> Trainer:
        from engine.training.memory_plan import fastest_plan
        from engine.training.resources import memory_in_use, planned_memory
        from engine.training.trainer import Trainer

        options = self.options
        n_layer = model.hparams.n_layer

        def make(kept_layers: int) -> Trainer:
            return Trainer(
                model,
                adapter,
                self._n_rows,
                n_ctx,
                kept_layers=kept_layers,
                n_threads=self._threads(),
                compute=options.compute,
                packed=options.pack_samples,
                measure=options.perf,
            )

        try:
            if options.memory_limit is None:
                return make(0 if options.use_checkpointing else n_layer)
            lower = f"--batch ({options.batch}), --ctx ({n_ctx}) or --lora-r ({options.lora_r})"
            trainer, plan = fastest_plan(
                make,
                n_layer,
                options.memory_limit,
                lambda trainer: memory_in_use() + planned_memory(trainer),
                lower,
            )
            self.lines.say(f"main: memory plan: {plan.text()}")
            return trainer
        except MemoryError:
            raise EngineError(
                f"training needs more memory than the system gives; lower --batch"
                f" ({options.batch}), --ctx ({n_ctx}) or --lora-r ({options.lora_r})"
            ) from None

    # The training

    def _ready(
        self,
        model: Model,
        adapter: Adapter,
        state: TrainingState,
        n_ctx: int,
        data: Data,
        saver: Saver,
    ) -> Training | int:
        """Plan and load the data; what is ready to train, or the status of a dry run."""
        from engine.training.resources import expected_updates, planned_memory

        options, lines = self.options, self.lines
        n_opt_bytes = state.m.nbytes + state.v.nbytes + state.past_losses.nbytes
        lines.say_bytes("opt_size ", n_opt_bytes)
        lines.say(f"main: opt iter {state.opt_iteration}")
        limited = options.memory_limit is not None
        if limited:  # what the data take counts; else lines come in the original's order
            data.load(model, n_ctx)
        trainer = self._trainer(model, adapter, n_ctx)
        lines.say_bytes("input_size", trainer.input_bytes)
        lines.say_bytes("compute_size", trainer.memory_bytes)
        lines.say("main: evaluation order = LEFT_TO_RIGHT")
        if not limited:
            data.load(model, n_ctx)
        batches = data.batches(state, self.seed)
        if options.show_sample:
            data.tell_sample()
        n_updates = expected_updates(
            options.adam_iter,
            options.epochs,
            len(data.samples),
            options.batch * max(1, options.grad_acc),
        )
        if options.dry_run:
            data.validation(state)
            return self._dry_run(model, adapter, trainer, data, batches, n_updates)
        self._check_memory(planned_memory(trainer), n_ctx)
        return Training(
            options,
            lines,
            self.ranks,
            model,
            adapter,
            state,
            trainer,
            data,
            batches,
            saver,
            n_updates,
        )

    def _dry_run(
        self,
        model: Model,
        adapter: Adapter,
        trainer: Trainer,
        data: Data,
        batches: Batches,
        n_updates: int,
    ) -> int:
        """Tell what a run would take, after one evaluation; nothing is trained or written."""
        from engine.training.report import duration_text, end_text
        from engine.training.resources import memory_in_use, planned_memory, probe_seconds

        say, n_ctx = self.lines.say, batches.options.n_ctx
        planned = planned_memory(trainer)
        peak = memory_in_use() + planned
        mapped = sum(info.n_bytes for info in model.file.tensors.values())
        say(f"dry run: samples              = {len(data.samples)}")
        say(f"dry run: tokens               = {len(data.samples.tokens)}")
        say(f"dry run: trainable parameters = {adapter.flat.size}")
        say(
            f"dry run: peak memory          = {peak} bytes ({peak / 2**20:.1f} MB), and"
            f" {mapped / 2**20:.1f} MB of the model's file"
        )
        self._check_memory(planned, n_ctx)
        if not self.ranks.is_root:
            return 0
        batch, rows = batches.next(), self.ranks.rows(self.options.batch)
        starts = None if batch.starts is None else batch.starts[rows]
        seconds = probe_seconds(
            lambda: trainer.evaluate(batch.inputs[rows], batch.targets[rows], 1.0, starts)
        )
        n_tokens = batch.inputs.size
        say(
            f"dry run: speed                = {n_tokens / seconds:.1f} tokens/s"
            f" ({seconds:.3f} s for {n_tokens} tokens)"
        )
        total_ms = 1000 * seconds * max(1, self.options.grad_acc) * (n_updates + 1)
        say(
            f"dry run: expected end         = {end_text(total_ms)}, after"
            f" {duration_text(total_ms)} for {n_updates} iterations"
        )
        return self.lines.status()


if __name__ == "__main__":
    sys.exit(main())
