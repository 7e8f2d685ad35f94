"""The parser over rows, on a small table."""

from __future__ import annotations

import re

import pytest

from engine.errors import OptionError
from engine.tools.options import (
    COMMANDS,
    Option,
    OptionTable,
    UsageError,
    _document,
    argument,
    choice,
    in_group,
    leading_float,
    not_offered,
    real,
    seed,
    table_of,
    text,
    whole,
)

TABLE = OptionTable(
    "toy",
    in_group(
        "things",
        Option(("-h", "--help"), "help", "show this text", stops=True),
        Option(("-n", "--number-of-things"), "number", "how many", (whole(low=1),), default=3),
        Option(("--ratio",), "ratio", "how much", (real(low=0, below=1.0),), default=0.5),
        Option(("--floor",), "floor", "at least", (real(above=0.0),), default=1.0),
        Option(("-s", "--seed"), "seed", "seed", (seed(),), default=7),
        Option(("--name",), "name", "a | name", (text("STR"),), default=""),
        Option(("--kind",), "kind", "which", (choice("a", "b"),), default="a"),
        Option(("--on",), "switch", "turn it on", default=False),
        Option(("--off",), "switch", "turn it off", default=False, constant=False),
        Option(("--pair",), "pairs", "two values", (text("FNAME"), real("S")), repeat=True),
        Option(
            ("--single",), "pairs", "one", (text("F"),), repeat=True, make=lambda name: (name, 1.0)
        ),
    )
    + not_offered("not offered yet", "-x|--extra-thing", "--other"),
)


def parse(*arguments: str):
    return TABLE.parse(arguments).values


def test_without_arguments_every_field_has_its_default():
    assert parse() == {
        "number": 3, "ratio": 0.5, "floor": 1.0, "seed": 7, "name": "", "kind": "a",
        "switch": False, "pairs": (),
    }  # fmt: skip


@pytest.mark.parametrize(
    "spelling", ["-n", "--number-of-things", "--number_of_things", "--number-of_things"]
)
def test_long_names_take_hyphens_and_underscores(spelling):
    assert parse(spelling, "5")["number"] == 5


def test_underscores_in_values_and_short_names_stay():
    assert parse("--name", "--a_b")["name"] == "--a_b"
    with pytest.raises(UsageError, match="unknown argument: -h_h"):
        parse("-h_h")


def test_a_value_may_begin_with_a_hyphen():
    assert parse("--name", "--on") == {**parse(), "name": "--on"}


def test_a_value_is_never_joined_by_an_equals_sign():
    with pytest.raises(UsageError, match=r"unknown argument: --ratio=0\.1"):
        parse("--ratio=0.1")


def test_the_last_of_a_repeated_option_counts():
    assert parse("-n", "4", "--on", "-n", "9", "--off") == {**parse(), "number": 9}


def test_repeatable_options_keep_their_order():
    given = ["--pair", "a", "0.5", "--single", "b", "--pair", "c", "-2"]
    assert parse(*given)["pairs"] == (("a", 0.5), ("b", 1.0), ("c", -2.0))


def test_given_names_the_fields_that_were_set():
    assert TABLE.parse(["--off", "-n", "3"]).given == {"switch", "number"}


def test_help_acts_where_it_stands():
    assert TABLE.parse(["-n", "0", "-h", "--nonsense"]).stopped_by == "help"
    with pytest.raises(UsageError, match="unknown argument: --nonsense"):
        TABLE.parse(["--nonsense", "-h"])


def test_an_unknown_argument_is_shown_as_it_was_compared():
    with pytest.raises(UsageError, match=r"^unknown argument: --foo-bar$"):
        parse("--foo_bar")
    with pytest.raises(UsageError, match=r"^unknown argument: stray_word$"):
        parse("stray_word")


@pytest.mark.parametrize("arguments", [["-n"], ["--pair", "a"], ["--name"]])
def test_a_missing_value_names_the_option(arguments):
    message = f"^invalid parameter for argument: {arguments[0]}$"
    with pytest.raises(UsageError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("-n", ""), ("-n", "abc"), ("-n", "-"), ("-n", "2147483648"), ("-n", "9" * 5000),
        ("--ratio", "x1"), ("--ratio", "nan"), ("--ratio", "inf"), ("--ratio", "1e39"),
        ("--seed", "4294967296"), ("--seed", "-2147483649"), ("--kind", "c"),
    ],
)  # fmt: skip
def test_a_malformed_value_names_the_option_and_the_value(option, value):
    with pytest.raises(UsageError) as caught:
        parse(option, value)
    assert str(caught.value).startswith(f"invalid parameter for argument: {option}: '{value}' is")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "-n: 0 is below 1"),
        (["--number_of_things", "-5"], "--number-of-things: -5 is below 1"),
        (["--ratio", "-0.1"], "--ratio: -0.1 is below 0"),
        (["--ratio", "1"], "--ratio: 1 is not below 1"),
        (["--floor", "0"], "--floor: 0 is not above 0"),
    ],
)
def test_a_value_out_of_range_names_the_option(arguments, message):
    with pytest.raises(OptionError) as caught:
        parse(*arguments)
    assert str(caught.value) == message
    assert not isinstance(caught.value, UsageError)


def test_a_later_value_in_range_mends_an_earlier_one():
    assert parse("-n", "0", "-n", "2")["number"] == 2


@pytest.mark.parametrize(
    ("value", "number", "shown"), [("32x", 32, "32"), ("1.9", 1, "1"), (" 7", 7, None)]
)
def test_the_leading_number_is_taken_and_the_rest_is_told(value, number, shown):
    parsed = TABLE.parse(["-n", value])
    assert parsed.values["number"] == number
    told = (f"-n: '{value}' is read as {shown}",) if shown else ()
    assert parsed.warnings == told


@pytest.mark.parametrize("value", ["32x", "1.9", "56,080"])
def test_a_strict_table_refuses_what_stands_after_a_number(value):
    strict = OptionTable(TABLE.program, TABLE.rows, strict_numbers=True)
    assert strict.parse(["-n", " 7 "]).values["number"] == 7
    with pytest.raises(UsageError, match=f"argument: -n: '{value}' is not a number: '"):
        strict.parse(["-n", value])


@pytest.mark.parametrize(
    ("argument", "value", "rest"),
    [("1e-3", 1e-3, ""), (".5", 0.5, ""), ("2.", 2.0, ""), ("-3.5abc", -3.5, "abc"), ("1e", 1, "e"),
     ("+inf", float("inf"), ""), ("1_000", 1, "_000")],
)  # fmt: skip
def test_a_float_is_read_as_far_as_it_goes(argument, value, rest):
    assert leading_float(argument) == (value, rest)


@pytest.mark.parametrize(
    ("argument", "kept"),
    [("-1", 2**32 - 1), ("4294967295", 2**32 - 1), ("0", 0), ("-2147483648", 2**31)],
)
def test_seeds_are_32_bits_signed_or_unsigned(argument, kept):
    assert parse("--seed", argument)["seed"] == kept


@pytest.mark.parametrize("spelling", ["-x", "--extra_thing", "--other"])
def test_a_refused_option_is_refused_by_name(spelling):
    with pytest.raises(OptionError) as caught:
        parse(spelling, "value")
    name = spelling.replace("_", "-")
    assert str(caught.value) == f"option {name} of the original is not offered yet"


def test_two_rows_cannot_share_a_spelling():
    row = Option(("--same",), "a")
    with pytest.raises(ValueError, match="two rows"):
        OptionTable("toy", (row, row))


def test_the_usage_lists_every_spelling_and_default():
    usage = TABLE.usage()
    assert usage.startswith("usage: toy [options]\n\nthings:\n")
    assert re.search(r"-n, --number-of-things N +how many \(default: 3\)", usage)
    assert re.search(r"--kind \{a,b\} +which \(default: a\)", usage)
    assert re.search(r"--name STR +a \| name \(default: empty\)", usage)
    assert usage.endswith("refused:\n  --extra-thing --other\n")
    assert max(map(len, usage.splitlines())) <= 100


def test_the_documentation_lists_every_row_once():
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "### things"
    assert "| `-n N`, `--number-of-things N` | 3 | how many |" in lines
    assert r"| `--name STR` | empty | a \| name |" in lines
    assert "| `-x`, `--extra-thing` | not offered yet |" in lines
    assert sum(line.startswith("| `") for line in lines) == len(TABLE.rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_have_complete_tables(command):
    table = table_of(command)
    assert table.program == command
    for row in table.offered():
        assert row.help and row.group and row.dest
    named = [row for row in table.rows if not row.positional]
    for name in [name for row in named for name in row.spellings]:
        assert re.fullmatch(r"-[a-z]+|--[a-z0-9]+(-[a-z0-9]+)*", name)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_documentation_of_a_command_is_printed_by_name(command, capsys):
    assert _document([command]) == 0
    assert capsys.readouterr().out == table_of(command).markdown()


def test_without_a_name_the_commands_are_listed(capsys):
    assert _document([]) == 0
    assert capsys.readouterr().out.split() == list(COMMANDS)


FILES = OptionTable(
    "copy",
    in_group(
        "arguments",
        argument("IN", "source", "what to copy"),
        argument("OUT", "target", "where to", required=False),
        argument("WORD", "words", "what else", required=False, repeat=True),
        Option(("--fast",), "fast", "quickly", default=False),
    ),
)


def test_arguments_that_are_no_options_go_by_their_place():
    assert FILES.parse(["a_b", "--fast", "c", "d", "e"]).values == {
        "source": "a_b", "target": "c", "words": ("d", "e"), "fast": True,
    }  # fmt: skip
    assert FILES.parse(["IN"]).values == {"source": "IN", "target": "", "words": (), "fast": False}


def test_an_argument_that_must_be_there_is_missed():
    with pytest.raises(UsageError, match=r"^IN is missing$"):
        FILES.parse(["--fast"])


def test_a_hyphen_makes_no_file():
    with pytest.raises(UsageError, match="unknown argument: -slow"):
        FILES.parse(["a", "-slow"])


def test_more_arguments_than_places_are_unknown():
    with pytest.raises(UsageError, match="unknown argument: 5"):
        parse("5")


def test_the_usage_shows_the_places():
    lines = FILES.usage().splitlines()
    assert lines[0] == "usage: copy [options] IN [OUT] [WORD ...]"
    assert "  IN                              what to copy" in lines
    assert "| `OUT` |  | where to |" in FILES.markdown().splitlines()


@pytest.mark.parametrize("arguments", [["no-such-command"], ["main", "finetune"]])
def test_the_documentation_of_nothing_known_is_refused(arguments, capsys):
    assert _document(arguments) == 1
    assert capsys.readouterr().err.startswith("usage: ")
