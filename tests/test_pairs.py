"""Products with frozen weights in bf16 pairs: both ways, on vectors and on matrix tiles."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import kernels, ops
from engine.dtypes import BF16, F16, F32, Q4_1, Q5_K, Q8_0, DType
from engine.errors import OptionError
from engine.graph import Graph
from engine.lora import create_adapter
from engine.model import Model
from engine.tensor import Tensor
from engine.training.trainer import Trainer
from tests import reference
from tests.bounds import in_bf16
from tests.compare import PAIR_EPS, assert_close, assert_same_bits, chain
from tests.graphs import given, gradients, random

# Tokens and outputs below, at and above a register tile, a matrix tile and a panel; reductions of
# whole tiles, of whole pairs only, and longer than one part.
SHAPES = [
    (9, 32, 1),
    (16, 64, 16),
    (17, 96, 31),
    (33, 34, 33),
    (64, 576, 48),
    (65, 2080, 34),
    (130, 4128, 50),
    (520, 64, 7),
    (33, 2304, 17),
]
TYPES = [BF16, F16, Q8_0, Q4_1, Q5_K]


def weights(rng: np.random.Generator, dtype: DType, rows: int, cols: int) -> NDArray[np.uint8]:
    """Stored rows of moderate size: any codes, scales of a hundredth."""
    if dtype.block == 1:
        values = random(rng, rows, cols).reshape(-1)
        if dtype is F32:
            return values.view(np.uint8)
        encode = kernels.encode_bf16 if dtype is BF16 else kernels.encode_f16
        return encode(values).view(np.uint8)
    stored = rng.integers(0, 256, (rows * cols // dtype.block, dtype.block_bytes), np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    stored[:, :2] = scale
    if dtype in (Q4_1, Q5_K):
        stored[:, 2:4] = scale
    return stored.reshape(-1)


def run(isa: str, n_threads: int, make) -> NDArray[np.float32]:
    graph = Graph(n_threads, isa)
    graph.pairs = True
    result = graph.keep(make(graph))
    graph.run()
    return result.numpy().copy()


@pytest.fixture
def paired(isa: str) -> str:
    if not kernels.has_pairs(isa):
        pytest.skip(f"{isa} has no bf16 products")
    return isa


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_agree_with_rounded_operands(paired, rng, shape, dtype, guarded):
    tokens, k, n = shape
    if k % dtype.block:
        pytest.skip("rows are whole blocks")
    stored = weights(rng, dtype, n, k)
    w = in_bf16(kernels.decode(dtype.id, stored, n * k)).reshape(n, k)
    x = random(rng, tokens, k)
    held = Tensor.external("w", guarded(stored), n, k, dtype.id)
    y = run(paired, 2, lambda graph: ops.linear(graph, given(guarded(x)), held))
    exact = in_bf16(x) @ w.T
    assert_close(y, exact, np.abs(in_bf16(x)) @ np.abs(w.T), chain(k), PAIR_EPS)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_with_rounded_operands(paired, rng, shape, dtype, guarded):
    tokens, k, n = shape
    if k % dtype.block:
        pytest.skip("rows are whole blocks")
    stored = weights(rng, dtype, n, k)
    w = in_bf16(kernels.decode(dtype.id, stored, n * k)).reshape(n, k)
    dy = random(rng, tokens, n)
    held = Tensor.external("w", guarded(stored), n, k, dtype.id)

    def back(graph: Graph) -> Tensor:
        return graph.add(ops.LinearBack, given(guarded(dy)), held, None, True)[0]

    exact = in_bf16(dy) @ w
    assert_close(run(paired, 2, back), exact, np.abs(in_bf16(dy)) @ np.abs(w), chain(n), PAIR_EPS)


def attention_close(actual, expected, magnitude):
    """Operands rounded to 8 bits, relatively; a score's error moves its probability by as much."""
    assert_close(actual, expected, magnitude, 3, 2.0**-8)


@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
@pytest.mark.parametrize("n_query", [17, 64, 130])
def test_attention_in_pairs_agrees_with_float64(paired, rng, n_query, head_dim):
    n_seq, n_head, n_head_kv = 2, 6, 2
    n = n_seq * n_query
    q, k, v, dout = (
        in_bf16(0.5 * random(rng, n, heads * head_dim)).astype(np.float32)
        for heads in (n_head, n_head_kv, n_head_kv, n_head)
    )
    args = (n_seq, n_head, n_head_kv, head_dim**-0.5)

    def attend(graph: Graph, *tensors: Tensor) -> Tensor:
        return ops.attention(graph, *tensors, *args, pairs=True)

    y = run(paired, 2, lambda graph: attend(graph, *(given(x) for x in (q, k, v))))
    size = reference.attention(q, k, np.abs(v), *args)
    attention_close(y, reference.attention(q, k, v, *args), size.max())
    _, *found = gradients(paired, [q, k, v], attend, dout)
    for gradient, right in zip(found, reference.attention_back(q, k, v, dout, *args), strict=True):
        attention_close(gradient, right, np.abs(right).max())


@pytest.mark.parametrize("n_threads", [2, 3])
def test_attention_in_pairs_gives_the_same_bits_for_any_threads(paired, rng, n_threads):
    q, k, v = (random(rng, 200, heads * 64) for heads in (9, 3, 3))

    def attend(graph: Graph) -> Tensor:
        return ops.attention(graph, given(q), given(k), given(v), 1, 9, 3, 0.125, pairs=True)

    assert_same_bits(run(paired, n_threads, attend), run(paired, 1, attend))


def test_f32_weights_are_never_in_bf16(paired, rng):
    x, w = random(rng, 40, 64), random(rng, 33, 64)

    def product(graph: Graph) -> Tensor:
        return ops.linear(graph, given(x), given(w, "w"))

    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w.T)
    assert_close(run(paired, 1, product), exact, magnitude, chain(64))


def test_a_reduction_of_odd_length_stays_in_float32(paired, rng):
    x = random(rng, 20, 35)
    stored = weights(rng, BF16, 9, 35)
    w = kernels.decode(BF16.id, stored, 9 * 35).reshape(9, 35).astype(np.float64)
    held = Tensor.external("w", stored, 9, 35, BF16.id)
    y = run(paired, 1, lambda graph: ops.linear(graph, given(x), held))
    assert_close(y, x @ w.T, np.abs(x) @ np.abs(w.T), chain(35))


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_bits_do_not_depend_on_threads(paired, rng, n_threads):
    stored = weights(rng, Q8_0, 100, 576)
    held = Tensor.external("w", stored, 100, 576, Q8_0.id)
    x, dy = random(rng, 70, 576), random(rng, 70, 100)
    for make in (
        lambda graph: ops.linear(graph, given(x), held),
        lambda graph: graph.add(ops.LinearBack, given(dy), held, None, True)[0],
    ):
        assert_same_bits(run(paired, n_threads, make), run(paired, 1, make))


def test_a_gradient_is_added_to_one_that_is_there(paired, rng):
    stored = weights(rng, BF16, 40, 64)
    held = Tensor.external("w", stored, 40, 64, BF16.id)
    dy = random(rng, 20, 40)

    def twice(graph: Graph) -> Tensor:
        first = graph.add(ops.LinearBack, given(dy), held, None, True)[0]
        return graph.add(ops.LinearBack, given(dy), held, first, True)[0]

    def once(graph: Graph) -> Tensor:
        return graph.add(ops.LinearBack, given(dy), held, None, True)[0]

    single = run(paired, 1, once).astype(np.float64)
    assert_close(run(paired, 1, twice), 2 * single, np.abs(single).max() + 1, chain(40), PAIR_EPS)


def trainer(data_dir, isa: str, compute: str) -> Trainer:
    model = Model.load(data_dir / "mini-bf16.gguf")
    shapes = model.adapter_shapes({"attn_q": 4, "ffn_down": 4, "output": 4})
    return Trainer(model, create_adapter(shapes, 4, 4, 1), 2, 16, compute=compute, isa=isa)


def test_training_in_bf16_stays_near_float32(paired, rng, data_dir):
    inputs, targets = rng.integers(0, 768, (2, 2, 16), np.int32)
    losses = [trainer(data_dir, paired, c).evaluate(inputs, targets) for c in ("bf16", "f32")]
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 5e-3 * losses[1]


def test_bf16_without_its_products_is_refused(isa, data_dir):
    if kernels.has_pairs(isa):
        pytest.skip(f"{isa} has bf16 products")
    with pytest.raises(OptionError, match="--compute bf16"):
        trainer(data_dir, isa, "bf16")


def test_tiles_are_preferred_and_the_choice_is_stable(isa):
    choice = kernels.prefers_pairs(isa)
    assert kernels.prefers_pairs(isa) is choice
    assert choice <= kernels.has_pairs(isa)
    if isa == "amx":
        assert choice
