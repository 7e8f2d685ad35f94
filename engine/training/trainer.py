"""Forward and backward pass of a batch: the model's graph, its loss, the adapters' gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.autograd import backward
from engine.errors import DataError
from engine.graph import Graph
from engine.llama import AdapterTensors, Builder
from engine.lora import Adapter
from engine.model import Model
from engine.tensor import Tensor

# The most logits that stand in memory at a time: tokens go through the output in blocks.
LOGIT_BYTES = 24 << 20


class Trainer:
    """One planned graph for batches of one size.

    Parameters
    ----------
    model : Model
    adapter : Adapter
        Its parameters are read at each run.
    n_batch, n_ctx : int
        Rows of a batch and tokens of a row.
    checkpointing : bool
        Keep only each layer's input for the backward pass and compute the rest again.
    n_threads : int
    compute : {"auto", "f32"}
        Arithmetic of the products with frozen weights.

    Attributes
    ----------
    grad : ndarray of shape (n_parameters,), float32
        Laid out like `Adapter.flat`; `evaluate` adds to it.
    memory_bytes, input_bytes, work_bytes : int
        Planned: activations, the batch, and the threads' working space.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        n_batch: int,
        n_ctx: int,
        *,
        checkpointing: bool = True,
        n_threads: int = 2,
        compute: str = "auto",
        isa: str | None = None,
    ) -> None:
        self.shape = (n_batch, n_ctx)
        n_tokens = n_batch * n_ctx
        self.grad: NDArray[np.float32] = np.zeros_like(adapter.flat)
        self._n_vocab = model.hparams.n_vocab
        self._ids = np.zeros(n_tokens, np.int32)
        self._targets = np.zeros(n_tokens, np.int32)
        self._weight = np.zeros(1, np.float32)
        graph = Graph(n_threads, isa)
        h = model.hparams

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention(graph, q, k, v, n_batch, h.n_head, h.n_head_kv, h.head_dim**-0.5)

        builder = Builder(
            graph,
            h,
            model.weights.by_name,
            self._parameters(adapter),
            self._ids,
            np.tile(np.arange(n_ctx, dtype=np.int32), n_batch),
            model.rope_tables(n_ctx),
            attend,
        )
        hidden = builder.hidden()
        forward = list(graph.nodes)
        self._losses, dhidden = self._head(builder, hidden)
        if dhidden is not None:
            backward(graph, forward, {hidden: dhidden}, checkpointing)
        graph.plan()
        self._graph = graph
        self.memory_bytes = graph.arena_bytes
        self.work_bytes = graph.scratch_bytes
        self.input_bytes = 2 * self._ids.nbytes

    def _parameters(self, adapter: Adapter) -> dict[str, AdapterTensors]:
        tensors = {}
        begin = 0
        for name, pair in adapter.pairs.items():
            factors = []
            for suffix, value in ((".a", pair.a), (".b", pair.b)):
                grad = self.grad[begin : begin + value.size]
                begin += value.size
                shape = (1, pair.rank) if suffix == ".b" and pair.n_out == 1 else value.shape
                tensor = Tensor.parameter(name + suffix, value.reshape(shape), grad.reshape(shape))
                factors.append(tensor)
            a, b = factors
            tensors[name] = AdapterTensors(a, b, adapter.scale)
        return tensors

    def _head(self, builder: Builder, hidden: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Loss and gradient of blocks of tokens, each forward and backward at once.

        So at most LOGIT_BYTES of logits stand in memory, and none is computed twice.
        """
        graph = builder.graph
        rows = max(1, min(hidden.rows, LOGIT_BYTES // (4 * self._n_vocab)))
        losses = []
        dhidden = None
        if hidden.needs_grad:
            dhidden = ops.zero(graph, "dhidden", hidden.rows, hidden.cols)
        for first in range(0, hidden.rows, rows):
            n = min(rows, hidden.rows - first)
            part = hidden.view(first, n)
            begin = len(graph.nodes)
            logits = builder.logits(part)
            nodes = graph.nodes[begin:]
            targets = self._targets[first : first + n]
            loss, dlogits = ops.cross_entropy(graph, logits, targets, self._weight)
            losses.append(graph.keep(loss))
            seeds = {logits: dlogits}
            if dhidden is not None:
                seeds[part] = dhidden.view(first, n)
            backward(graph, nodes, seeds)
        return losses, dhidden

    def evaluate(
        self, inputs: NDArray[np.int32], targets: NDArray[np.int32], weight: float = 1.0
    ) -> float:
        """Mean loss of a batch; adds `weight` times its gradient to `grad`.

        Parameters
        ----------
        inputs, targets : ndarray of shape (n_batch, n_ctx), int32
            Token ids; a target of -1 does not count.
        weight : float

        Raises
        ------
        DataError
            If the shapes are others or an id is not in the vocabulary.
        """
        if inputs.shape != self.shape or targets.shape != self.shape:
            raise DataError(f"a batch of {inputs.shape} is not one of {self.shape}")
        low, high = min(inputs.min(), targets.min() + 1), max(inputs.max(), targets.max())
        if low < 0 or high >= self._n_vocab:
            raise DataError(f"a token of the batch is outside of the vocabulary of {self._n_vocab}")
        self._ids[:] = inputs.reshape(-1)
        self._targets[:] = targets.reshape(-1)
        counted = max(1, int((self._targets >= 0).sum()))
        self._weight[0] = weight / counted
        self._graph.run()
        total = sum(float(loss.numpy().sum(dtype=np.float64)) for loss in self._losses)
        return total / counted
