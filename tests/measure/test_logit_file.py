"""Files of log-probabilities: layout, precision, and what is wrong with broken ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError, FormatError
from engine.measure import halves, open_logit_writer, perplexity, read_logit_file
from tests.measure.scripted import ScriptedContext, log_softmax

N_CTX, TEXT = 6, np.arange(1, 19, dtype=np.int32) % 7


def written(path: Path, n_vocab: int, rng: np.random.Generator, spread: float = 2.0) -> np.ndarray:
    """Write a file of three windows; gives the log-probabilities that it is to hold."""
    context = ScriptedContext(rng.standard_normal((n_vocab, n_vocab), np.float32) * spread)
    windows = halves(TEXT, N_CTX)
    with open_logit_writer(path, windows, n_vocab) as writer:
        list(perplexity(context, windows, writer))
    rows = [context.rows(windows.at(i))[windows.first : N_CTX - 1] for i in range(windows.count)]
    return log_softmax(np.concatenate(rows))


@pytest.mark.parametrize("n_vocab", [8, 9])
def test_a_file_holds_tokens_and_log_probabilities(n_vocab, tmp_path, rng) -> None:
    path = tmp_path / "base.kld"
    expected = written(path, n_vocab, rng)
    file = read_logit_file(path)
    assert file.n_vocab == n_vocab
    assert (file.windows.n_ctx, file.windows.count, file.windows.n_scored) == (N_CTX, 3, 2)
    assert file.windows.tokens.tolist() == TEXT.tolist()
    for i, row in enumerate(expected):
        step = (row.max() - row.min()) / 65535
        np.testing.assert_allclose(file.log_probabilities(i), row, rtol=0, atol=step + 1e-5)


def test_the_layout_is_the_one_that_other_programs_read(tmp_path, rng) -> None:
    path = tmp_path / "base.kld"
    expected = written(path, 9, rng)
    content = path.read_bytes()
    assert content[:20] == b"_logits_" + struct.pack("<3i", N_CTX, 9, 3)
    assert content[20:92] == TEXT.astype("<i4").tobytes()
    record = 4 + 4 + 2 * 10  # an odd vocabulary has one code more
    assert len(content) == 92 + 6 * record
    scale, lowest = struct.unpack_from("<2f", content, 92)
    codes = np.frombuffer(content, "<u2", 9, 100)
    np.testing.assert_allclose(codes * scale + lowest, expected[0], atol=scale)
    assert codes.min() == 0
    assert codes.max() == 65535


def test_what_is_more_than_sixteen_below_the_highest_is_cut_off(tmp_path, rng) -> None:
    expected = written(tmp_path / "base.kld", 8, rng, spread=20.0)
    file = read_logit_file(tmp_path / "base.kld")
    assert expected.min() < expected.max() - 20
    for i, row in enumerate(expected):
        cut = np.maximum(row, row.max() - 16)
        np.testing.assert_allclose(file.log_probabilities(i), cut, rtol=0, atol=1e-3)


def test_equal_scores_have_no_steps(tmp_path) -> None:
    context = ScriptedContext(np.zeros((8, 8), np.float32))
    windows = halves(TEXT, N_CTX)
    with open_logit_writer(tmp_path / "flat.kld", windows, 8) as writer:
        list(perplexity(context, windows, writer))
    file = read_logit_file(tmp_path / "flat.kld")
    np.testing.assert_allclose(file.log_probabilities(5), np.full(8, -np.log(8)), rtol=1e-6)


def test_a_file_that_is_given_up_is_not_there(tmp_path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        open_logit_writer(tmp_path / "base.kld", halves(TEXT, N_CTX), 8),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


BREAKS = {
    "another file": (lambda b: b"GGUF" + b[4:], "begins with b'GGUFits_'"),
    "empty": (lambda _: b"", "begins with b''"),
    "head cut off": (lambda b: b[:15], "ends within its head"),
    "cut off": (lambda b: b[:-1], "the file has 259; it is cut off"),
    "negative windows": (lambda b: b[:16] + struct.pack("<i", -1) + b[20:], "-1 windows"),
    "huge": (lambda b: b[:8] + struct.pack("<3i", *[2**31 - 1] * 3) + b[20:], "it is cut off"),
    "token": (lambda b: b[:20] + struct.pack("<i", 9) + b[24:], "a token is not in the vocabulary"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_one_line(name, tmp_path, rng) -> None:
    path = tmp_path / "base.kld"
    written(path, 9, rng)
    breaking, message = BREAKS[name]
    path.write_bytes(breaking(path.read_bytes()))
    with pytest.raises(FormatError, match=message) as caught:
        read_logit_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_record_that_is_not_finite_is_named(tmp_path, rng) -> None:
    path = tmp_path / "base.kld"
    written(path, 9, rng)
    content = bytearray(path.read_bytes())
    content[92 + 28 : 92 + 32] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    file = read_logit_file(path)
    file.log_probabilities(0)
    with pytest.raises(FormatError, match="scored token 1: its scale"):
        file.log_probabilities(1)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path) -> None:
    with pytest.raises(EngineError, match="not a regular file"):
        read_logit_file(tmp_path / "none.kld")
    with pytest.raises(EngineError, match="not a regular file"):
        read_logit_file(tmp_path)
