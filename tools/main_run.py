"""A run of `main`: the text as it is made and shown, with people's turns or without."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import CLOSED_OUTPUT, INTERRUPTED, discard_output, emit
from .main_cache import CachedPrompt
from .main_log import Log
from .main_options import MainOptions
from .main_talk import Plan, ScaleCommand, interrupts_hand_over, reverse_prompts
from .main_terminal import Person

# Everything that loads numpy is imported where it is used.
if TYPE_CHECKING:
    from engine.generate import Generation
    from engine.model import Context


class Run:
    """The text of a run, once everything is loaded.

    Attributes
    ----------
    seconds : float
        How long it took.
    """

    def __init__(
        self,
        options: MainOptions,
        log: Log,
        context: Context,
        generation: Generation,
        cache: CachedPrompt,
        plan: Plan | None,
    ) -> None:
        self.options = options
        self.log = log
        self.context = context
        self.generation = generation
        self.cache = cache
        self.plan = plan
        self.seconds = 0.0
        self._tokenizer = context.model.tokenizer
        self._prompt = list(generation.tokens)
        self._made: list[int] = []
        self._filled = 0

    def to_the_end(self) -> int:
        """Make the text; returns the exit status."""
        began = time.perf_counter()
        try:
            if self.plan is None:
                self._complete(Person(prompted=False, color=self.options.color, simple=True,
                                      multiline=False))  # fmt: skip
            else:
                self._talk(self.plan)
            status = 0
        except KeyboardInterrupt:
            emit(b"\n")
            status = INTERRUPTED
        except BrokenPipeError:
            discard_output()
            status = CLOSED_OUTPUT
        self.seconds = time.perf_counter() - began
        self.cache.save_all(self.generation)
        return status

    def write_record(self, facts: Mapping[str, Any]) -> None:
        """Write the run to the folder that the options name."""
        from .main_yaml import write_record

        output = b"".join(self._tokenizer.piece(token) for token in self._made)
        write_record(Path(self.options.logdir), self.options, facts, self._prompt, self._made,
                     output, self.generation)  # fmt: skip

    def _complete(self, person: Person) -> None:
        from engine.dialogue import ReversePrompts
        from engine.generate import StopReason

        options, generation = self.options, self.generation
        reverse = ReversePrompts(reverse_prompts(options), self._tokenizer, exact=False)
        if options.n_predict != 0:
            self._show_prompt(person)
        if options.n_predict != 0 and reverse.push(self._prompt):
            return
        for token in generation:
            emit(self._shown(token))
            self.cache.save_prompt(generation)
            if reverse.push([token]):
                return
        if generation.stopped is StopReason.END_OF_GENERATION:
            self.log(" [end of text]")
        elif generation.stopped is StopReason.CONTEXT_FULL:
            self._tell_full()

    def _talk(self, plan: Plan) -> None:
        from engine.dialogue import Dialogue, ReversePrompts

        options, generation = self.options, self.generation
        names = [name for name, _ in options.adapters]
        person = Person(
            prompted=plan.prompted,
            color=options.color,
            simple=options.simple_io,
            multiline=options.multiline_input,
            command=ScaleCommand(names, self.context, generation),
        )
        reverse = ReversePrompts(plan.reverse, self._tokenizer, exact=True)
        reverse.push(self._prompt)
        dialogue = Dialogue(
            generation,
            self._tokenizer,
            plan.turns,
            person,
            reverse,
            asks_first=plan.asks_first,
            opens_with_reverse=plan.opens_with_reverse,
            escape=options.escape,
            piece=self._shown,
            evaluated=lambda: self.cache.save_prompt(generation),
        )
        with interrupts_hand_over(dialogue, person):
            if plan.prompt is None:
                self._show_prompt(person)
            dialogue.run()
        if generation.stopped is not None:
            self._tell_full()

    def _show_prompt(self, person: Person) -> None:
        if self.options.display_prompt:
            person.show_prompt(b"".join(map(self._bytes, self._prompt)))

    def _shown(self, token: int) -> bytes:
        """Give what is shown of a token that was made, and take note of it."""
        self._made.append(token)
        every, n = self.options.print_token_count, self.context.n_past
        if every > 0 and n // every > self._filled // every:
            self.log(f"\nTokens consumed so far = {n} / {self.context.n_ctx}")
        self._filled = n
        return self._bytes(token)

    def _bytes(self, token: int) -> bytes:
        # The original prints C strings: a piece ends at its first zero byte.
        return self._tokenizer.piece(token, self.options.special).partition(b"\0")[0]

    def _tell_full(self) -> None:
        why = "n_predict == -2" if self.context.shifts else "groups are not dropped"
        self.log(f"\n\nmain: context full and {why} => stopping")
