"""Peaks of this machine: arithmetic without memory, and memory without arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from engine import ops
from engine.graph import Graph
from engine.tensor import Tensor

THREADS = int(os.environ.get("BENCH_THREADS", "0")) or len(os.sched_getaffinity(0))
READ_BYTES = 1 << 28
PROBE_STEPS = 1 << 20


@dataclass(frozen=True)
class Peak:
    """GFLOP/s of float32 multiply-adds and GB/s of reads, all threads together."""

    gflops: float
    gbytes: float


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        run()
        times.append(perf_counter() - begin)
    return min(times)


def measure_peak(isa: str) -> Peak:
    arithmetic = Graph(THREADS, isa)
    ops.probe(arithmetic, PROBE_STEPS)
    flops = arithmetic.probe_flops * PROBE_STEPS * THREADS
    reading = Graph(THREADS, isa)
    data = np.ones(READ_BYTES // 4, np.float32)
    ops.probe(reading, data=Tensor.external("data", data, 1, data.size))
    return Peak(
        flops / best_seconds(arithmetic.run) / 1e9, READ_BYTES / best_seconds(reading.run) / 1e9
    )
