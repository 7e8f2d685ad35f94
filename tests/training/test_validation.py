"""Parts of the data kept for validation, and the mean loss over fixed batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.errors import DataError
from engine.training.data import (
    Batches,
    BatchOptions,
    Samples,
    ShuffleState,
    SplitOptions,
    split_samples,
)
from engine.training.validation import Validation, held_out, load_validation, split_validation

BOS, EOS = 256, 257


class ByteTokenizer:
    """One token a byte, so that positions can be read off."""

    max_token_bytes = 3
    bos_id, eos_id, eot_id, add_bos = BOS, EOS, -1, False

    def encode(self, text: bytes) -> list[int]:
        return list(text)


def split(text: bytes, n_ctx: int = 4, **options: Any) -> Samples:
    return split_samples(text, "t.txt", ByteTokenizer(), n_ctx, SplitOptions(**options))


def texts(samples: Samples) -> list[bytes]:
    return [
        bytes(samples.tokens[begin : begin + size].astype(np.uint8))
        for begin, size in zip(samples.begin, samples.size, strict=True)
    ]


def conversations(rng: np.random.Generator, n: int) -> Samples:
    """Samples with a mask whose tokens are all different."""
    size = rng.integers(2, 9, n)
    begin = np.cumsum(size) - size
    tokens = np.arange(size.sum(), dtype=np.int32)
    mask = rng.random(len(tokens)) < 0.5
    mask[begin + size - 1] = True
    return Samples(tokens, begin, size, 77, mask=mask, begin_token=9999)


# Setting aside


def test_drawn_parts_together_are_the_data(rng: np.random.Generator) -> None:
    samples = conversations(rng, 40)
    train, validation = split_validation(samples, 0.25, 3)
    assert (len(train), len(validation)) == (30, 10)
    assert sorted([*train.tokens, *validation.tokens]) == samples.tokens.tolist()
    for part in (train, validation):
        assert part.begin_token == 9999
        assert part.mask is not None
        # Tokens are places in the whole: each kept its mark.
        assert np.array_equal(part.mask, samples.mask[part.tokens])
        assert np.array_equal(part.begin, np.cumsum(part.size) - part.size)
        assert np.all(np.diff(part.tokens[part.begin]) > 0)


def test_a_split_depends_on_its_seed_alone(rng: np.random.Generator) -> None:
    samples = conversations(rng, 40)
    first, again, other = (split_validation(samples, 0.25, seed) for seed in (3, 3, 4))
    assert np.array_equal(first[1].tokens, again[1].tokens)
    assert not np.array_equal(first[1].tokens, other[1].tokens)
    hashes = [part[0].hash for part in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert samples.hash not in hashes


def test_of_a_text_in_windows_the_end_is_set_aside() -> None:
    text = bytes(range(100))
    train, validation = split_validation(split(text), 0.1, 1)
    assert texts(train) == texts(split(text[:90]))
    assert texts(validation) == [bytes([90, 91, 92, 93]), bytes([94, 95, 96, 97]), bytes([98, 99])]
    assert validation.n_counted == 10
    assert len(train.tokens) == 90


def test_samples_that_a_pattern_divides_are_drawn() -> None:
    samples = split(b"#one#two#three#four#five#six", sample_start=b"#")
    train, validation = split_validation(samples, 0.34, 1)
    assert len(validation) == 2
    assert sorted(texts(train) + texts(validation)) == sorted(texts(samples))
    assert train.mask is None


def test_training_samples_do_not_reach_into_the_validation_part() -> None:
    text = b"".join(b"#" + bytes([65 + i]) * 5 for i in range(20))
    samples = split(text, 4, sample_start=b"#", overlapping_samples=True)
    train, validation = split_validation(samples, 0.1, 1)
    assert len(validation) == 2
    assert len(train) > 10
    # S is the first letter of the validation part.
    assert not set(b"ST") & set(train.tokens.tolist())
    assert texts(validation) == texts(samples)[-2:]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="leaves nothing"):
        split_validation(split(b"#one#two", sample_start=b"#"), fraction, 1)


def test_data_that_are_too_small_to_split_are_refused() -> None:
    with pytest.raises(DataError, match="single sample"):
        split_validation(split(b"#one", sample_start=b"#"), 0.5, 1)
    with pytest.raises(DataError, match="less than the context"):
        split_validation(split(b"abcdef"), 0.5, 1)
    overlapping = split(b"#a#b#c#d", 4, sample_start=b"#", overlapping_samples=True)
    with pytest.raises(DataError, match="--overlapping-samples"):
        split_validation(overlapping, 0.25, 1)


def test_each_part_has_one_sample_at_the_least() -> None:
    samples = split(b"#one#two#three", sample_start=b"#")
    assert [len(part) for part in split_validation(samples, 0.001, 1)] == [2, 1]
    assert [len(part) for part in split_validation(samples, 0.999, 1)] == [1, 2]


def test_training_goes_on_with_its_part() -> None:
    train, _ = split_validation(split(bytes(range(100))), 0.1, 1)
    state = ShuffleState()
    state.restart(train, 1)
    targets = Batches(train, state, BatchOptions(86, 4, BOS, EOS)).next().targets
    assert targets.min() == 0
    assert targets.max() < 90


# Data of their own


def test_validation_text_is_read_in_windows_side_by_side(tmp_path) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(b"abcdefghij")
    samples = load_validation(path, ByteTokenizer(), 4)
    assert texts(samples) == [b"abcd", b"efgh", b"ij"]
    divided = load_validation(path, ByteTokenizer(), 4, split=SplitOptions(b"d"))
    assert texts(divided) == [b"efghij"]
    for part in (samples, divided):
        assert part.mask is not None
        assert part.mask.all()


def test_missing_validation_data_are_refused_by_name(tmp_path) -> None:
    for name in ("gone.txt", "gone.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: "):
            load_validation(tmp_path / name, ByteTokenizer(), 4)


# The end of the data


@pytest.mark.parametrize(("n", "expected"), [(1000, 20), (30, 1), (1_000_000, 2048)])
def test_the_end_of_a_text_is_its_last_fiftieth_and_at_most_2048_tokens(n, expected) -> None:
    samples = split(bytes(i % 251 for i in range(n)), 16)
    end = held_out(samples)
    assert np.array_equal(end.tokens, samples.tokens[-expected:])
    assert end.n_counted == expected == end.size.sum()
    assert end.size.max() <= 16


def test_the_end_of_divided_data_is_whole_samples_and_at_least_one(
    rng: np.random.Generator,
) -> None:
    samples = conversations(rng, 100)
    one = held_out(samples, fraction=1e-9)
    assert np.array_equal(one.tokens, samples.tokens[samples.begin[-1] :])
    end = held_out(samples, fraction=0.1)
    assert len(end) > 1
    assert len(end.tokens) <= len(samples.tokens) // 10 < len(end.tokens) + samples.size.max()
    assert np.array_equal(end.tokens, samples.tokens[-len(end.tokens) :])
    assert np.array_equal(end.mask, samples.mask[-len(end.tokens) :])


def test_a_text_of_one_long_sample_has_an_end_that_is_not_too_long() -> None:
    samples = split(b"#" + b"abc" * 1000, sample_start=b"#")
    assert held_out(samples).size.tolist() == [2048]


# The mean loss


def targets_as_losses(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    counted = targets >= 0
    return float(targets[counted].sum()), int(counted.sum())


def test_the_loss_is_the_mean_over_all_that_counts(rng: np.random.Generator) -> None:
    samples = conversations(rng, 10)
    validation = Validation(samples, 4, 9, BOS, EOS)
    assert (validation.n_rows, validation.n_batches) == (10, 3)
    assert validation.n_tokens == samples.n_counted
    assert validation.loss(targets_as_losses) == pytest.approx(samples.tokens[samples.mask].mean())


def test_batches_are_the_same_each_time_and_of_one_shape(rng: np.random.Generator) -> None:
    validation = Validation(conversations(rng, 10), 4, 6, BOS, EOS)
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def look(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        assert inputs.shape == targets.shape == (4, 6)
        assert inputs.dtype == targets.dtype == np.int32
        seen.append((inputs.copy(), targets.copy()))
        return 0.0, 1

    validation.loss(look)
    validation.loss(look)
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert all(map(np.array_equal, first, again))


def test_rows_are_those_of_training(rng: np.random.Generator) -> None:
    samples = conversations(rng, 7)
    rows: dict[int, tuple[list[int], list[int]]] = {}
    state = ShuffleState()
    state.restart(samples, 1)
    batches = Batches(samples, state, BatchOptions(7, 5, BOS, EOS))
    trained = batches.next()
    for inputs, targets in zip(trained.inputs.tolist(), trained.targets.tolist(), strict=True):
        rows[inputs[1]] = (inputs, targets)

    def compare(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        for row in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert rows.pop(row[0][1]) == row
        return 0.0, 1

    Validation(samples, 7, 5, BOS, EOS).loss(compare)
    assert not rows


def test_rows_begin_with_bos_where_samples_bring_nothing() -> None:
    validation = Validation(split(b"#abcdef", sample_start=b"#"), 2, 4, BOS, EOS)

    def look(inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        assert inputs.tolist() == [[BOS, *b"abc"], [BOS, EOS, EOS, EOS]]
        assert targets.tolist() == [[*b"abcd"], [-1] * 4]
        return 8.0, 4

    assert validation.loss(look) == 2.0


def test_validation_of_which_nothing_counts_is_refused(rng: np.random.Generator) -> None:
    samples = conversations(rng, 3)
    with pytest.raises(DataError, match="no token of the validation data counts"):
        Validation(replace(samples, mask=np.zeros_like(samples.mask)), 2, 4, BOS, EOS)
