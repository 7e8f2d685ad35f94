"""The exceptions that reach a user: one line that names the file, the thing and the mend."""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error that bad input can cause; its text is one line for a person."""


class FormatError(EngineError):
    """A file is not what its format says: truncated, contradictory, or of an unknown kind."""


class ShapeError(EngineError):
    """Sizes of tensors, adapters or batches do not fit together."""


class IsaError(EngineError):
    """The processor, or the operating system, lacks what a kernel variant needs."""


class OptionError(EngineError):
    """An option of a command has a value that cannot be used; names the option."""


class DataError(EngineError):
    """Training text, weights or tokens hold something that cannot be used."""
