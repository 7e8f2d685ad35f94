"""The command line of `main`: defaults, spellings, refusals; no model is loaded here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import OptionError
from engine.tools import main as command
from engine.tools.main_cache import CachedPrompt
from engine.tools.main_lines import tell_timings
from engine.tools.main_log import Log
from engine.tools.main_options import TABLE, MainOptions, PromptSource, QueueForm, parse
from engine.tools.main_run import Run
from engine.tools.options import UsageError
from engine.tools.prompt import prompt_bytes

DATA = Path(__file__).parents[1] / "data"

DEFAULTS = {
    "model": "models/7B/ggml-model-f16.gguf",
    "prompt": (),
    "escape": True,
    "n_predict": -1,
    "n_keep": 0,
    "n_ctx": 0,
    "n_batch": 2048,
    "n_ubatch": 512,
    "threads": None,
    "threads_batch": None,
    "seed": 2**32 - 1,
    "display_prompt": True,
    "verbose_prompt": False,
    "perf": False,
    "special": False,
    "interactive": False,
    "interactive_first": False,
    "instruct": False,
    "chatml": False,
    "conversation": False,
    "chat_template": "",
    "reverse_prompts": (),
    "multiline_input": False,
    "input_prefix": "",
    "input_suffix": "",
    "input_prefix_bos": False,
    "color": False,
    "simple_io": False,
    "lookup": False,
    "prompt_cache": "",
    "prompt_cache_all": False,
    "prompt_cache_read_only": False,
    "print_token_count": -1,
    "log": True,
    "log_file": "",
    "log_new": False,
    "log_append": False,
    "logdir": "",
    "verbosity": 0,
    "mlock": False,
    "mmap": True,
    "numa": "",
    "check_tensors": False,
    "bf16": "fast",
    "gpu_layers": -1,
    "adapters": (),
    "lora_base": "",
    "control_vectors": (),
    "control_layers": (0, 0),
    "overrides": (),
    "cache_type_k": "f16",
    "cache_type_v": "f16",
    "flash_attention": False,
    "group_factor": 1,
    "group_width": 512,
    "rope_scaling": None,
    "rope_freq_base": None,
    "rope_freq_scale": None,
    "yarn_orig_ctx": None,
    "yarn_ext_factor": None,
    "yarn_attn_factor": 1.0,
    "yarn_beta_slow": 1.0,
    "yarn_beta_fast": 32.0,
    "without_effect": (),
    "samplers": (QueueForm.NAMES, "top_k;tfs_z;typical_p;top_p;min_p;temperature"),
    "temp": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "tfs_z": 1.0,
    "typical_p": 1.0,
    "repeat_last_n": 64,
    "repeat_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "penalize_nl": False,
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "ignore_eos": False,
    "logit_bias": (),
    "negative_prompt": (),
    "cfg_scale": 1.0,
    "grammar": (),
    "given": frozenset(),
}

# Every spelling that the original's shared parser knows (June 2024), and its --help.
ORIGINAL = (DATA / "main-original-options.txt").read_text().split()

OFFERED = {
    "-i", "-if", "-ins", "-cml", "-cnv", "--chat-template", "-r", "-mli", "--in-prefix",
    "--in-prefix-bos", "--in-suffix", "-co", "--simple-io", "--lookup", "--prompt-cache",
    "--prompt-cache-all", "--prompt-cache-ro", "-ptc", "--log-file", "--log-new", "--log-append",
    "-ld", "-v", "--verbosity", "--mlock", "--no-mmap", "--numa", "--display-prompt",
    "-h", "--version", "-m", "-p", "-f", "-bf", "-e", "--no-escape", "-n", "--keep", "-s",
    "--no-display-prompt", "--verbose-prompt", "-sp", "--log-enable", "--log-disable", "-t", "-tb",
    "-c", "-b", "-ub", "--check-tensors", "-ngl", "--lora", "--lora-scaled", "--samplers",
    "--sampling-seq", "--ignore-eos", "-l", "--temp", "--top-k", "--top-p", "--min-p", "--tfs",
    "--typical", "--repeat-last-n", "--repeat-penalty", "--presence-penalty",
    "--frequency-penalty", "--penalize-nl", "--dynatemp-range", "--dynatemp-exp", "--mirostat",
    "--mirostat-lr", "--mirostat-ent", "--grammar", "--grammar-file", "-j",
    "--cfg-negative-prompt", "--cfg-negative-prompt-file", "--cfg-scale",
    "--override-kv", "--lora-base", "--control-vector", "--control-vector-scaled",
    "--control-vector-layer-range", "-ctk", "-ctv", "-fa", "-gan", "-gaw", "--rope-scaling",
    "--rope-scale", "--rope-freq-scale", "--rope-freq-base", "--yarn-orig-ctx",
    "--yarn-ext-factor", "--yarn-attn-factor", "--yarn-beta-slow", "--yarn-beta-fast",
    "-sm", "-ts", "-mg", "-nkvo", "-dt", "-np", "-ns", "-cb", "-pps", "--bf16",
    "--perf",
}  # fmt: skip

FLAGS = {
    "-i": ("interactive", True),
    "--interactive": ("interactive", True),
    "-if": ("interactive_first", True),
    "--interactive-first": ("interactive_first", True),
    "-ins": ("instruct", True),
    "--instruct": ("instruct", True),
    "-cml": ("chatml", True),
    "--chatml": ("chatml", True),
    "-cnv": ("conversation", True),
    "--conversation": ("conversation", True),
    "-mli": ("multiline_input", True),
    "--multiline-input": ("multiline_input", True),
    "--in-prefix-bos": ("input_prefix_bos", True),
    "-co": ("color", True),
    "--color": ("color", True),
    "--simple-io": ("simple_io", True),
    "--lookup": ("lookup", True),
    "--prompt-cache-all": ("prompt_cache_all", True),
    "--prompt-cache-ro": ("prompt_cache_read_only", True),
    "--log-new": ("log_new", True),
    "--log-append": ("log_append", True),
    "--mlock": ("mlock", True),
    "--no-mmap": ("mmap", False),
    "--display-prompt": ("display_prompt", True),
    "-e": ("escape", True),
    "--escape": ("escape", True),
    "--no-escape": ("escape", False),
    "--no-display-prompt": ("display_prompt", False),
    "--verbose-prompt": ("verbose_prompt", True),
    "--perf": ("perf", True),
    "-sp": ("special", True),
    "--special": ("special", True),
    "--log-enable": ("log", True),
    "--log-disable": ("log", False),
    "--check-tensors": ("check_tensors", True),
    "--ignore-eos": ("ignore_eos", True),
    "--penalize-nl": ("penalize_nl", True),
    "-fa": ("flash_attention", True),
    "--flash-attn": ("flash_attention", True),
}

NUMBERS = {
    "-ptc": "print_token_count",
    "--print-token-count": "print_token_count",
    "--verbosity": "verbosity",
    "-n": "n_predict",
    "--predict": "n_predict",
    "--n-predict": "n_predict",
    "--keep": "n_keep",
    "-c": "n_ctx",
    "--ctx-size": "n_ctx",
    "-b": "n_batch",
    "--batch-size": "n_batch",
    "-ub": "n_ubatch",
    "--ubatch-size": "n_ubatch",
    "-t": "threads",
    "--threads": "threads",
    "-tb": "threads_batch",
    "--threads-batch": "threads_batch",
    "-s": "seed",
    "--seed": "seed",
    "-ngl": "gpu_layers",
    "--gpu-layers": "gpu_layers",
    "--n-gpu-layers": "gpu_layers",
    "--temp": "temp",
    "--top-k": "top_k",
    "--top-p": "top_p",
    "--min-p": "min_p",
    "--tfs": "tfs_z",
    "--typical": "typical_p",
    "--repeat-last-n": "repeat_last_n",
    "--repeat-penalty": "repeat_penalty",
    "--frequency-penalty": "frequency_penalty",
    "--presence-penalty": "presence_penalty",
    "--dynatemp-range": "dynatemp_range",
    "--dynatemp-exp": "dynatemp_exponent",
    "--mirostat": "mirostat",
    "--mirostat-lr": "mirostat_eta",
    "--mirostat-ent": "mirostat_tau",
    "-gan": "group_factor",
    "--grp-attn-n": "group_factor",
    "-gaw": "group_width",
    "--grp-attn-w": "group_width",
    "--rope-scale": "rope_freq_scale",
    "--rope-freq-scale": "rope_freq_scale",
    "--rope-freq-base": "rope_freq_base",
    "--yarn-orig-ctx": "yarn_orig_ctx",
    "--yarn-ext-factor": "yarn_ext_factor",
    "--yarn-attn-factor": "yarn_attn_factor",
    "--yarn-beta-slow": "yarn_beta_slow",
    "--yarn-beta-fast": "yarn_beta_fast",
}


def options(*arguments: str) -> MainOptions:
    return parse(arguments)[0]


def both_spellings(names):
    return sorted({spelling for name in names for spelling in (name, underscored(name))})


def underscored(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name


def test_every_default_is_the_documented_one():
    values = options()
    found = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    assert found == DEFAULTS


def test_the_defaults_of_sampling_are_the_engines_own():
    from engine import sampling

    params, values = sampling.SamplingParams(), options()
    names = {
        "temp": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "tfs_z": "tfs_z",
        "typical_p": "typical_p", "repeat_last_n": "penalty_last_n",
        "repeat_penalty": "penalty_repeat", "frequency_penalty": "penalty_freq",
        "presence_penalty": "penalty_present", "penalize_nl": "penalize_nl",
        "dynatemp_range": "dynatemp_range", "dynatemp_exponent": "dynatemp_exponent",
        "mirostat": "mirostat", "mirostat_eta": "mirostat_eta", "mirostat_tau": "mirostat_tau",
        "seed": "seed",
    }  # fmt: skip
    for ours, theirs in names.items():
        assert getattr(values, ours) == getattr(params, theirs), ours
    assert sampling.sampler_order(values.samplers[1]) == params.samplers


@pytest.mark.parametrize("spelling", both_spellings(ORIGINAL))
def test_no_option_of_the_original_is_unknown(spelling):
    assert TABLE.find(spelling.replace("_", "-")) is not None


def test_an_option_is_new_where_the_original_has_none_of_its_spellings():
    for row in TABLE.rows:
        assert row.new == (not set(ORIGINAL) & set(row.spellings)), row.spellings


def test_the_documentation_tells_how_each_option_stands_to_the_originals():
    lines = TABLE.markdown().splitlines()
    found = {name: line for line in lines for name in re.findall(r"`(-[\w-]+)", line)}
    for name in ORIGINAL:
        row = TABLE.find(name)
        assert row is not None
        status = row.refused or (f"better: {row.better}" if row.better else "same")
        assert found[name].endswith(f"| {status.replace('|', chr(92) + '|')} |"), name


def test_the_offered_options_are_these():
    assert {row.spellings[0] for row in TABLE.offered()} == OFFERED


@pytest.mark.parametrize("row", [row for row in TABLE.rows if row.refused],
                         ids=lambda row: row.spellings[-1])  # fmt: skip
def test_every_other_option_is_refused_by_name(row):
    for name in row.spellings:
        with pytest.raises(OptionError, match=f"^option {name} of the original is not "):
            options(underscored(name), "1")


@pytest.mark.parametrize("spelling", both_spellings(FLAGS))
def test_flags_set_their_field(spelling):
    field, value = FLAGS[spelling.replace("_", "-")]
    assert getattr(options(spelling), field) is value


@pytest.mark.parametrize("spelling", both_spellings(NUMBERS))
def test_numbers_set_their_field(spelling):
    assert getattr(options(spelling, "1"), NUMBERS[spelling.replace("_", "-")]) == 1


def test_a_negative_temperature_is_zero():
    assert options("--temp", "-1").temp == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("-c", "-1"), ("-b", "0"), ("-ub", "0"), ("--mirostat", "3"), ("--repeat-last-n", "-2")],
)
def test_a_value_that_cannot_work_is_refused_with_the_options_name(option, value):
    with pytest.raises(OptionError, match=f"^{option}: {value} is "):
        options(option, value)


def test_adapters_of_both_kinds_keep_their_order():
    given = ["--lora", "a", "--lora_scaled", "b", "0.5", "--lora-scaled", "c", "-1", "--lora", "d"]
    assert options(*given).adapters == (("a", 1.0), ("b", 0.5), ("c", -1.0), ("d", 1.0))


def test_zero_leaves_the_rotation_as_the_model_has_it():
    given = ("--rope-freq-scale", "0", "--rope-freq-base", "0", "--yarn-orig-ctx", "0")
    values = options(*given, "--yarn-ext-factor", "-1")
    assert values.rope_freq_scale is values.rope_freq_base is values.yarn_orig_ctx is None
    assert values.yarn_ext_factor is None


def test_the_last_of_scale_and_factor_counts():
    assert options("--rope-freq-scale", "3", "--rope-scale", "4").rope_freq_scale == 0.25
    assert options("--rope-scale", "4", "--rope-freq-scale", "3").rope_freq_scale == 3


@pytest.mark.parametrize(
    ("argument", "override"),
    [("a.b=int:-7", ("a.b", -7)), ("a=float:1e3", ("a", 1000.0)), ("a=bool:false", ("a", False)),
     ("a=bool:true", ("a", True)), ("a=str:", ("a", "")), ("a=str:x=y:z", ("a", "x=y:z"))],
)  # fmt: skip
def test_overrides_are_key_type_and_value(argument, override):
    (found,) = options("--override-kv", argument).overrides
    assert found == override
    assert type(found[1]) is type(override[1])


@pytest.mark.parametrize(
    ("argument", "bias"),
    [("300+5", (300, 5.0)), ("300-5", (300, -5.0)), ("2-inf", (2, float("-inf"))),
     ("7+-1.5", (7, -1.5)), (" 7 + 1", (7, 1.0))],
)  # fmt: skip
def test_biases_are_token_sign_and_number(argument, bias):
    assert options("--logit-bias", argument).logit_bias == (bias,)


@pytest.mark.parametrize("argument", ["", "300", "300*5", "x+1", "300+", "300+x", "300+nan"])
def test_a_malformed_bias_names_the_option(argument):
    with pytest.raises(UsageError, match=r"^invalid parameter for argument: -l: "):
        options("-l", argument)


def prompt(*arguments: str) -> bytes:
    given = options(*arguments)
    return prompt_bytes(given.prompt, escape=given.escape)


def test_escapes_in_the_prompt_are_resolved_unless_turned_off():
    assert prompt("-p", r"a\nb\x41") == b"a\nbA"
    assert prompt("-p", r"a\nb", "--no-escape") == rb"a\nb"


def test_a_prompt_that_is_not_text_keeps_its_bytes():
    assert prompt("-p", "m\udce9l") == b"m\xe9l"


def test_prompt_files_lose_one_line_break_and_join_what_came_before(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"from a file\n\n")
    assert prompt("-f", str(file)) == b"from a file\n"
    assert prompt("-p", "first, ", "-f", str(file)) == b"first, from a file\n"
    assert prompt("-f", str(file), "-p", "last") == b"last"
    assert prompt("-p", "first", "-bf", str(file)) == b"from a file\n\n"


def test_a_missing_prompt_file_is_one_line(tmp_path, capsys):
    assert command.main(["-f", str(tmp_path / "none.txt"), "-m", "none"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: --file: {tmp_path}/none.txt: No such file or directory\n"


def test_prompt_sources_are_told_apart():
    sources = [source for source, _ in options("-p", "a", "-f", "b", "-bf", "c").prompt]
    assert sources == [PromptSource.TEXT, PromptSource.FILE, PromptSource.BINARY_FILE]


def test_threads_default_to_the_usable_cores_and_batches_to_threads():
    session = command._Session(options("-t", "3"), Log(False))
    assert session.threads == (3, 3)
    session = command._Session(options("-t", "0", "-tb", "2"), Log(False))
    assert session.threads[0] >= 1
    assert session.threads[1] == 2


def test_help_goes_to_standard_output_without_numpy():
    code = "import sys; from engine.tools.main import main\nstatus = main(['--help'])\n"
    code += "sys.exit(status or ('numpy' in sys.modules and 'numpy was imported') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == TABLE.usage()


def test_an_unknown_argument_is_followed_by_the_usage_on_standard_error(capsys):
    assert command.main(["--top_q", "3"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: unknown argument: --top-q\n" + TABLE.usage()


def test_a_refused_option_is_one_line(capsys):
    assert command.main(["-p", "x", "-mu", "https://example.org/m.gguf"]) == 1
    assert capsys.readouterr().err == (
        "error: option -mu of the original is not offered here: download the file yourself and "
        "give it with -m\n"
    )


def test_a_missing_model_is_one_line(capsys):
    assert command.main(["-m", "no-such.gguf"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: no-such.gguf: ") and captured.err.count("\n") == 1


def test_the_version_is_told_on_standard_error(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().err.startswith("version: ")


def test_a_closed_standard_output_ends_quietly():
    code = "import sys; from engine.tools.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as stream:
        errors = stream.read()
    assert (process.wait(), errors) == (141, b"")


# The text that a generation becomes, with a tokenizer and a generation that follow a script.

PIECES = [b"<s>", b" The", b" end", b"\0", b"a\0b", b"</s>"]


class ScriptedTokenizer:
    bos_id, eos_id = 0, 5
    add_bos, add_eos = True, False

    def piece(self, token: int, special: bool = False) -> bytes:
        return PIECES[token] if special or token not in (self.bos_id, self.eos_id) else b""

    def encode(self, text: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
        body = [PIECES.index(b" " + word) for word in text.split()]
        return [self.bos_id] * self.add_bos + body + [self.eos_id] * self.add_eos


class ScriptedGeneration:
    def __init__(self, script, stopped=None) -> None:
        self.script, self.stopped = script, stopped
        self.tokens, self.n_whole = [0, 1], None

    def __iter__(self):
        for item in self.script:
            if isinstance(item, BaseException):
                raise item
            yield item


def stream(generation, *arguments: str) -> int:
    log = Log(True)
    log.release()
    model = SimpleNamespace(tokenizer=ScriptedTokenizer())
    context = SimpleNamespace(model=model, n_past=0, n_ctx=64, shifts=True)
    values = options(*arguments)
    cache = CachedPrompt(context, values, log)
    return Run(values, log, context, generation, cache, None).to_the_end()


def test_standard_output_holds_the_prompt_and_the_text(capfd):
    assert stream(ScriptedGeneration([2, 2])) == 0
    assert capfd.readouterr() == (" The end end", "")


def test_special_tokens_are_shown_on_request(capfd):
    stream(ScriptedGeneration([2, 5]), "--special")
    assert capfd.readouterr().out == "<s> The end</s>"


def test_the_prompt_can_be_left_out(capfd):
    stream(ScriptedGeneration([2]), "--no-display-prompt")
    assert capfd.readouterr().out == " end"


def test_without_tokens_to_make_nothing_is_shown(capfd):
    stream(ScriptedGeneration([]), "-n", "0")
    assert capfd.readouterr().out == ""


def test_a_piece_ends_at_its_first_zero_byte(capfd):
    stream(ScriptedGeneration([3, 4]))
    assert capfd.readouterr().out == " Thea"


def test_the_end_of_the_text_is_noted_on_standard_error(capfd):
    from engine import generate

    end, full = generate.StopReason.END_OF_GENERATION, generate.StopReason.CONTEXT_FULL
    stream(ScriptedGeneration([2, 5], end))
    assert capfd.readouterr() == (" The end", " [end of text]\n")
    stream(ScriptedGeneration([2], full))
    assert "context full and n_predict == -2 => stopping" in capfd.readouterr().err


def test_an_interrupt_ends_the_line_and_has_status_130(capfd):
    assert stream(ScriptedGeneration([2, KeyboardInterrupt()])) == 130
    assert capfd.readouterr().out == " The end\n"


def prompt_tokens(text: bytes, **attributes):
    tokenizer = ScriptedTokenizer()
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return command._Session(options(), Log(False))._prompt_tokens(tokenizer, text)


def test_a_model_that_ends_its_texts_does_not_end_the_prompt():
    assert prompt_tokens(b"The end", add_eos=True) == [0, 1, 2]


def test_an_empty_prompt_begins_with_bos():
    assert prompt_tokens(b"") == [0]
    assert prompt_tokens(b"", add_bos=False) == [0]


def test_an_empty_prompt_needs_a_bos():
    from engine.errors import DataError

    with pytest.raises(DataError, match="prompt is empty and the model has no BOS"):
        prompt_tokens(b"", add_bos=False, bos_id=-1)


def test_timings_follow_the_originals_template(capfd):
    from engine import generate

    timings = generate.Timings()
    timings.prompt.add(0.5, 10)
    timings.evaluation.add(2.0, 4)
    timings.sampling.add(0.001, 5)
    log = Log(True)
    log.release()
    tell_timings(log, SimpleNamespace(timings=timings, drafted=0), 0.25, 2.75)
    assert capfd.readouterr().err.splitlines() == [
        "",
        "llama_print_timings:        load time =     250.00 ms",
        "llama_print_timings:      sample time =       1.00 ms /     5 runs   (    0.20 ms per "
        "token,  5000.00 tokens per second)",
        "llama_print_timings: prompt eval time =     500.00 ms /    10 tokens (   50.00 ms per "
        "token,    20.00 tokens per second)",
        "llama_print_timings:        eval time =    2000.00 ms /     4 runs   (  500.00 ms per "
        "token,     2.00 tokens per second)",
        "llama_print_timings:       total time =    2750.00 ms /    14 tokens",
    ]


def test_the_time_of_each_op_is_told_of_the_prompt_and_of_single_tokens(
    data_dir, capfd, monkeypatch
):
    monkeypatch.setattr("engine.perf._STEPS", {"fma": 1 << 8})
    words = ["-m", str(data_dir / "mini-f32.gguf"), "-p", "Once upon a time", "-n", "4"]
    texts = []
    for more in ([], ["--perf"]):
        assert command.main([*words, "--temp", "0", "-t", "1", "--log-disable", *more]) == 0
        out, err = capfd.readouterr()
        texts.append(out)
    assert texts[0] == texts[1]
    assert re.search(r"^perf: \d single tokens, .*^perf: 1 chunks of tokens, ", err, re.M | re.S)
    assert len(re.findall(r"^perf: Attention  ", err, re.M)) == 2
