"""GGUF files read and written: values, tensors, versions, the oracle, and the way to the disk."""

from __future__ import annotations

import os
import resource
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import dtypes
from engine.errors import EngineError, FormatError
from engine.gguf import GGUFFile, KeyType, ValueType, atomic_write, read_gguf, write_gguf
from engine.gguf_write import Deferred
from tests.gguf_builder import small_file

Key = tuple[str, KeyType, Any]

INTEGERS = [
    (ValueType.U8, np.uint8),
    (ValueType.I8, np.int8),
    (ValueType.U16, np.uint16),
    (ValueType.I16, np.int16),
    (ValueType.U32, np.uint32),
    (ValueType.I32, np.int32),
    (ValueType.U64, np.uint64),
    (ValueType.I64, np.int64),
]
FLOATS = [(ValueType.F32, np.float32), (ValueType.F64, np.float64)]
MODELS = ["mini-f32", "mini-f16", "mini-bf16", "mini-q8_0", "mini-gqa-f32"]
CHECKPOINTS = ["a-chk-10", "a-chk-20", "g-rtl-chk-10"]


def keys_of(file: GGUFFile) -> list[Key]:
    return [(name, file.value_types[name], value) for name, value in file.metadata.items()]


def rewrite(file: GGUFFile, path: Path) -> bytes:
    tensors = [(t.name, t.dtype, t.shape, file.data(t.name)) for t in file.tensors.values()]
    write_gguf(path, keys_of(file), tensors)
    return path.read_bytes()


def written(path: Path, *keys: Key) -> GGUFFile:
    write_gguf(path, keys, [])
    return read_gguf(path)


# Values


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_file_made_by_hand_is_read_in_each_version(tmp_path: Path, version: int) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file(version))
    with read_gguf(path) as file:
        assert (file.path, file.version, file.alignment) == (path, version, 32)
        scalars = {k: v for k, v in file.metadata.items() if not isinstance(v, list | np.ndarray)}
        assert scalars == {
            "u8": 200,
            "i8": -100,
            "u16": 65_000,
            "i16": -30_000,
            "u32": 4_000_000_000,
            "i32": -2_000_000_000,
            "f32": 0.5,
            "bool": True,
            "string": "Zoë",
            "u64": 1 << 63,
            "i64": -1 << 63,
            "f64": 0.1,
        }
        assert file.metadata["floats"].tolist() == [1, 2, 3]
        assert file.metadata["floats"].dtype == np.float32
        assert file.metadata["bools"].tolist() == [False, True]
        assert file.metadata["bools"].dtype == np.bool_
        assert file.metadata["texts"] == [b"a", b"\xff\x00", b""]
        assert file.metadata["none"] == []
        assert file.value_types["texts"] == (ValueType.ARRAY, ValueType.STRING)
        matrix, q8 = file.tensors.values()
        assert (matrix.shape, matrix.dtype, matrix.n_bytes) == ((3, 2), dtypes.F32, 24)
        assert (q8.shape, q8.dtype, q8.n_bytes) == ((1, 32), dtypes.Q8_0, 34)
        assert file.data("matrix").view("<f4").tolist() == [0, 1, 2, 3, 4, 5]
        assert file.data("q8").tolist() == list(range(34))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_each_version_is_rewritten_as_the_same_file_of_version_3(
    tmp_path: Path, version: int
) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small_file(version))
    expected = small_file()
    expected += bytes(-len(expected) % 32)
    assert rewrite(read_gguf(path), tmp_path / "again.gguf") == expected


@pytest.mark.parametrize(("kind", "dtype"), INTEGERS, ids=lambda p: getattr(p, "name", ""))
def test_integers_round_trip_to_their_limits(
    tmp_path: Path, rng: np.random.Generator, kind: ValueType, dtype: type[np.integer]
) -> None:
    limits = np.iinfo(dtype)
    many = rng.integers(limits.min, limits.max, 100, dtype=dtype, endpoint=True)
    file = written(
        tmp_path / "k.gguf",
        ("low", kind, int(limits.min)),
        ("high", kind, int(limits.max)),
        ("many", (ValueType.ARRAY, kind), many),
        ("few", (ValueType.ARRAY, kind), [1, 2]),
        ("none", (ValueType.ARRAY, kind), []),
    )
    assert file.get_int("low") == limits.min and file.get_int("high") == limits.max
    assert file.metadata["many"].dtype == dtype
    assert file.metadata["many"].flags.aligned and file.metadata["many"].flags.writeable
    np.testing.assert_array_equal(file.metadata["many"], many)
    assert file.metadata["few"].tolist() == [1, 2]
    assert file.metadata["none"].shape == (0,) and file.metadata["none"].dtype == dtype
    assert file.value_types["high"] is kind
    assert file.value_types["none"] == (ValueType.ARRAY, kind)


@pytest.mark.parametrize(("kind", "dtype"), FLOATS, ids=lambda p: getattr(p, "name", ""))
def test_floats_round_trip_with_their_special_values(
    tmp_path: Path, rng: np.random.Generator, kind: ValueType, dtype: type[np.floating]
) -> None:
    many = rng.standard_normal(100).astype(dtype)
    many[:5] = [np.inf, -np.inf, np.nan, -0.0, np.finfo(dtype).smallest_subnormal]
    file = written(
        tmp_path / "k.gguf",
        ("one", kind, float(many[9])),
        ("many", (ValueType.ARRAY, kind), many),
    )
    assert file.get_float("one") == many[9]
    assert file.metadata["many"].tobytes() == many.tobytes()
    assert file.metadata["many"].dtype == dtype


def test_strings_and_bools_round_trip(tmp_path: Path) -> None:
    texts = [b"", b"\xff\xfe", "▁é".encode(), bytes(1000)]
    file = written(
        tmp_path / "k.gguf",
        ("text", ValueType.STRING, "Zoë\n\0"),
        ("empty", ValueType.STRING, ""),
        ("texts", (ValueType.ARRAY, ValueType.STRING), texts),
        ("true", ValueType.BOOL, True),
        ("false", ValueType.BOOL, False),
        ("bools", (ValueType.ARRAY, ValueType.BOOL), np.array([True, False])),
    )
    assert file.get_str("text") == "Zoë\n\0" and file.get_str("empty") == ""
    assert file.metadata["texts"] == texts
    assert file.get_bool("true") is True and file.get_bool("false") is False
    assert file.metadata["bools"].tolist() == [True, False]


# Getters


def test_getters_give_values_or_defaults(tmp_path: Path) -> None:
    file = written(tmp_path / "k.gguf", ("n", ValueType.U64, 7), ("x", ValueType.F64, 0.5))
    assert file.get_int("n", 3) == 7 and file.get_int("m", 3) == 3
    assert file.get_float("x", 1.5) == 0.5 and file.get_float("y", 1.5) == 1.5
    assert file.get_str("s", "none") == "none"
    assert file.get_bool("b", False) is False


def test_getters_name_the_file_and_key_that_is_missing(tmp_path: Path) -> None:
    file = written(tmp_path / "k.gguf")
    for get in (file.get_int, file.get_float, file.get_str, file.get_bool):
        with pytest.raises(FormatError, match=r"k\.gguf: key llama\.size: is missing"):
            get("llama.size")


@pytest.mark.parametrize("default", [{}, {"default": 1}], ids=["required", "default"])
def test_getters_name_a_wrong_type(tmp_path: Path, default: dict[str, Any]) -> None:
    file = written(
        tmp_path / "k.gguf",
        ("bool", ValueType.BOOL, True),
        ("int", ValueType.I8, 1),
        ("list", (ValueType.ARRAY, ValueType.U32), [1]),
    )
    with pytest.raises(FormatError, match="key bool: has type BOOL, an integer is expected"):
        file.get_int("bool", **default)
    with pytest.raises(FormatError, match="key int: has type I8, a float is expected"):
        file.get_float("int", **default)
    with pytest.raises(FormatError, match="key int: has type I8, a bool is expected"):
        file.get_bool("int", **default)
    with pytest.raises(FormatError, match="key list: has type array of U32, a string is expected"):
        file.get_str("list", **default)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("model", "general.type", "model"),
        ("model", "general.name", "x"),
        ("adapter", "general.type", "adapter"),
        ("checkpoint", "training.type", "finetune_lora"),
    ],
)
def test_the_kind_of_a_file_comes_from_its_keys(
    tmp_path: Path, kind: str, name: str, value: str
) -> None:
    assert written(tmp_path / "k.gguf", (name, ValueType.STRING, value)).kind == kind


# Recorded files


@pytest.mark.parametrize("name", MODELS)
def test_recorded_models_are_read(data_dir: Path, name: str) -> None:
    with read_gguf(data_dir / f"{name}.gguf") as file:
        assert (file.version, file.kind) == (3, "model")
        width, n_vocab = file.get_int("llama.embedding_length"), len(file.metadata[TOKENS])
        n_layer = file.get_int("llama.block_count")
        assert len(file.tensors) == 3 + 9 * n_layer == 21
        assert file.tensors["token_embd.weight"].shape == (n_vocab, width) == (768, 64)
        assert file.tensors["output_norm.weight"].shape == (width,)
        heads = file.get_int("llama.attention.head_count")
        kv_width = width // heads * file.get_int("llama.attention.head_count_kv", heads)
        assert file.tensors["blk.1.attn_k.weight"].shape == (kv_width, width)
        n_ff = file.get_int("llama.feed_forward_length")
        assert file.tensors["blk.0.ffn_down.weight"].shape == (width, n_ff)
        expected = {"q8_0": dtypes.Q8_0, "f16": dtypes.F16, "bf16": dtypes.BF16}
        dtype = expected.get(name.removeprefix("mini-"), dtypes.F32)
        assert file.tensors["blk.0.attn_q.weight"].dtype is dtype
        norm = file.data("output_norm.weight").view("<f4")
        assert np.isfinite(norm).all() and norm.any()


TOKENS = "tokenizer.ggml.tokens"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_recorded_checkpoints_are_read(data_dir: Path, name: str) -> None:
    with read_gguf(data_dir / f"{name}.gguf") as file:
        assert (file.version, file.kind, len(file.metadata)) == (3, "checkpoint", 43)
        assert list(file.tensors)[-1] == "optimizer.adam.second_moments"
        adapters = [t for t in file.tensors.values() if ".lora_" in t.name]
        assert len(adapters) == len(file.tensors) - 2 == 42
        n = file.get_int("optimizer.parameter_count")
        assert sum(int(np.prod(t.shape)) for t in adapters) == n
        assert file.tensors["optimizer.adam.first_moments"].shape == (n,)
        rank = file.get_int("training.lora.rank.attn_q")
        assert file.tensors["blk.0.attn_q.weight.lora_a"].shape == (64, rank)


@pytest.mark.parametrize("name", MODELS + CHECKPOINTS)
def test_recorded_files_are_rewritten_byte_for_byte(
    data_dir: Path, tmp_path: Path, name: str
) -> None:
    path = data_dir / f"{name}.gguf"
    assert rewrite(read_gguf(path), tmp_path / "again.gguf") == path.read_bytes()


# Tensors


def test_tensors_are_written_aligned_and_read_back(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    arrays: list[tuple[str, dtypes.DType, tuple[int, ...], Any]] = [
        ("a", dtypes.F32, (3, 5), rng.standard_normal((3, 5)).astype("<f4")),
        ("b", dtypes.F16, (7,), rng.standard_normal(7).astype("<f2")),
        ("c", dtypes.Q4_1, (2, 1, 2, 64), rng.integers(256, size=160, dtype=np.uint8)),
        ("d", dtypes.F32, (), np.float32(2.5)),
        ("e", dtypes.BF16, (4,), bytearray(range(8))),
    ]
    path = tmp_path / "t.gguf"
    write_gguf(path, [("general.alignment", ValueType.U32, 128)], arrays)
    with read_gguf(path) as file:
        assert file.alignment == 128
        for name, dtype, shape, values in arrays:
            info = file.tensors[name]
            assert (info.shape, info.dtype, info.offset % 128) == (shape, dtype, 0)
            assert file.data(name).tobytes() == bytes(memoryview(values))
    assert path.stat().st_size % 128 == 0


def test_a_tensor_may_come_in_parts_when_its_turn_comes(tmp_path: Path) -> None:
    whole = bytes(range(48))
    asked = []

    def parts() -> Any:
        asked.append(True)
        yield whole[:8]
        yield np.frombuffer(whole[8:], "<f4").reshape(2, 5)

    tensors = [("a", dtypes.F32, (3, 4), parts), ("b", dtypes.F32, (3, 4), whole)]
    write_gguf(tmp_path / "t.gguf", [], tensors)
    with read_gguf(tmp_path / "t.gguf") as file:
        assert file.data("a").tobytes() == file.data("b").tobytes() == whole
    assert asked == [True]


@pytest.mark.parametrize("n_bytes", [44, 52])
def test_parts_that_are_not_the_tensor_leave_the_old_file(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "t.gguf"
    path.write_bytes(b"old")
    with pytest.raises(FormatError, match=f"tensor a: {n_bytes} bytes came, 48 were announced"):
        write_gguf(path, [], [("a", dtypes.F32, (3, 4), lambda: [bytes(n_bytes)])])
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_tensor_data_is_read_only_and_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    write_gguf(path, [], [("a", dtypes.F32, (2,), np.array([1, 2], "<f4"))])
    with read_gguf(path) as file:
        data = file.data("a")
    path.unlink()
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1
    assert data.view("<f4").tolist() == [1, 2]
    with pytest.raises(ValueError, match="closed"):
        file.data("a")


def test_a_missing_tensor_is_named(data_dir: Path) -> None:
    with (
        read_gguf(data_dir / "mini-f32.gguf") as file,
        pytest.raises(FormatError, match=r"mini-f32\.gguf: tensor no\.weight: is missing"),
    ):
        file.data("no.weight")


# What cannot be opened


def test_files_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.gguf: cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(EngineError, match="is not a regular file"):
        read_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineError, match="pipe: is not a regular file"):
        read_gguf(tmp_path / "pipe")


# What cannot be stored

ARRAY = ValueType.ARRAY
REFUSED_KEYS: dict[str, tuple[list[Key], str]] = {
    "twice": ([("k", ValueType.U8, 1)] * 2, "key k: is given twice"),
    "no name": ([("", ValueType.U8, 1)], "key '': its name has 0 bytes"),
    "long name": ([("k" * 65_536, ValueType.U8, 1)], "its name has 65536 bytes"),
    "too large": ([("k", ValueType.U8, 256)], "key k: value does not fit U8"),
    "below 0": ([("k", ValueType.U64, -1)], "key k: value does not fit U64"),
    "float for an integer": ([("k", ValueType.U32, 1.5)], "key k: value does not fit U32"),
    "float beyond F32": ([("k", ValueType.F32, 1e300)], "key k: value does not fit F32"),
    "number for a string": ([("k", ValueType.STRING, 5)], "key k: value does not fit STRING"),
    "bytes for a string": ([("k", ValueType.STRING, b"\xff")], "key k: value does not fit STRING"),
    "element": ([("k", (ARRAY, ValueType.I8), [1, 200])], "key k: value does not fit array of I8"),
    "no array": ([("k", (ARRAY, ValueType.I8), 5)], "key k: value does not fit array of I8"),
    "nested": ([("k", (ARRAY, ARRAY), [[1]])], "key k: value does not fit array of ARRAY"),
    "alignment": ([("general.alignment", ValueType.U32, 48)], "key general.alignment: 48 is not"),
    "alignment type": ([("general.alignment", ValueType.U64, 32)], "key general.alignment"),
}
REFUSED_TENSORS = {
    "no name": (("", dtypes.F32, (2,)), "tensor '': its name has 0 bytes"),
    "long name": (("é" * 32, dtypes.F32, (2,)), "its name has 64 bytes"),
    "bytes": (("t", dtypes.F32, (3,)), "tensor t: 3 F32 needs 12 bytes, 8 are given"),
    "size 0": (("t", dtypes.F32, (2, 0)), "tensor t: 2 × 0 is no shape"),
    "five sizes": (("t", dtypes.F32, (1, 1, 1, 1, 2)), "tensor t: 1 × 1 × 1 × 1 × 2 is no shape"),
    "part of a block": (("t", dtypes.Q8_0, (4, 8)), "tensor t: rows of 8 are not whole Q8_0"),
}


@pytest.mark.parametrize("case", REFUSED_KEYS.values(), ids=REFUSED_KEYS)
def test_a_key_that_cannot_be_stored_is_refused(
    tmp_path: Path, case: tuple[list[Key], str]
) -> None:
    keys, problem = case
    with pytest.raises(FormatError) as error:
        write_gguf(tmp_path / "new.gguf", keys, [])
    assert problem in str(error.value) and str(error.value).startswith(f"{tmp_path}/new.gguf: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", REFUSED_TENSORS.values(), ids=REFUSED_TENSORS)
def test_a_tensor_that_cannot_be_stored_is_refused(
    tmp_path: Path, case: tuple[tuple[str, dtypes.DType, tuple[int, ...]], str]
) -> None:
    (name, dtype, shape), problem = case
    with pytest.raises(FormatError) as error:
        write_gguf(tmp_path / "new.gguf", [], [(name, dtype, shape, bytes(8))])
    assert problem in str(error.value) and str(error.value).startswith(f"{tmp_path}/new.gguf: ")
    assert not list(tmp_path.iterdir())


# The gguf package as an oracle


def test_the_gguf_package_reads_what_we_write(tmp_path: Path, rng: np.random.Generator) -> None:
    gguf = pytest.importorskip("gguf")
    numbers = INTEGERS + FLOATS
    keys: list[Key] = [("general.architecture", ValueType.STRING, "llama")]
    keys += [(f"n.{kind.name}", kind, 100 + kind) for kind, _ in numbers]
    keys += [(f"a.{kind.name}", (ARRAY, kind), [1, kind, 3]) for kind, _ in numbers]
    keys += [("yes", ValueType.BOOL, True), ("s", (ARRAY, ValueType.STRING), ["é", b"x"])]
    weights = rng.integers(256, size=(4, 68), dtype=np.uint8)
    floats = rng.standard_normal((3, 5)).astype("<f4")
    path = tmp_path / "ours.gguf"
    tensors = [("a", dtypes.F32, (3, 5), floats), ("b", dtypes.Q8_0, (4, 64), weights)]
    write_gguf(path, keys, tensors)

    reader = gguf.GGUFReader(path)
    for name, _, value in keys:
        if name != "s":
            assert reader.fields[name].contents() == value
    assert reader.fields["s"].contents() == ["é", "x"]
    first, second = reader.tensors
    assert (first.name, first.tensor_type.name, list(first.shape)) == ("a", "F32", [5, 3])
    assert (second.name, second.tensor_type.name, list(second.shape)) == ("b", "Q8_0", [64, 4])
    np.testing.assert_array_equal(first.data, floats)
    np.testing.assert_array_equal(second.data, weights)


def write_with_oracle(path: Path, rng: np.random.Generator, **options: Any) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama", **options)
    for kind, _ in INTEGERS + FLOATS:
        name = {"U": "uint", "I": "int", "F": "float"}[kind.name[0]] + kind.name[1:]
        getattr(writer, f"add_{name}")(f"n.{kind.name}", 100 + kind)
    writer.add_bool("yes", True)
    writer.add_array("texts", ["é", "", "x"])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("ints", [1, -2])
    floats = rng.standard_normal((3, 64)).astype("<f4")
    q8 = gguf.quants.quantize(floats, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("a", floats)
    writer.add_tensor("b", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c", floats.astype("<f2"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats


def test_what_the_gguf_package_writes_is_read(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "theirs.gguf"
    floats = write_with_oracle(path, rng)
    with read_gguf(path) as file:
        for kind, _ in INTEGERS + FLOATS:
            assert file.metadata[f"n.{kind.name}"] == 100 + kind
            assert file.value_types[f"n.{kind.name}"] is kind
        assert file.get_bool("yes")
        assert file.metadata["texts"] == ["é".encode(), b"", b"x"]
        assert file.metadata["floats"].tolist() == [0.5, 1.5]
        assert file.metadata["ints"].tolist() == [1, -2]
        assert [t.shape for t in file.tensors.values()] == [(3, 64)] * 3
        assert [t.dtype.name for t in file.tensors.values()] == ["F32", "Q8_0", "F16"]
        np.testing.assert_array_equal(file.data("a").view("<f4").reshape(3, 64), floats)
        assert file.data("c").tobytes() == floats.astype("<f2").tobytes()


def test_a_big_endian_file_of_the_gguf_package_is_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    gguf = pytest.importorskip("gguf")
    write_with_oracle(tmp_path / "big.gguf", rng, endianess=gguf.GGUFEndian.BIG)  # codespell:ignore
    with pytest.raises(FormatError, match="big-endian"):
        read_gguf(tmp_path / "big.gguf")


# The way to the disk


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Path of a file that holds b"old"; the folder must have no other file in the end."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    yield path
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file.bin"]


def test_a_written_file_takes_the_place_of_the_old_one_at_the_end(target: Path) -> None:
    with atomic_write(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit])
def test_an_exception_in_the_middle_leaves_the_old_file(
    target: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), atomic_write(target) as file:
        file.write(b"half")
        raise error
    assert target.read_bytes() == b"old"


def test_a_file_too_large_for_its_place_leaves_the_old_file(target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(EngineError, match=r"file\.bin: cannot be written: File too large"):
            write_gguf(target, [], [("t", dtypes.F32, (5000,), bytes(20_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"old"


def test_a_full_device_is_one_line() -> None:
    with pytest.raises(EngineError, match="/dev/full: cannot be written: No space left"):
        write_gguf("/dev/full", [], [])


def test_a_device_is_written_to_and_not_replaced() -> None:
    write_gguf("/dev/null", [("k", ValueType.U8, 1)], [])
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_missing_folder_and_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no/file\.bin: cannot be written: No such file"):
        write_gguf(tmp_path / "no" / "file.bin", [], [])
    with pytest.raises(EngineError, match="cannot be written: Is a directory"):
        write_gguf(tmp_path, [], [])


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys\n"
        "from engine.gguf import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n"
        "    file.write(bytes(100_000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run([sys.executable, "-c", code, str(target)], env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_permissions_and_links_are_kept(target: Path) -> None:
    target.chmod(0o640)
    folder = target.parent / "links"
    folder.mkdir()
    link = folder / "link.bin"
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert list(folder.iterdir()) == [link]


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_bytes(b"")
    with atomic_write(ours) as file:
        file.write(struct.pack("<I", 1))
    assert ours.stat().st_mode == plain.stat().st_mode


def test_a_model_may_be_written_over_itself_while_it_is_mapped(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    original = (data_dir / "mini-q8_0.gguf").read_bytes()
    path.write_bytes(original)
    with read_gguf(path) as file:
        assert rewrite(file, path) == original


def test_deferred_files_take_their_places_when_committed_and_leave_nothing_when_dropped(tmp_path):
    target, new = tmp_path / "target", tmp_path / "new"
    target.write_bytes(b"before")
    deferred = Deferred()
    for end, left in ((deferred.drop, {target: b"before"}),
                      (deferred.commit, {target: b"again", new: b"new"})):  # fmt: skip
        with deferred.collect():
            for path, content in ((target, b"after"), (new, b"new"), (target, b"again")):
                with atomic_write(path) as file:
                    file.write(content)
        assert target.read_bytes() == b"before" and not new.exists()
        assert not end()
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == left
    with atomic_write(target) as file:
        file.write(b"at once")
    assert target.read_bytes() == b"at once"


def test_a_deferred_file_that_cannot_take_its_place_is_told_and_the_others_do(tmp_path):
    target, blocked = tmp_path / "target", tmp_path / "blocked"
    deferred = Deferred()
    with deferred.collect():
        for path in (blocked, target):
            with atomic_write(path) as file:
                file.write(b"new")
    blocked.mkdir()
    (problem,) = deferred.commit()
    assert str(problem).startswith(f"{blocked}: cannot be written: ")
    assert {path.name for path in tmp_path.iterdir()} == {"target", "blocked"}
    assert target.read_bytes() == b"new"


# ---------------------------------------------------------------- other metadata


def test_overridden_keys_take_the_place_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_file())
    file = read_gguf(path)
    other = file.overridden({"u8": 7, "string": "new", "bool": False, "f32": 2.5, "added": 1})
    assert other.get_int("u8") == 7
    assert other.get_str("string") == "new"
    assert other.get_bool("bool") is False
    assert other.get_float("f32") == 2.5
    assert other.value_types["u8"] is ValueType.U8
    assert (other.get_int("added"), other.value_types["added"]) == (1, ValueType.I64)
    assert file.get_int("u8") == 200
    assert "added" not in file.metadata
    assert other.data("q8").shape == file.data("q8").shape


@pytest.mark.parametrize(
    "key, value",
    [
        ("u8", 1.0),
        ("u8", True),
        ("f32", 1),
        ("bool", 1),
        ("string", 1),
        ("floats", 1.0),
        ("texts", "x"),
    ],
)
def test_an_override_of_another_type_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small_file())
    with pytest.raises(FormatError, match=rf"m\.gguf: key {key}: has type .* cannot override"):
        read_gguf(path).overridden({key: value})


def test_a_file_that_is_read_is_the_one_that_is_mapped(data_dir):
    path = data_dir / "mini-q8_0.gguf"
    with read_gguf(path) as mapped, read_gguf(path, mapped=False) as read:
        assert dict(read.metadata).keys() == dict(mapped.metadata).keys()
        np.testing.assert_array_equal(read.header, mapped.header)
        for name in mapped.tensors:
            data = read.data(name)
            np.testing.assert_array_equal(data, mapped.data(name))
            assert not data.flags.writeable
        assert isinstance(read.lock(), str)
