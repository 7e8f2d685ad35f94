"""Training data as conversations: a file of JSON lines to samples of which the answers count.

A line is an object of one of three forms, and a sample:

- ``{"messages": [{"role": …, "content": …}, …]}``, written by the model's chat template;
- ``{"prompt": …, "completion": …}``: a question and its answer to the template; without one, the
  two texts one behind the other;
- ``{"text": …}``: a text as it is.

A rendered conversation brings its own beginning (`Samples.begin_token`), so a row that is trained
on is token by token what a chat program would have the model read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import DataError
from engine.tokenizer import Tokenizer
from engine.tokenizer.chat import ChatEncoder, ChatTemplate
from engine.training.data import (
    Samples,
    begin_and_end_tokens,
    read_training_text,
    samples_hash,
    string_hash,
)

# What counts in the loss stands between these when a sample is shown.
MARKS = ("\u27e6", "\u27e7")


def is_conversations(path: str | Path) -> bool:
    """Whether a file of training data is one of JSON lines, by its name."""
    return Path(path).suffix.lower() == ".jsonl"


def load_conversations(
    path: str | Path,
    tokenizer: Tokenizer,
    n_ctx: int,
    template: ChatTemplate | None,
    *,
    mask_prompt: bool | None = None,
    append_eos: bool | None = None,
) -> Samples:
    """Read a file of JSON lines; `split_conversations` says how."""
    return split_conversations(
        read_training_text(path),
        os.fspath(path),
        tokenizer,
        n_ctx,
        template,
        mask_prompt=mask_prompt,
        append_eos=append_eos,
    )


def split_conversations(
    text: bytes,
    name: str,
    tokenizer: Tokenizer,
    n_ctx: int,
    template: ChatTemplate | None,
    *,
    mask_prompt: bool | None = None,
    append_eos: bool | None = None,
) -> Samples:
    """Make a sample of each JSON line, with a mask of the tokens that count in the loss.

    Parameters
    ----------
    text : bytes
        JSON lines; blank ones are passed over.
    name : str
        The file's name as the user typed it; for messages, and enters the hash.
    tokenizer : Tokenizer
    n_ctx : int
        Tokens of a row. A longer sample is cut.
    template : ChatTemplate or None
        The model's; None where it has none.
    mask_prompt : bool, optional
        Only answers count, up to the token that ends them. By default for messages and for prompt
        with completion.
    append_eos : bool, optional
        Teach the end of an answer that the template does not end. By default for the same.

    Raises
    ------
    DataError
        If a line is not of a known form, cannot be rendered (both name the line), or nothing is
        left to train on.
    """
    renderer = _Renderer(name, tokenizer, template, mask_prompt, append_eos)
    sequences = [renderer.sequence(line, record) for line, record in _records(text, name)]
    if not sequences:
        raise DataError(f"{name}: training data holds no line that is not blank")
    begin_token = _common_first_token(sequences)
    rows = [sequence.behind(begin_token, renderer.bos) for sequence in sequences]
    n_long = sum(len(tokens) > n_ctx for tokens, _ in rows)
    longest = max(len(tokens) for tokens, _ in rows)
    rows = [(tokens[:n_ctx], counts[:n_ctx]) for tokens, counts in rows]
    kept = [row for row in rows if any(row[1])]
    warnings = list(renderer.warnings())
    if n_long:
        warnings.append(
            f"{n_long} samples (max length {longest}) exceed context length of {n_ctx}. "
            "they are cut off."
        )
    if len(kept) < len(rows):
        warnings.append(
            f"{len(rows) - len(kept)} samples have no token within context length of {n_ctx} that "
            "counts in the loss. they are left out."
        )
    if not kept:
        raise DataError(
            f"{name}: no sample has a token that counts in the loss within the context of {n_ctx} "
            "tokens; raise --ctx"
        )
    size = np.array([len(tokens) for tokens, _ in kept], dtype=np.int64)
    begin = np.cumsum(size) - size
    return Samples(
        tokens=np.array([token for tokens, _ in kept for token in tokens], dtype=np.int32),
        begin=begin,
        size=size,
        hash=samples_hash(name, begin, size),
        warnings=warnings,
        mask=np.array([count for _, counts in kept for count in counts], dtype=np.bool_),
        begin_token=begin_token,
    )


# ---------------------------------------------------------------- lines


def _records(text: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of the lines that are not blank, with their numbers from 1."""
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise _error(name, number, f"byte {error.start + 1} is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise _error(
                name, number, f"not JSON: {error.msg} at character {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:  # a huge number, or brackets without end
            raise _error(name, number, f"not JSON that can be read: {error}") from error
        if not isinstance(record, dict):
            raise _error(name, number, f"a JSON object is needed, not {_kind(record)}")
        yield number, record


def _error(name: str, line: int, reason: str) -> DataError:
    return DataError(f"{name}: line {line}: {reason}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _string(record: Mapping[str, Any], field: str, place: str = "") -> str:
    """Take a string out of an object; `place` says where the object stands."""
    if field not in record:
        raise DataError(f'{place}lacks the field "{field}"')
    if not isinstance(record[field], str):
        raise DataError(f'{place}"{field}" must be a string, not {_kind(record[field])}')
    return record[field]


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError('"messages" must be an array with at least one message')
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"message {i}: an object is needed, not {_kind(message)}")
        for field in ("role", "content"):
            _string(message, field, f"message {i}: ")
    return messages


# ---------------------------------------------------------------- one sample


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens of a sample and which count; `whole`: it brings its own beginning."""

    tokens: list[int]
    counts: list[bool]
    whole: bool

    def behind(self, begin_token: int | None, bos: int) -> tuple[list[int], list[bool]]:
        """Leave out the token that a row begins with."""
        first = bos if begin_token is None else begin_token
        n = 1 if self.whole and self.tokens[:1] == [first] else 0
        return self.tokens[n:], self.counts[n:]


def _common_first_token(sequences: Sequence[_Sequence]) -> int | None:
    """Token that all samples bring as their beginning; None if they differ or bring none."""
    brought = [sequence.tokens[:1] if sequence.whole else [] for sequence in sequences]
    return brought[0][0] if brought[0] and all(b == brought[0] for b in brought) else None


class _Renderer:
    """Turns records into sequences; counts what a person should know of."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        mask_prompt: bool | None,
        append_eos: bool | None,
    ) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._template = template
        self._mask_prompt = mask_prompt
        self._append_eos = append_eos
        self._encoder = ChatEncoder(tokenizer)
        self.bos, self._eos = begin_and_end_tokens(tokenizer, "the model")
        self._seen: Counter[str] = Counter()
        self._first_line: dict[str, int] = {}

    def warnings(self) -> Iterator[str]:
        """Say what was met, one line each kind."""
        for kind, text in (
            (
                "last turn",
                "the chat template writes {n} conversations differently as they grow (first: line "
                "{line}). of them the last answer alone counts in the loss.",
            ),
            (
                "quoted",
                "{n} conversations spell special tokens in their messages (first: line {line}). "
                "they are read as plain text.",
            ),
        ):
            if self._seen[kind]:
                yield text.format(n=self._seen[kind], line=self._first_line[kind])

    def _note(self, kind: str, line: int) -> None:
        self._seen[kind] += 1
        self._first_line.setdefault(kind, line)

    def sequence(self, line: int, record: Mapping[str, Any]) -> _Sequence:
        """Make the sample of a record; names its line where that fails."""
        try:
            if "messages" in record:
                return self._conversation(line, _messages(record))
            if "prompt" in record or "completion" in record:
                prompt, completion = _string(record, "prompt"), _string(record, "completion")
                if self._template is None:
                    return self._concatenation(prompt, completion)
                return self._conversation(
                    line,
                    [
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": completion},
                    ],
                )
            if "text" in record:
                return self._text(_string(record, "text"))
            raise DataError('lacks "messages", "prompt" and "completion", or "text"')
        except DataError as error:
            raise _error(self._name, line, str(error)) from error

    def _text(self, text: str) -> _Sequence:
        tokens = self._tokenizer.encode(text)
        # Everything counts, whatever is asked of prompts: there is none.
        counts = [True] * len(tokens)
        if self._append_eos is True:
            tokens, counts = [*tokens, self._eos], [*counts, True]
        return _Sequence(tokens, counts, whole=False)

    def _concatenation(self, prompt: str, completion: str) -> _Sequence:
        pieces = [self._encoder.quote(prompt), self._encoder.quote(completion)]
        return self._encoded(pieces, [False, True], whole=False)

    def _conversation(self, line: int, messages: list[dict[str, Any]]) -> _Sequence:
        if self._template is None:
            raise DataError(
                "messages need a chat template, and the model has none (tokenizer.chat_template); "
                "give prompt and completion, or text"
            )
        quoted = self._encoder.quote(messages)
        if quoted != messages:
            self._note("quoted", line)
        whole = self._template.render(quoted)
        if self._mask_prompt is False:
            return self._encoded([whole], [True], whole=True)
        if not any(message["role"] == "assistant" for message in quoted):
            raise DataError('no message has the role "assistant": nothing would count in the loss')
        spans = _answers(self._template, quoted, whole)
        if spans is None:
            self._note("last turn", line)
            whole, span = _last_answer(self._template, quoted)
            spans = [span]
        pieces, counts = _cut(whole, spans)
        return self._encoded(pieces, counts, whole=True)

    def _encoded(self, pieces: list[str], counts: list[bool], whole: bool) -> _Sequence:
        tokens: list[int] = []
        mask: list[bool] = []
        encoded = self._encoder.encode(pieces)
        for ids, count in zip(encoded, counts, strict=True):
            n = self._length_of_answer(ids) if count else 0
            tokens += ids
            mask += [True] * n + [False] * (len(ids) - n)
        if counts[-1] and self._append_eos is not False and not self._is_ended(encoded[-1]):
            tokens.append(self._eos)
            mask.append(True)
        if self._mask_prompt is False:
            mask = [True] * len(tokens)
        bos = self._tokenizer.bos_id
        if whole and self._tokenizer.add_bos and bos >= 0 and tokens[:1] != [bos]:
            tokens, mask = [bos, *tokens], [False, *mask]
        return _Sequence(tokens, mask, whole)

    def _length_of_answer(self, ids: list[int]) -> int:
        """Tokens up to the first that ends generation: behind it the model is never asked."""
        ends = (i for i, token in enumerate(ids, 1) if self._tokenizer.is_eog(token))
        return next(ends, len(ids))

    def _is_ended(self, ids: list[int]) -> bool:
        """Whether a token that ends generation comes last, but for white space."""
        ends = [i for i, token in enumerate(ids, 1) if self._tokenizer.is_eog(token)]
        return bool(ends) and not self._tokenizer.decode(ids[ends[-1] :]).strip()


# ---------------------------------------------------------------- where the answers are

Span = tuple[int, int]


def _answers(
    template: ChatTemplate, messages: list[dict[str, Any]], whole: str
) -> list[Span] | None:
    """Find each answer in a rendered conversation; None where that cannot be seen.

    An answer is what its message adds to the messages before it and the template's opening of an
    answer. It cannot be seen where the conversation up to there is written differently from what
    the whole begins with.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            opened = template.render(messages[:i], add_generation_prompt=True)
            closed = template.render(messages[: i + 1])
        except DataError:  # a template may refuse half a conversation
            return None
        if not whole.startswith(closed):
            # Some put this behind the last message, whichever that is.
            closed = closed.removesuffix(template.eos_token)
        if not (closed.startswith(opened) and whole.startswith(closed)):
            return None
        spans.append((len(opened), len(closed)))
    return spans


def _last_answer(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[str, Span]:
    """Render a conversation up to its last answer, and find that as well as can be."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    whole = template.render(messages[: last + 1])
    opened = template.render(messages[:last], add_generation_prompt=True) if last else ""
    pairs = enumerate(zip(opened, whole, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(opened), len(whole)))
    return whole, (shared, len(whole))


def _cut(whole: str, spans: list[Span]) -> tuple[list[str], list[bool]]:
    """Cut a text at the spans; returns its pieces and which of them are spans."""
    pieces, counts = [], []
    done = 0
    for begin, end in spans:
        pieces += [whole[done:begin], whole[begin:end]]
        counts += [False, True]
        done = end
    if done < len(whole):
        pieces.append(whole[done:])
        counts.append(False)
    return pieces, counts


# ---------------------------------------------------------------- all kinds of samples


def append_end(samples: Samples, eos: int) -> Samples:
    """Put an end behind each sample of a text, so that the end is learnt too.

    Parameters
    ----------
    samples : Samples
        As `engine.training.data.split_samples` cuts them at a pattern.
    eos : int
        Token that ends a text.

    Raises
    ------
    DataError
        If the text is not cut at a pattern: its samples end anywhere.
    """
    if samples.extent is None:
        raise DataError("--append-eos: a plain text has ends to teach only with --sample-start")
    ends = samples.begin + samples.size
    size = samples.size + 1
    return replace(
        samples,
        tokens=np.insert(samples.tokens, ends, eos).astype(np.int32),
        begin=np.cumsum(size) - size,
        size=size,
        hash=samples.hash ^ string_hash(b"append_end"),
        mask=None if samples.mask is None else np.insert(samples.mask, ends, True),
    )


def show_sample(
    samples: Samples,
    tokenizer: Tokenizer,
    index: int = 0,
    *,
    n_ctx: int | None = None,
    marks: tuple[str, str] = MARKS,
) -> str:
    """Write a sample as the model will see it, special tokens by their texts.

    Parameters
    ----------
    samples : Samples
    tokenizer : Tokenizer
    index : int, optional
        In the order of the file.
    n_ctx : int, optional
        Tokens of a row; a row takes no more.
    marks : pair of str, optional
        Put around each stretch that counts in the loss.
    """
    begin = int(samples.begin[index])
    end = begin + min(int(samples.size[index]), n_ctx or len(samples.tokens))
    tokens = samples.tokens[begin:end].tolist()
    counts = [True] * len(tokens) if samples.mask is None else samples.mask[begin:end].tolist()
    first = samples.begin_token
    if first is None:
        first = begin_and_end_tokens(tokenizer, "the model")[0]
    shown = tokenizer.piece(first, special=True).decode(errors="replace")
    for count, stretch in groupby(zip(counts, tokens, strict=True), key=lambda pair: pair[0]):
        pieces = b"".join(tokenizer.piece(token, special=True) for _, token in stretch)
        text = pieces.decode(errors="replace")
        shown += f"{marks[0]}{text}{marks[1]}" if count else text
    return shown
