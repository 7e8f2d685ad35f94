"""`main` behind pipes: turns as the original takes them, and what never changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tools import main as command

DATA = Path(__file__).parents[1] / "data"
RUNS = {run["name"]: run for run in json.loads((DATA / "talk.json").read_text())}
MINI = ["-m", str(DATA / "mini-f32.gguf")]
CODE = "import sys; from engine.tools.main import main; sys.exit(main())"


def run(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command behind pipes."""
    return subprocess.run(
        [sys.executable, "-c", CODE, *MINI, *arguments],
        input=given,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def told(monkeypatch, capfdbinary):
    """Run the command in this process with bytes on its standard input; returns its output."""

    def call(given: bytes, *arguments: str, status: int = 0) -> tuple[bytes, bytes]:
        import io

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert command.main([*MINI, *arguments]) == status
        return capfdbinary.readouterr()

    return call


@pytest.mark.parametrize("name", RUNS)
def test_turns_behind_a_pipe_are_taken_as_the_original_takes_them(name, told) -> None:
    recorded = RUNS[name]
    out, _ = told(recorded["stdin"].encode(), *recorded["args"])
    assert out == recorded["stdout"].encode("latin-1")


def test_nothing_is_asked_of_anybody_unless_an_option_says_so() -> None:
    done = run("-p", "FERRYMAN:", "-n", "5", "--temp", "0", given=b"a line that nobody reads\n")
    alone = run("-p", "FERRYMAN:", "-n", "5", "--temp", "0")
    assert done.returncode == 0
    assert done.stdout == alone.stdout
    assert b"interactive" not in done.stderr


def test_standard_output_holds_the_text_alone_whatever_is_logged(tmp_path) -> None:
    base = ["-p", "FERRYMAN:", "-n", "5", "--temp", "0"]
    text = run(*base).stdout
    assert text.startswith(b" FERRYMAN:")
    for options in (
        ["--log-disable"],
        ["--log-enable", "--verbose-prompt", "-v"],
        ["--log-file", str(tmp_path / "a"), "--color", "-ptc", "1"],
        ["--log-new", "--log-file", str(tmp_path / "b"), "--logdir", str(tmp_path / "logs")],
        ["--lookup", "--no-mmap", "--mlock", "--numa", "distribute", "--simple-io"],
    ):
        done = run(*base, *options)
        assert (done.returncode, done.stdout) == (0, text), options


def test_a_pipe_sees_no_prompt_of_a_conversation(told) -> None:
    out, _ = told(b"hello\n", "-cnv", "-p", "A", "-n", "4", "--temp", "0", "--in-prefix", "Q")
    assert b">" not in out
    assert b"Q" not in out


def test_words_that_are_no_utf_8_are_kept(told, tmp_path) -> None:
    from engine.model import Context, Model
    from engine.prompt_cache import PromptCacheFile

    path = tmp_path / "cache"
    told(b"ol\xe9\xff\n", "-if", "-p", "A", "-n", "1", "--prompt-cache", str(path),
         "--prompt-cache-all")  # fmt: skip
    model = Model.load(DATA / "mini-f32.gguf")
    tokens = PromptCacheFile(path, Context(model, 256)).load().tokens
    assert b"ol\xe9\xff\n" in model.tokenizer.decode(tokens)


def test_a_reverse_prompt_ends_a_run_without_people(told) -> None:
    base = ["-p", "FERRYMAN: hi", "-n", "40", "--temp", "0"]
    whole, _ = told(b"", *base)
    assert told(b"", *base, "-r", "never met")[0] == whole
    assert told(b"", *base, "-r", "ow", "-r", "lden")[0] == b" FERRYMAN: hi golden"
    assert told(b"", *base, "-r", "hi")[0] == b" FERRYMAN: hi"


def test_control_is_explained_on_standard_error(told) -> None:
    _, err = told(b"", "-if", "-p", "A", "-r", "x\\n", "--in-prefix", "Q")
    assert b"main: interactive mode on.\nReverse prompt: 'x\n'\nInput prefix: 'Q'\n" in err
    assert b" - Press Return to return control to the AI.\n" in err


def test_a_template_that_is_not_there_is_named(told) -> None:
    _, err = told(b"", "-cnv", "--chat-template", "tool_use", status=1)
    assert err == (
        b"error: --chat-template: 'tool_use' is no file and no template of the model, which has "
        b"none with a name; give a name, a file or a template's text\n"
    )


def test_a_model_without_a_template_talks_all_the_same(told) -> None:
    out, err = told(b"hello\n", "-cnv", "-p", "A:", "-n", "3", "--temp", "0")
    assert out.startswith(b" A:")
    assert b"warning: the model has no chat template; turns go in as they are" in err


def test_a_template_may_be_a_text_a_file_or_chatml(told, tmp_path) -> None:
    pytest.importorskip("jinja2")
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    (tmp_path / "t.jinja").write_text(text)
    base = ["-cnv", "-n", "6", "--temp", "0"]
    by_text, _ = told(b"hello\nyou\n", *base, "--chat-template", text)
    by_file, _ = told(b"hello\nyou\n", *base, "--chat-template", str(tmp_path / "t.jinja"))
    assert by_text == by_file != b""
    chatml, _ = told(b"hello\nyou\n", *base, "--chat-template", "chatml")
    assert chatml not in (b"", by_text)


def test_a_template_is_not_ignored_in_silence(told) -> None:
    _, err = told(b"", "-p", "A", "-n", "1", "--chat-template", "chatml")
    assert b"warning: --chat-template has no effect without --conversation" in err


@pytest.mark.parametrize(
    ("options", "partner"),
    [
        (["--in-prefix", "Q", "--in-suffix", "A", "--in-prefix-bos", "-mli"], "--interactive"),
        (["--prompt-cache-all", "--prompt-cache-ro"], "--prompt-cache"),
        (["-gaw", "64"], "--grp-attn-n"),
        (["--control-vector-layer-range", "1", "2"], "--control-vector"),
    ],
)
def test_options_without_their_partner_are_told_to_have_no_effect(options, partner, told) -> None:
    base = ["-p", "FERRYMAN:", "-n", "3", "--temp", "0"]
    out, err = told(b"", *base, *options)
    assert out == told(b"", *base)[0]
    for name in filter(lambda word: word.startswith("--"), options):
        assert f"warning: {name} has no effect without {partner}\n".encode() in err
    assert b"has no effect" in err


@pytest.mark.parametrize("option", ["-ins", "-cml"])
def test_instruct_and_chatml_wait_for_the_person(option, told) -> None:
    out, _ = told(b"hello\n", option, "-p", "A", "-n", "4", "--temp", "0")
    assert out.startswith(b" A" if option == "-ins" else b" <|im_start|>system\nA<|im_end|>")
    assert told(b"", option, "-p", "A")[0] in (b" A", b" <|im_start|>system\nA<|im_end|>")


def test_a_scale_changes_in_the_middle_of_a_session(told) -> None:
    adapter = str(DATA / "a-lora-20.bin")
    base = ["-if", "-p", "FERRYMAN:", "-n", "12", "--temp", "0"]
    with_adapter = [*base, "--lora-scaled", adapter, "8"]
    plain, _ = told(b"hello\n", *base)
    scaled, _ = told(b"hello\n", *with_adapter)
    changed, err = told(b"/scale a-lora-20 0\nhello\n", *base, "--lora-scaled", adapter, "8")
    assert scaled != plain
    # The prompt has been evaluated with the scale before, the rest without the adapter.
    assert changed not in (scaled, b"")
    assert b"a-lora-20.bin': scale 0\n" in err
    never, _ = told(b"/scale a-lora-20.bin 8\nhello\n", *with_adapter)
    assert never == scaled


@pytest.mark.parametrize("line", ["/scale", "/scale x 1", "/scale a-lora-20 x", "/scale a b c"])
def test_a_scale_that_cannot_be_is_explained_and_goes_on(line, told) -> None:
    base = ["-if", "-p", "A", "-n", "4", "--temp", "0", "--lora", str(DATA / "a-lora-20.bin")]
    out, err = told(line.encode() + b"\nhello\n", *base)
    assert b"lora: /scale NAME X, with a name of: " in err
    assert out == told(b"hello\n", *base)[0]


def test_a_session_whose_output_nobody_reads_ends_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE, *MINI, "-i", "-p", "A", "--ignore-eos", "--log-disable"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(2) == b" A"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_session_without_standard_input_ends_at_its_first_turn() -> None:
    done = subprocess.run(
        [
            "sh",
            "-c",
            f'exec "{sys.executable}" -c "{CODE}" "$@" <&-',
            "sh",
            *MINI,
            "-if",
            "-p",
            "A",
        ],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, b" A")


# The prompt's cache.


def cached(told, path: Path, *arguments: str, prompt: str = "FERRYMAN: one two three") -> tuple:
    text = ["-p", prompt] if prompt else []
    options = ["-n", "8", "--temp", "0", "--prompt-cache", str(path)]
    out, err = told(b"", *text, *options, *arguments)
    found = [line for line in err.decode().splitlines() if "prompt cache" in line]
    return out, found


def test_a_prompt_is_evaluated_once(told, tmp_path) -> None:
    path = tmp_path / "cache"
    first, said = cached(told, path)
    assert said == [f"main: prompt cache '{path}' does not exist yet"]
    before = path.read_bytes()
    again, said = cached(told, path)
    assert again == first
    (line,) = said
    n, whole = [int(word) for word in line.split() if word.isdecimal()]
    assert n == whole - 1
    assert path.read_bytes() == before


def test_a_longer_prompt_takes_what_it_shares_and_is_kept_instead(told, tmp_path) -> None:
    path = tmp_path / "cache"
    cached(told, path)
    longer = "FERRYMAN: one two three, and more of it"
    fresh, _ = cached(told, tmp_path / "other", prompt=longer)
    warm, (line,) = cached(told, path, prompt=longer)
    assert warm == fresh
    assert "of the prompt need no evaluation" in line
    assert cached(told, path, prompt=longer)[1][0] != line


def test_a_read_only_cache_is_not_written(told, tmp_path) -> None:
    path = tmp_path / "cache"
    cached(told, path, "--prompt-cache-ro")
    assert not path.exists()
    cached(told, path)
    before = path.read_bytes()
    cached(told, path, "--prompt-cache-ro", prompt="another prompt")
    assert path.read_bytes() == before


def test_a_run_goes_on_where_the_last_one_ended(told, tmp_path) -> None:
    path = tmp_path / "cache"
    whole, _ = told(b"", "-p", "FERRYMAN: one", "-n", "16", "--temp", "0")
    first, _ = cached(told, path, "--prompt-cache-all", prompt="FERRYMAN: one")
    assert whole.startswith(first)
    second, _ = cached(told, path, prompt="")
    assert second == whole


def test_another_adapter_makes_a_cache_of_its_own(told, tmp_path) -> None:
    path, adapter = tmp_path / "cache", str(DATA / "a-lora-20.bin")
    cached(told, path)
    fresh, _ = told(b"", "-p", "FERRYMAN: one two three", "-n", "8", "--temp", "0",
                    "--lora", adapter)  # fmt: skip
    out, (line,) = cached(told, path, "--lora", adapter)
    assert out == fresh
    assert line == (
        f"main: warning: prompt cache {path}: is of another adapter or scale; ignored, written anew"
    )
    assert "need no evaluation" in cached(told, path, "--lora", adapter)[1][0]


def test_a_file_that_is_no_cache_is_not_overwritten(told, tmp_path) -> None:
    path = tmp_path / "letter"
    path.write_text("Dear friend,")
    _, err = told(b"", "-p", "A", "--prompt-cache", str(path), status=1)
    assert err.startswith(b"error: ") and b"is no prompt cache" in err
    assert path.read_text() == "Dear friend,"


def test_after_a_shift_only_what_was_kept_counts_as_evaluated(told, tmp_path) -> None:
    path = tmp_path / "cache"
    cached(told, path, "--prompt-cache-all", "-c", "32", "-n", "60", "--keep", "3",
           "--ignore-eos")  # fmt: skip
    _, (line,) = cached(told, path, "-c", "64", prompt="")
    assert " 4 of " in line


# The log.


def test_the_log_goes_to_a_file_as_well(told, tmp_path) -> None:
    name = tmp_path / "run"
    for expected in (1, 1, 2):
        more = ["--log-append"] if expected == 2 else []
        _, err = told(b"", "-p", "A", "-n", "1", "--log-file", str(name), *more)
        lines = (tmp_path / "run.log").read_text()
        assert lines.count("main: seed") == expected
        assert lines.endswith(err.decode())
    told(b"", "-p", "A", "-n", "1", "--log-file", str(name), "--log-new")
    (own,) = set(tmp_path.iterdir()) - {tmp_path / "run.log"}
    assert own.name.startswith("run.") and own.suffix == ".log"
    told(b"", "-p", "A", "-n", "1", "--log-file", str(tmp_path / "off"), "--log-disable")
    assert not (tmp_path / "off.log").exists()


def test_a_log_that_cannot_be_opened_is_one_line(told, tmp_path) -> None:
    _, err = told(b"", "-p", "A", "--log-file", str(tmp_path / "no" / "log"), status=1)
    assert err == f"error: --log-file: {tmp_path}/no/log.log: No such file or directory\n".encode()


def test_a_record_of_the_run_is_written_as_yaml(told, tmp_path) -> None:
    base = ["-p", "FERRYMAN:", "-n", "5", "--temp", "0"]
    out, _ = told(b"", *base, "--logdir", str(tmp_path / "a" / "logs"))
    (path,) = (tmp_path / "a" / "logs").glob("*.yml")
    # Every value is JSON, which YAML contains.
    record = {
        name: json.loads(value)
        for name, _, value in (line.partition(": ") for line in path.read_text().splitlines())
    }
    assert record["binary"] == "main"
    assert (" FERRYMAN:" + record["output"]).encode() == out
    assert len(record["output_tokens"]) == 5
    assert record["options"]["n_predict"] == 5


def test_a_folder_that_cannot_be_written_is_told_and_no_failure(told, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    _, err = told(b"", "-p", "A", "-n", "1", "--logdir", str(tmp_path / "file" / "logs"))
    assert b"warning: --logdir: " in err


def test_tokens_are_counted_on_standard_error(told) -> None:
    _, err = told(b"", "-p", "FERRYMAN:", "-n", "9", "--temp", "0", "-ptc", "4")
    assert b"\nTokens consumed so far = 8 / 256\n" in err


def test_metadata_is_listed_when_asked_for(told) -> None:
    assert b"metadata" not in told(b"", "-p", "A", "-n", "1")[1]
    assert (
        b"main: metadata: general.architecture = 'llama'\n"
        in told(b"", "-p", "A", "-n", "1", "-v")[1]
    )


def test_the_threads_that_run_are_told(told) -> None:
    from engine.machine import usable_cores

    n = usable_cores()
    line = f"system_info: n_threads = {n} (n_threads_batch = {n}) / ".encode()
    assert line in told(b"", "-p", "A", "-n", "1")[1]
