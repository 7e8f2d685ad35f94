"""The patterns, by the parts they leave."""

from __future__ import annotations

import pytest

from engine.errors import FormatError
from engine.tokenizer.pretokenize import PRE_TOKENIZERS, pre_tokenizer

# Parts are separated by | in the second column.
CASES = [
    ("gpt-2", "I'm he'S  12345\n\n x", "I|'m| he|'|S| | 12345|\n\n| x"),
    ("gpt-2", "a  ", "a|  "),
    ("gpt-2", "a \n b", "a| \n| b"),
    ("llama-bpe", "I'M  12345\n\n x(y)", "I|'M| | |123|45|\n\n| x|(y|)"),
    ("llama-bpe", "a..\n\nb", "a|..\n\n|b"),
    ("smollm", "a  123", "a|  |1|2|3"),
    ("qwen2", "12 3é", "1|2| |3|é"),
    ("qwen2", "e\u0301x", "e|\u0301x"),
    ("qwen35", "e\u0301x", "e\u0301x"),
    ("default", "12345 a+b", "123|45| a|+|b"),
    ("falcon", "a`b 1234", "a|`|b| |123|4"),
    ("deepseek-llm", "a\nb 12中文字  ", "a|\n|b| |12|中文字|  "),
    ("deepseek-llm", " д\xb5\u01bbг \u212a", " д\xb5|\u01bb|г| |\u212a"),
    ("deepseek-coder", "a(b) 12かな", "a|(|b|)| |1|2|かな"),
    ("deepseek-v3", "12345かな #include", "123|45|かな| #|include"),
    ("deepseek-v3", "(abc)", "(abc|)"),
    ("tekken", "HelloWorld XMLHttp 12", "Hello|World| XMLHttp| |1|2"),
    ("tekken", "a//b", "a|//|b"),
    ("tekken", "ÀÉé", "ÀÉé"),
    ("gpt-4o", "HelloWorld's 1234", "Hello|World's| |123|4"),
    ("bloom", "a b,c (d", "a| b|,|c| (|d"),
    ("viking", "a 12,c", "a| |1|2|,|c"),
    ("seed-coder", "a..\n\nb1", "a|..|\n\n|b|1"),
]


@pytest.mark.parametrize(("name", "text", "parts"), CASES)
def test_parts_are_as_expected(name: str, text: str, parts: str) -> None:
    assert PRE_TOKENIZERS[name].split(text) == parts.split("|")


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_parts_joined_are_the_text(name: str, awkward_texts: list[str]) -> None:
    for text in awkward_texts:
        parts = PRE_TOKENIZERS[name].split(text)
        assert "".join(parts) == text
        assert "" not in parts


@pytest.mark.parametrize("run", [" ", "\n", "\t", "a", "A", "1", ".", "中", "\u0301", " \n"])
@pytest.mark.parametrize(
    "name", ["default", "gpt-2", "llama-bpe", "deepseek-llm", "deepseek-v3", "tekken", "gpt-4o"]
)
def test_long_runs_are_split_in_linear_time(name: str, run: str) -> None:
    # A pattern that tries each place of a run again would need 10^10 steps here.
    text = run * 100_000 + "x"
    assert "".join(PRE_TOKENIZERS[name].split(text)) == text


def test_white_space_is_the_unicode_property() -> None:
    for blank in "\x85\xa0\u1680\u2028\u3000":
        assert PRE_TOKENIZERS["gpt-2"].split(f"a{blank}{blank}") == ["a", blank * 2]
    for other in "\x1c\x1f\u200b\ufeff":
        assert PRE_TOKENIZERS["gpt-2"].split(f"a{other} ") == ["a", other, " "]


def test_aliases_share_patterns() -> None:
    assert PRE_TOKENIZERS["llama3"] == PRE_TOKENIZERS["llama-v3"] == PRE_TOKENIZERS["llama-bpe"]
    assert PRE_TOKENIZERS["smaug-bpe"].patterns == PRE_TOKENIZERS["llama-bpe"].patterns
    ignoring = {name for name, row in PRE_TOKENIZERS.items() if row.ignores_merges}
    assert {"llama-bpe", "falcon3", "tekken", "glm4"} <= ignoring
    assert not ignoring & {"smaug-bpe", "dbrx", "gpt-2", "qwen2", "smollm", "chatglm-bpe"}


def test_an_unknown_name_is_an_error_that_names_it() -> None:
    with pytest.raises(FormatError, match=r"^m\.gguf: tokenizer\.ggml\.pre: .*'wrong' is unknown"):
        pre_tokenizer("wrong", "m.gguf")
