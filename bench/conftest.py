"""Peaks of this machine, measured before the first kernel, and what stands beside a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from bench.peaks import THREADS, Peak, measure_peak
from bench.results import keep
from engine import kernels


@pytest.fixture(scope="session", params=kernels.isas())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def peak(isa: str) -> Iterator[Peak]:
    found = measure_peak(isa)
    print(f"\n{isa}, {THREADS} threads: {found}")
    yield found


@pytest.fixture
def report(benchmark, isa: str, peak: Peak) -> Callable[..., None]:
    """Give a function that times `run` and notes its rate and percent of peak."""

    def timed(run: Callable[[], object], *, flops: float = 0, n_bytes: float = 0) -> None:
        run()
        benchmark.pedantic(run, rounds=7, warmup_rounds=1)
        seconds = benchmark.stats.stats.median
        info = benchmark.extra_info
        info["isa"] = isa
        if flops:
            rate = flops / seconds / 1e9
            info["GFLOP/s"] = round(rate, 1)
            info["% of vectors"] = round(100 * rate / peak.vector)
            if peak.tiles:
                info["% of tiles"] = round(100 * rate / peak.tiles)
        if n_bytes:
            rate = n_bytes / seconds / 1e9
            info["GB/s"] = round(rate, 2)
            info["% of reads"] = round(100 * rate / peak.reads)

    return timed


def row_name(test: str) -> str:
    """``test_linear[amx-(512, 576, 1536)-Q8_0]`` without what is the same in a row of the table."""
    name, _, parameters = test.removeprefix("test_").removesuffix("]").partition("[")
    return " ".join([name.replace("_", " "), *parameters.split("-")[1:]])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a kernel: median and the rates, which pytest-benchmark's own table leaves out.

    What all kernels gave is kept in the results; a part that was chosen is only shown.
    """
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    rows = []
    for bench in session.benchmarks if session else []:
        rates = {name: value for name, value in bench.extra_info.items() if name != "isa"}
        text = "  ".join(f"{value} {name}" for name, value in rates.items())
        terminalreporter.write_line(f"{bench.name:<64} {1e3 * bench.stats.median:9.3f} ms  {text}")
        rows.append({"what": row_name(bench.name), **bench.extra_info})
    chosen = terminalreporter.config.option.keyword or terminalreporter.stats.get("failed")
    if rows and not chosen:
        path = keep(kernels.isas()[0], {"kernels": rows})
        terminalreporter.write_line(f"kept in {path}")
