"""The proof of learning against plain linear algebra."""

from __future__ import annotations

import numpy as np
import pytest

from engine.dtypes import BF16, F16, F32, Q4_0, Q8_0
from engine.kernels import decode, encode_bf16, encode_f16
from engine.lora import LAYER_KINDS, MODEL_KINDS, Adapter
from engine.tensor import Tensor
from engine.training import learning
from engine.training.learning import (
    Learning,
    largest_changes,
    norm,
    not_finite_tensor,
    product_norm,
    sampled_norm,
)


def stored(rng, rows, cols, dtype=F32):
    """A weight of a stored type with random bits, and what it means."""
    values = rng.standard_normal((rows, cols)).astype(np.float32)
    if dtype is F32:
        data = values
    elif dtype is F16:
        data = encode_f16(values.ravel())
    elif dtype is BF16:
        data = encode_bf16(values.ravel())
    else:
        blocks = rng.integers(0, 256, (rows * cols // dtype.block, dtype.block_bytes), np.uint8)
        blocks[:, :2] = np.float16(0.03).view("<u2").reshape(1).view(np.uint8)
        data = blocks
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    means = decode(dtype.id, data, rows * cols).reshape(rows, cols)
    return Tensor.external("w", data, rows, cols, dtype.id), means


@pytest.mark.parametrize(
    ("rank", "n_in", "n_out"), [(1, 5, 7), (4, 64, 3), (8, 33, 129), (3, 9, 1)]
)
def test_the_norm_of_a_product_is_that_of_the_whole_matrix(rng, rank, n_in, n_out):
    a = rng.standard_normal((rank, n_in)).astype(np.float32)
    b = rng.standard_normal((rank, n_out)).astype(np.float32)
    whole = np.linalg.norm(b.astype(np.float64).T @ a.astype(np.float64))
    assert product_norm(a, b) == pytest.approx(whole, rel=1e-9)


def test_a_product_that_cancels_has_no_norm():
    a = np.array([[1, 2, 3], [1, 2, 3]], np.float32)
    b = np.array([[5, 6], [-5, -6]], np.float32)
    assert product_norm(a, b) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, Q8_0, Q4_0], ids=lambda t: t.name)
def test_the_norm_of_a_weight_is_that_of_what_it_means(rng, dtype, monkeypatch):
    monkeypatch.setattr(learning, "_CHUNK_ELEMENTS", 300)
    weight, means = stored(rng, 37, 64, dtype)
    assert norm(weight) == pytest.approx(np.linalg.norm(means.astype(np.float64)), rel=1e-5)


def test_the_norm_of_a_part_of_a_joint_weight_is_its_own(rng):
    weight, means = stored(rng, 30, 32, Q8_0)
    part = weight.view(10, 8)
    assert norm(part) == pytest.approx(np.linalg.norm(means[10:18].astype(np.float64)), rel=1e-5)


def test_huge_weights_are_estimated_from_rows_spread_over_all(rng, monkeypatch):
    monkeypatch.setattr(learning, "WHOLE_ELEMENTS", 1000)
    values = np.repeat(np.arange(1, 1001, dtype=np.float32), 4).reshape(1000, 4)
    weight = Tensor.external("w", values, 1000, 4, F32.id)
    exact = np.linalg.norm(values.astype(np.float64))
    assert norm(weight) == pytest.approx(exact, rel=0.02)
    assert norm(weight) != exact


def test_few_rows_are_all_taken(rng):
    weight, means = stored(rng, 5, 32)
    assert sampled_norm(weight) == pytest.approx(np.linalg.norm(means), rel=1e-5)


def adapted(rng, sizes, rank=2, alpha=6):
    """An adapter with a random product for each size, and its weights."""
    shapes = [(name, n_in, n_out, rank) for name, (n_in, n_out) in sizes.items()]
    adapter = Adapter(shapes, rank, alpha)
    adapter.flat[:] = rng.standard_normal(adapter.flat.size)
    weights = {name: stored(rng, n_out, n_in) for name, (n_in, n_out) in sizes.items()}
    return adapter, weights


SIZES = {
    "token_embd": (16, 40), "output_norm": (16, 1), "blk.0.attn_q": (16, 16),
    "blk.0.ffn_up": (16, 24), "blk.0.ffn_down": (24, 16),
}  # fmt: skip


def test_the_largest_changes_come_first(rng):
    adapter, weights = adapted(rng, SIZES)
    for factor, pair in zip((3.0, 0.01, 7.0, 0.1, 1.0), adapter.pairs.values(), strict=True):
        pair.b *= factor
    ratios = {}
    for name, pair in adapter.pairs.items():
        change = 3 * pair.b.astype(np.float64).T @ pair.a.astype(np.float64)
        ratios[name] = np.linalg.norm(change) / np.linalg.norm(weights[name][1])
    found = largest_changes(adapter, {name: weight for name, (weight, _) in weights.items()})
    expected = sorted(ratios, key=ratios.__getitem__, reverse=True)[:3]
    assert [size.name for size in found] == expected
    assert [size.ratio for size in found] == pytest.approx([ratios[n] for n in expected], rel=1e-4)


def test_an_adapter_that_adds_nothing_has_no_largest_change(rng):
    adapter, weights = adapted(rng, SIZES)
    for pair in adapter.pairs.values():
        pair.b[:] = 0
    assert largest_changes(adapter, {name: weight for name, (weight, _) in weights.items()}) == []


def test_only_tensors_whose_product_changed_have_moved(rng):
    adapter, weights = adapted(rng, SIZES)
    names = list(adapter.pairs)
    adapter.pairs[names[0]].b[:] = 0
    adapter.pairs[names[1]].b[:] = 0
    losses = iter([4.0, 3.0])
    kept = {name: weight for name, (weight, _) in weights.items()}
    watched = Learning(adapter, kept, lambda: next(losses))
    adapter.pairs[names[0]].a *= 0.5  # weight decay of A under a B of zeros adds nothing
    adapter.pairs[names[1]].b[:] = 1
    adapter.pairs[names[2]].a[0, 0] += 1
    proof = watched.proof()
    assert (proof.n_moved, proof.n_tensors) == (2, 5)
    assert (proof.before, proof.after) == (4.0, 3.0)
    assert len(proof.largest) == 3


def test_without_data_there_is_no_loss(rng):
    adapter, weights = adapted(rng, SIZES)
    proof = Learning(adapter, {name: weight for name, (weight, _) in weights.items()}).proof()
    assert (proof.before, proof.after, proof.n_moved) == (None, None, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_gradient_on_the_way_back_that_is_not_finite_is_named(rng, bad):
    layers = [f"blk.{layer}.{kind}" for layer in (0, 1) for kind in LAYER_KINDS]
    way_back = (
        "output output_norm blk.1.ffn_down blk.1.ffn_gate blk.1.ffn_up blk.1.ffn_norm"
        " blk.1.attn_output blk.1.attn_v blk.1.attn_k blk.1.attn_q blk.1.attn_norm blk.0.ffn_down"
        " blk.0.ffn_gate blk.0.ffn_up blk.0.ffn_norm blk.0.attn_output blk.0.attn_v blk.0.attn_k"
        " blk.0.attn_q blk.0.attn_norm token_embd"
    ).split()
    adapter, _ = adapted(rng, dict.fromkeys([*MODEL_KINDS, *layers], (6, 5)))
    grad = np.ones_like(adapter.flat)
    assert not_finite_tensor(adapter, grad) is None
    size = grad.size // len(way_back)
    for name in reversed(way_back):
        begin = list(adapter.pairs).index(name) * size
        grad[begin + size - 1] = bad
        assert not_finite_tensor(adapter, grad) == f"{name}.weight.lora_b"
        grad[begin] = bad
        assert not_finite_tensor(adapter, grad) == f"{name}.weight.lora_a"
