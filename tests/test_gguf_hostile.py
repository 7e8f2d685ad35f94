"""GGUF files that lie: each is refused with one line that names the file and the thing."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from engine.errors import FormatError
from engine.gguf import read_gguf
from tests.gguf_builder import array, build, integer, key, small_file, string, tensor

HUGE = 1 << 60
VERSIONS = (1, 2, 3)
# What Python itself takes to read, and fail on, a file of a few hundred bytes.
MEMORY_LIMIT = 256 << 10


def refusal(path: Path, content: bytes) -> str:
    """Read `content`, which must be refused without much memory; the message after its path."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as error:
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT + len(content)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message and message.isprintable()
    return message.removeprefix(f"{path}: ")


def u32(name: str, value: int) -> bytes:
    return key(name, 4, integer(value))


def with_tensor(name: str | bytes, sizes: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return build(tensors=[tensor(name, sizes, kind, offset)], data=bytes(64))


def two_tensors(first: int, second: int, name: str = "b") -> bytes:
    infos = [tensor("a", (16,), 0, first), tensor(name, (16,), 0, second)]
    return build(tensors=infos, data=bytes(128))


# Case: the bytes, what the message names, what it says of it.
HEADER = {
    "empty file": (b"", "header", "is empty"),
    "three bytes": (b"GGU", "header", "magic needs 4 bytes, 1 are missing"),
    "other magic": (build(magic=b"ggjt"), "header", "begins with b'ggjt'"),
    "no counts": (build()[:8], "header", "count of tensors needs 8 bytes, 8 are missing"),
    "version 0": (build(version=0), "header", "version 0 is unknown"),
    "version 4": (build(version=4), "header", "version 4 is unknown"),
    "big-endian 3": (build(version=3 << 24), "header", "big-endian"),
    "big-endian 2": (build(version=2 << 24), "header", "big-endian"),
    "tensor count": (build(n_tensors=HUGE), "header", f"{HUGE} tensors cannot be in"),
    "tensor count below 0": (build(n_tensors=-1), "header", "-1 tensors cannot be in"),
    "tensor count of version 1": (
        build(version=1, n_tensors=0xFFFFFFFF),
        "header",
        "4294967295 tensors cannot be in",
    ),
    "key count": (build(n_keys=HUGE), "header", f"{HUGE} keys cannot be in"),
    "key count below 0": (build(n_keys=-1), "header", "-1 keys cannot be in"),
    "key count just too large": (build([u32("a", 1)], n_keys=3), "header", "3 keys cannot be in"),
}

KEYS = {
    "no name": (build([u32("", 1)]), "key 1 of 1", "name is empty"),
    "long name": (build([u32("k" * 65_536, 1)]), "key 1 of 1", "at most 65535"),
    "name not UTF-8": (build([key(b"k\xff", 4, integer(1))]), "key 1 of 1", "not UTF-8"),
    "name length": (build([integer(HUGE, "Q") + bytes(32)]), "key 1 of 1", "are missing"),
    "name length that wraps": (
        build([integer((1 << 64) - 1, "Q") + bytes(32)]),
        "key 1 of 1",
        "are missing",
    ),
    "name with a line feed": (build([key("a\nb", 99, b"")]), r"key 'a\nb'", "type 99"),
    "twice": (build([u32("k", 1), u32("k", 1)]), "key k", "is there twice"),
    "type 13": (build([key("k", 13, bytes(8))]), "key k", "type 13 is unknown"),
    "type -1": (build([key("k", 0xFFFFFFFF, bytes(8))]), "key k", "type 4294967295 is unknown"),
    "string length": (build([key("k", 8, integer(HUGE, "Q"))]), "key k", "are missing"),
    "string not UTF-8": (build([key("k", 8, string(b"ab\xc3"))]), "key k", "not UTF-8"),
    "bool of 2": (build([key("k", 7, b"\x02")]), "key k", "bool has the value 2"),
    "element type": (build([array("k", 13, 1, bytes(8))]), "key k", "element type 13 is unknown"),
    "nested array": (
        build([array("k", 9, 1, (integer(9) + integer(1, "Q")) * 1000)]),
        "key k",
        "arrays of arrays",
    ),
    "array count": (build([array("k", 0, HUGE, bytes(32))]), "key k", f"array of {HUGE} U8"),
    "array product that wraps": (
        build([array("k", 10, 1 << 61, bytes(32))]),
        "key k",
        f"array of {1 << 61} U64",
    ),
    "array one too long": (
        build([array("k", 12, 5, bytes(32))], alignment=1),
        "key k",
        "array of 5 F64 needs 40 bytes, 8 are missing",
    ),
    "count of strings": (
        build([array("k", 8, HUGE, string("a"))]),
        "key k",
        f"array of {HUGE} strings",
    ),
    "string element length": (
        build([array("k", 8, 2, string("a") + integer(HUGE, "Q"))]),
        "key k",
        "element 1 of 2",
    ),
    "string element cut in its length": (
        build([array("k", 8, 2, string("a" * 8) + bytes(4))], alignment=1),
        "key k",
        "element 1 of 2 ends 4 bytes after the file",
    ),
    "bool element": (
        build([array("k", 7, 3, b"\x00\x01\x07")]),
        "key k",
        "bool 2 has the value 7",
    ),
    "alignment 0": (build([u32("general.alignment", 0)]), "key general.alignment", "power of two"),
    "alignment 24": (build([u32("general.alignment", 24)]), "key general.alignment", "24 is not"),
    "alignment u64": (
        build([key("general.alignment", 10, integer(32, "Q"))]),
        "key general.alignment",
        "has type U64, U32 is expected",
    ),
    "alignment i32": (
        build([key("general.alignment", 5, integer(-32, "i"))]),
        "key general.alignment",
        "has type I32",
    ),
    "alignment array": (
        build([array("general.alignment", 4, 1, integer(32))]),
        "key general.alignment",
        "has type array of U32",
    ),
    "part of a split model": (
        build([key("split.count", 2, integer(4, "H"))]),
        "key split.count",
        "merge the 4 parts",
    ),
    "split count of strings": (
        build([array("split.count", 8, 1, string("4"))]),
        "key split.count",
        "is not an integer",
    ),
}

TENSORS = {
    "long name": (with_tensor("t" * 64, (4,), 0), "tensor 1 of 1", "at most 63"),
    "name not UTF-8": (with_tensor(b"\xc0\x80", (4,), 0), "tensor 1 of 1", "not UTF-8"),
    "name length": (
        build(tensors=[integer(HUGE, "Q") + bytes(32)]),
        "tensor 1 of 1",
        "are missing",
    ),
    "twice": (two_tensors(0, 64, "a"), "tensor a", "is there twice"),
    "5 dimensions": (with_tensor("t", (1, 1, 1, 1, 1), 0), "tensor t", "has 5 dimensions"),
    "4294967295 dimensions": (
        build(tensors=[tensor("t", (1,), 0, 0, n_dims=0xFFFFFFFF)], data=bytes(64)),
        "tensor t",
        "has 4294967295 dimensions",
    ),
    "size 0": (with_tensor("t", (4, 0), 0), "tensor t", "size 0 in 4 × 0"),
    "size below 0": (with_tensor("t", (-4, -4), 0), "tensor t", "size -4"),
    "2^63 elements": (with_tensor("t", (1 << 32, 1 << 31), 0), "tensor t", "2^63 elements"),
    "product that wraps to 0": (with_tensor("t", (1 << 32, 1 << 32), 0), "tensor t", "2^63"),
    "bytes that wrap to 0": (with_tensor("t", (1 << 62,), 0), "tensor t", "the file ends after"),
    "removed type": (with_tensor("t", (32,), 4), "tensor t", "type Q4_2 was removed"),
    "removed packed type": (with_tensor("t", (32,), 31), "tensor t", "type Q4_0_4_4 was removed"),
    "unsupported type": (
        with_tensor("t", (256,), 16),
        "tensor t",
        "type IQ2_XXS is not supported yet by this engine",
    ),
    "unknown type": (with_tensor("t", (32,), 99), "tensor t", "type number 99 is unknown"),
    "part of a block": (
        with_tensor("t", (16, 2), 8),
        "tensor t",
        "rows of 16 are not whole Q8_0 blocks of 32",
    ),
    "no row for a block": (with_tensor("t", (), 2), "tensor t", "rows of 1 are not whole Q4_0"),
    "offset off the alignment": (with_tensor("t", (4,), 0, 4), "tensor t", "offset 4 is not a"),
    "offset past the end": (with_tensor("t", (4,), 0, 64), "tensor t", "the file ends after"),
    "offset that wraps": (
        with_tensor("t", (4,), 0, (1 << 64) - 32),
        "tensor t",
        "the file ends after",
    ),
    "bytes past the end": (with_tensor("t", (17,), 0), "tensor t", "17 F32 needs 68 bytes"),
    "alignment beyond the file": (
        build(
            [u32("general.alignment", 1 << 31)],
            [tensor("t", (4,), 0, 0)],
            data=bytes(64),
        ),
        "tensor t",
        "the file ends after",
    ),
    "same place": (two_tensors(0, 0), "tensor b", "overlaps tensor a"),
    "overlap": (two_tensors(0, 32), "tensor b", "overlaps tensor a"),
    "overlap against the order": (two_tensors(32, 0), "tensor a", "overlaps tensor b"),
}


@pytest.mark.parametrize("case", HEADER.values(), ids=HEADER)
def test_a_bad_header_is_refused(tmp_path: Path, case: tuple[bytes, str, str]) -> None:
    content, thing, problem = case
    message = refusal(tmp_path / "model.gguf", content)
    assert message.startswith(f"{thing}: ") and problem in message


@pytest.mark.parametrize("case", KEYS.values(), ids=KEYS)
def test_a_bad_key_is_refused(tmp_path: Path, case: tuple[bytes, str, str]) -> None:
    content, thing, problem = case
    message = refusal(tmp_path / "model.gguf", content)
    assert message.startswith(f"{thing}: ") and problem in message


@pytest.mark.parametrize("case", TENSORS.values(), ids=TENSORS)
def test_a_bad_tensor_is_refused(tmp_path: Path, case: tuple[bytes, str, str]) -> None:
    content, thing, problem = case
    message = refusal(tmp_path / "model.gguf", content)
    assert message.startswith(f"{thing}: ") and problem in message


def test_a_key_of_the_greatest_length_is_read_and_shortened_in_messages(tmp_path: Path) -> None:
    name = "k" * 65_535
    path = tmp_path / "model.gguf"
    path.write_bytes(build([u32(name, 1)]))
    assert read_gguf(path).metadata[name] == 1
    message = refusal(path, build([u32(name, 1)] * 2))
    assert "is there twice" in message and len(message) < 300


def test_sizes_and_counts_at_the_allowed_edge_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    infos = [
        tensor("t" * 63, (1, 1, 1, 8), 0, 0),
        tensor("scalar", (), 0, 32),
        tensor("before", (8,), 0, 64),
    ]
    path.write_bytes(build([u32("general.alignment", 1)], infos, bytes(96), alignment=1))
    with read_gguf(path) as file:
        assert [info.shape for info in file.tensors.values()] == [(8, 1, 1, 1), (), (8,)]
        assert file.alignment == 1


def test_a_kind_that_is_no_string_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([array("general.type", 4, 2, bytes(8))]))
    with pytest.raises(FormatError, match=r"key general\.type: has type array of U32"):
        assert read_gguf(path).kind


def test_tensors_in_any_order_and_bytes_after_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    infos = [tensor("late", (8,), 0, 64), tensor("early", (8,), 0, 0)]
    path.write_bytes(build(tensors=infos, data=bytes(64) + b"\x01" * 32 + b"more"))
    with read_gguf(path) as file:
        assert list(file.tensors) == ["late", "early"]
        assert file.data("late").tolist() == [1] * 32
        assert file.data("early").tolist() == [0] * 32


def test_a_file_without_tensors_may_lack_its_padding(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(build([u32("k", 7)], alignment=1))
    assert dict(read_gguf(path).metadata) == {"k": 7}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_cut_off_at_any_byte_is_refused(tmp_path: Path, version: int) -> None:
    whole = small_file(version)
    path = tmp_path / "model.gguf"
    for n in range(len(whole)):
        refusal(path, whole[:n])
    path.write_bytes(whole)
    assert len(read_gguf(path).tensors) == 2


def read_or_refuse(path: Path, content: bytes) -> bool:
    """Read all of a damaged file, or see it refused; any other exception fails the test."""
    path.write_bytes(content)
    try:
        with read_gguf(path) as file:
            assert file.kind in ("model", "adapter", "checkpoint")
            for name, info in file.tensors.items():
                assert file.data(name).size == info.n_bytes
                int(file.data(name).sum())
            return True
    except FormatError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return False


EDGES = (0, 1, 1 << 31, (1 << 32) - 1, 1 << 61, (1 << 64) - 1)


def damage(content: bytes, rng: np.random.Generator, end: int) -> bytes:
    """Change, insert, remove or repeat a few bytes before `end`."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        i = int(rng.integers(end))
        what = rng.integers(5)
        if what == 0:
            changed[i] ^= 1 << int(rng.integers(8))
        elif what == 1:
            changed[i] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif what == 2:
            changed[i : i + 8] = struct.pack("<Q", EDGES[rng.integers(len(EDGES))])
        elif what == 3:
            del changed[i : i + int(rng.integers(1, 9))]
        else:
            changed[i:i] = changed[i : i + int(rng.integers(1, 9))]
    return bytes(changed)


@pytest.mark.parametrize("version", VERSIONS)
def test_flipped_bytes_give_a_valid_read_or_a_refusal(
    tmp_path: Path, rng: np.random.Generator, version: int
) -> None:
    whole = np.frombuffer(small_file(version), np.uint8)
    path = tmp_path / "model.gguf"
    valid = 0
    for _ in range(1500):
        flipped = whole.copy()
        places = rng.integers(len(whole), size=rng.integers(1, 5))
        flipped[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
        valid += read_or_refuse(path, flipped.tobytes())
    assert 0 < valid < 1500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "mini-q8_0.gguf", "a-chk-10.gguf"])
def test_damaged_headers_give_a_valid_read_or_a_refusal(
    tmp_path: Path, data_dir: Path, rng: np.random.Generator, name: str
) -> None:
    whole = small_file() if name == "small" else (data_dir / name).read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    with read_gguf(path) as file:
        header = min(info.offset for info in file.tensors.values())
    for _ in range(20_000):
        read_or_refuse(path, damage(whole, rng, header))
