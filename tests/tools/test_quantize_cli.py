"""`quantize`: arguments by place, lines, refusals; what it writes can be run and trained."""

from __future__ import annotations

import csv
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import dtypes
from engine.errors import OptionError
from engine.file_types import TARGETS
from engine.gguf import ValueType, read_gguf, write_gguf
from engine.tools import export_lora, finetune, quantize
from engine.tools import main as predict
from engine.tools.options import UsageError
from engine.tools.quantize_options import parse

DATA = Path(__file__).parents[1] / "data"
MODEL = str(DATA / "mini-f32.gguf")


@pytest.mark.parametrize(
    ("arguments", "out", "target", "threads"),
    [
        (["m.gguf", "o.gguf", "Q4_K_M"], "o.gguf", "Q4_K_M", 0),
        (["m.gguf", "o.gguf", "q4_k", "3"], "o.gguf", "Q4_K_M", 3),
        (["d/m.gguf", "Q8_0"], "d/ggml-model-Q8_0.gguf", "Q8_0", 0),
        (["m.gguf", "15", "2"], "ggml-model-Q4_K_M.gguf", "Q4_K_M", 2),
        (["m.gguf", "copy"], "ggml-model-COPY.gguf", "COPY", 0),
        (["--pure", "m.gguf", "o.gguf", "BF16"], "o.gguf", "BF16", 0),
    ],
)
def test_arguments_stand_where_the_original_has_them(
    arguments: list[str], out: str, target: str, threads: int
) -> None:
    options, _ = parse(arguments)
    assert options is not None
    assert (options.out, options.target.name, options.threads) == (out, target, threads)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "IN is missing"),
        (["m.gguf"], "TYPE is missing"),
        (["m.gguf", "o.gguf"], "TYPE is missing"),
        (["m.gguf", "o.gguf", "Q9"], "invalid type 'Q9'"),
        (["m.gguf", "o.gguf", "Q8_0", "x"], "THREADS: 'x' is not a whole number"),
        (["m.gguf", "o.gguf", "Q8_0", "2x"], "THREADS: '2x' is no number"),
        (["m.gguf", "o.gguf", "Q8_0", "9999"], "THREADS: 9999 is above 512"),
        (["m.gguf", "o.gguf", "Q8_0", "2", "y"], "unknown argument: y"),
        (["--include-weights", "a", "--exclude-weights", "b", "m", "Q8_0"], "exclude one another"),
        (["--output-tensor-type", "q9", "m", "Q8_0"], "'q9' is not one of F32, F16"),
    ],
)
def test_arguments_that_cannot_be_read(arguments: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse(arguments)


def test_what_cannot_be_made_is_refused_by_name() -> None:
    for name in ("IQ2_XXS", "26"):
        with pytest.raises(OptionError, match=f"type {name}: one of .*, which cannot be made here"):
            parse(["m.gguf", "o.gguf", name])
    with pytest.raises(OptionError, match="models in several parts are not read"):
        parse(["--keep-split", "m.gguf", "o.gguf", "F16"])


def test_the_usage_lists_every_type(capfd: pytest.CaptureFixture[str]) -> None:
    assert quantize.main(["--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    table = lines[lines.index("types:") :]
    for target in TARGETS:
        assert any(target.name in line.split() for line in table)
    assert quantize.main(["m.gguf"]) == 1
    captured = capfd.readouterr().err
    assert captured.startswith("error: TYPE is missing\nusage: quantize ")


def test_a_line_a_tensor_and_the_sizes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    assert quantize.main([MODEL, str(out), "Q8_0", "2"]) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    with read_gguf(out) as file:
        assert len(lines) == len(file.tensors) + 5
        assert file.metadata["general.file_type"] == 7
    assert lines[0].split()[:5] == ["[", "1/", "21]", "token_embd.weight", "-"]
    assert "type =    F32, converting to Q8_0 .. size =     0.19 MiB ->     0.05 MiB" in lines[0]
    assert lines[-1].startswith("main:    total time = ")
    assert f"quantizing '{MODEL}' to '{out}' as Q8_0 using 2 threads" in captured.err
    # Recorded: the same weights, stored by the original's converter.
    with read_gguf(out) as ours, read_gguf(DATA / "mini-q8_0.gguf") as recorded:
        name = "blk.0.attn_q.weight"
        assert bytes(ours.data(name)) == bytes(recorded.data(name))


def test_warnings_tell_of_rows_that_large_blocks_do_not_fill(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert quantize.main([MODEL, str(tmp_path / "o.gguf"), "Q4_K_M"]) == 0
    problem = "warning: tensor blk.0.attn_q.weight: rows of 64 are not whole blocks of Q4_K: Q5_0"
    assert problem in capfd.readouterr().err


def test_a_missing_model_and_an_unwritable_place_are_errors_of_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments, problem in (
        ([str(tmp_path / "none.gguf"), "F16"], "none.gguf: file not found"),
        ([MODEL, str(tmp_path / "no" / "o.gguf"), "F16"], "o.gguf: cannot be written: No such"),
        (["--imatrix", str(tmp_path / "none"), MODEL, "o", "F16"], "none: No such file"),
    ):
        assert quantize.main(arguments) == 1
        captured = capfd.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert problem in errors[0]
        assert captured.out == ""


def test_a_full_disk_leaves_no_file(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import gguf_write

    def no_room(_descriptor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_write.os, "fsync", no_room)
    assert quantize.main([MODEL, str(tmp_path / "o.gguf"), "F16"]) == 1
    assert "No space left on device; choose another place or make room" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick() -> None:
    """No numpy: what loads it is imported when there is something to do."""
    script = "import sys; from engine.tools import quantize; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---------------------------------------------------------------- what is written can be used


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer and width 256: blocks of every type fill its rows."""
    path = tmp_path_factory.mktemp("models") / "wide.gguf"
    sizes = {"block_count": 1, "embedding_length": 256, "feed_forward_length": 512}
    sizes |= {"rope.dimension_count": 64, "attention.head_count_kv": 2}
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (768, 256), "output": (768, 256)}
    shapes |= {"output_norm": (256,), "blk.0.attn_norm": (256,), "blk.0.ffn_norm": (256,)}
    shapes |= {"blk.0.attn_q": (256, 256), "blk.0.attn_output": (256, 256)}
    shapes |= {"blk.0.attn_k": (128, 256), "blk.0.attn_v": (128, 256)}
    shapes |= {"blk.0.ffn_gate": (512, 256), "blk.0.ffn_up": (512, 256)}
    shapes |= {"blk.0.ffn_down": (256, 512)}
    rng = np.random.default_rng(7)
    with read_gguf(MODEL) as small:
        metadata = {**small.metadata, **{f"llama.{key}": value for key, value in sizes.items()}}
        types = {**small.value_types, "llama.attention.head_count_kv": ValueType.U32}
        keys = [(key, types[key], value) for key, value in metadata.items()]
    tensors = []
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, np.float32) / 16 if len(shape) > 1 else np.ones(shape, "<f4")
        tensors.append((f"{name}.weight", dtypes.F32, shape, x))
    write_gguf(path, keys, tensors)
    return path


def losses(model: str, folder: Path) -> list[str]:
    """Train for a few steps; the log's losses."""
    log = folder / "log.csv"
    given = ["--model-base", model, "--train-data", str(DATA / "play.txt"), "--log-csv", str(log)]
    given += ["--lora-out", str(folder / "a.bin"), "--checkpoint-out", str(folder / "c.gguf")]
    given += ["--ctx", "24", "--batch", "2", "--adam-iter", "3", "--threads", "2", "--seed", "1"]
    given += ["--compute", "f32", "--no-report", "--adam-alpha", "0.01"]
    assert finetune.main(given) == 0
    with log.open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


EVERY_KIND = ["F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K_M", "Q4_1", "Q4_0", "Q4_K_M"]
EVERY_KIND += ["IQ4_NL", "IQ4_XS", "Q3_K_L", "Q2_K"]


def test_every_stored_type_is_the_main_one_of_a_target() -> None:
    kinds = {target.dtype for target in TARGETS if target.name in EVERY_KIND}
    assert kinds == set(dtypes.BY_ID.values()) - {dtypes.F32}


@pytest.mark.parametrize("target", EVERY_KIND)
def test_what_is_written_runs_and_trains_as_its_decoded_values_do(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, wide_model: Path, target: str
) -> None:
    small, large = str(tmp_path / "small.gguf"), str(tmp_path / "large.gguf")
    assert quantize.main([str(wide_model), small, target]) == 0
    assert quantize.main(["--allow-requantize", small, large, "F32"]) == 0
    trained = []
    for model in (small, large):
        folder = tmp_path / Path(model).stem
        folder.mkdir()
        trained.append(losses(model, folder))
    assert len(trained[0]) == 4
    assert trained[0] == trained[1]  # decoding is exact, and so are the sums' orders
    merged, adapter = str(tmp_path / "merged.gguf"), str(tmp_path / "small" / "a.bin")
    assert export_lora.main(["-m", small, "-o", merged, "-l", adapter]) == 0
    with read_gguf(small) as before, read_gguf(merged) as after:
        name = "blk.0.attn_q.weight"
        assert after.tensors[name].dtype is before.tensors[name].dtype
    capfd.readouterr()
    assert predict.main(["-m", small, "-p", "The", "-n", "4", "--temp", "0", "-t", "2"]) == 0
    assert capfd.readouterr().out.startswith(" The")
