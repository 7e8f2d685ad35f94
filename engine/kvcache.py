"""Keys and values of the tokens evaluated so far: append (by the graph), shift, truncate."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F16, F32, DType
from engine.errors import ShapeError
from engine.tensor import Tensor


class KVCache:
    """Two matrices a layer of n_ctx rows, in half or single precision.

    Parameters
    ----------
    n_layer, n_ctx, n_columns : int
    dtype : DType
        F16, as users expect of ``main``, or F32.

    Attributes
    ----------
    n_past : ndarray of shape (1,), int32
        Filled rows; graphs read it at each run.
    keys, values : list of Tensor
    """

    def __init__(self, n_layer: int, n_ctx: int, n_columns: int, dtype: DType = F16) -> None:
        if dtype not in (F16, F32):
            raise ShapeError(f"a cache of {dtype.name} is not offered; F16 and F32 are")
        self.n_ctx = n_ctx
        self.dtype = dtype
        self.n_past = np.zeros(1, np.int32)
        kind = np.float16 if dtype is F16 else np.float32
        self._keys = [np.zeros((n_ctx, n_columns), kind) for _ in range(n_layer)]
        self._values = [np.zeros((n_ctx, n_columns), kind) for _ in range(n_layer)]

        def tensors(name: str, arrays: list[NDArray[Any]]) -> list[Tensor]:
            return [
                Tensor.external(f"{name}.{i}", a, n_ctx, n_columns, dtype.id, writable=True)
                for i, a in enumerate(arrays)
            ]

        self.keys = tensors("keys", self._keys)
        self.values = tensors("values", self._values)

    @property
    def n_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(a.nbytes for a in self._keys + self._values)

    def rows(self, n_rows: int) -> list[NDArray[np.uint8]]:
        """Bytes of the first `n_rows` rows of each layer's keys, then its values; not copied."""
        pairs = zip(self._keys, self._values, strict=True)
        return [a[:n_rows].reshape(-1).view(np.uint8) for pair in pairs for a in pair]

    def truncate(self, n_past: int) -> None:
        """Forget the rows from `n_past` on."""
        if not 0 <= n_past <= self.n_past[0]:
            raise ShapeError(f"cannot keep {n_past} of {self.n_past[0]} cached positions")
        self.n_past[0] = n_past

    def shift(
        self,
        n_keep: int,
        n_discard: int,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        head_dim: int,
    ) -> None:
        """Drop rows n_keep ... n_keep + n_discard, move the rest down and rotate its keys to fit.

        Parameters
        ----------
        cos, sin : ndarray of shape (n_rot,), float32
            Row `n_discard` of unit-magnitude rotation tables.
        """
        end = int(self.n_past[0])
        if n_keep < 0 or n_discard <= 0 or n_keep + n_discard > end:
            raise ShapeError(f"cannot drop positions {n_keep} to {n_keep + n_discard} of {end}")
        moved = slice(n_keep + n_discard, end)
        target = slice(n_keep, end - n_discard)
        n_rot = len(cos)
        for keys, values in zip(self._keys, self._values, strict=True):
            values[target] = values[moved].copy()
            rows = keys[moved].astype(np.float32).reshape(end - n_keep - n_discard, -1, head_dim)
            turned = rows[..., :n_rot]
            swapped = turned.reshape(*turned.shape[:-1], -1, 2)[..., ::-1].reshape(turned.shape)
            rows[..., :n_rot] = turned * cos - swapped * sin
            keys[target] = rows.reshape(end - n_keep - n_discard, -1)
        self.n_past[0] = end - n_discard
