"""Thin products of adapters: several that meet the same rows, many tokens, room between rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import kernels, ops
from engine.autograd import backward
from engine.dtypes import BF16
from engine.errors import ShapeError
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference
from tests.bounds import in_bf16
from tests.compare import assert_close, assert_same_bits, chain
from tests.graphs import compute, f32, given, planned, random, stored, trained

Array = NDArray[Any]
RANKS = (4, 1, 7)
COLUMNS = [1, 16, 33, 130, 576]


def parts(rng: np.random.Generator, n_tokens: int, n_cols: int) -> list[tuple[Array, Array]]:
    return [(random(rng, n_tokens, rank), random(rng, rank, n_cols)) for rank in RANKS]


@pytest.mark.parametrize("n_cols", COLUMNS)
@pytest.mark.parametrize("n_tokens", [1, 8, 9, 67])
def test_adapters_together_have_the_bits_that_each_has_alone(isa, n_tokens, n_cols, rng, guarded):
    x, made = guarded(random(rng, n_tokens, n_cols)), parts(rng, n_tokens, n_cols)
    ms = [guarded(m) for _, m in made]
    together = compute(isa, lambda g: g.add(ops.LoraDown, given(x), 0.5, None, *map(given, ms)), 2)
    for u, m in zip(together, ms, strict=True):
        (alone,) = compute(isa, lambda g, m=m: g.add(ops.LoraDown, given(x), 0.5, None, given(m)))
        assert_same_bits(u, alone)
        size = reference.lora_down(abs(x), abs(m), 0.5)
        assert_close(u, reference.lora_down(x, m, 0.5), size, chain(n_cols))

    base = random(rng, n_tokens, n_cols)
    flat = [given(t) for pair in made for t in pair]
    (y,) = compute(isa, lambda g: g.add(ops.LoraUp, given(base), 0.5, False, *flat), 2)
    expected, size = base, abs(base)
    for u, m in made:
        expected = reference.lora_up(expected, u, m, 0.5)
        size = reference.lora_up(size, abs(u), abs(m), 0.5)
    assert_close(y, expected, size, chain(sum(RANKS)))

    sums = [[guarded(random(rng, rank, n_cols)) for rank in RANKS]]
    sums.append([guarded(g) for g in sums[0]])
    graph = Graph(2, isa)
    places = [[given(g, "g", writable=True) for g in some] for some in sums]
    us = [given(u) for u, _ in made]
    graph.add(
        ops.LoraOuter, given(x), 0.5, *[t for pair in zip(us, places[0], strict=True) for t in pair]
    )
    for u, g in zip(us, places[1], strict=True):
        graph.add(ops.LoraOuter, given(x), 0.5, u, g)
    graph.run()
    for g, alone in zip(*sums, strict=True):
        assert_same_bits(g, alone)


@pytest.mark.parametrize("n_tokens", [9, 13, 64, 130])
def test_dots_of_many_tokens_do_not_depend_on_threads(isa, n_tokens, rng):
    x, m = random(rng, n_tokens, 100), random(rng, 6, 100)
    found = [compute(isa, lambda g: ops.lora_down(g, given(x), given(m)), n)[0] for n in (1, 2, 3)]
    for u in found[1:]:
        assert_same_bits(u, found[0])


def test_many_ranks_go_in_windows(isa, rng):
    x, u, g = random(rng, 10, 600), random(rng, 10, 530), random(rng, 530, 600)
    expected, size = (
        reference.lora_outer(g, u, x, 0.5),
        reference.lora_outer(*map(abs, (g, u, x)), 0.5),
    )
    graph = Graph(2, isa)
    graph.add(ops.LoraOuter, given(x), 0.5, given(u), given(g, "g", writable=True))
    graph.run()
    assert_close(g, expected, size, chain(10))


@pytest.mark.parametrize("n_in", [16, 33, 130, 576])
@pytest.mark.parametrize("n_tokens", [3, 64, 101])
def test_projections_of_the_same_rows_learn_as_they_do_one_by_one(isa, n_tokens, n_in, rng):
    """Values, dx and adapters' gradients; the second projection has no adapter."""
    x, n_outs, ranks = random(rng, n_tokens, n_in), (24, 8, 7), (4, 0, 3)
    ws = [random(rng, n, n_in) for n in n_outs]
    factors = [
        (random(rng, r, n_in), random(rng, r, n)) for r, n in zip(ranks, n_outs, strict=True)
    ]
    dys = [random(rng, n_tokens, n) for n in n_outs]

    def learn(together: bool) -> list[Array]:
        graph, sums, adapters = Graph(2, isa), [], []
        source = planned(graph, x)
        first = len(graph.nodes)
        for a, b in factors:
            (pa, da), (pb, db) = (trained(t, "t") for t in (a, b)) if len(a) else ((None,) * 2,) * 2
            sums += [da, db] if len(a) else []
            adapters.append((pa, pb, 0.5) if len(a) else None)
        weights = [given(w) for w in ws]
        if together:
            ys = ops.linears(graph, source, weights, adapters, [0, 0, 0])
        else:
            ys = [ops.linear(graph, source, w, a) for w, a in zip(weights, adapters, strict=True)]
        kept = [graph.keep(y) for y in ys]
        seeds = {y: given(dy) for y, dy in zip(ys, dys, strict=True)}
        dx = graph.keep(backward(graph, graph.nodes[first:], seeds)[source])
        ups = [node for node in graph.nodes[first:] if isinstance(node, ops.LoraUp)]
        assert not ups, "the last product into dx adds what adapters add"
        graph.run()
        return [t.numpy().copy() for t in (*kept, dx)] + sums

    dx, size = np.zeros((n_tokens, n_in)), np.zeros((n_tokens, n_in))
    for w, dy, (a, b) in zip(ws, dys, factors, strict=True):
        change = w + 0.5 * b.T.astype(np.float64) @ a
        dx, size = dx + dy @ change, size + abs(dy) @ (abs(w) + 0.5 * abs(b.T) @ abs(a))
    for found, alone in zip(learn(True), learn(False), strict=True):
        assert_close(found, alone, max(np.abs(alone).max(), 1), 4 * chain(n_in + 40))
    assert_close(learn(True)[3], dx, size, 4 * chain(sum(n_outs) + 10))


# ---------------------------------------------------------------- rows with room between them


def dlogits(graph: Graph, logits: Array, targets: Array, weight: Array, dtype: int) -> Tensor:
    return ops.cross_entropy(graph, planned(graph, logits), targets, weight, dtype)[1]


@pytest.mark.parametrize("n_vocab", [16, 34, 130, 1000])
def test_the_gradient_of_a_loss_is_rounded_once(isa, n_vocab, rng):
    logits, weight = 3 * random(rng, 11, n_vocab), np.array([0.25], f32)
    targets = rng.integers(-1, n_vocab, 11, np.int32)
    targets[:2] = n_vocab - 1, -1
    one = np.eye(n_vocab, dtype=f32)

    def both(graph: Graph) -> list[Tensor]:
        made = [dlogits(graph, logits, targets, weight, t) for t in (BF16.id, 0)]
        assert [t.stride for t in made] == [2 * n_vocab, n_vocab]
        return [ops.lora_down(graph, t, given(one)) for t in made]

    found, plain = compute(isa, both, 2)
    assert_same_bits(found, in_bf16(plain).astype(f32))
    assert_close(plain, reference.cross_entropy(logits, targets, 0.25)[1], 0.25, 16)


def test_rows_with_room_are_taken_by_products_on_the_way_back(isa, rng):
    if not kernels.has_pairs(isa):
        pytest.skip(f"{isa} has no bf16 products")
    logits, weight = 3 * random(rng, 20, 64), np.array([0.25], f32)
    targets = rng.integers(0, 64, 20, np.int32)
    w, u = stored(reference.encode(BF16, random(rng, 64, 48)), BF16, 64, 48), random(rng, 20, 3)
    sums = [np.zeros((3, 64), f32) for _ in "ab"]

    def both(graph: Graph) -> list[Tensor]:
        made = [dlogits(graph, logits, targets, weight, t) for t in (BF16.id, 0)]
        backs = [graph.add(ops.LinearBack, t, w, None, True)[0] for t in made]
        for t, g in zip(made, sums, strict=True):
            graph.add(ops.LoraOuter, t, 1.0, given(u), given(g, "g", writable=True))
        return backs

    assert_same_bits(*compute(isa, both, 2))
    assert_close(
        sums[0], sums[1], 2.0**-8 * reference.lora_down(abs(u.T), np.full((64, 20), 0.25)), 1, 1.0
    )


def test_what_takes_rows_one_behind_the_other_refuses_room(isa, rng):
    logits, weight = random(rng, 12, 16), np.ones(1, f32)
    graph = Graph(1, isa)
    made = dlogits(graph, logits, np.zeros(12, np.int32), weight, BF16.id)
    ids = np.zeros(1, np.int32)
    for build in (
        lambda: ops.embed(graph, made, ids, 1),
        lambda: graph.add(ops.Pack, made, 0, False, True),
        lambda: ops.silu_mul(graph, made, made, BF16.id),
    ):
        with pytest.raises(ShapeError, match="no room between its rows"):
            build()


def test_too_many_adapters_and_results_of_their_own_are_refused(isa, rng):
    graph, x, m = Graph(1, isa), given(random(rng, 9, 8)), given(random(rng, 2, 8))
    into = given(np.zeros((9, 2), f32), "into", writable=True)
    with pytest.raises(ShapeError, match="4 adapters: 1 to 3 go together"):
        graph.add(ops.LoraDown, x, 1.0, None, m, m, m, m)
    with pytest.raises(ShapeError, match="one product is accumulated at a time"):
        graph.add(ops.LoraDown, x, 1.0, into, m, m)


def test_a_product_that_only_reads_a_gradient_does_not_add_to_it(isa, rng):
    """dx of x + h W is also dy of the product with W; what adapters of x add must not go there."""
    n, d = 12, 32
    w, b = random(rng, d, d), random(rng, 3, d)
    graph = Graph(1, isa)
    x, h = planned(graph, random(rng, n, d)), planned(graph, random(rng, n, d))
    (a, _), dy, ds = trained(random(rng, 3, d)), random(rng, n, d), random(rng, n, d)
    first = len(graph.nodes)
    u = ops.lora_down(graph, x, a)
    y = ops.add(graph, x, ops.linear(graph, h, given(w)))
    s = ops.lora_up(graph, None, u, given(b), 1.0)
    nodes = graph.nodes[first:]
    # In the arena: what lies elsewhere is never added to.
    seeds = {y: ops.add(graph, given(dy), ops.zero(graph, "zero", n, d)), s: given(ds)}
    found = backward(graph, nodes, seeds)
    kept = [graph.keep(found[t]) for t in (x, h)]
    graph.run()
    dx, dh = (t.numpy() for t in kept)
    weights = np.asarray(a.numpy())
    size = abs(dy) + abs(ds) @ abs(b.T) @ abs(weights)
    assert_close(dx, dy + (ds.astype(np.float64) @ b.T) @ weights, size, chain(40))
    assert_close(dh, reference.linear_back(dy, w), reference.linear_back(abs(dy), abs(w)), chain(d))
