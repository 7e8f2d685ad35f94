"""Every sampler against a plain float32 reference, the draw against ``std::discrete_distribution``.

The reference below follows the formulas one after another and shares nothing with the engine but
the C library's expf, logf, log2f and powf: NumPy's own differ from them in the last bit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import DataError, OptionError, ShapeError
from engine.grammar import GrammarMatcher, TokenTable, parse_grammar
from engine.sampling import RANDOM_SEED, Sampler, SamplingParams, describe, sampler_order

F = np.float32
Floats = NDArray[np.float32]
OFF = SamplingParams(temp=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=42)
QUEUE = ("top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature")

libm = ctypes.CDLL(ctypes.util.find_library("m"))
for _name, _n_arguments in {"expf": 1, "logf": 1, "log2f": 1, "powf": 2}.items():
    getattr(libm, _name).restype = ctypes.c_float
    getattr(libm, _name).argtypes = [ctypes.c_float] * _n_arguments


def exp(x: Floats) -> Floats:
    return np.array([libm.expf(value) for value in x], F)


def log(x: NDArray[Any]) -> Floats:
    return np.array([libm.logf(value) for value in x], F)


def power(x: np.float32 | float, y: np.float32 | float) -> np.float32:
    return F(libm.powf(float(x), float(y)))


def running(x: NDArray[Any]) -> NDArray[Any]:
    """Partial sums, one addition after another in the type of x."""
    return np.add.accumulate(x)


@dataclass
class Candidates:
    ids: NDArray[np.int64]
    logits: Floats
    p: Floats = field(default_factory=lambda: np.zeros(0, F))
    is_sorted: bool = False

    def keep(self, which: Any) -> None:
        self.ids, self.logits = self.ids[which], self.logits[which]
        if self.p.size:
            self.p = self.p[which]

    def sort(self) -> None:
        if not self.is_sorted:
            self.keep(np.argsort(-self.logits, kind="stable"))
        self.is_sorted = True

    def softmax(self) -> None:
        self.sort()
        self.p = exp(self.logits - self.logits[0])
        self.p = self.p / running(self.p)[-1]


def log_softmax(x: Floats) -> Floats:
    p = exp(x - x.max())
    return log(p / running(p)[-1])


def first(condition: NDArray[np.bool_], otherwise: int) -> int:
    return int(np.argmax(condition)) if condition.any() else otherwise


def top_k(c: Candidates, o: SamplingParams) -> None:
    c.sort()
    c.keep(slice(max(o.top_k, o.min_keep, 1) if o.top_k > 0 else None))


def tail_free(c: Candidates, o: SamplingParams) -> None:
    if o.tfs_z >= 1 or c.ids.size <= 2:
        return
    c.softmax()
    slope = c.p[:-1] - c.p[1:]
    curve = np.abs(slope[:-1] - slope[1:])
    total = running(curve)[-1]
    curve = curve / total if total > F(1e-6) else np.full(curve.size, F(1) / F(curve.size))
    beyond = (running(curve) > F(o.tfs_z)) & (np.arange(curve.size) >= max(1, o.min_keep))
    c.keep(slice(first(beyond, c.ids.size)))


def entropy(p: Floats) -> np.float32:
    p = p[p > 0]
    return running(-p * log(p))[-1]


def typical(c: Candidates, o: SamplingParams) -> None:
    if o.typical_p >= 1:
        return
    c.softmax()
    order = np.argsort(np.abs(-log(c.p) - entropy(c.p)), kind="stable")
    beyond = (running(c.p[order]) > F(o.typical_p)) & (np.arange(order.size) >= o.min_keep - 1)
    c.keep(order[: first(beyond, order.size - 1) + 1])
    c.is_sorted = False


def top_p(c: Candidates, o: SamplingParams) -> None:
    if o.top_p >= 1:
        return
    c.softmax()
    reached = (running(c.p) >= F(o.top_p)) & (np.arange(c.p.size) + 1 >= o.min_keep)
    c.keep(slice(first(reached, c.p.size - 1) + 1))


def min_p(c: Candidates, o: SamplingParams) -> None:
    if o.min_p <= 0:
        return
    kept = c.logits >= c.logits.max() + F(libm.logf(o.min_p))
    if kept.sum() < max(1, o.min_keep):
        c.sort()
        kept = np.arange(c.ids.size) < max(1, o.min_keep)
    c.keep(kept)


def temperature(c: Candidates, o: SamplingParams) -> None:
    t = F(o.temp)
    if o.dynatemp_range > 0:
        if c.ids.size <= 1:
            return
        low = max(F(0), t - F(o.dynatemp_range))
        high = max(F(0), t + F(o.dynatemp_range))
        c.softmax()
        share = entropy(c.p) / -F(libm.logf(F(1) / F(c.ids.size)))
        t = low + (high - low) * power(share, o.dynatemp_exponent)
    c.logits = c.logits / t


STEPS = dict(zip(QUEUE, (top_k, tail_free, typical, top_p, min_p, temperature), strict=True))


class Reference:
    """Chooses tokens as the specification says; `c` holds the candidates left at the end."""

    def __init__(self, params: SamplingParams, n_vocab: int, newline_id: int = -1) -> None:
        self.params, self.n_vocab, self.newline_id = params, n_vocab, newline_id
        self.generator = np.random.RandomState(params.seed)
        self.history = [0] * max(64, params.penalty_last_n)
        self.mu = F(0)
        self.n_words = 0

    def word(self) -> int:
        self.n_words += 1
        return int(self.generator.randint(0, 2**32, dtype=np.uint32))

    def accept(self, token: int) -> None:
        self.history = [*self.history[1:], token]

    def penalized(self, logits: Floats) -> Floats:
        o = self.params
        logits = logits.copy()
        last_n = len(self.history) if o.penalty_last_n < 0 else o.penalty_last_n
        window = self.history[len(self.history) - last_n :]
        for token in set(window):
            if token == self.newline_id and not o.penalize_nl:
                continue
            value, repeat = logits[token], F(o.penalty_repeat)
            value = value * repeat if value <= 0 else value / repeat
            count = F(window.count(token))
            logits[token] = value - (count * F(o.penalty_freq) + F(o.penalty_present))
        return logits

    def draw(self) -> int:
        self.c.softmax()
        if self.c.p.size == 1:
            return 0
        weights = self.c.p.astype(np.float64)
        partial = running(weights / running(weights)[-1])
        partial[-1] = 1
        low, high = self.word(), self.word()
        u = min((low + high * 2.0**32) / 2.0**64, np.nextafter(1.0, 0.0))
        return int(np.searchsorted(partial, u, side="left"))

    @np.errstate(all="ignore")  # a k that is infinite or no number keeps everything, as in C
    def cut_by_zipf(self) -> None:
        p = self.c.p[:100]
        i = np.arange(p.size - 1)
        t, b = log((i + 2).astype(F) / (i + 1).astype(F)), log(p[:-1] / p[1:])
        s = running(t * b)[-1] / running(t * t)[-1]
        epsilon = s - F(1)
        share = (epsilon * power(2, self.mu)) / (F(1) - power(self.n_vocab, -epsilon))
        k = power(share, F(1) / s)
        if 1 <= k < 2**31:
            self.c.keep(slice(int(k)))

    def mirostat(self) -> int:
        temperature(self.c, replace(self.params, dynatemp_range=0.0))
        self.c.softmax()
        if self.params.mirostat == 1:
            self.cut_by_zipf()
        else:
            surprise = np.array([-libm.log2f(p) for p in self.c.p], F)
            self.c.keep(slice(max(1, first(surprise > self.mu, self.c.p.size))))
        place = self.draw()
        error = -F(libm.log2f(self.c.p[place])) - F(self.params.mirostat_tau)
        self.mu = self.mu - F(self.params.mirostat_eta) * error
        return place

    def sample(self, logits: Floats, guidance: Floats | None = None) -> int:
        logits = logits.copy()
        for token, bias in self.params.logit_bias.items():
            logits[token] += F(bias)
        if guidance is not None:
            log_p, log_g = log_softmax(logits), log_softmax(guidance)
            logits = F(self.params.cfg_scale) * (log_p - log_g) + log_g
        self.c = Candidates(np.arange(self.n_vocab), self.penalized(logits))
        if self.params.temp <= 0:
            place = int(np.argmax(self.c.logits))
        elif self.params.mirostat:
            place = self.mirostat()
        else:
            for name in self.params.samplers:
                STEPS[name](self.c, self.params)
            place = self.draw()
        return int(self.c.ids[place])


def random_logits(rng: np.random.Generator, n_vocab: int) -> Floats:
    """Normal logits of a random width; in one case of three rounded, so that many are equal."""
    logits = rng.standard_normal(n_vocab) * rng.uniform(0.5, 6)
    return (np.round(logits, 1) if rng.random() < 1 / 3 else logits).astype(F)


def assert_same_run(
    params: SamplingParams, rng: np.random.Generator, n_vocab: int, n_tokens: int
) -> Reference:
    """Sample a run of tokens from random logits; tokens, survivors and probabilities agree."""
    newline_id = int(rng.integers(n_vocab))
    params = replace(params, n_probs=n_vocab)
    sampler = Sampler(params, n_vocab, newline_id)
    reference = Reference(params, n_vocab, newline_id)
    for _ in range(n_tokens):
        logits = random_logits(rng, n_vocab)
        expected, token = reference.sample(logits), sampler.sample(logits)
        reference.c.softmax()
        ids, p = zip(*sampler.top(), strict=True)
        np.testing.assert_array_equal(ids, reference.c.ids)
        np.testing.assert_array_equal(np.array(p, F).view(np.uint32), reference.c.p.view(np.uint32))
        assert token == expected
        sampler.accept(token)
        reference.accept(token)
    return reference


SETTINGS: dict[str, dict[str, Any]] = {
    "all-off": {},
    "top_k-1": {"top_k": 1},
    "top_k-40": {"top_k": 40},
    "top_k-beyond-insertion": {"top_k": 200},
    "top_k-beyond-vocabulary": {"top_k": 10**10},
    "top_k-below-min_keep": {"top_k": 2, "min_keep": 5},
    "tfs_z-0.8": {"tfs_z": 0.8},
    "tfs_z-0.2": {"tfs_z": 0.2},
    "tfs_z-0": {"tfs_z": 0.0},
    "tfs_z-min_keep": {"tfs_z": 0.1, "min_keep": 7},
    "typical_p-0.7": {"typical_p": 0.7},
    "typical_p-0.2": {"typical_p": 0.2},
    "typical_p-min_keep": {"typical_p": 0.05, "min_keep": 9},
    "top_p-0.9": {"top_p": 0.9},
    "top_p-0": {"top_p": 0.0},
    "top_p-min_keep": {"top_p": 0.1, "min_keep": 6},
    "min_p-0.2": {"min_p": 0.2},
    "min_p-0.001": {"min_p": 0.001},
    "min_p-above-1": {"min_p": 1.5},
    "min_p-min_keep": {"min_p": 0.9, "min_keep": 4},
    "temp-0.3": {"temp": 0.3},
    "temp-1.7": {"temp": 1.7},
    "dynatemp": {"temp": 0.8, "dynatemp_range": 0.5},
    "dynatemp-from-0": {"temp": 0.8, "dynatemp_range": 2.0, "dynatemp_exponent": 0.7},
    "two-of-a-kind": {"typical_p": 0.8, "tfs_z": 0.9, "samplers": ("typical_p", "tfs_z") * 2},
}


@pytest.mark.parametrize("n_vocab", [1, 2, 3, 128, 129, 777])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_each_sampler_agrees_with_the_reference(
    settings: dict[str, Any], n_vocab: int, rng: np.random.Generator
) -> None:
    assert_same_run(replace(OFF, seed=int(rng.integers(2**32 - 1)), **settings), rng, n_vocab, 8)


@pytest.mark.parametrize("name", QUEUE[:5])
def test_each_samplers_setting_does_cut_and_is_off_when_its_name_is_missing(
    name: str, rng: np.random.Generator
) -> None:
    setting: dict[str, Any] = {name: 5 if name == "top_k" else 0.5}
    logits = rng.standard_normal(400).astype(F)
    for samplers, is_cut in [((name,), True), ((), False)]:
        params = replace(OFF, n_probs=400, samplers=samplers, **setting)
        sampler = Sampler(params, 400)
        sampler.sample(logits)
        assert (len(sampler.top()) < 400) == is_cut


@pytest.mark.parametrize("case", range(12))
def test_queues_in_any_order_agree_with_the_reference(case: int, rng: np.random.Generator) -> None:
    params = SamplingParams(
        temp=rng.uniform(0.2, 2),
        dynatemp_range=rng.choice([0.0, 0.4]),
        top_k=int(rng.choice([0, 20, 100, 300])),
        top_p=rng.uniform(0.5, 1.1),
        min_p=rng.uniform(-0.05, 0.2),
        tfs_z=rng.uniform(0.5, 1.1),
        typical_p=rng.uniform(0.5, 1.1),
        samplers=tuple(rng.permutation(QUEUE).tolist()),
        seed=case,
    )
    assert_same_run(params, rng, 500, 15)


def test_defaults_agree_with_the_reference_at_a_large_vocabulary(rng: np.random.Generator) -> None:
    assert_same_run(SamplingParams(seed=3), rng, 49152, 4)


def test_a_full_sort_of_a_large_vocabulary_is_descending_and_stable(
    rng: np.random.Generator,
) -> None:
    logits = np.round(rng.standard_normal(49152) * 3, 2).astype(F)
    logits[rng.integers(0, 49152, 900)] = np.repeat([F(0), -F(0), -np.inf], 300)
    sampler = Sampler(replace(OFF, n_probs=49152), 49152)
    sampler.sample(logits)
    ids = np.array([token for token, _ in sampler.top()])
    np.testing.assert_array_equal(ids, np.argsort(-logits, kind="stable"))


@pytest.mark.parametrize("k", [3, 200])
@pytest.mark.parametrize("queue", [QUEUE, QUEUE[::-1]])
def test_equal_logits_stand_lower_token_first(k: int, queue: tuple[str, ...]) -> None:
    logits = np.zeros(1000, F)
    logits[[17, 900]] = 1
    sampler = Sampler(replace(OFF, top_k=k, samplers=queue, n_probs=4), 1000)
    sampler.sample(logits)
    assert [token for token, _ in sampler.top()] == [17, 900, 0, 1][: min(4, k)]


@pytest.mark.parametrize(
    ("settings", "n_left"),
    [
        ({"top_p": 0.5}, 4),  # reached by equality
        ({"typical_p": 0.5}, 5),  # only exceeded counts
        ({"min_p": 1.0}, 8),  # equality stays
        ({"tfs_z": 0.5}, 3),  # a straight line: six equal shares, the fourth exceeds
        ({"tfs_z": 0.1}, 1),  # exceeded at once, but one stays
        ({"top_k": 3}, 3),
    ],
)
def test_equality_at_the_border_is_decided_as_specified(
    settings: dict[str, Any], n_left: int
) -> None:
    sampler = Sampler(replace(OFF, n_probs=8, **settings), 8)
    sampler.sample(np.zeros(8, F))
    assert len(sampler.top()) == n_left


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("tau", "eta"), [(5.0, 0.1), (3.0, 0.5), (8.0, 1.0)])
def test_mirostat_agrees_with_the_reference_over_a_run(
    version: int, tau: float, eta: float, rng: np.random.Generator
) -> None:
    params = SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=eta, seed=5)
    reference = assert_same_run(params, rng, 600, 40)
    assert reference.mu != 0


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_survives_a_vocabulary_too_small_to_estimate_from(version: int) -> None:
    sampler = Sampler(SamplingParams(mirostat=version, seed=1), 1)
    assert [sampler.sample(np.array([0.5], F)) for _ in range(3)] == [0, 0, 0]


def test_mirostat_2_begins_with_the_best_token(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(100).astype(F)
    assert Sampler(SamplingParams(mirostat=2, seed=1), 100).sample(logits) == logits.argmax()


@pytest.mark.parametrize("temp", [0.0, -1.0])
@pytest.mark.parametrize("settings", [{}, {"mirostat": 1}, {"mirostat": 2}, {"top_k": 1}])
def test_temperature_0_or_below_takes_the_first_maximum(
    temp: float, settings: dict[str, Any]
) -> None:
    logits = np.array([1, 3, 2, 3, -1], F)
    assert Sampler(replace(OFF, temp=temp, **settings), 5).sample(logits) == 1


def test_top_tells_the_best_probabilities_of_a_greedy_choice_too() -> None:
    sampler = Sampler(replace(OFF, temp=-1.0, n_probs=2), 3)
    assert sampler.top() == []
    sampler.sample(np.log(np.array([0.2, 0.7, 0.1], F)))
    assert [token for token, _ in sampler.top()] == [1, 0]
    np.testing.assert_allclose([p for _, p in sampler.top()], [0.7, 0.2], rtol=1e-6)


def test_one_candidate_draws_no_words() -> None:
    uniform = np.zeros(1000, F)
    certain = np.where(np.arange(1000) == 7, F(0), F(-np.inf))
    plain, mixed = (Sampler(replace(OFF, min_p=0.5), 1000) for _ in range(2))
    expected = [plain.sample(uniform) for _ in range(5)]
    drawn = []
    for _ in range(5):
        assert mixed.sample(certain) == 7
        drawn.append(mixed.sample(uniform))
    assert drawn == expected


def test_a_draw_takes_two_words_the_first_being_the_low_part() -> None:
    """With 1000 equal weights the token follows from the second word alone."""
    high_words = np.random.RandomState(42).randint(0, 2**32, 40, dtype=np.uint32)[1::2]
    sampler = Sampler(OFF, 1000)
    drawn = [sampler.sample(np.zeros(1000, F)) for _ in range(20)]
    np.testing.assert_array_equal(drawn, (high_words / 2**32 * 1000).astype(int))


def test_draws_follow_the_probabilities() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(OFF, 4)
    counts = np.bincount([sampler.sample(np.log(p).astype(F)) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, p, atol=5 * np.sqrt(0.25 / 20000))


def test_equal_seeds_repeat_and_the_random_seed_asks_the_system(rng: np.random.Generator) -> None:
    logits = [rng.standard_normal(5000).astype(F) for _ in range(30)]
    by_seed: dict[int, list[int]] = {}
    for seed in (1, 1, 2):
        sampler = Sampler(replace(OFF, seed=seed), 5000)
        tokens = [sampler.sample(row) for row in logits]
        assert by_seed.setdefault(seed, tokens) == tokens
    assert by_seed[1] != by_seed[2]
    assert len({Sampler(replace(OFF, seed=RANDOM_SEED), 2).seed for _ in range(8)}) > 1


PENALTIES: list[dict[str, Any]] = [
    {"penalty_repeat": 1.3},
    {"penalty_repeat": 0.7, "penalty_last_n": 5},
    {"penalty_freq": 0.2, "penalty_last_n": 32},
    {"penalty_present": 0.4, "penalize_nl": True},
    {"penalty_repeat": 1.3, "penalty_freq": 0.2, "penalty_present": 0.4, "penalty_last_n": 100},
    {"penalty_repeat": 1.3, "penalty_freq": -0.2, "penalty_last_n": -1, "penalize_nl": True},
    {"penalty_repeat": 1.3, "penalty_last_n": 0},
]


@pytest.mark.parametrize("settings", PENALTIES)
def test_penalties_agree_with_the_reference(
    settings: dict[str, Any], rng: np.random.Generator
) -> None:
    assert_same_run(replace(OFF, seed=1, **settings), rng, 20, 150)


def greedy(logits: list[float], accepted: Sequence[int] = (), **settings: Any) -> list[float]:
    """Probabilities by token of a greedy choice after the accepted tokens."""
    n = len(logits)
    sampler = Sampler(replace(OFF, temp=-1.0, n_probs=n, **settings), n, newline_id=n - 1)
    for token in accepted:
        sampler.accept(token)
    sampler.sample(np.array(logits, F))
    return [p for _, p in sorted(sampler.top())]


def test_the_history_begins_as_zeros_so_that_token_0_is_penalized_at_first() -> None:
    fresh = greedy([0, 0, 0], penalty_present=np.log(2.0))
    np.testing.assert_allclose(fresh, [0.2, 0.4, 0.4], rtol=1e-6)
    full = greedy([0, 0, 0], [1] * 64, penalty_present=np.log(2.0))
    np.testing.assert_allclose(full, [0.4, 0.2, 0.4], rtol=1e-6)


def test_the_newline_is_penalized_only_when_asked() -> None:
    settings: dict[str, Any] = {"penalty_present": np.log(2.0), "penalty_last_n": 2}
    assert greedy([0, 0, 0], [2, 2], **settings) == greedy([0, 0, 0])
    asked = greedy([0, 0, 0], [2, 2], penalize_nl=True, **settings)
    np.testing.assert_allclose(asked, [0.4, 0.4, 0.2], rtol=1e-6)


@pytest.mark.parametrize("newline_id", [-1, 4])
def test_a_vocabulary_without_a_newline_token_is_penalized_throughout(newline_id: int) -> None:
    sampler = Sampler(replace(OFF, temp=0.0, penalty_present=1.0), 4, newline_id)
    assert sampler.sample(np.array([0.5, 0, 0, 0], F)) == 1


@pytest.mark.parametrize(("last_n", "length"), [(64, 64), (0, 64), (-1, 64), (10, 64), (70, 70)])
def test_the_history_holds_64_tokens_or_as_many_as_are_penalized(last_n: int, length: int) -> None:
    sampler = Sampler(replace(OFF, penalty_last_n=last_n), 1000)
    np.testing.assert_array_equal(sampler.recent, np.zeros(length))
    for token in range(1, 101):
        sampler.accept(token)
    np.testing.assert_array_equal(sampler.recent, np.arange(101 - length, 101))


def test_biases_are_added_before_penalties() -> None:
    """A logit of -1 lifted to +2 is divided, not multiplied, by the repeat penalty."""
    p = greedy([0, 0, -1, 0], [2], logit_bias={2: 3.0}, penalty_repeat=2.0, penalty_last_n=1)
    np.testing.assert_allclose(p[2] / p[1], np.e, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"mirostat": 1}, {"mirostat": 2}, *SETTINGS.values()])
def test_a_bias_of_minus_infinity_forbids_and_of_plus_infinity_forces(
    settings: dict[str, Any], rng: np.random.Generator
) -> None:
    logits = rng.standard_normal(30).astype(F)
    best = int(logits.argmax())
    forbidding = Sampler(replace(OFF, logit_bias={best: -np.inf}, **settings), 30)
    assert best not in {forbidding.sample(logits) for _ in range(50)}
    forcing = Sampler(replace(OFF, logit_bias={3: np.inf}, **settings), 30)
    assert {forcing.sample(logits) for _ in range(5)} == {3}


def test_a_temperature_near_0_leaves_the_best_alone() -> None:
    logits = np.array([1, 5, 2], F)
    for settings in ({"temp": 1e-40}, {"temp": 1e-30, "samplers": QUEUE[::-1]}):
        sampler = Sampler(replace(OFF, n_probs=3, **settings), 3)
        assert sampler.sample(logits) == 1
        assert sampler.top()[0] == (1, 1.0)


def test_typical_ignores_probabilities_that_underflow() -> None:
    logits = np.array([0, 0, -300, -np.inf], F)
    sampler = Sampler(replace(OFF, typical_p=0.6, n_probs=4), 4)
    assert sampler.sample(logits) in (0, 1)
    assert sampler.top() == [(0, 0.5), (1, 0.5)]


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance_agrees_with_the_reference_between_biases_and_penalties(
    scale: float, rng: np.random.Generator
) -> None:
    biases = {3: 2.0, 5: -np.inf}
    params = SamplingParams(cfg_scale=scale, logit_bias=biases, penalty_repeat=1.3, seed=9)
    sampler, reference = Sampler(params, 300, 7), Reference(params, 300, 7)
    for _ in range(30):
        logits, guidance = random_logits(rng, 300), random_logits(rng, 300)
        copy = guidance.copy()
        token = sampler.sample(logits, guidance)
        assert token == reference.sample(logits, guidance) != 5
        np.testing.assert_array_equal(guidance, copy)
        sampler.accept(token)
        reference.accept(token)


def test_guidance_leads_away_from_what_it_finds_likely() -> None:
    logits, guidance = np.array([1, 0.9, 0], F), np.array([2, 0, 0], F)
    sampler = Sampler(replace(OFF, temp=0.0, cfg_scale=2.0), 3)
    assert (sampler.sample(logits), sampler.sample(logits, guidance)) == (0, 1)


def test_a_forced_token_is_forced_under_guidance_too() -> None:
    sampler = Sampler(replace(OFF, cfg_scale=3.0, logit_bias={2: np.inf}), 4)
    assert {sampler.sample(np.zeros(4, F), np.zeros(4, F)) for _ in range(5)} == {2}


LETTERS = TokenTable([bytes([i]) for i in b"abcdefghijklmnopqrstuvwxyz"] + [b"</s>"], [26])


def ruled(grammar: str, **settings: Any) -> Sampler:
    matcher = GrammarMatcher(parse_grammar(grammar), LETTERS)
    return Sampler(replace(OFF, **settings), 27, grammar=matcher)


@pytest.mark.parametrize("settings", [{}, {"mirostat": 1}, {"mirostat": 2}, *SETTINGS.values()])
def test_a_token_that_breaks_the_grammar_is_drawn_again_among_those_that_do_not(
    settings: dict[str, Any], rng: np.random.Generator
) -> None:
    """The reference draws twice: from all, then from what the grammar leaves, penalties and all."""
    settings = {"penalty_repeat": 1.3, "logit_bias": {4: 1.0}, **settings}
    sampler = ruled("root ::= [a-f]* [x-z]*", **settings)
    reference = Reference(replace(OFF, **settings), 27)
    allowed, n_second = np.array([*range(6), 23, 24, 25, 26]), 0
    for _ in range(25):
        logits = random_logits(rng, 27)
        expected = reference.sample(logits)
        if expected not in allowed:
            n_second += 1
            masked = np.full(27, -np.inf, F)
            masked[allowed] = logits[allowed]
            expected = reference.sample(masked)
        token = sampler.sample(logits)
        assert token == expected
        if token == 26:
            break
        sampler.accept(token, chosen=True)
        reference.accept(token)
        if token >= 23:
            allowed = np.array([23, 24, 25, 26])
    assert n_second > 0 or token == 26


def test_tokens_of_the_prompt_are_not_the_grammars() -> None:
    sampler = ruled('root ::= "ab"', temp=0.0)
    sampler.accept(25)
    assert sampler.sample(np.zeros(27, F)) == 0
    sampler.accept(0, chosen=True)
    assert sampler.sample(np.zeros(27, F)) == 1
    sampler.reset()
    assert sampler.sample(np.zeros(27, F)) == 0
    with pytest.raises(DataError, match="token 2 must not follow"):
        sampler.accept(2, chosen=True)


def test_an_end_is_chosen_only_where_the_grammar_may_end() -> None:
    sampler = ruled('root ::= "a" "b"', temp=0.0)
    end_first = np.arange(27, dtype=F)
    for expected in (0, 1, 26):
        token = sampler.sample(end_first)
        assert token == expected
        sampler.accept(token, chosen=True)


def test_when_the_grammar_leaves_no_token_an_error_says_why() -> None:
    with pytest.raises(DataError, match="no token of the vocabulary can go on with the grammar"):
        ruled('root ::= "A"').sample(np.zeros(27, F))
    complete = ruled('root ::= ""', logit_bias={26: -np.inf})
    with pytest.raises(DataError, match="is complete, but no token that ends a text is allowed"):
        complete.sample(np.zeros(27, F))


def test_a_grammar_over_another_vocabulary_is_refused() -> None:
    matcher = GrammarMatcher(parse_grammar("root ::= ."), LETTERS)
    with pytest.raises(ShapeError, match="a grammar over 27 tokens for a vocabulary of 28"):
        Sampler(OFF, 28, grammar=matcher)


def test_a_reset_sampler_has_no_history_but_its_generator_goes_on() -> None:
    sampler = Sampler(OFF, 1000)
    first_token = sampler.sample(np.zeros(1000, F))
    sampler.accept(first_token)
    sampler.reset()
    np.testing.assert_array_equal(sampler.recent, np.zeros(64))
    assert sampler.sample(np.zeros(1000, F)) != first_token


def test_logits_are_left_as_they_were(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(50).astype(F)
    copy = logits.copy()
    logits.flags.writeable = False
    Sampler(SamplingParams(logit_bias={1: 2.0}, penalty_repeat=1.5, seed=1), 50).sample(logits)
    np.testing.assert_array_equal(logits, copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused_by_token(bad: float) -> None:
    sampler = Sampler(SamplingParams(seed=1), 100)
    logits = np.zeros(100, F)
    logits[[31, 90]] = bad
    with pytest.raises(DataError, match=f"logit of token 31 is {bad}"):
        sampler.sample(logits)
    with pytest.raises(DataError, match=f"logit of token 31 is {bad}"):
        sampler.sample(np.zeros(100, F), logits)
    logits[[31, 90]] = 0
    assert 0 <= sampler.sample(logits) < 100


@pytest.mark.parametrize("settings", [{}, {"temp": 0.0}, {"mirostat": 1}, *SETTINGS.values()])
def test_when_every_token_is_forbidden_an_error_says_so(settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="every token is forbidden"):
        Sampler(replace(OFF, **settings), 200).sample(np.full(200, -np.inf, F))


def test_sizes_and_tokens_outside_the_vocabulary_are_refused() -> None:
    sampler = Sampler(OFF, 10)
    with pytest.raises(ShapeError, match="9 logits for a vocabulary of 10"):
        sampler.sample(np.zeros(9, F))
    for token in (-1, 10):
        with pytest.raises(ShapeError, match=f"token {token} is not"):
            sampler.accept(token)
        with pytest.raises(OptionError, match=f"token {token} is not in the vocabulary of 10"):
            Sampler(replace(OFF, logit_bias={token: 1.0}), 10)
    with pytest.raises(ShapeError, match="not 0 tokens"):
        Sampler(OFF, 0)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temp": np.nan}, "temp: nan"),
        ({"top_p": np.inf}, "top_p: inf"),
        ({"tfs_z": 1e39}, r"tfs_z: 1e\+39"),
        ({"mirostat": 3}, "mirostat: 3"),
        ({"penalty_repeat": 0.0}, "penalty_repeat: 0.0"),
        ({"penalty_repeat": -1.0}, "penalty_repeat: -1.0"),
        ({"penalty_last_n": 2**40}, "penalty_last_n"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**32}, "seed: 4294967296"),
        ({"logit_bias": {3: np.nan}}, "token 3 has the bias nan"),
        ({"samplers": ("top_k", "top_q")}, "'top_q'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_name(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(OptionError, match=complaint):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kfypmt", QUEUE),
        ("tkm", ("temperature", "top_k", "min_p")),
        ("temperature;top_k;min_p", ("temperature", "top_k", "min_p")),
        ("top-k;tfs;typical;nucleus;min-p;temp", QUEUE),
        ("top-k;tfs-z;typical-p;top-p;min-p;temp;", QUEUE),
        ("temp", ("temperature",)),
        ("kk", ("top_k", "top_k")),
        ("", ()),
    ],
)
def test_a_queue_is_read_from_names_and_from_letters(text: str, names: tuple[str, ...]) -> None:
    assert sampler_order(text) == names


@pytest.mark.parametrize(("text", "unknown"), [("top_k;best", "best"), ("kq", "q"), ("K", "K")])
def test_an_unknown_sampler_is_refused_by_name(text: str, unknown: str) -> None:
    with pytest.raises(OptionError, match=f"unknown sampler '{unknown}'"):
        sampler_order(text)


def test_a_queue_may_be_said_to_be_names_or_letters() -> None:
    assert sampler_order("temp", letters=False) == ("temperature",)
    assert sampler_order("ttk", letters=True) == ("temperature", "temperature", "top_k")
    with pytest.raises(OptionError, match=r"^samplers: unknown sampler 'kt'"):
        sampler_order("kt", letters=False)
    with pytest.raises(OptionError, match=r"^sampling_seq: unknown sampler 'e'"):
        sampler_order("temp", letters=True)


def test_the_description_is_the_one_users_know() -> None:
    assert describe(SamplingParams()) == (
        "sampling: \n"
        "\trepeat_last_n = 64, repeat_penalty = 1.000,"
        " frequency_penalty = 0.000, presence_penalty = 0.000\n"
        "\ttop_k = 40, tfs_z = 1.000, top_p = 0.950,"
        " min_p = 0.050, typical_p = 1.000, temp = 0.800\n"
        "\tmirostat = 0, mirostat_lr = 0.100, mirostat_ent = 5.000\n"
        "sampling order: \n"
        "CFG -> Penalties -> top_k -> tfs_z -> typical_p -> top_p -> min_p -> temperature "
    )
    assert describe(SamplingParams(mirostat=2)).endswith("CFG -> Penalties -> mirostat ")


FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "--temp": ("temp", float),
    "--dynatemp-range": ("dynatemp_range", float),
    "--top-k": ("top_k", int),
    "--top-p": ("top_p", float),
    "--min-p": ("min_p", float),
    "--tfs": ("tfs_z", float),
    "--typical": ("typical_p", float),
    "--mirostat": ("mirostat", int),
    "--mirostat-ent": ("mirostat_tau", float),
    "--repeat-penalty": ("penalty_repeat", float),
    "--repeat-last-n": ("penalty_last_n", int),
    "--presence-penalty": ("penalty_present", float),
    "--frequency-penalty": ("penalty_freq", float),
    "--samplers": ("samplers", sampler_order),
    "-s": ("seed", int),
}
ELSEWHERE = {"-p", "-n", "-c", "--keep", "--lora", "--lora-scaled", "--logit-bias", "--grammar"}
ELSEWHERE |= {"--ignore-eos"}


def test_every_sampling_option_of_the_recorded_runs_has_its_field(data_dir: Path) -> None:
    paths = sorted(data_dir.glob("main-*.json"))
    assert paths
    for path in paths:
        arguments = json.loads(path.read_text())["args"]
        options = {a for a in arguments if a.startswith("-") and not a.startswith("-1")}
        assert options <= FIELDS.keys() | ELSEWHERE, path.name
        settings: dict[str, Any] = {}
        for option in options & FIELDS.keys():
            name, read = FIELDS[option]
            settings[name] = read(arguments[arguments.index(option) + 1])
        assert 0 <= Sampler(SamplingParams(**settings), 768).sample(np.zeros(768, F)) < 768
