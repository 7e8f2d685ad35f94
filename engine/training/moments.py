"""The order of parameters inside a checkpoint's moment vectors.

Files hold each moment as one vector over all parameters, in the order in which the original
program visited its graph. Two orders exist, neither is that of the tensors, and the file does not
say which it has. In memory a moment lies like `Adapter.flat`, so that the optimizer sees three
vectors of one layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import numpy as np

from engine.lora import Adapter, FloatArray, file_order, layer_of

_Factor = tuple[str, str]  # a pair's name, and "a" or "b"

_DESCENT = ("ffn_down", "ffn_gate", "ffn_norm", "attn_output", "attn_norm")
_RETURN = ("attn_v", "attn_k", "attn_q", "ffn_up")
_ASCENT = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_up",
    "ffn_gate",
    "ffn_down",
)


class MomentOrder(Enum):
    """How the original visited the parameters; the names are those of its own report."""

    LEFT_TO_RIGHT = "LEFT_TO_RIGHT"
    RIGHT_TO_LEFT = "RIGHT_TO_LEFT"


def factors_in_order(adapter: Adapter, order: MomentOrder) -> list[_Factor]:
    """Name the adapter's factors in the order of a moment vector."""
    layers = sorted({layer_of(name) for name in adapter.pairs} - {-1})
    if order is MomentOrder.LEFT_TO_RIGHT:
        names, halves = _left_to_right(layers), "ab"
    else:
        names, halves = _right_to_left(layers), "ba"
    return [(name, half) for name in names if name in adapter.pairs for half in halves]


def _left_to_right(layers: list[int]) -> Iterator[str]:
    """From the output down; each layer encloses the one below it, the lowest the embedding."""
    yield from ("output", "output_norm")
    for layer in reversed(layers):
        yield from (f"blk.{layer}.{kind}" for kind in _DESCENT)
    yield "token_embd"
    for layer in layers:
        yield from (f"blk.{layer}.{kind}" for kind in _RETURN)


def _right_to_left(layers: list[int]) -> Iterator[str]:
    yield "token_embd"
    for layer in layers:
        yield from (f"blk.{layer}.{kind}" for kind in _ASCENT)
    yield from ("output_norm", "output")


def moments_to_file(flat: FloatArray, adapter: Adapter) -> Iterator[FloatArray]:
    """Copy a moment in the layout of `Adapter.flat` in the order LEFT_TO_RIGHT, a factor at a time.

    Parameters
    ----------
    flat : ndarray of shape (n_parameters,), float32
    adapter : Adapter
        Gives names and sizes; its values are not looked at.

    Yields
    ------
    ndarray of shape (n, rank), float32
    """
    views = factor_views(flat, adapter)
    for factor in factors_in_order(adapter, MomentOrder.LEFT_TO_RIGHT):
        yield file_order(views[factor])


def moments_from_file(vector: FloatArray, adapter: Adapter, order: MomentOrder) -> FloatArray:
    """Put a moment vector of a file into the layout of `Adapter.flat`.

    Parameters
    ----------
    vector : ndarray of shape (n_parameters,), float32
    adapter : Adapter
    order : MomentOrder
        Of `vector`.

    Returns
    -------
    ndarray of shape (n_parameters,), float32
    """
    flat = np.empty_like(adapter.flat)
    views = factor_views(flat, adapter)
    begin = 0
    for factor in factors_in_order(adapter, order):
        view = views[factor]
        view[:] = vector[begin : begin + view.size].reshape(view.shape[::-1]).T
        begin += view.size
    return flat


def factor_views(flat: FloatArray, adapter: Adapter) -> dict[_Factor, FloatArray]:
    """Cut an array laid out like `Adapter.flat` into its factors, by name and "a" or "b"."""
    views = {}
    begin = 0
    for pair in adapter.pairs.values():
        for half, factor in (("a", pair.a), ("b", pair.b)):
            views[pair.name, half] = flat[begin : begin + factor.size].reshape(factor.shape)
            begin += factor.size
    return views


def find_order(second: FloatArray, adapter: Adapter) -> tuple[MomentOrder, bool]:
    """Tell from its zeros in which order a second moment was written.

    Rows of the embedding's B whose tokens the run never met have a second moment of exactly zero,
    and nothing else has, once A and B have both moved; before that all of A is zero as well. The
    order under which no zero is out of place is the file's.

    Parameters
    ----------
    second : ndarray of shape (n_parameters,), float32
    adapter : Adapter

    Returns
    -------
    order : MomentOrder
    certain : bool
        False when the zeros do not decide; LEFT_TO_RIGHT is assumed then.
    """
    if not second.any():
        return MomentOrder.LEFT_TO_RIGHT, True
    zero = second == 0
    for a_moved in (True, False):
        left, right = (
            _misplaced_zeros(zero, adapter, order, a_moved=a_moved)
            for order in (MomentOrder.LEFT_TO_RIGHT, MomentOrder.RIGHT_TO_LEFT)
        )
        if left == 0 < right:
            return MomentOrder.LEFT_TO_RIGHT, True
        if right == 0 < left:
            return MomentOrder.RIGHT_TO_LEFT, True
    return MomentOrder.LEFT_TO_RIGHT, False


def _misplaced_zeros(
    zero: np.ndarray, adapter: Adapter, order: MomentOrder, *, a_moved: bool
) -> int:
    """Count zeros where the reading `order` expects none."""
    views = adapter.pairs
    misplaced = begin = 0
    for name, half in factors_in_order(adapter, order):
        end = begin + getattr(views[name], half).size
        excused = (name == "token_embd" and half == "b") or (half == "a" and not a_moved)
        if not excused:
            misplaced += int(np.count_nonzero(zero[begin:end]))
        begin = end
    return misplaced
