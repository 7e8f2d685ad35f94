"""Forward and backward pass of a batch: the graph, its loss, and the adapters' gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import ops
from engine.autograd import backward
from engine.errors import DataError, OptionError
from engine.graph import Graph, Node
from engine.kernels import has_pairs, prefers_pairs
from engine.llama import AdapterTensors, Builder
from engine.lora import Adapter
from engine.model import LOGIT_BYTES, Model
from engine.perf import OpTimes
from engine.tensor import Tensor

# A part of the gradient is final once so many steps of the graph have run: (steps, begin, end).
FinalPart = tuple[int, int, int]
# Hears that no step to come adds to grad[begin:end].
OnFinal = Callable[[int, int], object]

# Tokens that go through the graph together, at most if rows allow it, and half of that at least.
PASS_TOKENS = 1024

# Blocks of logits at most, each of which reads the weights of the output: those of few tokens are
# LOGIT_BYTES long, those of many take more.
LOGIT_BLOCKS = 2

# Tokens of a panel of a product: blocks of logits are as long as several.
PANEL_TOKENS = 64

# The least gradient that is told of by itself.
PART_BYTES = 256 << 10


def _in_pairs(compute: str, isa: str | None) -> bool:
    if compute == "bf16" and not has_pairs(isa):
        raise OptionError("--compute bf16: this machine has no bf16 products; use auto or f32")
    return compute == "bf16" or (compute == "auto" and prefers_pairs(isa))


def rows_at_once(n_batch: int, n_ctx: int) -> int:
    """How many rows of a batch go through the graph together, a divisor of all.

    Gradients are sums over rows, so the rest can follow; what one step writes the next then finds
    in a cache, and activations take less memory. No fewer tokens than products need.
    """
    divisors = [n for n in range(1, n_batch + 1) if n_batch % n == 0]
    few = max((n for n in divisors if n * n_ctx <= PASS_TOKENS), default=1)
    return next(n for n in divisors if n >= few and (2 * n * n_ctx >= PASS_TOKENS or n == n_batch))


def _ignored(_begin: int, _end: int) -> None:
    pass


class _Pass:
    """A planned graph for batches of one size, with its inputs and losses.

    Attributes
    ----------
    ids, targets : ndarray of shape (n_tokens,), int32
    starts, positions : ndarray of shape (n_tokens,), int32
        Of packed rows: where in its row each token's sample begins, and the token's place in it.
    weight : ndarray of shape (1,), float32
        Factor of the gradient of the losses' sum.
    losses : list of Tensor
        Rows' losses, a tensor a block of tokens.
    flops, repeated_flops : int
        See `Trainer`.
    """

    def __init__(
        self,
        graph: Graph,
        model: Model,
        adapters: dict[str, AdapterTensors],
        shape: tuple[int, int],
        *,
        gradients: bool,
        checkpointing: bool,
        kept_layers: int,
        packed: bool,
        lender: Graph | None,
    ) -> None:
        n_batch, n_ctx = shape
        h = model.hparams
        self.graph = graph
        self.ids = np.zeros(n_batch * n_ctx, np.int32)
        self.targets = np.zeros(n_batch * n_ctx, np.int32)
        self.starts = np.zeros(n_batch * n_ctx, np.int32)
        self._in_row = np.tile(np.arange(n_ctx, dtype=np.int32), n_batch)
        self.positions = self._in_row.copy()
        self.weight = np.zeros(1, np.float32)
        self.losses: list[Tensor] = []

        first_key = self.starts if packed else None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pairs = ops.multiplies_pairs(graph, model.weights.by_name[f"blk.{layer}.attn_q"])
            sizes = (n_batch, h.n_head, h.n_head_kv, h.head_dim**-0.5)
            kept = builder.kept_type([f"blk.{layer}.attn_output"])
            how: dict[str, Any] = {"first_key": first_key, "pairs": pairs, "type": kept}
            return ops.attention(graph, q, k, v, *sizes, **how)

        builder = model.architecture.Builder(
            graph,
            h,
            model.weights.by_name,
            adapters,
            self.ids,
            self.positions,
            model.rope_tables(range(n_ctx)),
            attend,
        )
        hidden = builder.hidden()
        forward = list(graph.nodes)
        dhidden = self._head(builder, hidden, gradients)
        n_once = len(graph.nodes)
        if dhidden is not None:
            # The last layers: their activations have gone before others are computed again.
            kept = range(h.n_layer - kept_layers, h.n_layer)
            backward(graph, forward, {hidden: dhidden}, checkpointing, kept)
        again = [node for node in graph.nodes[n_once:] if isinstance(node, ops.Linear)]
        self.flops, self.repeated_flops = _product_flops(graph.nodes), _product_flops(again)
        graph.plan(lender)

    def _head(self, builder: Builder, hidden: Tensor, gradients: bool) -> Tensor | None:
        """Loss and gradient of blocks of tokens, each forward and backward at once.

        So few logits stand in memory, LOGIT_BYTES or a part of all, and none is computed twice.
        """
        graph = self.graph
        rows = max(1, LOGIT_BYTES // (4 * builder.h.n_vocab))
        rows -= rows % PANEL_TOKENS if rows > PANEL_TOKENS else 0
        part_of_all = -(-hidden.rows // (LOGIT_BLOCKS * PANEL_TOKENS)) * PANEL_TOKENS
        if hidden.rows >= LOGIT_BLOCKS * PANEL_TOKENS:
            rows = max(rows, part_of_all)
        dhidden = None
        if gradients and hidden.needs_grad:
            dhidden = ops.zero(graph, "dhidden", hidden.rows, hidden.cols)
        for first in range(0, hidden.rows, rows):
            n = min(rows, hidden.rows - first)
            part = hidden.view(first, n)
            begin = len(graph.nodes)
            logits = builder.logits(part)
            nodes = graph.nodes[begin:]
            targets = self.targets[first : first + n]
            kept = ops.kept_type(graph, n, [builder.weights["output"]])
            loss, dlogits = ops.cross_entropy(graph, logits, targets, self.weight, kept)
            self.losses.append(graph.keep(loss))
            if gradients:
                seeds = {logits: dlogits}
                if dhidden is not None:
                    seeds[part] = dhidden.view(first, n)
                backward(graph, nodes, seeds)
        return dhidden

    def run(
        self,
        inputs: NDArray[np.int32],
        targets: NDArray[np.int32],
        starts: NDArray[np.int32] | None,
        weight: float,
        parts: list[FinalPart],
        on_final: OnFinal,
    ) -> float:
        """Run with these inputs, telling of each part when it is final; the sum of the losses."""
        self.ids[:] = inputs.reshape(-1)
        self.targets[:] = targets.reshape(-1)
        self.starts[:] = 0 if starts is None else starts.reshape(-1)
        np.subtract(self._in_row, self.starts, out=self.positions)
        self.weight[0] = weight
        first = 0
        for step, begin, end in parts:
            if step > first:
                self.graph.run(first, step)
            on_final(begin, end)
            first = step
        self.graph.run(first)
        return sum(float(loss.numpy().sum(dtype=np.float64)) for loss in self.losses)


class Trainer:
    """Loss and gradient of batches of one size.

    Parameters
    ----------
    model : Model
    adapter : Adapter
        Its parameters are read at each run.
    n_batch, n_ctx : int
        Rows of a batch and tokens of a row.
    checkpointing : bool
        Keep only each layer's input for the backward pass and compute the rest again.
    kept_layers : int
        So many of the last layers keep everything in spite of that; no bit depends on it.
    n_threads : int
    compute : {"auto", "f32", "bf16"}
        Arithmetic of the products with frozen weights that are not F32: float32, bf16 with
        float32 sums, or what is faster here.
    isa : str, optional
        Kernel variant.
    packed : bool
        Rows may hold several samples that do not see each other.
    measure : bool
        Count the time of each op.

    Attributes
    ----------
    grad : ndarray of shape (n_parameters,), float32
        Laid out like `Adapter.flat`; `evaluate` adds to it.
    memory_bytes, input_bytes, work_bytes : int
        Planned: activations, the batch, and the threads' working space.
    n_threads : int
    flops, repeated_flops : int
        Of the products with weights that a run takes; and of those what is computed again.

    Raises
    ------
    OptionError
        If bf16 is asked for and the kernel variant has no bf16 products.
    """

    def __init__(
        self,
        model: Model,
        adapter: Adapter,
        n_batch: int,
        n_ctx: int,
        *,
        checkpointing: bool = True,
        kept_layers: int = 0,
        n_threads: int = 2,
        compute: str = "auto",
        isa: str | None = None,
        packed: bool = False,
        measure: bool = False,
    ) -> None:
        self.shape = (n_batch, n_ctx)
        self._rows = rows_at_once(n_batch, n_ctx)
        self._n_passes = n_batch // self._rows
        self.grad: NDArray[np.float32] = np.zeros_like(adapter.flat)
        self._model = model
        self.n_threads = n_threads
        self._isa = isa
        self._pairs = _in_pairs(compute, isa)
        self._packed = packed
        self._measure = measure
        self._parts: list[FinalPart] | None = None
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._tensors = self._parameters(adapter)
        self._training = self._plan(True, checkpointing, kept_layers, packed)
        self._forward: _Pass | None = None
        self.memory_bytes = self._training.graph.arena_bytes
        self.work_bytes = self._training.graph.scratch_bytes
        self.input_bytes = self._n_passes * 2 * self._training.ids.nbytes
        self.flops = self._n_passes * self._training.flops
        self.repeated_flops = self._n_passes * self._training.repeated_flops

    def _parameters(self, adapter: Adapter) -> dict[str, AdapterTensors]:
        tensors = {}
        begin = 0
        for name, pair in adapter.pairs.items():
            factors = []
            for suffix, value in ((".a", pair.a), (".b", pair.b)):
                end = begin + value.size
                grad = self.grad[begin:end]
                shape = (1, pair.rank) if suffix == ".b" and pair.n_out == 1 else value.shape
                tensor = Tensor.parameter(name + suffix, value.reshape(shape), grad.reshape(shape))
                assert tensor.grad is not None
                self._places[tensor.grad] = (begin, end)
                begin = end
                factors.append(tensor)
            a, b = factors
            tensors[name] = AdapterTensors(a, b, adapter.scale)
        return tensors

    def _plan(
        self,
        gradients: bool,
        checkpointing: bool = False,
        kept_layers: int = 0,
        packed: bool = False,
        lender: Graph | None = None,
    ) -> _Pass:
        graph = Graph(self.n_threads, self._isa)
        graph.pairs = graph.rounded = self._pairs
        planned = _Pass(
            graph,
            self._model,
            self._tensors,
            (self._rows, self.shape[1]),
            gradients=gradients,
            checkpointing=checkpointing,
            kept_layers=kept_layers,
            packed=packed,
            lender=lender,
        )
        if self._measure and gradients:
            graph.measure()
        return planned

    def add_times(self, times: OpTimes) -> None:
        """Add the time of each op of `evaluate` so far, where it is counted."""
        times.add(self._training.graph, runs_a_whole=self._n_passes)

    def _check(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> None:
        if inputs.shape != self.shape or targets.shape != self.shape:
            raise DataError(f"a batch of {inputs.shape} is not one of {self.shape}")
        n_vocab = self._model.hparams.n_vocab
        low, high = min(inputs.min(), targets.min() + 1), max(inputs.max(), targets.max())
        if low < 0 or high >= n_vocab:
            raise DataError(f"a token of the batch is outside of the vocabulary of {n_vocab}")

    def _check_starts(self, starts: NDArray[np.int32] | None) -> None:
        if starts is None:
            return
        if not self._packed or starts.shape != self.shape:
            raise DataError(f"packed rows of {starts.shape} are not for this trainer")
        if starts.min() < 0 or (starts > np.arange(self.shape[1])).any():
            raise DataError("a sample of a packed row begins behind one of its tokens")

    def evaluate(
        self,
        inputs: NDArray[np.int32],
        targets: NDArray[np.int32],
        weight: float = 1.0,
        starts: NDArray[np.int32] | None = None,
    ) -> float:
        """Mean loss of a batch; adds `weight` times its gradient to `grad`.

        Parameters
        ----------
        inputs, targets : ndarray of shape (n_batch, n_ctx), int32
            Token ids; a target of -1 does not count.
        weight : float
        starts : ndarray of shape (n_batch, n_ctx), int32, optional
            Of packed rows: where in its row each token's sample begins. A token sees nothing before
            that, and has its position from there.

        Raises
        ------
        DataError
            If the shapes are others or an id is not in the vocabulary.
        """
        counted = max(1, int((targets >= 0).sum()))
        return self.accumulate(inputs, targets, weight / counted, starts) / counted

    def accumulate(
        self,
        inputs: NDArray[np.int32],
        targets: NDArray[np.int32],
        weight: float,
        starts: NDArray[np.int32] | None = None,
        on_final: OnFinal | None = None,
    ) -> float:
        """Sum of the losses of a batch; adds `weight` times its gradient to `grad`.

        Parameters
        ----------
        inputs, targets, starts
            As in `evaluate`.
        weight : float
        on_final : callable (begin, end), optional
            Called on the way, as soon as nothing more is added to ``grad[begin:end]``; all of
            `grad` is told of once, its end first.
        """
        self._check(inputs, targets)
        self._check_starts(starts)
        if on_final is None:
            return self._run(self._training, inputs, targets, starts, weight)
        if self._parts is None:
            self._parts = self._final_parts()
        last = (self._parts, on_final)
        return self._run(self._training, inputs, targets, starts, weight, *last)

    def _run(
        self,
        planned: _Pass,
        inputs: NDArray[np.int32],
        targets: NDArray[np.int32],
        starts: NDArray[np.int32] | None,
        weight: float,
        parts: list[FinalPart] | None = None,
        on_final: OnFinal = _ignored,
    ) -> float:
        """Run some rows after others, the gradient final at the last; the sum of the losses."""
        total = 0.0
        for first in range(0, len(inputs), self._rows):
            rows = slice(first, first + self._rows)
            begins = None if starts is None else starts[rows]
            final = (parts or [], on_final) if rows.stop == len(inputs) else ([], _ignored)
            total += planned.run(inputs[rows], targets[rows], begins, weight, *final)
        return total

    def _final_parts(self) -> list[FinalPart]:
        """Parts of the gradient in the order in which they become final.

        Layers lie in the gradient in their order and become final in the reverse order, so
        neighbours make a part, until it has PART_BYTES.
        """
        written = dict.fromkeys(self._places, 0)
        for step, node in enumerate(self._training.graph.nodes, 1):
            written.update((tensor, step) for tensor in node.outputs if tensor in written)
        parts: list[FinalPart] = []
        for tensor, (begin, end) in reversed(self._places.items()):
            step = written[tensor]
            if parts and 4 * (parts[-1][2] - parts[-1][1]) < PART_BYTES:
                later, _, end = parts.pop()
                step = max(step, later)
            parts.append((step, begin, end))
        return sorted(parts)

    def loss(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> tuple[float, int]:
        """Sum of the losses of a batch and how many targets count in it; `grad` stays as it is.

        Parameters and errors as in `evaluate`.
        """
        self._check(inputs, targets)
        if self._forward is None:
            # Takes no memory of its own: between evaluations nothing in theirs is needed.
            self._forward = self._plan(gradients=False, lender=self._training.graph)
        total = self._run(self._forward, inputs, targets, None, 0.0)
        return total, int((targets >= 0).sum())


def _product_flops(nodes: Sequence[Node]) -> int:
    """Multiplications and additions of products with stored weights."""
    products = (node for node in nodes if isinstance(node, ops.Linear | ops.LinearBack))
    sizes = ((node.inputs[0].rows, *node.inputs[1].shape) for node in products)
    return sum(2 * n * rows * cols for n, rows, cols in sizes)
