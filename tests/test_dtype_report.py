"""What f16 loses, counted against NumPy, and of all of bf16 against ml_dtypes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from engine import dtype_report, dtypes
from engine.dtype_report import Losses, bf16_losses, losses_of, tensor_losses
from engine.gguf import read_gguf, write_gguf
from tests import reference


def plainly(values: np.ndarray) -> Losses:
    """One value after the other."""
    counts = dict.fromkeys(("not_finite", "inexact", "overflow", "subnormal", "zero"), 0)
    largest = 0.0
    with np.errstate(all="ignore"):
        wide, rounded = values.astype(np.float64).ravel(), values.astype(np.float16).ravel()
    for x, y in zip(wide.tolist(), rounded.tolist(), strict=True):
        if not np.isfinite(x):
            counts["not_finite"] += 1
            continue
        counts["inexact"] += x != y
        counts["overflow"] += abs(y) == np.inf
        counts["subnormal"] += 0 < abs(y) < 2.0**-14
        counts["zero"] += x != 0 and y == 0
        if x != y and np.isfinite(y):
            largest = max(largest, abs(x - y) / abs(x))
    return Losses(values.size, **counts, largest_error=largest)


def close(a: Losses, b: Losses) -> bool:
    same = a.largest_error == pytest.approx(b.largest_error, rel=1e-6)
    return same and np.array_equal(fields(a)[:-1], fields(b)[:-1])


def fields(losses: Losses) -> list[Any]:
    return [getattr(losses, name) for name in Losses.__slots__]


def awkward(rng: np.random.Generator, n: int) -> np.ndarray:
    """Values of every size of float32, ends and specials of f16 among them."""
    bits = rng.integers(0, 2**32, n, np.uint32).view(np.float32)
    near = (rng.standard_normal(n) * 2.0 ** rng.integers(-28, 18, n)).astype(np.float32)
    ends = [0, -0.0, 65504, 65519.9, 65520, 2.0**-14, 2.0**-24, 2.0**-25, 2.1**-25, 1e-40]
    special = [np.nan, np.inf, -np.inf]
    return np.concatenate([bits, near, np.float32([*ends, *special])])


def test_of_all_bf16_values_f16_holds_8704_finite_ones():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    patterns = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    losses = bf16_losses()
    assert close(losses, plainly(patterns))
    assert losses.n_values - losses.not_finite - losses.inexact == 8704
    assert (losses.overflow, losses.zero, losses.not_finite) == (28672, 26112, 256)


def test_values_are_counted_as_one_by_one(rng):
    values = awkward(rng, 3000)
    assert close(losses_of(values), plainly(values))


@pytest.mark.parametrize("dtype", dtypes.BY_ID.values(), ids=lambda t: t.name)
def test_a_tensor_of_any_type_is_counted_in_chunks(tmp_path, rng, dtype, monkeypatch):
    monkeypatch.setattr(dtype_report, "CHUNK", 4 * 256)
    n = 13 * 256
    values = rng.standard_normal(n).astype(np.float32) * np.float32(1e-3)
    if dtype.block == 1:
        values[: n // 2] = np.resize(awkward(rng, 700), n // 2)
    with np.errstate(all="ignore"):
        data = reference.encode(dtype, values)
    write_gguf(tmp_path / "x.gguf", [], [("a", dtype, (13, 256), data)])
    file = read_gguf(tmp_path / "x.gguf")
    seen: list[int] = []
    losses = tensor_losses(file, file.tensors["a"], seen.append)
    assert close(losses, plainly(reference.decode_row(dtype, np.asarray(data))))
    assert sum(seen) == file.tensors["a"].n_bytes and len(seen) == 4
    if dtype is dtypes.F16:
        assert losses.inexact == 0


def test_counts_are_added_and_the_larger_error_stays():
    a, b = Losses(1, 2, 3, 4, 5, 6, 0.5), Losses(10, 20, 30, 40, 50, 60, 0.25)
    assert a + b == b + a == Losses(11, 22, 33, 44, 55, 66, 0.5)


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.tools.dtype_report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_tells_of_each_tensor_of_all_and_of_the_type(tmp_path):
    damaged = np.float32([[1, 1e5, 2.0**-30, 2.0**-20, 3, 0]])
    tensors = [
        ("damaged", dtypes.F32, damaged.shape, damaged),
        ("whole", dtypes.F32, (2, 3), np.float32([[1, 2, 3], [4, 5, 6]])),
    ]
    path = tmp_path / "x.gguf"
    write_gguf(path, [], tensors)
    done = run(path)
    assert (done.returncode, done.stderr) == (0, "")
    title, head, first, second, total, _, *about = done.stdout.splitlines()
    assert title == f"{path}: rounded to f16"
    assert head.split()[:3] == ["tensor", "type", "values"]
    assert first.split() == ["damaged", "F32", "6", "2", "1", "1", "1", "0", "1"]
    assert second.split() == ["whole", "F32", "6", "0", "0", "0", "0", "0", "0"]
    assert total.split() == ["all", "12", "2", "1", "1", "1", "0", "1"]
    assert about[0] == ("bf16 has 65536 patterns: 65280 finite values, 2 infinities, 254 NaN.")
    assert "f16 holds 8704 of the finite ones exactly (13.33% of them)" in about[1]
    assert "13.28% of all patterns" in about[1]
    assert about[2].startswith("Of the others 28672 overflow, 26112 become zero and 1792 are")
    assert "whole" not in run(path, "--damaged").stdout


def test_a_missing_file_is_one_line_and_status_1():
    done = run("no-such.gguf")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no-such.gguf: file not found")
