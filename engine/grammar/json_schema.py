r"""A grammar of the JSON texts that a JSON schema describes.

Understood, in this order where several stand together: ``$ref`` within the schema, ``oneOf`` and
``anyOf``, a list of types, ``const``, ``enum``, ``properties`` with ``required`` and
``additionalProperties``, ``allOf`` of objects, ``items`` or ``prefixItems`` with ``minItems`` and
``maxItems``, ``pattern``, the formats ``uuid``, ``date``, ``time`` and ``date-time``, ``minLength``
and ``maxLength``, and the types. As in llama.cpp's converter of June 2024 (which this follows in
what it lets through, but for what the documentation lists):

- one space may stand behind each brace, bracket, comma, colon and value, but for a constant;
- properties come in the schema's order, those that are not required behind the others;
- properties that the schema does not name are left out unless ``additionalProperties`` says so;
- every property of ``allOf``'s parts is required, but those of an ``anyOf`` in it;
- ``{}`` stands for any object; numbers have at most 16 digits before and behind the point.

Source: JSON Schema Validation, draft 2020-12; ECMA-262 for patterns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.grammar.gbnf import ROOT, GrammarError
from engine.grammar.json_text import literal, pattern_rule

# What a rule stands for, by its name; each names others without reserve.
_BUILT_IN = {
    "space": '" "?',
    "boolean": '("true" | "false") space',
    "null": '"null" space',
    "whole": '"0" | [1-9] [0-9]{0,15}',
    "integer": '"-"? whole space',
    "number": '"-"? whole ("." [0-9]{1,16})? ([eE] [-+]? whole)? space',
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\"" space',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" space (string ":" space value ("," space string ":" space value)*)? "}" space',
    "array": '"[" space (value ("," space value)*)? "]" space',
    "uuid": r'"\"" hex{8} ("-" hex{4}){3} "-" hex{12} "\"" space',
    "hex": "[0-9a-fA-F]",
    "day": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | [12] [0-9] | "3" [01])',
    "hour": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]',
    "moment": 'hour ":" [0-5] [0-9] ("." [0-9]{3})? ("Z" | [-+] hour)',
    "date": r'"\"" day "\"" space',
    "time": r'"\"" moment "\"" space',
    "date-time": r'"\"" day "T" moment "\"" space',
}
_TYPES = ("boolean", "null", "integer", "number", "string", "value", "object", "array")
_FORMATS = ("date", "time", "date-time")
_UUID = re.compile(r"uuid[1-5]?")

_KEYWORDS = frozenset(
    "$ref oneOf anyOf type const enum properties required additionalProperties allOf items "
    "prefixItems minItems maxItems pattern format minLength maxLength".split()
)
# They say nothing about which texts are valid.
_ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment $defs definitions title description default examples deprecated "
    "readOnly writeOnly contentMediaType contentEncoding".split()
)


def schema_to_grammar(text: str) -> tuple[str, list[str]]:
    """Make a grammar of a JSON schema.

    Parameters
    ----------
    text : str
        The schema, an object in JSON.

    Returns
    -------
    str
        The grammar, for `parse_grammar`.
    list of str
        Keywords that no grammar can express, or that are not understood, sorted; they are ignored.

    Raises
    ------
    GrammarError
        If the text is no JSON object (names line and column), or the schema cannot be expressed.
    """
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise GrammarError("a schema is a JSON object in braces")
        converter = _Converter(schema)
        return converter.grammar(), sorted(converter.ignored)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise GrammarError(f"{place}: no JSON: {error.msg}") from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None


class _Converter:
    """One schema on its way; every part of it becomes a rule."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self.schema = schema
        self.rules: dict[str, str] = {}
        self.by_reference: dict[str, str] = {"#": ROOT}
        self.ignored: set[str] = set()

    def grammar(self) -> str:
        self.rules[ROOT] = ""
        self.rules[ROOT] = self.body(self.schema, "")
        used = [*self.rules.items(), *_BUILT_IN.items()]
        return "".join(f"{name} ::= {body}\n" for name, body in used)

    def rule(self, schema: Any, name: str) -> str:
        """Make the rule of a part of the schema; returns what to call it."""
        name = self.reserved(name)
        self.rules[name] = self.body(schema, name)
        return name

    def reserved(self, name: str) -> str:
        """Make a name of its own that says where in the schema the rule comes from."""
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "part"
        found, n = plain, 0
        while found in self.rules or found in _BUILT_IN:
            found, n = f"{plain}-{n}", n + 1
        self.rules[found] = ""
        return found

    def body(self, schema: Any, name: str) -> str:
        """Say what a part of the schema lets through, as alternatives of a rule."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise GrammarError(f"{_shown(schema)} is no schema; give an object")
        self.ignored |= schema.keys() - _KEYWORDS - _ANNOTATIONS
        if "$ref" in schema:
            return self.reference(schema["$ref"])
        for keyword in ("oneOf", "anyOf"):
            if keyword in schema:
                return self.union(_list(schema, keyword), name)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = _list(schema, "type")
            return self.union([{**schema, "type": each} for each in kind], name)
        if "const" in schema:
            return _constant(schema["const"])
        if "enum" in schema:
            return " | ".join(map(_constant, _list(schema, "enum")))
        if kind in (None, "object") and (found := self.object_body(schema, name)):
            return found
        if kind in (None, "array") and (found := self.array_body(schema, name)):
            return found
        if kind in (None, "string") and (found := self.string_body(schema, kind)):
            return found
        return self.plain_body(schema, kind)

    def plain_body(self, schema: Mapping[str, Any], kind: Any) -> str:
        if not schema:
            return "object"
        if kind not in _TYPES:
            raise GrammarError(f"{_shown(schema)} cannot be made a grammar; give it a type")
        return str(kind)

    def union(self, schemas: Iterable[Any], name: str) -> str:
        return " | ".join(self.rule(each, f"{name}-{i}") for i, each in enumerate(schemas))

    # ---- references -----------------------------------------------------------------------------

    def reference(self, where: Any) -> str:
        if where not in self.by_reference:
            target = self.target(where)
            name = self.by_reference[where] = self.reserved(where.rpartition("/")[2])
            self.rules[name] = self.body(target, name)
        return self.by_reference[where]

    def target(self, where: Any) -> Any:
        """Find what a reference within the schema refers to (JSON pointer, RFC 6901)."""
        if not isinstance(where, str) or not where.startswith("#/"):
            raise GrammarError(
                f"$ref {_shown(where)} does not begin with #/; only parts of the schema are read"
            )
        target: Any = self.schema
        for step in where[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(step)] if isinstance(target, list) else target[step]
            except (KeyError, IndexError, ValueError, TypeError):
                raise GrammarError(f"$ref {_shown(where)}: the schema has no {step!r}") from None
        return target

    # ---- objects --------------------------------------------------------------------------------

    def object_body(self, schema: Mapping[str, Any], name: str) -> str:
        additional = schema.get("additionalProperties", False)
        if "properties" in schema or ("additionalProperties" in schema and additional is not True):
            required = schema.get("required", [])
            is_required = {each for each in required if isinstance(each, str)}
            properties = list(_dict(schema, "properties").items())
            self.ignored |= {"allOf"} & schema.keys()
            return self.members(properties, is_required, additional, name)
        if "allOf" not in schema:
            return ""
        properties, is_required = [], set()
        for part in _list(schema, "allOf"):
            if isinstance(part, dict) and "anyOf" in part:
                for each in _list(part, "anyOf"):
                    properties += self.parts_of(each)
            else:
                parts = self.parts_of(part)
                properties += parts
                is_required |= {key for key, _ in parts}
        return self.members(list(dict(properties).items()), is_required, False, name)

    def parts_of(self, schema: Any) -> list[tuple[str, Any]]:
        """Properties of a part of ``allOf``."""
        seen = []
        while isinstance(schema, dict) and "$ref" in schema:
            if schema["$ref"] in seen:
                raise GrammarError(f"$ref {_shown(schema['$ref'])} refers to itself")
            seen.append(schema["$ref"])
            schema = self.target(schema["$ref"])
        return list(_dict(schema, "properties").items()) if isinstance(schema, dict) else []

    def members(
        self,
        properties: Sequence[tuple[str, Any]],
        is_required: set[str],
        additional: Any,
        name: str,
    ) -> str:
        """Make an object's members: the required ones, then any of the others in their order."""
        pairs = {key: self.pair(key, each, f"{name}-{key}") for key, each in properties}
        required = [rule for key, rule in pairs.items() if key in is_required]
        optional = [rule for key, rule in pairs.items() if key not in is_required]
        others = self.other_pairs(additional, name)
        choices: list[str] = [f'{others} ("," space {others})*'] if others else []
        rest = f'("," space {others})*' if others else ""
        for pair in reversed(optional):
            choices.append(f"{pair} {rest}")
            if pair != optional[0]:
                following = self.reserved(f"{pair}-rest")
                self.rules[following] = f'("," space {pair})? {rest}'
                rest = following
        may_follow = " | ".join(reversed(choices))
        inside = ' "," space '.join(required)
        if may_follow:
            inside += f' ("," space ({may_follow}))?' if required else f"({may_follow})?"
        return f'"{{" space {inside} "}}" space'

    def pair(self, key: str, schema: Any, name: str) -> str:
        value = self.rule(schema, name)
        pair = self.reserved(f"{name}-pair")
        self.rules[pair] = f'{literal(_json(key))} space ":" space {value}'
        return pair

    def other_pairs(self, additional: Any, name: str) -> str:
        """Make the rule of a member that the schema does not name; empty if there is to be none."""
        if additional is False or not isinstance(additional, dict | bool):
            return ""
        value = self.rule(additional, f"{name}-additional")
        pair = self.reserved(f"{name}-additional-pair")
        self.rules[pair] = f'string ":" space {value}'
        return pair

    # ---- arrays and strings ---------------------------------------------------------------------

    def array_body(self, schema: Mapping[str, Any], name: str) -> str:
        items = schema.get("items", schema.get("prefixItems"))
        if items is None:
            return ""
        if isinstance(items, list):
            rules = [self.rule(each, f"{name}-{i}") for i, each in enumerate(items)]
            inside = ' "," space '.join(rules)
        else:
            low, high = _bounds(schema, "minItems", "maxItems")
            inside = _separated(self.rule(items, f"{name}-item"), low, high)
        return f'"[" space {inside} "]" space'

    def string_body(self, schema: Mapping[str, Any], kind: str | None) -> str:
        if "pattern" in schema:
            return rf'"\"" ({pattern_rule(schema["pattern"])}) "\"" space'
        form = schema.get("format")
        if isinstance(form, str) and _UUID.fullmatch(form):
            return "uuid"
        if form in _FORMATS:
            return str(form)
        if form is not None:
            self.ignored.add("format")
        if kind == "string" and ("minLength" in schema or "maxLength" in schema):
            low, high = _bounds(schema, "minLength", "maxLength")
            most = "" if high is None else high
            return rf'"\"" char{{{low},{most}}} "\"" space'
        return ""


def _separated(item: str, low: int, high: int | None) -> str:
    """Repeat an item with commas in between."""
    if high == 0:
        return ""
    more = f'("," space {item}){{{max(low - 1, 0)},{"" if high is None else high - 1}}}'
    return f"({item} {more})?" if low == 0 else f"{item} {more}"


def _bounds(schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for keyword, value in ((least, low), (most, high)):
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if keyword in schema and not is_count:
            raise GrammarError(f"{keyword} is {_shown(value)}; give a whole number from 0 on")
    if high is not None and high < low:
        raise GrammarError(f"{most} {high} is below {least} {low}")
    return low, high


def _list(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    value = schema[keyword]
    if not isinstance(value, list):
        raise GrammarError(f"{keyword} is {_shown(value)}; give a list")
    if not value and keyword != "allOf":
        raise GrammarError(f"{keyword} has nothing to choose from")
    return value


def _dict(schema: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    value = schema.get(keyword, {})
    if not isinstance(value, dict):
        raise GrammarError(f"{keyword} is {_shown(value)}; give an object")
    return value


def _constant(value: Any) -> str:
    return literal(_json(value))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shown(value: Any) -> str:
    text = _json(value)
    return text if len(text) <= 60 else text[:57] + "..."
