"""Activations in BF16: what an op rounds on the way out, and what it takes as it would round it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import kernels, ops
from engine.autograd import backward
from engine.dtypes import BF16, F16, F32, Q4_1, Q8_0, DType
from engine.errors import ShapeError
from engine.graph import Graph, Node
from engine.lora import create_adapter
from engine.model import Model
from engine.tensor import Tensor
from engine.training.trainer import Trainer
from tests import reference
from tests.bounds import attention_size, in_bf16
from tests.compare import EPS, PAIR_EPS, assert_close, assert_same_bits, chain
from tests.graphs import compute, f32, given, given_bf16, planned, random, stored, weight

Array = NDArray[Any]
COLUMNS = [1, 7, 16, 17, 33, 64, 65, 130, 576]
# Inputs, outputs: whole and broken vectors, tiles and steps; reductions longer than one part.
SHAPES = [(2, 1), (34, 7), (64, 16), (96, 17), (64, 33), (576, 64), (130, 65), (4128, 34)]
CASES = [(t, s) for t in (F32, BF16, F16, Q8_0, Q4_1) for s in SHAPES if s[0] % t.block == 0]
ATTENTIONS = [
    (1, 1, 1, 1),
    (3, 7, 2, 1),
    (1, 16, 4, 4),
    (2, 17, 9, 3),
    (1, 65, 5, 1),
    (2, 130, 6, 2),
]

by_columns = pytest.mark.parametrize("n_cols", COLUMNS)
by_case = pytest.mark.parametrize("dtype, shape", CASES, ids=str)
by_paired_case = pytest.mark.parametrize(
    "dtype, shape", [case for case in CASES if case[0] is not F32], ids=str
)
by_attention = pytest.mark.parametrize("sizes", ATTENTIONS, ids=str)


def numbers(x: Array) -> Array:
    """Floats as BF16 holds them."""
    return in_bf16(x).astype(f32)


def rounded_once(
    y: Array, plain: Array, expected: Array, size: Array, k: float, eps: float = EPS
) -> None:
    """Compare a BF16 result with that of the same op in F32, and with float64.

    It has the bits of the first, rounded; it is within half a unit of its own last place of the
    second, beside the `k` roundings of `size` that F32 is allowed.
    """
    assert_same_bits(y, numbers(plain))
    assert_close(y, expected, 2.0**-8 * abs(expected) + 1.01 * k * eps * size, 1, 1.0)


def in_both(isa: str, build: Callable[[Graph, int], Tensor], pairs: bool = False) -> list[Array]:
    """Results in BF16 and in F32."""

    def both(graph: Graph) -> list[Tensor]:
        graph.pairs = pairs
        return [build(graph, t.id) for t in (BF16, F32)]

    return compute(isa, both, 2)


@pytest.fixture
def paired(isa: str) -> str:
    if not kernels.has_pairs(isa):
        pytest.skip(f"{isa} has no bf16 products")
    return isa


# ---------------------------------------------------------------- norm, rotation, gate


@by_columns
def test_rms_norm_rounds_its_result_once(isa, n_cols, rng, guarded):
    for n_tokens in (1, 7, 130):
        x, w = guarded(random(rng, n_tokens, n_cols)), guarded(random(rng, 1, n_cols))
        y, plain = in_both(isa, lambda g, t, x=x, w=w: ops.rms_norm(g, given(x), given(w), 1e-5, t))
        expected = reference.rms_norm(x, w, 1e-5)
        rounded_once(y, plain, expected, abs(expected), 8)


@pytest.mark.parametrize("head_dim", [2, *COLUMNS[1:]])
def test_rope_rounds_its_result_and_its_gradient_once(isa, head_dim, rng, guarded):
    for n_tokens, n_head in [(1, 3), (17, 1), (65, 2)]:
        x, dy = (guarded(random(rng, n_tokens, n_head * head_dim)) for _ in "xy")
        positions = guarded(rng.integers(0, 50, n_tokens, np.int32))
        cos, sin = (guarded(t) for t in reference.rope_tables(50, head_dim // 2 * 2))
        how = (positions, (cos, sin), n_head)
        y, plain = in_both(isa, lambda g, t, x=x, how=how: ops.rope(g, given(x), *how, type=t))
        size = reference.rope(abs(x), positions, (abs(cos), abs(sin)), n_head)
        rounded_once(y, plain, reference.rope(x, *how), size, 3)

        def back(graph, t, x=x, dy=dy, how=how):
            source = planned(graph, x)
            first = len(graph.nodes)
            turned = ops.rope(graph, source, *how, type=t)
            gradient = backward(graph, graph.nodes[first:], {turned: given(dy)})[source]
            assert gradient.type == t
            return gradient

        dx, plain = in_both(isa, back)
        size = reference.rope(abs(dy), positions, (abs(cos), abs(sin)), n_head)
        rounded_once(dx, plain, reference.rope(dy, *how, -1), size, 3)


@by_columns
def test_silu_mul_takes_and_gives_bf16(isa, n_cols, rng, guarded):
    for n_tokens in (1, 7, 130):
        g, u = 4 * random(rng, n_tokens, n_cols), random(rng, n_tokens, n_cols)
        y, plain = in_both(
            isa, lambda graph, t, g=g, u=u: ops.silu_mul(graph, given(g), given(u), t)
        )
        expected = reference.silu_mul(g, u)
        rounded_once(y, plain, expected, abs(expected), 10)
        g, u = numbers(g), numbers(u)
        (plain,) = compute(isa, lambda graph, g=g, u=u: ops.silu_mul(graph, given(g), given(u)))
        halves = [given_bf16(x, guard=guarded) for x in (g, u)]
        (y,) = compute(isa, lambda graph, h=halves: ops.silu_mul(graph, *h, BF16.id), 2)
        expected = reference.silu_mul(g, u)
        rounded_once(y, plain, expected, abs(expected), 10)


@by_columns
def test_gradients_of_a_gate_in_bf16_are_rounded_once(isa, n_cols, rng, guarded):
    for n_tokens in (1, 7, 130):
        g, u = numbers(4 * random(rng, n_tokens, n_cols)), numbers(random(rng, n_tokens, n_cols))
        dy = guarded(random(rng, n_tokens, n_cols))

        def back(graph: Graph, *gate: Tensor, dy: Array = dy) -> tuple[Tensor, ...]:
            return graph.add(ops.SiluMulBack, *gate, given(dy))

        halves = [given_bf16(x, guard=guarded) for x in (g, u)]
        plain = compute(isa, lambda graph, g=g, u=u, b=back: b(graph, given(g), given(u)))
        found = compute(isa, lambda graph, h=halves, b=back: b(graph, *h), 2)
        s = reference.logistic(g)
        sizes = [abs(dy * u) * s * (1 + abs(g) * (1 - s)), abs(dy * g) * s]
        expected = reference.silu_mul_back(g, u, dy)
        for triple in zip(found, plain, expected, sizes, strict=True):
            rounded_once(*triple, 32)


def test_what_cannot_be_normal_in_bf16(isa):
    x = np.array([[1, 2, np.inf, -np.inf, np.nan, 3.4e38, -0.0, 1e-39, -1e-44, 2.0**-126]], f32)
    start = (np.zeros(1, np.int32), reference.rope_tables(1, 2), 1)  # two turn, the others pass
    (y,) = compute(isa, lambda g: ops.rope(g, given(x), *start, type=BF16.id))
    expected = numbers(x)
    assert np.isinf(expected[0, 5])
    if kernels.has_pairs(isa):  # as their products would take them
        expected[0, 7:9] = [0.0, -0.0]
    assert np.isnan(y[0, 4])
    assert_same_bits(np.delete(y, 4, axis=1), np.delete(expected, 4, axis=1))


# ---------------------------------------------------------------- products


@by_case
def test_a_product_rounds_its_result_once(isa, shape, dtype, rng, guarded):
    n_in, n_out = shape
    data, w = weight(rng, dtype, n_out, n_in)
    for n_tokens in (9, 65):
        x, base = guarded(random(rng, n_tokens, n_in)), guarded(random(rng, n_tokens, n_out))
        adapter = (given(random(rng, 3, n_in)), given(random(rng, 3, n_out)), 0.5)

        def build(graph: Graph, t: int, x: Array = x, more: Any = ()) -> Tensor:
            return ops.linear(
                graph, given(x), stored(guarded(data), dtype, *w.shape), *more, type=t
            )

        y, plain = in_both(isa, build)
        size = reference.linear(abs(x), abs(w))
        rounded_once(y, plain, reference.linear(x, w), size, chain(n_in))
        more = (adapter, given(base))
        for pairs in (False, kernels.has_pairs(isa)):
            y, plain = in_both(isa, lambda g, t, b=build, m=more: b(g, t, more=m), pairs)
            assert_same_bits(y, numbers(plain))


@by_paired_case
def test_a_product_in_pairs_of_bf16_has_the_bits_of_one_that_rounds(
    paired, shape, dtype, rng, guarded
):
    n_in, n_out = shape
    data, w = weight(rng, dtype, n_out, n_in)
    held, w = stored(guarded(data), dtype, n_out, n_in), in_bf16(w)
    for n_tokens in (9, 16, 33, 64, 130):
        x = random(rng, n_tokens, n_in)
        adapter = (given(random(rng, 3, n_in)), given(random(rng, 3, n_out)), 0.5)

        def both(graph: Graph, x: Array = x, a: Any = adapter) -> list[Tensor]:
            graph.pairs = True
            half = given_bf16(np.vstack([x[:1], x]), guard=guarded).view(1, len(x))
            same = given(numbers(x))
            return [
                *(ops.linear(graph, t, held) for t in (half, given(x))),
                *(ops.linear(graph, t, held, a) for t in (half, same)),
                ops.linear(graph, half, held, type=BF16.id),
            ]

        y, plain, adapted, as_floats, narrow = compute(paired, both, 2)
        assert_same_bits(y, plain)
        assert_same_bits(adapted, as_floats)
        x = in_bf16(x)
        size = abs(x) @ abs(w).T
        assert_close(y, x @ w.T, size, chain(n_in), PAIR_EPS)
        rounded_once(narrow, plain, x @ w.T, size, chain(n_in), PAIR_EPS)


@by_paired_case
def test_a_gradient_in_bf16_meets_weights_with_the_bits_of_one_that_is_rounded(
    paired, shape, dtype, rng, guarded
):
    n_in, n_out = shape[0], 2 * shape[1]
    data, w = weight(rng, dtype, n_out, n_in)
    held, w = stored(guarded(data), dtype, n_out, n_in), in_bf16(w)
    for n_tokens in (1, 7, 16, 33, 130):
        dy, there = random(rng, n_tokens, n_out), random(rng, n_tokens, n_in)

        def both(graph: Graph, dy: Array = dy, there: Array = there) -> list[Tensor]:
            kinds = [given_bf16(dy, guard=guarded), given(dy)]
            dx = [graph.add(ops.LinearBack, t, held, None, True)[0] for t in kinds]
            into = [planned(graph, there) for _ in kinds]
            for t, place in zip(kinds, into, strict=True):
                graph.add(ops.LinearBack, t, held, place, True)
            return dx + into

        dx, plain, added, plainly_added = compute(paired, both, 2)
        assert_same_bits(dx, plain)
        assert_same_bits(added, plainly_added)
        dy = in_bf16(dy)
        assert_close(dx, dy @ w, abs(dy) @ abs(w), chain(n_out), PAIR_EPS)


@by_columns
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_adapters_take_bf16_with_the_bits_of_the_same_floats(isa, n_cols, rank, rng, guarded):
    for n_tokens in (1, 7, 65):
        x, m = numbers(random(rng, n_tokens, n_cols)), guarded(random(rng, rank, n_cols))
        u, before = guarded(random(rng, n_tokens, rank)), random(rng, rank, n_cols)
        half, sums = given_bf16(x, guard=guarded), [guarded(before) for _ in "ab"]

        def down(graph: Graph, x: Array = x, half: Tensor = half, m: Array = m) -> list[Tensor]:
            return [ops.lora_down(graph, t, given(m)) for t in (half, given(x))]

        found, plain = compute(isa, down, 2)
        assert_same_bits(found, plain)
        size = reference.lora_down(abs(x), abs(m))
        assert_close(found, reference.lora_down(x, m), size, chain(n_cols))
        graph = Graph(2, isa)
        for t, g in zip((half, given(x)), sums, strict=True):
            graph.add(ops.LoraOuter, t, 0.5, given(u), given(g, "g", writable=True))
        graph.run()
        assert_same_bits(*sums)
        size = reference.lora_outer(abs(before), abs(u), abs(x), 0.5)
        assert_close(sums[0], reference.lora_outer(before, u, x, 0.5), size, chain(n_tokens))


# ---------------------------------------------------------------- attention


@by_attention
@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 64, 130])
@pytest.mark.parametrize("pairs", [False, True], ids=["floats", "pairs"])
def test_attention_takes_and_gives_bf16(isa, sizes, head_dim, pairs, rng, guarded):
    if pairs and not kernels.has_pairs(isa):
        pytest.skip(f"{isa} has no bf16 products")
    n_seq, n_query, n_head, n_head_kv = sizes
    how = (n_seq, n_head, n_head_kv, head_dim**-0.5)
    heads = (n_head, n_head_kv, n_head_kv)
    whole = [random(rng, n_seq * n_query, n * head_dim) for n in heads]
    qkv = [numbers(x) for x in whole]
    dout = guarded(random(rng, n_seq * n_query, n_head * head_dim))
    half = [given_bf16(x, guard=guarded) for x in qkv]
    same = [given(x) for x in qkv]

    def attend(graph: Graph, tensors: list[Tensor], t: DType = F32) -> tuple[Tensor, ...]:
        return graph.add(ops.Attention, *tensors, *how, None, None, pairs, t.id)

    out, lse = compute(isa, lambda g: attend(g, half))
    plain, plain_lse = compute(isa, lambda g: attend(g, same))
    narrow, narrow_lse = compute(isa, lambda g: attend(g, half, BF16), 2)
    assert_same_bits(out, plain)
    assert_same_bits(lse, plain_lse)
    assert_same_bits(lse, narrow_lse)
    expected = reference.attention(*qkv, *how)
    size = attention_size(*qkv, n_seq, (n_head, n_head_kv), how[3])
    if pairs:
        rounded_once(narrow, plain, expected, abs(qkv[2]).max() + 0 * size, 3, 2.0**-8)
    else:
        rounded_once(narrow, plain, expected, size, chain(head_dim + n_query))
    if pairs and head_dim == 64 and n_query > 16:  # the scale changes no rounding
        assert_same_bits(compute(isa, lambda g: attend(g, [given(x) for x in whole]))[0], plain)

    def back(graph: Graph, tensors: list[Tensor], out: Tensor) -> tuple[Tensor, ...]:
        made = (*tensors, out, given(lse), given(dout))
        return graph.add(ops.AttentionBack, *made, *how, None, pairs)[:3]

    found = compute(isa, lambda g: back(g, half, given_bf16(narrow, guard=guarded)), 2)
    plain_found = compute(isa, lambda g: back(g, same, given(narrow)))
    right = reference.attention_back(*qkv, dout, *how)
    largest = max(np.abs(x).max() for x in right)
    for gradient, floats, exact in zip(found, plain_found, right, strict=True):
        assert_same_bits(gradient, floats)
        assert_close(gradient, exact, largest, 4, 2.0**-8)


# ---------------------------------------------------------------- within bounds


def layouts() -> dict[str, Callable[[Graph], object]]:
    """Ops that write BF16, of odd numbers of elements."""
    x, w = np.linspace(-2, 1, 33 * 7, dtype=f32).reshape(33, 7), np.ones((5, 7), f32)
    positions, tables = np.arange(33, dtype=np.int32), reference.rope_tables(33, 6)
    half = given_bf16(x)
    return {
        "rms_norm": lambda g: ops.rms_norm(g, given(x), given(w[:1]), 1e-5, BF16.id),
        "rope": lambda g: ops.rope(g, given(x), positions, tables, 1, type=BF16.id),
        "silu_mul": lambda g: ops.silu_mul(g, given(x), given(x), BF16.id),
        "silu_mul of bf16": lambda g: ops.silu_mul(g, half, half, BF16.id),
        "silu_mul back": lambda g: g.add(ops.SiluMulBack, half, half, given(x)),
        "linear": lambda g: ops.linear(g, given(x), given(w), type=BF16.id),
        "attention": lambda g: ops.attention(g, half, half, half, 1, 1, 1, 0.5, type=BF16.id),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_op_writes_all_of_its_bf16_result_and_nothing_else(isa, name, n_threads):
    graph = Graph(n_threads, isa)
    layouts()[name](graph)
    outputs = [graph.keep(t) for node in graph.nodes for t in node.outputs]
    graph.plan()
    arena = outputs[0].owner
    assert arena is not None
    after = []
    for filling in (0, 255):
        arena[:] = filling
        graph.run()
        after.append(arena.copy())
    touched = after[0] == after[1]
    at = -arena.ctypes.data % 64  # kept, so one after another
    for tensor in outputs:
        if tensor.type == BF16.id:
            assert touched[at : at + tensor.nbytes].all()
        touched[at : at + tensor.nbytes] = False
        at += (tensor.nbytes + 63) // 64 * 64
    assert any(t.type == BF16.id for t in outputs)
    assert not touched.any()


# ---------------------------------------------------------------- where what is kept is rounded


def test_what_is_kept_is_rounded_where_every_product_rounds_it(isa, rng):
    graph = Graph(1, isa)
    even, odd, narrow = (
        stored(reference.encode(BF16, random(rng, *s)), BF16, *s) for s in [(6, 8), (5, 8), (6, 7)]
    )
    in_f32 = given(random(rng, 6, 8))
    q8 = stored(reference.encode(Q8_0, random(rng, 6, 32)), Q8_0, 6, 32)
    kept = BF16.id if kernels.has_pairs(isa) else F32.id
    assert ops.kept_type(graph, 9, [even]) == F32.id
    graph.pairs = True
    assert ops.kept_type(graph, 9, [even]) == F32.id
    graph.rounded = True
    assert ops.kept_type(graph, 9, [even]) == ops.kept_type(graph, 9, [even, q8]) == kept
    for others in ([odd], [narrow], [in_f32], [even, odd], [in_f32, even]):
        assert ops.kept_type(graph, 9, others) == F32.id
    assert ops.kept_type(graph, 8, [even]) == ops.kept_type(graph, 1, [even]) == F32.id
    graph.partner = True
    assert ops.kept_type(graph, 9, [q8]) == F32.id
    assert ops.kept_type(graph, 9, [even]) == kept
    graph.pairs = False
    assert ops.kept_type(graph, 9, [even]) == F32.id


def trainer(path: Path, isa: str, compute: str, **options: Any) -> Trainer:
    """A trainer of an adapter that is the same each time."""
    model = Model.load(path)
    ranks = {"attn_q": 4, "attn_v": 2, "attn_norm": 1, "ffn_gate": 3, "ffn_down": 4, "output": 4}
    adapter = create_adapter(model.adapter_shapes(ranks), 4, 4, 1)
    adapter.flat[:] = np.random.default_rng(5).standard_normal(adapter.flat.size, f32) * 0.1
    return Trainer(model, adapter, 2, 17, compute=compute, isa=isa, **options)


def kept_in_bf16(made: Trainer) -> set[type[Node]]:
    """Kinds of steps that have results in BF16."""
    nodes = made._training.graph.nodes
    return {type(node) for node in nodes for t in node.outputs if t.type == BF16.id}


@pytest.mark.parametrize("name", ["mini-bf16", "mini-q8_0"])
def test_a_step_of_training_stays_near_float32(paired, name, rng, data_dir):
    inputs, targets = rng.integers(0, 768, (2, 2, 17), np.int32)
    made = [trainer(data_dir / f"{name}.gguf", paired, c) for c in ("bf16", "f32")]
    loss, right = (t.evaluate(inputs, targets) for t in made)
    forward = {ops.RmsNorm, ops.Rope, ops.Linear, ops.SiluMul, ops.Attention}
    assert kept_in_bf16(made[0]) == forward | {ops.SiluMulBack, ops.CrossEntropy}
    assert kept_in_bf16(made[1]) == set()
    assert made[0].memory_bytes < made[1].memory_bytes
    assert abs(loss - right) < 0.01 * right
    a, b = (t.grad.astype(np.float64) for t in made)
    assert a @ b > 0.999 * np.sqrt((a @ a) * (b @ b)) > 0


@pytest.mark.parametrize("name", ["mini-bf16", "mini-q8_0"])
def test_no_bit_of_a_step_depends_on_threads_or_checkpoints(paired, name, rng, data_dir):
    inputs, targets = rng.integers(0, 768, (2, 2, 17), np.int32)
    found = []
    for n_threads in (1, 2, 3):
        for checkpointing in (False, True):
            how = {"n_threads": n_threads, "checkpointing": checkpointing}
            made = trainer(data_dir / f"{name}.gguf", paired, "bf16", **how)
            found.append((made.evaluate(inputs, targets), made.grad))
    for loss, grad in found[1:]:
        assert loss == found[0][0]
        assert_same_bits(grad, found[0][1])


# ---------------------------------------------------------------- what is refused


def refusals() -> list[tuple[str, Callable[[Graph], object]]]:
    """Messages and what asks for them."""
    x = np.ones((9, 8), f32)
    a, half, u, place = given(x), given_bf16(x, "half"), given(x[:, :2].copy()), given(x[:2].copy())
    few, row = half.view(0, 8), given(x[:1].copy())
    f16 = stored(x.astype(np.float16).view(np.uint8).reshape(-1), F16, 9, 8)
    w, in_f32 = stored(reference.encode(BF16, x[:8]), BF16, 8, 8), given(x[:8].copy(), "f32")
    odd = stored(reference.encode(BF16, x), BF16, 9, 8)
    square = given_bf16(np.ones((9, 9), f32), "square")
    turn = (np.arange(9, dtype=np.int32), reference.rope_tables(9, 8), 1)
    unknown, wide = "w.*: activations must be F32 or BF16", "its product does not round to BF16"
    floats, how = "half: its elements must be F32", (1, 1, 1, 0.5)
    lone, narrow = (*how, None, None, False, F32.id), "w: products of 8 tokens are F32"
    back = (a, a, f16, a, u, a, *how, None, False)
    return [
        (unknown, lambda g: ops.linear(g, f16, w)),
        (unknown, lambda g: ops.linear(g, f16.view(0, 1), w)),
        (unknown, lambda g: g.add(ops.LinearBack, f16, w, None, True)),
        (unknown, lambda g: ops.lora_down(g, f16, a)),
        (unknown, lambda g: g.add(ops.LoraOuter, f16, 1.0, u, place)),
        (unknown, lambda g: ops.silu_mul(g, f16, f16, BF16.id)),
        (unknown, lambda g: g.add(ops.Attention, f16, a, a, *lone)),
        (unknown, lambda g: g.add(ops.AttentionBack, *back)),
        (unknown, lambda g: g.add(ops.Pack, f16, 0, False, True)),
        (f"half: {wide}", lambda g: ops.linear(g, half, in_f32)),
        (wide, lambda g: g.add(ops.LinearBack, few, in_f32, None, True)),
        (wide, lambda g: g.add(ops.LinearBack, few, w, None, False)),
        (wide, lambda g: g.add(ops.LinearBack, square, odd, None, True)),
        (narrow, lambda g: ops.linear(g, few, w)),
        (narrow, lambda g: ops.linear(g, in_f32, w, type=BF16.id)),
        ("results are F32 or BF16", lambda g: ops.rms_norm(g, a, row, 1e-5, F16.id)),
        ("few activations must be F32", lambda g: ops.feed_forward(g, few, w, w, w, in_f32)),
        ("cannot be added", lambda g: ops.linear(g, a, w, None, half)),
        ("are of two types", lambda g: ops.silu_mul(g, half, a, BF16.id)),
        ("gated in BF16 stays so", lambda g: ops.silu_mul(g, half, half)),
        (floats, lambda g: ops.rms_norm(g, half, row, 1e-5)),
        (floats, lambda g: ops.rope(g, half, *turn)),
        (floats, lambda g: ops.add(g, a, half)),
        (floats, lambda g: ops.lora_up(g, half, u, place, 1.0)),
    ]


@pytest.mark.parametrize("message, build", refusals())
def test_types_that_do_not_fit_are_refused(isa, message, build):
    graph = Graph(1, isa)
    with pytest.raises(ShapeError, match=message):
        build(graph)
        graph.plan()
