"""Peaks of this machine: arithmetic without memory, and memory without arithmetic."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from engine.perf import measure_peaks

THREADS = int(os.environ.get("BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
READ_BYTES = 1 << 30  # so much that hardly any of it is still in a cache when it is read again


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


def to_read() -> NDArray[np.float32]:
    """What is read."""
    return np.ones(READ_BYTES // 4, np.float32)


def measure_peak(
    isa: str, n_threads: int = THREADS, data: NDArray[np.float32] | None = None
) -> Peak:
    """Peaks of a variant, reading `data`; takes about a second."""
    found = measure_peaks(n_threads, isa, data=to_read() if data is None else data)
    rates = (found.flops.get(unit, 0.0) / 1e9 for unit in ("fma", "pairs", "tiles"))
    return Peak(*rates, reads=found.read_bytes / 1e9)
