"""The machine's peaks: arithmetic without memory, memory without arithmetic."""

import numpy as np

from engine.graph cimport Graph, Node
from engine.kernels cimport PROBE_FMA_FLOPS, PROBE_TILES_FLOPS, kernels, op_fn, probe_args
from engine.ops.checks cimport require
from engine.tensor cimport Tensor
from libc.stdint cimport int64_t


cdef class Probe(Node):
    cdef probe_args a

    def __init__(self, Tensor data, int64_t steps, unit, sink):
        self.inputs = () if data is None else (data,)
        self.outputs = ()

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor data
        cdef float[::1] sink = self.recipe[3]
        self.a = probe_args(self.recipe[1], NULL, &sink[0])
        self.args = &self.a
        if self.inputs:
            data = self.inputs[0]
            self.a.data, self.a.n = data.floats(), data.rows * data.cols
            return table.probe_read
        if self.recipe[2] == "tiles":
            return table.probe_tiles
        return table.probe_pairs if self.recipe[2] == "pairs" else table.probe_fma


def probe(Graph graph, int64_t steps=0, Tensor data=None, unit="fma") -> int:
    """Arithmetic of `steps` steps without memory, or reading `data`: for measuring peaks.

    Parameters
    ----------
    graph : Graph
    steps : int
    data : Tensor, optional
        Read instead, split among the threads.
    unit : str
        What computes: "fma" (float32 multiply-adds), "pairs" (products of bf16 pairs), "tiles".

    Returns
    -------
    int
        FLOPs of each thread; 0 where the variant has no such unit, and of reading.
    """
    cdef const kernels *table = graph.table
    flops = {"fma": PROBE_FMA_FLOPS * table.lanes,
             "pairs": 2 * PROBE_FMA_FLOPS * table.lanes * (table.pairs >= 1),
             "tiles": PROBE_TILES_FLOPS * (table.pairs == 2)}
    require(unit in flops, f"no unit {unit!r} computes; there are {', '.join(flops)}")
    graph.add(Probe, data, steps, unit, np.zeros(graph.n_threads, np.float32))
    return steps * flops[unit]
