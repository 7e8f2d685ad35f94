"""Added tokens, the ids of special ones, and chat templates: what surrounds a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.convert.config import Key
from engine.convert.folder import read_json
from engine.errors import EngineError, FormatError
from engine.gguf import ValueType

# Names in published files, and in GGUF's keys.
_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
# Publishers forget to mark some tokens as special; such texts are.
_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_SPECIAL_FRAMES = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


@dataclass(frozen=True, slots=True)
class Added:
    """A token that was added to a vocabulary: its id, text, and whether it is special."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class Files:
    """The JSON files that tell of a tokenizer; empty where one is absent."""

    folder: Path
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Files:
        """Read them."""
        return cls(
            folder,
            read_json(folder / "tokenizer.json"),
            read_json(folder / "tokenizer_config.json"),
            config,
        )


def added_tokens(files: Files) -> dict[int, Added]:
    """Collect tokens by id from all the files that may list them; the later file wins.

    Raises
    ------
    FormatError
        If a list is not what it should be.
    """
    found: dict[int, Added] = {}

    def add(name: str, token: Any, content: Any, special: bool) -> None:
        if not isinstance(content, str) or not str(token).isdecimal() or not content:
            raise FormatError(f"{files.folder / name}: added token {str(token)[:40]!r}: no text")
        found[int(token)] = Added(int(token), content, special or _looks_special(content))

    for entry in files.tokenizer.get("added_tokens") or []:
        entry = entry if isinstance(entry, dict) else {}
        add("tokenizer.json", entry.get("id"), entry.get("content"), bool(entry.get("special")))
    for text, token in read_json(files.folder / "added_tokens.json").items():
        if not (str(token).isdecimal() and found.get(int(token), Added(0, "", False)).text == text):
            add("added_tokens.json", token, text, False)
    decoder = files.tokenizer_config.get("added_tokens_decoder") or {}
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        entry = entry if isinstance(entry, dict) else {}
        add("tokenizer_config.json", token, entry.get("content"), bool(entry.get("special")))
    return found


def _looks_special(text: str) -> bool:
    return text in _SPECIAL_TEXTS or any(
        text.startswith(begin) and text.endswith(end) for begin, end in _SPECIAL_FRAMES
    )


def special_keys(files: Files, ids: Mapping[str, int], n_vocab: int, byte_level: bool) -> list[Key]:
    """Write ids of special tokens, and whether texts begin and end with them, as keys.

    Parameters
    ----------
    ids : mapping
        Text to id.
    byte_level : bool
        The vocabulary is tokenizer.json's alone.
    """
    texts = {role: _text_of(files.tokenizer_config.get(f"{role}_token")) for role in _ROLES}
    keys: list[Key] = []
    for role, name in _ROLES.items():
        token = ids.get(texts[role]) if texts[role] else None
        if token is None:
            token = files.config.get(f"{role}_token_id")
            token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and 0 <= token < n_vocab:
            keys.append((f"tokenizer.ggml.{name}_token_id", ValueType.U32, token))
    framing = _framing(files, texts)
    if byte_level:  # such a file says all it does; engines differ in what they take silence for
        framing = {"bos": False} | framing
    for role, flag in framing.items():
        keys.append((f"tokenizer.ggml.add_{role}_token", ValueType.BOOL, flag))
    return keys


def _text_of(token: Any) -> str:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _framing(files: Files, texts: Mapping[str, str]) -> dict[str, bool]:
    """Whether BOS and EOS are put around texts: the post-processor says it, else the settings."""
    found: dict[str, bool] = {}
    processor = files.tokenizer.get("post_processor")
    processor = processor if isinstance(processor, dict) else {}
    for step in processor.get("processors") or [processor]:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            found.setdefault("bos", False)
            found.setdefault("eos", False)
        if kind == "TemplateProcessing":
            single = step.get("single") or []
            names = [_special_name(part) for part in single]
            if len(names) > 1:
                for role, name in (("bos", names[0]), ("eos", names[-1])):
                    if name:
                        found[role] = name == texts[role] or not texts[role]
    for role in ("bos", "eos"):
        flag = files.tokenizer_config.get(f"add_{role}_token")
        if isinstance(flag, bool):
            found.setdefault(role, flag)
    return found


def _special_name(part: Any) -> str:
    inner = part.get("SpecialToken") if isinstance(part, dict) else None
    name = inner.get("id") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def template_keys(files: Files) -> list[Key]:
    """Write chat templates as keys: the file chat_template.jinja, else the settings' own.

    Of several, the one called ``default`` (else the first) gets the plain key.

    Raises
    ------
    EngineError
        If the file cannot be read.
    """
    path = files.folder / "chat_template.jinja"
    given: Any = files.tokenizer_config.get("chat_template")
    if path.exists():
        try:
            given = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EngineError(f"{path}: cannot be read: {error}") from None
    elif given is None:
        given = read_json(files.folder / "chat_template.json").get("chat_template")
    key = "tokenizer.chat_template"
    if isinstance(given, str):
        return [(key, ValueType.STRING, given)]
    entries = given if isinstance(given, list) else []
    named = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }
    if not named:
        return []
    first = "default" if "default" in named else next(iter(named))
    keys: list[Key] = [(key, ValueType.STRING, named.pop(first))]
    keys += [(f"{key}.{name}", ValueType.STRING, text) for name, text in named.items()]
    if named:
        kind = (ValueType.ARRAY, ValueType.STRING)
        keys.append(("tokenizer.chat_templates", kind, list(named)))
    return keys
