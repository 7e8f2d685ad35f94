"""SPM on vocabularies small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import DataError
from engine.tokenizer import Tokenizer

UNKNOWN, CONTROL, NORMAL, USER, UNUSED, BYTE = 2, 3, 1, 4, 5, 6
BYTES = [(b"<0x%02X>" % byte, 0.0, BYTE) for byte in range(256)]
PIECES = [
    ("\u2581", -9.0, NORMAL),  # 259
    ("a", -8.0, NORMAL),
    ("b", -8.0, NORMAL),
    ("c", -8.0, NORMAL),
    ("ab", -2.0, NORMAL),  # 263
    ("bc", -1.0, NORMAL),
    ("\u2581a", -3.0, NORMAL),
    ("abc", -4.0, NORMAL),
    ("aa", -5.0, NORMAL),  # 267
    ("\u2581\u2581", -6.0, NORMAL),
    ("é", -7.0, NORMAL),
    ("abbbba", -0.5, NORMAL),  # 270: nothing on the way to it is a token
]
HEAD = [(b"<unk>", 0.0, UNKNOWN), (b"<s>", 0.0, CONTROL), (b"</s>", 0.0, CONTROL)]
STANDARD = HEAD + BYTES + PIECES


def spm(pieces: list[tuple[Any, float, int]] = STANDARD, **keys: Any) -> Tokenizer:
    texts = [text if isinstance(text, bytes) else text.encode() for text, _, _ in pieces]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": np.array([score for _, score, _ in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in pieces], np.int32),
    }
    metadata.update({f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    return Tokenizer.from_metadata(metadata, "tiny.gguf")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        (" ", [268]),  # the prefix and the space
        ("a", [265]),
        ("b", [259, 261]),
        ("abc", [265, 264]),  # bc before ▁a, and ▁a before abc
        ("aa", [265, 260]),
        ("baaa", [259, 261, 267, 260]),  # equal scores: leftmost first
        ("bab", [259, 261, 263]),
        ("abbbba", [259, 263, 261, 261, 261, 260]),
        ("b  b", [259, 261, 268, 261]),
        ("é", [259, 269]),
        ("ñ", [259, 3 + 0xC3, 3 + 0xB1]),
        ("\n", [259, 3 + 0x0A]),
        (b"\xff", [259, 3 + 0xFF]),
        (b"\xc3", [259, 3 + 0xC3]),
        (b"\xe2a", [259, 3 + 0xE2, 3 + 0x61]),  # the lead byte takes what follows with it
        (b"\x00", [259, 3]),
        ("<s>", [259, 3 + 0x3C, 3 + 0x73, 3 + 0x3E]),
        ("\u2581a", [259, 265]),  # a literal mark is a space
    ],
)
def test_ids_are_as_worked_out(text: str | bytes, ids: list[int]) -> None:
    assert spm().encode(text) == ids


def test_words_one_by_one_and_text_at_once_give_the_same_ids(rng: np.random.Generator) -> None:
    # A token with a mark inside of it turns encoding by words off; out of reach, it changes no id.
    by_words = spm()
    at_once = spm([*STANDARD, ("c\u2581c\u2581c", -1.0, NORMAL)])
    for _ in range(300):
        text = "".join(rng.choice(list("aaabbc  é\u2581ñ"), int(rng.integers(1, 40))))
        assert by_words.encode(text) == at_once.encode(text), repr(text)


def test_a_token_that_spans_words_is_found() -> None:
    tokenizer = spm([*STANDARD, ("c\u2581", -0.1, NORMAL)])
    assert tokenizer.encode("c c") == [259, 271, 262]


@pytest.mark.parametrize(("declared", "ids"), [(None, [1, 265]), (True, [1, 265]), (False, [265])])
def test_bos_is_added_unless_the_file_says_no(declared: bool | None, ids: list[int]) -> None:
    tokenizer = spm(add_bos_token=declared)
    assert tokenizer.encode("a", add_special=True) == ids
    assert tokenizer.encode("a") == [265]
    assert tokenizer.add_bos is tokenizer.declares_bos is (declared is not False)


def test_eos_is_added_only_if_the_file_says_so() -> None:
    assert spm(add_eos_token=True).encode("a", add_special=True) == [1, 265, 2]
    assert spm(add_eos_token=True).encode("a") == [265]
    assert not spm().add_eos


def test_no_space_is_put_in_front_when_the_file_says_so() -> None:
    tokenizer = spm(add_space_prefix=False)
    assert tokenizer.encode("a") == [260]
    assert tokenizer.decode([265, 260]) == b" aa"


def test_bytes_without_byte_tokens_fall_back_to_their_own_text_then_to_unknown() -> None:
    tokenizer = spm([*HEAD, (b"\xc3", 0.0, NORMAL), ("\u2581", 0.0, NORMAL), ("\n", 0.0, NORMAL)])
    assert tokenizer.encode("é") == [4, 3, 0]
    assert tokenizer.newline_id == 5


def test_pieces_are_bytes() -> None:
    tokenizer = spm([*STANDARD, ("▁▁x", 0.0, USER), ("unused", 0.0, UNUSED), ("odd", 0.0, 99)])
    assert tokenizer.piece(265) == b" a"
    assert tokenizer.piece(3 + 0xE2) == b"\xe2"
    assert tokenizer.piece(0) == "\u2585".encode()
    assert tokenizer.piece(1) == b""
    assert tokenizer.piece(1, special=True) == b"<s>"
    assert tokenizer.piece(1) == b""
    assert tokenizer.piece(271) == "▁▁x".encode()
    assert tokenizer.piece(272) == tokenizer.piece(273) == b""


@pytest.mark.parametrize("token", [-1, 271, 1 << 40])
def test_a_piece_outside_of_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(DataError, match=rf"tiny\.gguf: token {token} is outside"):
        spm().piece(token)


def test_decoding_drops_the_space_that_encoding_added_and_no_other() -> None:
    tokenizer = spm()
    assert tokenizer.decode([265, 265]) == b"a a"
    assert tokenizer.decode([1, 265]) == b"a"
    assert tokenizer.decode([1, 265], special=True) == b"<s>a"
    assert tokenizer.decode([1, 1, 265]) == b" a"
    assert tokenizer.decode([268]) == b" "
    assert tokenizer.decode([1]) == tokenizer.decode([]) == b""


def test_decoding_gives_any_valid_text_back(mini: Tokenizer, awkward_texts: list[str]) -> None:
    for text in awkward_texts:
        # A literal U+2581 comes back as a space.
        expected = text.replace("\u2581", " ").encode()
        assert mini.decode(mini.encode(text)) == expected


def test_ids_of_the_recorded_model(mini: Tokenizer) -> None:
    assert (mini.n_vocab, mini.bos_id, mini.eos_id, mini.eot_id) == (768, 1, 2, -1)
    assert (mini.newline_id, mini.unknown_id) == (3 + 0x0A, 0)
    assert mini.eog_ids == {2}
    assert mini.is_eog(2)
    assert not mini.is_eog(-1)
    assert mini.warnings == []


def test_text_lengths_count_as_stored() -> None:
    assert spm().max_token_bytes == 6
    assert spm([*STANDARD, ("\u2581\u2581\u2581", 0.0, NORMAL)]).max_token_bytes == 9


def test_stray_bytes_of_a_command_line_survive(mini: Tokenizer) -> None:
    raw = b"a\xffb\xe2\x82"
    assert mini.encode(raw.decode("utf-8", "surrogateescape")) == mini.encode(raw)
    assert mini.decode(mini.encode(raw)) == raw
    assert mini.decode(mini.encode("\ud800")) == b"\xed\xa0\x80"
