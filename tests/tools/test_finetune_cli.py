"""The command line of `finetune`: defaults, spellings, refusals; no model is loaded here."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from engine.errors import OptionError
from engine.tools import finetune
from engine.tools.finetune_files import Outputs
from engine.tools.finetune_options import TABLE, FinetuneOptions, parse
from engine.tools.options import UsageError

CLOCK = 2**32 - 1
DEFAULTS = {
    "train_data": "shakespeare.txt",
    "checkpoint_in": "checkpoint.gguf",
    "checkpoint_out": "checkpoint-ITERATION.gguf",
    "pattern_fn_it": "ITERATION",
    "fn_latest": "LATEST",
    "save_every": 10,
    "seed": CLOCK,
    "ctx": 128,
    "threads": 6,
    "batch": 8,
    "grad_acc": 1,
    "sample_start": "",
    "include_sample_start": False,
    "escape": False,
    "overlapping_samples": False,
    "fill_with_next_samples": False,
    "separate_with_eos": False,
    "separate_with_bos": True,
    "sample_random_offsets": False,
    "pack_samples": False,
    "perf": False,
    "force_reshuffle": False,
    "use_flash": False,
    "use_checkpointing": True,
    "compute": "auto",
    "memory_limit": None,
    "warmup": 100,
    "cos_decay_steps": 1000,
    "cos_decay_restart": 1.1,
    "cos_decay_min": 0.1,
    "enable_restart": False,
    "opt_past": 0,
    "opt_delta": 1e-5,
    "opt_max_no_improvement": 0,
    "epochs": -1,
    "adam_iter": 256,
    "adam_alpha": 1e-3,
    "adam_min_alpha": 0.0,
    "adam_decay": 0.1,
    "adam_decay_min_ndim": 2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_gclip": 1.0,
    "adam_epsf": 0.0,
    "gpu_layers": "0",
    "model_base": "",
    "lora_out": "ggml-lora-ITERATION-f32.gguf",
    "only_write_lora": False,
    "norm_rms_eps": None,
    "rope_freq_base": None,
    "rope_freq_scale": None,
    "lora_r": 4,
    "lora_alpha": None,
    "rank_token_embd": None,
    "rank_output_norm": None,
    "rank_output": None,
    "rank_attn_norm": None,
    "rank_attn_q": None,
    "rank_attn_k": None,
    "rank_attn_v": None,
    "rank_attn_output": None,
    "rank_ffn_norm": None,
    "rank_ffn_gate": None,
    "rank_ffn_down": None,
    "rank_ffn_up": None,
    "rslora": False,
    "mask_prompt": None,
    "append_eos": None,
    "show_sample": False,
    "val_data": "",
    "val_split": 0.0,
    "eval_every": 10,
    "early_stop": 0,
    "log_csv": "",
    "plot": "",
    "report": True,
    "dry_run": False,
    "given": frozenset(),
}

FLAGS = {
    "--include-sample-start": ("include_sample_start", True),
    "--escape": ("escape", True),
    "--overlapping-samples": ("overlapping_samples", True),
    "--fill-with-next-samples": ("fill_with_next_samples", True),
    "--separate-with-eos": ("separate_with_eos", True),
    "--no-separate-with-eos": ("separate_with_eos", False),
    "--separate-with-bos": ("separate_with_bos", True),
    "--no-separate-with-bos": ("separate_with_bos", False),
    "--sample-random-offsets": ("sample_random_offsets", True),
    "--pack-samples": ("pack_samples", True),
    "--perf": ("perf", True),
    "--force-reshuffle": ("force_reshuffle", True),
    "--use-flash": ("use_flash", True),
    "--no-flash": ("use_flash", False),
    "--use-checkpointing": ("use_checkpointing", True),
    "--no-checkpointing": ("use_checkpointing", False),
    "--enable-restart": ("enable_restart", True),
    "--disable-restart": ("enable_restart", False),
    "--only-write-lora": ("only_write_lora", True),
    "--rslora": ("rslora", True),
    "--mask-prompt": ("mask_prompt", True),
    "--no-mask-prompt": ("mask_prompt", False),
    "--append-eos": ("append_eos", True),
    "--no-append-eos": ("append_eos", False),
    "--show-sample": ("show_sample", True),
    "--no-report": ("report", False),
    "--dry-run": ("dry_run", True),
}

TEXTS = {
    "--train-data": "train_data",
    "--checkpoint-in": "checkpoint_in",
    "--checkpoint-out": "checkpoint_out",
    "--pattern-fn-it": "pattern_fn_it",
    "--fn-latest": "fn_latest",
    "--sample-start": "sample_start",
    "--model-base": "model_base",
    "--lora-out": "lora_out",
    "--val-data": "val_data",
    "--log-csv": "log_csv",
    "--plot": "plot",
    "--n-gpu-layers": "gpu_layers",
    "-ngl": "gpu_layers",
}

NUMBERS = {
    "--save-every": "save_every",
    "-s": "seed",
    "--seed": "seed",
    "-c": "ctx",
    "--ctx": "ctx",
    "-t": "threads",
    "--threads": "threads",
    "-b": "batch",
    "--batch": "batch",
    "--grad-acc": "grad_acc",
    "--warmup": "warmup",
    "--cos-decay-steps": "cos_decay_steps",
    "--cos-decay-restart": "cos_decay_restart",
    "--cos-decay-min": "cos_decay_min",
    "--opt-past": "opt_past",
    "--opt-delta": "opt_delta",
    "--opt-max-no-improvement": "opt_max_no_improvement",
    "--epochs": "epochs",
    "--adam-iter": "adam_iter",
    "--adam-alpha": "adam_alpha",
    "--adam-min-alpha": "adam_min_alpha",
    "--adam-decay": "adam_decay",
    "--adam-decay-min-ndim": "adam_decay_min_ndim",
    "--adam-gclip": "adam_gclip",
    "--adam-epsf": "adam_epsf",
    "--norm-rms-eps": "norm_rms_eps",
    "--rope-freq-base": "rope_freq_base",
    "--rope-freq-scale": "rope_freq_scale",
    "--lora-r": "lora_r",
    "--lora-alpha": "lora_alpha",
    "--rank-att-norm": "rank_attn_norm",
    "--rank-ffn-norm": "rank_ffn_norm",
    "--rank-out-norm": "rank_output_norm",
    "--rank-tok-embd": "rank_token_embd",
    "--rank-out": "rank_output",
    "--rank-wq": "rank_attn_q",
    "--rank-wk": "rank_attn_k",
    "--rank-wv": "rank_attn_v",
    "--rank-wo": "rank_attn_output",
    "--rank-ffn-gate": "rank_ffn_gate",
    "--rank-ffn-down": "rank_ffn_down",
    "--rank-ffn-up": "rank_ffn_up",
}

FRACTIONS = {"--adam-beta1": "adam_beta1", "--adam-beta2": "adam_beta2"}


def options(*arguments: str) -> FinetuneOptions:
    return parse(arguments)[0]


def as_dict(parsed: FinetuneOptions) -> dict:
    return {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}


def run(*arguments: str, **keywords) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from engine.tools.finetune import main\n"
               "sys.exit(main())", *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)


def test_every_default_is_the_documented_one():
    assert as_dict(options()) == DEFAULTS


def test_the_expectations_cover_every_spelling():
    validation = {"--val-split", "--eval-every", "--early-stop"}
    expected = {*FLAGS, *TEXTS, *NUMBERS, *FRACTIONS, *validation, "-h", "--help", "--compute"}
    expected.add("--memory-limit")
    assert {name for row in TABLE.rows for name in row.spellings} == expected


@pytest.mark.parametrize(
    "text, n_bytes",
    [("7", 7), ("3k", 3 << 10), ("800M", 800 << 20), ("2G", 2 << 30), ("2g", 2 << 30)],
)
def test_a_size_may_have_a_unit(text, n_bytes):
    assert options("--memory-limit", text).memory_limit == n_bytes


@pytest.mark.parametrize("text", ["0", "-1", "2GB", "1.5G", "G", "99999999999999999999"])
def test_a_size_that_cannot_be_is_refused(text):
    with pytest.raises(OptionError, match="--memory-limit"):
        options("--memory-limit", text)


def both_spellings(names):
    return sorted({spelling for name in names for spelling in (name, underscored(name))})


def underscored(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


@pytest.mark.parametrize("spelling", both_spellings(FLAGS))
def test_flags_set_their_field(spelling):
    field, value = FLAGS[spelling.replace("_", "-")]
    assert as_dict(options(spelling)) == {**DEFAULTS, field: value, "given": frozenset({field})}


@pytest.mark.parametrize("spelling", both_spellings(TEXTS))
def test_texts_are_taken_as_they_are(spelling):
    field = TEXTS[spelling.replace("_", "-")]
    for value in ("", "-1", "a_b c"):
        assert getattr(options(spelling, value), field) == value


@pytest.mark.parametrize("spelling", both_spellings(NUMBERS))
def test_numbers_set_their_field(spelling):
    assert getattr(options(spelling, "5"), NUMBERS[spelling.replace("_", "-")]) == 5


@pytest.mark.parametrize("spelling", both_spellings(FRACTIONS))
def test_fractions_set_their_field(spelling):
    assert getattr(options(spelling, "0.25"), FRACTIONS[spelling.replace("_", "-")]) == 0.25


def test_the_spelling_that_the_original_documents_and_refuses_is_accepted():
    assert options("--rank-ffn_gate", "7").ranks()["ffn_gate"] == 7


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--ctx", "0"), ("--ctx", "-1"), ("-c", "0"), ("--batch", "0"), ("--threads", "0"),
        ("--lora-r", "0"), ("--lora-alpha", "0"), ("--rank-wq", "-1"), ("--rank-ffn_up", "-1"),
        ("--adam-iter", "-1"), ("--opt-past", "-1"), ("--cos-decay-steps", "0"),
        ("--cos-decay-restart", "0.5"), ("--adam-alpha", "-1"), ("--adam-beta1", "1"),
        ("--adam-beta2", "-0.5"), ("--norm-rms-eps", "-1"), ("--rope-freq-base", "0"),
        ("--rope-freq-scale", "0"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_with_the_options_name(option, value):
    name = option.replace("_", "-")
    with pytest.raises(OptionError, match=f"^{name}: {value} is "):
        options(option, value)


@pytest.mark.parametrize("option", ["--enable-restart", "--disable-restart"])
def test_restart_flags_take_no_value(option):
    with pytest.raises(UsageError, match="unknown argument: 1"):
        options(option, "1")


def test_norms_have_rank_1_whatever_the_default_rank():
    ranks = options("--lora-r", "9", "--rank-wv", "0").ranks()
    norms = {"output_norm", "attn_norm", "ffn_norm"}
    assert {kind for kind, rank in ranks.items() if rank == 1} == norms
    assert {kind for kind, rank in ranks.items() if rank == 9} == set(ranks) - norms - {"attn_v"}
    assert ranks["attn_v"] == 0
    assert len(ranks) == 12


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [([], False), (["--lora-alpha", "4"], False), (["--lora-r", "4"], True),
     (["--rank-out", "4"], True)],
)  # fmt: skip
def test_ranks_are_asked_for_by_any_rank_option(arguments, asked):
    assert options(*arguments).names_a_rank() is asked


def test_help_goes_to_standard_error_with_status_0_and_without_numpy():
    code = "import sys; from engine.tools.finetune import main\nstatus = main(['--help'])\n"
    code += "sys.exit(status or ('numpy' in sys.modules and 'numpy was imported') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == TABLE.usage()


def test_an_unknown_argument_is_followed_by_the_usage(capsys):
    assert finetune.main(["--foo_bar"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: unknown argument: --foo-bar\n" + TABLE.usage()


def test_a_missing_value_is_followed_by_the_usage(capsys):
    assert finetune.main(["--seed"]) == 1
    assert capsys.readouterr().err == (
        "error: invalid parameter for argument: --seed\n" + TABLE.usage()
    )


def test_a_number_out_of_range_is_one_line(capsys):
    assert finetune.main(["--ctx", "0"]) == 1
    assert capsys.readouterr().err == "error: --ctx: 0 is below 1\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "cannot be read: No such file"), (b"", "is empty")]
)
def test_a_training_text_without_text_is_refused_before_the_model_is_looked_at(
    folder, capsys, content, reason
):
    if content is not None:
        (folder / "train.txt").write_bytes(content)
    assert finetune.main(["--train-data", "train.txt", "--model-base", "no-such.gguf"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: train.txt: ") and reason in captured.err
    assert captured.err.count("\n") == 1


def test_a_missing_model_is_one_line_and_nothing_is_written(folder):
    (folder / "train.txt").write_text("To be, or not to be")
    done = run("--train-data", "train.txt", "--model-base", "no-such.gguf")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no-such.gguf: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(folder) == ["train.txt"]


def test_a_run_without_a_model_says_which_option_gives_it(folder, capsys):
    (folder / "shakespeare.txt").write_text("To be, or not to be")
    assert finetune.main([]) == 1
    assert capsys.readouterr().err == "error: --model-base: give the base model\n"


def test_layers_for_a_graphics_processor_are_taken_with_two_warnings(folder, capsys):
    assert finetune.main(["-ngl", "many", "--train-data", "none.txt"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "--n-gpu-layers option will be ignored" in lines[0]
    assert lines[2].startswith("error: none.txt: ")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--adam-iter", "56,080"), ("--adam-iter", "32x"), ("--batch", "1.9"), ("--lora-r", "8;"),
     ("--adam-alpha", "1e-3f"), ("--seed", "0x10"), ("-c", "1 28")],
)  # fmt: skip
def test_a_number_with_anything_after_it_is_refused(option, value, capsys):
    assert finetune.main([option, value]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"error: invalid parameter for argument: {option}: '{value}' is not a number: '"
    )
    assert captured.err.endswith(TABLE.usage())
    assert captured.out == ""


def test_space_around_a_number_is_no_harm():
    assert options("--adam-iter", " 12 ").adam_iter == 12


def test_validation_is_parsed():
    parsed = options("--val-split", "0.25", "--eval-every", "3", "--early-stop", "4")
    assert (parsed.val_split, parsed.eval_every, parsed.early_stop) == (0.25, 3, 4)


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "5"])
def test_a_validation_part_is_between_0_and_1(value):
    with pytest.raises(OptionError, match=f"--val-split: {value} is not "):
        options("--val-split", value)


@pytest.mark.parametrize("option", ["--eval-every", "--early-stop"])
def test_validation_options_need_validation_data(option):
    with pytest.raises(OptionError, match=f"{option}: there is no validation"):
        options(option, "2")
    assert options(option, "2", "--val-data", "x")


def test_validation_data_come_from_one_place():
    with pytest.raises(OptionError, match="--val-split: --val-data is given too"):
        options("--val-split", "0.1", "--val-data", "x")


@pytest.mark.parametrize("option", ["--mask-prompt", "--append-eos"])
def test_plain_text_has_neither_prompts_nor_ends(option, folder, capsys):
    (folder / "train.txt").write_text("To be, or not to be")
    assert finetune.main(["--train-data", "train.txt", option]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: ") and error.count("\n") == 1


def test_missing_validation_data_are_refused_before_the_model_is_looked_at(folder, capsys):
    (folder / "train.txt").write_text("To be, or not to be")
    assert finetune.main(["--train-data", "train.txt", "--val-data", "none.txt"]) == 1
    assert capsys.readouterr().err.startswith("error: none.txt: ")


def test_outputs_are_probed_by_name_and_leave_nothing_behind(folder):
    outputs = Outputs("chk-ITERATION.gguf", "no-such-folder/lora", "ITERATION", "LATEST")
    with pytest.raises(OptionError, match="--lora-out: no-such-folder/lora: cannot be written"):
        outputs.check(0, [])
    assert os.listdir(folder) == []


def test_outputs_that_would_destroy_an_input_are_refused(folder):
    outputs = Outputs("chk.gguf", "model.gguf", "ITERATION", "LATEST")
    with pytest.raises(OptionError, match=r"--lora-out: model\.gguf: would overwrite"):
        outputs.check(0, ["./model.gguf"])


def test_one_file_cannot_be_checkpoint_and_adapter(folder):
    outputs = Outputs("same-ITERATION", "same-ITERATION", "ITERATION", "LATEST")
    with pytest.raises(OptionError, match="--lora-out: same-0: would overwrite"):
        outputs.check(0, [])


def test_the_best_adapter_has_a_name_where_the_pattern_has_room():
    named = Outputs("", "lora-ITERATION.bin", "ITERATION", "LATEST", best=True)
    assert named.best_name() == "lora-BEST.bin"
    assert Outputs("", "lora.bin", "ITERATION", "LATEST", best=True).best_name() == ""
    assert Outputs("", "lora-ITERATION.bin", "ITERATION", "LATEST").best_name() == ""


def test_the_latest_adapter_cannot_be_called_like_the_best(folder):
    outputs = Outputs("", "lora-ITERATION.bin", "ITERATION", "BEST", best=True)
    with pytest.raises(OptionError, match=r"--fn-latest: lora-BEST\.bin"):
        outputs.check(0, [])


@pytest.mark.parametrize(
    ("name", "form"),
    [("x.bin", "bin"), ("x.gguf", "gguf"), ("x.safetensors", "peft"), ("x/", "peft"), ("x", "bin")],
)
def test_the_name_of_an_adapter_says_its_form(name, form):
    assert Outputs("", name, "ITERATION", "LATEST").form(name) == form
    assert Outputs("", name, "ITERATION", "LATEST", default_adapter=True).form(name) == "bin"


def test_a_log_cannot_be_written_over_another_output(folder):
    outputs = Outputs("chk.gguf", "", "ITERATION", "LATEST", csv="./chk.gguf")
    with pytest.raises(OptionError, match=r"--log-csv: \./chk\.gguf: would overwrite"):
        outputs.check(0, [])


def test_output_names_replace_the_first_placeholder_only():
    outputs = Outputs("c-ITERATION-ITERATION", "", "ITERATION", "LATEST")
    names = outputs.names(outputs.checkpoint, 3)
    assert names == ["c-3-ITERATION", "c-LATEST-ITERATION"]
    assert outputs.names(outputs.adapter, 3) == []
