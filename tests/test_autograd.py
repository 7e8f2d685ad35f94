"""Gradients: of every op against central differences of float64, and of a whole small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, ops
from engine.autograd import backward
from engine.dtypes import DType
from engine.errors import ShapeError
from engine.graph import Graph
from engine.tensor import Tensor
from tests import reference, toy_model
from tests.bounds import attention_back_size
from tests.compare import assert_close, assert_same_bits, chain
from tests.conftest import Guard
from tests.graphs import f32, given, gradients, planned, random, stored, trained
from tests.toy_model import InFloat64, Training, make_toy

Array = NDArray[Any]
TOKENS = [1, 4, 5, 6, 7, 16, 63, 64, 65, 130]
TYPES = list(dtypes.BY_ID.values())

# A float64 difference of four points at this step: its own error is far below float32's.
STEP = 1e-3


def differences(f: Callable[..., Array], arrays: Sequence[Array], dy: Array, which: int) -> Array:
    """Gradient of ``sum(dy * f(*arrays))`` with respect to array number `which`."""

    def value(x: Array) -> float:
        return float((dy * f(*arrays[:which], x, *arrays[which + 1 :])).sum())

    return reference.central_differences(value, arrays[which], STEP)


def check(
    isa: str,
    arrays: Sequence[Array],
    build: Callable[..., Tensor],
    f: Callable[..., Array],
    rng: np.random.Generator,
    k: float,
) -> None:
    """Compare the gradients of an op for all its arrays with differences of its reference."""
    dy = random(rng, *f(*arrays).shape)
    _, *found = gradients(isa, arrays, build, dy)
    for which, gradient in enumerate(found):
        expected = differences(f, arrays, dy, which)
        # Terms cancel within an element, but all elements share the size of the largest.
        assert_close(gradient, expected, max(np.abs(expected).max(), 1), k)


# ---------------------------------------------------------------- op by op, against differences


def test_gradient_of_linear_is_that_of_the_reference(isa: str, rng: np.random.Generator) -> None:
    for dtype in TYPES:
        n_in, n_tokens = max(32, dtype.block), 5 if dtype.block < 256 else 1
        data = reference.encode(dtype, random(rng, 7, n_in))
        w = reference.decode_row(dtype, data).reshape(7, n_in)
        check(
            isa,
            [random(rng, n_tokens, n_in)],
            lambda g, x, d=data, t=dtype: ops.linear(g, x, stored(d, t, 7, x.cols)),
            lambda x, w=w: reference.linear(x, w),
            rng,
            4 * chain(7),
        )


def test_gradient_of_rms_norm_is_that_of_the_reference(isa: str, rng: np.random.Generator) -> None:
    for n_tokens, n_cols in [(1, 1), (3, 7), (5, 33)]:
        check(
            isa,
            [random(rng, n_tokens, n_cols), random(rng, 1, n_cols)],
            lambda g, x, w: ops.rms_norm(g, x, w, 1e-2),
            lambda x, w: reference.rms_norm(x, w, 1e-2),
            rng,
            4 * chain(n_cols),
        )


def test_gradient_of_rope_is_that_of_the_reference(isa: str, rng: np.random.Generator) -> None:
    positions = np.array([0, 9, 3], np.int32)
    for head_dim, n_rot in [(2, 2), (18, 10), (34, 34)]:
        tables = reference.rope_tables(10, n_rot)
        check(
            isa,
            [random(rng, 3, 2 * head_dim)],
            lambda g, x, t=tables: ops.rope(g, x, positions, t, 2),
            lambda x, t=tables: reference.rope(x, positions, t, 2),
            rng,
            8,
        )


def test_gradient_of_silu_mul_is_that_of_the_reference(isa: str, rng: np.random.Generator) -> None:
    for n in (1, 8, 37):
        check(
            isa,
            [3 * random(rng, 2, n), random(rng, 2, n)],
            ops.silu_mul,
            reference.silu_mul,
            rng,
            32,
        )


def test_gradient_of_add_is_that_of_the_reference(isa: str, rng: np.random.Generator) -> None:
    check(isa, [random(rng, 3, 11), random(rng, 3, 11)], ops.add, reference.add, rng, 4)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (3, 1)], ids=lambda h: f"{h[0]}over{h[1]}")
def test_gradient_of_attention_is_that_of_the_reference(
    isa: str, heads: tuple[int, int], rng: np.random.Generator
) -> None:
    n_head, n_head_kv = heads
    for n_seq, n_query, dim in [(1, 1, 3), (2, 5, 5)]:
        args = (n_seq, n_head, n_head_kv, dim**-0.5)
        arrays = [random(rng, n_seq * n_query, n * dim) for n in (n_head, n_head_kv, n_head_kv)]
        check(
            isa,
            arrays,
            lambda g, q, k, v, a=args: ops.attention(g, q, k, v, *a),
            lambda q, k, v, a=args: reference.attention(q, k, v, *a),
            rng,
            8 * chain(dim + n_query),
        )


def test_gradient_of_lora_up_for_its_base_is_the_gradient(
    isa: str, rng: np.random.Generator
) -> None:
    u, m = random(rng, 4, 3), random(rng, 3, 21)
    check(
        isa,
        [random(rng, 4, 21)],
        lambda g, base: ops.lora_up(g, base, given(u), given(m), 0.5),
        lambda base: reference.lora_up(base, u, m, 0.5),
        rng,
        2,
    )


def test_gradient_of_cross_entropy_is_that_of_the_reference(
    isa: str, rng: np.random.Generator
) -> None:
    logits, targets = random(rng, 4, 21), np.array([3, -1, 0, 20], np.int32)
    graph = Graph(1, isa)
    weight = np.array([0.5], f32)
    _, slope = ops.cross_entropy(graph, planned(graph, logits), targets, weight)
    graph.keep(slope)
    graph.run()

    def total(x: Array) -> float:
        return 0.5 * float(reference.cross_entropy(x, targets, 0.5, eps=0)[0].sum())

    assert_close(slope.numpy(), reference.central_differences(total, logits, STEP), 1, 16)


# ---------------------------------------------------------------- adapters' gradients


def adapter_gradients(
    isa: str, x: Array, a: Array, b: Array, w: Array, dy: Array, scale: float
) -> list[Array]:
    """dx, dA, dB of x W' + scale x A' B."""
    graph = Graph(1, isa)
    source = planned(graph, x)
    first = len(graph.nodes)
    (pa, da), (pb, db) = trained(a, "A"), trained(b, "B")
    y = ops.linear(graph, source, given(w), (pa, pb, scale))
    found = backward(graph, graph.nodes[first:], {y: given(dy)})
    graph.keep(found[source])
    graph.run()
    return [found[source].numpy().copy(), da, db]


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 9])
def test_gradients_of_an_adapter_are_those_of_the_reference(
    isa: str, rank: int, rng: np.random.Generator
) -> None:
    x, w, dy = random(rng, 6, 19), random(rng, 9, 19), random(rng, 6, 9)
    a, b, scale = random(rng, rank, 19), random(rng, rank, 9), 1.25

    def adapted(x: Array, a: Array, b: Array) -> Array:
        return reference.linear(x, w, reference.lora_down(x, a), b, scale)

    for which, gradient in enumerate(adapter_gradients(isa, x, a, b, w, dy, scale)):
        expected = differences(adapted, [x, a, b], dy, which)
        assert_close(gradient, expected, np.abs(expected).max(), 4 * chain(19 + 9 + 6))


def test_gradients_of_an_embedding_adapter_are_those_of_the_reference(
    isa: str, rng: np.random.Generator
) -> None:
    ids = np.array([2, 5, 2, 2, 0, 6, 5], np.int32)  # the same token in several rows
    base, dy = random(rng, 7, 19), random(rng, 7, 19)
    a, b = random(rng, 3, 19), random(rng, 3, 8)
    graph = Graph(1, isa)
    (pa, da), (pb, db) = trained(a, "A"), trained(b, "B")
    y = ops.lora_up(graph, given(base), ops.lora_gather(graph, pb, ids, 7), pa, 0.5)
    backward(graph, list(graph.nodes), {y: given(dy)})
    graph.run()

    def adapted(a: Array, b: Array) -> Array:
        return reference.lora_up(base, reference.lora_gather(b, ids), a, 0.5)

    for which, gradient in enumerate([da, db]):
        expected = differences(adapted, [a, b], dy, which)
        assert_close(gradient, expected, np.abs(expected).max(), 4 * chain(19))
    assert (db[:, [1, 3, 4, 7]] == 0).all()


def test_gradients_of_a_norm_adapter_are_those_of_the_reference(
    isa: str, rng: np.random.Generator
) -> None:
    x, w, dy = random(rng, 5, 21), random(rng, 1, 21), random(rng, 5, 21)
    a, b = random(rng, 3, 21), random(rng, 1, 3)
    graph = Graph(1, isa)
    (pa, da), (pb, db) = trained(a, "A"), trained(b, "B")
    y = ops.rms_norm(graph, given(x), ops.lora_up(graph, given(w), pb, pa, 0.5), 1e-5)
    backward(graph, list(graph.nodes), {y: given(dy)})
    graph.run()

    def adapted(a: Array, b: Array) -> Array:
        return reference.rms_norm(x, reference.lora_up(w, b, a, 0.5), 1e-5)

    for which, gradient in enumerate([da, db]):
        expected = differences(adapted, [a, b], dy, which)
        assert_close(gradient, expected, np.abs(expected).max(), 4 * chain(21))


# ---------------------------------------------------------------- at every tile size, accumulating


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", TOKENS)
def test_linear_back_agrees_with_float64_and_accumulates(
    isa: str, dtype: DType, n_tokens: int, rng: np.random.Generator, guarded: Guard
) -> None:
    widths = [(64, 6), (32, 7), (96, 53), (544, 300)]
    if dtype.block == 1:
        widths += [(33, 7), (7, 64), (130, 53), (1, 1), (515, 3)]
    if dtype.block == 256:
        widths = [(256, 6), (768, 200)]
    for n_in, n_out in widths:
        data = reference.encode(dtype, random(rng, n_out, n_in))
        w = reference.decode_row(dtype, data).reshape(n_out, n_in)
        dy, before = guarded(random(rng, n_tokens, n_out)), random(rng, n_tokens, n_in)
        grad = guarded(before)
        graph = Graph(1, isa)
        x = Tensor.parameter("x", np.zeros_like(before), grad)
        y = ops.linear(graph, x, stored(guarded(data), dtype, n_out, n_in))
        last = graph.nodes[-1]
        backward(graph, [last], {y: given(dy)})
        graph.run()
        size = abs(before) + reference.linear_back(abs(dy), abs(w))
        assert_close(grad, before + reference.linear_back(dy, w), size, chain(n_out))


@pytest.mark.parametrize("n_cols", [1, 7, 8, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("n_tokens", [1, 5, 65])
def test_rms_norm_back_agrees_with_float64(
    isa: str, n_tokens: int, n_cols: int, rng: np.random.Generator
) -> None:
    x, w, dy = random(rng, n_tokens, n_cols), random(rng, 1, n_cols), random(rng, n_tokens, n_cols)
    _, dx, dw = gradients(isa, [x, w], lambda g, x, w: ops.rms_norm(g, x, w, 1e-3), dy)
    expected_x, expected_w = reference.rms_norm_back(x, w, 1e-3, dy)
    r = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-3)
    size = abs(w * dy) * r + abs(x) * r**3 * abs(w * dy * x).mean(axis=1, keepdims=True)
    assert_close(dx, expected_x, size, 16)
    assert_close(dw, expected_w, (abs(dy * x) * r).sum(axis=0, keepdims=True), 4 + chain(n_tokens))


@pytest.mark.parametrize("head_dim", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (5, 1)], ids=lambda h: f"{h[0]}over{h[1]}")
def test_attention_back_agrees_with_float64(
    isa: str, head_dim: int, heads: tuple[int, int], rng: np.random.Generator
) -> None:
    n_head, n_head_kv = heads
    for n_seq, n_query in [(1, 1), (3, 5), (2, 64), (1, 65), (1, 130)]:
        n = n_seq * n_query
        arrays = [random(rng, n, heads * head_dim) for heads in (n_head, n_head_kv, n_head_kv)]
        dout = random(rng, n, n_head * head_dim)
        args = (n_seq, n_head, n_head_kv, head_dim**-0.5)
        _, *found = gradients(isa, arrays, lambda g, *t, a=args: ops.attention(g, *t, *a), dout)
        expected = reference.attention_back(*arrays, dout, *args)
        sizes = iter(attention_back_size(*arrays, dout, *args))
        for gradient, right in zip(found, expected, strict=True):
            assert_close(gradient, right, next(sizes), 2 * chain(head_dim + n_query))


def test_attention_back_begins_at_a_key_of_each_query(isa: str, rng: np.random.Generator) -> None:
    n_seq, n_query, n_head, n_head_kv, dim = 2, 150, 4, 2, 16
    n = n_seq * n_query
    arrays = [random(rng, n, heads * dim) for heads in (n_head, n_head_kv, n_head_kv)]
    dout = random(rng, n, n_head * dim)
    first = np.tile(np.arange(n_query) // 70 * 70, n_seq).astype(np.int32)
    args = (n_seq, n_head, n_head_kv, dim**-0.5)
    _, *found = gradients(
        isa, arrays, lambda g, *t: ops.attention(g, *t, *args, first_key=first), dout
    )
    expected = reference.attention_back(*arrays, dout, *args, first_key=first)
    sizes = attention_back_size(*arrays, dout, *args)
    for gradient, right, size in zip(found, expected, sizes, strict=True):
        assert_close(gradient, right, 8 * size.max(), 2 * chain(dim + n_query))


@pytest.mark.parametrize("n_cols", [1, 7, 16, 33, 64, 130, 300])
@pytest.mark.parametrize("n_tokens", [1, 6, 65])
def test_adapter_kernels_agree_with_float64_and_accumulate(
    isa: str, n_tokens: int, n_cols: int, rng: np.random.Generator, guarded: Guard
) -> None:
    rank, scale = 5, -0.75
    x, dy = guarded(random(rng, n_tokens, n_cols)), guarded(random(rng, n_tokens, n_cols))
    a, b = random(rng, rank, n_cols), random(rng, rank, n_cols)
    graph = Graph(1, isa)
    before_a, before_b = random(rng, rank, n_cols), random(rng, rank, n_cols)
    da, db = guarded(before_a), guarded(before_b)
    pa, pb = Tensor.parameter("A", a, da), Tensor.parameter("B", b, db)
    y = ops.lora_up(graph, None, ops.lora_down(graph, given(x), pa), pb, scale)
    backward(graph, list(graph.nodes), {y: given(dy)})
    graph.run()
    u, du = reference.lora_down(x, a), reference.lora_down(dy, b, scale)
    size_u = reference.lora_down(abs(x), abs(a))
    size_du = reference.lora_down(abs(dy), abs(b), 0.75)
    k = 2 * chain(n_cols + n_tokens)
    size_a = reference.lora_outer(abs(before_a), size_du, abs(x), 1.0)
    assert_close(da, reference.lora_outer(before_a, du, x, 1.0), size_a, k)
    size_b = reference.lora_outer(abs(before_b), size_u, abs(dy), 0.75)
    assert_close(db, reference.lora_outer(before_b, u, dy, scale), size_b, k)


def test_the_references_own_gradients_are_its_differences(rng: np.random.Generator) -> None:
    x, w, dy = random(rng, 3, 7), random(rng, 1, 7), random(rng, 3, 7)
    f = lambda x, w: reference.rms_norm(x, w, 1e-2)  # noqa: E731 - used three times
    for which, gradient in enumerate(reference.rms_norm_back(x, w, 1e-2, dy)):
        assert_close(gradient, differences(f, [x, w], dy, which), 1, 1)
    for which, gradient in enumerate(reference.silu_mul_back(x, dy, dy)):
        assert_close(gradient, differences(reference.silu_mul, [x, dy], dy, which), 1, 1)
    q, k, v, dout = random(rng, 6, 12), random(rng, 6, 6), random(rng, 6, 6), random(rng, 6, 12)
    args = (2, 4, 2, 0.5)
    attend = lambda q, k, v: reference.attention(q, k, v, *args)  # noqa: E731 - used three times
    for which, gradient in enumerate(reference.attention_back(q, k, v, dout, *args)):
        assert_close(gradient, differences(attend, [q, k, v], dout, which), 1, 1)


# ---------------------------------------------------------------- how gradients meet


def test_a_tensor_read_twice_gets_both_gradients(isa: str, rng: np.random.Generator) -> None:
    x, w1, w2, dy = random(rng, 5, 16), random(rng, 16, 16), random(rng, 16, 16), random(rng, 5, 16)
    norm = np.ones((1, 16), f32)

    def build(g: Graph, x: Tensor) -> Tensor:
        left = ops.linear(g, x, given(w1))
        right = ops.linear(g, ops.rms_norm(g, x, given(norm), 1e-5), given(w2))
        return ops.add(g, x, ops.add(g, ops.add(g, left, right), x))

    _, dx = gradients(isa, [x], build, dy)
    through_norm = reference.rms_norm_back(x, norm, 1e-5, reference.linear_back(dy, w2))[0]
    expected = 2 * dy.astype(np.float64) + reference.linear_back(dy, w1) + through_norm
    assert_close(dx, expected, np.abs(expected).max() * 4, chain(16))


def test_a_sum_of_a_tensor_with_itself_has_twice_the_gradient(
    isa: str, rng: np.random.Generator
) -> None:
    x, dy = random(rng, 3, 5), random(rng, 3, 5)
    _, dx = gradients(isa, [x], lambda g, x: ops.add(g, x, x), dy)
    assert_same_bits(dx, 2 * dy)
    _, dx = gradients(isa, [x], lambda g, x: ops.silu_mul(g, x, x), dy)
    assert_close(dx, sum(reference.silu_mul_back(x, x, dy)), abs(dy) * (1 + x * x), 16)


def test_the_seed_is_left_as_it_was(isa: str, rng: np.random.Generator) -> None:
    x, dy = random(rng, 3, 16), random(rng, 3, 16)
    before, w, norm = dy.copy(), given(random(rng, 16, 16)), given(random(rng, 1, 16))

    def residual(graph: Graph, x: Tensor) -> Tensor:
        return ops.add(graph, x, ops.linear(graph, ops.rms_norm(graph, x, norm, 1e-5), w))

    gradients(isa, [x], residual, dy)
    assert_same_bits(dy, before)


def test_no_gradient_is_computed_for_what_is_frozen(isa: str, rng: np.random.Generator) -> None:
    graph = Graph(1, isa)
    y = ops.linear(graph, given(random(rng, 3, 8)), given(random(rng, 4, 8)))
    nodes = list(graph.nodes)
    assert backward(graph, nodes, {y: given(random(rng, 3, 4))}) == {}
    assert graph.nodes == nodes


def test_a_parameter_cannot_enter_an_op_that_does_not_accumulate(
    isa: str, rng: np.random.Generator
) -> None:
    graph = Graph(1, isa)
    parameter, _ = trained(random(rng, 3, 8))
    y = ops.silu_mul(graph, parameter, given(random(rng, 3, 8)))
    with pytest.raises(ShapeError, match="parameter's gradient"):
        backward(graph, list(graph.nodes), {y: given(random(rng, 3, 8))})


# ---------------------------------------------------------------- a whole model

# Between the loss and the first adapter lie some 20 products of up to 64 terms.
DEPTH = 20
ODD = {"n_embd": 36, "n_head": 6, "n_head_kv": 3, "head_dim": 10, "n_ff": 50, "n_tokens": 70}


@pytest.mark.parametrize("sizes", [{}, ODD], ids=["even", "odd"])
def test_a_models_gradient_follows_the_differences_of_its_loss(
    isa: str, sizes: dict[str, int], rng: np.random.Generator
) -> None:
    toy = make_toy(rng, **sizes)
    found = Training(toy, isa).results()
    assert_close(found["loss"], InFloat64(toy, toy.adapters).loss(), 4, DEPTH * chain(64))
    for name, value in toy.adapters.items():
        direction = rng.standard_normal(value.shape)

        def total(t: Array, name: str = name, way: Array = direction) -> float:
            moved = toy.adapters | {name: toy.adapters[name] + t[0] * way}
            return float(InFloat64(toy, moved).loss(eps=0).sum()) * toy.loss_weight

        expected = reference.central_differences(total, np.zeros(1), 1e-4)[0]
        size = (np.abs(found[name]) * np.abs(direction)).sum()
        assert_close((found[name] * direction).sum(), expected, size, DEPTH * chain(64))


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.Q4_1], ids=lambda t: t.name)
def test_checkpoints_change_no_bit(isa: str, dtype: DType, rng: np.random.Generator) -> None:
    toy = make_toy(rng, dtype=dtype)
    kept, again = Training(toy, isa), Training(toy, isa, checkpoints=True)
    expected = kept.results()
    assert len(again.graph.nodes) > len(kept.graph.nodes)
    for name, value in again.results().items():
        assert_same_bits(value, expected[name])


def test_kept_segments_change_no_bit_and_take_memory(isa: str, rng: np.random.Generator) -> None:
    toy = make_toy(rng)
    kept = [set(), {"layer 1"}, {"layer 0", "layer 1"}]
    plans = [Training(toy, isa, checkpoints=True, kept=segments) for segments in kept]
    expected = plans[0].results()
    for plan in plans[1:]:
        for name, value in plan.results().items():
            assert_same_bits(value, expected[name])
    n_steps = [len(plan.graph.nodes) for plan in plans]
    n_bytes = [plan.graph.arena_bytes for plan in plans]
    assert n_steps == sorted(n_steps, reverse=True) and len(set(n_steps)) == 3
    assert n_bytes[0] < n_bytes[2]


def test_checkpoints_save_memory(isa: str, rng: np.random.Generator) -> None:
    toy = make_toy(rng, n_tokens=64)
    kept, again = Training(toy, isa), Training(toy, isa, checkpoints=True)
    assert again.graph.arena_bytes < 0.8 * kept.graph.arena_bytes


def test_a_second_run_adds_the_same_gradient_again(isa: str, rng: np.random.Generator) -> None:
    training = Training(make_toy(rng), isa)
    once = training.results()
    training.graph.run()
    for name, grad in training.grads.items():
        assert_close(grad, 2 * once[name].astype(np.float64), np.abs(once[name]).max(), 8)


class InTorch:
    """PyTorch's interpreter."""

    def __init__(self, toy: toy_model.Toy, torch: Any) -> None:
        self.toy, self.torch = toy, torch
        self.weights = {n: torch.tensor(w, dtype=torch.float64) for n, w in toy.weights.items()}
        self.adapters = {
            n: torch.tensor(a, dtype=torch.float64, requires_grad=True)
            for n, a in toy.adapters.items()
        }
        self.ids = torch.tensor(toy.ids, dtype=torch.int64)

    def adapter(self, name: str) -> tuple[Any, Any]:
        return self.adapters[name + ".A"], self.adapters[name + ".B"]

    def segment(self, name: str) -> None:
        pass

    def embed(self) -> Any:
        a, b = self.adapter("embd")
        return self.weights["embd"][self.ids] + toy_model.SCALE * b[:, self.ids].T @ a

    def norm(self, x: Any, name: str) -> Any:
        a, b = self.adapter(name)
        w = (self.weights[name] + toy_model.SCALE * b @ a)[0]
        return self.torch.nn.functional.rms_norm(x, w.shape, w, toy_model.EPS)

    def linear(self, x: Any, name: str) -> Any:
        a, b = self.adapter(name)
        return x @ self.weights[name].T + toy_model.SCALE * x @ a.T @ b

    def rope(self, x: Any, n_head: int) -> Any:
        cos, sin = (self.torch.tensor(t)[self.toy.positions, None, :] for t in self.toy.tables())
        n_rot = cos.shape[2]
        heads = x.reshape(len(x), n_head, -1)
        pairs = heads[..., :n_rot].reshape(len(x), n_head, -1, 2)
        swapped = pairs.flip(-1).reshape(len(x), n_head, n_rot)
        turned = heads[..., :n_rot] * cos + swapped * sin
        return self.torch.cat([turned, heads[..., n_rot:]], dim=2).reshape(x.shape)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        n_seq, dim = self.toy.n_seq, self.toy.head_dim
        heads = [t.reshape(n_seq, len(t) // n_seq, -1, dim).transpose(1, 2) for t in (q, k, v)]
        attend = self.torch.nn.functional.scaled_dot_product_attention
        out = attend(*heads, is_causal=True, enable_gqa=True, scale=self.toy.attention_scale)
        return out.transpose(1, 2).reshape(q.shape)

    def silu_mul(self, g: Any, u: Any) -> Any:
        return self.torch.nn.functional.silu(g) * u

    def add(self, a: Any, b: Any) -> Any:
        return a + b


def test_a_models_gradient_is_that_of_pytorch(isa: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    toy = make_toy(rng, **ODD)
    oracle = InTorch(toy, torch)
    logits = toy_model.logits(toy, oracle)
    targets = torch.tensor(toy.targets, dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (loss * toy.loss_weight).backward()
    found = Training(toy, isa).results()
    assert_close(found["loss"].sum(dtype=np.float64), loss.item(), loss.item(), DEPTH * chain(64))
    for name, tensor in oracle.adapters.items():
        expected = tensor.grad.numpy()
        assert_close(found[name], expected, np.abs(expected).max(), DEPTH * chain(64))
