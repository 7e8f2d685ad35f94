"""The demonstration's text and script; nothing is trained here."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from engine.tools import finetune_options, main_options
from engine.tools.options import Parsed

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "demo" / "run.sh"
PARSERS = {"finetune": finetune_options.parse, "main": main_options.parse}


def commands() -> list[list[str]]:
    """Words of each line of the script that runs one of the project's commands."""
    joined = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(line.removeprefix("show "))
        for line in joined.splitlines()
        if line.startswith(tuple(f"show {name} " for name in PARSERS))
    ]


def hints() -> list[list[str]]:
    """Words of each command that the script suggests at its end."""
    found = re.findall(r'^echo ".*?\.demo/venv/bin/(.*)"$', SCRIPT.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in found]


def parsed(words: list[str]) -> Parsed:
    return PARSERS[words[0]](words[1:])[1]


@pytest.fixture
def training() -> dict:
    (words,) = [words for words in commands() if words[0] == "finetune"]
    return parsed(words).values


def answers() -> list[dict]:
    return [parsed(words).values for words in commands() if words[0] == "main"]


def test_the_script_can_be_run():
    assert os.access(SCRIPT, os.R_OK)
    assert SCRIPT.read_text(encoding="utf-8").startswith("#!/bin/sh\n")


def test_the_training_text_is_utf8_of_a_few_kilobytes_in_many_paragraphs(training):
    raw = (ROOT / training["train_data"]).read_bytes()
    paragraphs = raw.decode("utf-8").strip().split("\n\n")
    assert 5_000 <= len(raw) <= 20_000
    assert len(paragraphs) >= 40
    assert len({text.split(maxsplit=3)[2] for text in paragraphs}) >= 20


@pytest.mark.parametrize("words", commands() + hints(), ids=lambda words: words[0])
def test_the_script_names_only_options_that_the_parsers_take_without_remarks(words):
    assert parsed(words).warnings == ()


def test_training_begins_anew_in_every_run_and_repeats(training):
    assert training["checkpoint_in"] == ""
    assert training["seed"] != finetune_options.CLOCK_SEED


def test_one_prompt_is_answered_by_the_model_the_adapter_and_half_of_it_greedily():
    runs = answers()
    assert [[scale for _, scale in run["adapters"]] for run in runs] == [[], [1.0], [0.5]]
    assert len({run["prompt"] for run in runs}) == 1
    assert {run["temp"] for run in runs} == {0.0}


def test_the_adapter_that_answers_is_the_latest_that_training_wrote(training):
    latest = training["lora_out"].replace(training["pattern_fn_it"], training["fn_latest"])
    assert f"\nadapter={latest}\n" in SCRIPT.read_text(encoding="utf-8")
    assert {name for run in answers() for name, _ in run["adapters"]} == {"$adapter"}


def test_there_are_two_hints_at_the_end():
    assert [words[0] for words in hints()] == ["main", "finetune"]
