"""Contexts: the arithmetic that is asked for, logits of one token and of many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import engine.model
from engine import kernels
from engine.dtypes import BF16, F32, Q8_0
from engine.errors import EngineError, OptionError
from engine.gguf import read_gguf, write_gguf
from engine.lora import Adapter, BaseInfo, read_adapter
from engine.model import Context, Model

TOKENS = list(range(1, 41))

# Queries and keys are rounded to halves: another order of sums tips some of them over.
HALF = 5e-4


def in_float32(source: Path, target: Path) -> Path:
    """Write the model once more, every BF16 weight as the F32 number that it is."""
    with read_gguf(source) as file:
        keys = [(key, file.value_types[key], value) for key, value in file.metadata.items()]
        tensors = []
        for name, info in file.tensors.items():
            n = int(np.prod(info.shape))
            values = kernels.decode(info.dtype.id, file.data(name), n)
            tensors.append((name, F32, info.shape, values))
        assert any(info.dtype is BF16 for info in file.tensors.values())
        write_gguf(target, keys, tensors)
    return target


def last_logits(path: Path, bf16: str, isa: str | None) -> NDArray[np.float32]:
    return Context(Model.load(path), 64, bf16=bf16, isa=isa).evaluate(TOKENS).copy()


def test_exact_means_what_the_same_weights_in_float32_give(
    data_dir: Path, tmp_path: Path, isa: str
) -> None:
    bf16 = data_dir / "mini-bf16.gguf"
    expected = last_logits(in_float32(bf16, tmp_path / "f32.gguf"), "fast", isa)
    np.testing.assert_allclose(last_logits(bf16, "exact", isa), expected, rtol=0, atol=1e-5)
    fast = np.abs(last_logits(bf16, "fast", isa) - expected).max()
    assert (fast > 1e-5) == kernels.prefers_pairs(isa)
    assert fast < 0.1


def test_an_unknown_arithmetic_is_refused(data_dir: Path) -> None:
    with pytest.raises(OptionError, match="--bf16: half is not one of fast, exact"):
        Context(Model.load(data_dir / "mini-bf16.gguf"), 64, bf16="half")


def test_an_adapter_leaves_a_quantized_base_as_it_is_and_is_not_rounded_away(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes((data_dir / "mini-q8_0.gguf").read_bytes())
    model = Model.load(path)
    adapter = read_adapter(data_dir / "a-lora-20.bin", BaseInfo.of(model))
    pair = adapter.pairs["output"]
    adapter.pairs = {"output": pair}  # what comes before the last product stays the same
    small = 0.1

    def logits(*adapters: tuple[Adapter, float]) -> NDArray[np.float32]:
        return Context(model, 64, adapters=adapters).evaluate(TOKENS).copy()

    plain = logits()
    whole, little = logits((adapter, 1.0)) - plain, logits((adapter, small)) - plain
    # The sums of the products are of the logits' size, and so is what float32 leaves of them.
    step = 8 * np.finfo(np.float32).eps * np.abs(plain).max()
    np.testing.assert_allclose(little, small * whole, rtol=0, atol=step)
    assert np.abs(little).max() > 10 * step

    # Added to the weights it would be lost.
    data = model.file.data("output.weight")
    weights = kernels.decode(Q8_0.id, data, pair.n_in * pair.n_out)
    added = weights.reshape(pair.n_out, pair.n_in) + np.float32(small) * (pair.b.T @ pair.a)
    merged = np.frombuffer(kernels.encode(Q8_0.id, added.astype(np.float32).ravel()), np.uint8)
    before = np.frombuffer(kernels.encode(Q8_0.id, weights), np.uint8)
    assert np.array_equal(merged, before)

    # The weights are the file's own bytes, in its map, and have not been written.
    assert str(path) in Path("/proc/self/maps").read_text()
    assert path.read_bytes() == (data_dir / "mini-q8_0.gguf").read_bytes()


# ---------------------------------------------------------------- logits of many tokens


def every_row(context: Context, tokens: list[int], first: int) -> list[NDArray[np.float32]]:
    return [block.copy() for block in context.logits(tokens, first)]


@pytest.mark.parametrize("first", [0, 1, 7, 12, 19])
def test_logits_of_many_tokens_are_those_of_each_as_the_last(data_dir: Path, first: int) -> None:
    model = Model.load(data_dir / "mini-f32.gguf")
    rows = np.concatenate(every_row(Context(model, 64, n_ubatch=8), TOKENS[:20], first))
    assert rows.shape == (20 - first, model.hparams.n_vocab)
    for i, row in enumerate(rows):
        last = Context(model, 64).evaluate(TOKENS[: first + i + 1])
        np.testing.assert_allclose(row, last, rtol=0, atol=HALF)


def test_logits_come_in_blocks_that_memory_allows(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(data_dir / "mini-q8_0.gguf")
    (together,) = every_row(Context(model, 64), TOKENS, 4)
    monkeypatch.setattr(engine.model, "LOGIT_BYTES", 10 * 4 * model.hparams.n_vocab)
    blocks = every_row(Context(model, 64), TOKENS, 4)
    assert [len(block) for block in blocks] == [10, 10, 10, 6]
    np.testing.assert_allclose(np.concatenate(blocks), together, rtol=0, atol=1e-5)


def test_logits_go_on_behind_what_is_in_the_cache(data_dir: Path) -> None:
    model = Model.load(data_dir / "mini-f32.gguf")
    context = Context(model, 64)
    context.evaluate(TOKENS[:15])
    (rows,) = every_row(context, TOKENS[15:], 0)
    assert context.n_past == len(TOKENS)
    np.testing.assert_allclose(
        rows[-1], last_logits(model.file.path, "fast", isa=None), rtol=0, atol=HALF
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "0 tokens after 0 do not fit"), ([1] * 65, "65 tokens after 0 do not fit"),
     ([1, 10**6], "token 1000000 is not in the vocabulary")],
)  # fmt: skip
def test_tokens_that_cannot_be_evaluated_are_refused_at_once(
    data_dir: Path, tokens: list[int], message: str
) -> None:
    context = Context(Model.load(data_dir / "mini-f32.gguf"), 64)
    with pytest.raises(EngineError, match=message):
        context.logits(tokens)
