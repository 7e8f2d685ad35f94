"""JSON lines to samples: what is rendered, what counts in the loss, what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from engine.errors import DataError, EngineError
from engine.gguf import read_gguf
from engine.locate import locate_model
from engine.tokenizer import Tokenizer
from engine.tokenizer.chat import chat_template
from engine.training.conversations import (
    append_end,
    is_conversations,
    load_conversations,
    show_sample,
    split_conversations,
)
from engine.training.data import (
    Batches,
    BatchOptions,
    Samples,
    ShuffleState,
    SplitOptions,
    samples_hash,
    split_samples,
)

NORMAL, CONTROL, BYTE = 1, 3, 6
START, END, BOS = 257, 258, 259


def tiny(bos: int = START, add_bos: bool = False) -> Tokenizer:
    """SPM of single bytes with three control tokens, so that tokens can be read off."""
    pieces = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [
        ("\u2581", NORMAL),
        ("<|im_start|>", CONTROL),
        ("<|im_end|>", CONTROL),
        ("<s>", CONTROL),
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.encode() for text, _ in pieces],
        "tokenizer.ggml.scores": np.zeros(len(pieces), np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, kind in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return Tokenizer.from_metadata(metadata, "tiny.gguf")


class ChatML:
    """The template that most models use, without jinja2."""

    eos_token = "<|im_end|>"

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        turns = [self.turn(m, i, len(messages)) for i, m in enumerate(messages)]
        return "".join(turns) + "<|im_start|>assistant\n" * add_generation_prompt

    def turn(self, message: dict[str, str], i: int, n: int) -> str:
        return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"


class Instruct(ChatML):
    """Turns without any special token but the first."""

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        turns = [
            f"({m['content']})" if m["role"] == "user" else f" {m['content']}\n" for m in messages
        ]
        return "<s>" + "".join(turns)


class Forgetful(ChatML):
    """Writes an answer differently when something follows."""

    def turn(self, message: dict[str, str], i: int, n: int) -> str:
        thought = "(hm) " if message["role"] == "assistant" and i == n - 1 else ""
        return super().turn({**message, "content": thought + message["content"]}, i, n)


class EndedTwice(ChatML):
    """Puts the end of sequence behind the last message, whichever that is."""

    eos_token = "<s>"

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text = super().render(messages, add_generation_prompt)
        return text if add_generation_prompt else text + "<s>"


class Failing(ChatML):
    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        raise DataError("the chat template fails: roles must alternate")


def said(*contents: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    return {
        "messages": [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=False)
        ]
    }


def made(
    *records: Any,
    template: Any = None,
    tokenizer: Tokenizer | None = None,
    n_ctx: int = 200,
    **more,
) -> Samples:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    text = "\n".join(lines).encode()
    return split_conversations(text, "x.jsonl", tokenizer or tiny(), n_ctx, template, **more)


def shown(samples: Samples, index: int = 0, tokenizer: Tokenizer | None = None) -> str:
    return show_sample(samples, tokenizer or tiny(), index, marks=("[", "]"))


# What counts


def test_of_messages_the_answers_count_up_to_the_token_that_ends_them() -> None:
    samples = made(said("Hi", "\nHé!", "Bye", "So long"), template=ChatML())
    assert shown(samples) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[\nHé!<|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[So long<|im_end|>]\n"
    )
    assert samples.warnings == []
    assert samples.n_counted == len("\nHé!So long".encode()) + 2


def test_what_stands_behind_the_last_answer_does_not_count() -> None:
    samples = made(said("Hi", "Ho", "Well?"), template=ChatML())
    assert shown(samples).endswith("[Ho<|im_end|>]\n<|im_start|>user\nWell?<|im_end|>\n")


def test_a_prompt_and_its_completion_are_a_question_and_its_answer() -> None:
    pair = made({"prompt": "2+2?", "completion": "4"}, template=ChatML())
    assert shown(pair) == shown(made(said("2+2?", "4"), template=ChatML()))


def test_without_a_template_prompt_and_completion_are_put_together_and_ended() -> None:
    pair = {"prompt": "a <s>", "completion": "b<|im_end|>"}
    samples = made(pair)
    assert shown(samples) == "<|im_start|>a <s>[b<|im_end|><|im_end|>]"
    # Only the last is the token: in the texts they are letters.
    assert np.flatnonzero(samples.tokens > 256).tolist() == [len(samples.tokens) - 1]
    assert shown(made(pair, append_eos=False)) == "<|im_start|>a <s>[b<|im_end|>]"


def test_of_a_text_everything_counts_and_it_is_not_ended_unless_asked() -> None:
    assert shown(made({"text": "a b"})) == "<|im_start|>[a b]"
    assert shown(made({"text": "a b"}, append_eos=True)) == "<|im_start|>[a b<|im_end|>]"
    assert shown(made({"text": "a b"}, mask_prompt=True)) == "<|im_start|>[a b]"


def test_prompts_count_when_asked() -> None:
    samples = made(said("Hi", "Ho"), template=ChatML(), mask_prompt=False)
    assert shown(samples) == (
        "<|im_start|>[user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n]"
    )
    plain = made({"prompt": "a", "completion": "b"}, mask_prompt=False)
    assert shown(plain) == "<|im_start|>[ab<|im_end|>]"


def test_an_answer_that_the_template_does_not_end_is_ended() -> None:
    tokenizer = tiny(BOS)
    chat = said("Hi", "Ho", "Bye", "So")
    samples = made(chat, template=Instruct(), tokenizer=tokenizer)
    assert shown(samples, 0, tokenizer) == "<s>(Hi)[ Ho\n](Bye)[ So\n<|im_end|>]"
    without = made(chat, template=Instruct(), tokenizer=tokenizer, append_eos=False)
    assert END not in without.tokens


def test_an_end_behind_the_last_message_does_not_hide_the_answers_before_it() -> None:
    samples = made(said("Hi", "Ho", "Bye", "So"), template=EndedTwice())
    assert samples.warnings == []
    assert "[Ho<|im_end|>]" in shown(samples)
    assert shown(samples).endswith("[So<|im_end|>]\n<s>")


def test_where_beginnings_are_written_differently_the_last_answer_alone_counts() -> None:
    chat = said("Hi", "Ho", "Bye", "So", "and?")
    samples = made(said("x", "y"), chat, template=Forgetful())
    assert shown(samples, 0).endswith("assistant\n[(hm) y<|im_end|>]\n")
    assert shown(samples, 1) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[(hm) So<|im_end|>]\n"
    )
    assert len(samples.warnings) == 1
    assert samples.warnings[0].startswith("the chat template writes 1 conversations differently")
    assert "line 2" in samples.warnings[0]


def test_a_conversation_that_an_assistant_opens_is_trained_on() -> None:
    samples = made({"messages": [{"role": "assistant", "content": "Hi"}]}, template=ChatML())
    assert shown(samples) == "<|im_start|>assistant\n[Hi<|im_end|>]\n"


def test_control_tokens_that_people_write_are_text_and_told() -> None:
    plain, quoting = said("Hi", "Ho"), said("Hi<|im_end|>", "So <|im_end|> it is")
    samples = made(plain, quoting, template=ChatML())
    tokens = samples.tokens[samples.begin[1] :]
    # One end for each message, and the quoted ones in letters.
    assert np.count_nonzero(tokens == END) == 2
    assert shown(samples, 1).endswith("assistant\n[So <|im_end|> it is<|im_end|>]\n")
    assert samples.warnings == [
        "1 conversations spell special tokens in their messages (first: line 2). they are read as "
        "plain text."
    ]


# The beginning of rows


def first_input(samples: Samples, **options: Any) -> list[int]:
    state = ShuffleState()
    state.restart(samples, 1)
    batch = Batches(samples, state, BatchOptions(1, 12, 7, END, **options)).next()
    return batch.inputs[0].tolist()


def test_a_row_begins_with_the_rendered_conversation_itself() -> None:
    samples = made(said("Hi", "Ho"), template=ChatML(), tokenizer=tiny(BOS))
    assert samples.begin_token == START
    assert first_input(samples) == [START, *b"user\nHi", END, *b"\n", START, *b"a"]


def test_a_first_token_that_the_template_writes_is_not_doubled() -> None:
    for add_bos in (False, True):
        tokenizer = tiny(BOS, add_bos)
        samples = made(said("Hi", "Ho"), template=Instruct(), tokenizer=tokenizer)
        assert samples.begin_token == BOS
        assert first_input(samples)[:3] == [BOS, *b"(H"]


def test_a_model_that_begins_texts_with_bos_has_it_before_the_template() -> None:
    samples = made(said("Hi", "Ho"), template=ChatML(), tokenizer=tiny(BOS, add_bos=True))
    assert samples.begin_token == BOS
    assert first_input(samples)[:3] == [BOS, START, *b"u"]


def test_among_texts_rows_begin_with_bos_and_it_is_not_doubled() -> None:
    samples = made({"text": "abc"}, said("Hi", "Ho"), template=ChatML())
    assert samples.begin_token is None
    assert shown(samples, 0) == "<|im_start|>[abc]"
    assert shown(samples, 1).startswith("<|im_start|>user")
    assert samples.tokens[samples.begin[1]] == ord("u")


def test_filled_rows_keep_the_first_token_of_each_conversation() -> None:
    samples = made(said("a", "b"), template=ChatML(), tokenizer=tiny(BOS))
    state = ShuffleState()
    state.restart(samples, 1)
    options = BatchOptions(1, 60, BOS, END, fill_with_next_samples=True, separate_with_bos=False)
    batch = Batches(samples, state, options).next()
    turn = [START, *b"user\na", END, *b"\n", START, *b"assistant\nb", END, *b"\n"]
    assert batch.inputs[0].tolist() == (turn * 3)[:60]
    counted = [t for t in batch.targets[0].tolist() if t >= 0]
    assert counted == [ord("b"), END] * 2


# Sizes


def test_samples_longer_than_the_context_are_cut_and_counted() -> None:
    samples = made({"text": "abcdef"}, {"text": "ab"}, {"text": "abcde"}, n_ctx=4)
    assert samples.size.tolist() == [4, 2, 4]
    assert bytes(samples.tokens.astype(np.uint8)) == b"abcdababcd"
    assert samples.warnings == [
        "2 samples (max length 6) exceed context length of 4. they are cut off."
    ]


def test_samples_of_which_nothing_is_left_that_counts_are_left_out() -> None:
    pairs = [{"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"}]
    samples = made(*pairs, n_ctx=4)
    assert len(samples) == 1
    assert shown(samples) == "<|im_start|>a[b<|im_end|>]"
    assert samples.warnings[-1].startswith("1 samples have no token within context length of 4")
    with pytest.raises(DataError, match=r"^x\.jsonl: no sample has a token that counts"):
        made(pairs[0], n_ctx=4)


def test_a_conversation_that_the_template_leaves_out_is_left_out() -> None:
    class Silent(ChatML):
        def render(self, messages: list[dict[str, str]], add_generation_prompt=False) -> str:
            return ""

    options = {"template": Silent(), "mask_prompt": False, "append_eos": False}
    assert len(made(said("Hi", "Ho"), {"text": "a"}, **options)) == 1
    with pytest.raises(DataError, match="no sample has a token that counts"):
        made(said("Hi", "Ho"), **options)


def test_the_hash_is_that_of_a_text_under_the_name_with_the_same_places() -> None:
    samples = made({"text": "ab"}, {"text": "cde"})
    assert samples.begin.tolist() == [0, 2]
    assert samples.hash == samples_hash("x.jsonl", samples.begin, samples.size)


# Files


def test_blank_lines_a_byte_order_mark_and_crlf_are_borne(tmp_path) -> None:
    path = tmp_path / "x.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "\\u00e9"}\n')
    assert is_conversations(path)
    samples = load_conversations(path, tiny(), 8, None)
    assert bytes(samples.tokens.astype(np.uint8)) == "aé".encode()


def test_only_the_name_says_that_lines_are_json() -> None:
    assert not is_conversations("x.json")
    assert not is_conversations("jsonl")
    assert not is_conversations("x.jsonl.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "not JSON: Expecting ',' delimiter at character 13"),
        ("plain text", "not JSON: Expecting value at character 1"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        ('["text"]', "a JSON object is needed, not an array"),
        ("null", "a JSON object is needed, not null"),
        ({}, 'lacks "messages", "prompt" and "completion", or "text"'),
        ({"prompt": "a"}, 'lacks the field "completion"'),
        ({"completion": "a"}, 'lacks the field "prompt"'),
        ({"prompt": "a", "completion": 3}, '"completion" must be a string, not a number'),
        ({"text": ["a"]}, '"text" must be a string, not an array'),
        ({"messages": []}, '"messages" must be an array with at least one message'),
        ({"messages": {"role": "user"}}, '"messages" must be an array'),
        ({"messages": ["hi"]}, "message 1: an object is needed, not a string"),
        ({"messages": [{"content": "x"}]}, 'message 1: lacks the field "role"'),
        ({"messages": [{"role": "user"}]}, 'message 1: lacks the field "content"'),
        ({"messages": [{"role": "user", "content": None}]}, '"content" must be a string, not null'),
        (said("only a question"), 'no message has the role "assistant"'),
    ],
)
def test_lines_that_cannot_be_used_are_refused_by_file_and_number(line: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        made({"text": "a"}, "", line, template=ChatML())
    text = str(caught.value)
    assert text.startswith("x.jsonl: line 3: ")
    assert message in text
    assert "\n" not in text


def test_bytes_that_are_no_utf_8_are_refused_by_line_and_place() -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl: line 2: byte 11 is not UTF-8$"):
        split_conversations(b'{"text":"a"}\n{"text": "\xff"}', "x.jsonl", tiny(), 8, None)


def test_messages_for_a_model_without_a_template_are_refused() -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl: line 1: .*tokenizer\.chat_template"):
        made(said("Hi", "Ho"))


def test_a_template_that_fails_is_told_with_the_line() -> None:
    with pytest.raises(DataError, match=r"^x\.jsonl: line 2: .*roles must alternate$"):
        made({"text": "a"}, said("Hi", "Ho"), template=Failing())


def test_a_file_without_lines_is_refused(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.jsonl: .*empty"):
        load_conversations(tmp_path / "x.jsonl", tiny(), 8, None)
    with pytest.raises(DataError, match=r"x\.jsonl: .*no line that is not blank"):
        made("", "  ")


# SmolLM2, by its own template


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, Any]:
    pytest.importorskip("jinja2")
    try:
        path = locate_model("smollm2")
    except EngineError as error:
        pytest.skip(str(error))
    with read_gguf(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, str(path))
        return tokenizer, chat_template(file.metadata, tokenizer, str(path))


def test_smollm2_reads_conversations_as_in_a_chat(smollm2: tuple[Tokenizer, Any]) -> None:
    tokenizer, template = smollm2
    chat = said("Name a colour.", "Blue.", "Another?", "Red, 255 0 0.")
    samples = made(chat, template=template, tokenizer=tokenizer)
    rendered = template.render(chat["messages"])
    tokens = [samples.begin_token, *samples.tokens.tolist()]
    assert tokens == tokenizer.encode(rendered, parse_special=True)
    assert shown(samples, 0, tokenizer) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[Blue.<|im_end|>]\n"
        "<|im_start|>user\nAnother?<|im_end|>\n"
        "<|im_start|>assistant\n[Red, 255 0 0.<|im_end|>]\n"
    )


def test_smollm2_is_asked_with_the_tokens_that_it_was_trained_with(
    smollm2: tuple[Tokenizer, Any],
) -> None:
    # An answer that would run together with the line break before it.
    tokenizer, template = smollm2
    samples = made(said("x", "\n\ny"), template=template, tokenizer=tokenizer)
    tokens = [samples.begin_token, *samples.tokens.tolist()]
    question = template.render(said("x")["messages"], add_generation_prompt=True)
    asked = tokenizer.encode(question, parse_special=True)
    assert tokens[: len(asked)] == asked
    assert samples.mask is not None
    assert np.flatnonzero(samples.mask)[0] == len(asked) - 1


# Masks in batches


def test_masked_targets_and_padding_do_not_count_and_inputs_are_whole(
    rng: np.random.Generator,
) -> None:
    size = rng.integers(1, 12, 20)
    begin = np.cumsum(size) - size
    tokens = rng.integers(10, 1000, size.sum()).astype(np.int32)
    mask = rng.random(len(tokens)) < 0.5
    whole = Samples(tokens, begin, size, 1)
    masked = Samples(tokens, begin, size, 1, mask=mask)
    counted = Samples(np.where(mask, 1, 0).astype(np.int32), begin, size, 1)
    for options in (
        BatchOptions(3, 9, 1, 0),
        BatchOptions(3, 9, 0, 0, True, True, True, True),
    ):
        streams = []
        for samples in (whole, masked, counted):
            state = ShuffleState()
            state.restart(samples, 3)
            streams.append(Batches(samples, state, options))
        for _ in range(10):
            plain, with_mask, counts = (stream.next() for stream in streams)
            assert np.array_equal(with_mask.inputs, plain.inputs)
            expected = np.where(counts.targets == 1, plain.targets, -1)
            assert np.array_equal(with_mask.targets, expected)
            assert with_mask.used == plain.used


# Other kinds of samples


def split(text: bytes, n_ctx: int = 6, **options: Any) -> Samples:
    return split_samples(text, "t.txt", tiny(), n_ctx, SplitOptions(**options))


def test_ends_are_put_behind_samples_that_a_pattern_divides() -> None:
    samples = split(b"#one#three", sample_start=b"#")
    ended = append_end(samples, END)
    assert [shown(ended, i) for i in (0, 1)] == [
        "<|im_start|>[one<|im_end|>]",
        "<|im_start|>[three<|im_end|>]",
    ]
    assert ended.tokens.dtype == np.int32
    assert ended.hash != samples.hash


def test_a_text_that_no_pattern_divides_has_no_ends() -> None:
    with pytest.raises(DataError, match="--sample-start"):
        append_end(split(b"some text"), END)


def test_a_sample_of_a_text_is_shown_as_far_as_a_row_goes() -> None:
    samples = split(b"#abcdefgh#b", sample_start=b"#")
    text = show_sample(samples, tiny(), n_ctx=6)
    assert text == "<|im_start|>\u27e6abcdef\u27e7"
