"""The logarithm of the sum of a row's exponentials, which makes log-probabilities of logits."""

from __future__ import annotations

import math

import numpy as np

from engine.errors import DataError
from engine.measure.windows import Logits


def log_sum_exp(row: Logits, scratch: Logits) -> float:
    """Logarithm of the sum of exponentials: float32 exponentials, summed in float64.

    Parameters
    ----------
    row : ndarray of shape (n,), float32
    scratch : ndarray of shape (n,), float32
        Overwritten.

    Raises
    ------
    DataError
        If it is not finite.
    """
    top = float(row.max())
    with np.errstate(invalid="ignore"):  # seen below
        np.subtract(row, np.float32(top), out=scratch)
    np.exp(scratch, out=scratch)
    result = top + math.log(float(scratch.sum(dtype=np.float64)) or math.nan)
    if not math.isfinite(result):
        raise DataError(
            "the model's scores are not finite; look for its invalid weights with --check-tensors"
        )
    return result
