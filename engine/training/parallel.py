"""One run on several processes: each computes some rows of every batch, and gradients are summed.

The processes are those of an MPI job (``mpirun -n 4 finetune ...``), its *ranks*. All hold the
whole adapter and make the same updates from the same sum, so nothing but gradients, losses and
decisions travels. Without MPI there is one rank, and what is said here costs nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, OptionError
from engine.lora import FloatArray
from engine.training.data import IntArray
from engine.training.trainer import Trainer

T = TypeVar("T")

# Where launchers write how many processes they have started, and which of them this is.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("PMIX_RANK", "PMI_RANK")


class AgreedError(EngineError):
    """An error that every rank raises: one of them may tell it for all."""


class Communicator(Protocol):
    """What ranks say to each other. Every rank makes the same calls in the same order.

    Attributes
    ----------
    rank, size : int
        Which of how many; rank 0 is the root, which writes and prints.
    """

    rank: int
    size: int

    def begin_sum(self, values: NDArray[Any]) -> None:
        """Begin to replace `values` by their sum over the ranks; they are not to be touched."""

    def finish_sums(self) -> None:
        """Wait until every sum that was begun is there."""

    def all(self, value: T) -> list[T]:
        """Give every rank's value to every rank."""

    def from_root(self, value: T) -> T:
        """Give the root's value to every rank."""

    def abort(self, status: int) -> NoReturn:
        """End every rank at once."""


class Alone:
    """The communicator of a single process."""

    rank = 0
    size = 1

    def begin_sum(self, values: NDArray[Any]) -> None:
        """Leave the values, which are their sum."""

    def finish_sums(self) -> None:
        """Wait for nothing."""

    def all(self, value: T) -> list[T]:
        """List the one value."""
        return [value]

    def from_root(self, value: T) -> T:
        """Give the value back."""
        return value

    def abort(self, status: int) -> NoReturn:
        """End the process."""
        raise SystemExit(status)


class Mpi:
    """The communicator of an MPI job; importing mpi4py has started MPI."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD
        self._pending: list[Any] = []
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def begin_sum(self, values: NDArray[Any]) -> None:
        """Begin a sum, and let those begun before move on, which most libraries do in calls only.

        Its order is the library's; the result is the same on every rank.
        """
        self._said(lambda: [request.Test() for request in self._pending])
        begin = self._comm.Iallreduce
        self._pending.append(self._said(lambda: begin(self._mpi.IN_PLACE, values)))

    def finish_sums(self) -> None:
        """Wait for the sums that were begun."""
        pending, self._pending = self._pending, []
        self._said(lambda: self._mpi.Request.Waitall(pending))

    def all(self, value: T) -> list[T]:
        """Gather everywhere."""
        gathered: list[T] = self._said(lambda: self._comm.allgather(value))
        return gathered

    def from_root(self, value: T) -> T:
        """Broadcast."""
        root: T = self._said(lambda: self._comm.bcast(value))
        return root

    def abort(self, status: int) -> NoReturn:
        """End the job."""
        self._comm.Abort(status)
        raise SystemExit(status)

    def _said(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except self._mpi.Exception as error:
            raise EngineError(f"another rank has ended or cannot be reached ({error})") from None


def launched_size(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes an MPI launcher says it has started; 1 without one, 0 if it is unknown."""
    for name in _SIZES:
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 0 if any(name in environ for name in _RANKS) else 1


def communicator(environ: Mapping[str, str] = os.environ) -> Communicator:
    """Join the MPI job of this process, if it is one of several.

    Raises
    ------
    EngineError
        If there is a job and MPI cannot join it: its processes would each do all of the work, and
        write the same files.
    """
    launched = launched_size(environ)
    if launched == 1:
        return Alone()
    try:
        mpi = Mpi()
    except (ImportError, RuntimeError) as error:
        raise EngineError(
            f"started by mpirun, but MPI cannot be used ({error}); install mpi4py: pip install"
            " 'cylora[mpi]'"
        ) from None
    if launched > 1 and mpi.size == 1:
        raise EngineError(
            f"mpirun has started {launched} processes, of which mpi4py sees one: it belongs to"
            " another MPI than mpirun; use the mpirun of the library that mpi4py loads"
        )
    return mpi if mpi.size > 1 else Alone()


def rows_of(n_batch: int, rank: int, size: int) -> slice:
    """Rows of a batch that fall to a rank: as even as can be.

    Raises
    ------
    OptionError
        If there are fewer rows than ranks.
    """
    if n_batch < size:
        raise OptionError(f"--batch: {n_batch} rows cannot be shared by {size} ranks")
    return slice(n_batch * rank // size, n_batch * (rank + 1) // size)


def own_cores(comm: Communicator) -> int:
    """Cores that this process may use: those that other ranks may use too are shared evenly."""
    mine = (socket.gethostname(), os.sched_getaffinity(0))
    sharing = [1 for host, cores in comm.all(mine) if host == mine[0] and cores & mine[1]]
    return max(1, len(mine[1]) // len(sharing))


def check_failures(comm: Communicator, failure: str) -> None:
    """Raise on every rank when something has failed on one.

    Parameters
    ----------
    comm : Communicator
    failure : str
        What failed here; empty: nothing.

    Raises
    ------
    AgreedError
        With the text of the first rank that failed.
    """
    for rank, text in enumerate(comm.all(failure)):
        if text:
            raise AgreedError(text if rank == 0 else f"rank {rank}: {text}")


def check_agreement(comm: Communicator, facts: Mapping[str, object]) -> None:
    """Refuse ranks that would train something else than the root.

    Parameters
    ----------
    comm : Communicator
    facts : mapping of str to object
        What must be equal everywhere, by the word for it.

    Raises
    ------
    AgreedError
        Names the first rank that differs, and in what.
    """
    roots, *others = comm.all(dict(facts))
    for rank, theirs in enumerate(others, 1):
        for name, value in roots.items():
            if theirs.get(name) != value:
                raise AgreedError(
                    f"rank {rank} and rank 0 differ in {name}; give every rank the same files,"
                    " options and kernels (ENGINE_ISA)"
                )


class DataParallel:
    """A trainer's loss and gradient over the rows of all ranks.

    Parameters
    ----------
    trainer : Trainer
        Of this rank's rows of a batch (`rows_of`).
    comm : Communicator
    n_batch : int
        Rows of a whole batch.
    n_evaluations : int
        That make an update: gradients are summed in the last of them.
    stop_requested : callable () -> bool
        Whether this rank is asked to end the run.

    Attributes
    ----------
    grad : ndarray of shape (n_parameters,), float32
        The trainer's; the sum over the ranks after the last evaluation of an update.
    """

    def __init__(
        self,
        trainer: Trainer,
        comm: Communicator,
        n_batch: int,
        n_evaluations: int = 1,
        stop_requested: Callable[[], bool] = bool,
    ) -> None:
        self.grad: FloatArray = trainer.grad
        self._trainer = trainer
        self._comm = comm
        self._rows = rows_of(n_batch, comm.rank, comm.size)
        self._n_evaluations = n_evaluations
        self._n_done = 0
        self._stop_requested = stop_requested
        self._stopped = False

    def evaluate(
        self,
        inputs: IntArray,
        targets: IntArray,
        weight: float = 1.0,
        starts: IntArray | None = None,
    ) -> float:
        """Mean loss of a batch; adds `weight` times its gradient, as `Trainer.evaluate` does."""
        if self._comm.size == 1:
            return self._trainer.evaluate(inputs, targets, weight, starts)
        counted = max(1, int((targets >= 0).sum()))
        self._n_done += 1
        completes = self._n_done % self._n_evaluations == 0
        total = self._trainer.accumulate(
            inputs[self._rows],
            targets[self._rows],
            weight / counted,
            None if starts is None else starts[self._rows],
            self._begin_sum if completes else None,
        )
        return self._sum([total, self._stop_requested()])[0] / counted

    def loss(self, inputs: IntArray, targets: IntArray) -> tuple[float, int]:
        """Sum of the losses of a batch and how many targets count in it, as `Trainer.loss` does."""
        if self._comm.size == 1:
            return self._trainer.loss(inputs, targets)
        total, counted = self._trainer.loss(inputs[self._rows], targets[self._rows])
        sums = self._sum([total, self._stop_requested(), counted])
        return sums[0], int(sums[2])

    def stop_requested(self) -> bool:
        """Whether a rank was asked to stop before the last loss: all of them hear the same."""
        return self._stopped if self._comm.size > 1 else self._stop_requested()

    def _begin_sum(self, begin: int, end: int) -> None:
        self._comm.begin_sum(self.grad[begin:end])

    def _sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum a loss, the requests to stop, and what else there is; waits for the gradients too."""
        sums = np.array(numbers, dtype=np.float64)
        self._comm.begin_sum(sums)
        self._comm.finish_sums()
        self._stopped = self._stopped or sums[1] > 0
        return [float(value) for value in sums]
