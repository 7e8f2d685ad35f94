"""What `finetune` offers beyond the original: each asked for by its option, none in the way."""

from __future__ import annotations

import csv
import os
import pty
import re
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.gguf import read_gguf
from engine.lora import BaseInfo, read_adapter
from engine.model import Model
from engine.tools import finetune
from engine.training import resources
from engine.training.checkpoint import read_checkpoint
from engine.training.resources import MemoryLimit

DATA = Path(__file__).parents[1] / "data"
MODEL = str(DATA / "mini-f32.gguf")
SMALL = [
    "--model-base", MODEL, "--train-data", "train.txt", "--checkpoint-out", "chk-ITERATION.gguf",
    "--lora-out", "lora-ITERATION.bin", "--threads", "1", "--compute", "f32", "--ctx", "16",
    "--batch", "2", "--seed", "3", "--warmup", "1", "--checkpoint-in", "", "--save-every", "0",
]  # fmt: skip
WITHOUT_NORMS = ["--rank-att-norm", "0", "--rank-ffn-norm", "0", "--rank-out-norm", "0"]

# Every line of a default run on standard output begins like one of the original's.
ORIGINAL = re.compile(
    r"main: |print_params: |print_lora_params: |tokenize_file: |train_opt_callback: "
    r"|save_checkpoint_lora_file: |save_as_llama_lora: "
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty folder, made current, with a training text."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "play.txt", "train.txt")
    return tmp_path


@pytest.fixture
def train(folder, capfd):
    """Function that runs the command; returns status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = finetune.main([*SMALL, *arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"train.txt"}


# ---------------------------------------------------------------- proof of learning


def test_a_default_run_prints_the_originals_lines_and_reports_on_standard_error(train):
    status, out, err = train("--adam-iter", "4", "--adam-alpha", "0.01")
    assert status == 0
    assert all(ORIGINAL.match(line) for line in out.splitlines())
    told = re.search(
        r"report: loss on the last 2 % of the data \((\d+) tokens\): (\S+) before, (\S+) after\n",
        err,
    )
    n_tokens, before, after = told.groups()
    assert int(n_tokens) <= 2048
    assert float(after) < float(before)
    assert "report: 21 of 21 adapter tensors moved\n" in err
    largest = re.search(r"report: largest relative size \|s\*BA\|/\|W\|: (.*)\n", err).group(1)
    ratios = [float(part.split()[1]) for part in largest.split(", ")]
    assert len(ratios) == 3 and ratios == sorted(ratios, reverse=True) and ratios[-1] > 0


def test_the_report_changes_nothing_that_is_written(train):
    assert train("--adam-iter", "3")[0] == 0
    kept = {name: Path(name).read_bytes() for name in ("chk-3.gguf", "lora-3.bin")}
    status, out, err = train("--adam-iter", "3", "--no-report")
    assert status == 0 and "report" not in out + err
    for name, content in kept.items():
        assert Path(name).read_bytes() == content


def test_a_run_in_which_nothing_moved_says_so_with_status_2(train):
    # While warming up, the first update has a rate of 0.
    status, _, err = train("--adam-iter", "1", "--warmup", "10")
    assert status == 2
    assert "report: 0 of 21 adapter tensors moved\n" in err
    assert "report: nothing moved" in err
    assert Path("chk-1.gguf").exists()
    assert train("--adam-iter", "1", "--warmup", "10", "--no-report")[0] == 0


def test_no_updates_are_no_failure_to_learn(train, folder):
    status, _, err = train("--adam-iter", "0")
    assert (status, err, written(folder)) == (0, "", set())


def test_the_length_of_the_run_is_told_after_the_second_step(train):
    err = train("--adam-iter", "6")[2]
    assert re.search(
        r"^the whole run of 6 iterations will take about \S+, until (\S+ )?\d\d:\d\d$",
        err, re.MULTILINE,
    )  # fmt: skip
    assert "the whole run" not in train("--adam-iter", "1")[2]


# ---------------------------------------------------------------- validation

VALIDATION = re.compile(r"iter= *(\d+) .*\|-*> val=(\S+)$", re.MULTILINE)


def test_validation_is_told_kept_and_resumed(train, folder):
    options = ["--val-split", "0.1", "--eval-every", "2", "--adam-alpha", "0.01"]
    status, out, err = train(*options, "--adam-iter", "4", "--save-every", "2")
    assert status == 0
    assert [int(i) for i, _ in VALIDATION.findall(out)] == [0, 2, 4]
    assert "report: loss on validation data (" in err
    saved = read_checkpoint("chk-2.gguf").state.validation
    told = dict(VALIDATION.findall(out))
    assert f"{saved.loss:f}" == told["2"]
    assert (saved.iteration, saved.best_loss, saved.no_improvement) == (2, saved.loss, 0)
    whole = Path("lora-4.bin").read_bytes()
    status, out, _ = train(*options, "--adam-iter", "2", "--checkpoint-in", "chk-2.gguf")
    assert status == 0
    assert dict(VALIDATION.findall(out)) == {i: told[i] for i in ("2", "4")}
    assert Path("lora-4.bin").read_bytes() == whole


def test_the_keys_of_a_checkpoint_stay_the_originals_without_validation(train):
    train("--adam-iter", "2", "--lora-out", "")
    with read_gguf("chk-2.gguf") as plain:
        keys = list(plain.metadata)
    assert keys[-1] == "optimizer.adam.no_improvement_count"
    train("--adam-iter", "2", "--lora-out", "", "--val-split", "0.1")
    with read_gguf("chk-2.gguf") as validated:
        more = list(validated.metadata)
    assert more[: len(keys)] == keys
    assert all(key.startswith("training.validation.") for key in more[len(keys) :])
    assert len(more) > len(keys)


def test_other_validation_data_begin_anew(train):
    options = ["--adam-iter", "2", "--eval-every", "2", "--lora-out", ""]
    Path("other.txt").write_bytes(Path("train.txt").read_bytes()[:900])
    train(*options, "--val-split", "0.1")
    out = train(*options, "--val-data", "other.txt", "--checkpoint-in", "chk-2.gguf")[1]
    assert [int(i) for i, _ in VALIDATION.findall(out)] == [2, 4]
    before = read_checkpoint("chk-2.gguf").state.validation
    after = read_checkpoint("chk-4.gguf").state.validation
    assert before.samples_hash != after.samples_hash


def test_the_best_adapter_is_kept_and_a_loss_that_rises_ends_the_run(train):
    # A rate that overshoots: the first validation stays the best.
    status, out, err = train(
        "--val-split", "0.1", "--eval-every", "1", "--early-stop", "3", "--adam-iter", "50",
        "--adam-alpha", "2",
    )  # fmt: skip
    assert status == 0
    losses = [float(loss) for _, loss in VALIDATION.findall(out)]
    assert len(losses) - 1 - int(np.argmin(losses)) == 3
    assert f"ended after iteration {len(losses) - 1}: the validation loss has not improved" in err
    best, last = read_adapter("lora-BEST.bin"), read_adapter("lora-LATEST.bin")
    assert not np.array_equal(best.flat, last.flat)


def test_validation_data_are_a_file_of_their_own(train):
    Path("val.txt").write_bytes(Path("train.txt").read_bytes()[-600:])
    status, out, _ = train("--val-data", "val.txt", "--eval-every", "0", "--adam-iter", "3")
    assert status == 0
    assert [int(i) for i, _ in VALIDATION.findall(out)] == [3]
    assert "main: number of validation tokens: " in out
    assert Path("lora-BEST.bin").read_bytes() == Path("lora-3.bin").read_bytes()


# ---------------------------------------------------------------- logs


def rows(name: str) -> list[dict[str, str]]:
    with open(name, newline="") as file:
        return list(csv.DictReader(file))


def test_a_log_has_a_row_an_iteration(train):
    out = train(
        "--adam-iter", "4", "--log-csv", "log.csv", "--val-split", "0.1", "--eval-every", "2",
        "--grad-acc", "2",
    )[1]  # fmt: skip
    table = rows("log.csv")
    assert [row["iteration"] for row in table] == ["0", "1", "2", "3", "4"]
    # The line of an iteration tells the loss of the row before.
    told = re.findall(r"loss=(\S+)", out)
    assert told[1:] == [f"{float(row['loss']):f}" for row in table[:-1]]
    assert [row["validation_loss"] != "" for row in table] == [True, False, True, False, True]
    assert [int(row["tokens"]) for row in table] == [64, 128, 192, 256, 320]
    assert [int(row["samples"]) for row in table] == [4, 8, 12, 16, 20]
    assert all(float(row["gradient_norm"]) > 0 for row in table)
    assert float(table[0]["learning_rate"]) == 0
    assert float(table[1]["learning_rate"]) == pytest.approx(1e-3, rel=1e-3)


def test_a_resumed_run_goes_on_with_its_log(train):
    train("--adam-iter", "4", "--save-every", "2", "--log-csv", "log.csv")
    first = rows("log.csv")
    train("--adam-iter", "3", "--checkpoint-in", "chk-2.gguf", "--log-csv", "log.csv")
    table = rows("log.csv")
    assert [row["iteration"] for row in table] == ["0", "1", "2", "3", "4", "5"]
    assert table[:2] == first[:2]
    assert [row["loss"] for row in table[:5]] == [row["loss"] for row in first]
    seconds = [float(row["seconds"]) for row in table]
    assert seconds == sorted(seconds)


def test_a_fresh_run_begins_its_log_anew(train):
    Path("log.csv").write_text("what was there before\n")
    train("--adam-iter", "1", "--warmup", "0", "--log-csv", "log.csv")
    assert [row["iteration"] for row in rows("log.csv")] == ["0", "1"]


def test_a_plot_needs_matplotlib_and_a_known_ending(train, folder, monkeypatch):
    status, out, err = train("--plot", "x.pdf")
    assert (status, out) == (1, "")
    assert err == "error: --plot: x.pdf: the name must end in .svg or .png\n"
    monkeypatch.setattr("engine.training.log.find_spec", lambda _: None)
    status, _, err = train("--plot", "x.svg")
    assert status == 1
    assert err == "error: --plot: needs matplotlib: pip install 'cylora[plot]'\n"
    assert written(folder) == set()


@pytest.mark.parametrize(("name", "begin"), [("x.svg", b"<?xml"), ("x.png", b"\x89PNG")])
@pytest.mark.filterwarnings("default")
def test_a_plot_is_drawn(train, name, begin):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    status = train("--adam-iter", "3", "--plot", name, "--val-split", "0.1", "--eval-every", "2")[0]
    assert status == 0
    assert Path(name).read_bytes().startswith(begin)


def test_a_terminal_shows_progress(folder):
    main, end = pty.openpty()
    code = "import sys; from engine.tools.finetune import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, *SMALL, "--adam-iter", "12"],
        stdout=subprocess.PIPE, stderr=end,
    ) as process:  # fmt: skip
        os.close(end)
        shown = b""
        while True:
            try:
                part = os.read(main, 1 << 16)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        out = process.stdout.read().decode()
    os.close(main)
    assert process.returncode == 0
    assert re.search(rb"\r\x1b\[Kiteration 7/12  .*loss \d+\.\d{4}", shown)
    assert b"tokens/s" in shown and b"ETA " in shown
    assert shown.rstrip().splitlines()[-1].startswith(b"report: ")
    assert all(ORIGINAL.match(line) for line in out.splitlines())


# ---------------------------------------------------------------- before it starts


def test_a_dry_run_tells_what_a_run_would_take_and_writes_nothing(train, folder):
    status, out, err = train("--dry-run", "--log-csv", "x.csv", "--adam-iter", "100")
    assert (status, err, written(folder)) == (0, "", set())
    lines = [line for line in out.splitlines() if line.startswith("dry run: ")]
    told = dict(line.removeprefix("dry run: ").split("=", 1) for line in lines)
    told = {name.strip(): text.strip() for name, text in told.items()}
    assert int(told["samples"]) > 10_000 and int(told["tokens"]) > 10_000
    with Model.load(MODEL).file as file:
        stored = sum(info.n_bytes for info in file.tensors.values())
    assert f"{stored / 2**20:.1f} MB of the model's file" in told["peak memory"]
    assert int(told["trainable parameters"]) == 17221
    assert re.fullmatch(r"\S+ tokens/s \(\S+ s for 32 tokens\)", told["speed"])
    assert re.fullmatch(r"(\S+ )?\d\d:\d\d, after \S+ for 100 iterations", told["expected end"])


def test_a_dry_run_counts_the_updates_of_epochs(train):
    Path("train.txt").write_text("\n\n".join(f"Line {i}" for i in range(11)))
    out = train("--dry-run", "--sample-start", "\\n\\n", "--escape", "--epochs", "2")[1]
    assert "for 10 iterations" in out  # ten samples, two a batch


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_plan_that_exceeds_the_memory_is_refused(train, folder, monkeypatch, option):
    limit = MemoryLimit(3 << 20, "the control group")
    monkeypatch.setattr(resources, "available_memory", lambda: limit)
    status, _, err = train(*option, "--batch", "3")
    assert status == 1
    assert re.fullmatch(
        r"error: training needs \S+ MB of memory, the control group has 3\.0 MB left; lower"
        r" --batch \(3\), --ctx \(16\), --lora-r \(4\)\n",
        err,
    )
    assert written(folder) == set()


def test_a_context_that_no_memory_holds_is_refused_before_it_is_planned(train, folder):
    status, _, err = train("--ctx", "2000000000")
    assert status == 1
    assert err.startswith("error: training needs ") and "--ctx (2000000000)" in err
    assert written(folder) == set()


# ---------------------------------------------------------------- forms of adapters


@pytest.mark.parametrize(
    ("name", "file"),
    [("x-ITERATION.gguf", "x-2.gguf"), ("x-ITERATION/", "x-2/adapter_model.safetensors"),
     ("x-ITERATION.safetensors", "x-2.safetensors"), ("x-ITERATION.bin", "x-2.bin")],
)  # fmt: skip
def test_the_name_of_the_adapter_chooses_its_form(train, name, file):
    status, out, _ = train("--adam-iter", "2", "--lora-out", name, *WITHOUT_NORMS)
    assert status == 0
    assert f"save_as_llama_lora: saving to {name.replace('ITERATION', '2')}\n" in out
    assert Path(file).is_file()
    trained = read_checkpoint("chk-2.gguf").adapter
    base = BaseInfo.of(Model.load(MODEL))
    found = read_adapter(file if name.endswith(".safetensors") else name.replace("ITERATION", "2"),
                         base)  # fmt: skip
    assert set(found.pairs) == set(trained.pairs)
    for pair in trained.pairs.values():
        ours = trained.scale * pair.b.T @ pair.a
        theirs = found.scale * found.pairs[pair.name].b.T @ found.pairs[pair.name].a
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors", "x/"])
def test_a_form_that_cannot_hold_norms_is_refused_with_the_options_that_mend_it(
    train, folder, name
):
    status, _, err = train("--lora-out", name)
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("error: --lora-out: ")
    for option in WITHOUT_NORMS[::2]:
        assert f"{option} 0" in err
    assert written(folder) == set()


def test_the_default_name_of_an_adapter_is_the_bin_form_in_spite_of_its_ending(folder, capfd):
    given = [word for word in SMALL if word not in ("--lora-out", "lora-ITERATION.bin")]
    assert finetune.main([*given, "--only-write-lora"]) == 0
    assert Path("ggml-lora-0-f32.gguf").read_bytes()[:4] == b"algg"


def test_a_checkpoint_is_converted_to_every_form(train):
    assert train("--adam-iter", "2", *WITHOUT_NORMS)[0] == 0
    base = BaseInfo.of(Model.load(MODEL))
    adapters = []
    for name in ("y.bin", "y.gguf", "y/"):
        status, _, err = train(
            "--only-write-lora", "--checkpoint-in", "chk-2.gguf", "--lora-out", name
        )
        assert (status, err) == (0, "")
        adapters.append(read_adapter(name, base))
    plain, gguf, peft = adapters
    assert set(plain.pairs) == set(gguf.pairs) == set(peft.pairs)


def test_a_conversion_leaves_out_what_has_rank_0(train):
    assert train("--adam-iter", "2")[0] == 0
    convert = ["--only-write-lora", "--checkpoint-in", "chk-2.gguf", "--lora-out", "y.gguf"]
    assert all(f"{option} 0" in train(*convert)[2] for option in WITHOUT_NORMS[::2])
    status, _, err = train(*convert, *WITHOUT_NORMS)
    assert status == 0 and err.count("\n") == 1
    assert err.startswith("note: attn_norm, ffn_norm, output_norm: left out")
    whole, found = read_checkpoint("chk-2.gguf").adapter, read_adapter("y.gguf")
    assert set(found.pairs) == {name for name in whole.pairs if not name.endswith("norm")}
    assert found.scale == whole.scale
    for name, pair in found.pairs.items():
        np.testing.assert_array_equal(pair.b, whole.pairs[name].b)
    # Other ranks must still be the checkpoint's, and training needs every one.
    assert "4, 3 was" in train(*convert, *WITHOUT_NORMS, "--rank-wq", "3")[2]
    assert "1, 0 was" in train("--checkpoint-in", "chk-2.gguf", *WITHOUT_NORMS)[2]


def test_a_scale_by_the_root_of_the_rank_is_trained_with_and_kept(train):
    first = ["--lora-r", "9", "--lora-alpha", "6", "--rslora"]
    assert train(*first, "--adam-iter", "2", *WITHOUT_NORMS)[0] == 0
    assert read_checkpoint("chk-2.gguf").adapter.scale == 2
    assert train("--checkpoint-in", "chk-2.gguf", "--adam-iter", "1", "--lora-out", "x.gguf",
                 "--warmup", "0")[0] == 0  # fmt: skip
    resumed = read_checkpoint("chk-3.gguf").adapter
    assert (resumed.rslora, resumed.r, resumed.alpha) == (True, 9, 6)
    # Forms that know no root have it in B: what the adapter adds is the same.
    pair, found = resumed.pairs["blk.0.attn_q"], read_adapter("x.gguf")
    theirs = found.pairs["blk.0.attn_q"]
    np.testing.assert_allclose(
        found.scale * theirs.b.T @ theirs.a, 2 * pair.b.T @ pair.a, rtol=1e-5, atol=1e-8
    )


def test_a_rank_far_above_alpha_is_warned_of(train):
    err = train("--only-write-lora", "--lora-r", "32", "--lora-alpha", "4")[2]
    assert err.startswith("warning: --lora-r: 32 is far above an alpha of 4")
    assert "--rslora" in err and err.count("\n") == 1
    assert train("--only-write-lora", "--lora-r", "32")[2] == ""
    assert train("--only-write-lora", "--lora-r", "32", "--lora-alpha", "4", "--rslora")[2] == ""


# ---------------------------------------------------------------- conversations

PAIRS = "".join(
    f'{{"prompt": "Question {i}: ", "completion": "the river says {i}."}}\n' for i in range(9)
)


def test_conversations_are_trained_on_and_shown(train):
    Path("pairs.jsonl").write_text(PAIRS)
    status, out, _ = train(
        "--train-data", "pairs.jsonl", "--ctx", "48", "--adam-iter", "3", "--show-sample"
    )
    assert status == 0
    assert "tokenize_file: total number of samples: 9\n" in out
    shown = out.split("what counts in the loss marked:\n")[1].splitlines()[0]
    assert re.search(r"Question 0: ⟦the river says 0\.</s>⟧$", shown)


def test_the_prompt_counts_and_the_end_is_left_out_when_asked_for(train):
    Path("pairs.jsonl").write_text(PAIRS)
    out = train(
        "--train-data", "pairs.jsonl", "--ctx", "48", "--dry-run", "--show-sample",
        "--no-mask-prompt", "--no-append-eos",
    )[1]  # fmt: skip
    shown = out.split("what counts in the loss marked:\n")[1].splitlines()[0]
    assert re.search(r"⟦ ?Question 0: the river says 0\.⟧$", shown)


def test_a_part_of_the_conversations_is_watched(train):
    Path("pairs.jsonl").write_text(PAIRS)
    status, out, _ = train(
        "--train-data", "pairs.jsonl", "--ctx", "48", "--adam-iter", "2", "--val-split", "0.25"
    )
    assert status == 0
    assert "tokenize_file: total number of samples: 7\n" in out
    assert [int(i) for i, _ in VALIDATION.findall(out)] == [0, 2]


@pytest.mark.parametrize("line", ["{", '{"prompt": "x"}', '["text"]', '{"text": 3}'])
def test_a_line_that_is_no_conversation_is_refused_by_its_number(train, folder, line):
    Path("pairs.jsonl").write_text(PAIRS + line + "\n" + PAIRS)
    status, _, err = train("--train-data", "pairs.jsonl")
    assert status == 1 and err.count("\n") == 1
    assert err.startswith("error: pairs.jsonl: line 10: ")
    assert written(folder) == {"pairs.jsonl"}


def test_the_end_of_a_sample_of_plain_text_is_taught(train):
    Path("train.txt").write_text("# one\n# two\n# three\n")
    out = train("--dry-run", "--sample-start", "# ", "--append-eos", "--show-sample")[1]
    shown = out.split("what counts in the loss marked:\n")[1]
    assert re.match(r"<s>⟦ ?one\n</s>⟧\n", shown)


def test_a_name_without_room_for_the_best_adapter_is_told(train):
    words = ["--val-split", "0.1", "--adam-iter", "1", "--warmup", "0"]
    line = "--lora-out: no ITERATION in x.bin, so that the best adapter is not kept apart\n"
    assert train(*words, "--lora-out", "x.bin")[2].count(line) == 1
    for other in (["--lora-out", "l-ITERATION.bin"], ["--lora-out", ""]):
        assert "--lora-out" not in train(*words, *other)[2]
    assert "--lora-out" not in train("--adam-iter", "1", "--lora-out", "x.bin")[2]


# ---------------------------------------------------------------- what can go wrong on the way


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_good_checkpoint(train, folder):
    assert train("--adam-iter", "2", "--lora-out", "")[0] == 0
    good = Path("chk-2.gguf").read_bytes()
    status, out, err = train(
        "--checkpoint-in", "chk-2.gguf", "--adam-iter", "9", "--adam-alpha", "1e30",
        "--log-csv", "log.csv", "--save-every", "100", "--warmup", "0",
    )  # fmt: skip
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(
        r"error: iteration 3: the loss is (nan|inf); the gradient of output\.weight\.lora_[ab]"
        r" is the first that is not finite; go on from chk-2\.gguf; ",
        line,
    )
    assert Path("chk-2.gguf").read_bytes() == good
    assert Path("chk-LATEST.gguf").read_bytes() == good
    assert "saving to" not in out and "report" not in err
    assert [row["iteration"] for row in rows("log.csv")] == ["2"]


@pytest.mark.parametrize("rate", ["1e4", "1e38"])
def test_what_is_saved_where_the_loss_blows_up_replaces_nothing(train, folder, rate):
    every = ["--save-every", "1", "--warmup", "0"]
    assert train("--adam-iter", "2", *every)[0] == 0
    status, out, err = train(
        "--checkpoint-in", "chk-LATEST.gguf", "--adam-alpha", rate, "--adam-iter", "9", *every
    )
    assert status == 1
    bad, name = re.search(r"iteration (\d+): .* go on from (\S+); ", err).groups()
    assert f"saving to chk-{bad}.gguf\n" in out  # it was due there
    for missing in (f"chk-{bad}.gguf", f"lora-{bad}.bin"):
        assert not Path(missing).exists()
    assert not list(folder.glob(".*"))
    assert read_checkpoint(name).state.opt_iteration == int(bad) - 1
    assert Path("lora-LATEST.bin").read_bytes() == Path(f"lora-{int(bad) - 1}.bin").read_bytes()
    status, out, _ = train("--checkpoint-in", name, "--adam-iter", "0")
    assert status == 0 and f"iter={int(bad) - 1:6d} " in out


def start_limited(n_bytes: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run with the largest size of a file limited, as if the disk were full."""
    code = "import sys; from engine.tools.finetune import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *SMALL, *arguments],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes)),
    )  # fmt: skip


def test_a_full_disk_while_saving_leaves_the_files_whole_and_training_goes_on(folder):
    Path("chk-LATEST.gguf").write_bytes(b"the checkpoint before")
    # A checkpoint needs 218 kB, an adapter 72.
    done = start_limited(100_000, "--adam-iter", "4", "--save-every", "2")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert [re.search(r"chk-\w+\.gguf", line).group() for line in warnings] == [
        "chk-2.gguf", "chk-LATEST.gguf", "chk-4.gguf", "chk-LATEST.gguf",
        "chk-4.gguf", "chk-LATEST.gguf",
    ]  # fmt: skip
    assert all("training goes on, the file saved before is whole" in line for line in warnings)
    assert Path("chk-LATEST.gguf").read_bytes() == b"the checkpoint before"
    assert "iter=     4 " in done.stdout
    assert read_adapter("lora-4.bin").pairs
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: chk-")
    assert "the end of the run is not saved" in done.stderr.splitlines()[-1]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("output", ["full", "closed"])
def test_a_standard_output_that_takes_no_more_costs_its_lines_only(folder, output):
    code = "import sys; from engine.tools.finetune import main; sys.exit(main())"
    words = shlex.join([sys.executable, "-c", code, *SMALL, "--adam-iter", "4"])
    target = {"full": ">/dev/full", "closed": ">&-"}[output]
    done = subprocess.run(
        ["sh", "-c", f"{words} {target}"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: standard output: ")
    assert done.stderr.splitlines()[-1].startswith("error: standard output: ")
    assert "adapter tensors moved" in done.stderr
    assert read_checkpoint("chk-LATEST.gguf").state.opt_iteration == 4


def test_a_full_disk_while_logging_costs_the_log_only(folder):
    done = start_limited(
        120, "--adam-iter", "4", "--log-csv", "log.csv", "--checkpoint-out", "", "--lora-out", ""
    )
    assert done.returncode == 0
    assert done.stderr.count("warning: log.csv: cannot be written: ") == 1


def test_a_save_that_works_again_is_all_that_counts(train, monkeypatch):
    from engine.errors import EngineError
    from engine.training import checkpoint

    real, tries = checkpoint.write_checkpoint, []

    def failing_twice(name, *arguments):
        tries.append(name)
        if len(tries) <= 2:
            raise EngineError(f"{name}: cannot be written: no space")
        real(name, *arguments)

    monkeypatch.setattr(checkpoint, "write_checkpoint", failing_twice)
    status, _, err = train("--adam-iter", "4", "--save-every", "2")
    assert status == 0
    assert err.count("warning: ") == 2
    assert tries == ["chk-2.gguf", "chk-LATEST.gguf", "chk-4.gguf", "chk-LATEST.gguf"]
    assert read_checkpoint("chk-LATEST.gguf").state.opt_iteration == 4


# ---------------------------------------------------------------- where the time went


def test_the_time_of_each_op_is_told_when_asked_for_and_changes_nothing(train, monkeypatch):
    monkeypatch.setattr("engine.perf._STEPS", {"fma": 1 << 8})
    assert train("--adam-iter", "2")[0] == 0
    plain = Path("lora-2.bin").read_bytes()
    status, out, err = train("--adam-iter", "2", "--perf")
    assert status == 0 and Path("lora-2.bin").read_bytes() == plain
    assert "perf:" not in out
    assert re.search(r"^perf: 3 evaluations, [\d.]+ s in 1 threads, kernels \w+; ", err, re.M)
    for op in ("linear ffn_gate", "linear back ffn_gate", "Attention", "CrossEntropy", "AdamW"):
        assert re.search(rf"^perf: {op}  ", err, re.M), op


# ---------------------------------------------------------------- several samples a row


def test_packed_rows_take_more_samples_and_give_one_result_whatever_the_threads(train):
    shape = ["--sample-start", "\n", "--ctx", "64", "--adam-iter", "2"]
    out = train(*shape)[1]
    assert re.findall(r"iter= +\d+ sample=(\d+)/", out) == ["1", "3", "5"]
    packed = []
    for n_threads in "123":
        status, out, _ = train(*shape, "--pack-samples", "--threads", n_threads)
        assert status == 0
        places = [int(n) for n in re.findall(r"iter= +\d+ sample=(\d+)/", out)]
        packed.append((places, Path("lora-2.bin").read_bytes()))
    assert places[1] > 3 and places[2] > places[1]
    assert packed[1:] == packed[:1] * 2


def test_packing_and_filling_contradict_each_other(train):
    status, _, err = train("--pack-samples", "--fill-with-next-samples")
    assert status == 1
    assert "--pack-samples: --fill-with-next-samples is given too" in err


# ---------------------------------------------------------------- the same bytes whatever the way


def plan_of(out: str) -> str:
    return re.search(r"^main: memory plan: (.*)$", out, re.MULTILINE).group(1)


def limits(train) -> dict[str, str]:
    """Limits under which each kind of plan is chosen, found by asking for too little."""
    status, _, err = train("--memory-limit", "1K", "--dry-run")
    assert status == 1
    least = float(re.search(r"takes ([\d.]+) MB at the least", err).group(1))
    return {f"{int(1024 * (least + extra))}K": kind for extra, kind in PLANS}


PLANS = [
    (0.5, "checkpointing of every layer, "),
    (1.2, "activations of 1 of 2 layers kept, "),
    (100, "no checkpointing, "),
]


def test_threads_checkpoints_and_plans_change_no_byte(train, folder, monkeypatch):
    # Memory in use differs from run to run; here it is what the plan adds that counts.
    monkeypatch.setattr(resources, "memory_in_use", lambda: 0)
    shape = ["--adam-iter", "3", "--batch", "4", "--ctx", "64"]
    ways = [["--threads", n] for n in "123"]
    ways += [["--no-checkpointing", "--threads", n] for n in "13"]
    found = set()
    for limit, kind in limits(lambda *a: train(*shape, *a)).items():
        ways.append(["--memory-limit", limit])
        status, out, _ = train(*shape, "--memory-limit", limit, "--dry-run")
        assert status == 0
        assert plan_of(out).startswith(kind)
        found.add(plan_of(out))
    assert len(found) == 3
    expected = None
    for way in ways:
        assert train(*shape, *way)[0] == 0
        files = [Path(name).read_bytes() for name in ("chk-3.gguf", "lora-3.bin")]
        expected = expected or files
        assert files == expected, way


def test_a_run_resumed_with_other_threads_and_memory_gives_the_bytes_of_a_whole_one(train, folder):
    assert train("--adam-iter", "4", "--save-every", "2", "--threads", "2")[0] == 0
    adapter, state = Path("lora-4.bin").read_bytes(), read_checkpoint("chk-4.gguf").state
    options = ["--adam-iter", "2", "--checkpoint-in", "chk-2.gguf", "--threads", "3"]
    assert train(*options, "--memory-limit", "4G")[0] == 0
    assert Path("lora-4.bin").read_bytes() == adapter
    resumed = read_checkpoint("chk-4.gguf").state
    assert np.array_equal(resumed.m, state.m) and np.array_equal(resumed.v, state.v)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--memory-limit", "1M"], "this run takes"),
        (["--memory-limit", "0"], "a whole number from 1"),
        (["--memory-limit", "2T"], "'T' stands after 2"),
        (["--memory-limit", "2G", "--no-checkpointing"], "leave out --use-checkpointing and"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(train, folder, arguments, message):
    status, _, err = train(*arguments)
    assert status == 1
    assert err.startswith("error: ") and "--memory-limit" in err and message in err
    assert written(folder) == set()
