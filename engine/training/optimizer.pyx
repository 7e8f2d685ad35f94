"""AdamW over an adapter's parameters (arXiv:1711.05101), with clipping by the global norm.

Two passes over memory: one reads the gradient for its norm, one updates everything and clips by the
way, 36 bytes a parameter in all.
"""

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from engine.graph import Graph
from engine.tensor import Tensor

from engine.graph cimport Node
from engine.kernels cimport (
    SQUARE_PART, adamw_args, adamw_now, kernels, op_fn, square_sums_args,
)
from engine.tensor cimport Tensor as CTensor
from libc.stdint cimport int32_t, int64_t


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


cdef class SquareSums(Node):
    """Sums of the squares of the gradient's parts."""

    cdef square_sums_args a

    def __init__(self, CTensor grad, sums):
        self.inputs = (grad,)
        self.outputs = ()

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef CTensor grad = self.inputs[0]
        cdef double[::1] sums = self.recipe[1]
        self.a = square_sums_args(grad.cols, grad.floats(), &sums[0])
        self.args = &self.a
        return table.square_sums


cdef class Update(Node):
    """Parameters and moments after an update; the gradient becomes zero."""

    cdef adamw_args a

    def __init__(
        self, CTensor x, CTensor grad, CTensor m, CTensor v, float beta1, float beta2, now, ends,
        decays
    ):
        self.inputs = self.outputs = (x, grad, m, v)

    @property
    def label(self) -> str:
        return "AdamW"

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef CTensor x = self.inputs[0], grad = self.inputs[1]
        cdef CTensor m = self.inputs[2], v = self.inputs[3]
        cdef float[::1] now = self.recipe[6]
        cdef int64_t[::1] ends = self.recipe[7]
        cdef int32_t[::1] decays = self.recipe[8]
        self.a = adamw_args(
            x.cols, x.floats(), grad.floats(), m.floats(), v.floats(), self.recipe[4],
            self.recipe[5], <const adamw_now *>&now[0], ends.shape[0], &ends[0], &decays[0])
        self.args = &self.a
        return table.adamw


class AdamW:
    """The moments and the update.

    Parameters
    ----------
    adapter : Adapter
        Its parameters are moved in place.
    params : AdamWParams
    n_threads : int
        No bit depends on it.
    isa : str, optional
        Kernel variant.
    measure : bool
        Count the time of both passes.

    Attributes
    ----------
    m, v : ndarray of shape (n_parameters,), float32
        First and second moments, laid out like `Adapter.flat`.
    """

    def __init__(self, adapter, params: AdamWParams, n_threads=1, isa=None, measure=False) -> None:
        self.params = params
        self.m = np.zeros_like(adapter.flat)
        self.v = np.zeros_like(adapter.flat)
        self._x = adapter.flat
        self._ends, self._decays = _decay_runs(adapter, params.decay_min_ndim)
        self._sums = np.zeros(-(-adapter.flat.size // SQUARE_PART))
        self._now = np.zeros(4, np.float32)  # clip, step, correction, decay
        self._n_threads, self._isa = n_threads, isa
        self._measure = measure
        self._grad = self._graph = None

    def norm(self, grad) -> float:
        """Norm of the gradient; its squares are summed in parts that only its size decides.

        Parameters
        ----------
        grad : ndarray of shape (n_parameters,), float32
        """
        self._planned(grad).run(0, 1)
        return float(np.sqrt(self._sums.sum()))

    def step(self, grad, float sched, int iteration, norm=None) -> float:
        """Update number `iteration`, from 1.

        Parameters
        ----------
        grad : ndarray of shape (n_parameters,), float32
            Left as zeros.
        sched : float
            Factor on the learning rate.
        norm : float, optional
            Of the gradient, where it is known.

        Returns
        -------
        float
            Norm of the gradient before clipping.
        """
        p, one = self.params, np.float32(1)
        if norm is None:
            norm = self.norm(grad)
        alpha = np.float32(p.alpha) * np.float32(sched)
        steps = np.float32(iteration)
        self._now[:] = (
            p.gclip / norm if 0 < p.gclip < norm else one,
            alpha / (one - np.power(np.float32(p.beta1), steps)),
            one / (one - np.power(np.float32(p.beta2), steps)),
            np.float32(p.decay) * alpha,
        )
        self._planned(grad).run(1, 2)
        return norm

    def add_times(self, times) -> None:
        """Add the times of both passes to an `OpTimes`, where they are counted."""
        if self._graph is not None:
            times.add(self._graph, counted=False)

    def _planned(self, grad):
        """The graph of both passes, over that array."""
        if self._grad is grad:
            return self._graph
        arrays = {"x": self._x, "gradient": grad, "m": self.m, "v": self.v}
        x, g, m, v = [
            Tensor.external(name, array, 1, self._x.size, 0, True)
            for name, array in arrays.items()
        ]
        self._graph = Graph(self._n_threads, self._isa)
        self._graph.add(SquareSums, g, self._sums)
        self._graph.add(
            Update, x, g, m, v, self.params.beta1, self.params.beta2, self._now, self._ends,
            self._decays)
        self._graph.plan()
        if self._measure:
            self._graph.measure()
        self._grad = grad
        return self._graph


def _decay_runs(adapter, int min_ndim):
    """Stretches of the flat parameters that decay alike: their ends, and whether each decays."""
    sizes = []
    for pair in adapter.pairs.values():
        sizes.append((2 >= min_ndim, pair.a.size))
        sizes.append(((2 if pair.n_out > 1 else 1) >= min_ndim, pair.b.size))
    runs = [
        (decays, sum([size for _, size in group]))
        for decays, group in groupby(sizes, itemgetter(0))
    ]
    ends = np.cumsum([size for _, size in runs], dtype=np.int64)
    return ends, np.array([decays for decays, _ in runs], np.int32)
