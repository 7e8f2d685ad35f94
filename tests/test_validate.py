"""Values that cannot be, found in every type, and the command that lists them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import dtypes, validate
from engine.dtypes import DType
from engine.gguf import ValueType, read_gguf, write_gguf
from engine.validate import Fault, find_faults
from tests import reference

TYPES = list(dtypes.BY_ID.values())
N_ROWS = 7
# Bytes of a block at which its half-precision fields stand; 0 for the types not named.
PLACES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def stored(rng: np.random.Generator, dtype: DType, n_blocks: int = 3) -> np.ndarray:
    """Rows of several blocks, as bytes."""
    values = rng.standard_normal((N_ROWS, n_blocks * dtype.block)).astype(np.float32)
    return np.asarray(reference.encode(dtype, values)).reshape(N_ROWS, -1).copy()


def spoil(rows: np.ndarray, dtype: DType, row: int, block: int, value: float) -> None:
    """Make an element, or every number of 16 bits in which a block may keep its scale, `value`."""
    start = block * dtype.block_bytes
    if dtype.block == 1:
        bits = np.asarray(reference.encode(dtype, np.float32([value])))
        rows[row, start : start + bits.size] = bits
    else:
        halves = np.full(dtype.block_bytes // 2, value, "<f2").view(np.uint8)
        rows[row, start : start + dtype.block_bytes] = halves


def written(path: Path, tensors: dict[str, tuple[DType, np.ndarray]]) -> Path:
    entries = [
        (name, dtype, (len(rows), rows.shape[1] // dtype.block_bytes * dtype.block), rows)
        for name, (dtype, rows) in tensors.items()
    ]
    write_gguf(path, [("general.type", ValueType.STRING, "adapter")], entries)
    return path


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: t.name)
def test_every_type_is_looked_at(tmp_path, rng, dtype, monkeypatch):
    monkeypatch.setattr(validate, "CHUNK_BYTES", 2 * dtype.block_bytes * 3)  # two rows a chunk
    rows = stored(rng, dtype)
    sound = read_gguf(written(tmp_path / "sound.gguf", {"a": (dtype, rows)}))
    assert list(find_faults(sound)) == []
    for row, block, value in ((1, 2, np.nan), (4, 0, np.inf), (4, 1, np.nan), (6, 2, -np.inf)):
        spoil(rows, dtype, row, block, value)
    file = read_gguf(written(tmp_path / "bad.gguf", {"a": (dtype, rows)}))
    seen: list[int] = []
    faults = list(find_faults(file, seen.append))
    assert [(f.row, f.element) for f in faults] == [
        (1, 2 * dtype.block), (4, 0), (6, 2 * dtype.block),
    ]  # fmt: skip
    assert sum(seen) == file.tensors["a"].n_bytes
    if dtype.block == 1:
        assert [f.what for f in faults] == ["NaN", "infinite value", "infinite value"]


BLOCK_TYPES = [t for t in TYPES if t.block > 1]


@pytest.mark.parametrize("dtype", BLOCK_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_each_field_of_a_block_and_nothing_else_is_looked_at(tmp_path, rng, dtype, value):
    places = PLACES.get(dtype.name, (0,))
    rows = rng.integers(0, 256, (N_ROWS, 3 * dtype.block_bytes), np.uint8)
    for block in range(3):
        for place in places:
            start = block * dtype.block_bytes + place
            rows[:, start : start + 2] = np.float16([0.5]).view(np.uint8)
    sound = read_gguf(written(tmp_path / "sound.gguf", {"a": (dtype, rows)}))
    assert list(find_faults(sound)) == []
    for row, place in enumerate(places):
        start = 2 * dtype.block_bytes + place
        rows[row, start : start + 2] = np.float16([value]).view(np.uint8)
    bad = read_gguf(written(tmp_path / "bad.gguf", {"a": (dtype, rows)}))
    found = [(f.row, f.element) for f in find_faults(bad)]
    assert found == [(row, 2 * dtype.block) for row in range(len(places))]


def test_a_tensor_without_sizes_is_one_row(tmp_path):
    write_gguf(tmp_path / "x.gguf", [], [("a", dtypes.F32, (), np.float32("nan"))])
    assert list(find_faults(read_gguf(tmp_path / "x.gguf"))) == [Fault("a", 0, 0, "NaN")]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.tools.validate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["mini-bf16", "mini-q8_0", "a-chk-10"])
def test_a_sound_file_has_status_0_and_one_line(data_dir, name):
    done = run(data_dir / f"{name}.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{data_dir}/{name}.gguf: sound: ")
    assert done.stdout.count("\n") == 1


def test_faults_are_listed_up_to_a_bound_and_all_counted(tmp_path, rng):
    rows = stored(rng, dtypes.BF16)
    for row in range(5):
        spoil(rows, dtypes.BF16, row, 1, np.nan)
    quantized = stored(rng, dtypes.Q4_1)
    spoil(quantized, dtypes.Q4_1, 6, 2, np.inf)
    tensors = {"first": (dtypes.BF16, rows), "second": (dtypes.Q4_1, quantized)}
    path = written(tmp_path / "bad.gguf", tensors)
    done = run(path, "--show", "3")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{path}: tensor first: NaN in row 0, element 1",
        f"{path}: tensor first: NaN in row 1, element 1",
        f"{path}: tensor first: NaN in row 2, element 1",
        f"{path}: 3 rows more",
        f"{path}: not sound: 6 rows of 2 tensors hold values that cannot be; "
        "2 tensors, 14 rows, 0.0 MB",
    ]
    last = run(path).stdout.splitlines()[-2]
    assert last == f"{path}: tensor second: infinite or NaN block scale in row 6, element 64"


def test_a_model_that_cannot_be_loaded_is_not_sound(tmp_path, data_dir):
    with read_gguf(data_dir / "mini-bf16.gguf") as file:
        keys = [(k, file.value_types[k], v) for k, v in file.metadata.items()]
        tensors = [
            (i.name, i.dtype, i.shape, file.data(i.name))
            for i in file.tensors.values()
            if i.name != "blk.1.ffn_up.weight"
        ]
    path = tmp_path / "incomplete.gguf"
    write_gguf(path, keys, tensors)
    done = run(path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == f"{path}: tensor blk.1.ffn_up.weight is missing"
    assert "not sound: it cannot be loaded" in done.stdout


def test_a_file_that_cannot_be_read_is_one_error_line(tmp_path, data_dir):
    path = tmp_path / "cut.gguf"
    path.write_bytes((data_dir / "mini-bf16.gguf").read_bytes()[:-5000])
    done = run(path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(path) in done.stderr
