"""Tokens that are found as whole texts, and tokens that end generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def spm(*specials: tuple[str, int], name: str = "", **keys: Any) -> Tokenizer:
    """SPM whose ids 0–255 are bytes, 256 the space mark, and the given tokens from 257."""
    pieces = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [("\u2581", NORMAL), *specials]
    metadata = {
        "general.name": name,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.encode() for text, _ in pieces],
        "tokenizer.ggml.scores": np.zeros(len(pieces), np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, kind in pieces], np.int32),
    }
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    return Tokenizer.from_metadata(metadata, "tiny.gguf")


def shown(tokenizer: Tokenizer, text: str | bytes, parse_special: bool = True) -> list[int | str]:
    """Ids, with runs of bytes and marks as text: `▁` is the mark, so that prefixes are visible."""
    found: list[int | str] = []
    for token in tokenizer.encode(text, parse_special=parse_special):
        if token > 256:
            found.append(token)
            continue
        character = "▁" if token == 256 else chr(token)
        if found and isinstance(found[-1], str):
            found[-1] += character
        else:
            found.append(character)
    return found


def test_control_tokens_are_text_unless_parsed() -> None:
    tokenizer = spm(("<s>", CONTROL))
    assert shown(tokenizer, "a<s>b") == ["▁a", 257, "▁b"]
    assert shown(tokenizer, "a<s>b", parse_special=False) == ["▁a<s>b"]


def test_user_defined_tokens_are_always_found() -> None:
    tokenizer = spm(("<x>", USER))
    for parse_special in (False, True):
        assert shown(tokenizer, "a<x><x>", parse_special) == ["▁a", 257, 257]


def test_texts_of_bytes_are_found_when_parsed_and_unused_tokens_never() -> None:
    tokenizer = spm(("<pad>", UNUSED), ("<unk>", UNKNOWN))
    assert tokenizer.encode("<0x0A>", parse_special=True) == [0x0A]
    assert shown(tokenizer, "<0x0A>", parse_special=False) == ["▁<0x0A>"]
    assert shown(tokenizer, "<pad>") == ["▁<pad>"]
    assert shown(tokenizer, "<unk>") == [258]


def test_the_longest_text_wins_even_where_a_shorter_begins_further_left() -> None:
    tokenizer = spm(("xab", CONTROL), ("abcd", CONTROL), ("ab", CONTROL))
    assert shown(tokenizer, "xabcd") == ["▁x", 258]
    assert shown(tokenizer, "xabxabab") == [257, 257, 259]


def test_of_equally_long_texts_the_lowest_id_wins() -> None:
    tokenizer = spm(("ab", CONTROL), ("bc", CONTROL))
    assert shown(tokenizer, "abcbc") == [257, "▁c", 258]


def test_each_text_after_a_token_gets_a_space_and_empty_text_none() -> None:
    tokenizer = spm(("<s>", CONTROL))
    assert shown(tokenizer, "<s><s> a<s>") == [257, 257, "▁▁a", 257]
    plain = spm(("<s>", CONTROL), add_space_prefix=False)
    assert shown(plain, "<s><s> a<s>b") == [257, 257, "▁a", 257, "b"]


def test_an_empty_token_text_is_never_found() -> None:
    assert shown(spm(("", CONTROL), ("", USER)), "ab") == ["▁ab"]


def test_tokens_are_cut_out_of_invalid_utf8() -> None:
    tokenizer = spm(("<s>", CONTROL))
    assert shown(tokenizer, b"\xff<s>\xe2") == ["▁\xff", 257, "▁\xe2"]


@pytest.mark.parametrize("name", ["Phi-3-mini", "my PHI3", "phi"])
def test_phi3_drops_white_space_behind_most_special_tokens(name: str) -> None:
    tokenizer = spm(("<|end|>", CONTROL), ("<s>", CONTROL), ("</s>", USER), name=name)
    stripped = "3" in name
    behind = "▁b" if stripped else "▁▁\t\n▁b"
    assert shown(tokenizer, "a<|end|> \t\n b") == ["▁a", 257, behind]
    assert shown(tokenizer, "<s> b") == [258, "▁▁b"]
    assert shown(tokenizer, "</s> \n") == [259] if stripped else [259, "▁▁\n"]


def test_ends_of_generation_are_keys_texts_and_marked_texts() -> None:
    tokenizer = spm(
        ("</s>", CONTROL),  # 257, EOS by key
        ("<end_of_turn>", NORMAL),
        ("<|im_end|>", CONTROL),
        ("[EOS]", NORMAL),  # 260: a word like any other
        ("<eos>", USER),
        ("<pad>", CONTROL),  # 262, by key
        ("<\uff5cend\u2581of\u2581sentence\uff5c>", CONTROL),
        ("<|eom_id|>", NORMAL),
        eos_token_id=257,
        fim_pad_token_id=262,
    )
    assert tokenizer.eog_ids == {257, 258, 259, 261, 262, 263, 264}
    assert tokenizer.eom_id == 264
    assert tokenizer.is_eog(259)
    assert not tokenizer.is_eog(260)


def test_eot_is_the_key_else_the_first_of_the_known_texts() -> None:
    texts = [("<|im_end|>", CONTROL), ("<|endoftext|>", CONTROL), ("x", CONTROL)]
    assert spm(*texts).eot_id == 257
    assert spm(*texts, eot_token_id=259).eot_id == 259
    assert spm(texts[2]).eot_id == -1
