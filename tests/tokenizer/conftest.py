"""Vocabularies that a clone has, and texts that are hard on tokenizers."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import EngineError
from engine.gguf import read_gguf
from engine.locate import locate_model
from engine.tokenizer import Tokenizer

BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u200b\ufeff\u180e"
)
AWKWARD = [
    "",
    " ",
    "   ",
    "\n",
    " \n \n\n",
    "\r\n\r\n",
    "\t\tif x:\n\t\t\treturn  12345\n",
    "a  1   22    333 4444",
    "Hello, world!  (HELLO wOrLd)",
    "we'll they've I'M don't he's 'tis ''s 'lL",
    "3.14159e-10 0x7fff 1,000,000 ½ ² ⅷ ٣٤ 五",
    "naïve café Ångström ﬁne ﬀ İstanbul straße",
    "e\u0301 a\u0308\u0304 \u0301 n\u0303n",
    "Съешь же ещё этих мягких булок",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "דג סקרן שט בים مرحبا بالعالم ۱۲۳",
    "हिन्दी में लिखना বাংলা தமிழ் ไทยไม่เว้นวรรค",
    "我能吞下玻璃而不伤身体。いろはにほへと、カタカナ 한국어 문장",
    "ខ្មែរ မြန်မာ አማርኛ ᏣᎳᎩ ᚠᚢᚦ 𐌰𐍄𐍄𐌰 𓀀𓂀",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1ee "
    "\U0001f44d\U0001f3fd \u2764\ufe0f \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "∑∞ ≠ √2 → ∀x∈ℝ ℵ ℃ Ω Ω K K £€₹ ©®™ …—–“”‘’«»",
    "\x00\x01\x02 \x1b[31m \x7f \x80\x9f",
    f"a{'a'.join(BLANKS)}a{BLANKS} b",
    "\u200e\u200f\u2060\ufeff\ufffd\ufffe\U0010ffff",
    "<|im_start|>user\nHi<|im_end|></s><s><unk><0x0A>",
    "\u2581\u2581lower \u2581 one eighth\u2581block",
    "=====>>>~~~***///\\\\\\###$$$^^^|||```{}[]<>",
    "https://example.org/a_b?c=d&e=%20#f CamelCaseXMLHttp snake_case",
]


# What is common in texts, often, and a sample of every block.
_CHARACTER_POOL = [
    *"".join(AWKWARD),
    *" \n\t'sS.,19aZ" * 40,
    *(chr(i) for i in range(0x20, 0x2FA1E, 7) if unicodedata.category(chr(i))[0] != "C"),
]


@pytest.fixture(scope="session")
def mini_metadata() -> dict[str, Any]:
    """Keys of the small recorded model: 768 SPM pieces with byte fallback."""
    with read_gguf(Path(__file__).parents[1] / "data" / "mini-f32.gguf") as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    """Keys of SmolLM2: 49,152 BPE tokens, pre-tokenizer `smollm`."""
    try:
        path = locate_model("smollm2")
    except EngineError as error:
        pytest.skip(str(error))
    with read_gguf(path) as file:
        return dict(file.metadata)


@pytest.fixture(scope="session")
def mini(mini_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(mini_metadata, "mini-f32.gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(smollm2_metadata, "smollm2.gguf")


@pytest.fixture(scope="session")
def every_character() -> str:
    """All characters that Unicode 3.2 assigned, each in the middle of ASCII.

    The old version, so that differing Unicode tables of this Python and an oracle do not matter.
    """
    category = unicodedata.ucd_3_2_0.category
    assigned = [chr(i) for i in range(0x110000) if category(chr(i)) not in ("Cn", "Cs", "Co")]
    return "".join(f"ab{character}cd {character} 1{character}\n" for character in assigned)


@pytest.fixture
def awkward_texts(rng: np.random.Generator) -> list[str]:
    """Recorded strings, and 300 random mixtures of their characters and of every block."""
    texts = list(AWKWARD)
    for n in rng.integers(1, 60, 300).tolist():
        picks = rng.integers(0, len(_CHARACTER_POOL), n).tolist()
        texts.append("".join(_CHARACTER_POOL[pick] for pick in picks))
    return texts
