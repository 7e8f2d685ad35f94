"""Conversations to text by a model's own chat template, and that text to tokens.

A template is a program of whoever made the model file, so it runs in jinja2's sandbox, with the
environment that templates are written for: that of the `transformers` package's
``apply_chat_template``. What it writes is tokenized as chat programs do, control tokens parsed;
what people wrote into the messages is text and stays text, even where it spells a control token.
A message that quotes ``<|im_end|>`` must neither end its turn nor teach to end one in the middle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from engine.errors import DataError, FormatError
from engine.tokenizer import Tokenizer
from engine.tokenizer.special import ALWAYS_CUT, CUT_WHEN_PARSED, Part

if TYPE_CHECKING:
    from jinja2 import Template

CHAT_TEMPLATE = "tokenizer.chat_template"

# A quoted control token inside a rendered text: its number between two code points that Unicode
# reserves for programs' own use and that no text has any business with.
_QUOTE, _UNQUOTE = "\ufdd0", "\ufdd1"
_QUOTED = re.compile(f"{_QUOTE}([0-9]{{1,9}}){_UNQUOTE}")


def chat_template(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, source: str
) -> ChatTemplate | None:
    """Take the chat template out of a file's metadata; None where there is none.

    Parameters
    ----------
    metadata : mapping
        Key to value as `engine.gguf` reads them.
    tokenizer : Tokenizer
        Gives the template its ``bos_token`` and ``eos_token``.
    source : str
        Name of the file, for messages.

    Raises
    ------
    FormatError
        If the key is there and is no text.
    """
    text = metadata.get(CHAT_TEMPLATE)
    if text is None:
        return None
    if not isinstance(text, str):
        raise FormatError(
            f"{source}: {CHAT_TEMPLATE}: a string is needed, not {type(text).__name__}"
        )
    return ChatTemplate(text, tokenizer, source)


class ChatTemplate:
    """A chat template, compiled when it is first used.

    Parameters
    ----------
    text : str
        In jinja2's language.
    tokenizer : Tokenizer
    source : str
        Name of the model file, for messages.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, source: str) -> None:
        self.text = text
        self.source = source
        self.bos_token = _text_of(tokenizer, tokenizer.bos_id)
        self.eos_token = _text_of(tokenizer, tokenizer.eos_id)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Write a conversation as the model was taught to read it.

        Parameters
        ----------
        messages : sequence of mapping
            Each with ``role`` and ``content``.
        add_generation_prompt : bool
            End with what opens an answer.

        Raises
        ------
        DataError
            If jinja2 is not installed, or the template fails; gives its message.
        """
        template = self._compiled
        try:
            return template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise DataError(f"the chat template fails: {_one_line(error)}") from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            import jinja2
        except ImportError as error:
            raise DataError(
                f"{self.source}: its chat template needs jinja2: pip install 'cylora[chat]'"
            ) from error
        try:
            return _environment().from_string(self.text)
        except jinja2.TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f"{CHAT_TEMPLATE}: line {line}" if line else CHAT_TEMPLATE
            raise DataError(f"{self.source}: {place}: {_one_line(error)}") from error


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    return "" if token < 0 else tokenizer.piece(token, special=True).decode(errors="replace")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _environment() -> Any:
    """Make what `transformers` gives to its templates, which they take for granted."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Read ``{% generation %}``, by which newer templates frame answers; it changes no text."""

        tags = {"generation"}  # noqa: RUF012 - the base class wants a set

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    # jinja2's own tojson escapes <, > and & for HTML.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatEncoder:
    """Tokenize rendered conversations: control tokens only where the template wrote them.

    What a person wrote is quoted before the template sees it (`quote`): each control token that it
    spells becomes a mark, which `encode` takes back for the characters it stands for. User-defined
    tokens are found everywhere, as always.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer._vocabulary
        kinds = set(CUT_WHEN_PARSED) - set(ALWAYS_CUT)
        texts = {vocabulary.texts[token] for token in vocabulary.ids_of_type(*kinds)} - {b""}
        # The mark's own sign is quoted too: every mark that is met is one of ours.
        spelled = [_QUOTE, *filter(None, map(_decoded, texts))]
        # The longest first, as when they are cut.
        self._spelled = sorted(spelled, key=lambda text: (-len(text), text))
        self._number = {text: i for i, text in enumerate(self._spelled)}
        self._spells_token = re.compile("|".join(map(re.escape, self._spelled)))

    def quote(self, value: Any) -> Any:
        """Quote every string in a message, however deep; the rest of it stays as it is."""
        if isinstance(value, str):
            return self._spells_token.sub(
                lambda match: f"{_QUOTE}{self._number[match[0]]}{_UNQUOTE}", value
            )
        if isinstance(value, list):
            return [self.quote(item) for item in value]
        if isinstance(value, dict):
            return {key: self.quote(item) for key, item in value.items()}
        return value

    def encode(self, pieces: Sequence[str]) -> list[list[int]]:
        """Turn consecutive pieces of one rendered text into tokens, none of which spans two.

        A piece that ends where an answer begins is so tokenized as when the answer is still to
        come.

        Parameters
        ----------
        pieces : sequence of str
            With marks of `quote`.

        Returns
        -------
        list of list of int
            Token ids of each piece. One piece without marks gives what
            ``tokenizer.encode(piece, parse_special=True)`` gives.
        """
        tokenizer = self._tokenizer
        tokens = []
        follows_text = False
        for piece in pieces:
            ids: list[int] = []
            for part in _joined(self._parts(piece)):
                if isinstance(part, int):
                    ids.append(part)
                    follows_text = False
                    continue
                prefix = b" " if tokenizer.add_space_prefix and not follows_text else b""
                ids += tokenizer._encoder.encode(prefix + part)
                follows_text = True
            tokens.append(ids)
        return tokens

    def _parts(self, piece: str) -> Iterator[Part]:
        # re.split puts what a group matched between the stretches.
        for i, stretch in enumerate(_QUOTED.split(piece)):
            if i % 2 == 0:
                yield from self._tokenizer._parsing_cutter.cut(_encoded(stretch))
            elif int(stretch) < len(self._spelled):
                yield _encoded(self._spelled[int(stretch)])


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Put stretches of text that touch together, so that a quotation is no border."""
    text = b""
    for part in parts:
        if isinstance(part, bytes):
            text += part
            continue
        if text:
            yield text
            text = b""
        yield part
    if text:
        yield text


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None  # no message can spell it


def _encoded(text: str) -> bytes:
    try:
        # Stray bytes of a terminal or a file, as everywhere in the engine.
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # JSON can name half of a surrogate pair; its bytes are no UTF-8, which `encode` bears with.
        return text.encode("utf-8", "surrogatepass")
