"""The text that a command is given: by options, from files."""

from __future__ import annotations

import os
from collections.abc import Iterable

from engine.errors import OptionError
from engine.escapes import resolve_escapes

from .main_options import PromptSource


def prompt_bytes(
    parts: Iterable[tuple[PromptSource, str]], *, escape: bool, file_option: str = "--file"
) -> bytes:
    """Put a text together from its parts, in their order.

    Parameters
    ----------
    parts : iterable of (PromptSource, str)
        A text given as it is forgets what was before, and so does a binary file; a file is joined
        to it and loses one line break at its end.
    escape : bool
        Resolve escapes in the whole.
    file_option : str
        What names its files, for messages.

    Raises
    ------
    OptionError
        If a file cannot be read.
    """
    prompt = b""
    for source, value in parts:
        if source is PromptSource.TEXT:
            prompt = os.fsencode(value)
        elif source is PromptSource.BINARY_FILE:
            prompt = file_bytes("--binary-file", value)
        else:
            prompt = (prompt + file_bytes(file_option, value)).removesuffix(b"\n")
    return resolve_escapes(prompt) if escape else prompt


def file_bytes(option: str, name: str) -> bytes:
    """Read a file that an option names.

    Raises
    ------
    OptionError
        If it cannot be read; names option and file.
    """
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise OptionError(f"{option}: {name}: {error.strerror}") from None
