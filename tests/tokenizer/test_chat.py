"""Chat templates, and what people write inside of them."""

from __future__ import annotations

import builtins
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.errors import DataError, FormatError
from engine.tokenizer import Tokenizer
from engine.tokenizer.chat import CHAT_TEMPLATE, ChatEncoder, ChatTemplate, chat_template

NORMAL, CONTROL, USER, BYTE = 1, 3, 4, 6
START, END, TAG = 257, 258, 259

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny(space_prefix: bool = False) -> Tokenizer:
    """SPM of single bytes with three tokens found as wholes, of which <tag> is user-defined."""
    pieces = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [
        ("\u2581", NORMAL),
        ("<|im_start|>", CONTROL),
        ("<|im_end|>", CONTROL),
        ("<tag>", USER),
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text.encode() for text, _ in pieces],
        "tokenizer.ggml.scores": np.zeros(len(pieces), np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, kind in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }
    return Tokenizer.from_metadata(metadata, "tiny.gguf")


def made(text: str) -> ChatTemplate:
    pytest.importorskip("jinja2")
    return ChatTemplate(text, tiny(), "tiny.gguf")


def said(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


# Rendering


def test_a_model_without_a_template_has_none() -> None:
    assert chat_template({}, tiny(), "tiny.gguf") is None


def test_a_template_that_is_no_text_is_refused_by_file_and_key() -> None:
    with pytest.raises(FormatError, match=r"tiny\.gguf: tokenizer\.chat_template: .*string"):
        chat_template({CHAT_TEMPLATE: 7}, tiny(), "tiny.gguf")


def test_smollm2_renders_its_own_form_of_chatml(
    smollm2_metadata: dict[str, Any], smollm2: Tokenizer
) -> None:
    pytest.importorskip("jinja2")
    template = chat_template(smollm2_metadata, smollm2, "smollm2.gguf")
    assert template is not None
    assert template.render(said("Hi", "Hello!"), add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    own_system = [{"role": "system", "content": "Be brief."}, *said("Hi")]
    assert template.render(own_system) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_templates_know_the_first_and_last_token() -> None:
    assert made("{{ bos_token }}|{{ eos_token }}").render([]) == "<|im_start|>|<|im_end|>"


def test_blocks_take_their_line_with_them() -> None:
    text = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert made(text).render([]) == "a\nb\nc"


def test_templates_may_leave_loops_and_frame_answers_and_write_json_as_it_is() -> None:
    loop = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}"
    assert made(loop + "{% endfor %}").render(said("x", "y")) == "x"
    framed = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert made(framed).render(said("x")) == "x!"
    assert made("{{ messages[0] | tojson }}").render(said("<é>")) == (
        '{"role": "user", "content": "<é>"}'
    )


def test_templates_can_ask_for_the_date() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", made("{{ strftime_now('%Y-%m') }}").render([]))


def test_tools_and_documents_are_none_rather_than_undefined() -> None:
    assert made("{{ tools is none and documents is none }}").render([]) == "True"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "too big"),
    ],
)
def test_a_template_that_fails_gives_its_message_on_one_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=r"^the chat template fails: ") as caught:
        made(text).render(said("x"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_template_is_refused_by_file_and_line() -> None:
    with pytest.raises(DataError, match=r"^tiny\.gguf: tokenizer\.chat_template: line 2: .*oops"):
        made("{{ 1 }}\n{% oops %}").render([])


def test_without_jinja2_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def lacking(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "jinja2":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", lacking)
    template = ChatTemplate(CHATML, tiny(), "tiny.gguf")
    with pytest.raises(DataError, match=r"^tiny\.gguf: .*pip install 'cylora\[chat\]'$"):
        template.render(said("x"))


def test_jinja2_is_not_loaded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "jinja2", raising=False)
    chat_template({CHAT_TEMPLATE: CHATML}, tiny(), "tiny.gguf")
    assert "jinja2" not in sys.modules


FOREIGN = {
    "chatml": CHATML,
    "llama-2": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks": (
        "{%- if not tools is defined or not tools %}\n    {{- 'none' }}\n{%- endif %}\n"
        "{% set ns = namespace(n=0) %}\n"
        "{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n  {{ ns.n }}: "
        "{{ m | tojson(indent=2) }}\n"
        "    {% if loop.last %}{% continue %}{% endif %}\n---\n{% endfor %}\n"
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_rendering_agrees_with_transformers(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = said("  <b>Grüße</b> & 'x' ", "line\n\n  two ", "und?", "gut")
    for prompt in (False, True):
        (expected,), _ = utils.render_jinja_template(
            [messages],
            chat_template=FOREIGN[name],
            add_generation_prompt=prompt,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
        )
        assert made(FOREIGN[name]).render(messages, prompt) == expected


# Tokens


@pytest.mark.parametrize("space_prefix", [False, True])
def test_one_piece_without_quotations_is_tokenized_as_by_the_tokenizer(
    space_prefix: bool, rng: np.random.Generator
) -> None:
    tokenizer = tiny(space_prefix)
    encoder = ChatEncoder(tokenizer)
    stock = ["<|im_start|>", "<|im_end|>", "<tag>", " ", "a", "é", "\n", "<|", "<0x41>"]
    for n in rng.integers(0, 12, 100).tolist():
        text = "".join(rng.choice(stock, n).tolist())
        assert encoder.encode([text]) == [tokenizer.encode(text, parse_special=True)]


def test_conversations_of_smollm2_are_tokenized_as_by_the_tokenizer(
    smollm2: Tokenizer, awkward_texts: list[str]
) -> None:
    encoder = ChatEncoder(smollm2)
    for text in awkward_texts:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert encoder.encode([text]) == [smollm2.encode(text, parse_special=True)]


@pytest.mark.parametrize("space_prefix", [False, True])
def test_quoted_text_is_tokenized_as_training_text_is(
    space_prefix: bool, rng: np.random.Generator
) -> None:
    tokenizer = tiny(space_prefix)
    encoder = ChatEncoder(tokenizer)
    stock = ["<|im_start|>", "<|im_end|>", "<tag>", " ", "a", "<|im_", "end|>", "<0x41>", "\ufdd0"]
    stock += ["\ufdd1", "1"]
    for n in rng.integers(0, 12, 200).tolist():
        text = "".join(rng.choice(stock, n).tolist())
        assert encoder.encode([encoder.quote(text)]) == [tokenizer.encode(text)]


def test_a_quotation_inside_a_template_is_text_and_the_templates_own_tokens_are_not() -> None:
    tokenizer = tiny()
    encoder = ChatEncoder(tokenizer)
    text = f"<|im_start|>{encoder.quote('a<|im_end|>b')}<|im_end|>"
    assert encoder.encode([text]) == [[START, *tokenizer.encode("a<|im_end|>b"), END]]
    assert END not in tokenizer.encode("a<|im_end|>b")


def test_a_space_goes_in_front_of_a_text_but_not_where_it_is_cut() -> None:
    encoder = ChatEncoder(tiny(space_prefix=True))
    mark = 256
    assert encoder.encode(["<|im_start|>a", "b<|im_end|>", "c"]) == [
        [START, mark, ord("a")],
        [ord("b"), END],
        [mark, ord("c")],
    ]


def test_every_string_of_a_message_is_quoted_however_deep() -> None:
    quote = ChatEncoder(tiny()).quote
    marked = quote("<|im_end|>")
    assert marked != "<|im_end|>"
    message = {"role": "x<|im_end|>", "calls": [{"name": "<|im_end|>"}, 3, None], "content": "é"}
    assert quote(message) == {
        "role": f"x{marked}",
        "calls": [{"name": marked}, 3, None],
        "content": "é",
    }


def test_half_a_surrogate_pair_is_borne() -> None:
    assert ChatEncoder(tiny()).encode(["\ud800"]) == [[0xED, 0xA0, 0x80]]


def test_a_vocabulary_with_tokens_that_are_no_utf_8_is_borne() -> None:
    tokenizer = tiny()
    vocabulary = tokenizer._vocabulary
    vocabulary.texts[END] = b"\xff<"
    encoder = ChatEncoder(tokenizer)
    assert encoder.quote("<|im_end|>") == "<|im_end|>"


def test_rendering_needs_no_more_of_a_tokenizer_than_two_texts() -> None:
    lacking = SimpleNamespace(bos_id=-1, eos_id=-1)
    template = ChatTemplate("x", lacking, "tiny.gguf")  # type: ignore[arg-type]
    assert (template.bos_token, template.eos_token) == ("", "")
