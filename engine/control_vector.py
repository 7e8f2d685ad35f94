"""Control vectors: a direction a layer, added to what the layer gives, steers what a model says.

The file is GGUF with a tensor ``direction.N`` of n_embd F32 numbers for each layer N from 1 on;
``direction.N`` is added behind layer N, counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.dtypes import F32
from engine.errors import FormatError, ShapeError
from engine.gguf import read_gguf
from engine.tensor import Tensor

Directions = dict[int, NDArray[np.float32]]

_NAME = re.compile(r"direction\.([0-9]{1,6})")


def read_control_vector(path: Path | str) -> Directions:
    """Read the directions of a file by their layer.

    Returns
    -------
    dict of int to ndarray of shape (n_embd,), float32

    Raises
    ------
    FormatError
        If there are none, or one is of another type or shape; names the tensor.
    """
    with read_gguf(path) as file:
        found: Directions = {}
        for info in file.tensors.values():
            if not info.name.startswith("direction."):
                continue
            match = _NAME.fullmatch(info.name)
            layer = int(match.group(1)) if match else 0
            if layer < 1 or info.dtype is not F32 or len(info.shape) != 1:
                raise FormatError(
                    f"{path}: tensor {info.name}: is no direction, which has F32 numbers in one "
                    "dimension and a layer from 1 on; make the control vector again"
                )
            found[layer] = file.data(info.name).view(np.float32).copy()
    if not found:
        raise FormatError(f"{path}: holds no directions; give a control vector")
    for layer, direction in found.items():
        if not np.isfinite(direction).all():
            raise FormatError(f"{path}: tensor direction.{layer}: holds an infinity or NaN")
    return found


def sum_directions(
    vectors: Sequence[tuple[Path | str, Directions, float]],
    n_embd: int,
    layers: range,
) -> Mapping[int, Tensor]:
    """Scale control vectors and add them up.

    Parameters
    ----------
    vectors : sequence of (name, directions, scale)
    n_embd : int
        The model's width.
    layers : range
        Layers to be steered; directions of others are left out.

    Returns
    -------
    mapping of int to Tensor of shape (1, n_embd)

    Raises
    ------
    ShapeError
        If a direction is not as wide as the model; names the file.
    """
    total: Directions = {}
    for name, directions, scale in vectors:
        for layer, direction in directions.items():
            if len(direction) != n_embd:
                raise ShapeError(
                    f"{name}: directions of {len(direction)} do not fit a model of width {n_embd}; "
                    "give a control vector that was made for this model"
                )
            if layer in layers:
                scaled = direction * np.float32(scale)
                total[layer] = total[layer] + scaled if layer in total else scaled
    return {
        layer: Tensor.external(f"direction.{layer}", direction, 1, n_embd)
        for layer, direction in total.items()
    }
