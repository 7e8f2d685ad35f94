"""AdamW over an adapter's parameters (arXiv:1711.05101), with clipping by the global norm."""

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from engine.kernels import sum_squares

from engine.kernels cimport adamw_args, kernels, table


@dataclass(frozen=True, slots=True)
class AdamWParams:
    """Settings that stay the same over a run.

    Attributes
    ----------
    alpha : float
        Learning rate.
    beta1, beta2 : float
        Decay of the moments.
    decay : float
        Decoupled weight decay.
    decay_min_ndim : int
        Only tensors of at least so many dimensions decay, sizes of 1 at the end not counted.
    gclip : float
        Largest norm of the gradient; 0 or less: no limit.
    """

    alpha: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    decay: float = 0.1
    decay_min_ndim: int = 2
    gclip: float = 1.0


class AdamW:
    """The moments and the update.

    Attributes
    ----------
    m, v : ndarray of shape (n_parameters,), float32
        First and second moments, laid out like `Adapter.flat`.
    """

    def __init__(self, adapter, params: AdamWParams) -> None:
        self.params = params
        self._x = adapter.flat
        self.m = np.zeros_like(adapter.flat)
        self.v = np.zeros_like(adapter.flat)
        self._runs = _decay_runs(adapter, params.decay_min_ndim)

    def step(self, float[::1] grad, float sched, int iteration) -> float:
        """Update number `iteration`, from 1.

        Parameters
        ----------
        grad : ndarray of shape (n_parameters,), float32
            Left as zeros.
        sched : float
            Factor on the learning rate.

        Returns
        -------
        float
            Norm of the gradient before clipping.
        """
        cdef float[::1] x = self._x, m = self.m, v = self.v
        cdef adamw_args a
        cdef const kernels *k = table()
        p = self.params
        one = np.float32(1)
        alpha = np.float32(p.alpha) * np.float32(sched)
        a.beta1, a.beta2 = p.beta1, p.beta2
        a.step = alpha / (one - np.power(np.float32(p.beta1), np.float32(iteration)))
        a.correction = one / (one - np.power(np.float32(p.beta2), np.float32(iteration)))
        norm = float(np.sqrt(sum_squares(grad)))
        a.clip = np.float32(p.gclip / norm) if 0 < p.gclip < norm else one
        for begin, end, decays in self._runs:
            a.n = end - begin
            a.x, a.g, a.m, a.v = &x[<int>begin], &grad[<int>begin], &m[<int>begin], &v[<int>begin]
            a.decay = np.float32(p.decay) * alpha if decays else 0.0
            with nogil:
                k.adamw(&a)
        return norm


def _decay_runs(adapter, int min_ndim) -> list[tuple[int, int, bool]]:
    """Stretches of the flat parameters that decay alike: (begin, end, decays)."""
    sizes = []
    for pair in adapter.pairs.values():
        sizes.append((2 >= min_ndim, pair.a.size))
        sizes.append(((2 if pair.n_out > 1 else 1) >= min_ndim, pair.b.size))
    runs = []
    begin = 0
    for decays, group in groupby(sizes, itemgetter(0)):
        end = begin + sum([size for _, size in group])
        runs.append((begin, end, decays))
        begin = end
    return runs
