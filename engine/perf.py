"""Where the time of runs goes, by op, and how near that is to what the machine can do at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.graph import Graph
from engine.kernels import active_isa
from engine.tensor import Tensor

_READ_BYTES = 1 << 28  # beyond most caches
_ROUNDS = 5
_STEPS = {"fma": 1 << 20, "pairs": 1 << 20, "tiles": 1 << 17}
_UNITS = {"fma": "float32 multiply-adds", "pairs": "bf16 pairs", "tiles": "bf16 tiles"}


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the machine does at most, all threads together; measured.

    Attributes
    ----------
    n_threads : int
    isa : str
    flops : dict of str to float
        FLOP/s by unit: ``fma``, ``pairs``, ``tiles``; without those that are missing.
    read_bytes : float
        A second, from memory.
    """

    n_threads: int
    isa: str
    flops: dict[str, float]
    read_bytes: float

    def best(self, *, pairs: bool) -> str:
        """Name the fastest unit; that of bf16 only where products may take it."""
        units = self.flops if pairs else ("fma",)
        return max(units, key=lambda unit: self.flops[unit])

    def text(self) -> str:
        """Write the figures."""
        rates = [f"{rate / 1e9:.0f} GFLOP/s of {_UNITS[u]}" for u, rate in self.flops.items()]
        return ", ".join([*rates, f"{self.read_bytes / 1e9:.1f} GB/s of reads"])


def measure_peaks(
    n_threads: int,
    isa: str | None = None,
    read_bytes: int = _READ_BYTES,
    data: NDArray[np.float32] | None = None,
) -> Peaks:
    """Measure arithmetic without memory and memory without arithmetic; about half a second.

    Parameters
    ----------
    n_threads : int
    isa : str, optional
        Kernel variant.
    read_bytes : int
        To read, more than the caches hold.
    data : ndarray of float32, optional
        To read instead: who measures often keeps it, for memory that comes and goes is work for
        the machine.
    """
    flops = {}
    for unit, steps in _STEPS.items():
        graph = Graph(n_threads, isa)
        work = n_threads * ops.probe(graph, steps, unit=unit)
        if work:
            flops[unit] = work / _best_seconds(graph.run)
    reading = Graph(n_threads, isa)
    if data is None:
        data = np.ones(read_bytes // 4, np.float32)
    ops.probe(reading, data=Tensor.external("data", data, 1, data.size))
    return Peaks(n_threads, isa or active_isa(), flops, data.nbytes / _best_seconds(reading.run))


def _best_seconds(run: Callable[[], object]) -> float:
    """Time of the fastest of several runs, after one that does not count."""
    run()
    times = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return max(min(times), 1e-9)


@dataclass(slots=True)
class _Op:
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    n_bytes: float = 0.0


class OpTimes:
    """Steps, seconds, FLOPs and bytes by op, of any number of graphs that were measured.

    Attributes
    ----------
    seconds, waited_seconds : float
        Of the runs, by the first worker's clock; and what all workers together stood at barriers,
        divided by their number.
    n_runs : int
    pairs : bool
        Some products were of bf16 pairs.
    """

    def __init__(self) -> None:
        self.seconds = self.waited_seconds = 0.0
        self.n_runs = 0
        self.pairs = False
        self._ops: dict[str, _Op] = {}

    def add(self, graph: Graph, *, counted: bool = True, runs_a_whole: int = 1) -> None:
        """Add a graph's times since its `measure`; `counted`: so many runs are one of the whole."""
        if not graph.n_runs:
            return
        seconds = 0.0
        for label, (n, spent, flops, n_bytes) in graph.times().items():
            op = self._ops.setdefault(label, _Op())
            op.steps += n * graph.n_runs
            op.seconds += spent
            op.flops += flops * graph.n_runs
            op.n_bytes += n_bytes * graph.n_runs
            seconds += spent
        self.seconds += seconds
        self.waited_seconds += seconds * graph.waited
        self.n_runs += graph.n_runs // runs_a_whole * counted
        self.pairs = self.pairs or graph.pairs

    @property
    def flops(self) -> float:
        """Of all products."""
        return sum(op.flops for op in self._ops.values())

    def lines(self, peaks: Peaks, runs: str) -> list[str]:
        """Write the table, the longest op first.

        Parameters
        ----------
        peaks : Peaks
        runs : str
            What runs are called, as ``evaluations``.
        """
        unit = peaks.best(pairs=self.pairs)
        best = peaks.flops[unit]
        head = (
            f"perf: {self.n_runs} {runs}, {self.seconds:.3f} s in {peaks.n_threads} threads,"
            f" kernels {peaks.isa}; {_percent(self.waited_seconds, self.seconds)} of it waiting"
        )
        machine = f"perf: peaks of this machine: {peaks.text()}"
        whole = self.flops / max(self.seconds, 1e-9)
        overall = (
            f"perf: all products: {whole / 1e9:.1f} GFLOP/s,"
            f" {_percent(whole, best)} of the peak of {_UNITS[unit]}"
        )
        columns = ("op", "steps", "ms", "time", "GFLOP/s", "of peak", "GB/s", "of reads")
        rows = [columns, *self._rows(best, peaks.read_bytes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        table = [
            f"perf: {row[0]:<{widths[0]}}"
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        return [head, machine, overall, *table]

    def _rows(self, flops: float, read_bytes: float) -> list[tuple[str, ...]]:
        n = max(self.n_runs, 1)
        rows: list[tuple[str, ...]] = []
        for label, op in sorted(self._ops.items(), key=lambda item: -item[1].seconds):
            seconds = max(op.seconds, 1e-9)
            speed, moved = op.flops / seconds, op.n_bytes / seconds
            arithmetic = (f"{speed / 1e9:.1f}", _percent(speed, flops)) if op.flops else ("", "")
            rows.append(
                (
                    label,
                    f"{op.steps / n:.0f}",
                    f"{1000 * op.seconds / n:.2f}",
                    _percent(op.seconds, self.seconds),
                    *arithmetic,
                    f"{moved / 1e9:.1f}",
                    _percent(moved, read_bytes),
                )
            )
        return rows


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1e-9):.1f} %"
