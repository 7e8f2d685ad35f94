"""Models made for benchmarks: sound files of the shape and type that was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.models import TINYLLAMA, make_random
from engine import Context, Model
from engine.dtypes import BF16, Q8_0
from engine.kernels import decode

SMALL = replace(TINYLLAMA, n_layer=2, n_embd=64, n_ff=96, n_head=4, n_head_kv=2, n_vocab=300)


@pytest.mark.parametrize("dtype", [BF16, Q8_0], ids=lambda t: t.name)
def test_a_random_model_loads_and_its_weights_spread_as_they_should(tmp_path, dtype):
    path = tmp_path / "model.gguf"
    make_random(path, "small", SMALL, dtype)
    model = Model.load(path, check_tensors=True)
    assert (model.hparams.n_layer, model.hparams.n_head_kv) == (2, 2)
    info = model.file.tensors["blk.1.ffn_up.weight"]
    assert info.dtype is dtype
    values = decode(dtype.id, model.file.data(info.name), int(np.prod(info.shape)))
    assert 0.018 < values.std() < 0.022
    logits = Context(model, 32).evaluate(model.tokenizer.encode("a sea"))
    assert np.isfinite(logits).all() and logits.std() > 0


def test_tensors_differ(tmp_path):
    path = tmp_path / "model.gguf"
    make_random(path, "small", SMALL, BF16)
    file = Model.load(path).file
    first, second = (file.data(f"blk.{i}.attn_q.weight") for i in (0, 1))
    assert not np.array_equal(first, second)
