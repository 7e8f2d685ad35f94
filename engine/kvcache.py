"""Keys and values of the tokens evaluated so far: append (by the graph), move, truncate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F16, DType
from engine.errors import ShapeError
from engine.kernels import decode, encode
from engine.rope import Tables
from engine.tensor import Tensor

Bytes = NDArray[np.uint8]


class KVCache:
    """Two matrices a layer of n_ctx rows; every row has a position.

    Parameters
    ----------
    n_layer, n_ctx, n_head, head_dim : int
        Heads of keys and values, and the elements of one.
    key_type, value_type : DType
        How rows are stored: one of `CACHE_TYPES`, whose blocks divide a head.

    Attributes
    ----------
    n_past : ndarray of shape (1,), int32
        Filled rows; graphs read it at each run.
    positions : ndarray of shape (n_ctx,), int32
        Of the filled rows, in the order of the text: never falling.
    keys, values : list of Tensor

    Raises
    ------
    ShapeError
        If a head is not a whole number of a type's blocks.
    """

    def __init__(
        self,
        n_layer: int,
        n_ctx: int,
        n_head: int,
        head_dim: int,
        key_type: DType = F16,
        value_type: DType = F16,
    ) -> None:
        self.n_ctx = n_ctx
        self.key_type = key_type
        self.value_type = value_type
        self.n_past = np.zeros(1, np.int32)
        self.positions = np.zeros(n_ctx, np.int32)
        self._head_dim = head_dim
        n_columns = n_head * head_dim

        def matrices(name: str, dtype: DType) -> tuple[list[Bytes], list[Tensor]]:
            if head_dim % dtype.block:
                raise ShapeError(
                    f"a cache of {name} as {dtype.name}: heads of {head_dim} are not whole blocks "
                    f"of {dtype.block}; choose another type"
                )
            shape = (n_ctx, dtype.row_bytes(n_columns))
            arrays = [np.zeros(shape, np.uint8) for _ in range(n_layer)]
            return arrays, [
                Tensor.external(f"{name}.{i}", a, n_ctx, n_columns, dtype.id, writable=True)
                for i, a in enumerate(arrays)
            ]

        self._keys, self.keys = matrices("keys", key_type)
        self._values, self.values = matrices("values", value_type)

    @property
    def n_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(a.nbytes for a in self._keys + self._values)

    def rows(self, n_rows: int) -> list[Bytes]:
        """Bytes of the first `n_rows` rows of each layer's keys, then its values; not copied."""
        pairs = zip(self._keys, self._values, strict=True)
        return [a[:n_rows].reshape(-1) for pair in pairs for a in pair]

    @property
    def next_position(self) -> int:
        """Position of the token that comes next."""
        n = int(self.n_past[0])
        return int(self.positions[n - 1]) + 1 if n else 0

    def append(self, n_tokens: int) -> None:
        """Count rows that a graph has written, at the positions behind the last."""
        begin, first = int(self.n_past[0]), self.next_position
        self.positions[begin : begin + n_tokens] = np.arange(first, first + n_tokens)
        self.n_past[0] += n_tokens

    def truncate(self, n_past: int) -> None:
        """Forget the rows from `n_past` on."""
        if not 0 <= n_past <= self.n_past[0]:
            raise ShapeError(f"cannot keep {n_past} of {self.n_past[0]} cached positions")
        self.n_past[0] = n_past

    def shift(self, n_keep: int, n_discard: int, turn: Tables) -> None:
        """Drop rows n_keep ... n_keep + n_discard, move the rest down and rotate its keys to fit.

        Parameters
        ----------
        turn : (cos, sin) of shape (1, n_rot)
            Rotation of unit magnitude by `n_discard` positions.
        """
        end = int(self.n_past[0])
        if n_keep < 0 or n_discard <= 0 or n_keep + n_discard > end:
            raise ShapeError(f"cannot drop positions {n_keep} to {n_keep + n_discard} of {end}")
        moved = slice(n_keep + n_discard, end)
        target = slice(n_keep, end - n_discard)
        for keys, values in zip(self._keys, self._values, strict=True):
            values[target] = values[moved].copy()
            keys[target] = self._turned_back(keys[moved], turn)
        self.positions[target] = self.positions[moved] - n_discard
        self.n_past[0] = end - n_discard

    def move(self, positions: NDArray[np.int32], turn: Tables) -> None:
        """Give the filled rows lower positions and rotate their keys to fit.

        Parameters
        ----------
        positions : ndarray of shape (n_past,), int32
            None above the row's present one.
        turn : (cos, sin) of shape (n_past, n_rot)
            Rotation of unit magnitude by the difference, a row each.
        """
        end = int(self.n_past[0])
        rows = np.flatnonzero(positions != self.positions[:end])
        for keys in self._keys:
            keys[rows] = self._turned_back(keys[rows], (turn[0][rows], turn[1][rows]))
        self.positions[:end] = positions

    def _turned_back(self, rows: Bytes, turn: Tables) -> Bytes:
        """Decode stored keys, rotate them back and encode them again."""
        n, row_bytes = rows.shape
        n_columns = self.keys[0].cols
        if n == 0:
            return rows
        x = decode(self.key_type.id, np.ascontiguousarray(rows).reshape(-1), n * n_columns)
        heads = x.reshape(n, -1, self._head_dim)
        cos, sin = (table[:, None, :] for table in turn)
        turned = heads[..., : cos.shape[-1]]
        swapped = turned.reshape(*turned.shape[:-1], -1, 2)[..., ::-1].reshape(turned.shape)
        turned[...] = turned * cos - swapped * sin
        return encode(self.key_type.id, x).reshape(n, row_bytes)
