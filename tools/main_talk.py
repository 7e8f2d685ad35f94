"""The interactive use of `main`: from its options to a dialogue, and what ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import OptionError
from engine.escapes import resolve_escapes

from .console import note
from .main_options import MainOptions
from .main_terminal import Person

if TYPE_CHECKING:
    from engine.dialogue import Dialogue, PlainTurns, Turns
    from engine.generate import Generation
    from engine.model import Context, Model
    from engine.tokenizer import Tokenizer
    from engine.tokenizer.chat import ChatTemplate

_INSTRUCTION = b"### Instruction:\n\n"
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_NAMED_TEMPLATE = "tokenizer.chat_template."


@dataclass(slots=True)
class Plan:
    """How people and model take turns.

    Attributes
    ----------
    turns : Turns
    prompt : list of int or None
        Tokens to begin with; None: those of the text.
    text : bytes
        To begin with.
    reverse : list of bytes
        Reverse prompts.
    affixes : list of (str, bytes)
        What stands before and behind a turn, for the log.
    asks_first, opens_with_reverse, prompted : bool
        As in `Dialogue` and `Person`.
    """

    turns: Turns
    text: bytes
    reverse: list[bytes]
    prompt: list[int] | None = None
    affixes: Sequence[tuple[str, bytes]] = ()
    asks_first: bool = True
    opens_with_reverse: bool = False
    prompted: bool = True


def is_interactive(options: MainOptions) -> bool:
    """Whether people take turns; nothing but an option makes it so."""
    return any(
        (
            options.interactive,
            options.interactive_first,
            options.conversation,
            options.instruct,
            options.chatml,
        )
    )


def reverse_prompts(options: MainOptions) -> list[bytes]:
    """Give the texts that hand over."""
    return [_text(text, options) for text in options.reverse_prompts]


def make_plan(model: Model, text: bytes, options: MainOptions, warn: Callable[[str], None]) -> Plan:
    """Choose the form of turns.

    Raises
    ------
    OptionError
        If a template is asked for that is not there.
    """
    reverse = reverse_prompts(options)
    affixed = options.input_prefix or options.input_suffix or options.input_prefix_bos
    if options.chat_template and (not options.conversation or affixed):
        warn("--chat-template has no effect without --conversation, or beside --in-prefix")
    if options.instruct:
        return _instruct(model.tokenizer, text, reverse)
    if options.chatml:
        return _chatml(model.tokenizer, text, reverse)
    if options.conversation and not affixed:
        template = find_template(model, options.chat_template)
        if template is not None:
            return _conversation(template, model.tokenizer, text, reverse)
        warn("the model has no chat template; turns go in as they are")
    return _plain(model.tokenizer, text, reverse, options)


def find_template(model: Model, wanted: str) -> ChatTemplate | None:
    """Find a chat template.

    Parameters
    ----------
    wanted : str
        Its text, a file, ``chatml``, or one of those that the model names; empty: the model's own.

    Returns
    -------
    ChatTemplate or None
        None where the model has none and none is wanted.

    Raises
    ------
    OptionError
        If there is none of that name.
    """
    from engine.tokenizer.chat import ChatTemplate, chat_template

    metadata, tokenizer, source = model.file.metadata, model.tokenizer, str(model.file.path)
    if not wanted:
        return chat_template(metadata, tokenizer, source)
    if "{{" in wanted or "{%" in wanted:
        return ChatTemplate(wanted, tokenizer, "--chat-template")
    named = metadata.get(_NAMED_TEMPLATE + wanted)
    if isinstance(named, str):
        return ChatTemplate(named, tokenizer, source)
    if wanted == "chatml":
        return ChatTemplate(_CHATML, tokenizer, "--chat-template")
    if os.path.isfile(wanted):
        try:
            return ChatTemplate(Path(wanted).read_text(), tokenizer, wanted)
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--chat-template: {wanted}: {error}") from None
    names = [key.removeprefix(_NAMED_TEMPLATE) for key in metadata if _NAMED_TEMPLATE in key]
    raise OptionError(
        f"--chat-template: {wanted!r} is no file and no template of the model, which has "
        f"{', '.join(names) or 'none with a name'}; give a name, a file or a template's text"
    )


def _instruct(tokenizer: Tokenizer, text: bytes, reverse: list[bytes]) -> Plan:
    prefix, suffix = b"\n\n" + _INSTRUCTION, b"\n\n### Response:\n\n"
    turns = _hidden(tokenizer, prefix, suffix)
    return Plan(turns, text, [*reverse, _INSTRUCTION])


def _chatml(tokenizer: Tokenizer, text: bytes, reverse: list[bytes]) -> Plan:
    start = b"<|im_start|>user\n"
    turns = _hidden(tokenizer, b"\n" + start, b"<|im_end|>\n<|im_start|>assistant\n")
    return Plan(turns, b"<|im_start|>system\n" + text + b"<|im_end|>", [*reverse, start])


def _hidden(tokenizer: Tokenizer, prefix: bytes, suffix: bytes) -> PlainTurns:
    from engine.dialogue import PlainTurns

    return PlainTurns(tokenizer, prefix, suffix, shown=False, unless_reversed=True)


def _conversation(
    template: ChatTemplate, tokenizer: Tokenizer, text: bytes, reverse: list[bytes]
) -> Plan:
    from engine.dialogue import ChatTurns

    turns = ChatTurns(template, tokenizer, text)
    return Plan(turns, b"", reverse, prompt=turns.opening)


def _plain(tokenizer: Tokenizer, text: bytes, reverse: list[bytes], options: MainOptions) -> Plan:
    from engine.dialogue import PlainTurns

    prefix, suffix = _text(options.input_prefix, options), _text(options.input_suffix, options)
    turns = PlainTurns(
        tokenizer,
        prefix,
        suffix,
        begin=options.input_prefix_bos,
        shown=not options.conversation,
    )
    return Plan(
        turns,
        text,
        reverse,
        affixes=[("Input prefix", prefix), ("Input suffix", suffix)],
        asks_first=options.interactive_first or options.conversation,
        opens_with_reverse=True,
        prompted=options.conversation,
    )


def _text(given: str, options: MainOptions) -> bytes:
    raw = os.fsencode(given)
    return resolve_escapes(raw) if options.escape else raw


@contextmanager
def interrupts_hand_over(dialogue: Dialogue, person: Person) -> Iterator[None]:
    """Let Ctrl-C hand over first; while a turn is read, or twice, it leaves."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if person.is_asking or not dialogue.interrupt():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class ScaleCommand:
    """``/scale NAME X`` as a turn: apply an adapter with another scale from here on.

    Parameters
    ----------
    names : sequence of str
        Of the adapters, as they were given.
    context : Context
    generation : Generation
    """

    def __init__(self, names: Sequence[str], context: Context, generation: Generation) -> None:
        self._names = names
        self._context = context
        self._generation = generation

    def __call__(self, turn: bytes) -> bool:
        """Do it, if the turn is the command; tells on standard error what came of it."""
        words = turn.decode("utf-8", "surrogateescape").split()
        if not words or words[0] != "/scale":
            return False
        note(f"lora: {self._scale(words[1:])}")
        return True

    def _scale(self, words: Sequence[str]) -> str:
        usage = f"/scale NAME X, with a name of: {', '.join(self._names) or 'no adapter is loaded'}"
        if len(words) != 2:
            return usage
        name, written = words
        places = [i for i, path in enumerate(self._names) if name in (path, *_short_names(path))]
        try:
            scale = float(written)
        except ValueError:
            return usage
        if len(places) != 1 or not abs(scale) < float("inf"):
            return usage
        self._generation.keep_whole()
        self._context.set_adapter_scale(places[0], scale)
        return f"'{self._names[places[0]]}': scale {scale:g}"


def _short_names(path: str) -> tuple[str, str]:
    return Path(path).name, Path(path).stem
