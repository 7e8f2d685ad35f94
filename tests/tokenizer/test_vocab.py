"""Metadata that is wrong, short, or made to hurt: one line naming file and key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import DataError, FormatError
from engine.tokenizer import Tokenizer
from engine.tokenizer.pretokenize import PRE_TOKENIZERS

P = "tokenizer.ggml."
SPM = {
    f"{P}model": "llama",
    f"{P}tokens": [b"<unk>", b"<s>", b"</s>", b"<0x0A>", b"a"],
    f"{P}scores": np.zeros(5, np.float32),
    f"{P}token_type": np.array([2, 3, 3, 6, 1], np.int32),
}
BPE = {
    f"{P}model": "gpt2",
    f"{P}pre": "gpt-2",
    f"{P}tokens": [b"a", b"b", b"ab"],
    f"{P}merges": [b"a b"],
}
ABSENT = object()


def load(base: dict[str, Any], **keys: Any) -> Tokenizer:
    metadata = {**base, **{P + name: value for name, value in keys.items()}}
    kept = {key: value for key, value in metadata.items() if value is not ABSENT}
    return Tokenizer.from_metadata(kept, "bad.gguf")


@pytest.mark.parametrize(
    ("base", "key", "value", "reason"),
    [
        (SPM, "model", ABSENT, "missing"),
        (SPM, "model", "bert", "'bert' (WordPiece) is not supported"),
        (SPM, "model", "new\nkind", r"'new\nkind' is not supported"),
        (SPM, "model", 3, "a string is needed, not int 3"),
        (SPM, "tokens", ABSENT, "missing"),
        (SPM, "tokens", [], "the vocabulary is empty"),
        (SPM, "tokens", np.zeros(5, np.int32), "an array of strings is needed"),
        (SPM, "tokens", "text", "an array of strings is needed"),
        (SPM, "tokens", [b"a", b"b", b"c", b"b"], "tokens 1 and 3 have the same text b'b'"),
        (SPM, "scores", np.zeros(4, np.float32), "4 entries for 5 tokens"),
        (SPM, "scores", [b"1"] * 5, "an array of numbers is needed, not an array of strings"),
        (SPM, "scores", np.array([0, 0, np.nan, 0, 0]), "the score of token 2 is NaN"),
        (SPM, "scores", 1.0, "an array of numbers is needed, not float 1.0"),
        (SPM, "token_type", np.ones(4, np.int32), "4 entries for 5 tokens"),
        (SPM, "token_type", np.ones(5, np.float32), "an array of integers is needed"),
        (SPM, "token_type", np.ones((5, 1), np.int32), "an array of integers is needed"),
        (SPM, "bos_token_id", "1", "an integer is needed, not str '1'"),
        (SPM, "eos_token_id", True, "an integer is needed, not bool True"),
        (SPM, "add_bos_token", 1, "a bool is needed, not int 1"),
        (SPM, "add_space_prefix", "no", "a bool is needed"),
        (BPE, "pre", "gpt-9", "pre-tokenizer 'gpt-9' is unknown"),
        (BPE, "pre", 1, "a string is needed"),
        (BPE, "merges", ABSENT, "missing"),
        (BPE, "merges", [b"a b", b"ab"], "merge 1 is b'ab', without a space inside"),
        (BPE, "merges", [b" ab"], "merge 0 is b' ab', without a space inside"),
        (BPE, "merges", [b""], "merge 0 is b'', without a space inside"),
        (BPE, "merges", np.zeros(1, np.int32), "an array of strings is needed"),
    ],
)
def test_a_broken_key_is_one_line_that_names_file_and_key(
    base: dict[str, Any], key: str, value: Any, reason: str
) -> None:
    with pytest.raises(FormatError) as caught:
        load(base, **{key: value})
    message = str(caught.value)
    assert message.startswith(f"bad.gguf: {P}{key}: ")
    assert reason in message
    assert message.isprintable()


@pytest.mark.parametrize(
    "text", [b"<0x-1>", b"<0x0>", b"<0x0A", b"<0xGG>", b"<0x 1>", b"x", b"", b"<0x0A>\n"]
)
def test_a_byte_token_that_is_misspelled_is_refused(text: bytes) -> None:
    texts = [b"<unk>", b"<s>", b"</s>", text, b"a"]
    with pytest.raises(FormatError, match=r"^bad\.gguf: .*tokens: token 3 is a byte but is spell"):
        load(SPM, tokens=texts)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(FormatError) as caught:
        load(SPM, model="x" * 100_000)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(("value", "shown"), [(5, "5"), (-1, "-1"), (2**32 - 1, "4294967295")])
def test_an_id_outside_of_the_vocabulary_is_ignored_with_a_warning(value: int, shown: str) -> None:
    tokenizer = load(SPM, bos_token_id=value, eot_token_id=value)
    assert (tokenizer.bos_id, tokenizer.eot_id) == (1, -1)
    assert tokenizer.warnings == [
        f"bad.gguf: {P}bos_token_id: {shown} is outside of the 5 tokens, ignored: 1",
        f"bad.gguf: {P}eot_token_id: {shown} is outside of the 5 tokens, ignored: none",
    ]


@pytest.mark.parametrize("value", [ABSENT, ""])
def test_a_missing_pre_tokenizer_is_the_default_with_a_warning(value: Any) -> None:
    tokenizer = load(BPE, pre=value)
    assert tokenizer.encode("ab") == [2]
    assert tokenizer.warnings == [
        f"bad.gguf: {P}pre: missing, 'default' is used and results get worse; "
        "convert the model again"
    ]
    assert load(BPE, pre="default").warnings == []


def test_spm_needs_no_pre_tokenizer_and_ignores_its_name() -> None:
    assert load(SPM, pre="nonsense").warnings == []


def test_missing_scores_are_zero_with_a_warning() -> None:
    assert "scores: missing" in load(SPM, scores=ABSENT).warnings[0]


def test_longer_arrays_and_other_number_types_are_fine() -> None:
    tokenizer = load(
        SPM, scores=np.zeros(9, np.int32), token_type=np.array([2, 3, 3, 6, 1, 6], np.uint64)
    )
    assert tokenizer.piece(3) == b"\n"


def test_kinds_without_a_meaning_are_shown_as_nothing() -> None:
    types = np.array([2, 3, -7, 7, 2**40], np.int64)
    tokenizer = load(SPM, token_type=types)
    assert [tokenizer.piece(token) for token in (2, 3, 4)] == [b"", b"", b""]


def test_several_empty_texts_are_fine() -> None:
    tokenizer = load(SPM, tokens=[b"", b"", b"</s>", b"<0x0A>", b"a"])
    assert tokenizer.piece(1, special=True) == b""


def test_a_vocabulary_that_lacks_everything_still_loads() -> None:
    tokenizer = load(
        SPM, tokens=[b""], scores=np.zeros(1, np.float32), token_type=np.array([9], np.int32)
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.newline_id) == (-1, -1, -1)
    assert tokenizer.encode("ab") == [0] * 5  # the mark is three bytes
    assert tokenizer.max_token_bytes == 0


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_known_pre_tokenizer_loads(pre: str) -> None:
    assert load(BPE, pre=pre).encode("ab") == [2]


WEIRD = [
    None,
    "",
    "\n\x00",
    b"bytes",
    -1,
    2**70,
    0.5,
    float("nan"),
    True,
    [],
    [b""],
    [b"", b" ", b"\xff\xfe", b"<0x0A>", b"a b c", "é".encode()],
    [1, 2],
    ["text"],
    {},
    np.zeros(0, np.int32),
    np.full(6, -1, np.int64),
    np.full(6, 6, np.int32),
    np.full(6, np.inf, np.float32),
    np.array(["a"] * 6),
    np.array([True] * 6),
    np.zeros((2, 3), np.float32),
]
KEYS = ["model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eot_token_id"]
KEYS += ["unknown_token_id", "fim_pad_token_id", "add_bos_token", "add_eos_token"]
KEYS += ["add_space_prefix"]


@pytest.mark.parametrize("base", [SPM, BPE], ids=["spm", "bpe"])
def test_any_value_of_any_keys_is_used_or_refused_with_one_line(
    base: dict[str, Any], rng: np.random.Generator
) -> None:
    base = {f"{P}unknown_token_id": 0, **base}
    text = "a <0x0A></s>\n" * 3 + "é"
    n_refused = 0
    for _ in range(2000):
        picked = rng.choice(KEYS, int(rng.integers(1, 4)), replace=False).tolist()
        keys = {key: WEIRD[int(rng.integers(0, len(WEIRD)))] for key in picked}
        try:
            tokenizer = load(base, **keys)
            ids = tokenizer.encode(text, add_special=True, parse_special=True)
            assert all(0 <= token < tokenizer.n_vocab for token in ids)
            tokenizer.decode(range(tokenizer.n_vocab))
            assert all(tokenizer.is_eog(token) in (False, True) for token in ids)
            assert -1 <= tokenizer.newline_id < tokenizer.n_vocab
        except (FormatError, DataError) as error:
            n_refused += 1
            assert str(error).startswith("bad.gguf: ")
            assert "\n" not in str(error)
    assert 200 < n_refused < 1980
