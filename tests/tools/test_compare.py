"""`compare`: figures of two models and of two arithmetic modes, options, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import OptionError
from engine.kernels import prefers_pairs
from engine.measure import whole
from engine.model import Context, Model
from engine.tools import compare as command
from engine.tools.compare_options import TABLE, parse

DATA = Path(__file__).parents[1] / "data"
F32, Q8, BF16, GQA = (
    str(DATA / f"mini-{kind}.gguf") for kind in ("f32", "q8_0", "bf16", "gqa-f32")
)
TEXT = ["-f", str(DATA / "play.txt"), "-c", "64", "--chunks", "3", "-t", "2", "--log-disable"]


def report(capfd, *arguments: str) -> dict[str, list[float]]:
    """Figures of each line by its name."""
    status = command.main([*arguments, *TEXT])
    captured = capfd.readouterr()
    assert (status, captured.err) == (0, "")
    lines = (line.partition(":") for line in captured.out.splitlines())
    return {
        name.strip(): [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text.partition("(")[0])]
        for name, _, text in lines
    }


def test_the_figures_of_two_models_are_those_of_their_logits(capfd) -> None:
    found = report(capfd, F32, Q8)
    assert found["Tokens"] == [189, 3, 64]
    text = (DATA / "play.txt").read_bytes()
    tokens = Model.load(F32).tokenizer.encode(text, add_special=True, parse_special=False)
    windows = whole(tokens, 64, 3, bos=1)
    logits = []
    for name in (F32, Q8):
        context = Context(Model.load(name), 64)
        blocks = (b.copy() for i in range(3) for b, _ in windows.evaluate(context, i))
        logits.append(np.concatenate(list(blocks)).astype(np.float64))
    a, b = logits
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    divergences = (np.exp(p) * (p - q)).sum(1)
    assert found["Mean KL divergence"][0] == pytest.approx(divergences.mean(), abs=2e-6)
    assert found["Largest KL divergence"][0] == pytest.approx(divergences.max(), abs=5e-6)
    assert found["Largest logit error"][0] == pytest.approx(np.abs(a - b).max(), abs=1e-5)
    assert found["RMS logit error"][0] == pytest.approx(np.sqrt(((a - b) ** 2).mean()), abs=1e-5)
    same = 100 * (a.argmax(1) == b.argmax(1)).mean()
    assert found["Same top token"][0] == pytest.approx(same, abs=1e-3)


def test_one_model_is_compared_in_two_arithmetic_modes(capfd) -> None:
    found = report(capfd, BF16)
    if prefers_pairs():
        assert 1e-3 < found["Largest logit error"][0] < 0.2
        assert found["Mean KL divergence"][0] < 1e-3
    else:
        assert found["Largest logit error"][0] == 0
    assert report(capfd, BF16, "--bf16", "fast", "--bf16", "exact")["Same top token"][0] > 95


def test_a_model_does_not_differ_from_itself(capfd) -> None:
    found = report(capfd, F32, F32)
    assert found["Largest logit error"] == [0]
    assert found["Mean KL divergence"] == [0, 0]
    assert found["Same top token"] == [100, 0]
    assert found["Perplexity of A"] == pytest.approx(found["Perplexity of B"], rel=1e-6)


def test_an_adapter_belongs_to_the_first(capfd) -> None:
    found = report(capfd, F32, F32, "--lora", str(DATA / "a-lora-20.bin"))
    assert found["Perplexity of A"][0] < 0.99 * found["Perplexity of B"][0]


def test_modes_are_of_both_unless_two_are_given() -> None:
    assert parse(["a", "b", "-p", "x"])[0].modes == ("fast", "fast")
    assert parse(["a", "-p", "x"])[0].modes == ("exact", "fast")
    assert parse(["a", "b", "-p", "x", "--bf16", "exact"])[0].modes == ("exact", "exact")
    given = ["a", "--bf16", "fast", "--bf16", "exact", "-p", "x"]
    assert parse(given)[0].modes == ("fast", "exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "--file: no text is given"),
        (["a", "-p", "x", "--bf16", "fast"], "a would be compared with itself"),
        (["a", "b", "-p", "x", *["--bf16", "fast"] * 3], "--bf16: is given 3 times"),
        (["a", "b", "-p", "x", "--chunks", "0"], "--chunks: 0 windows"),
        (["a", "b", "-p", "x", "-c", "1"], "-c: 1 is below 2"),
        (["a", "b", "-p", "x", "--temp", "1"], "option --temp is not one of compare"),
        (["-p", "x"], "A is missing"),
        (["a", "b", "c", "-p", "x"], "unknown argument: c"),
    ],
)
def test_what_cannot_be_compared_names_the_option(arguments, message) -> None:
    with pytest.raises(OptionError, match=message):
        parse(arguments)


def test_models_of_other_vocabularies_are_refused(capfd, tmp_path: Path) -> None:
    from engine.gguf import read_gguf, write_gguf

    with read_gguf(F32) as file:
        keys = [(k, file.value_types[k], v) for k, v in file.metadata.items()]
        smaller = [
            (k, t, v[:700] if k.startswith("tokenizer.ggml.") and len(v) == 768 else v)
            if isinstance(t, tuple)
            else (k, t, 700 if k == "llama.vocab_size" else v)
            for k, t, v in keys
        ]
        tensors = []
        for name, info in file.tensors.items():
            rows = 700 if info.shape[0] == 768 else info.shape[0]
            data = file.data(name)[: info.n_bytes // info.shape[0] * rows]
            tensors.append((name, info.dtype, (rows, *info.shape[1:]), data))
        write_gguf(tmp_path / "other.gguf", smaller, tensors)
    status = command.main([F32, str(tmp_path / "other.gguf"), *TEXT])
    captured = capfd.readouterr()
    assert (status, captured.out) == (1, "")
    assert "other.gguf: has a vocabulary of 700 tokens" in captured.err
    assert captured.err.count("\n") == 1


def test_help_goes_to_standard_output_without_numpy() -> None:
    code = "import sys; from engine.tools.compare import main\nstatus = main(['--help'])\n"
    code += "sys.exit(status or ('numpy' in sys.modules and 'numpy was imported') or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == TABLE.usage()
