"""Reading grammars: what they mean, and where they are wrong."""

from __future__ import annotations

import pytest

from engine.grammar import GrammarError, GrammarMatcher, TokenTable, parse_grammar
from engine.grammar.gbnf import LAST_CODE_POINT, MAX_ELEMENTS

# Every byte is a token, and 256 ends the text.
BYTES = TokenTable([bytes([i]) for i in range(256)] + [b"</s>"], [256])


def follows(grammar: str, text: str | bytes) -> bool:
    matcher = GrammarMatcher(parse_grammar(grammar), BYTES)
    for byte in text.encode() if isinstance(text, str) else text:
        if not matcher.allows(byte):
            return False
        matcher.accept(byte)
    return matcher.may_end


MEANINGS = [
    ('root ::= "abc"', ["abc"], ["", "ab", "abcd", "ABC"]),
    ('root ::= "a" | "bc"\n', ["a", "bc"], ["", "b", "abc"]),
    ('root ::= ""', [""], ["a"]),
    ('root ::= | "a"', ["", "a"], ["aa"]),
    ("root ::= [a-cx]", ["a", "b", "c", "x"], ["d", "-", ""]),
    ("root ::= [^a-cx]", ["d", "-", "é", "\n", "€"], ["a", "b", "x", ""]),
    ("root ::= [a-]", ["a", "-"], ["b"]),
    ("root ::= [z-a]", [], ["z", "a", "m", ""]),
    ("root ::= [^]", [""], ["a"]),
    ("root ::= [.]", ["."], ["a"]),
    ("root ::= .", ["a", "\n", "é", "😀"], ["", "ab"]),
    ('root ::= "a"*', ["", "a", "aaaa"], ["b", "ab"]),
    ('root ::= "a"+', ["a", "aaaa"], ["", "ab"]),
    ('root ::= "a"?', ["", "a"], ["aa"]),
    ('root ::= "ab"* "c"', ["c", "ababc"], ["ac", "abbc"]),
    ('root ::= "a"{2}', ["aa"], ["a", "aaa"]),
    ('root ::= "a"{2,}', ["aa", "aaaaa"], ["", "a"]),
    ('root ::= "a"{1,3}', ["a", "aa", "aaa"], ["", "aaaa"]),
    ('root ::= "a"{ 0 , 2 }', ["", "a", "aa"], ["aaa"]),
    ('root ::= "a"{0} "b"', ["b"], ["ab"]),
    ('root ::= "a"{2}{2}', ["aaaa"], ["aa", "aaa"]),
    ('root ::= ("a" | "b")+ "c"', ["ac", "abbac"], ["c", "ab"]),
    ('root ::= ("a"?)* "b"', ["b", "aaab"], ["a", "c"]),
    ('root ::= (("a" | "")* "b"?)*', ["", "aabba"], ["c"]),
    ('root ::= x "-" x\nx ::= [0-9]+', ["1-2", "12-345"], ["1-", "-1"]),
    ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "x)", "()"]),
    ('root ::= "a" root "b" |', ["", "ab", "aaabbb"], ["a", "aab", "ba"]),
    ('root ::= "a" |\n  "b"', ["a", "b"], [""]),
    ('root ::= (\n  "a" # one\n  "b"\n)', ["ab"], ["a"]),
    ('# first\nroot ::= "a" # last', ["a"], ["#"]),
    ('root ::= "a"\r\nb ::= "c"\r\n', ["a"], ["c"]),
    ('root ::= "a"\nroot ::= "b"', ["b"], ["a"]),
    ('root ::= "é€😀"', ["é€😀"], ["e"]),
    ('root ::= [а-я]+ "\\u20ac\\U0001F600\\x41"', ["да€😀A"], ["da€😀A"]),
    (r'root ::= "\n\r\t\\\"\[\]"', ['\n\r\t\\"[]'], ["n"]),
    (r"root ::= [\]\\\[\n]", ["]", "\\", "[", "\n"], ["n"]),
    ("root ::= Rule-2\nRule-2 ::= .", ["x"], [""]),
]


@pytest.mark.parametrize(("grammar", "inside", "outside"), MEANINGS)
def test_a_grammar_means(grammar: str, inside: list[str], outside: list[str]) -> None:
    assert [text for text in inside if not follows(grammar, text)] == []
    assert [text for text in outside if follows(grammar, text)] == []


ERRORS = [
    ("", "the grammar is empty"),
    (" # nothing\n", "the grammar is empty"),
    ('start ::= "a"', "no rule named root"),
    ('root = "a"', r"line 1, column 6: expected ::= behind the name root, not '= "),
    ('root ::= "a"\n| "b"', r"""line 2, column 1: expected the name of a rule, not '\| "b"'"""),
    ('root ::= "a" )', "line 1, column 14: expected the end of the rule root, not '\\)'"),
    ('root ::= ("a"\n', "line 1, column 10: this parenthesis is never closed"),
    ('root ::= ("a" ; )', r"line 1, column 15: expected \), not '; \)'"),
    ('root ::= "a\n', "line 1, column 10: this literal is never closed"),
    ("root ::=\n  [a-z", "line 2, column 3: this set is never closed"),
    (r'root ::= "é" "\q"', r"line 1, column 15: unknown escape '\\\\q'"),
    (r'root ::= "\x4"', "line 1, column 11: unknown escape"),
    (r'root ::= "\u12g4"', "line 1, column 11: unknown escape"),
    ('root ::= "a\\', "line 1, column 12: unknown escape"),
    ("root ::= *", r"line 1, column 10: nothing stands before \* to repeat"),
    ('root ::= "" +', r"line 1, column 13: nothing stands before \+ to repeat"),
    ('root ::= "a"{x}', r"line 1, column 13: expected \{m\}, \{m,\} or \{m,n\}"),
    ('root ::= "a"{,3}', r"line 1, column 13: expected \{m\}"),
    ('root ::= "a"{3,2}', "line 1, column 13: at most 2 is less than at least 3"),
    (
        'root ::= "a"{1000000}',
        f"line 1, column 13: the repetition makes .* {MAX_ELEMENTS} elements",
    ),
    ('root ::= "a"{0,99999999999999999999}', "line 1, column 13: the repetition makes"),
    ('root ::= "a"\nb ::= c', "line 2, column 7: the rule c is not defined"),
    ('root ::= root "a" | "b"', "line 1, column 1: the rule root can begin with itself"),
    ("root ::= a\na ::= b\nb ::= a | [x]", "line 2, column 1: the rule a can begin with itself"),
    ('root ::= e e root "a" | "b"\ne ::= f f\nf ::= "x" |', "the rule root can begin with itself"),
    ('root ::= ("a"? root)*', "can begin with itself"),
    ("root ::= " + "(" * 5000, "more than 100 parentheses"),
]


@pytest.mark.parametrize(("grammar", "complaint"), ERRORS, ids=range(len(ERRORS)))
def test_a_grammar_that_cannot_be_read_is_refused_with_its_place(
    grammar: str, complaint: str
) -> None:
    with pytest.raises(GrammarError, match=complaint) as caught:
        parse_grammar(grammar)
    assert "\n" not in str(caught.value)


def test_sets_are_sorted_ranges_apart_from_each_other() -> None:
    grammar = parse_grammar("root ::= [d-fa-bce-z] [^b-y] .")
    last = LAST_CODE_POINT
    assert grammar.terminals == (
        ((ord("a"), ord("z")),),
        ((0, ord("a")), (ord("z"), last)),
        ((0, last),),
    )


def test_a_repetition_of_many_costs_one_element_each() -> None:
    grammar = parse_grammar('root ::= "a long literal"{1000}')
    assert len(grammar.rules[0][0]) == 1000


def test_thousands_of_optional_characters_are_followed() -> None:
    assert follows('root ::= "[" [a-z]{0,20000} "]"', "[" + "abcdefghij" * 1000 + "]")
