"""What to keep and what to compute again, for a budget of memory: the fastest plan that fits.

A layer's activations are kept from the forward pass for the reverse one, or computed again from
the layer's input. Keeping more layers is faster and takes more memory, and changes no result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.errors import EngineError
from engine.training.resources import PlannedTrainer, size_text

TrainerT = TypeVar("TrainerT", bound="_Trainer")


class _Trainer(PlannedTrainer, Protocol):
    """What is asked of a trainer besides its memory."""

    @property
    def flops(self) -> int:
        """Work of an evaluation."""

    @property
    def repeated_flops(self) -> int:
        """What of it is done again."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A plan that fits.

    Attributes
    ----------
    kept_layers, n_layer : int
        Layers whose activations are kept, of how many.
    n_bytes, limit : int
        Memory of the process, without the model's mapped file, and what it may be.
    extra : float
        Expected time of an evaluation beyond that of keeping everything, as a part of it.
    """

    kept_layers: int
    n_layer: int
    n_bytes: int
    limit: int
    extra: float

    def text(self) -> str:
        """Say what was chosen, for a person."""
        if self.kept_layers == self.n_layer:
            what = "no checkpointing"
        elif self.kept_layers:
            what = f"activations of {self.kept_layers} of {self.n_layer} layers kept"
        else:
            what = "checkpointing of every layer"
        return (
            f"{what}, {size_text(self.n_bytes)} of {size_text(self.limit)},"
            f" {100 * self.extra:.0f} % more time expected than with all kept"
        )


def fastest_plan(
    make: Callable[[int], TrainerT],
    n_layer: int,
    limit: int,
    needed: Callable[[TrainerT], int],
    lower: str,
) -> tuple[TrainerT, MemoryPlan]:
    """Find the trainer that keeps the most layers within a limit.

    Parameters
    ----------
    make : callable (int) -> trainer
        Plans one that keeps so many layers; may raise MemoryError.
    n_layer : int
    limit : int
        Bytes.
    needed : callable (trainer) -> int
        Bytes that a run with it takes, all in all.
    lower : str
        What to lower if nothing fits.

    Returns
    -------
    trainer, MemoryPlan

    Raises
    ------
    EngineError
        If even keeping none does not fit; tells what that takes.
    """
    for_none = _needed(make, 0, needed)
    if for_none is None or for_none > limit:
        what = "more than the system gives" if for_none is None else size_text(for_none)
        raise EngineError(
            f"--memory-limit: this run takes {what} at the least, the limit is"
            f" {size_text(limit)}; raise it, or lower {lower}"
        )
    kept, too_many, n_bytes, next_try = 0, n_layer + 1, for_none, n_layer
    while kept + 1 < too_many:
        n = _needed(make, next_try, needed)
        if n is not None and n <= limit:
            kept, n_bytes = next_try, n
        else:
            too_many = next_try
        next_try = (kept + too_many) // 2
    gc.collect()
    best = make(kept)
    extra = best.repeated_flops / (best.flops - best.repeated_flops)
    return best, MemoryPlan(kept, n_layer, n_bytes, limit, extra)


def _needed(
    make: Callable[[int], TrainerT], kept: int, needed: Callable[[TrainerT], int]
) -> int | None:
    """Bytes that a plan needs; None if the system does not even give its address space."""
    gc.collect()  # nodes and tensors of the plan before are in circles, and count as memory in use
    try:
        return needed(make(kept))
    except MemoryError:
        return None
