"""`main` with options of model and context, against recorded runs of the original, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.dtypes import F32
from engine.gguf import ValueType, write_gguf
from engine.lora import BaseInfo, read_adapter, write_adapter
from engine.model import Model
from engine.tools import main as command

DATA = Path(__file__).parents[1] / "data"
RUNS = json.loads((DATA / "context.json").read_text())
MODEL = str(DATA / "mini-f32.gguf")


def write_directions(path: Path, directions: dict[str, np.ndarray]) -> None:
    keys = [("general.architecture", ValueType.STRING, "controlvector")]
    write_gguf(path, keys, [(k, F32, v.shape, v.astype(np.float32)) for k, v in directions.items()])


@pytest.fixture
def control_vectors(tmp_path, monkeypatch):
    """The two files that the runs name, in the current folder."""
    x = np.arange(64)
    write_directions(tmp_path / "waves.gguf", {"direction.1": np.sin(x * x)})
    write_directions(tmp_path / "ripples.gguf", {"direction.1": np.cos(3.0 * x)})
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("control_vectors")
@pytest.mark.parametrize("name", RUNS)
def test_the_text_is_the_originals(name, capfdbinary):
    run = RUNS[name]
    assert command.main(["-m", str(DATA / run["model"]), *run["args"]]) == 0
    assert capfdbinary.readouterr().out == run["stdout"].encode("latin-1")


def test_the_recorded_options_change_the_text():
    """Else the runs above would show nothing."""
    for model in ("mini-f32", "mini-gqa-f32"):
        plain = RUNS[f"accepted-{model}"]["stdout"]
        same = {name for name, run in RUNS.items() if run["stdout"] == plain and model in name}
        same = {name.removesuffix(f"-{model}") for name in same}
        # Two layers: the range leaves out the only direction.
        assert same == {"accepted", "none", "control-range"}


def told(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert command.main(["-m", MODEL, "-p", "x", "-n", "2", *arguments]) == 0
    return capfd.readouterr().err


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert command.main(["-m", MODEL, "-p", "x", "-n", "2", *arguments]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


def test_what_was_asked_for_is_told(control_vectors, capfd):
    lines = told(
        [
            *("--rope-scale", "2", "--rope-freq-base", "500", "-gan", "2", "-gaw", "8"),
            *("--override-kv", "llama.context_length=int:512", "--override-kv", "new.key=str:a=b"),
            *("--control-vector-scaled", "waves.gguf", "0.5", "--split-mode", "row", "-np", "2"),
            *("-np", "3", "--lora-base", "x"),
        ],
        capfd,
    )
    for line in (
        "main: override: llama.context_length = 512",
        "main: override: new.key = 'a=b'",
        "warning: the file has no key new.key: it is added",
        "main: warning: changing RoPE frequency base to 500.",
        "main: warning: scaling RoPE frequency by 0.5.",
        "n_ctx_train = 512",
        "self-extend: n_ctx_train = 512, grp_attn_n = 2, grp_attn_w = 8",
        "main: control vector: 'waves.gguf': scale 0.5, applied 1 of 1 directions",
        "warning: --split-mode has no effect: everything is computed on this processor",
        "main: warning: --lora-base is not needed",
    ):
        assert line in lines
    assert lines.count("warning: --parallel has no effect") == 1


def test_a_context_that_is_full_of_groups_ends_the_run(capfd):
    arguments = ["-n", "-1", "--ignore-eos", "-c", "32", "-gan", "2", "-gaw", "8"]
    assert "main: context full and groups are not dropped => stopping" in told(arguments, capfd)


def test_the_type_of_the_cache_changes_what_is_computed(capfdbinary):
    """Coarser keys in a longer text; else the runs above would show nothing."""
    wide = [word for word in RUNS["cache-q4_0-both"]["args"] if not word.startswith("-ct")]
    wide = [word for word in wide if word not in ("q4_0", "-fa")]
    texts = set()
    for types in ([], ["-ctk", "q4_0"], ["-ctv", "q4_0"], ["-ctk", "bf16", "-ctv", "q5_0"]):
        assert command.main(["-m", MODEL, *wide, "-n", "400", "-c", "256", *types]) == 0
        texts.add(capfdbinary.readouterr().out)
    assert len(texts) == 4


def test_adapters_of_three_forms_work_together_as_one_form_does(tmp_path, capfdbinary):
    """The same two adapters, as .bin twice, and as GGUF and PEFT; each is told apart by content."""
    base = BaseInfo.of(Model.load(MODEL))
    names = []
    for i, form in enumerate((".bin", ".gguf", ".safetensors")):
        path = tmp_path / f"a{i}{form}"
        adapter = read_adapter(DATA / "a-lora-20.bin")
        adapter.pairs = {
            k: p for k, p in adapter.pairs.items() if p.n_out > 1 and k != "token_embd"
        }
        write_adapter(adapter, path, base)
        renamed = tmp_path / f"adapter-{i}"
        path.rename(renamed)
        names.append(str(renamed))
    outputs = []
    for mixed in (names, [names[0]] * 3):
        scaled = [word for name, s in zip(mixed, "123", strict=True)
                  for word in ("--lora-scaled", name, s)]  # fmt: skip
        assert (
            command.main(["-m", MODEL, "-p", "FERRYMAN:", "-n", "40", "--temp", "0", *scaled]) == 0
        )
        captured = capfdbinary.readouterr()
        outputs.append(captured.out)
        assert captured.err.count(b"applied 15 of 15 tensors") == 3
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-gan", "3", "-gaw", "8"], "--grp-attn-w: groups of 3 do not divide a width of 8"),
        (["-gan", "0"], "-gan: 0 is below 1"),
        (["--rope-scale", "0"], "--rope-scale: 0 is not above 0"),
        (["--rope-freq-base", "-1"], "--rope-freq-base: -1 is below 0"),
        (["--rope-scaling", "yarn", "--rope-freq-base", "0.5"], "YaRN needs a RoPE base above 1"),
        (["--rope-scaling", "ntk"], "'ntk' is not one of none, linear, yarn"),
        (["--override-kv", "a.b=int:x"], "'x' is no int"),
        (["--override-kv", "a.b=bool:1"], "'1' is no bool"),
        (["--override-kv", "a.b=uint:1"], "'a.b=uint:1' is not KEY=TYPE:VALUE"),
        (["--override-kv", "llama.context_length=str:many"], "has type U32, which a string cannot"),
        (["--override-kv", "llama.block_count=int:9"], "mini-f32.gguf: tensor blk.2."),
        (["--override-kv", "llama.attention.head_count=int:0"], "0 is out of range"),
        (["-ctk", "f8"], "'f8' is not one of "),
        (["-ctk", "q8_0"], "a cache of keys as Q8_0: heads of 16 are not whole blocks of 32"),
        (["-ctv", "q4_0"], "a cache of values as Q4_0: heads of 16 are not whole blocks of 32"),
        (["-sm", "all"], "'all' is not one of none, layer, row"),
        (["-ts", "1,x"], "'1,x' is not a number"),
        (["--control-vector", "nowhere.gguf"], "nowhere.gguf"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(arguments, message, capfd):
    assert message in refused(arguments, capfd)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "holds no directions"),
        ({"direction.0": np.ones(64)}, "tensor direction.0: is no direction"),
        ({"direction.x": np.ones(64)}, "tensor direction.x: is no direction"),
        ({"direction.1": np.ones((2, 32))}, "tensor direction.1: is no direction"),
        ({"direction.1": np.ones(32)}, "directions of 32 do not fit a model of width 64"),
        ({"direction.1": np.full(64, np.nan)}, "direction.1: holds an infinity or NaN"),
    ],
)
def test_files_that_are_no_control_vectors_are_refused(directions, message, tmp_path, capfd):
    path = tmp_path / "c.gguf"
    write_directions(path, directions)
    assert message in refused(["--control-vector", str(path)], capfd)
