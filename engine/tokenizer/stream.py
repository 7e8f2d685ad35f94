"""Bytes of pieces, as they come, to text that never holds half a character."""

from __future__ import annotations

import codecs


class StreamDecoder:
    r"""Decode UTF-8 piece by piece.

    The incomplete character at the end of what was fed is held back until the rest comes. What
    cannot become a character any more is given as U+FFFD as soon as that is certain.

    Examples
    --------
    >>> decoder = StreamDecoder()
    >>> decoder.feed(b"gr\xc3"), decoder.feed(b"\xbcn"), decoder.flush()
    ('gr', 'ün', '')
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """Take bytes of any length and give the characters that are complete."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """End the stream: give what was held back as U+FFFD, and start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
