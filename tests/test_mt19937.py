"""The generator and its normal deviates against the standard, NumPy and a recorded adapter."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.errors import FormatError
from engine.mt19937 import MT19937, NormalFloat


def records(path: Path) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    """Name, sizes (fastest first) and flat float32 data of each record of an adapter file."""
    content = path.read_bytes()
    at = 16
    while at < len(content):
        n_dims, name_length, _ = struct.unpack_from("<3I", content, at)
        sizes = struct.unpack_from(f"<{n_dims}I", content, at + 12)
        at += 12 + 4 * n_dims
        name = content[at : at + name_length].decode()
        at = -(-(at + name_length) // 32) * 32
        n = int(np.prod(sizes))
        yield name, sizes, np.frombuffer(content, "<f4", n, at)
        at += 4 * n


def test_word_10000_of_the_default_seed_is_the_one_the_cpp_standard_names() -> None:
    assert MT19937().words(10000)[-1] == 4123659995


def test_first_words_of_the_default_seed_are_the_published_ones() -> None:
    generator = MT19937(5489)
    assert [generator.next_word() for _ in range(3)] == [3499211612, 581869302, 3890346734]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
def test_words_agree_with_numpy_for_any_seed(seed: int) -> None:
    oracle = np.random.RandomState(seed)
    expected = oracle.randint(0, 2**32, 2000, dtype=np.uint32)
    np.testing.assert_array_equal(MT19937(seed).words(2000), expected)


def test_words_of_one_call_are_the_words_of_many() -> None:
    one, many = MT19937(7), MT19937(7)
    pieces = [many.words(n) for n in (0, 1, 623, 2, 700)]
    np.testing.assert_array_equal(one.words(1326), np.concatenate(pieces))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_beyond_32_bits_is_refused(seed: int) -> None:
    with pytest.raises(OverflowError):
        MT19937(seed)


@pytest.mark.parametrize("n_drawn", [0, 1, 227, 623, 624, 625, 1248])
def test_state_text_restores_the_generator_wherever_it_stands(n_drawn: int) -> None:
    generator = MT19937(42)
    generator.words(n_drawn)
    text = generator.state_text
    restored = MT19937.from_text(text)
    assert restored.state_text == text
    np.testing.assert_array_equal(restored.words(1500), generator.words(1500))


@pytest.mark.parametrize("n_drawn", [0, 624, 1248])
def test_position_is_624_and_not_0_when_all_words_are_drawn(n_drawn: int) -> None:
    generator = MT19937(1)
    generator.words(n_drawn)
    assert generator.state_text.split(" ")[-1] == "624"


def test_state_text_is_the_raw_array_with_single_spaces() -> None:
    words = MT19937(9).state_text.split(" ")
    assert len(words) == 625
    assert words[:2] == ["9", str((1812433253 * 9 + 1) % 2**32)]


def test_state_text_agrees_with_numpys_array_after_a_renewal() -> None:
    generator = MT19937(3)
    generator.words(1000)
    oracle = np.random.RandomState(3)
    oracle.randint(0, 2**32, 1000, dtype=np.uint32)
    _, key, position, _, _ = oracle.get_state()
    assert generator.state_text == " ".join(map(str, [*key, position]))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda words: words[:-1], "has 624 numbers"),
        (lambda words: [*words, "0"], "has 626 numbers"),
        (lambda words: [], "has 0 numbers"),
        (lambda words: [*words[:-1], "625"], "number 625 is '625'"),
        (lambda words: ["4294967296", *words[1:]], "number 1 is '4294967296'"),
        (lambda words: ["-1", *words[1:]], "number 1 is '-1'"),
        (lambda words: ["1_0", *words[1:]], "number 1 is '1_0'"),
        (lambda words: ["٣", *words[1:]], "number 1 is"),
        (lambda words: ["9" * 5000, *words[1:]], "number 1 is"),
    ],
)
def test_a_damaged_state_text_is_refused(
    change: Callable[[list[str]], list[str]], complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        MT19937.from_text(" ".join(change(MT19937().state_text.split())))


def test_the_recorded_initial_adapter_is_met_bit_for_bit(data_dir: Path) -> None:
    normal = NormalFloat(MT19937(42))
    n_random = 0
    for name, sizes, data in records(data_dir / "init-lora-0.bin"):
        if name.endswith(".loraB"):
            assert not data.any(), name
            continue
        rank, n_in = sizes
        scale = np.float32(1) / np.sqrt(np.float32(rank) + np.float32(n_in))
        made = np.empty(data.size, np.float32)
        normal.fill(made, scale)
        np.testing.assert_array_equal(made.view(np.uint32), data.view(np.uint32), err_msg=name)
        n_random += made.size
    assert n_random == 5440


def test_deviates_follow_the_polar_method_in_float32() -> None:
    """Redone in NumPy with a float64 logarithm: equal but for the logarithm's last bit."""
    words = iter(MT19937(11).words(20000).astype(np.float32))
    one = np.float32(1)

    def uniform() -> np.float32:
        return np.float32(min(next(words) / np.float32(2**32), np.nextafter(one, np.float32(0))))

    expected: list[np.float32] = []
    while len(expected) < 2000:
        x, y = 2 * uniform() - one, 2 * uniform() - one
        rho = np.float32(float(x) * float(x) + float(y * y))
        if rho > 1 or rho == 0:
            continue
        m = np.sqrt(np.float32(-2) * np.float32(np.log(float(rho))) / rho)
        expected += [y * m, x * m]
    normal = NormalFloat(MT19937(11))
    made = np.array([normal.next_float() for _ in range(2000)], np.float32)
    np.testing.assert_array_max_ulp(made, np.array(expected, np.float32), maxulp=4)
    assert np.mean(made == expected) > 0.95


def test_the_saved_deviate_carries_over_from_one_fill_to_the_next() -> None:
    whole, parts = np.empty(1001, np.float32), np.empty(1001, np.float32)
    NormalFloat(MT19937(5)).fill(whole, 0.5)
    normal = NormalFloat(MT19937(5))
    for start, stop in [(0, 1), (1, 1), (1, 4), (4, 501), (501, 1001)]:
        normal.fill(parts[start:stop], 0.5)
    np.testing.assert_array_equal(whole, parts)


def test_fill_cuts_at_one_before_it_scales() -> None:
    raw, cut = NormalFloat(MT19937(8)), np.empty(4000, np.float32)
    NormalFloat(MT19937(8)).fill(cut, 0.3)
    deviates = np.array([raw.next_float() for _ in range(4000)], np.float32)
    np.testing.assert_array_equal(cut, np.float32(0.3) * np.clip(deviates, -1, 1))
    assert 0.25 < np.mean(np.abs(deviates) > 1) < 0.40  # P(|z| > 1) = 0.317
