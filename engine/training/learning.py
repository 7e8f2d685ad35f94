"""Proof that a run has taught something: a loss before and after, and how far tensors moved.

It reads; neither the training's numbers nor its random state notice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from engine.dtypes import BY_ID
from engine.kernels import decode, sum_squares
from engine.lora import Adapter, FloatArray, LoraPair
from engine.tensor import Tensor
from engine.training.moments import MomentOrder, factor_views, factors_in_order

# Weights up to this size are summed whole; of larger ones some rows stand for all.
WHOLE_ELEMENTS = 1 << 26
_CHUNK_ELEMENTS = 1 << 20
_SAMPLED_ROWS = 16
_LARGEST = 3


@dataclass(frozen=True, slots=True)
class RelativeSize:
    """Norm of what an adapter adds to a tensor, in parts of the tensor's own norm."""

    name: str
    ratio: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What a run has changed.

    Attributes
    ----------
    before, after : float or None
        Loss on the same data, if there are any.
    n_moved, n_tensors : int
        Adapted tensors whose product BA is another than before, and all of them.
    largest : tuple of RelativeSize
        The three that weigh most, largest first.
    """

    before: float | None
    after: float | None
    n_moved: int
    n_tensors: int
    largest: tuple[RelativeSize, ...]


class Learning:
    """Looks at an adapter before a run, and again behind it.

    Parameters
    ----------
    adapter : Adapter
    weights : mapping of str to Tensor
        The frozen tensors, by the names of the adapter's pairs.
    loss : callable () -> float, optional
        Mean loss on data that stays the same.
    """

    def __init__(
        self,
        adapter: Adapter,
        weights: Mapping[str, Tensor],
        loss: Callable[[], float] | None = None,
    ) -> None:
        self._adapter = adapter
        self._weights = weights
        self._loss: Callable[[], float | None] = loss or _no_loss
        # Digests instead of a copy: an adapter on everything may be as large as its model.
        self._digests = {name: _product_digest(pair) for name, pair in adapter.pairs.items()}
        self.before = self._loss()

    def proof(self) -> Proof:
        """Compare with what was there at first."""
        pairs = self._adapter.pairs
        moved = [name for name in pairs if _product_digest(pairs[name]) != self._digests[name]]
        largest = tuple(largest_changes(self._adapter, self._weights))
        return Proof(self.before, self._loss(), len(moved), len(pairs), largest)


def _no_loss() -> None:
    return None


def _product_digest(pair: LoraPair) -> bytes:
    """Tell products BA apart; a pair with a factor of zeros adds nothing, whatever the other is."""
    if not (pair.a.any() and pair.b.any()):
        return b""
    digest = hashlib.blake2b(pair.a.tobytes(), digest_size=16)
    digest.update(pair.b.tobytes())
    return digest.digest()


def largest_changes(
    adapter: Adapter, weights: Mapping[str, Tensor], n: int = _LARGEST
) -> list[RelativeSize]:
    """Find the tensors to which an adapter adds most, ‖s·BA‖ / ‖W‖ in Frobenius norms.

    A few rows of each weight choose them; the weights of those chosen are then summed whole, if
    they are not huge.
    """
    sizes = {name: adapter.scale * product_norm(p.a, p.b) for name, p in adapter.pairs.items()}
    rough = {name: _ratio(size, sampled_norm(weights[name])) for name, size in sizes.items()}
    chosen = sorted((name for name in rough if sizes[name] > 0), key=rough.__getitem__)[-n:]
    exact = [RelativeSize(name, _ratio(sizes[name], norm(weights[name]))) for name in chosen]
    return sorted(exact, key=lambda size: -size.ratio)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.inf if part > 0 else 0.0


def product_norm(a: FloatArray, b: FloatArray) -> float:
    """Frobenius norm of Bᵀ A, from the products of each factor with itself.

    ‖BᵀA‖² = Σ (B Bᵀ) ∘ (A Aᵀ): rank × rank numbers, never the n_out × n_in of the product.
    """
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return math.sqrt(max(0.0, float(np.sum((wide_a @ wide_a.T) * (wide_b @ wide_b.T)))))


def norm(weight: Tensor) -> float:
    """Frobenius norm of a stored weight, decoded in pieces; of a huge one, an estimate."""
    if weight.rows * weight.cols > WHOLE_ELEMENTS:
        return sampled_norm(weight, 16 * _SAMPLED_ROWS)
    step = max(1, _CHUNK_ELEMENTS // weight.cols)
    starts = range(0, weight.rows, step)
    return math.sqrt(sum(_sum_squares(weight, i, min(step, weight.rows - i)) for i in starts))


def sampled_norm(weight: Tensor, n_rows: int = _SAMPLED_ROWS) -> float:
    """Estimate a Frobenius norm from evenly spaced rows."""
    n_rows = min(n_rows, weight.rows)
    places = [i * weight.rows // n_rows for i in range(n_rows)]
    total = sum(_sum_squares(weight, place, 1) for place in places)
    return math.sqrt(total * weight.rows / n_rows)


def _sum_squares(weight: Tensor, first: int, n_rows: int) -> float:
    row_bytes = BY_ID[weight.type].row_bytes(weight.cols)
    whole = weight
    while whole.base is not None:  # a part of a joint weight
        first += whole.first_row
        whole = whole.base
    assert whole.owner is not None
    data = whole.owner.reshape(-1).view(np.uint8)[first * row_bytes :][: n_rows * row_bytes]
    return sum_squares(decode(weight.type, data, n_rows * weight.cols))


def not_finite_tensor(adapter: Adapter, flat: FloatArray) -> str | None:
    """Name the first tensor with an infinite or NaN element, as the way back meets them.

    From the output down to the embedding: what is not finite spreads to all that comes later, so
    that the first one is nearest to the cause.

    Parameters
    ----------
    adapter : Adapter
    flat : ndarray of shape (n_parameters,), float32
        Laid out like `Adapter.flat`, a gradient for one.

    Returns
    -------
    str or None
        ``blk.0.attn_q.weight.lora_a``; None when every element is finite.
    """
    views = factor_views(flat, adapter)
    for name, half in reversed(factors_in_order(adapter, MomentOrder.RIGHT_TO_LEFT)):
        if not np.isfinite(views[name, half]).all():
            return f"{name}.weight.lora_{half}"
    return None
