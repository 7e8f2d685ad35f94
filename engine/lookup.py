"""Guesses at how a text goes on, from what it said before.

Where the last few tokens stood earlier in the text, what followed them there is likely to follow
again: names, quotations, code, anything that is told twice. Guesses cost little to verify, since a
few tokens evaluated together read each weight once (Leviathan et al., arXiv:2211.17192, with the
text in place of their smaller model, as in Saxena's prompt lookup decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

# Longest and shortest stretch of tokens that is looked up. A single token says too little: most
# of its guesses would be evaluated in vain.
LONGEST, SHORTEST = 4, 2


class Lookup:
    """Remembers where each short stretch of tokens last stood.

    Parameters
    ----------
    n_draft : int
        The most tokens that are guessed at once.
    """

    def __init__(self, n_draft: int) -> None:
        self._n_draft = n_draft
        self._tokens: list[int] = []
        # Stretch of tokens: where it was followed by another token, the last time.
        self._places: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that the text has got."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def propose(self, n_most: int) -> list[int]:
        """Guess at most `n_most` tokens; none where the text says nothing it said before."""
        end = len(self._tokens)
        for length in range(min(LONGEST, end), SHORTEST - 1, -1):
            place = self._places.get(tuple(self._tokens[end - length :]))
            if place is not None:
                return self._tokens[place : place + min(self._n_draft, n_most)]
        return []
