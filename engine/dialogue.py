"""Turns: when the model hands over, and what a person's turn becomes in the context.

Nothing here knows of terminals. A `Dialogue` is given somebody who shows pieces of text and asks
for a person's next words (`Partner`), and a form that those words take (`Turns`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from engine.errors import DataError
from engine.escapes import resolve_escapes
from engine.generate import Generation

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from engine.tokenizer.chat import ChatTemplate

# Tokens of the text in which a reverse prompt is looked for, and how far from its end one may stand
# where nobody can answer: the token that completes it may bring more characters along.
_SEARCHED_TOKENS = 32
_PADDING = 2

# Stands in for an answer while a template is asked what it writes behind one.
_PLACEHOLDER = "\ufdd2"


class ReversePrompts:
    """Texts that hand over to the person, or end a run where there is none.

    Parameters
    ----------
    texts : sequence of bytes
    tokenizer : Tokenizer
    exact : bool
        Only at the very end of the text.
    """

    def __init__(self, texts: Sequence[bytes], tokenizer: Tokenizer, *, exact: bool) -> None:
        self.texts = [text for text in texts if text]
        self._tokenizer = tokenizer
        self._padding = 0 if exact else _PADDING
        encoded = [tokenizer.encode(text, parse_special=True) for text in self.texts]
        self._single = {ids[0] for ids in encoded if len(ids) == 1}
        self._recent: deque[bytes] = deque(maxlen=_SEARCHED_TOKENS)
        self._last = -1

    def push(self, tokens: Sequence[int]) -> bool:
        """Take note of tokens of the text; returns whether one of the texts is at its end."""
        for token in tokens:
            self._recent.append(self._tokenizer.piece(token, True))
            self._last = token
        return self._met()

    def forget(self) -> None:
        """Begin a new text."""
        self._recent.clear()
        self._last = -1

    def _met(self) -> bool:
        if not self.texts:
            return False
        text = b"".join(self._recent)
        starts = ((t, max(0, len(text) - len(t) - self._padding)) for t in self.texts)
        return self._last in self._single or any(text.find(t, at) >= 0 for t, at in starts)


class Turns(Protocol):
    """What a person's words become."""

    shown_prefix: bytes
    shown_suffix: bytes
    silence: list[int]  # a turn without words, which lets the model go on

    def tokens(self, words: bytes, answer: bytes | None, *, reversed_: bool) -> list[int]:
        """Make a turn.

        Parameters
        ----------
        words : bytes
            Need not be UTF-8.
        answer : bytes or None
            What the model has said since the last turn; None before the first.
        reversed_ : bool
            The text ends with a reverse prompt, which may have opened the turn.
        """

    @property
    def ends_answers(self) -> bool:
        """Whether a turn brings the end of the answer before it: the model's own is dropped."""


class PlainTurns:
    """Words between a prefix and a suffix.

    Parameters
    ----------
    tokenizer : Tokenizer
    prefix, suffix : bytes
        Control tokens spelled in them are tokens.
    begin : bool
        Put BOS in front of the prefix.
    shown : bool
        Prefix and suffix are part of the text that is shown.
    unless_reversed : bool
        Leave the prefix out where a reverse prompt stands in its place.
    """

    ends_answers = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix: bytes = b"",
        suffix: bytes = b"",
        *,
        begin: bool = False,
        shown: bool = True,
        unless_reversed: bool = False,
    ) -> None:
        self.shown_prefix = prefix if shown else b""
        self.shown_suffix = suffix if shown else b""
        self._tokenizer = tokenizer
        self._unless_reversed = unless_reversed
        self._prefix = tokenizer.encode(prefix, parse_special=True)
        self._suffix = tokenizer.encode(suffix, parse_special=True)
        if begin and tokenizer.bos_id < 0:
            raise DataError("--in-prefix-bos: the model has no BOS token; leave it out")
        self.silence = [tokenizer.bos_id] if begin else []

    def tokens(self, words: bytes, answer: bytes | None, *, reversed_: bool) -> list[int]:
        """Make a turn; see `Turns`."""
        prefix = [] if reversed_ and self._unless_reversed else self._prefix
        return [*self.silence, *prefix, *self._tokenizer.encode(words), *self._suffix]


class ChatTurns:
    """Words as messages in a model's chat template.

    Parameters
    ----------
    template : ChatTemplate
    tokenizer : Tokenizer
    system : bytes
        The message before all others; empty: none, the template may have one of its own.
    """

    shown_prefix = shown_suffix = b""
    ends_answers = True

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, system: bytes = b"") -> None:
        from engine.tokenizer.chat import ChatEncoder

        self._template = template
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer)
        self._messages: list[dict[str, str]] = []
        self.silence: list[int] = []
        if system:
            self._add("system", system)
        self._opening = self._before_words()

    @property
    def opening(self) -> list[int]:
        """Tokens that can be evaluated before anything is said."""
        return list(self._opening)

    def tokens(self, words: bytes, answer: bytes | None, *, reversed_: bool) -> list[int]:
        """Make a turn; see `Turns`. The first one continues the opening."""
        if answer is None:
            text = words.decode("utf-8", "surrogateescape")
            turn = self._first_turn(self._encoder.quote(text))
            self._add("user", words)
            n = len(self._opening)
            if turn[:n] != self._opening:
                raise DataError("the chat template's beginning depends on what follows it")
            return turn[n:]
        return self._next_turn(words, answer)

    def _before_words(self) -> list[int]:
        """Tokens that the first words cannot change: up to the last control token before them.

        Text behind it may be joined with words into one token.
        """
        first, second = (self._first_turn(words) for words in ("A", "\n\n1"))
        opening: list[int] = []
        for i, (token, other) in enumerate(zip(first, second, strict=False)):
            if token != other:
                break
            if not self._tokenizer.piece(token) and self._tokenizer.piece(token, True):
                opening = first[: i + 1]
        return opening

    def _first_turn(self, quoted: str) -> list[int]:
        text = self._template.render([*self._messages, _message("user", quoted)], True)
        tokens = self._encoder.encode([text])[0]
        bos = self._tokenizer.bos_id
        if self._tokenizer.add_bos and bos >= 0 and tokens[:1] != [bos]:
            return [bos, *tokens]
        return tokens

    def _next_turn(self, words: bytes, answer: bytes) -> list[int]:
        """Tokens from the end of an answer to where the next one begins."""
        quoted = self._encoder.quote(words.decode("utf-8", "surrogateescape"))
        turns = [_message("assistant", _PLACEHOLDER), _message("user", quoted)]
        text = self._template.render([*self._messages, *turns], True)
        _, found, behind = text.partition(_PLACEHOLDER)
        if not found:
            raise DataError("the chat template leaves answers out; talk without it, by --in-prefix")
        self._add("assistant", answer)
        self._add("user", words)
        return self._encoder.encode([_PLACEHOLDER, behind])[1]

    def _add(self, role: str, words: bytes) -> None:
        text = words.decode("utf-8", "surrogateescape").replace(_PLACEHOLDER, "")
        self._messages.append(_message(role, self._encoder.quote(text)))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Partner(Protocol):
    """The person's side."""

    def show(self, piece: bytes) -> None:
        """Show a piece of the text."""

    def ask(self) -> bytes | None:
        """Ask for the person's words, with their line break; None where there will be no more."""


class Dialogue:
    """A person and a model in turns, as the original's interactive mode has them.

    Parameters
    ----------
    generation : Generation
        Holds the prompt.
    tokenizer : Tokenizer
    turns : Turns
    partner : Partner
    reverse : ReversePrompts
        Has seen the prompt.
    asks_first : bool
        The person begins.
    opens_with_reverse : bool
        Where the model ends its text, the first reverse prompt is put in front of the next turn.
    escape : bool
        Resolve escapes in the person's words.
    piece : callable, optional
        From a token to the bytes that are shown of it.
    evaluated : callable, optional
        Called after each evaluation.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        turns: Turns,
        partner: Partner,
        reverse: ReversePrompts,
        *,
        asks_first: bool = False,
        opens_with_reverse: bool = True,
        escape: bool = True,
        piece: Callable[[int], bytes] | None = None,
        evaluated: Callable[[], None] = lambda: None,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._turns = turns
        self._partner = partner
        self._reverse = reverse
        self._escape = escape
        self._piece = piece or tokenizer.piece
        self._evaluated = evaluated
        self._reversed = reverse.push(())
        # Where no tokens are wanted, turns follow each other.
        self._mute = generation.n_predict == 0
        self._asks = asks_first or self._reversed or self._mute
        self._interrupted = False
        # Put in front of the next turn where the model has ended its text.
        self._opener: list[int] = []
        if opens_with_reverse and reverse.texts:
            self._opener = tokenizer.encode(reverse.texts[0], parse_special=True)
        self._injected: list[int] = []
        self._answer: bytearray | None = None

    def interrupt(self) -> bool:
        """Hand over after the token in the making; False where that was asked for already."""
        was, self._interrupted = self._interrupted, True
        return not was

    def run(self) -> None:
        """Talk until the person has no more to say, or the context is full (`n_predict` -2)."""
        if any(map(self._tokenizer.is_eog, self._generation.tokens[-1:])):
            self._end_answer()
        # What is there already is evaluated while the person thinks.
        if self._asks and not self._settle():
            return
        while True:
            while self._asks:
                if not self._take_turn() or (self._asks and not self._settle()):
                    return
            token = self._generation.step()
            if token is None:
                return
            self._show(token)
            self._evaluated()
            self._asks |= self._interrupted

    def _settle(self) -> bool:
        """Evaluate what is there; False where the context is full."""
        settled = self._generation.settle()
        if settled:
            self._evaluated()
        return settled

    def _show(self, token: int) -> None:
        self._partner.show(self._piece(token))
        self._reversed = self._reverse.push([token])
        self._asks = self._reversed
        if self._tokenizer.is_eog(token):
            self._end_answer()
        elif self._answer is not None:
            self._answer += self._tokenizer.piece(token, True)
        if self._generation.n_predict >= 0 >= self._generation.remaining:
            self._generation.remaining = self._generation.n_predict
            self._asks = True

    def _end_answer(self) -> None:
        self._partner.show(b"\n")
        self._asks = True
        if self._opener:
            self._injected = self._opener
            self._reversed = True

    def _take_turn(self) -> bool:
        generation, turns = self._generation, self._turns
        self._partner.show(turns.shown_prefix)
        words = self._partner.ask()
        self._interrupted = False
        if words is None:
            return False
        generation.forget_history()
        self._reverse.forget()
        tokens, self._injected = self._injected, []
        if words in (b"", b"\n"):
            self._feed(tokens + turns.silence)
            return True
        self._partner.show(turns.shown_suffix)
        if self._escape:
            words = resolve_escapes(words)
        self._feed(tokens + self._tokens(words))
        if generation.n_predict >= 0:
            generation.remaining -= len(self._tokenizer.encode(words))
            # The original takes so long a turn for the answer, too, and asks again.
            if generation.remaining <= 0:
                generation.remaining = generation.n_predict
        return True

    def _tokens(self, words: bytes) -> list[int]:
        answer = self._answer
        if self._turns.ends_answers:
            words = words.removesuffix(b"\n")
            if answer is not None and self._ends_with_end():
                self._generation.rewind(len(self._generation.tokens) - 1)
        self._answer = bytearray()
        return self._turns.tokens(
            words, None if answer is None else bytes(answer), reversed_=self._reversed
        )

    def _ends_with_end(self) -> bool:
        return self._tokenizer.is_eog(self._generation.tokens[-1])

    def _feed(self, tokens: Sequence[int]) -> None:
        self._generation.feed(tokens)
        # A turn that ends like a reverse prompt hands back at once, as in the original.
        self._reversed = self._reverse.push(tokens)
        self._asks = self._reversed or self._mute
