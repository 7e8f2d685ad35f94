"""Figures kept: a file a kind of machine, rows replaced by name and threads."""

from __future__ import annotations

from bench.results import keep, merged, read_results


def row(what: str, threads: int, ours: float) -> dict:
    return {"what": what, "threads": threads, "ours": ours}


def test_new_rows_replace_old_ones_of_their_name_and_threads():
    old = [row("a", 2, 1), row("a", 1, 2), row("b", 2, 3)]
    rows = merged(old, [row("b", 2, 4), row("b", 1, 5)], ["b", "a"])
    assert rows == [row("b", 2, 4), row("b", 1, 5), row("a", 2, 1), row("a", 1, 2)]


def test_rows_that_no_case_gives_any_more_are_dropped():
    assert merged([row("gone", 2, 1)], [row("a", 2, 1)], ["a"]) == [row("a", 2, 1)]


def test_a_part_is_replaced_and_other_parts_and_machines_stay(tmp_path):
    (tmp_path / "amd-avx512bf16.json").write_text('{"isa": "avx512bf16"}')
    keep("avx2", {"rows": [row("a", 2, 1)]}, tmp_path)
    path = keep("avx2", {"kernels": [1]}, tmp_path)
    results = read_results(tmp_path)
    assert sorted(results) == sorted(["amd-avx512bf16", path.stem])
    kept = results[path.stem]
    assert (kept["rows"], kept["kernels"], kept["isa"]) == ([row("a", 2, 1)], [1], "avx2")
    assert kept["machine"]["cores"] >= 1
    assert results["amd-avx512bf16"] == {"isa": "avx512bf16"}
