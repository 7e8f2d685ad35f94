"""Which pre-tokenizer a tokenizer.json describes: by the patterns it names, nothing is downloaded.

The file's steps are brought to the form of `engine.tokenizer.pretokenize`, a pattern each, and
looked up there. Sources: the classes of https://huggingface.co/docs/tokenizers/api/pre-tokenizers.
"""

from __future__ import annotations

import re
from typing import Any

from engine.errors import FormatError
from engine.tokenizer.pretokenize import PRE_TOKENIZERS

_GPT2 = PRE_TOKENIZERS["gpt-2"].patterns[0]
# How contractions are published, and how the table has them.
_PUBLISHED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_OUT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\x\{([0-9A-Fa-f]+)\}")


def recognise(tokenizer: dict[str, Any], where: str) -> tuple[str, str]:
    """Find the name that GGUF files give to a byte-level BPE's pre-tokenizer.

    Parameters
    ----------
    tokenizer : dict
        The content of tokenizer.json.
    where : str
        The file, for messages.

    Returns
    -------
    name, warning : str
        The warning is empty when the file and the table agree in everything.

    Raises
    ------
    FormatError
        If no known pre-tokenizer has these patterns; shows them.
    """
    patterns = tuple(_normalised(p) for p in _steps(tokenizer.get("pre_tokenizer"), where))
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    fitting = [
        (known.ignores_merges != ignores_merges, name)
        for name, known in PRE_TOKENIZERS.items()
        if tuple(map(_normalised, known.patterns)) == patterns
    ]
    if not fitting:
        shown = " then ".join(patterns)[:200] or "none"
        raise FormatError(
            f"{where}: pre_tokenizer: no known pre-tokenizer splits by {shown}; "
            "a newer version may know it"
        )
    # The table's first name of those that agree best.
    differs, name = min(fitting, key=lambda found: found[0])
    if not differs:
        return name, ""
    return name, (
        f"{where}: ignore_merges is {str(ignores_merges).lower()}, '{name}' does otherwise; "
        "rare words may be cut differently"
    )


def _steps(step: Any, where: str) -> list[str]:
    """Patterns of a pre-tokenizer's steps, in order."""
    if not isinstance(step, dict):
        raise FormatError(f"{where}: pre_tokenizer: a byte-level BPE has one; this file has none")
    kind = step.get("type")
    if kind == "Sequence" and isinstance(step.get("pretokenizers"), list):
        return [p for part in step["pretokenizers"] for p in _steps(part, where)]
    if kind == "ByteLevel":
        return [_GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    if kind == "Split":
        return [_split_pattern(step, where)]
    if kind == "Punctuation" and step.get("behavior", "Isolated") == "Contiguous":
        return [r"[\p{P}\$\+<=>\^~\|`]+"]
    raise FormatError(f"{where}: pre_tokenizer: step {str(kind)[:40]!r} is not known")


def _split_pattern(step: dict[str, Any], where: str) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
        regex = re.escape(pattern["String"])
    how = (step.get("behavior"), bool(step.get("invert")))
    # Matches alone are kept by the second; the same, as such patterns match every character.
    if not isinstance(regex, str) or how not in (("Isolated", False), ("Removed", True)):
        raise FormatError(f"{where}: pre_tokenizer: a split of another kind: {str(step)[:120]}")
    return regex


def _normalised(pattern: str) -> str:
    """Spell what means the same in one way."""
    pattern = pattern.replace(_PUBLISHED, _SPELLED_OUT)
    pattern = _ESCAPE.sub(lambda m: chr(int(m[1] or m[2] or m[3], 16)), pattern)
    pattern = pattern.replace("\r", r"\r").replace("\n", r"\n")
    return pattern.replace(r"(?<!\s)\s++$", r"\s+$")
