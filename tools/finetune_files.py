"""The files that a run of `finetune` writes: their names, checks before training, saving."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import EngineError, OptionError

from .finetune_options import FinetuneOptions

if TYPE_CHECKING:
    from engine.lora import Adapter, AdapterShape, BaseInfo
    from engine.model import Model
    from engine.training.state import TrainingState

BEST = "BEST"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Names of the files that a run writes; an empty one writes none.

    Attributes
    ----------
    checkpoint, adapter : str
        Patterns.
    placeholder, latest : str
        Part of a pattern that is replaced, and by which word in the second copy.
    default_adapter : bool
        The adapter's name was not given, so that its ending does not choose the form.
    best : bool
        The best adapter is kept too.
    csv, plot : str
    """

    checkpoint: str
    adapter: str
    placeholder: str
    latest: str
    default_adapter: bool = False
    best: bool = False
    csv: str = ""
    plot: str = ""

    @classmethod
    def of(cls, options: FinetuneOptions) -> Outputs:
        """Take the names from the options."""
        trains = not options.only_write_lora
        return cls(
            options.checkpoint_out if trains else "",
            options.lora_out,
            options.pattern_fn_it,
            options.fn_latest,
            "lora_out" not in options.given,
            trains and bool(options.val_data or options.val_split),
            options.log_csv if trains else "",
            options.plot if trains else "",
        )

    def names(self, pattern: str, iteration: int) -> list[str]:
        """Name the copy of an iteration and the latest copy."""
        from engine.training.report import output_name

        if not pattern:
            return []
        values = (iteration, self.latest)
        return [output_name(pattern, self.placeholder, value) for value in values]

    def best_name(self) -> str:
        """Name the copy of the best adapter; empty when its pattern has no placeholder."""
        from engine.training.report import output_name

        if not (self.best and self.placeholder and self.placeholder in self.adapter):
            return ""
        return output_name(self.adapter, self.placeholder, BEST)

    def loses_best(self) -> bool:
        """Tell whether the best adapter is asked for and has no name."""
        return self.best and bool(self.adapter) and not self.best_name()

    def form(self, name: str) -> str:
        """Say in which form an adapter of that name is written."""
        from engine.lora import form_of_path

        return "bin" if self.default_adapter else form_of_path(name)

    def check(self, iteration: int, inputs: Iterable[str]) -> None:
        """Refuse names that cannot be written, or that are files still needed.

        Parameters
        ----------
        iteration : int
            Of the first files.
        inputs : iterable of str
            Files that are read.

        Raises
        ------
        OptionError
            Names the option and the file.
        """
        taken = {os.path.realpath(name) for name in inputs if name}
        adapters = self.names(self.adapter, iteration)
        best = self.best_name()
        if best and best in adapters:
            raise OptionError(f"--fn-latest: {best} is the name of the best adapter already")
        for option, names in (
            ("--checkpoint-out", self.names(self.checkpoint, iteration)),
            ("--lora-out", [*adapters, *([best] if best else [])]),
            ("--log-csv", [self.csv] if self.csv else []),
            ("--plot", [self.plot] if self.plot else []),
        ):
            for name in names:
                if os.path.realpath(name) in taken:
                    raise OptionError(f"{option}: {name}: would overwrite a file that is in use")
                folder = option == "--lora-out" and self.form(name) == "peft"
                _check_writable(option, name, folder)
            taken |= {os.path.realpath(name) for name in names}

    def check_form(self, shapes: Sequence[AdapterShape], base: BaseInfo, alpha: float) -> None:
        """Refuse a form of adapter that cannot hold every trained tensor.

        Raises
        ------
        OptionError
            Names the options that leave those tensors out.
        """
        from engine.lora import refusals

        for name in self.names(self.adapter, 0)[:1]:
            found = refusals(shapes, self.form(name), base, alpha)
            if found:
                raise OptionError("--lora-out: " + "; ".join(found))


def _check_writable(option: str, name: str, folder: bool) -> None:
    target = os.path.realpath(name)
    if os.path.isdir(target) and not folder:
        raise OptionError(f"{option}: {name}: cannot be written: it is a folder")
    try:
        place = target if os.path.isdir(target) else os.path.dirname(target)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OptionError(f"{option}: {name}: cannot be written: {error.strerror}") from None


class Saver:
    """Writes checkpoints and adapters; a file that cannot be written does not end the run.

    Parameters
    ----------
    outputs : Outputs
    model : Model
    adapter : Adapter
    state : TrainingState
    n_ctx : int
    say, warn : callable (str)

    Attributes
    ----------
    problem : str
        What the last save failed at; empty when it did not.
    last_checkpoint : str
        Name of the last good one, read or written and committed.
    """

    def __init__(
        self,
        outputs: Outputs,
        model: Model,
        adapter: Adapter,
        state: TrainingState,
        n_ctx: int,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        from engine.gguf_write import Deferred
        from engine.lora import BaseInfo

        self.outputs = outputs
        self.problem = ""
        self.last_checkpoint = ""
        self._deferred = Deferred()
        self._written = ""
        self._model = model
        self._base = BaseInfo.of(model)
        self._adapter = adapter
        self._state = state
        self._n_ctx = n_ctx
        self._say = say
        self._warn = warn

    def save(self, iteration: int) -> bool:
        """Write every copy of an iteration, to take its place at `commit`.

        Returns
        -------
        bool
            False when one could not be written.
        """
        self.problem = self._written = ""
        with self._deferred.collect():
            for name in self.outputs.names(self.outputs.checkpoint, iteration):
                self._say(f"save_checkpoint_lora_file: saving to {name}")
                if self._try(self._write_checkpoint, name):
                    self._written = name
            for name in self.outputs.names(self.outputs.adapter, iteration):
                self._try(self.write_adapter, name)
        return not self.problem

    def commit(self) -> bool:
        """Let what was saved replace the files before it; false when one could not."""
        problems = self._deferred.commit()
        for error in problems:
            self._failed(error)
        if self._written and not problems:
            self.last_checkpoint = self._written
        return not problems

    def drop(self) -> None:
        """Remove what was saved and not committed."""
        self._deferred.drop()

    def save_best(self) -> None:
        """Keep the adapter as the best so far, where its name has room to say so."""
        name = self.outputs.best_name()
        if name:
            self._try(self.write_adapter, name)

    def write_adapter(self, name: str) -> None:
        """Write the adapter in the form that its name asks for."""
        from engine.lora import write_adapter

        self._say(f"save_as_llama_lora: saving to {name}")
        write_adapter(self._adapter, name, self._base, self.outputs.form(name))

    def _write_checkpoint(self, name: str) -> None:
        from engine.training.checkpoint import write_checkpoint

        write_checkpoint(name, self._state, self._adapter, self._model.hparams, self._n_ctx)

    def _try(self, write: Callable[[str], None], name: str) -> bool:
        try:
            write(name)
        except EngineError as error:
            self._failed(error)
            return False
        return True

    def _failed(self, error: EngineError) -> None:
        self.problem = str(error)
        self._warn(f"warning: {error}; training goes on, the file saved before is whole")
