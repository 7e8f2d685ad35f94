"""The generation loop on a context that only counts."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import DataError, ShapeError
from engine.generate import (
    Generation,
    Guidance,
    StopReason,
    check_prompt_fits,
    context_size,
    kept_positions,
)

N_VOCAB = 16
END = 15


class FakeContext:
    """Holds token ids where a context holds keys and values; logits tell how many there are."""

    def __init__(self, n_ctx: int) -> None:
        self.n_ctx = n_ctx
        self.held: list[int] = []
        self.calls: list[list[int]] = []

    @property
    def n_past(self) -> int:
        return len(self.held)

    def evaluate(self, tokens):
        self.calls.append(list(tokens))
        self.held += tokens
        assert self.n_past <= self.n_ctx, "more tokens than the context has positions"
        logits = np.zeros(N_VOCAB, dtype=np.float32)
        logits[self.n_past % N_VOCAB] = 1
        return logits

    shifts = True

    def evaluate_each(self, tokens):
        rows = [self.evaluate([token]) for token in tokens]
        self.calls[-len(tokens) :] = [list(tokens)]
        return np.array(rows)

    def truncate(self, n_past: int) -> None:
        assert n_past <= self.n_past
        del self.held[n_past:]

    def shift(self, n_keep: int, n_discard: int) -> None:
        assert n_discard > 0
        del self.held[n_keep : n_keep + n_discard]


class ScriptedSampler:
    """Says what it is told to say, then tokens of its own count."""

    def __init__(self, script=()) -> None:
        self.script = list(script)
        self.accepted: list[int] = []
        self.chosen: list[int] = []
        self.logits: list[np.ndarray] = []
        self.guidance: list[np.ndarray | None] = []

    def accept(self, token: int, chosen: bool = False) -> None:
        self.accepted.append(token)
        self.chosen += [token] * chosen

    def reset(self) -> None:
        self.accepted.clear()

    def sample(self, logits, guidance=None) -> int:
        self.logits.append(logits)
        self.guidance.append(guidance)
        return self.script.pop(0) if self.script else len(self.accepted) % (N_VOCAB - 1)


def generation(context, sampler, prompt, **options):
    return Generation(context, sampler, prompt, is_end=lambda token: token == END, **options)


def test_the_tokens_of_the_sampler_come_out_in_order():
    context, sampler = FakeContext(64), ScriptedSampler([3, 1, 4, 1, 5])
    run = generation(context, sampler, [9, 8, 7], n_predict=5)
    assert list(run) == [3, 1, 4, 1, 5]
    assert run.stopped is StopReason.ENOUGH_TOKENS


def test_prompt_and_tokens_enter_the_history_once_each():
    sampler = ScriptedSampler([3, 1, 4])
    list(generation(FakeContext(64), sampler, [9, 8], n_predict=3))
    assert sampler.accepted == [9, 8, 3, 1, 4]
    assert sampler.chosen == [3, 1, 4]


def test_the_last_token_is_not_evaluated():
    context = FakeContext(64)
    list(generation(context, ScriptedSampler([3, 1, 4]), [9, 8], n_predict=3))
    assert context.calls == [[9, 8], [3], [1]]


def test_the_sampler_sees_the_logits_of_the_last_token():
    sampler = ScriptedSampler([3, 1])
    list(generation(FakeContext(64), sampler, [9, 8], n_predict=2))
    assert [int(np.argmax(logits)) for logits in sampler.logits] == [2, 3]


def test_an_end_token_is_given_out_and_ends_the_run():
    run = generation(FakeContext(64), ScriptedSampler([3, END, 4]), [9], n_predict=10)
    assert list(run) == [3, END]
    assert run.stopped is StopReason.END_OF_GENERATION


def test_a_prompt_that_ends_the_text_generates_nothing():
    context = FakeContext(64)
    run = generation(context, ScriptedSampler(), [9, END])
    assert list(run) == []
    assert run.stopped is StopReason.END_OF_GENERATION
    assert context.calls == []


def test_no_tokens_wanted_evaluates_nothing():
    context = FakeContext(64)
    run = generation(context, ScriptedSampler(), [9], n_predict=0)
    assert list(run) == []
    assert context.calls == []


def test_a_run_until_the_context_is_full_stops_before_its_last_position():
    context = FakeContext(16)
    run = generation(context, ScriptedSampler(), [1, 2, 3, 4], n_predict=-2)
    made = list(run)
    assert run.stopped is StopReason.CONTEXT_FULL
    assert context.n_past == 15
    assert len(made) == 16 - 4


def test_a_full_context_drops_half_of_what_follows_the_kept_tokens():
    context = FakeContext(16)
    run = iter(generation(context, ScriptedSampler(), [1, 2, 3, 4], n_predict=14, n_keep=3))
    made = [next(run) for _ in range(12)]
    assert context.n_past == 15
    before = list(context.held)
    next(run)
    assert context.held == before[:3] + before[9:] + made[-1:]


def test_an_endless_run_never_leaves_the_context(rng):
    n_ctx = int(rng.integers(16, 40))
    n_prompt = int(rng.integers(1, n_ctx - 4))
    n_keep = kept_positions(int(rng.integers(-1, n_prompt + 3)), n_prompt, add_bos=True)
    prompt = rng.integers(0, END, n_prompt).tolist()
    context = FakeContext(n_ctx)
    n_predict = 5 * n_ctx
    run = generation(context, ScriptedSampler(), prompt, n_predict=n_predict, n_keep=n_keep)
    assert sum(1 for _ in run) == n_predict
    assert context.held[: min(n_keep, n_prompt)] == prompt[:n_keep]


def test_timings_count_prompt_evaluations_and_samples():
    run = generation(FakeContext(64), ScriptedSampler(), [1, 2, 3], n_predict=5)
    list(run)
    timings = run.timings
    assert (timings.prompt.count, timings.evaluation.count, timings.sampling.count) == (3, 4, 5)
    assert timings.prompt.ms > 0
    assert timings.prompt.ms_each == pytest.approx(timings.prompt.ms / 3)
    assert timings.prompt.per_second == pytest.approx(3 / timings.prompt.seconds)


def test_a_phase_without_work_has_no_rates():
    run = generation(FakeContext(64), ScriptedSampler(), [1], n_predict=0)
    list(run)
    assert (run.timings.evaluation.ms_each, run.timings.evaluation.per_second) == (0, 0)


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="prompt is empty"):
        list(generation(FakeContext(64), ScriptedSampler(), []))


def test_what_is_fed_between_tokens_is_evaluated_with_the_last_of_them():
    context, sampler = FakeContext(64), ScriptedSampler([3, 1, 4])
    run = generation(context, sampler, [9, 8])
    assert run.step() == 3
    run.feed([5, 6])
    assert run.step() == 1
    assert context.calls == [[9, 8], [3, 5, 6]]
    assert run.tokens == [9, 8, 3, 5, 6, 1]
    assert sampler.accepted == [9, 8, 3, 5, 6, 1]


def test_a_prompt_may_be_evaluated_before_a_token_is_wanted():
    context = FakeContext(64)
    run = generation(context, ScriptedSampler([3]), [9, 8])
    assert run.settle()
    assert run.step() == 3
    assert context.calls == [[9, 8]]


def test_what_the_context_holds_already_is_not_evaluated_again():
    context = FakeContext(64)
    context.held = [9, 8]
    run = generation(context, ScriptedSampler([3, 1]), [9, 8, 7], n_predict=2, n_cached=2)
    assert list(run) == [3, 1]
    assert context.calls == [[7], [3]]


def test_tokens_that_are_taken_back_leave_the_context():
    context, sampler = FakeContext(64), ScriptedSampler([3, 1, 4])
    run = generation(context, sampler, [9, 8])
    run.step()
    run.step()
    run.rewind(3)  # the last token was not evaluated yet
    assert (run.tokens, context.held) == ([9, 8, 3], [9, 8, 3])
    run.rewind(1)
    assert run.tokens == [9]
    run.feed([7])
    assert run.step() == 4
    assert context.held == [9, 7]


def test_positions_behind_a_shift_are_not_those_of_the_tokens_alone():
    run = generation(FakeContext(16), ScriptedSampler(), [1, 2, 3, 4], n_predict=14, n_keep=3)
    assert run.n_whole is None
    list(run)
    assert run.n_whole == 3


def test_tokens_that_cannot_fit_are_refused_when_nothing_may_be_dropped():
    run = generation(FakeContext(32), ScriptedSampler(), [1] * 28, n_keep=28)
    run.step()
    run.feed([2] * 8)
    with pytest.raises(ShapeError, match="9 tokens more do not fit a context of 32"):
        run.step()


@pytest.mark.parametrize("n_prompt", [29, 40])
def test_a_prompt_longer_than_the_context_allows_is_refused(n_prompt):
    with pytest.raises(ShapeError, match=rf"prompt is too long \({n_prompt} tokens, max 28\)"):
        generation(FakeContext(32), ScriptedSampler(), [1] * n_prompt)


def test_the_longest_prompt_that_fits_is_accepted():
    check_prompt_fits(28, 32)


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(0, 2048), (1, 32), (7, 32), (32, 32), (33, 64), (64, 64), (50, 64)]
)
def test_context_sizes_are_whole_grains(wanted, chosen):
    assert context_size(wanted, 2048) == chosen


@pytest.mark.parametrize(
    ("n_keep", "add_bos", "kept"),
    [(0, True, 1), (0, False, 0), (4, True, 5), (4, False, 4), (10, True, 11), (-1, True, 10),
     (11, True, 10), (11, False, 10)],
)  # fmt: skip
def test_kept_positions_follow_the_original(n_keep, add_bos, kept):
    assert kept_positions(n_keep, 10, add_bos=add_bos) == kept


# ---------------------------------------------------------------- guidance


def test_the_second_context_reads_the_negative_prompt_and_then_the_same_tokens():
    first, second, sampler = FakeContext(64), FakeContext(64), ScriptedSampler([3, 1, 4])
    guidance = Guidance(second, [5, 6, 7], 2)
    list(generation(first, sampler, [9, 8], n_predict=3, guidance=guidance))
    assert (first.held, second.held) == ([9, 8, 3, 1], [5, 6, 7, 3, 1])
    given = [int(np.argmax(logits)) for logits in sampler.guidance if logits is not None]
    assert given == [3, 4, 5]


@pytest.mark.parametrize("n_negative", [1, 2, 5, 11])
@pytest.mark.parametrize("n_keep", [0, 1, 3, 4])
def test_both_contexts_drop_the_same_tokens_when_either_is_full(n_negative, n_keep):
    first, second, sampler = FakeContext(16), FakeContext(16), ScriptedSampler()
    guidance = Guidance(second, [14] * n_negative, 3)
    run = generation(first, sampler, [13, 12, 11], n_predict=60, n_keep=n_keep, guidance=guidance)
    made = list(run)
    assert len(made) == 60
    n_kept = min(n_keep, 3)
    assert first.held[:n_kept] == [13, 12, 11][:n_kept]
    n_kept = n_negative if n_keep >= 3 else min(n_keep, n_negative)
    assert second.held[:n_kept] == [14] * n_kept
    assert second.held[-1] == first.held[-1] == made[-2]


def test_with_guidance_a_run_until_the_context_is_full_ends_when_either_is():
    guidance = Guidance(FakeContext(16), [1] * 10, 1)
    run = generation(FakeContext(16), ScriptedSampler(), [1], n_predict=-2, guidance=guidance)
    assert len(list(run)) == 6
    assert run.stopped is StopReason.CONTEXT_FULL


def test_what_is_fed_and_taken_back_enters_and_leaves_both_contexts():
    first, second, sampler = FakeContext(64), FakeContext(64), ScriptedSampler([3, 1, 4])
    run = generation(first, sampler, [9, 8], guidance=Guidance(second, [5, 6, 7], 2))
    assert run.step() == 3
    run.feed([10, 11])
    assert run.step() == 1
    assert (first.held, second.held) == ([9, 8, 3, 10, 11], [5, 6, 7, 3, 10, 11])
    run.rewind(3)
    assert run.step() == 4
    assert (first.held, second.held) == ([9, 8, 3], [5, 6, 7, 3])


def test_a_negative_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match=r"negative prompt is too long \(13 tokens, max 12\)"):
        Guidance(FakeContext(16), [1] * 13, 1)
