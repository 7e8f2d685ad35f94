"""Peaks of this machine, measured before the first kernel, and what stands beside a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import pytest

from engine import kernels, ops
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


@pytest.fixture(scope="session", params=kernels.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def peak(isa: str) -> Iterator[Peak]:
    found = measure_peak(isa)
    print(f"\n{isa}, {THREADS} threads: {found.gflops:.0f} GFLOP/s, reads {found.gbytes:.1f} GB/s")
    yield found


@pytest.fixture
def report(benchmark, peak: Peak) -> Callable[..., None]:
    """Give a function that times `run` and notes its rate and percent of peak."""

    def timed(run: Callable[[], object], *, flops: float = 0, n_bytes: float = 0) -> None:
        run()
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)
        seconds = benchmark.stats.stats.median
        if flops:
            rate = flops / seconds / 1e9
            benchmark.extra_info["GFLOP/s"] = round(rate, 1)
            benchmark.extra_info["% of peak"] = round(100 * rate / peak.gflops)
        if n_bytes:
            rate = n_bytes / seconds / 1e9
            benchmark.extra_info["GB/s"] = round(rate, 2)
            benchmark.extra_info["% of reads"] = round(100 * rate / peak.gbytes)

    return timed


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a kernel: median and the rates, which pytest-benchmark's own table leaves out."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        info = "  ".join(f"{value} {name}" for name, value in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name:<64} {1e3 * bench.stats.median:9.3f} ms  {info}")
