"""Rotary positions (arXiv:2104.09864): from positions to angles, and what stretches them.

Tables are computed once, in float64, and handed to the rotation kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import ShapeError

SCALINGS = ("none", "linear", "yarn")

# Cosines and sines as the rotation kernel wants them: each twice, for both of a pair, sines
# negative for the first.
Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class RopeOptions:
    """What a user says instead of the model's file; None leaves the file's value.

    Attributes
    ----------
    scaling : str, optional
        One of `SCALINGS`.
    freq_base, freq_scale : float, optional
        Above 0.
    original_context : int, optional
        Tokens that the model was trained on before it was stretched; YaRN's.
    ext_factor : float, optional
        How much of YaRN's mixture is taken: 0 none, 1 all. By default 1 with YaRN, else 0.
    attn_factor : float, optional
        Factor on the magnitude, beside the file's own.
    beta_fast, beta_slow : float, optional
        Turns over the original context above which an angle is kept, and below which stretched.
    """

    scaling: str | None = None
    freq_base: float | None = None
    freq_scale: float | None = None
    original_context: int | None = None
    ext_factor: float | None = None
    attn_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model's positions become angles.

    Pair i of position t turns by t · freq_base^(-2i/n_rot), divided by its own factor where the
    file has them (Llama 3), and then stretched: ``linear`` multiplies every angle by `freq_scale`;
    YaRN (arXiv:2309.00071) the slow ones only, and the magnitude by 1 - 0.1 ln(freq_scale).

    Attributes
    ----------
    n_rot : int
        Rotated elements of a head.
    freq_base : float
    scaling : str
        One of `SCALINGS`; with ``none`` `freq_scale` counts as 1.
    freq_scale : float
        The reciprocal of the factor by which the context is stretched.
    original_context, ext_factor, attn_factor, beta_fast, beta_slow
        As in `RopeOptions`.
    """

    n_rot: int
    freq_base: float = 10000.0
    scaling: str = "linear"
    freq_scale: float = 1.0
    original_context: int = 2048
    ext_factor: float | None = None
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what gives no angle."""
        finite = all(map(math.isfinite, (self.freq_base, self.freq_scale, self.attn_factor)))
        if not finite or self.freq_base <= 0 or self.freq_scale <= 0:
            raise ShapeError(
                f"RoPE with a base of {self.freq_base:g}, a scale of {self.freq_scale:g} and a "
                f"magnitude of {self.attn_factor:g} has no angles"
            )
        if self.mix != 0 and self.freq_base <= 1:
            raise ShapeError(f"YaRN needs a RoPE base above 1, not {self.freq_base:g}")
        if min(self.original_context, self.beta_fast, self.beta_slow) <= 0:
            raise ShapeError("YaRN's original context and its betas must be above 0")

    def overridden(self, options: RopeOptions) -> Rope:
        """Give a copy in which what the user says replaces the file's.

        A scale without a scaling turns ``none`` into ``linear``: it was asked for.
        """
        names = ("scaling", "freq_base", "freq_scale", "original_context", "ext_factor",
                 "beta_fast", "beta_slow")  # fmt: skip
        given = {name: getattr(options, name) for name in names}
        changed: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if self.scaling == "none" and "freq_scale" in changed:
            changed.setdefault("scaling", "linear")
        if options.attn_factor is not None:
            changed["attn_factor"] = self.attn_factor * options.attn_factor
        return replace(self, **changed)

    @property
    def scale(self) -> float:
        """The factor on angles that is in force."""
        return 1.0 if self.scaling == "none" else self.freq_scale

    @property
    def mix(self) -> float:
        """How much of YaRN's mixture is in force."""
        if self.ext_factor is None:
            return float(self.scaling == "yarn")
        return self.ext_factor

    @property
    def magnitude(self) -> float:
        """Factor on cosines and sines."""
        return self.attn_factor * (1 - 0.1 * math.log(self.scale) if self.mix else 1.0)

    def frequencies(self, factors: NDArray[np.float32] | None) -> NDArray[np.float64]:
        """Angle of each pair at position 1, of shape (n_rot / 2,)."""
        pair = np.arange(self.n_rot // 2)
        kept = self.freq_base ** (-2.0 * pair / self.n_rot)
        if factors is not None:
            kept = kept / factors.astype(np.float64)
        share = self._kept_share(pair) * self.mix if self.mix else 0.0
        return kept * (self.scale * (1 - share) + share)

    def _kept_share(self, pair: NDArray[np.int64]) -> NDArray[np.float64]:
        """1 for pairs that turn fast, 0 for slow ones, a ramp between."""

        def pair_of(turns: float) -> float:
            """Pair that turns so often over the original context."""
            span = math.log(self.original_context / (2 * math.pi * turns))
            return self.n_rot * span / (2 * math.log(self.freq_base))

        low = max(0, math.floor(pair_of(self.beta_fast)))
        high = min(self.n_rot - 1, math.ceil(pair_of(self.beta_slow)))
        return 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)

    def tables(
        self,
        positions: ArrayLike,
        factors: NDArray[np.float32] | None = None,
        *,
        unit: bool = False,
    ) -> Tables:
        """Cosines and sines of positions.

        Parameters
        ----------
        positions : array_like of int, of length n
        factors : ndarray of shape (n_rot / 2,), optional
            Divisors of the angles: ``rope_freqs.weight``.
        unit : bool
            Leave the magnitude out: what is rotated again has it already.

        Returns
        -------
        cos, sin : ndarray of shape (n, n_rot), float32
        """
        angle = np.asarray(positions)[:, None] * self.frequencies(factors)[None, :]
        magnitude = 1.0 if unit else self.magnitude
        cos = np.repeat(magnitude * np.cos(angle), 2, axis=1).astype(np.float32)
        sin = np.repeat(magnitude * np.sin(angle), 2, axis=1).astype(np.float32)
        sin[:, 0::2] *= -1
        return np.ascontiguousarray(cos), np.ascontiguousarray(sin)
