"""Which tokens may follow: random grammars against a plain recogniser that shares nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from engine.errors import DataError, ShapeError
from engine.grammar import GrammarError, GrammarMatcher, TokenTable, parse_grammar

ALPHABET = "abcé€😀"
END = 40
PIECES = [
    b"", b"a", b"b", b"c", b"ab", b"abc", b"ba", b"bb", b"cab", b"aaaa", b"\0", b"a\0b",
    "é".encode(), "€".encode(), "😀".encode(), "aé€".encode(), b"<ctrl>",
    *(bytes([byte]) for byte in sorted({*"é€😀".encode()})),
    b"a\xc3", b"\xa9b", b"\xe2\x82", b"\x82\xac", b"\x98\x80a", b"\xf0\x9f", b"c\xff", b"\xc0",
]  # fmt: skip
PIECES += [b""] * (END - len(PIECES)) + [b"</s>"]
TOKENS = TokenTable(PIECES, [END])
BYTES = TokenTable([bytes([i]) for i in range(256)], [])


def matcher(grammar: str) -> GrammarMatcher:
    return GrammarMatcher(parse_grammar(grammar), TOKENS)


def token(piece: bytes) -> int:
    return PIECES.index(piece)


# ---------------------------------------------------------------- random grammars and a recogniser


@dataclass
class Node:
    """A part of a grammar: its kind, its text in GBNF, and what the kind needs."""

    kind: str
    text: str
    parts: list[Node] = field(default_factory=list)
    signs: str = ""
    negated: bool = False
    low: int = 0
    high: int = 0
    rule: int = 0


ENDLESS = 99


def random_node(rng: np.random.Generator, depth: int, rule: int, n_rules: int) -> Node:
    """Make a part; a rule refers to later ones alone, so that none is left-recursive."""
    kinds = ["literal", "set", "any"]
    kinds += ["sequence", "choice", "repeat", "repeat"] * (depth > 0)
    kinds += ["rule"] * (rule + 1 < n_rules) + ["nested"] * (depth > 0)
    kind = str(rng.choice(kinds))
    below = [random_node(rng, depth - 1, rule, n_rules) for _ in range(2)] if depth else []
    if kind == "literal":
        signs = "".join(rng.choice(list(ALPHABET), int(rng.integers(1, 4))))
        return Node(kind, f'"{signs}"', signs=signs)
    if kind == "set":
        signs = "".join(rng.choice(list(ALPHABET), int(rng.integers(1, 4))))
        negated = bool(rng.random() < 0.3)
        return Node(kind, f"[{'^' * negated}{signs}]", signs=signs, negated=negated)
    if kind == "any":
        return Node(kind, ".")
    if kind == "rule":
        other = int(rng.integers(rule + 1, n_rules))
        return Node(kind, f"rule-{other}", rule=other)
    if kind == "nested":  # a rule within itself, behind a terminal
        return Node("sequence", f'("c" rule-{rule} "b" | "a")', [Node("nested", "", rule=rule)])
    if kind == "repeat":
        low = int(rng.integers(0, 3))
        high = int(rng.choice([low, low + 2, ENDLESS]))
        bound = {low: f"{{{low}}}", ENDLESS: f"{{{low},}}"}.get(high, f"{{{low},{high}}}")
        short = {(0, ENDLESS): "*", (1, ENDLESS): "+"}.get((low, high), bound)
        return Node(kind, f"({below[0].text}){short}", below[:1], low=low, high=high)
    joined = (" " if kind == "sequence" else " | ").join(part.text for part in below)
    return Node(kind, f"({joined})", below)


class Recogniser:
    """Ends of all matches from a place, by trying everything; memory makes it finite."""

    def __init__(self, rules: list[Node], text: str) -> None:
        self.rules, self.text = rules, text
        self.known: dict[tuple[int, int], set[int]] = {}

    def ends(self, node: Node, at: int) -> set[int]:
        key = (id(node), at)
        if key not in self.known:
            self.known[key] = self.find(node, at)
        return self.known[key]

    def find(self, node: Node, at: int) -> set[int]:
        text = self.text
        if node.kind == "literal":
            return {at + len(node.signs)} if text.startswith(node.signs, at) else set()
        if node.kind == "set":
            is_inside = at < len(text) and (text[at] in node.signs) != node.negated
            return {at + 1} if is_inside else set()
        if node.kind == "any":
            return {at + 1} if at < len(text) else set()
        if node.kind == "rule":
            return self.ends(self.rules[node.rule], at)
        if node.kind == "choice":
            return set().union(*(self.ends(part, at) for part in node.parts))
        if node.kind == "nested":
            found = {at + 1} if text.startswith("a", at) else set()
            if text.startswith("c", at):
                inner = self.ends(self.rules[node.rule], at + 1)
                found |= {end + 1 for end in inner if text.startswith("b", end)}
            return found
        if node.kind == "sequence":
            places = {at}
            for part in node.parts:
                places = set().union(*(self.ends(part, place) for place in places))
            return places
        return self.repeated(node, at)

    def repeated(self, node: Node, at: int) -> set[int]:
        places, found = {at}, {at} if node.low == 0 else set()
        for n in range(1, min(node.high, node.low + len(self.text) + 1) + 1):
            places = set().union(*(self.ends(node.parts[0], place) for place in places))
            if n >= node.low:
                found |= places
        return found

    def accepts(self) -> bool:
        return len(self.text) in self.ends(self.rules[0], 0)


def random_grammar(rng: np.random.Generator) -> tuple[str, list[Node]]:
    n_rules = int(rng.integers(1, 4))
    rules = [random_node(rng, 2, rule, n_rules) for rule in range(n_rules)]
    lines = ["root ::= rule-0", *(f"rule-{i} ::= {rule.text}" for i, rule in enumerate(rules))]
    return "\n".join(lines), rules


def accepts(grammar: str, text: str) -> bool:
    """Follow a text byte by byte."""
    follow = GrammarMatcher(parse_grammar(grammar), BYTES)
    for byte in text.encode():
        if not follow.allows(byte):
            return False
        follow.accept(byte)
    return follow.may_end


def generate(matcher: GrammarMatcher, rng: np.random.Generator, most: int) -> bytes | None:
    """Choose allowed tokens at random until the text ends; None if it does not in time."""
    matcher.reset()
    text = b""
    for _ in range(most):
        allowed = np.flatnonzero(matcher.allowed())
        assert allowed.size or not matcher.may_end
        if not allowed.size:
            return None  # a set of characters that this vocabulary cannot write
        chosen = END if matcher.may_end and rng.random() < 0.3 else int(rng.choice(allowed))
        if chosen == END:
            return text
        matcher.accept(chosen)
        text += PIECES[chosen].partition(b"\0")[0]
    return None


@pytest.mark.parametrize("case", range(30))
def test_what_a_random_grammar_generates_it_accepts_and_no_more(
    case: int, rng: np.random.Generator
) -> None:
    for _ in range(3):
        grammar, rules = random_grammar(rng)
        follow = matcher(grammar)
        for _ in range(6):
            raw = generate(follow, rng, 25)
            if raw is None:
                continue
            text = raw.decode()
            assert accepts(grammar, text), (grammar, text)
            assert Recogniser(rules, text).accepts(), (grammar, text)
            for _ in range(6):
                mutated = mutate(text, rng)
                expected = Recogniser(rules, mutated).accepts()
                assert accepts(grammar, mutated) == expected, (grammar, mutated)


def mutate(text: str, rng: np.random.Generator) -> str:
    signs = list(text)
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(len(signs) + 1))
        sign = str(rng.choice(list(ALPHABET)))
        signs[at : at + int(rng.integers(0, 2))] = [sign] * int(rng.integers(0, 2))
    return "".join(signs)


def test_the_recogniser_accepts_and_refuses_by_itself() -> None:
    """It must not agree with everything."""
    a = Node("literal", '"a"', signs="a")
    rules = [Node("repeat", '("a"){1,2}', [a], low=1, high=2)]
    assert [Recogniser(rules, text).accepts() for text in ("", "a", "aa", "aaa", "b")] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_random_grammars_generate_texts_of_many_lengths(rng: np.random.Generator) -> None:
    lengths = set()
    for _ in range(60):
        raw = generate(matcher(random_grammar(rng)[0]), rng, 25)
        lengths |= {-1 if raw is None else len(raw)}
    assert len(lengths) > 5


@pytest.mark.parametrize("case", range(20))
def test_all_tokens_at_once_are_each_token_by_itself(case: int, rng: np.random.Generator) -> None:
    follow = matcher(random_grammar(rng)[0])
    for _ in range(15):
        allowed = follow.allowed()
        assert allowed.tolist() == [follow.allows(i) for i in range(len(PIECES))]
        others = np.flatnonzero(allowed[:END])
        if not others.size:
            break
        follow.accept(int(rng.choice(others)))


# ---------------------------------------------------------------- characters in parts


def test_a_token_may_end_inside_of_a_character_that_is_allowed() -> None:
    follow = matcher('root ::= "é" "b"?')
    assert [PIECES[i] for i in np.flatnonzero(follow.allowed())] == ["é".encode(), b"\xc3"]
    follow.accept(token(b"\xc3"))
    assert [PIECES[i] for i in np.flatnonzero(follow.allowed())] == [b"\xa9", b"\xa9b"]
    assert not follow.may_end
    follow.accept(token(b"\xa9"))
    assert follow.may_end and follow.allows(END)


def test_a_text_does_not_end_inside_of_a_character() -> None:
    follow = matcher("root ::= [é€]?")
    assert follow.may_end
    follow.accept(token(b"\xe2\x82"))
    assert not follow.may_end and not follow.allows(END)


def test_of_a_negated_set_the_first_byte_is_allowed_while_another_character_may_come() -> None:
    follow = matcher("root ::= [^é]")
    follow.accept(token(b"\xc3"))
    assert not follow.allows(token(b"\xa9"))


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"\xc0\x80", b"\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc3a",
     b"\xf0\x80\x80\x80", b"\xe2\x82a"],
)  # fmt: skip
def test_what_is_not_utf8_never_follows(raw: bytes) -> None:
    follow = GrammarMatcher(parse_grammar("root ::= .*"), BYTES)
    for byte in raw:
        if not follow.allows(byte):
            return
        follow.accept(byte)
    pytest.fail(f"{raw!r} was read as UTF-8")


@pytest.mark.parametrize(
    "code", [0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF]
)
def test_characters_at_the_borders_of_utf8_follow(code: int) -> None:
    follow = GrammarMatcher(parse_grammar(f"root ::= [\\U{code:08X}]"), BYTES)
    for byte in chr(code).encode():
        assert np.flatnonzero(follow.allowed()).tolist() == [byte]
        follow.accept(byte)
    assert follow.may_end and not follow.allowed().any()


def test_pieces_end_at_a_zero_byte_and_empty_ones_never_follow() -> None:
    follow = matcher("root ::= .*")
    assert not follow.allows(token(b"")) and not follow.allows(token(b"\0"))
    only_a = matcher('root ::= "a"')
    assert only_a.allows(token(b"a\0b"))


def test_a_token_that_ends_the_text_leaves_everything_as_it_is() -> None:
    follow = matcher('root ::= "a"?')
    follow.accept(END)
    assert follow.allows(token(b"a")) and follow.may_end


def test_a_reset_begins_a_new_text() -> None:
    follow = matcher('root ::= "ab"')
    follow.accept(token(b"a"))
    follow.reset()
    assert [PIECES[i] for i in np.flatnonzero(follow.allowed())] == [b"a", b"ab", b"a\0b"]


def test_a_token_that_must_not_follow_and_ids_outside_are_refused() -> None:
    follow = matcher('root ::= "a"')
    with pytest.raises(DataError, match="must not follow"):
        follow.accept(token(b"b"))
    for bad in (-1, END + 1):
        with pytest.raises(ShapeError, match=f"token {bad} is not in the vocabulary"):
            follow.allows(bad)


def test_an_empty_vocabulary_allows_nothing() -> None:
    assert GrammarMatcher(parse_grammar("root ::= ."), TokenTable([], [])).allowed().size == 0


# ---------------------------------------------------------------- hard grammars


def test_texts_nest_as_deep_as_they_like() -> None:
    follow = matcher('root ::= "a" root "b" | "c"')
    for piece in [b"a"] * 3000 + [b"c"] + [b"b"] * 3000:
        follow.accept(token(piece))
    assert follow.may_end and not follow.allows(token(b"b"))


def test_many_optional_parts_do_not_multiply() -> None:
    follow = matcher("root ::= " + '"a"? ' * 300 + '"b"')
    for _ in range(300):
        follow.accept(token(b"a"))
    assert [PIECES[i] for i in np.flatnonzero(follow.allowed())] == [b"b"]


def test_a_grammar_of_too_many_readings_is_refused_not_followed_for_ever() -> None:
    follow = matcher('root ::= "a" root "b" | "a" root "c" | "a"')
    with pytest.raises(GrammarError, match="in more than 20000 ways"):
        for _ in range(40):
            follow.accept(token(b"a"))


def test_states_are_forgotten_when_there_are_many_and_the_text_goes_on() -> None:
    """Thirty thousand classes of characters leave room for some hundred states."""
    signs = "".join(f"\\U{code:08X}" for code in range(0x10000, 0x10000 + 2 * 15000, 2))
    follow = matcher(f'root ::= ("a"{{1}} "b" "c" "a" "b" "a" "a" "a"){{40}} [{signs}]')
    for piece in [b"a", b"b", b"c", b"a", b"b", b"a", b"a", b"a"] * 40:
        assert PIECES[np.flatnonzero(follow.allowed())[0]] == piece
        follow.accept(token(piece))
    assert not follow.allows(token(b"a"))
    follow.reset()
    assert follow.allows(token(b"a"))
