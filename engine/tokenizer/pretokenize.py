r"""How BPE vocabularies split a text before merging: a table from names to patterns.

The patterns are those that the models were trained with, in the syntax of the `regex` package:
Unicode classes by general category, ``\s`` as the White_Space property.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.errors import FormatError
from engine.tokenizer.vocab import quoted

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PUNCTUATION_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_DIGIT = r"\p{N}"
_THREE_DIGITS = r"[0-9][0-9][0-9]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_BLANKS}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_BLANKS}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
)
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALIZED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CAPITALIZED}|{_CAPITALS}|\p{{N}}|{_PUNCTUATION_OR_PATH}|{_BLANKS}"
_GPT4O = (
    rf"{_CAPITALIZED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"|{_PUNCTUATION_OR_PATH}|{_BLANKS}"
)

_SENTENCE = r" ?[^(\s|.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C)]+"

_CJK = r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _BLANKS
)

# Letters of deepseek-llm: cased scripts of an older Unicode. Written as escapes, as some of them
# (U+2126, U+212A) turn into other letters when an editor normalizes.
_DEEPSEEK_LETTERS = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386
    388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA
    1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57
    1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB
    1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
    212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3
    A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A
    FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
    1E900-1E943
"""


def _character_class(ranges: str) -> str:
    """Spell a class of characters from hexadecimal code points and ranges."""
    spelled = ["-".join(rf"\U{int(end, 16):08X}" for end in r.split("-")) for r in ranges.split()]
    return f"[{''.join(spelled)}]"


_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_character_class(_DEEPSEEK_LETTERS)}+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    # The published pattern is \s+$; a match begins at the first blank of a run anyway, and saying
    # so keeps a long run in the middle of a text from being tried from each of its places.
    r"(?<!\s)\s++$",
    _CJK,
    r"\p{N}+",
)

# Names that share patterns, the patterns in order, whether a whole part that is a token stays one.
_ROWS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS), False),
    ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", (_LLAMA3,), True),
    ("jina-v5-nano glm4", (_LLAMA3,), True),
    ("smaug-bpe dbrx chatglm-bpe", (_LLAMA3,), False),
    ("gpt-2 olmo phi-2 gigachat mpt mellum exaone4 trillion granite-docling", (_GPT2,), False),
    ("jais modern-bert a.x-4.0", (_GPT2,), False),
    ("jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code", (_GPT2,), False),
    ("smollm starcoder refact command-r codeshell exaone", (_DIGIT, _GPT2), False),
    ("minerva-7b mellum2", (_DIGIT, _GPT2), False),
    ("qwen2 stablelm2 deepseek-r1-qwen megrez hunyuan grok-2 kormo", (_QWEN2,), False),
    ("f2llmv2 solar-open", (_QWEN2,), False),
    ("qwen35", (_QWEN35,), False),
    ("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS), False),
    ("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT), False),
    ("deepseek-llm", _DEEPSEEK_LLM, False),
    (
        "deepseek-v3 hunyuan-dense joyai-llm",
        (r"\p{N}{1,3}", r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+", _DEEPSEEK_V3),
        False,
    ),
    ("tekken", (_TEKKEN,), True),
    ("gpt-4o llama4 kanana2", (_GPT4O,), False),
    ("bloom poro-chat gpt3-finnish", (_SENTENCE,), False),
    ("viking", (_SENTENCE, _DIGIT), False),
    ("seed-coder", (_SEED_CODER,), False),
)


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns that split a text, one after the other.

    Attributes
    ----------
    patterns : tuple of str
        Each is applied to every part that the one before left, as if the part were the whole text;
        matches and the stretches between them become parts.
    ignores_merges : bool
        A part whose text is a token becomes that token, whatever the merges say.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool

    def split(self, text: str) -> list[str]:
        """Split a text into parts, never empty, that joined give the text again."""
        parts = [text]
        for split in self._splitters:
            parts = [piece for part in parts for piece in split(part) if piece]
        return parts

    @cached_property
    def _splitters(self) -> list[Callable[[str], list[Any]]]:
        # Here, as importing and compiling takes longer than reading a vocabulary.
        import regex  # type: ignore[import-untyped]

        return [regex.compile(f"({pattern})").split for pattern in self.patterns]


PRE_TOKENIZERS = {
    name: PreTokenizer(patterns, ignores_merges)
    for names, patterns, ignores_merges in _ROWS
    for name in names.split()
}


def pre_tokenizer(name: str, source: str) -> PreTokenizer:
    """Look up a pre-tokenizer by the name that files give it.

    Raises
    ------
    FormatError
        If the name is unknown; `source` is the file it names.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise FormatError(
            f"{source}: tokenizer.ggml.pre: pre-tokenizer {quoted(name)} is unknown; "
            "a newer version may know it"
        ) from None
