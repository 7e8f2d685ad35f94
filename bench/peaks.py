"""Peaks of this machine: arithmetic without memory, and memory without arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np

from engine import ops
from engine.graph import Graph
from engine.tensor import Tensor

THREADS = int(os.environ.get("BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
READ_BYTES = 1 << 30  # so much that hardly any of it is still in a cache when it is read again
PROBE_STEPS = {"fma": 1 << 20, "pairs": 1 << 20, "tiles": 1 << 17}


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of float32 multiply-adds, bf16 pairs and bf16 tiles, and GB/s of reads.

    All threads together; 0 where there is no such unit.
    """

    fma: float
    pairs: float
    tiles: float
    reads: float

    @property
    def vector(self) -> float:
        return max(self.fma, self.pairs)

    @property
    def best(self) -> float:
        return max(self.vector, self.tiles)

    def __str__(self) -> str:
        units = {"float32": self.fma, "bf16 pairs": self.pairs, "bf16 tiles": self.tiles}
        rates = [f"{rate:,.0f} GFLOP/s of {name}" for name, rate in units.items() if rate]
        return ", ".join([*rates, f"reads of {self.reads:.1f} GB/s"])

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 1) for name, value in asdict(self).items()}


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """Time of the fastest of several runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    return min(times)


def measure_peak(isa: str, n_threads: int = THREADS) -> Peak:
    """Peaks of a variant; takes about a second."""
    rates = []
    for unit, steps in PROBE_STEPS.items():
        graph = Graph(n_threads, isa)
        flops = ops.probe(graph, steps, unit=unit) * n_threads
        rates.append(flops / best_seconds(graph.run) / 1e9 if flops else 0.0)
    reading = Graph(n_threads, isa)
    data = np.ones(READ_BYTES // 4, np.float32)
    ops.probe(reading, data=Tensor.external("data", data, 1, data.size))
    return Peak(*rates, reads=READ_BYTES / best_seconds(reading.run, 3) / 1e9)
