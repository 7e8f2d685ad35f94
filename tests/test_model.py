"""Contexts: the arithmetic that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import kernels
from engine.dtypes import BF16, F32
from engine.errors import OptionError
from engine.gguf import read_gguf, write_gguf
from engine.model import Context, Model

TOKENS = list(range(1, 41))


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


def last_logits(path: Path, bf16: str, isa: str) -> NDArray[np.float32]:
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
