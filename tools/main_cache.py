"""The prompt cache of a run of `main`: what it takes from the file, and what it leaves there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError

from .console import note
from .main_options import MainOptions

if TYPE_CHECKING:
    from engine.generate import Generation
    from engine.model import Context
    from engine.prompt_cache import PromptCache

Log = Callable[[str], None]


class CachedPrompt:
    """The file of a run, if one was asked for.

    Parameters
    ----------
    context : Context
        Empty.

    Raises
    ------
    FormatError
        If the file is something else than a prompt cache.
    """

    def __init__(self, context: Context, options: MainOptions, log: Log) -> None:
        self._context = context
        self._options = options
        self._log = log
        self._file = None
        self._found: PromptCache | None = None
        self._n_prompt = -1
        if not options.prompt_cache:
            return
        from engine.prompt_cache import PromptCacheFile, UnusableCacheError

        if not context.shifts:
            log("main: warning: --prompt-cache has no effect together with --grp-attn-n")
            return
        self._file = PromptCacheFile(Path(options.prompt_cache), context)
        anew = "read-only, so left" if options.prompt_cache_read_only else "written anew"
        try:
            self._found = self._file.load()
        except FileNotFoundError:
            log(f"main: prompt cache '{options.prompt_cache}' does not exist yet")
        except UnusableCacheError as error:
            log(f"main: warning: prompt cache {error}; ignored, {anew}")

    @property
    def tokens(self) -> list[int]:
        """The text in the file; empty where there is none."""
        return list(self._found.tokens) if self._found else []

    def restore(self, prompt: Sequence[int]) -> int:
        """Fill the context with what the file has of a prompt; returns how many tokens that are.

        The last token is always left, as its logits are needed.
        """
        if self._file is None:
            return 0
        self._n_prompt = len(prompt)
        if self._found is None:
            return 0
        n = min(self._found.common(prompt), self._found.n_rows, len(prompt) - 1)
        n = max(n, 0)
        self._found.restore(self._context, n)
        self._log(
            f"main: prompt cache: {n} of {len(prompt)} tokens of the prompt need no evaluation"
        )
        if n == len(prompt) - 1:
            self._n_prompt = -1  # nothing to add
        self._found = None
        return n

    def save_prompt(self, generation: Generation) -> None:
        """Write the prompt when it has been evaluated, if the file lacks some of it; once."""
        n, self._n_prompt = self._n_prompt, -1
        # Not what has moved already: a prompt that fills the context.
        if n > 0 and generation.n_whole is None and generation.evaluated() >= n:
            self._save(generation.tokens[:n], n)

    def save_all(self, generation: Generation) -> None:
        """Write the whole text at the end, if asked for."""
        if self._options.prompt_cache_all and generation.tokens:
            n = generation.evaluated()
            whole = n if generation.n_whole is None else min(n, generation.n_whole)
            self._save(generation.tokens, whole)

    def _save(self, tokens: Sequence[int], n_rows: int) -> None:
        if self._file is None or self._options.prompt_cache_read_only:
            return
        try:
            self._file.save(tokens, n_rows)
        except EngineError as error:
            # The text is worth more than the time that the next run would save.
            note(f"warning: prompt cache: {error}")
