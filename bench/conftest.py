"""Peaks of this machine, measured before the first kernel, and what stands beside a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bench.peaks import THREADS, Peak, measure_peak
from engine import kernels


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
