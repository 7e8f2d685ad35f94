"""Samples, shuffle and batches: against records, and against the rules token by token."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from engine.errors import DataError, FormatError
from engine.escapes import resolve_escapes
from engine.gguf import read_gguf
from engine.mt19937 import MT19937
from engine.tokenizer import Tokenizer
from engine.training.data import (
    Batches,
    BatchOptions,
    Samples,
    ShuffleState,
    SplitOptions,
    begin_and_end_tokens,
    load_samples,
    read_training_text,
    samples_hash,
    shuffle,
    split_samples,
    string_hash,
)

# The recorded runs were given the text under this name.
RECORDED_NAME = "train.txt"
BOS, EOS = 1, 2


class ByteTokenizer:
    """One token a byte, so that positions can be read off."""

    max_token_bytes = 3

    def encode(self, text):
        return list(text)


def split(text, n_ctx=4, **options):
    return split_samples(text, "t.txt", ByteTokenizer(), n_ctx, SplitOptions(**options))


def texts(samples):
    return [
        bytes(samples.tokens[begin : begin + size].astype(np.uint8))
        for begin, size in zip(samples.begin, samples.size, strict=True)
    ]


def made_samples(sizes):
    """Make samples whose tokens tell sample and place: 1000 · (sample + 1) + place."""
    tokens = [1000 * (i + 1) + place for i, size in enumerate(sizes) for place in range(size)]
    size = np.array(sizes, dtype=np.int64)
    begin = np.cumsum(size) - size
    return Samples(np.array(tokens, dtype=np.int32), begin, size, samples_hash("x", begin, size))


def fresh_state(samples, seed=1):
    state = ShuffleState()
    state.restart(samples, seed)
    return state


# Against the recorded runs


@pytest.fixture(scope="module")
def tokenizer(request):
    with read_gguf(request.path.parent.parent / "data" / "mini-f32.gguf") as file:
        return Tokenizer.from_metadata(file.metadata, "mini-f32.gguf")


RUNS = {
    "a": (42, {}, {}),
    "b": (
        1234,
        {"sample_start": rb"\n\n"},
        {
            "fill_with_next_samples": True,
            "sample_random_offsets": True,
            "separate_with_eos": True,
        },
    ),
    "c-epochs": (
        7,
        {"sample_start": b"MILLER:", "overlapping_samples": True, "include_sample_start": True},
        {},
    ),
}


def recorded_samples(data_dir, tokenizer, run):
    text = read_training_text(data_dir / "play.txt")
    options = dict(RUNS[run][1])
    options["sample_start"] = resolve_escapes(options.get("sample_start", b""))
    return split_samples(text, RECORDED_NAME, tokenizer, 32, SplitOptions(**options))


@pytest.mark.parametrize("run", RUNS)
def test_samples_of_recorded_runs_are_the_recorded_number(data_dir, tokenizer, run):
    record = json.loads((data_dir / f"finetune-{run}.json").read_text())
    samples = recorded_samples(data_dir, tokenizer, run)
    assert len(samples) == record["iters"][0]["samples"]
    assert len(samples.tokens) == record["tokens"]
    assert samples.n_unique_tokens == record["unique"]


@pytest.mark.parametrize("run", RUNS)
def test_batches_of_recorded_runs_use_the_recorded_samples(data_dir, tokenizer, run):
    record = json.loads((data_dir / f"finetune-{run}.json").read_text())
    samples = recorded_samples(data_dir, tokenizer, run)
    seed, _, options = RUNS[run]
    state = fresh_state(samples, seed)
    batches = Batches(samples, state, BatchOptions(4, 32, BOS, EOS, **options))
    accumulated = 2 if run == "b" else 1
    seen = []
    for _ in record["iters"]:
        seen.append(min(1 + state.next_sample, len(samples)))
        for _ in range(accumulated):
            batches.next()
    assert seen == [row["sample"] for row in record["iters"]]
    assert batches.epochs == (2 if run == "c-epochs" else 0)


def test_hash_and_shuffle_of_a_recorded_checkpoint_are_made_again(data_dir, tokenizer):
    samples = recorded_samples(data_dir, tokenizer, "a")
    with read_gguf(data_dir / "a-chk-10.gguf") as file:
        stored = file.metadata
        assert samples.hash == stored["training.shuffle.samples_hash"]
        state = fresh_state(samples, 42)
        assert state.rng_state == stored["training.shuffle.rng_state"]
        assert state.sample_count == stored["training.shuffle.sample_count"]
        batches = Batches(samples, state, BatchOptions(4, 32, BOS, EOS))
        used = sum(batches.next().used for _ in range(10))
        assert state.next_sample == used == stored["training.shuffle.next_sample"]
        # The shuffle that is stored is the one before the epoch, until the epoch ends.
        assert state.rng_state == stored["training.shuffle.rng_state"]


# Samples


@pytest.mark.parametrize(
    ("n", "n_ctx", "count"), [(15, 13, 2), (15, 14, 1), (15, 15, 1), (15, 16, 1), (15, 4, 11)]
)
def test_without_a_pattern_a_sample_begins_at_every_token(n, n_ctx, count):
    text = bytes(range(n))
    samples = split(text, n_ctx)
    assert texts(samples) == [text[i : i + n_ctx] for i in range(count)]
    assert samples.warnings == []


def test_samples_begin_behind_each_occurrence_and_end_at_the_next():
    assert texts(split(b"lost#one#two#", sample_start=b"#")) == [b"one", b"two"]
    included = split(b"lost#one#two#", sample_start=b"#", include_sample_start=True)
    assert texts(included) == [b"#one", b"#two", b"#"]


def test_occurrences_never_overlap():
    assert texts(split(b"aaaab", sample_start=b"aa", include_sample_start=True)) == [b"aa", b"aab"]


def test_overlapping_samples_run_on_for_as_many_bytes_as_a_row_may_need():
    samples = split(b"#0123456#89", 2, sample_start=b"#", overlapping_samples=True)
    assert texts(samples) == [b"012345", b"89"]


def test_a_pattern_that_does_not_occur_gives_one_sample_from_byte_0():
    samples = split(b"whole text", sample_start=b"####")
    assert texts(samples) == [b"whole text"]
    assert "'####' does not occur" in samples.warnings[0]


def test_a_text_shorter_than_the_pattern_is_one_sample():
    assert texts(split(b"ab", sample_start=b"abc")) == [b"ab"]


def test_empty_samples_are_left_out_of_everything():
    samples = split(b"##one##two#", sample_start=b"#")
    assert texts(samples) == [b"one", b"two"]
    assert samples.hash == samples_hash("t.txt", np.array([0, 3]), np.array([3, 3]))
    assert samples.warnings[-1].startswith("3 empty samples")


def test_samples_of_unlike_length_are_counted_in_warnings():
    warnings = split(b"#12345#12#123456#1#1234", sample_start=b"#").warnings
    assert warnings == [
        "2 samples (max length 6) exceed context length of 4. they are cut off.",
        "2 samples (min length 1) are shorter than context length of 4.",
    ]


@pytest.mark.parametrize("letter", ["é", "€", "𝄞"])
def test_an_end_within_a_character_moves_behind_it(letter):
    width = len(letter.encode())
    for before in range(6):
        text = ("#" + "x" * before + letter + "yyyyyy").encode()
        # Six bytes are asked for; the letter may straddle the sixth.
        (piece,) = texts(split(text, 2, sample_start=b"#", overlapping_samples=True))
        straddles = before < 6 < before + width
        assert piece == text[1 : 1 + (before + width if straddles else 6)]


def walked_end(text, end):
    """Follow characters from the start of the text, one by one."""
    place = 0
    while place < end:
        first = text[place]
        place += 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
    return end if end == len(text) else min(place, len(text))


def test_a_text_that_is_not_utf_8_has_its_own_rhythm(rng):
    moved = 0
    for _ in range(200):
        text = b"#" + bytes(rng.choice([0x41, 0x80, 0xC3, 0xE2, 0xF0, 0xFF], 12).tolist())
        (piece,) = texts(split(text, 2, sample_start=b"#", overlapping_samples=True))
        end = walked_end(text, 7)
        assert piece == text[1:end]
        moved += end != 7
    assert moved


def test_a_text_that_ends_within_a_character_is_taken_whole():
    assert texts(split(b"#ab\xf0\x9d", sample_start=b"#")) == [b"ab\xf0\x9d"]


def test_a_text_of_nothing_but_patterns_is_refused():
    with pytest.raises(DataError, match=r"t\.txt: .*no sample"):
        split(b"####", sample_start=b"#")


def test_missing_empty_and_unreadable_texts_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: .*No such file"):
        read_training_text(tmp_path / "gone.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: .*is empty"):
        read_training_text(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="directory"):
        read_training_text(tmp_path)


def test_a_text_is_loaded_under_the_name_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_bytes(b"#one#two")
    monkeypatch.chdir(tmp_path)
    loaded = load_samples("t.txt", ByteTokenizer(), 4, sample_start=b"#")
    assert loaded.hash == split(b"#one#two", sample_start=b"#").hash
    assert loaded.hash != load_samples("./t.txt", ByteTokenizer(), 4, sample_start=b"#").hash


# Hash and shuffle


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", 6142509188972423790),
        (b"a", 4993892634952068459),
        (b"12345678", 10113836418918046885),
        (b"checkpoint.gguf", 4428775943267788709),
    ],
)
def test_strings_hash_as_in_libstdcxx(text, expected):
    # The numbers are what a C++ program printed.
    assert string_hash(text) == expected


def test_the_samples_hash_is_the_sum_without_carry_of_name_count_and_places(rng):
    size = rng.integers(1, 100, 50)
    begin = np.cumsum(size) - size
    expected = string_hash(b"name") ^ 100
    for b, s in zip(begin.tolist(), size.tolist(), strict=True):
        expected ^= (2 * b) ^ (2 * s)
    assert samples_hash("name", begin, size) == expected


def test_a_shuffle_sorts_by_word_then_draws_an_offset_for_each_place(rng):
    size = rng.integers(1, 40, 200)
    start = MT19937(int(rng.integers(2**32)))
    text = start.state_text
    words = [start.next_word() for _ in range(200)]
    order = sorted(range(200), key=lambda i: (words[i], i))
    offset = [math.trunc((int(size[i]) - 1) * (start.next_word() / 4294967294.0)) for i in order]
    made = shuffle(size, text)
    assert made.order.tolist() == order
    assert made.offset.tolist() == offset
    assert len(set(offset)) > 10
    assert made.next_rng_state == start.state_text


def test_equal_words_keep_the_order_of_their_samples():
    n = 400_000  # enough for some 18 pairs of equal words
    text = MT19937(1).state_text
    words = MT19937.from_text(text).words(n)
    assert len(np.unique(words)) < n
    expected = np.lexsort((np.arange(n), words))
    assert np.array_equal(shuffle(np.ones(n, dtype=np.int64), text).order, expected)


def test_an_epoch_costs_two_words_a_sample():
    after = shuffle(np.full(25, 9), MT19937(3).state_text).next_rng_state
    assert after.split()[-1] == "50"


def test_a_shuffle_fits_only_the_samples_it_was_made_for():
    samples, others = made_samples([3, 4]), made_samples([4, 3])
    state = ShuffleState()
    assert not state.fits(samples)
    state.restart(samples, 5)
    state.next_sample = 1
    assert state.fits(samples)
    assert not state.fits(others)
    state.restart(others, 5)
    assert state == ShuffleState(MT19937(5).state_text, others.hash, 2, 0)


def test_a_generator_that_is_none_is_refused():
    samples = made_samples([3, 4])
    with pytest.raises(FormatError):
        Batches(samples, ShuffleState("1 2 3", samples.hash, 2, 0), BatchOptions(1, 2, BOS, EOS))


# Batches


def plain_batch(samples, shuffled, next_sample, options):
    """The rules of a batch, token by token."""
    count = len(samples)
    inputs = np.zeros((options.n_batch, options.n_ctx), dtype=np.int32)
    targets = np.zeros_like(inputs)
    used = 0

    def take():
        nonlocal used
        j = (next_sample + used) % count
        used += 1
        return j

    for k in range(options.n_batch):
        j = take()
        o = int(shuffled.offset[j]) if options.sample_random_offsets else 0
        inputs[k, 0] = options.bos
        no_eos, no_bos = not options.separate_with_eos, not options.separate_with_bos
        for i in range(options.n_ctx):
            t = options.eos
            if o >= samples.size[shuffled.order[j]] and options.fill_with_next_samples:
                if not no_eos:
                    no_eos = True
                elif not no_bos:
                    no_bos, t = True, options.bos
                else:
                    no_eos = not options.separate_with_eos
                    no_bos = not options.separate_with_bos
                    o, j = 0, take()
            index = shuffled.order[j]
            if o < samples.size[index]:
                t = samples.tokens[samples.begin[index] + o]
                o += 1
            targets[k, i] = t
            if i + 1 < options.n_ctx:
                inputs[k, i + 1] = t
    return inputs, targets, used


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("with_eos", [False, True])
@pytest.mark.parametrize("with_bos", [False, True])
def test_rows_are_filled_as_token_by_token(rng, fill, offsets, with_eos, with_bos):
    samples = made_samples(rng.integers(1, 12, 23).tolist())
    options = BatchOptions(3, 9, BOS, EOS, fill, with_eos, with_bos, offsets)
    state = fresh_state(samples, int(rng.integers(2**32)))
    batches = Batches(samples, state, options)
    next_sample, rng_state = 0, state.rng_state
    for _ in range(20):
        shuffled = shuffle(samples.size, rng_state)
        inputs, targets, used, _ = batches.next()
        expected = plain_batch(samples, shuffled, next_sample, options)
        assert np.array_equal(inputs, expected[0])
        assert np.array_equal(targets, expected[1])
        assert used == expected[2]
        next_sample += used
        if next_sample >= len(samples):
            next_sample, rng_state = 0, shuffled.next_rng_state
        assert (state.next_sample, state.rng_state) == (next_sample, rng_state)
    assert batches.epochs >= 2


def test_batches_are_int32_arrays_of_the_asked_shape():
    samples = made_samples([5, 6, 7])
    batch = Batches(samples, fresh_state(samples), BatchOptions(2, 4, BOS, EOS)).next()
    for rows in batch[:2]:
        assert (rows.dtype, rows.shape) == (np.int32, (2, 4))
        assert rows.flags.c_contiguous


def test_an_input_row_is_its_target_row_one_later_with_bos_in_front():
    samples = made_samples([2])
    batch = Batches(samples, fresh_state(samples), BatchOptions(1, 4, BOS, EOS)).next()
    assert batch.targets.tolist() == [[1000, 1001, EOS, EOS]]
    assert batch.inputs.tolist() == [[BOS, 1000, 1001, EOS]]


def test_a_resumed_stream_goes_on_where_the_first_one_stood(rng):
    samples = made_samples(rng.integers(1, 9, 17).tolist())
    options = BatchOptions(4, 5, BOS, EOS, fill_with_next_samples=True, sample_random_offsets=True)
    state = fresh_state(samples, 8)
    batches = Batches(samples, state, options)
    for _ in range(7):
        batches.next()
    copy = ShuffleState(state.rng_state, state.samples_hash, state.sample_count, state.next_sample)
    again = Batches(samples, copy, options)
    for _ in range(7):
        expected, made = batches.next(), again.next()
        assert np.array_equal(made.targets, expected.targets)


@pytest.mark.parametrize(
    ("bos", "eos", "eot", "expected"),
    [(1, 2, 3, (1, 2)), (-1, 2, 3, (2, 2)), (1, -1, 3, (1, 3)), (-1, -1, 3, (3, 3))],
)
def test_vocabularies_without_bos_or_eos_begin_and_pad_with_what_they_have(bos, eos, eot, expected):
    vocabulary = SimpleNamespace(bos_id=bos, eos_id=eos, eot_id=eot)
    assert begin_and_end_tokens(vocabulary, "m.gguf") == expected


def test_a_vocabulary_that_can_pad_with_nothing_is_refused_by_name():
    with pytest.raises(DataError, match=r"m\.gguf: .*neither"):
        begin_and_end_tokens(SimpleNamespace(bos_id=1, eos_id=-1, eot_id=-1), "m.gguf")
