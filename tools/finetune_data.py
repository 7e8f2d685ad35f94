"""What a run of `finetune` trains on and what it watches: samples, batches, validation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from engine.errors import DataError, OptionError
from engine.escapes import resolve_escapes

from .finetune_lines import Lines, is_terminal_output
from .finetune_options import FinetuneOptions

if TYPE_CHECKING:
    from engine.model import Model
    from engine.tokenizer.chat import ChatTemplate
    from engine.training.data import Batches, Samples, SplitOptions
    from engine.training.state import TrainingState
    from engine.training.validation import Validation

# The same part whatever the seed: a resumed run must not train on what was set aside before.
_SPLIT_SEED = 0
_COLOURS = ("\x1b[32m", "\x1b[0m")


class Data:
    """The texts that the options name, read at once and tokenized when there is a model.

    Raises
    ------
    DataError
        If a text is missing or empty.
    OptionError
        If an option makes no sense for the form of the text.
    """

    def __init__(self, options: FinetuneOptions, lines: Lines) -> None:
        from engine.training.conversations import is_conversations
        from engine.training.data import read_training_text

        self.options = options
        self._lines = lines
        self._is_conversations = is_conversations(options.train_data)
        self._check_form()
        self._text = read_training_text(options.train_data)
        if options.val_data:
            read_training_text(options.val_data)

    @property
    def inputs(self) -> list[str]:
        """Names of the files that are read."""
        return [self.options.train_data, self.options.val_data]

    def _check_form(self) -> None:
        options = self.options
        if self._is_conversations:
            if options.sample_start:
                self._lines.note(
                    f"warning: --sample-start: {options.train_data} has a sample a line, its start"
                    " is not looked for"
                )
            return
        if options.mask_prompt:
            raise OptionError(
                f"--mask-prompt: {options.train_data} is plain text without prompts; give a .jsonl"
                " file"
            )
        if options.append_eos and not options.sample_start:
            raise OptionError(
                "--append-eos: samples of plain text end anywhere; give --sample-start, or a .jsonl"
                " file"
            )

    def load(self, model: Model, n_ctx: int) -> None:
        """Tokenize, split, and tell what there is."""
        from engine.training.data import begin_and_end_tokens
        from engine.training.validation import split_validation

        options, lines = self.options, self._lines
        self._model, self._n_ctx = model, n_ctx
        self._bos, self._eos = begin_and_end_tokens(model.tokenizer, str(model.file.path))
        split = self._split_options()
        lines.say(f"main: tokenize training data from {options.train_data}")
        lines.say(f"main: sample-start: {os.fsdecode(split.sample_start)}")
        lines.say(f"main: include-sample-start: {str(options.include_sample_start).lower()}")
        self.samples = samples = self._samples(split)
        self.watched: Samples | None = None
        if options.val_split:
            self.samples, self.watched = split_validation(samples, options.val_split, _SPLIT_SEED)
        elif options.val_data:
            self.watched = self._validation_samples(split)
        for warning in samples.warnings:
            lines.say(f"tokenize_file: warning: {warning}")
        lines.say(f"tokenize_file: total number of samples: {len(self.samples)}")
        lines.say(f"main: number of training tokens: {len(self.samples.tokens)}")
        lines.say(f"main: number of unique tokens: {self.samples.n_unique_tokens}")

    def _split_options(self) -> SplitOptions:
        from engine.training.data import SplitOptions

        options = self.options
        start = os.fsencode(options.sample_start)
        if options.escape:
            start = resolve_escapes(start)
        return SplitOptions(start, options.include_sample_start, options.overlapping_samples)

    def _template(self) -> ChatTemplate | None:
        from engine.tokenizer.chat import chat_template

        model = self._model
        return chat_template(model.file.metadata, model.tokenizer, str(model.file.path))

    def _samples(self, split: SplitOptions) -> Samples:
        from engine.training.conversations import append_end, split_conversations
        from engine.training.data import split_samples

        options, tokenizer = self.options, self._model.tokenizer
        if self._is_conversations:
            return split_conversations(
                self._text,
                options.train_data,
                tokenizer,
                self._n_ctx,
                self._template(),
                mask_prompt=options.mask_prompt,
                append_eos=options.append_eos,
            )
        samples = split_samples(self._text, options.train_data, tokenizer, self._n_ctx, split)
        return append_end(samples, self._eos) if options.append_eos else samples

    def _validation_samples(self, split: SplitOptions) -> Samples:
        from engine.training.conversations import append_end, is_conversations
        from engine.training.validation import load_validation

        options = self.options
        samples = load_validation(
            options.val_data,
            self._model.tokenizer,
            self._n_ctx,
            self._template(),
            split=split,
            mask_prompt=options.mask_prompt,
            append_eos=options.append_eos,
        )
        plain = not is_conversations(options.val_data)
        if plain and options.append_eos and samples.extent is not None:
            samples = append_end(samples, self._eos)
        return samples

    def tell_sample(self) -> None:
        """Print the first sample with marks around what counts."""
        from engine.training.conversations import MARKS, show_sample

        marks = _COLOURS if is_terminal_output() else MARKS
        shown = show_sample(self.samples, self._model.tokenizer, n_ctx=self._n_ctx, marks=marks)
        self._lines.say("main: the first sample, what counts in the loss marked:")
        self._lines.say(shown)

    def batches(self, state: TrainingState, seed: int) -> Batches:
        """Make the stream of batches; its shuffle goes on, or begins anew from `seed`."""
        from engine.training.data import Batches, BatchOptions

        options, samples = self.options, self.samples
        fits = state.shuffle.fits(samples)
        if not fits:
            self._lines.say("main: train data seems to have changed. restarting shuffled epoch.")
        if options.force_reshuffle:
            self._lines.say(
                "main: forced reshuffling of data. restarting with newly shuffled epoch."
            )
        if not fits or options.force_reshuffle:
            state.shuffle.restart(samples, seed)
        rows = BatchOptions(
            n_batch=options.batch,
            n_ctx=self._n_ctx,
            bos=self._bos,
            eos=self._eos,
            fill_with_next_samples=options.fill_with_next_samples,
            separate_with_eos=options.separate_with_eos,
            separate_with_bos=options.separate_with_bos,
            sample_random_offsets=options.sample_random_offsets,
            pack_samples=options.pack_samples,
        )
        return Batches(samples, state.shuffle, rows)

    def validation(self, state: TrainingState) -> Validation | None:
        """Prepare the validation that was asked for, and what `state` knows of it."""
        from engine.training.state import ValidationState

        if self.watched is None:
            state.validation = None
            return None
        fingerprint = self.samples.hash if self.options.val_split else self.watched.hash
        if state.validation is None or state.validation.samples_hash != fingerprint:
            state.validation = ValidationState(fingerprint)
        validation = self._fixed(self.watched)
        self._lines.say(f"main: number of validation tokens: {validation.n_tokens}")
        return validation

    def measured(self) -> tuple[str, Validation | None]:
        """Choose what the proof of learning is measured on, and say what it is.

        Validation data if there are any; else the end of the training data. None when no token of
        it counts in the loss.
        """
        from engine.training.validation import held_out

        if self.watched is not None:
            what, part = "validation data", held_out(self.watched, fraction=1.0)
        else:
            what, part = "the last 2 % of the data", held_out(self.samples)
        try:
            return what, self._fixed(part)
        except DataError:
            return what, None

    def _fixed(self, samples: Samples) -> Validation:
        from engine.training.validation import Validation

        return Validation(samples, self.options.batch, self._n_ctx, self._bos, self._eos)
