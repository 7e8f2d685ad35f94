"""A run of `finetune` on the ranks of an MPI job: who writes and prints, and how they end together.

Rank 0 writes and prints; what fails on another is told under its number. A failure that every rank
has met ends each of them; one that a single rank has met ends the job.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from engine.errors import EngineError

from .console import FAILED, note
from .finetune_options import FinetuneOptions

if TYPE_CHECKING:
    from engine.training.parallel import Communicator

T = TypeVar("T")

TERMINATED = 128 + signal.SIGTERM


def is_another_rank() -> bool:
    """Whether a launcher calls this process another one than the first; asked before MPI runs."""
    return any(os.environ.get(name, "0") != "0" for name in ("PMIX_RANK", "PMI_RANK"))


class Ranks:
    """The processes that train together, and which of them is this one; one without MPI.

    Attributes
    ----------
    comm : Communicator
    is_root : bool
        This is the rank that writes and prints.
    """

    def __init__(self) -> None:
        from engine.training.parallel import communicator

        self.comm: Communicator = communicator()
        self.is_root = self.comm.rank == 0

    def without_outputs(self, options: FinetuneOptions) -> FinetuneOptions:
        """Give the options of a rank that writes nothing."""
        return dataclasses.replace(options, checkpoint_out="", lora_out="", log_csv="", plot="")

    def rows(self, n_batch: int) -> slice:
        """Rows of a batch that this rank computes."""
        from engine.training.parallel import rows_of

        return rows_of(n_batch, self.comm.rank, self.comm.size)

    def own_cores(self) -> int:
        """Cores that this rank may use and need not leave to others."""
        from engine.training.parallel import own_cores

        return own_cores(self.comm)

    def together(self, prepare: Callable[[], T]) -> T:
        """Do what may fail on one rank alone; then all of them fail, with its message."""
        from engine.training.parallel import check_failures

        if self.comm.size == 1:
            return prepare()
        failure, result = "", None
        try:
            result = prepare()
        except EngineError as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename or 'a file'}: {error.strerror or error}"
        check_failures(self.comm, failure)
        assert result is not None
        return result

    def agree(self, facts: Mapping[str, object]) -> None:
        """Refuse to train with ranks that differ in what must be equal."""
        from engine.training.parallel import check_agreement

        if self.comm.size > 1:
            check_agreement(self.comm, facts)

    def run(self, body: Callable[[], int]) -> int:
        """Run a rank's work; what ends it alone is told here and ends the job."""
        from engine.training.parallel import AgreedError

        if self.comm.size == 1:
            return body()
        try:
            return body()
        except AgreedError:
            if self.is_root:
                raise
            return FAILED
        except (EngineError, OSError, MemoryError) as error:
            self.tell(f"error: {' '.join(str(error).split()) or 'not enough memory'}")
        except BaseException:
            self.tell(traceback.format_exc())
        self.comm.abort(FAILED)

    def tell(self, line: str) -> None:
        """Write a line of this rank's own."""
        note(f"rank {self.comm.rank}: {line}")

    def end_when_told(self, last_checkpoint: Callable[[], str]) -> None:
        """Say what has happened when the job is ended, as it is after the death of a rank."""
        if self.comm.size == 1:
            return

        def handle(_number: int, _frame: object) -> None:
            saved = last_checkpoint()
            go_on = f"; go on from {saved}" if saved else ""
            self.tell(f"told to end: another rank has died, or mpirun was stopped{go_on}")
            os._exit(TERMINATED)

        signal.signal(signal.SIGTERM, handle)
