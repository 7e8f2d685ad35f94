"""Published tokenizers against the packages that made them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from engine.convert import read_folder
from engine.convert.pretokenizer import recognise
from engine.errors import EngineError, FormatError
from engine.gguf import GGUFFile, read_gguf
from engine.tokenizer import Tokenizer
from engine.tokenizer.vocab import TokenType
from tests.hf_folder import LLAMA3, SENTENCES, byte_level_files, published

TEXT = [*SENTENCES, "the ship and the sea and the ropes of the ship", "a cold cold morning at sea"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def convert(folder: Path) -> GGUFFile:
    read_folder(folder, vocab_only=True).write(folder.parent / "v.gguf")
    return read_gguf(folder.parent / "v.gguf")


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    return Tokenizer.from_metadata(file.metadata, "v.gguf")


# ---------------------------------------------------------------- SentencePiece


def sentencepiece_model(tmp_path: Path) -> Any:
    """A small BPE model with byte fallback, as Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 2), model_writer=model, model_type="bpe", vocab_size=340,
        byte_fallback=True, character_coverage=0.98, remove_extra_whitespaces=False,
        normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_folder(tmp_path: Path, rng, **files: Any) -> tuple[Path, Any]:
    processor = sentencepiece_model(tmp_path)
    model = published(rng, n_vocab=processor.vocab_size() + 4)
    model.tensors.clear()
    model.files = files
    return model.write(tmp_path / "m"), processor


def test_a_sentencepiece_model_cuts_texts_alike(tmp_path, rng):
    folder, processor = spm_folder(tmp_path, rng)
    tokenizer = tokenizer_of(convert(folder))
    for text in TEXT:
        assert tokenizer.encode(text.encode(), add_special=False) == processor.encode(text)
    assert tokenizer.add_bos


def test_pieces_scores_and_kinds_are_the_models(tmp_path, rng):
    folder, processor = spm_folder(tmp_path, rng)
    metadata = convert(folder).metadata
    n = processor.vocab_size()
    texts = [t.decode() for t in metadata["tokenizer.ggml.tokens"]]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    assert texts[:n] == [processor.id_to_piece(i) for i in range(n)]
    scores = metadata["tokenizer.ggml.scores"].tolist()
    assert scores[:n] == [processor.get_score(i) for i in range(n)]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert types[3] == TokenType.BYTE and types[n - 1] == TokenType.NORMAL
    assert texts[n:] == [f"[PAD{i}]" for i in range(n, n + 4)]
    assert set(types[n:]) == {TokenType.UNUSED}
    assert metadata["tokenizer.ggml.model"] == "llama"


def test_added_tokens_come_from_each_of_the_files(tmp_path, rng):
    n = 340 - 4
    folder, processor = spm_folder(tmp_path, rng)
    n = processor.vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": n, "<|im_end|>": n + 1}))
    settings = {
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            str(n + 2): {"content": "\u2581\u2581x", "special": False},
            str(n + 3): {"content": "[END]", "special": True},
            str(n + 9): {"content": "[BEYOND]", "special": True},
        },
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "[END]"},
        "add_bos_token": False,
        "add_prefix_space": False,
        "chat_template": [
            {"name": "tools", "template": "T"},
            {"name": "default", "template": "D"},
        ],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    conversion = read_folder(folder, vocab_only=True)
    assert any(f"token {n + 9} is left out" in line for line in conversion.warnings)
    metadata = convert(folder).metadata
    assert metadata["tokenizer.ggml.tokens"][n:] == [b"<tool>", b"<|im_end|>", b"  x", b"[END]"]
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    user, control = TokenType.USER_DEFINED, TokenType.CONTROL
    assert kinds[n:] == [user, control, user, control] and kinds[0] == TokenType.UNKNOWN
    rest = {k: v for k, v in metadata.items() if k.startswith("tokenizer.")}
    assert rest["tokenizer.ggml.eos_token_id"] == n + 1
    assert rest["tokenizer.ggml.padding_token_id"] == n + 3
    assert rest["tokenizer.ggml.bos_token_id"] == 1  # from config.json
    assert rest["tokenizer.ggml.add_bos_token"] is False
    assert rest["tokenizer.ggml.add_space_prefix"] is False
    assert rest["tokenizer.chat_template"] == "D"
    assert rest["tokenizer.chat_template.tools"] == "T"
    assert rest["tokenizer.chat_templates"] == [b"tools"]


def test_a_file_that_is_no_sentencepiece_model_is_one_line(tmp_path, rng):
    pytest.importorskip("sentencepiece")
    folder = published(rng).write(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(FormatError, match="is no SentencePiece model"):
        convert(folder)


def test_without_the_package_the_extra_is_named(tmp_path, rng, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    folder = published(rng).write(tmp_path / "m")
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(EngineError, match=r"pip install 'cylora\[convert\]'"):
        convert(folder)


# ---------------------------------------------------------------- tokenizer.json, byte fallback


def test_merges_with_byte_fallback_cut_as_the_published_file_does(tmp_path, rng):
    tokenizers = pytest.importorskip("tokenizers")
    processor = sentencepiece_model(tmp_path)
    pieces = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    # As converters do: all pairs of pieces that join to a piece, in the order of the joined pieces.
    merges = sorted(
        (
            (pieces[text], pieces[text[:i]], text[:i], text[i:])
            for text in pieces
            for i in range(1, len(text))
            if text[:i] in pieces and text[i:] in pieces and not text.startswith("<")
        ),
    )
    content = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False,
            }
            for i, text in enumerate(("<unk>", "<s>", "</s>"))
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "vocab": pieces, "merges": [f"{a} {b}" for _, _, a, b in merges],
            "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "dropout": None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False,
        },
    }  # fmt: skip
    model = published(rng, n_vocab=len(pieces))
    model.tensors.clear()
    model.files = {"tokenizer.json": content}
    folder = model.write(tmp_path / "m")
    (folder / "tokenizer.model").unlink()
    file = convert(folder)
    tokenizer = tokenizer_of(file)
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert file.get_str("tokenizer.ggml.model") == "llama"
    assert file.get_bool("tokenizer.ggml.add_space_prefix")
    for text in TEXT:
        assert tokenizer.encode(text.encode(), add_special=False) == oracle.encode(text).ids, text


# ---------------------------------------------------------------- tokenizer.json, byte level


def test_a_byte_level_vocabulary_is_written_whole(tmp_path, rng):
    metadata = convert(published(rng).write(tmp_path / "m")).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert metadata["tokenizer.ggml.tokens"][:3] == [b"<unk>", b"<s>", b"</s>"]
    assert metadata["tokenizer.ggml.tokens"][-1] == b"[PAD299]"
    assert metadata["tokenizer.ggml.merges"][:3] == [b"t h", b"th e", "Ġ the".encode()]
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    assert kinds[:4] == [3, 3, 3, 1] and kinds[269] == 4 and kinds[270] == 5
    assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.chat_template"].startswith("{{ bos_token }}")


def test_the_template_file_stands_before_the_settings(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("from the file: ⟦x⟧")
    assert convert(folder).metadata["tokenizer.chat_template"] == "from the file: ⟦x⟧"


def test_merges_as_lines_and_spaces_inside_are_read(tmp_path, rng):
    model = published(rng)
    merges = model.files["tokenizer.json"]["model"]["merges"]
    model.files["tokenizer.json"]["model"]["merges"] = [" ".join(pair) for pair in merges]
    metadata = convert(model.write(tmp_path / "m")).metadata
    assert metadata["tokenizer.ggml.merges"] == [" ".join(pair).encode() for pair in merges]


BROKEN = {
    "wordpiece": (("model", "type"), "WordPiece", "type 'WordPiece' cannot be converted"),
    "subword prefix": (("model", "continuing_subword_prefix"), "##", "cannot be converted"),
    "no vocabulary": (("model", "vocab"), {}, "has no vocab"),
    "id too large": (("model", "vocab", "A"), 300, "'A' has the id 300, config.json has 300"),
    "id twice": (("model", "vocab", "A"), 5, "share an id"),
    "no merges": (("model", "merges"), [], "has no merges"),
    "merge of one": (("model", "merges", 1), ["x"], "merge 1: \"['x']\" is no pair"),
    "no pre-tokenizer": (("pre_tokenizer",), None, "this file has none"),
    "unknown step": (("pre_tokenizer",), {"type": "Metaspace"}, "step 'Metaspace' is not known"),
    "unknown pattern": (
        ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"\w+"}, r"splits by \w+;",
    ),
    "other behaviour": (
        ("pre_tokenizer", "pretokenizers", 0, "behavior"), "MergedWithNext", "another kind",
    ),
    "added without text": (("added_tokens", 0, "content"), None, "no text"),
    "a token twice": (("added_tokens", 3, "content"), "the", "have the same text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_vocabulary_that_cannot_be_converted_is_one_line(tmp_path, rng, case):
    place, value, problem = BROKEN[case]
    model = published(rng)
    target: Any = model.files["tokenizer.json"]
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    folder = model.write(tmp_path / "m")
    with pytest.raises(EngineError) as error:
        convert(folder)
    assert problem in str(error.value) and str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- pre-tokenizers by their patterns


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CAPITALIZED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
QWEN2 = LLAMA3.replace("{1,3}", "")
PUBLISHED = {
    "llama-bpe": (sequence(split(LLAMA3), byte_level(False)), True),
    "smaug-bpe": (sequence(split(LLAMA3, "Removed", True), byte_level(False)), False),
    "gpt-2": (byte_level(True), False),
    "smollm": (sequence(DIGITS, byte_level(True)), False),
    "qwen2": (sequence(split(QWEN2), byte_level(False)), False),
    "deepseek-coder": (
        sequence(
            split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
            DIGITS, byte_level(False),
        ),
        False,
    ),
    "tekken": (
        sequence(split(rf"{CAPITALIZED}|{CAPITALS}|\p{{N}}{TAIL}"), byte_level(False)), True,
    ),
    "gpt-4o": (
        sequence(
            split(
                rf"{CAPITALIZED}{CONTRACTIONS}?|{CAPITALS}{CONTRACTIONS}?|\p{{N}}{{1,3}}{TAIL}"
            ),
            byte_level(False),
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pre_tokenizers_are_recognised(name):
    step, ignores_merges = PUBLISHED[name]
    content = {"pre_tokenizer": step, "model": {"ignore_merges": ignores_merges}}
    assert recognise(content, "tokenizer.json") == (name, "")


def test_a_pre_tokenizer_that_differs_in_whole_words_alone_is_taken_with_a_warning():
    content = {"pre_tokenizer": byte_level(True), "model": {"ignore_merges": True}}
    name, warning = recognise(content, "tokenizer.json")
    assert name == "gpt-2" and "ignore_merges is true" in warning


@pytest.mark.parametrize("name", ["llama-bpe", "smollm", "qwen2", "gpt-2", "gpt-4o", "tekken"])
def test_recognised_patterns_cut_as_the_tokenizers_package_does(tmp_path, rng, name):
    tokenizers = pytest.importorskip("tokenizers")
    step, ignores_merges = PUBLISHED[name]
    model = published(rng)
    model.files = byte_level_files(300, step)
    model.files["tokenizer.json"]["model"]["ignore_merges"] = ignores_merges
    folder = model.write(tmp_path / "m")
    ours = tokenizer_of(convert(folder))
    model.files["tokenizer.json"] |= {"version": "1.0", "added_tokens": [], "post_processor": None}
    oracle = tokenizers.Tokenizer.from_str(json.dumps(model.files["tokenizer.json"]))
    for text in TEXT:
        assert ours.encode(text.encode(), add_special=False) == oracle.encode(text).ids, text
