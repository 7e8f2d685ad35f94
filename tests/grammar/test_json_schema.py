"""JSON schemas: what their grammars let through, and which schemas are refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.grammar import (
    GrammarError,
    GrammarMatcher,
    TokenTable,
    parse_grammar,
)
from engine.grammar.json_schema import schema_to_grammar

BYTES = TokenTable([bytes([i]) for i in range(256)], [])


def follows(schema: Any, text: str) -> bool:
    matcher = GrammarMatcher(parse_grammar(schema_to_grammar(json.dumps(schema))[0]), BYTES)
    for byte in text.encode():
        if not matcher.allows(byte):
            return False
        matcher.accept(byte)
    return matcher.may_end


def obj(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


INT, STR, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}

MEANINGS: list[tuple[Any, list[str], list[str]]] = [
    ({}, ["{}", '{ "a": {"b": [1, "x", null, true]}}'], ["1", "[]", "{", "{} x"]),
    (INT, ["0", "-12", "7 "], ["01", "1.5", "+1", "", "12345678901234567"]),
    (
        {"type": "number"},
        ["0", "-1.50", "1e9", "2.5E-10 "],
        [".5", "1.", "1e", "0x1", "1.12345678901234567"],
    ),
    ({"type": "boolean"}, ["true", "false "], ["True", "1"]),
    (NULL, ["null"], ["nil"]),
    (STR, ['""', '"a b" ', r'"\"\\\/\b\u00e9"', '"é€😀"'], ['"', '"a"b"', r'"\x"', '"\n"', '"\t"']),
    ({"type": "array"}, ["[]", "[1, [2,{}]]"], ["[1,]", "[,1]", "{}"]),
    ({"type": "array", "items": INT}, ["[]", "[1]", "[1,2, 3] "], ['["a"]', "[1,]"]),
    ({"items": INT, "minItems": 2}, ["[1,2]", "[1,2,3]"], ["[]", "[1]"]),
    ({"items": INT, "minItems": 1, "maxItems": 2}, ["[1]", "[1,2]"], ["[]", "[1,2,3]"]),
    ({"items": INT, "maxItems": 0}, ["[]"], ["[1]"]),
    ({"items": INT, "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    ({"items": [INT, STR]}, ['[1,"a"]'], ["[1]", '["a",1]', '[1,"a",2]']),
    ({"prefixItems": [INT]}, ["[1]"], ["[]", "[1,2]"]),
    ({"type": "string", "minLength": 2}, ['"ab"', '"abc"', r'"\n\n"'], ['"a"']),
    ({"type": "string", "maxLength": 2}, ['""', '"éé"'], ['"abc"']),
    ({"type": "string", "minLength": 1, "maxLength": 1}, ['"a"'], ['""', '"aa"']),
    ({"const": {"a": [1, "é", None]}}, ['{"a":[1,"é",null]}'], ['{"a": [1,"é",null]}', "{}"]),
    ({"const": 'a"\\\n'}, [r'"a\"\\\n"'], ['"a"', r'"a\"\\n"']),
    ({"enum": ["x", 2, None, 1.5]}, ['"x"', "2", "null", "1.5"], ["x", "3", "2 "]),
    ({"oneOf": [INT, STR]}, ["1", '"a"'], ["null"]),
    ({"anyOf": [INT, {"anyOf": [NULL, STR]}]}, ["1", "null", '"a"'], ["true"]),
    ({"type": ["integer", "null"]}, ["1", "null"], ['"a"']),
    ({"type": ["string", "null"], "minLength": 2}, ['"ab"', "null"], ['"a"']),
    (obj("a", a=INT), ['{"a":1}', '{ "a" : 1 } '], ["{}", '{"b":1}', '{"a":1,"a":1}', '{"a":1']),
    (
        obj("b", a=INT, b=INT, c=INT, d=INT),
        ['{"b":1}', '{"b":1,"a":1}', '{"b":1, "c":1}', '{"b":1,"a":1,"d":1}',
         '{"b":1,"a":1,"c":1,"d":1}'],
        ["{}", '{"a":1,"b":1}', '{"b":1,"c":1,"a":1}', '{"b":1,}', '{"b":1"a":1}'],
    ),
    (obj(a=INT, b=INT), ["{}", '{"a":1}', '{"b":1}', '{"a":1,"b":1}'], ['{"b":1,"a":1}', "{,}"]),
    (
        {**obj("a", a=INT, b=INT), "additionalProperties": STR},
        ['{"a":1}', '{"a":1,"x":"y"}', '{"a":1,"b":2,"x":"y","z":"y"}'],
        ['{"x":"y"}', '{"a":1,"x":2}', '{"a":1 "x":"y"}', '{"a":1,"x":"y","b":2}'],
    ),
    ({"additionalProperties": INT}, ["{}", '{"x":1,"y":2}'], ['{"x":"a"}']),
    ({"type": "object", "additionalProperties": False}, ["{}"], ['{"x":1}']),
    ({"type": "object", "additionalProperties": True}, ["{}", '{"x":[]}'], ["[]"]),
    ({"properties": {'q"\\': INT}}, [r'{"q\"\\":1}'], ['{"q":1}']),
    (
        {"allOf": [obj(a=INT), {"$ref": "#/$defs/x"}, {"anyOf": [obj(c=INT), obj(d=INT)]}],
         "$defs": {"x": obj(b=STR)}},
        ['{"a":1,"b":"x"}', '{"a":1,"b":"x","d":2}', '{"a":1,"b":"x","c":1,"d":2}'],
        ["{}", '{"a":1}', '{"a":1,"b":"x","d":2,"c":1}'],
    ),
    (
        {**obj("n", n={"anyOf": [{"$ref": "#"}, NULL]})},
        ['{"n":null}', '{"n":{"n":null}}'],
        ["null", '{"n":{}}'],
    ),
    (
        {"$ref": "#/definitions/a~1b/0", "definitions": {"a/b": [INT]}},
        ["1"],
        ['"a"'],
    ),
    ({"format": "date"}, ['"2024-06-30"'], ['"2024-13-01"', '"24-06-30"', "2024-06-30"]),
    ({"format": "time"}, ['"23:59:59Z"', '"00:00:00.123+02:00"'], ['"24:00:00Z"', '"23:59:59"']),
    ({"format": "date-time"}, ['"2024-06-30T23:59:59Z"'], ['"2024-06-30 23:59:59Z"']),
    ({"format": "uuid"}, ['"01234567-89ab-cdef-0123-456789abcDEF"'], ['"01234567-89ab"']),
    ({"format": "uuid4"}, ['"01234567-89ab-cdef-0123-456789abcdef"'], ['"x"']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "inside", "outside"), MEANINGS, ids=range(len(MEANINGS)))
def test_a_schema_lets_through(schema: Any, inside: list[str], outside: list[str]) -> None:
    assert [text for text in inside if not follows(schema, text)] == []
    assert [text for text in outside if follows(schema, text)] == []
    for text in inside:
        json.loads(text)


PATTERNS: list[tuple[str, list[str], list[str]]] = [
    ("^$", [""], ["a"]),
    ("^abc$", ["abc"], ["ab", "abcd"]),
    ("^a|b$", ["a", "b"], ["ab", ""]),
    ("^a*b+c?$", ["b", "aabbc"], ["ac"]),
    ("^(ab|c){2}$", ["abc", "cc"], ["ab"]),
    ("^(?:ab){1,2}$", ["ab", "abab"], ["ababab"]),
    ("^x{,2}y{2,}$", ["yy", "xxyyy"], ["xxxyy"]),
    ("^a+?b*?$", ["a", "aab"], ["b"]),
    ("^[a-c-]+$", ["a-c"], ["d"]),
    ("^[^a-c]$", ["d", '"', "\\", "é", "\n"], ["a", "dd"]),
    (r"^\d{3}-\w+\s$", ["123-a_Z9 ", "123-x\t"], ["12-a ", "123-é "]),
    (r"^\D\W\S$", ["a-b", '"-\\'], ["1-b"]),
    (r"^[\d.]+$", ["1.5"], ["a"]),
    (r"^[\w\-]+$", ["a-b"], ["a+b"]),
    (r"^\(\[\{\.\*\+\?\|\^\$\\\/\"\)$", ['([{.*+?|^$\\/")'], ["("]),
    ("^.$", ["a", '"', "\\", "é", "\t"], ["\n", "\r", "", "ab"]),
    ("^a.c$", ["abc", 'a"c'], ["ac"]),
    (r"^\n\t\u00e9\x41$", ["\n\téA"], ["n"]),
    ('^"$', ['"'], [""]),
    ("^()a$", ["a"], [""]),
    ("^(a|)b$", ["ab", "b"], ["a"]),
]


@pytest.mark.parametrize(("pattern", "inside", "outside"), PATTERNS)
def test_a_pattern_lets_through(pattern: str, inside: list[str], outside: list[str]) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert [v for v in inside if not follows(schema, json.dumps(v, ensure_ascii=False))] == []
    assert [v for v in outside if follows(schema, json.dumps(v, ensure_ascii=False))] == []


ERRORS = [
    ("[1]", "a schema is a JSON object"),
    ('{\n "a": 1,\n}', "line 2, column 8|line 3, column 1"),
    ('{"type": "money"}', "cannot be made a grammar"),
    ('{"title": "x"}', "give it a type"),
    ('{"type": ["string", "money"]}', "cannot be made a grammar"),
    ('{"items": 3}', "3 is no schema"),
    ('{"properties": {"a": false}}', "false is no schema"),
    ('{"properties": []}', "properties is .*; give an object"),
    ('{"enum": 1}', "enum is 1; give a list"),
    ('{"enum": []}', "enum has nothing to choose from"),
    ('{"anyOf": []}', "anyOf has nothing"),
    ('{"items": {"type": "null"}, "minItems": -1}', "minItems is -1"),
    ('{"items": {"type": "null"}, "minItems": 2, "maxItems": 1}', "maxItems 1 is below minItems 2"),
    ('{"type": "string", "minLength": "3"}', 'minLength is "3"'),
    ('{"$ref": "https://example.org/a"}', "does not begin with #/"),
    ('{"$ref": "#/a/b"}', "the schema has no 'a'"),
    ('{"$ref": "#/a", "a": {"$ref": "#/a"}}', "can begin with itself"),
    ('{"allOf": [{"$ref": "#/a"}], "a": {"$ref": "#/a"}}', "refers to itself"),
    ('{"type": "string", "maxLength": 99999999}', "larger than"),
    ('{"pattern": "abc"}', r"pattern 'abc': it must begin with \^"),
    ('{"pattern": "^a)$"}', "closed that was not opened"),
    ('{"pattern": "^(a$"}', "never closed"),
    ('{"pattern": "^[a$"}', "bracket is never closed"),
    ('{"pattern": "^a\\\\$"}', "nothing follows|must end"),
    ('{"pattern": "^*$"}', r"nothing stands before \*"),
    ('{"pattern": "^(?=a)$"}', "only understood as"),
    ('{"pattern": "^\\\\bword$"}', "cannot be expressed"),
    ('{"pattern": "^a$b$"}', "inside of it"),
    ('{"pattern": "^[b-a]$"}', "range"),
    ('{"pattern": 3}', "is no text"),
    ('{"a": ' * 5000 + "1" + "}" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("schema", "complaint"), ERRORS, ids=range(len(ERRORS)))
def test_a_schema_that_cannot_be_expressed_is_refused(schema: str, complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint) as caught:
        parse_grammar(schema_to_grammar(schema)[0])
    assert "\n" not in str(caught.value)


def test_keywords_that_no_grammar_can_express_are_told() -> None:
    schema = {"items": {"type": "integer", "minimum": 3, "title": "x"}, "uniqueItems": True}
    assert schema_to_grammar(json.dumps(schema))[1] == ["minimum", "uniqueItems"]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": '^[A-Z"\\\\][a-z]{1,5}$'},
        "tags": {"type": "array", "items": {"enum": ["a\n", "b\\", 3]}, "maxItems": 3},
        "when": {"format": "date-time"},
        "size": {"type": "number"},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/properties/tags"}]},
    },
    "required": ["name", "more"],
    "additionalProperties": {"type": "boolean"},
}


def test_what_the_grammar_generates_is_json_that_the_schema_describes(
    rng: np.random.Generator,
) -> None:
    matcher = GrammarMatcher(parse_grammar(schema_to_grammar(json.dumps(SCHEMA))[0]), BYTES)
    for _ in range(20):
        matcher.reset()
        raw = bytearray()
        while not matcher.may_end or raw[-1:] != b"}":
            # Long keys and numbers are ended by preferring what closes them.
            allowed = np.flatnonzero(matcher.allowed())
            closing = [byte for byte in b'"},]' if byte in allowed]
            byte = closing[0] if closing and rng.random() < 0.4 else int(rng.choice(allowed))
            matcher.accept(byte)
            raw.append(byte)
        value = json.loads(raw.decode())
        assert {"name", "more"} <= value.keys()
        assert 2 <= len(value["name"]) <= 6
        for item in value.get("tags", []) + (value["more"] or []):
            assert item in ("a\n", "b\\", 3)
        for key in value.keys() - SCHEMA["properties"].keys():  # type: ignore[attr-defined]
            assert isinstance(value[key], bool)
