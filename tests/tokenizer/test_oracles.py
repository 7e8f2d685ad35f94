"""Ids against the packages that models are made with, and against ids recorded from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.tokenizer import Tokenizer

# Bytes without a token: `tokenizers` drops them without a word.
SMOLLM2_LACKS = "\x04\x06\x13\x14\x16\x1d"

Encode = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def sentencepiece_encode(mini_metadata: dict[str, Any]) -> Encode:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    model = model_pb2.ModelProto()
    # The package's numbers for kinds of pieces are those of the files.
    for text, score, kind in zip(
        mini_metadata["tokenizer.ggml.tokens"],
        mini_metadata["tokenizer.ggml.scores"],
        mini_metadata["tokenizer.ggml.token_type"],
        strict=True,
    ):
        model.pieces.add(piece=text.decode(), score=float(score), type=int(kind))
    model.trainer_spec.model_type = model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return processor.encode


@pytest.fixture(scope="module")
def tokenizers_bpe(smollm2_metadata: dict[str, Any]) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    texts = [text.decode() for text in smollm2_metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(m.decode().split(" ")) for m in smollm2_metadata["tokenizer.ggml.merges"]]
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges)
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return bpe


def assert_same_ids(ours: Encode, theirs: Encode, texts: list[str]) -> None:
    for text in texts:
        assert ours(text) == theirs(text), f"ids differ for {text!r}"


def test_spm_agrees_with_sentencepiece_on_awkward_texts(
    mini: Tokenizer, sentencepiece_encode: Encode, awkward_texts: list[str]
) -> None:
    assert_same_ids(mini.encode, sentencepiece_encode, awkward_texts)


def test_spm_agrees_with_sentencepiece_on_every_character(
    mini: Tokenizer, sentencepiece_encode: Encode, every_character: str
) -> None:
    assert_same_ids(mini.encode, sentencepiece_encode, every_character.splitlines(keepends=True))
    assert mini.encode(every_character) == sentencepiece_encode(every_character)


def test_spm_agrees_with_sentencepiece_on_prose(
    mini: Tokenizer, sentencepiece_encode: Encode, data_dir: Path
) -> None:
    text = (data_dir / "play.txt").read_text()
    assert mini.encode(text) == sentencepiece_encode(text)


def test_bpe_agrees_with_tokenizers_on_awkward_texts(
    smollm2: Tokenizer, tokenizers_bpe: Any, awkward_texts: list[str]
) -> None:
    assert_same_ids(smollm2.encode, lambda text: tokenizers_bpe.encode(text).ids, awkward_texts)


def test_bpe_agrees_with_tokenizers_on_every_character(
    smollm2: Tokenizer, tokenizers_bpe: Any, every_character: str
) -> None:
    known = every_character.translate(dict.fromkeys(map(ord, SMOLLM2_LACKS)))
    assert smollm2.encode(known) == tokenizers_bpe.encode(known).ids


def test_bpe_takes_the_unknown_token_for_bytes_that_the_vocabulary_lacks(
    smollm2: Tokenizer,
) -> None:
    for character in SMOLLM2_LACKS:
        assert smollm2.encode(f"a{character}b") == [81, smollm2.unknown_id, 82]


def test_bpe_agrees_with_tokenizers_on_prose(
    smollm2: Tokenizer, tokenizers_bpe: Any, data_dir: Path
) -> None:
    text = (data_dir / "play.txt").read_text()
    assert smollm2.encode(text) == tokenizers_bpe.encode(text).ids


def test_bpe_agrees_with_tokenizers_on_parsed_special_tokens(
    smollm2: Tokenizer, smollm2_metadata: dict[str, Any], tokenizers_bpe: Any
) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Oracle

    oracle = Oracle.from_str(tokenizers_bpe.to_str())
    texts = smollm2_metadata["tokenizer.ggml.tokens"]
    control = [
        texts[i].decode()
        for i, kind in enumerate(smollm2_metadata["tokenizer.ggml.token_type"])
        if kind == 3
    ]
    oracle.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    mixed = [f"a {text}  b{text}{text}\n1" for text in control]
    mixed += ["".join(control), "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n", "<|im_"]
    for text in mixed:
        ours = smollm2.encode(text, parse_special=True)
        assert ours == oracle.encode(text).ids, f"ids differ for {text!r}"


@pytest.mark.parametrize("name", ["mini", "smollm2"])
def test_ids_are_those_recorded_from_the_oracles(
    name: str, data_dir: Path, request: pytest.FixtureRequest
) -> None:
    # mini.json holds what sentencepiece says of AWKWARD, smollm2.json what tokenizers says.
    cases = json.loads((data_dir / "tokenizer" / f"{name}.json").read_text())
    tokenizer = request.getfixturevalue(name)
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], f"ids differ for {case['text']!r}"
    assert len(cases) > 20


@pytest.mark.parametrize(
    ("name", "record"), [("mini", "finetune-a"), ("smollm2", "finetune-smollm2")]
)
def test_training_text_has_the_recorded_number_of_tokens(
    name: str, record: str, data_dir: Path, request: pytest.FixtureRequest
) -> None:
    recorded = json.loads((data_dir / f"{record}.json").read_text())
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode((data_dir / "play.txt").read_bytes())
    assert len(ids) == recorded["tokens"]
    assert len(set(ids)) == recorded.get("unique", len(set(ids)))
