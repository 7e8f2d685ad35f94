"""Tables of figures: columns for each machine and peer, gaps left empty."""

from __future__ import annotations

from typing import Any

import pytest

from bench import report


def row(what: str, ours: float, *, threads: int = 2, unit: str = "s", **more: Any) -> dict:
    return {"what": what, "threads": threads, "unit": unit, "ours": ours, "peers": {}, **more}


def result(name: str, *rows: dict, **more: Any) -> dict:
    return {"machine": {"processor": name, "cores": 2}, "isa": "avx2", "rows": [*rows], **more}


def test_the_table_has_columns_a_machine_and_leaves_gaps_empty() -> None:
    peers = {"torch 2": {"value": 1234.5, "ratio": 2.004}}
    table = report.table(
        {
            "a": result("A", row("start", 0.0431), row("step", 12.34, peers=peers)),
            "b": result("B", row("step", 678.9, target={"value": 7, "ratio": 0.5})),
        }
    )
    assert table.splitlines() == [
        "|  | A, 2 cores, avx2 | torch 2 | target | B, 2 cores, avx2 | target |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| start | 0.043 s |  |  |  |  |",
        "| step | 12.3 s | 1,234 (× 2.00) |  | 679 s | 7.00 (× 0.50) |",
    ]


def test_fewer_threads_are_named_and_left_out_of_the_brief_table_with_products_and_targets() -> (
    None
):
    results = {
        "a": result(
            "A",
            row("step", 1, target={"value": 1, "ratio": 1}),
            row("step", 2, threads=1),
            row("product", 3, unit="GFLOP/s"),
        )
    }
    every = report.table(results).splitlines()[2:]
    assert [line.split(" | ")[0] for line in every] == ["| step", "| step, 1 thread", "| product"]
    brief = report.table(results, brief=True).splitlines()
    assert brief == ["|  | A, 2 cores, avx2 |", "| --- | ---: |", "| step | 1.00 s |"]


def test_nothing_measured_is_said() -> None:
    assert report.table({}) == report.table({"a": result("A")})
    assert "make bench" in report.table({})


def test_kernels_have_a_row_each_and_a_column_a_variant() -> None:
    kernels = [
        {"what": "linear", "isa": "amx", "GFLOP/s": 2001.2, "% of tiles": 27},
        {"what": "linear", "isa": "avx2", "GFLOP/s": 100.0, "% of vectors": 90},
        {"what": "read", "isa": "avx2", "GB/s": 9.5, "% of reads": 95},
    ]
    assert report.kernels_table(result("A", kernels=kernels)).splitlines()[2:] == [
        "| linear | 2,001 GFLOP/s, 27 % of tiles | 100 GFLOP/s, 90 % of vectors |",
        "| read |  | 9.50 GB/s, 95 % of reads |",
    ]


def test_the_full_report_describes_machine_peaks_and_kernels() -> None:
    peaks = {"2 threads": {"fma": 200.0, "reads": 29.84}}
    kernels = [{"what": "add", "isa": "avx2", "GB/s": 50.0, "% of reads": 170}]
    text = report.full_report({"a": result("A", row("step", 1), peaks=peaks, kernels=kernels)})
    for part in ("Processor: A, cores: 2.", "| 2 threads | 200 | 29.8 |", "170 % of reads"):
        assert part in text


def test_a_document_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="figures: begin"):
        report.with_table(f"{report.END}\n{report.BEGIN}", "table")


def test_what_stands_around_the_markers_stays() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_table(text, "new") == text.replace("old", "new")
