"""What a machine has and a run needs: memory left, memory planned, speed, time to go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError
from engine.machine import control_groups, read_text

# Evaluations shorter than this are measured twice: the first one also fetches the weights.
SHORT_PROBE_SECONDS = 2.0

# Some forms of adapters are made whole before they are written; checkpoints never are.
_COPIES_TO_SAVE = 1


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Memory that can still be taken, and who sets the limit."""

    n_bytes: int
    source: str


def available_memory(root: Path | str = "/") -> MemoryLimit | None:
    """Find the least of what the machine and the process's control groups have left.

    Parameters
    ----------
    root : Path or str
        Where ``proc`` and ``sys`` are.

    Returns
    -------
    MemoryLimit or None
        None where the system tells nothing.
    """
    root = Path(root)
    limits = [MemoryLimit(n, "the machine") for n in _machine(root)]
    limits += [MemoryLimit(n, "the control group") for n in _control_groups(root)]
    return min(limits, key=lambda limit: limit.n_bytes, default=None)


def _machine(root: Path) -> Iterator[int]:
    kilobytes = _fields(root / "proc/meminfo").get("MemAvailable:")
    if kilobytes is not None:
        yield kilobytes * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """Memory left in the process's group and every one around it, of versions 2 and 1."""
    for folder in control_groups(root, "memory"):
        for limit, usage, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = (read_text(folder / name).strip() for name in (limit, usage))
            if most.isdecimal() and used.isdecimal():
                freed = _fields(folder / "memory.stat").get(reclaimable, 0)
                yield max(0, int(most) - max(0, int(used) - freed))


def _fields(path: Path) -> dict[str, int]:
    """Numbers of a file of lines ``name number``."""
    words = (line.split() for line in read_text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}


def memory_in_use() -> int:
    """Bytes of this process that no file backs; 0 where the system does not tell."""
    return _fields(Path("/proc/self/status")).get("RssAnon:", 0) * 1024


class PlannedTrainer(Protocol):
    """What is planned of a trainer."""

    @property
    def memory_bytes(self) -> int:
        """Activations and gradients of activations."""

    @property
    def input_bytes(self) -> int:
        """The batch."""

    @property
    def work_bytes(self) -> int:
        """The threads' working space."""

    @property
    def grad(self) -> Any:
        """Gradient of the parameters."""


def planned_memory(trainer: PlannedTrainer) -> int:
    """Bytes that a run takes beyond those in use when it is planned but has not begun.

    They are asked for already but not touched: the plan, the gradient, and both moments. A save
    then may copy the parameters into the order of its form. A pass that only takes a loss has
    its place in the plan's memory.
    """
    parameters = (3 + _COPIES_TO_SAVE) * int(trainer.grad.nbytes)
    return trainer.memory_bytes + trainer.input_bytes + trainer.work_bytes + parameters


class Sizes(Protocol):
    """What the least memory of a plan depends on."""

    @property
    def n_embd(self) -> int:
        """Width of the model."""

    @property
    def n_layer(self) -> int:
        """Layers."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""


def least_memory(sizes: Sizes, n_batch: int, n_ctx: int, n_parameters: int) -> int:
    """Bytes without which no plan can do; known before one is made.

    A layer keeps its input for the backward pass; an adapter's parameters come with gradient,
    moments and the copy of a save; positions have their rotations.
    """
    activations = 4 * n_batch * n_ctx * sizes.n_embd * (sizes.n_layer + 1)
    return activations + 4 * (4 + _COPIES_TO_SAVE) * n_parameters + 4 * n_ctx * sizes.head_dim


def check_memory(
    needed: int, limit: MemoryLimit | None, settings: dict[str, int], also: str = ""
) -> None:
    """Refuse a plan that does not fit.

    Parameters
    ----------
    needed : int
        Bytes beyond those in use.
    limit : MemoryLimit or None
    settings : dict of str to int
        Options that would make it smaller, with their values.
    also : str
        What else would help.

    Raises
    ------
    EngineError
        Tells both numbers, and what to lower.
    """
    if limit is None or needed <= limit.n_bytes:
        return
    lower = ", ".join(f"{name} ({value})" for name, value in settings.items())
    raise EngineError(
        f"training needs {size_text(needed)} of memory, {limit.source} has"
        f" {size_text(limit.n_bytes)} left; lower {lower}{also}"
    )


def size_text(n_bytes: int) -> str:
    """Write a size for a person: ``312.5 MB``, ``1.2 GB``; of 2^20 and 2^30 bytes."""
    if n_bytes < 2**30:
        return f"{n_bytes / 2**20:.1f} MB"
    return f"{n_bytes / 2**30:.1f} GB"


def probe_seconds(
    evaluate: Callable[[], Any], clock: Callable[[], float] = time.monotonic
) -> float:
    """Measure an evaluation; a short one twice, and the better time counts."""
    times: list[float] = []
    while len(times) < 2 and sum(times) < SHORT_PROBE_SECONDS:
        began = clock()
        evaluate()
        times.append(clock() - began)
    return min(times)


def expected_updates(adam_iter: int, epochs: int, n_samples: int, samples_per_update: int) -> int:
    """Count the updates of a run that no convergence test ends; filled rows may need fewer."""
    if epochs <= 0:
        return adam_iter
    return min(adam_iter, max(1, -(-epochs * n_samples // samples_per_update)))
