"""Models in other types: bytes, keys, refusals; nothing is written that is not sound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import dtypes, kernels
from engine.dtypes import DType
from engine.errors import DataError, EngineError, FormatError
from engine.file_types import BY_NAME, TARGETS
from engine.gguf import ValueType, read_gguf, write_gguf
from engine.imatrix import ImportanceMatrix
from engine.mixture import Wish
from engine.quantize import Planned, Quantization
from tests import reference

Array = NDArray[Any]
U32, STRING = ValueType.U32, ValueType.STRING

KEYS: list[tuple[str, Any, Any]] = [
    ("general.architecture", STRING, "llama"),
    ("general.file_type", U32, 0),
    ("llama.block_count", U32, 2),
    ("llama.attention.head_count", U32, 4),
    ("llama.attention.head_count_kv", U32, 2),
    ("split.count", U32, 0),
    ("general.name", STRING, "two layers"),
]
N_ROWS = 300  # of the largest matrix: more than a part


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 256)}
    for i in range(2):
        for name, shape in {
            "attn_norm": (256,),
            "attn_q": (64, 256),
            "attn_v": (32, 256),
            "ffn_down": (N_ROWS, 512),
        }.items():
            found[f"blk.{i}.{name}.weight"] = shape
    return {**found, "output_norm.weight": (256,), "output.weight": (40, 256)}


def make_model(
    path: Path, values: dict[str, Array], dtype: DType = dtypes.F32, keys: Any = KEYS
) -> Path:
    tensors = []
    for name, x in values.items():
        kind = dtype if x.ndim > 1 else dtypes.F32
        tensors.append((name, kind, x.shape, reference.encode(kind, x)))
    write_gguf(path, keys, tensors)
    return path


@pytest.fixture
def values(rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes().items()}


@pytest.fixture
def model(tmp_path: Path, values: dict[str, Array]) -> Path:
    return make_model(tmp_path / "model.gguf", values)


def quantize(
    model: Path, target: str, *, n_threads: int = 1, out: str = "out.gguf", **how: Any
) -> Path:
    """Quantize; what Wish takes goes there."""
    path = model.with_name(out)
    wishes = {name: how.pop(name) for name in list(how) if name in Wish.__dataclass_fields__}
    with read_gguf(model) as file:
        Quantization(file, Wish(BY_NAME[target], **wishes), **how).write(path, n_threads)
    return path


@pytest.mark.parametrize("target", [t for t in TARGETS if t.name != "Q2_K_S"], ids=lambda t: t.name)
def test_every_tensor_is_the_kernels_bytes_of_its_chosen_type(
    model: Path, values: dict[str, Array], target: Any
) -> None:
    with read_gguf(model) as source, read_gguf(quantize(model, target.name)) as file:
        assert list(file.tensors) == list(values)
        for name, x in values.items():
            info = file.tensors[name]
            if info.dtype is dtypes.F32:
                assert bytes(file.data(name)) == bytes(source.data(name))
            else:
                assert bytes(file.data(name)) == kernels.quantize(info.dtype.id, x).tobytes()
        matrices = {info.dtype for info in file.tensors.values() if len(info.shape) > 1}
        assert target.dtype in matrices


def test_bytes_do_not_depend_on_the_threads(model: Path) -> None:
    files = [quantize(model, "Q4_K_M", n_threads=n, out=f"{n}.gguf") for n in (1, 2, 5)]
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_keys_are_kept_but_for_those_of_parts_and_types(model: Path) -> None:
    with read_gguf(model) as source, read_gguf(quantize(model, "Q5_K_M")) as file:
        kept = [key for key in source.metadata if key != "split.count"]
        assert list(file.metadata) == [*kept, "general.quantization_version"]
        assert file.metadata["general.file_type"] == 17
        assert file.metadata["general.quantization_version"] == 2
        assert file.metadata["general.name"] == "two layers"
    with read_gguf(quantize(model, "COPY")) as file:
        assert file.metadata["general.file_type"] == 0


def test_keys_can_be_set(model: Path) -> None:
    overrides = {"general.name": "other", "new.count": 3, "new.share": 0.5, "new.flag": True}
    with read_gguf(quantize(model, "F16", overrides=overrides)) as file:
        assert {key: file.metadata[key] for key in overrides} == overrides
        kinds = [file.value_types[f"new.{key}"] for key in ("count", "share", "flag")]
        assert kinds == [ValueType.I32, ValueType.F32, ValueType.BOOL]
    with pytest.raises(FormatError, match=r"key general\.name: has type STRING"):
        quantize(model, "F16", overrides={"general.name": 1})


def test_importance_reaches_its_tensors(model: Path, values: dict[str, Array]) -> None:
    name = "blk.1.attn_q.weight"
    w = np.linspace(0, 2, 256, dtype=np.float32)
    matrix = ImportanceMatrix("m.dat", {name: w}, 5, "text")
    with read_gguf(model) as source:
        plan = Quantization(source, Wish(BY_NAME["Q4_K_S"]), imatrix=matrix)
        assert len([x for x in plan.warnings if "the importance matrix lacks it" in x]) == 7
    with read_gguf(quantize(model, "Q4_K_S", imatrix=matrix)) as file:
        data = bytes(file.data(name))
        assert data == kernels.quantize(dtypes.Q4_K.id, values[name], w).tobytes()
        assert data != kernels.quantize(dtypes.Q4_K.id, values[name]).tobytes()
        told = [file.metadata[f"quantize.imatrix.{key}"] for key in ("file", "dataset")]
        assert told == ["m.dat", "text"]
        counts = [f"quantize.imatrix.{key}_count" for key in ("entries", "chunks")]
        assert [file.metadata[key] for key in counts] == [1, 5]


def test_an_importance_matrix_of_another_model_is_refused(model: Path) -> None:
    wrong = np.ones(7, np.float32)
    matrix = ImportanceMatrix("m.dat", {"blk.0.attn_q.weight": wrong})
    problem = r"m\.dat: tensor blk\.0\.attn_q\.weight: 7 importances for rows of 256"
    with pytest.raises(DataError, match=problem):
        quantize(model, "Q4_K_S", imatrix=matrix)
    # Embeddings are looked up, not multiplied: their entry is of no use anyway.
    quantize(model, "Q4_K_S", imatrix=ImportanceMatrix("m.dat", {"token_embd.weight": wrong}))


def test_two_bits_need_importances(model: Path, values: dict[str, Array]) -> None:
    with pytest.raises(EngineError, match="Q2_K_S needs an importance matrix"):
        quantize(model, "Q2_K_S")
    full = {name: np.ones(x.shape[-1], np.float32) for name, x in values.items()}
    with read_gguf(quantize(model, "Q2_K_S", imatrix=ImportanceMatrix("m", full))) as file:
        assert file.tensors["blk.0.attn_q.weight"].dtype is dtypes.Q2_K
        assert file.metadata["general.file_type"] == 21
    del full["blk.1.attn_q.weight"]
    with pytest.raises(DataError, match=r"blk\.1\.attn_q\.weight: the importance matrix lacks it"):
        quantize(model, "Q2_K_S", imatrix=ImportanceMatrix("m", full))


def test_what_is_quantized_is_taken_on_request_alone(
    tmp_path: Path, values: dict[str, Array]
) -> None:
    model = make_model(tmp_path / "q8.gguf", values, dtypes.Q8_0)
    with pytest.raises(DataError, match=r"token_embd\.weight: requantizing from type Q8_0 is dis"):
        quantize(model, "Q4_0")
    quantize(model, "Q8_0")  # nothing changes
    with read_gguf(quantize(model, "Q4_0", allow_requantize=True)) as file:
        name = "blk.0.attn_q.weight"
        old = reference.encode(dtypes.Q8_0, values[name])
        x = reference.decode_row(dtypes.Q8_0, old).reshape(values[name].shape)
        assert bytes(file.data(name)) == kernels.quantize(dtypes.Q4_0.id, x).tobytes()


def test_half_precision_is_no_quantization(tmp_path: Path, values: dict[str, Array]) -> None:
    for dtype in (dtypes.F16, dtypes.BF16):
        model = make_model(tmp_path / f"{dtype.name}.gguf", values, dtype)
        with read_gguf(quantize(model, "Q6_K")) as file:
            name = "blk.0.ffn_down.weight"
            x = reference.decode_row(dtype, reference.encode(dtype, values[name]))
            x = x.reshape(values[name].shape)
            assert bytes(file.data(name)) == kernels.quantize(dtypes.Q6_K.id, x).tobytes()


@pytest.mark.parametrize("target", ["Q4_K_S", "F16", "COPY"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_named_and_nothing_is_written(
    tmp_path: Path, values: dict[str, Array], target: str, bad: float
) -> None:
    values["blk.1.ffn_down.weight"][N_ROWS - 1, 300] = bad
    model = make_model(tmp_path / "model.gguf", values)
    problem = rf"blk\.1\.ffn_down\.weight: the value at row {N_ROWS - 1}, element 300 is infinite"
    with pytest.raises(DataError, match=problem):
        quantize(model, target, n_threads=2)
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("target", ["F16", "Q8_0", "Q4_K_S", "Q6_K", "IQ4_XS"])
def test_what_the_type_cannot_hold_is_named(
    tmp_path: Path, values: dict[str, Array], target: str
) -> None:
    values["blk.0.attn_q.weight"][3] *= 1e12
    model = make_model(tmp_path / "model.gguf", values)
    with pytest.raises(
        DataError, match=r"blk\.0\.attn_q\.weight: the \w+ at row 3, element 0 is be"
    ):
        quantize(model, target)
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_the_model_itself_is_never_overwritten(model: Path) -> None:
    before = model.read_bytes()
    (model.parent / "link.gguf").symlink_to(model)
    for out in ("model.gguf", "link.gguf"):
        with pytest.raises(EngineError, match="is the model itself; choose another name"):
            quantize(model, "F16", out=out)
    assert model.read_bytes() == before


def test_what_is_no_model_is_refused(tmp_path: Path, values: dict[str, Array]) -> None:
    name = [("general.architecture", STRING, "llama")]
    adapter = make_model(
        tmp_path / "a.gguf", values, keys=[*name, ("general.type", STRING, "adapter")]
    )
    with pytest.raises(FormatError, match="holds no model but one adapter"):
        quantize(adapter, "F16")
    experts = make_model(tmp_path / "b.gguf", values, keys=[*KEYS, ("llama.expert_count", U32, 8)])
    with pytest.raises(FormatError, match="mixtures of experts cannot be quantized"):
        quantize(experts, "F16")
    bare = make_model(tmp_path / "c.gguf", values, keys=name)
    with pytest.raises(FormatError, match=r"key llama\.attention\.head_count: is missing"):
        quantize(bare, "F16")


def test_progress_is_told(model: Path) -> None:
    told: list[int] = []
    done: list[Planned] = []
    with read_gguf(model) as file:
        plan = Quantization(file, Wish(BY_NAME["Q4_K_M"]))
        plan.write(model.with_name("out.gguf"), 2, told.append, done.append)
        assert sum(told) == plan.n_bytes
        assert [item.info.name for item in done] == list(file.tensors)
    with read_gguf(model.with_name("out.gguf")) as file:
        assert sum(info.n_bytes for info in file.tensors.values()) == plan.new_bytes
