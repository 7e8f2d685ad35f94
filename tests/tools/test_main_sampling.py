"""`main` under grammars and with guidance: texts of a small model, and input that is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from engine.model import Context, Model
from engine.tools import main as command

DATA = Path(__file__).parents[1] / "data"
MODEL = str(DATA / "mini-f32.gguf")
RUNS = json.loads((DATA / "sampling.json").read_text())
RUN = ["-m", MODEL, "-p", "FERRYMAN:", "-n", "12", "-s", "42"]


@pytest.mark.parametrize("name", RUNS)
def test_the_text_is_the_originals(name, capfdbinary):
    run = RUNS[name]
    assert command.main(["-m", str(DATA / run["model"]), *run["args"]]) == 0
    assert capfdbinary.readouterr().out == run["stdout"].encode("latin-1")


def test_the_recorded_options_change_the_text():
    """Else the runs above would show nothing."""
    for model in ("mini-f32", "mini-gqa-f32"):
        texts = [run["stdout"] for name, run in RUNS.items() if name.endswith(f"-{model}")]
        # What a queue leaves of one token is the same whichever left it.
        assert len(set(texts)) > len(texts) * 3 // 4


def text_of(capfdbinary, *options: str) -> str:
    """Text behind the prompt of a run that ends well."""
    assert command.main([*RUN, *options]) == 0
    return capfdbinary.readouterr().out.decode("utf-8", "replace").removeprefix(" FERRYMAN:")


def refused(capfd, *options: str) -> str:
    """The one line of a run that must fail before it writes anything."""
    assert command.main([*RUN, *options]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_grammar_rules_the_generated_text_but_not_the_prompt(capfdbinary):
    assert re.fullmatch(r"(ab|cd)+", text_of(capfdbinary, "--grammar", 'root ::= ("ab" | "cd")+'))


def test_a_grammar_that_is_complete_ends_the_text(capfdbinary):
    assert text_of(capfdbinary, "--grammar", 'root ::= " yes"') == " yes"
    assert command.main([*RUN, "--grammar", 'root ::= " yes"']) == 0
    assert b"[end of text]" in capfdbinary.readouterr().err


def test_a_grammar_comes_from_a_file_joined_to_a_text_before(capfdbinary, tmp_path):
    path = tmp_path / "end.gbnf"
    path.write_text('\nword ::= "né"{2}\n')
    given = ["--grammar", "root ::= word", "--grammar-file", str(path)]
    assert text_of(capfdbinary, *given) == "néné"
    path.write_text('root ::= "x"')
    assert text_of(capfdbinary, "--grammar-file", str(path)) == "x"


SCHEMA = '{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}'


def test_a_schema_is_a_text_or_a_file(capfdbinary, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    by_text = text_of(capfdbinary, "-j", SCHEMA)
    assert json.loads(by_text)["n"] in (1, 22)
    assert text_of(capfdbinary, "--json-schema", str(path)) == by_text


def test_what_a_schema_says_and_no_grammar_can_is_told(capfd):
    command.main([*RUN, "-j", '{"type": "integer", "minimum": 3}'])
    assert "--json-schema: ignored, as no grammar says it: minimum" in capfd.readouterr().err


def test_a_grammar_that_cannot_be_read_is_refused_with_its_place(capfd, tmp_path):
    line = refused(capfd, "--grammar", 'root ::= "a" |\n  b')
    assert line == "error: --grammar: line 2, column 3: the rule b is not defined\n"
    path = tmp_path / "bad.gbnf"
    path.write_text('root = "a"')
    line = refused(capfd, "--grammar-file", str(path))
    assert "--grammar-file: " in line and "bad.gbnf: line 1, column 6: expected ::=" in line
    path.write_bytes(b'root ::= "\xff"')
    assert "bad.gbnf: byte 10 is not UTF-8" in refused(capfd, "--grammar-file", str(path))
    assert "none.gbnf: No such file" in refused(capfd, "--grammar-file", "none.gbnf")
    assert "--grammar: the grammar is empty" in refused(capfd, "--grammar", "")
    assert "left recursion" in refused(capfd, "--grammar", 'root ::= root "a" | "b"')


def test_a_schema_that_cannot_be_read_is_refused_with_its_place(capfd, tmp_path):
    assert "--json-schema: line 1, column 9: no JSON" in refused(capfd, "-j", '{"type":}')
    assert "none.json: No such file" in refused(capfd, "-j", "none.json")
    path = tmp_path / "bad.json"
    path.write_text('{"type": "money"}')
    assert 'bad.json: {"type":"money"} cannot be made' in refused(capfd, "-j", str(path))


def guided_tokens(prompt: str, negative: str, scale: float, n: int) -> list[int]:
    """Greedy tokens from two contexts and plain log-probabilities in float64."""
    model = Model.load(MODEL)
    contexts = [Context(model, 512) for _ in range(2)]
    texts = (prompt, negative)
    pending = [model.tokenizer.encode(text.encode(), add_special=True) for text in texts]
    made: list[int] = []
    while len(made) < n:
        logits = [
            context.evaluate(tokens).astype(np.float64)
            for context, tokens in zip(contexts, pending, strict=True)
        ]
        own, other = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in logits)
        made.append(int(np.argmax(scale * (own - other) + other)))
        pending = [[made[-1]]] * 2
    return made


@pytest.mark.parametrize(("negative", "scale"), [("HARBOR:", 1.5), ("The sea, and the sea", 3.0)])
def test_guidance_leads_away_from_a_negative_prompt(negative, scale, capfdbinary):
    given = ["--temp", "0", "--cfg-negative-prompt", negative, "--cfg-scale", str(scale)]
    tokens = guided_tokens("FERRYMAN:", negative, scale, 12)
    pieces = b"".join(Model.load(MODEL).tokenizer.piece(token) for token in tokens)
    guided = text_of(capfdbinary, *given)
    assert guided == pieces.decode("utf-8", "replace")
    assert guided != text_of(capfdbinary, "--temp", "0")


def test_without_a_negative_prompt_guidance_leads_away_from_its_beginning_alone(capfdbinary):
    tokens = guided_tokens("FERRYMAN:", "", 2.0, 12)
    pieces = b"".join(Model.load(MODEL).tokenizer.piece(token) for token in tokens)
    text = text_of(capfdbinary, "--temp", "0", "--cfg-scale", "2")
    assert text == pieces.decode("utf-8", "replace")


def test_a_negative_prompt_comes_from_a_file_joined_to_a_text_before(capfdbinary, tmp_path):
    path = tmp_path / "negative.txt"
    path.write_text(":\n")
    scale = ["--temp", "0", "--cfg-scale", "2"]
    file = ["--cfg-negative-prompt-file", str(path)]
    joined = text_of(capfdbinary, *scale, "--cfg-negative-prompt", "HAR", *file)
    path.write_text("HAR:")
    assert joined == text_of(capfdbinary, *scale, *file)


def test_guidance_goes_on_beyond_a_full_context(capfdbinary):
    given = ["--temp", "0", "--cfg-negative-prompt", "HARBOR: a", "--cfg-scale", "1.5"]
    assert text_of(capfdbinary, *given, "-c", "32", "-n", "70", "--ignore-eos")


def test_a_scale_of_1_is_no_guidance_and_a_negative_prompt_then_has_no_effect(capfd):
    given = ["--temp", "0", "--cfg-negative-prompt", "HARBOR:"]
    command.main([*RUN, *given])
    first = capfd.readouterr()
    assert "the negative prompt has no effect without a --cfg-scale above 1" in first.err
    command.main([*RUN, "--temp", "0"])
    assert capfd.readouterr().out == first.out


def test_the_negative_prompt_is_listed_like_the_prompt(capfd):
    given = ["--cfg-negative-prompt", "HAR", "--cfg-scale", "2", "--verbose-prompt"]
    command.main([*RUN, *given])
    told = capfd.readouterr().err
    assert "main: negative prompt: 'HAR'" in told
    assert "main: number of tokens in negative prompt = " in told


def test_a_negative_prompt_longer_than_the_context_is_refused(capfd):
    given = ["--cfg-negative-prompt", "word " * 60, "--cfg-scale", "2", "-c", "32"]
    line = refused(capfd, *given)
    assert "negative prompt is too long (" in line and "tokens, max 28)" in line
