"""Times by op and the machine's peaks: what is counted, and how it is written."""

from __future__ import annotations

import re

import numpy as np
import pytest

from engine import ops
from engine.graph import Graph
from engine.kernels import has_pairs
from engine.perf import OpTimes, Peaks, measure_peaks
from tests.compare import assert_same_bits
from tests.graphs import given, random
from tests.toy_model import Training, make_toy

FLOPS = {"fma": 100e9, "pairs": 50e9, "tiles": 800e9}
PEAKS = Peaks(n_threads=2, isa="amx", flops=FLOPS, read_bytes=10e9)


def product(isa: str, rng: np.random.Generator) -> Graph:
    """A product of 16 tokens with 24 x 32 weights, and a sum."""
    graph = Graph(1, isa)
    x, w = given(random(rng, 16, 32)), given(random(rng, 24, 32), "blk.3.attn_q")
    y = ops.linear(graph, x, w)
    graph.keep(ops.add(graph, y, given(random(rng, 16, 24))))
    return graph


def test_steps_work_and_bytes_are_those_of_all_runs(isa: str, rng: np.random.Generator) -> None:
    graph = product(isa, rng)
    graph.measure()
    for _ in range(5):
        graph.run()
    assert graph.n_runs == 5
    times = OpTimes()
    times.add(graph)
    assert times.n_runs == 5
    assert times.flops == 5 * 2 * 16 * 24 * 32
    assert 0 < times.seconds and 0 <= times.waited_seconds <= times.seconds
    words = [line.split() for line in times.lines(PEAKS, "runs")[4:]]
    steps = {" ".join(w[1:3]): w for w in words}
    assert "linear attn_q" in steps
    assert any(w[1] == "Add" for w in words)


def test_attention_counts_the_keys_that_each_run_saw(isa: str, rng: np.random.Generator) -> None:
    n_past, graph = np.zeros(1, np.int32), Graph(1, isa)
    q, cache = given(random(rng, 4, 16)), given(random(rng, 32, 16))
    graph.keep(ops.attention(graph, q, cache, cache, 1, 1, 1, 0.25, n_past))
    graph.measure()
    for n_past[0] in (0, 4, 28):
        graph.run()
    n_past[0] = 9
    times = OpTimes()
    times.add(graph)
    pairs = 3 * (1 + 2 + 3 + 4) + 4 * (4 + 28)
    assert times.flops == 4 * 16 * pairs


def test_a_run_in_parts_is_one_run(isa: str, rng: np.random.Generator) -> None:
    graph = product(isa, rng)
    graph.measure()
    graph.run(0, 1)
    graph.run(1)
    assert graph.n_runs == 1
    graph.measure()
    assert graph.n_runs == 0


def test_measuring_changes_no_bit(isa: str, rng: np.random.Generator) -> None:
    toy = make_toy(rng)
    measured, plain = Training(toy, isa, 2), Training(toy, isa, 2)
    measured.graph.measure()
    expected = plain.results()
    for name, value in measured.results().items():
        assert_same_bits(value, expected[name])


def test_a_graph_that_did_not_run_adds_nothing(isa: str, rng: np.random.Generator) -> None:
    times, graph = OpTimes(), product(isa, rng)
    times.add(graph)
    graph.measure()
    times.add(graph)
    assert (times.n_runs, times.flops, times.seconds) == (0, 0, 0)


def test_lookups_count_the_rows_that_they_touch(isa: str, rng: np.random.Generator) -> None:
    graph = Graph(1, isa)
    table = given(random(rng, 1000, 32))
    graph.keep(ops.embed(graph, table, np.array([1, 2, 3], np.int32), 3))
    assert graph.nodes[0].work() == (0.0, 2 * 3 * 32 * 4)


class Measured:
    """A graph's face, with times made up."""

    n_runs, waited, pairs = 4, 0.25, True

    def times(self):
        return {
            "linear ffn_up": (2, 3.0, 300e9, 2e9),
            "Add": (1, 1.0, 0.0, 5e9),
        }


def test_a_table_tells_times_and_parts_of_the_peaks() -> None:
    times = OpTimes()
    times.add(Measured())
    lines = times.lines(PEAKS, "evaluations")
    assert lines[0] == (
        "perf: 4 evaluations, 4.000 s in 2 threads, kernels amx; 25.0 % of it waiting"
    )
    assert lines[1] == (
        "perf: peaks of this machine: 100 GFLOP/s of float32 multiply-adds, 50 GFLOP/s of bf16"
        " pairs, 800 GFLOP/s of bf16 tiles, 10.0 GB/s of reads"
    )
    assert lines[2] == "perf: all products: 300.0 GFLOP/s, 37.5 % of the peak of bf16 tiles"
    rows = [re.split(r" {2,}", line.removeprefix("perf: ")) for line in lines[3:]]
    assert rows[1] == ["linear ffn_up", "2", "750.00", "75.0 %", "400.0", "50.0 %", "2.7", "26.7 %"]
    assert rows[2] == ["Add", "1", "250.00", "25.0 %", "20.0", "200.0 %"]
    assert len({len(line) for line in lines[3:]}) == 1


def test_without_pair_products_the_peak_is_that_of_multiply_adds() -> None:
    class InFloat32(Measured):
        pairs = False

    times = OpTimes()
    times.add(InFloat32())
    assert "300.0 % of the peak of float32 multiply-adds" in times.lines(PEAKS, "runs")[2]


def test_graphs_add_up_and_those_of_a_part_are_no_runs() -> None:
    times = OpTimes()
    times.add(Measured())
    times.add(Measured(), counted=False)
    assert (times.n_runs, times.seconds, times.flops) == (4, 8.0, 2400e9)


def test_peaks_are_measured_of_the_units_that_a_variant_has(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.perf._STEPS", dict.fromkeys(FLOPS, 1 << 8))
    peaks = measure_peaks(1, isa, 1 << 20)
    assert peaks.isa == isa
    units = ["fma"] + ["pairs"] * has_pairs(isa) + ["tiles"] * (isa == "amx")
    assert list(peaks.flops) == units
    assert all(rate > 0 for rate in (*peaks.flops.values(), peaks.read_bytes))
    assert peaks.best(pairs=False) == "fma"
