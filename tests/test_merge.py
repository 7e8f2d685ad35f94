"""Adapters merged into weights: the merged model is the base with its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.dtypes import BF16, F16, F32, Q8_0, DType
from engine.errors import DataError
from engine.file_types import UNIFORM
from engine.gguf import GGUFFile, TensorInfo, read_gguf, write_gguf
from engine.kernels import decode, encode_bf16, encode_f16
from engine.lora import KINDS, Adapter, BaseInfo, create_adapter, read_adapter, write_adapter
from engine.merge import TensorReport, merge
from engine.model import Context, Model

TOKENS = list(range(3, 43))
RANKS = dict(zip(KINDS, [3, 2, 5, 1, 4, 4, 2, 4, 3, 4, 5, 4], strict=True))
Adapters = Sequence[tuple[Adapter, float]]


def values_of(file: GGUFFile, name: str) -> NDArray[np.float32]:
    info = file.tensors[name]
    return decode(info.dtype.id, file.data(name), int(np.prod(info.shape))).reshape(info.shape)


def rewritten(source: Path, target: Path, tensors: list) -> Path:
    """Write the model of a file with other tensors: (name, type, values)."""
    encoders = {F32: lambda v: v, F16: encode_f16, BF16: encode_bf16}
    with read_gguf(source) as file:
        keys = [(key, file.value_types[key], value) for key, value in file.metadata.items()]
    stored = [(n, t, v.shape, encoders[t](v.reshape(-1))) for n, t, v in tensors]
    write_gguf(target, keys, stored)
    return target


def all_tensors(path: Path, dtype: DType = F32) -> list:
    with read_gguf(path) as file:
        return [
            (name, dtype if len(info.shape) > 1 else F32, values_of(file, name))
            for name, info in file.tensors.items()
        ]


def tied(source: Path, target: Path) -> Path:
    return rewritten(source, target, [t for t in all_tensors(source) if t[0] != "output.weight"])


def joint(source: Path, target: Path) -> Path:
    """Queries, keys and values of a layer in one tensor."""
    tensors = all_tensors(source)
    by_name = {name: values for name, _, values in tensors}
    kept = [
        t for t in tensors if not t[0].endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight"))
    ]
    for layer in range(2):
        rows = [by_name[f"blk.{layer}.attn_{kind}.weight"] for kind in "qkv"]
        kept.append((f"blk.{layer}.attn_qkv.weight", F32, np.concatenate(rows)))
    return rewritten(source, target, kept)


def trained(model: Model, rng: np.random.Generator, kinds: Sequence[str] = KINDS, **how) -> Adapter:
    """An adapter of several ranks whose products are as large as if it were trained."""
    ranks = {kind: RANKS[kind] for kind in kinds}
    adapter = create_adapter(model.adapter_shapes(ranks), **({"r": 4, "alpha": 6, "seed": 1} | how))
    for pair in adapter.pairs.values():
        pair.b[:] = rng.standard_normal(pair.b.shape, np.float32) * np.float32(0.1)
    return adapter


def logits(model: Model, adapters: Adapters = ()) -> NDArray[np.float32]:
    """In float32 throughout: nothing but the order of sums differs."""
    context = Context(model, 64, adapters=adapters, cache_types=(F32, F32), bf16="exact")
    return np.concatenate([block.copy() for block in context.logits(TOKENS)])


def merged(model: Model, adapters: Adapters, path: Path, **how) -> tuple[Model, list[TensorReport]]:
    reports: list[TensorReport] = []
    merge(model, adapters, path, on_tensor=reports.append, n_threads=2, **how)
    return Model.load(path), reports


def check_same(model: Model, adapters: Adapters, path: Path, **how) -> list[TensorReport]:
    new, reports = merged(model, adapters, path, **how)
    expected = logits(model, adapters)
    assert np.abs(expected - logits(model)).max() > 0.1
    # Sums in another order move every logit by about as much, near zero as well as far from it.
    np.testing.assert_allclose(logits(new), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return reports


@pytest.fixture
def f32(data_dir: Path) -> Path:
    return data_dir / "mini-f32.gguf"


# ---------------------------------------------------------------- the sum


@pytest.mark.parametrize("name", ["mini-f32.gguf", "mini-gqa-f32.gguf"])
def test_a_merged_model_is_the_base_with_its_adapter(name, data_dir, tmp_path, rng) -> None:
    model = Model.load(data_dir / name)
    reports = check_same(model, [(trained(model, rng), 1.0)], tmp_path / "new.gguf")
    assert [r.name for r in reports] == list(model.file.tensors)
    assert all(r.touched and r.rms_error == 0 and r.rms_change > 0 for r in reports)


def test_several_adapters_add_up_each_with_its_scales(f32, tmp_path, rng) -> None:
    model = Model.load(f32)
    adapters = [
        (trained(model, rng, alpha=3), 0.7),
        (trained(model, rng, ["attn_q", "ffn_down", "attn_norm"], r=7, alpha=2, seed=3), -1.5),
        (trained(model, rng, ["attn_v", "output"], r=9, seed=4, rslora=True), 2.0),
    ]
    check_same(model, adapters, tmp_path / "new.gguf")


@pytest.mark.parametrize("form", ["a.bin", "a.gguf", "a-peft/"])
def test_adapters_of_every_form_can_be_merged(form, f32, tmp_path, rng) -> None:
    model = Model.load(f32)
    kinds = [kind for kind in KINDS if not kind.endswith("norm")]
    base = BaseInfo.of(model)
    path = str(tmp_path / form) + ("/" if form.endswith("/") else "")
    write_adapter(trained(model, rng, kinds), path, base)
    check_same(model, [(read_adapter(path, base), 1.0)], tmp_path / "new.gguf")


def test_joint_queries_keys_and_values_take_the_adapters_of_each(data_dir, tmp_path, rng) -> None:
    model = Model.load(joint(data_dir / "mini-gqa-f32.gguf", tmp_path / "joint.gguf"))
    for kinds in (KINDS, ["attn_k"]):
        adapters = [(trained(model, rng, kinds), 3.0)]
        check_same(model, adapters, tmp_path / "new.gguf")


@pytest.mark.parametrize(
    ("kinds", "own_output"),
    [
        (["token_embd"], True),
        (["output"], True),
        (["token_embd", "output"], True),
        (["attn_q", "attn_v", "ffn_down"], False),
    ],
)
def test_a_shared_output_becomes_its_own_where_either_is_adapted(
    kinds, own_output, f32, tmp_path, rng
) -> None:
    model = Model.load(tied(f32, tmp_path / "tied.gguf"))
    assert model.weights.tied
    reports = check_same(model, [(trained(model, rng, kinds), 4.0)], tmp_path / "new.gguf")
    with read_gguf(tmp_path / "new.gguf") as file:
        assert ("output.weight" in file.tensors) == own_output
        if kinds == ["token_embd"]:
            embedding = model.file.data("token_embd.weight")
            np.testing.assert_array_equal(file.data("output.weight"), embedding)
    touched = {r.name for r in reports if r.touched}
    assert len(touched) == sum(1 if k in ("token_embd", "output") else 2 for k in kinds)


def test_without_adapters_everything_is_copied(data_dir, tmp_path) -> None:
    model = Model.load(data_dir / "mini-q8_0.gguf")
    _, reports = merged(model, [], tmp_path / "new.gguf")
    assert not any(r.touched for r in reports)
    with read_gguf(tmp_path / "new.gguf") as file:
        assert list(file.metadata) == list(model.file.metadata)
        assert dict(file.value_types) == dict(model.file.value_types)
        for name, info in model.file.tensors.items():
            assert file.tensors[name].dtype is info.dtype
            np.testing.assert_array_equal(file.data(name), model.file.data(name))


# ---------------------------------------------------------------- types and errors of rounding


def exact(model: Model, adapters: Adapters, info: TensorInfo) -> NDArray[np.float64]:
    """The weights and what adapters add, in float64."""
    name = info.name.removesuffix(".weight")
    values = values_of(model.file, info.name).astype(np.float64)
    for adapter, scale in adapters:
        if name in adapter.pairs:
            pair = adapter.pairs[name]
            product = pair.b.astype(np.float64).T @ pair.a.astype(np.float64)
            values += (scale * adapter.scale * product).reshape(info.shape)
    return values


@pytest.mark.parametrize("name", ["mini-bf16.gguf", "mini-f16.gguf", "mini-q8_0.gguf"])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_every_tensor_keeps_its_type_and_its_error_is_told(
    name, n_threads, data_dir, tmp_path, rng
) -> None:
    model = Model.load(data_dir / name)
    adapters = [(trained(model, rng), 0.5)]
    reports: list[TensorReport] = []
    path = tmp_path / "new.gguf"
    merge(model, adapters, path, n_threads=n_threads, on_tensor=reports.append)
    with read_gguf(path) as file:
        for report, info in zip(reports, model.file.tensors.values(), strict=True):
            wanted = exact(model, adapters, info)
            error = values_of(file, info.name) - wanted
            assert report.before is report.after is file.tensors[info.name].dtype is info.dtype
            assert report.n_bytes == info.n_bytes
            change = wanted - values_of(model.file, info.name)
            assert report.rms_change == pytest.approx(np.sqrt((change**2).mean()), rel=1e-4)
            rms = np.sqrt((error**2).mean())
            assert report.rms_error == pytest.approx(rms, rel=1e-2, abs=1e-7)
            assert report.largest_error == pytest.approx(np.abs(error).max(), rel=1e-2, abs=1e-6)
            step = {F32: 2e-7, F16: 2**-11, BF16: 2**-8, Q8_0: 1 / 127}[info.dtype]
            assert np.abs(error).max() <= step * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [t for t in UNIFORM if t.block <= 32])
def test_all_matrices_can_get_one_type(dtype, f32, tmp_path, rng) -> None:
    model = Model.load(f32)
    adapters = [(trained(model, rng, ["attn_q"]), 1.0)]
    new, reports = merged(model, adapters, tmp_path / "new.gguf", dtype=dtype)
    types = {info.dtype for info in new.file.tensors.values() if len(info.shape) > 1}
    assert types == {dtype}
    assert {i.dtype for i in new.file.tensors.values() if len(i.shape) == 1} == {F32}
    assert new.file.metadata["general.file_type"] == UNIFORM[dtype]
    assert {r.after for r in reports if r.touched} == {dtype}
    for info, report in zip(new.file.tensors.values(), reports, strict=True):
        error = values_of(new.file, info.name) - exact(
            model, adapters, model.file.tensors[info.name]
        )
        assert report.rms_error == pytest.approx(np.sqrt((error**2).mean()), rel=1e-2, abs=1e-7)
    atol = {F32: 1e-5, F16: 0.02, BF16: 0.2, Q8_0: 0.5}.get(dtype, 5)
    np.testing.assert_allclose(logits(new), logits(model, adapters), rtol=0, atol=atol)


def test_what_adapters_touch_can_be_kept_from_quantization(data_dir, tmp_path, rng) -> None:
    model = Model.load(data_dir / "mini-q8_0.gguf")
    adapters = [(trained(model, rng, ["attn_q", "attn_norm"]), 1.0)]
    _, plain = merged(model, adapters, tmp_path / "plain.gguf")
    _, saved = merged(model, adapters, tmp_path / "saved.gguf", rescue=True)
    for before, after in zip(plain, saved, strict=True):
        if after.touched and before.after is Q8_0:
            assert after.after is BF16
            assert after.rms_error < before.rms_error
        else:
            assert after.after is before.after


@pytest.mark.parametrize("name", ["mini-f32.gguf", "mini-f16.gguf", "mini-bf16.gguf"])
def test_what_is_not_quantized_needs_no_rescue(name, data_dir, tmp_path, rng) -> None:
    model = Model.load(data_dir / name)
    adapters = [(trained(model, rng), 1.0)]
    _, reports = merged(model, adapters, tmp_path / "new.gguf", rescue=True)
    assert all(r.after is r.before for r in reports)
    _, reports = merged(model, adapters, tmp_path / "q8.gguf", rescue=True, dtype=Q8_0)
    assert {r.after for r in reports} == {BF16, F32}


@pytest.mark.parametrize(
    ("scale", "dtype", "message"),
    [
        (1e35, None, "blk.0.attn_q.weight: a merged weight is infinite or NaN"),
        (1e6, F16, "blk.0.attn_q.weight: a merged weight is beyond F16; choose another --type"),
    ],
)
def test_weights_that_cannot_be_stored_are_refused(scale, dtype, message, f32, tmp_path, rng):
    model = Model.load(f32)
    adapter = trained(model, rng, ["attn_q"])
    pair = adapter.pairs["blk.0.attn_q"]
    pair.a[:], pair.b[:] = 1e3, 10
    with pytest.raises(DataError, match=message):
        merge(model, [(adapter, scale)], tmp_path / "new.gguf", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_file(f32, tmp_path, rng) -> None:
    model = Model.load(f32)

    def stop(report: TensorReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(model, [(trained(model, rng), 1.0)], tmp_path / "new.gguf", on_tensor=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_base_can_be_replaced_by_its_merged_self(f32, tmp_path, rng) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(f32.read_bytes())
    model = Model.load(path)
    adapters = [(trained(model, rng), 1.0)]
    expected = logits(model, adapters)
    new, _ = merged(model, adapters, path)
    np.testing.assert_allclose(logits(new), expected, rtol=1e-5, atol=1e-5)
