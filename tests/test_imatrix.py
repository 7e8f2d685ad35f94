"""Importance matrices: read as they are, refused when they are not."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError, FormatError
from engine.imatrix import read_imatrix


def entry(name: bytes, calls: int, values: list[float]) -> bytes:
    head = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
    return head + np.array(values, "<f4").tobytes()


def packed(*entries: bytes, tail: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(entries) + tail


SOUND = packed(
    entry(b"blk.0.attn_q.weight", 2, [2, 4]),
    entry(b"blk.0.ffn_up.weight", 0, [3]),
    tail=struct.pack("<ii", 7, 8) + b"play.txt",
)


def test_values_are_means_over_the_calls(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(SOUND)
    matrix = read_imatrix(path)
    assert {name: values.tolist() for name, values in matrix.values.items()} == {
        "blk.0.attn_q.weight": [1, 2],
        "blk.0.ffn_up.weight": [3],
    }
    assert (matrix.n_chunks, matrix.dataset) == (7, "play.txt")


def test_older_files_end_after_the_entries(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(packed(entry(b"a", 1, [1])))
    matrix = read_imatrix(path)
    assert (matrix.n_chunks, matrix.dataset, list(matrix.values)) == (0, "", ["a"])


def test_entries_are_kept_by_parts_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(SOUND)
    matrix = read_imatrix(path)
    assert list(matrix.only(["attn"], []).values) == ["blk.0.attn_q.weight"]
    assert list(matrix.only([], ["attn"]).values) == ["blk.0.ffn_up.weight"]
    assert list(matrix.only([], []).values) == list(matrix.values)


@pytest.mark.parametrize("cut", range(len(SOUND) - 1))
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(SOUND[:cut])
    if cut == len(SOUND) - 16:  # where older files end
        assert read_imatrix(path).n_chunks == 0
        return
    with pytest.raises(FormatError, match=r"m\.dat: .* bytes after the file; give a file of"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (struct.pack("<i", 0), "number of entries is 0"),
        (packed(entry(b"", 1, [1])), "length of entry 1 of 1: name is 0"),
        (packed(entry(b"a", 1, [])), "entry a: number of values is 0"),
        (packed(entry(b"a", 1, [-1])), "entry a: a value is negative, infinite or NaN"),
        (packed(entry(b"a", 1, [np.nan])), "entry a: a value is negative, infinite or NaN"),
        (struct.pack("<iii", 1, 2**31 - 1, 0), "2147483643 bytes after the file"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=problem):
        read_imatrix(path)


def test_no_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="none: No such file or directory; give an importance"):
        read_imatrix(tmp_path / "none")
