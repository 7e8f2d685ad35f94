"""Planning: places in the arena, in-place steps, views, and what a plan refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import ops
from engine.autograd import backward
from engine.dtypes import Q5_1
from engine.errors import IsaError, ShapeError
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference
from tests.compare import assert_same_bits
from tests.graphs import compute, f32, given, planned, random
from tests.toy_model import Training, make_toy

Array = NDArray[Any]
ROWS, COLS = 8, 16

# ---------------------------------------------------------------- places: random graphs


def random_graph(graph: Graph, rng: np.random.Generator, n_nodes: int) -> list[Tensor]:
    """Nodes of every in-place kind, over inputs, results and views; returns the results."""
    shapes = [(ROWS, COLS), (2 * ROWS, COLS), (ROWS, COLS // 2)]
    pool = [given(random(rng, *shape)) for shape in shapes for _ in range(2)]
    made: list[Tensor] = []
    positions = np.arange(2 * ROWS, dtype=np.int32)
    tables = reference.rope_tables(2 * ROWS, 4)

    def one_of(shape: tuple[int, int] | None = None) -> Tensor:
        fitting = [t for t in pool if shape is None or t.shape == shape]
        return fitting[rng.integers(len(fitting))]

    for _ in range(n_nodes):
        x = one_of()
        rows, cols = x.shape
        match rng.integers(7):
            case 0:
                y = ops.add(graph, x, one_of(x.shape))
            case 1:
                y = ops.silu_mul(graph, x, one_of(x.shape))
            case 2:
                y = ops.rms_norm(graph, x, given(random(rng, 1, cols)), 1e-5)
            case 3:
                y = ops.rope(graph, x, positions, tables, 2)
            case 4:
                n_out = int(rng.choice([COLS, COLS // 2]))
                w = given(random(rng, n_out, cols) * f32(0.3))
                if (rows, n_out) not in shapes:
                    continue
                y = ops.linear(graph, x, w)
            case 5:
                u, m = given(random(rng, rows, 2)), given(random(rng, 2, cols))
                y = ops.lora_up(graph, x, u, m, 0.5)
            case _:
                if rows != 2 * ROWS:
                    continue
                pool.append(x.view(int(rng.integers(ROWS + 1)), ROWS))
                continue
        pool.append(y)
        made.append(y)
    return made


def root(tensor: Tensor) -> Tensor:
    while tensor.base is not None:
        tensor = tensor.base
    return tensor


def lives(graph: Graph, kept: set[Tensor]) -> dict[Tensor, tuple[int, int]]:
    """First and last step that touches each tensor of the arena."""
    found: dict[Tensor, tuple[int, int]] = {}
    for i, node in enumerate(graph.nodes):
        for tensor in {root(t) for t in node.inputs + node.outputs}:
            if tensor.producer is not None:
                found[tensor] = (found.get(tensor, (i, i))[0], i)
    end = len(graph.nodes)
    return {t: (first, end if t in kept else last) for t, (first, last) in found.items()}


def place(tensor: Tensor) -> tuple[int, int]:
    start = tensor.numpy().ctypes.data
    return start, start + tensor.nbytes


def check_places(graph: Graph, kept: set[Tensor]) -> None:
    """No two tensors that live at once share bytes; in place, they share all of them."""
    for (a, life_a), (b, life_b) in itertools.combinations(lives(graph, kept).items(), 2):
        (start_a, end_a), (start_b, end_b) = place(a), place(b)
        if start_a >= end_b or start_b >= end_a:
            continue
        shared = min(life_a[1], life_b[1]) - max(life_a[0], life_b[0])
        assert shared <= 0, f"{a} and {b} live together and share bytes"
        if shared == 0:  # one step reads the one and writes the other
            assert (start_a, end_a) == (start_b, end_b), f"{a} and {b} overlap in part"


@pytest.mark.parametrize("number", range(12))
def test_what_lives_at_once_shares_no_bytes(number: int, rng: np.random.Generator) -> None:
    seed = int(rng.integers(2**32))
    results = []
    for keep_all in (True, False):
        graph, again = Graph(1), np.random.default_rng(seed)
        made = random_graph(graph, again, 40)
        chosen = made if keep_all else [made[-1], *made[:: int(again.integers(3, 9))]]
        for tensor in chosen:
            graph.keep(tensor)
        graph.run()
        check_places(graph, set(chosen))
        results.append({made.index(t): t.numpy().copy() for t in chosen})
    everything, some = results
    for index, value in some.items():
        assert_same_bits(value, everything[index])


@pytest.mark.parametrize("checkpoints", [False, True], ids=["kept", "checkpoints"])
def test_a_training_graph_that_reuses_buffers_gives_the_bits_of_one_that_does_not(
    isa: str, checkpoints: bool, rng: np.random.Generator
) -> None:
    toy = make_toy(rng)
    apart = Training(toy, isa, checkpoints=checkpoints, keep=True)
    reused = Training(toy, isa, checkpoints=checkpoints)
    assert reused.graph.arena_bytes < 0.8 * apart.graph.arena_bytes
    expected = apart.results()
    for name, value in reused.results().items():
        assert_same_bits(value, expected[name])


def test_random_graphs_with_gradients_do_not_depend_on_reuse(rng: np.random.Generator) -> None:
    for _ in range(6):
        seed = int(rng.integers(2**32))
        found = []
        for keep_all in (True, False):
            again = np.random.default_rng(seed)
            graph = Graph(2 if keep_all else 1)
            x = planned(graph, random(again, ROWS, COLS))
            y, first = x, len(graph.nodes)
            seen = [x]
            for _ in range(8):
                other = seen[again.integers(len(seen))]
                match again.integers(4):
                    case 0:
                        y = ops.add(graph, y, other)
                    case 1:
                        y = ops.silu_mul(graph, other, y)
                    case 2:
                        y = ops.rms_norm(graph, y, given(random(again, 1, COLS)), 1e-5)
                    case _:
                        y = ops.linear(graph, y, given(random(again, COLS, COLS) * f32(0.3)))
                seen.append(y)
            seeds = {y: given(random(again, ROWS, COLS))}
            dx = graph.keep(backward(graph, graph.nodes[first:], seeds)[x])
            if keep_all:
                for node in graph.nodes:
                    for tensor in node.outputs:
                        graph.keep(tensor)
            graph.run()
            found.append(dx.numpy().copy())
        assert_same_bits(found[1], found[0])


# ---------------------------------------------------------------- in place, views


def chain_of_sums(graph: Graph, x: Tensor, length: int) -> Tensor:
    one = given(np.ones(x.shape, f32))
    for _ in range(length):
        x = ops.add(graph, one, x)
    return x


def test_a_chain_of_in_place_steps_needs_one_buffer(isa: str) -> None:
    graph = Graph(1, isa)
    start = given(np.zeros((ROWS, COLS), f32))
    y = graph.keep(chain_of_sums(graph, start, 10))
    graph.run()
    assert graph.arena_bytes == ROWS * COLS * 4
    assert (y.numpy() == 10).all()
    assert (start.numpy() == 0).all()


def test_a_kept_tensor_is_not_overwritten_in_place(isa: str) -> None:
    graph = Graph(1, isa)
    x = graph.keep(chain_of_sums(graph, given(np.zeros((ROWS, COLS), f32)), 2))
    y = graph.keep(chain_of_sums(graph, x, 3))
    graph.run()
    assert (x.numpy() == 2).all()
    assert (y.numpy() == 5).all()


def test_a_tensor_that_is_read_again_is_not_overwritten(isa: str) -> None:
    graph = Graph(1, isa)
    x = chain_of_sums(graph, given(np.zeros((ROWS, COLS), f32)), 2)
    y = chain_of_sums(graph, x, 3)
    z = graph.keep(ops.add(graph, y, x))
    graph.run()
    assert (z.numpy() == 7).all()


def test_a_view_reads_the_rows_of_its_base(isa: str, rng: np.random.Generator) -> None:
    x = random(rng, 10, 7)
    zeros = [given(np.zeros((n, 7), f32)) for n in (10, 4, 2)]

    def build(graph: Graph) -> list[Tensor]:
        base = ops.add(graph, given(x), zeros[0])
        inner = base.view(3, 5).view(1, 4)
        return [ops.add(graph, zeros[1], inner), ops.add(graph, zeros[2], base.view(8, 2)), base]

    first, second, base = compute(isa, build)
    assert_same_bits(base, x)
    assert_same_bits(first, x[4:8])
    assert_same_bits(second, x[8:])


def test_keeping_a_view_keeps_its_base(isa: str, rng: np.random.Generator) -> None:
    x = random(rng, ROWS, COLS)
    graph = Graph(1, isa)
    base = planned(graph, x)
    graph.keep(base.view(2, 3))
    chain_of_sums(graph, given(x), 3)
    ops.add(graph, given(x), base)
    graph.run()
    assert_same_bits(base.numpy(), x)


def test_a_view_of_a_quantized_weight_starts_at_its_row(isa: str, rng: np.random.Generator) -> None:
    data = reference.encode(Q5_1, random(rng, 9, 64))
    w = Tensor.external("w", data, 9, 64, Q5_1.id)
    ids = np.arange(4, dtype=np.int32)
    (y,) = compute(isa, lambda g: ops.embed(g, w.view(5, 4), ids, 4))
    assert_same_bits(y, reference.decode_row(Q5_1, data).reshape(9, 64)[5:])


# ---------------------------------------------------------------- runs


def test_inputs_are_read_at_each_run(isa: str, rng: np.random.Generator) -> None:
    x, ids = random(rng, 6, 5), np.zeros(3, np.int32)
    graph = Graph(1, isa)
    y = graph.keep(ops.embed(graph, given(x), ids, 3))
    for _ in range(3):
        ids[:] = rng.integers(0, 6, 3)
        x += 1
        graph.run()
        assert_same_bits(y.numpy(), x[ids])


def test_a_run_plans_what_is_not_planned(isa: str) -> None:
    graph = Graph(1, isa)
    y = graph.keep(chain_of_sums(graph, given(np.zeros((2, 2), f32)), 1))
    graph.run()
    graph.run()
    assert (y.numpy() == 1).all()


def test_a_run_in_parts_gives_the_bits_of_one_run(isa: str, rng: np.random.Generator) -> None:
    toy = make_toy(rng)
    whole, parts = (Training(toy, isa, n_threads=2, checkpoints=True) for _ in range(2))
    expected = whole.results()
    for grad in parts.grads.values():
        grad[...] = 0
    n_steps = len(parts.graph.nodes)
    cuts = [0, *sorted(rng.integers(0, n_steps + 1, 5).tolist()), n_steps]
    for first, end in itertools.pairwise(cuts):
        parts.graph.run(first, end)
    for name, value in {"loss": parts.loss, **parts.grads}.items():
        assert_same_bits(value, expected[name])


@pytest.mark.parametrize("first, end", [(-1, 1), (1, 0), (0, 3)])
def test_steps_that_are_not_there_are_refused(isa: str, first: int, end: int) -> None:
    graph = Graph(1, isa)
    chain_of_sums(graph, given(np.zeros((2, 2), f32)), 2)
    with pytest.raises(ShapeError, match="of 2 cannot be run"):
        graph.run(first, end)


def test_a_graph_without_nodes_runs(isa: str) -> None:
    Graph(2, isa).run()


def test_inputs_stay_alive_with_the_graph(isa: str) -> None:
    graph = Graph(1, isa)
    y = graph.keep(ops.add(graph, *(given(np.full((40, 500), n, f32)) for n in (1, 2))))
    graph.plan()
    crowd = [np.full((40, 500), 9, f32) for _ in range(50)]
    graph.run()
    assert (y.numpy() == 3).all()
    assert len(crowd) == 50


def test_results_stay_alive_without_the_graph(isa: str) -> None:
    graph = Graph(1, isa)
    y = graph.keep(ops.add(graph, given(np.ones((50, 50), f32)), given(np.ones((50, 50), f32))))
    graph.run()
    values = y.numpy()
    del graph, y
    crowd = [np.full((50, 50), 9, f32) for _ in range(50)]
    assert (values == 2).all()
    assert len(crowd) == 50


# ---------------------------------------------------------------- refusals


def test_a_graph_that_borrows_takes_no_memory_of_its_own_and_gives_the_same_bits(isa: str) -> None:
    values = [np.full((2, 3), n, f32) for n in (1, 2)]

    def sums(graph: Graph, lender: Graph | None, n: int) -> Tensor:
        y = given(values[0])
        for _ in range(n):
            y = graph.keep(ops.add(graph, y, given(values[1])))
        graph.plan(lender)
        graph.run()
        return y

    large = Graph(1, isa)
    of_large = sums(large, None, 5)
    of_small = sums(Graph(1, isa), large, 2)
    assert of_small.owner is of_large.owner
    np.testing.assert_array_equal(of_small.numpy(), values[0] + 4)
    large.run()
    np.testing.assert_array_equal(of_large.numpy(), values[0] + 10)
    of_larger = sums(Graph(1, isa), large, 9)
    assert of_larger.owner is not of_large.owner
    np.testing.assert_array_equal(of_larger.numpy(), values[0] + 18)
    np.testing.assert_array_equal(of_large.numpy(), values[0] + 10)


def test_a_planned_graph_takes_no_more_nodes() -> None:
    graph = Graph()
    x = given(np.ones((2, 2), f32))
    ops.add(graph, x, x)
    graph.plan()
    with pytest.raises(ShapeError, match="takes no more nodes"):
        ops.add(graph, x, x)
    with pytest.raises(ShapeError, match="planned once"):
        graph.plan()


def test_a_graph_refuses_no_threads_and_unknown_variants() -> None:
    for n_threads in (0, -1):
        with pytest.raises(ShapeError, match=f"{n_threads} threads"):
            Graph(n_threads)
    with pytest.raises(IsaError, match="sse2"):
        Graph(1, "sse2")


def test_tensors_refuse_sizes_that_cannot_be() -> None:
    data = np.zeros(64, np.uint8)
    for rows, cols, kind in [(0, 4, 0), (4, 0, 0), (-1, 4, 0), (1, 31, 2), (1, 4, 99)]:
        with pytest.raises(ShapeError, match=r"tensor w: .* cannot be"):
            Tensor.external("w", data, rows, cols, kind)
    with pytest.raises(ShapeError, match="tensor w: 68 bytes expected, there are 64"):
        Tensor.external("w", data, 1, 17)
    assert Tensor.external("w", data, 1, 16).nbytes == 64


def test_views_refuse_rows_that_are_not_there() -> None:
    x = given(np.ones((4, 3), f32), "x")
    for first, rows in [(-1, 2), (0, 5), (4, 1), (2, 0), (2, -1)]:
        with pytest.raises(ShapeError, match="tensor x: rows"):
            x.view(first, rows)


def test_memory_that_cannot_be_written_is_refused_as_an_output() -> None:
    frozen = np.zeros((2, 2), f32)
    frozen.flags.writeable = False
    assert Tensor.external("frozen", frozen, 2, 2).shape == (2, 2)
    with pytest.raises(ShapeError, match="frozen: its memory cannot be written"):
        Tensor.external("frozen", frozen, 2, 2, 0, True)
    with pytest.raises(ShapeError, match="memory cannot be written"):
        Tensor.parameter("p", np.zeros((2, 2), f32), frozen)


def test_parameters_are_float32_of_one_shape() -> None:
    good = np.zeros((2, 2), f32)
    for bad in (np.zeros((2, 2)), np.zeros((2, 3), f32), np.zeros(4, f32)):
        with pytest.raises(ShapeError, match="parameter p: value and gradient"):
            Tensor.parameter("p", good, bad)


def test_values_are_shown_only_where_there_are_any() -> None:
    graph = Graph()
    y = ops.add(graph, given(np.ones((2, 2), f32)), given(np.ones((2, 2), f32)))
    half = Tensor.external("half", np.zeros(8, np.uint8), 2, 2, 1)
    for tensor in (y, half):
        with pytest.raises(ShapeError, match="no float32 values"):
            tensor.numpy()
