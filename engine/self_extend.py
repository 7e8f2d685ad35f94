"""Self-Extend (Jin et al., arXiv:2401.01325): old positions in groups, so that new ones stay small.

A model meets no position beyond those it was trained on: as the text grows, the positions of what
lies further back are divided by a whole number, and all that follow move down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ShapeError


@dataclass(slots=True)
class GroupAttention:
    """How far positions are divided, and how far they are already.

    Attributes
    ----------
    factor : int
        Positions that become one.
    width : int
        Positions that are divided together; a multiple of `factor`.
    grouped : int
        Positions below are divided; a multiple of width / factor.
    """

    factor: int
    width: int
    grouped: int = 0

    def __post_init__(self) -> None:
        """Refuse a width that does not divide."""
        if self.factor < 1 or self.width < 1 or self.width % self.factor:
            raise ShapeError(
                f"groups of {self.factor} do not divide a width of {self.width}; "
                "give a width that is a multiple"
            )

    def regroup(self, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Divide where a whole width lies behind the last division.

        Parameters
        ----------
        positions : ndarray of shape (n,), int32
            Of the tokens in their order; never falling.

        Returns
        -------
        ndarray of shape (n,), int32
            Their new positions; `positions` itself where nothing is to be done.
        """
        step = self.width // self.factor
        # A width of positions becomes `step` of them, and what follows moves down by the rest.
        rest = self.width - step
        while len(positions) and positions[-1] + 1 >= self.grouped + self.width:
            begin, end = self.grouped, self.grouped + self.width
            # What was divided before has moved this far; groups are counted from the first token.
            moved = begin // step * rest
            divided = (positions + moved) // self.factor
            inside = (positions >= begin) & (positions < end)
            later = np.where(positions >= end, positions - rest, positions)
            positions = np.where(inside, divided, later).astype(np.int32)
            self.grouped += step
        return positions

    def truncate(self, position: int) -> None:
        """Forget the tokens from a position on.

        Raises
        ------
        ShapeError
            If that is among the grouped ones, unless nothing is left.
        """
        if 0 < position < self.grouped:
            raise ShapeError(
                f"position {position} is among those that Self-Extend has grouped, up to "
                f"{self.grouped}; leave -gan out to go back there"
            )
        self.grouped = min(self.grouped, position)
