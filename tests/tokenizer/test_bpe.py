"""BPE on vocabularies small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import DataError
from engine.tokenizer import Tokenizer
from engine.tokenizer.bpe import BYTE_TO_TEXT, CHARACTER_TO_BYTE, text_to_bytes

# id of a byte's token = the byte
TEXTS = BYTE_TO_TEXT + [text.encode() for text in ("Ġa", "Ġab", "ab", "bc", "abc", "ĠĠ", "aab")]
MERGES = ["a b", "b c", "ab c", "Ġ a", "Ġ ab", "Ġ Ġ", "b c"]
IDS = {text.decode(): token for token, text in enumerate(TEXTS)}
SPACE = 0x20


def bpe(
    texts: list[bytes] = TEXTS, merges: list[str] = MERGES, pre: str | None = "gpt-2", **keys: Any
) -> Tokenizer:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.merges": [merge.encode() for merge in merges],
    }
    metadata.update({f"tokenizer.ggml.{name}": value for name, value in keys.items()})
    return Tokenizer.from_metadata({k: v for k, v in metadata.items() if v is not None}, "t.gguf")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        (" ", [SPACE]),
        ("a", [ord("a")]),
        ("abc", [IDS["abc"]]),
        ("bcab", [IDS["bc"], IDS["ab"]]),
        ("abab", [IDS["ab"], IDS["ab"]]),
        (" ab", [IDS["Ġab"]]),  # a b (0) goes before Ġ a (3)
        (" a", [IDS["Ġa"]]),
        ("  a", [SPACE, IDS["Ġa"]]),  # the pattern keeps the last blank with the word
        ("   ", [IDS["ĠĠ"], SPACE]),  # equal ranks: leftmost first
        ("\n", [0x0A]),
        ("é", [0xC3, 0xA9]),
        ("aab", [ord("a"), IDS["ab"]]),  # a token, but no merge makes it
        (b"\xffa\xe2\x82", [0xEF, 0xBF, 0xBD, ord("a"), *[0xEF, 0xBF, 0xBD] * 2]),
    ],
)
def test_ids_are_as_worked_out(text: str | bytes, ids: list[int]) -> None:
    assert bpe().encode(text) == ids


def test_a_part_that_is_a_token_stays_whole_where_merges_are_ignored() -> None:
    assert bpe(pre="llama-bpe").encode("aab") == [IDS["aab"]]
    assert bpe(pre="smaug-bpe").encode("aab") == [ord("a"), IDS["ab"]]


def test_the_first_of_equal_merges_counts() -> None:
    assert bpe(merges=["b c", "a b", "b c"]).encode("abc") == [ord("a"), IDS["bc"]]


def test_a_merge_without_a_token_falls_back_to_bytes() -> None:
    assert bpe(merges=["a a"]).encode("aa") == [ord("a"), ord("a")]


def test_a_symbol_without_a_token_is_the_unknown_token_or_an_error() -> None:
    incomplete = [b"a", b"\xc4\xa0", b"<unk>"]
    assert bpe(incomplete, [], unknown_token_id=2).encode("a b\n") == [0, 1, 2, 2]
    with pytest.raises(DataError, match=r"^t\.gguf: tokenizer\.ggml\.tokens: no token for b'b' "):
        bpe(incomplete, []).encode("ab")


def test_every_byte_has_its_own_printable_character() -> None:
    assert len(CHARACTER_TO_BYTE) == 256
    assert BYTE_TO_TEXT[0x20].decode() == "Ġ"
    assert BYTE_TO_TEXT[0x0A].decode() == "Ċ"
    assert BYTE_TO_TEXT[0x7F].decode() == "\u0121"
    assert BYTE_TO_TEXT[0xAD].decode() == "\u0143"
    assert all(character.isprintable() for character in CHARACTER_TO_BYTE)
    assert text_to_bytes("ĠaĊÃ©".encode()) == b" a\n\xc3\xa9"


@pytest.mark.parametrize("text", [b"a b", "日本".encode(), b"\xff\xfe"])
def test_a_text_outside_of_the_table_stays_as_it_is(text: bytes) -> None:
    assert text_to_bytes(text) == text
    assert bpe([*TEXTS, text]).piece(len(TEXTS)) == text


def test_pieces_of_special_tokens_follow_their_kind() -> None:
    texts = [b"<unk>", b"<|x|>", "Ġuser".encode(), b"<0x41>", b"unused"]
    kinds = np.array([1] * len(TEXTS) + [2, 3, 4, 6, 5], np.int32)
    tokenizer = bpe(TEXTS + texts, token_type=kinds)
    first = len(TEXTS)
    pieces = [tokenizer.piece(first + i) for i in range(5)]
    assert pieces == [b"", b"", "Ġuser".encode(), b"A", b""]
    assert tokenizer.piece(first + 1, special=True) == b"<|x|>"


def test_nothing_is_dropped_or_put_in_front() -> None:
    tokenizer = bpe(add_space_prefix=True)
    assert tokenizer.encode("a") == [ord("a")]
    assert tokenizer.decode([IDS["Ġa"], IDS["Ġa"]]) == b" a a"


@pytest.mark.parametrize(
    ("declared", "adds", "declares"),
    [(None, True, False), (True, True, True), (False, False, False)],
)
def test_bos_is_added_unless_the_file_says_no(
    declared: bool | None, adds: bool, declares: bool
) -> None:
    tokenizer = bpe(add_bos_token=declared)
    assert tokenizer.encode("b", add_special=True) == [11] * adds + [ord("b")]
    assert (tokenizer.add_bos, tokenizer.declares_bos) == (adds, declares)


def test_a_default_id_that_is_outside_of_the_vocabulary_is_none() -> None:
    tokenizer = bpe([b"a", "Ċ".encode()])
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.newline_id) == (-1, -1, 1)
    assert tokenizer.encode("a", add_special=True) == [0]
    assert tokenizer.eog_ids == frozenset()
    assert bpe([b"a"]).newline_id == -1


def test_decoding_gives_any_valid_text_back(smollm2: Tokenizer, awkward_texts: list[str]) -> None:
    for text in awkward_texts:
        assert smollm2.decode(smollm2.encode(text)) == text.encode()


def test_ids_of_smollm2(smollm2: Tokenizer) -> None:
    assert (smollm2.n_vocab, smollm2.bos_id, smollm2.eos_id, smollm2.eot_id) == (49152, 1, 2, 0)
    assert smollm2.newline_id == 198
    assert smollm2.eog_ids == {0, 2}
    assert not smollm2.add_bos
    assert smollm2.warnings == []


def test_smollm2_splits_digits_and_keeps_the_blanks_before_them_together(
    smollm2: Tokenizer,
) -> None:
    assert [smollm2.piece(t) for t in smollm2.encode("12345")] == [b"1", b"2", b"3", b"4", b"5"]
    assert [smollm2.piece(t) for t in smollm2.encode("a  1")] == [b"a", b"  ", b"1"]
