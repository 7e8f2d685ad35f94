"""Characters come out whole, whatever the pieces."""

from __future__ import annotations

import numpy as np
import pytest

from engine.tokenizer import StreamDecoder, Tokenizer


@pytest.mark.parametrize(
    ("pieces", "texts"),
    [
        ([b"abc"], ["abc", ""]),
        ([b"\xe4\xb8", b"\xad", b"x"], ["", "中", "x", ""]),
        ([b"\xf0", b"\x9f", b"\x98", b"\x80"], ["", "", "", "😀", ""]),
        ([b"a\xc3", b"\xa9\xc3", b"\xa9"], ["a", "é", "é", ""]),
        ([b"\xe4\xb8", b"a"], ["", "\ufffda", ""]),  # certain once the next byte does not fit
        ([b"\xe4\xb8"], ["", "\ufffd"]),
        ([b"\xff", b"\x80"], ["\ufffd", "\ufffd", ""]),  # certain at once
        ([b"\xed\xa0", b"\x80"], ["", "\ufffd\ufffd\ufffd", ""]),  # no surrogate is a character
        ([b"\xc0", b"\x80"], ["\ufffd", "\ufffd", ""]),
        ([b"", b"\xc3", b"", b"\xa9"], ["", "", "", "é", ""]),
        ([b"\xc3", b"\xc3", b"\xa9"], ["", "\ufffd", "é", ""]),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(pieces: list[bytes], texts: list[str]) -> None:
    decoder = StreamDecoder()
    assert [*map(decoder.feed, pieces), decoder.flush()] == texts


def test_any_cutting_gives_the_same_text(rng: np.random.Generator) -> None:
    text = "aé中😀 \u0301\U0010ffff" * 8
    for data in (text.encode(), rng.bytes(200), text.encode()[:-1] + b"\xf0\x9f"):
        for _ in range(50):
            cuts = np.sort(rng.integers(0, len(data) + 1, 30)).tolist()
            decoder = StreamDecoder()
            pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
            parts = [decoder.feed(piece) for piece in pieces]
            assert "".join([*parts, decoder.flush()]) == data.decode(errors="replace")


def test_a_flushed_decoder_starts_anew() -> None:
    decoder = StreamDecoder()
    decoder.feed(b"\xe4\xb8")
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(b"\xad") == "\ufffd"
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", ["mini", "smollm2"])
def test_pieces_of_a_model_never_show_half_a_character(
    name: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    text = "naïve 日本語 😀👨‍👩‍👧 ፊደል 𓀀"
    pieces = [tokenizer.piece(token) for token in tokenizer.encode(text)]
    broken = [piece for piece in pieces if "\ufffd" in piece.decode(errors="replace")]
    assert broken, "the text should make the vocabulary split a character"
    decoder = StreamDecoder()
    parts = [decoder.feed(piece) for piece in pieces]
    assert "\ufffd" not in "".join(parts)
    assert ("".join(parts) + decoder.flush()).strip() == text
