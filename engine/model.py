"""A model loaded from a file, and a context in which it evaluates tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine import llama, ops
from engine.dtypes import BY_ID, F16, DType
from engine.errors import DataError, FormatError, OptionError, ShapeError
from engine.gguf import GGUFFile, Scalar, read_gguf
from engine.graph import Graph
from engine.kernels import prefers_pairs
from engine.kvcache import KVCache
from engine.llama import AdapterTensors, Hyperparameters, Weights
from engine.lora import Adapter, in_halves, join_adapters
from engine.perf import OpTimes
from engine.rope import RopeOptions, Tables
from engine.self_extend import GroupAttention
from engine.tensor import Tensor
from engine.tokenizer import Tokenizer
from engine.validate import find_faults

# general.architecture -> the module that reads its keys and writes its graph.
ARCHITECTURES = {llama.ARCHITECTURE: llama}

# Graphs kept for chunks of more tokens than are guessed at a time; a prompt's last chunk has any
# length.
KEPT_GRAPHS = 4

# The most logits that stand in memory at a time, where those of many tokens are wanted: tokens go
# through the output in blocks.
LOGIT_BYTES = 24 << 20

BF16_MODES = ("fast", "exact")


class Model:
    """Weights in the mapped file, hyperparameters, tokenizer.

    Attributes
    ----------
    architecture : module
        Where the model's graph is written; see `ARCHITECTURES`.
    file : GGUFFile
    hparams : Hyperparameters
    weights : Weights
    tokenizer : Tokenizer
    warnings : list of str
        What is odd about the file but does not prevent its use.
    """

    def __init__(
        self,
        architecture: ModuleType,
        file: GGUFFile,
        hparams: Hyperparameters,
        weights: Weights,
        tokenizer: Tokenizer,
    ) -> None:
        self.architecture = architecture
        self.file = file
        self.hparams = hparams
        self.weights = weights
        self.tokenizer = tokenizer
        self.warnings = list(tokenizer.warnings)
        if weights.unused:
            first, n = weights.unused[0], len(weights.unused)
            self.warnings.append(f"{n} tensors are not used, {first} the first")

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        check_tensors: bool = False,
        mapped: bool = True,
        rms_eps: float | None = None,
        rope: RopeOptions | None = None,
        overrides: Mapping[str, Scalar] = MappingProxyType({}),
    ) -> Model:
        """Map a GGUF file and check that it is a model of a known architecture.

        Parameters
        ----------
        path : path of a GGUF file
        check_tensors : bool
            Look at every value for infinities and NaN.
        mapped : bool
            Map the file; else read it into memory.
        rms_eps : float, optional
            Replaces the model's.
        rope : RopeOptions, optional
            Replace the model's, each that is not None.
        overrides : mapping of str to int, float, bool or str
            Metadata instead of the file's; see `GGUFFile.overridden`.

        Raises
        ------
        FormatError
            Naming file and key or tensor.
        DataError
            If `check_tensors` finds a value that cannot be.
        """
        stored = read_gguf(path, mapped=mapped)
        file = stored.overridden(overrides)
        if file.kind != "model":
            raise FormatError(f"{path}: holds no model but one {file.kind}; give a model")
        architecture = file.get_str("general.architecture")
        module = ARCHITECTURES.get(architecture)
        if module is None:
            known = ", ".join(ARCHITECTURES)
            raise FormatError(
                f"{path}: architecture {architecture!r} cannot be run; known: {known}"
            )
        tokenizer = Tokenizer.from_metadata(file.metadata, str(path))
        hparams = module.read_hyperparameters(file, tokenizer.n_vocab)
        hparams = hparams.overridden(rms_eps, rope)
        weights = module.Weights(file, hparams)
        if check_tensors:
            check_values(file)
        model = cls(module, file, hparams, weights, tokenizer)
        model.warnings += [
            f"the file has no key {key}: it is added, and does nothing unless something reads it"
            for key in overrides
            if key not in stored.metadata
        ]
        return model

    def adapter_shapes(self, ranks: Mapping[str, int]) -> list[tuple[str, int, int, int]]:
        """Name, n_in, n_out, rank of the adapted tensors, in the files' order."""
        shapes: list[tuple[str, int, int, int]] = self.architecture.adapter_shapes(
            self.hparams, ranks
        )
        return shapes

    def rope_tables(self, positions: ArrayLike, *, unit: bool = False) -> Tables:
        """Cosines and sines of positions; see `Rope.tables`."""
        return self.hparams.rope.tables(positions, self.weights.rope_factors, unit=unit)


def check_values(file: GGUFFile) -> None:
    """Look at every stored value or block scale for infinities and NaN.

    Raises
    ------
    DataError
        Naming the tensor, the row and the position of the first.
    """
    for fault in find_faults(file):
        raise DataError(f"{file.path}: {fault}; get the file again")


class _Evaluation(NamedTuple):
    """A planned graph for chunks of one length, with its inputs and result.

    `hidden` is what the output weights multiply: rows of the chunk's last tokens, of which
    `logits`, where the graph computes them, is the product.
    """

    graph: Graph
    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    hidden: Tensor
    logits: Tensor | None


class _Head(NamedTuple):
    """A planned graph from hidden rows to logits."""

    graph: Graph
    hidden: NDArray[np.float32]
    logits: Tensor


class Context:
    """A cache of keys and values, and the graphs that extend it.

    Parameters
    ----------
    model : Model
    n_ctx : int
        Positions of the cache.
    n_batch, n_ubatch : int
        The most tokens evaluated together: the smaller of both.
    n_threads, n_threads_batch : int
        Threads for single tokens and for longer chunks.
    adapters : sequence of (Adapter, scale)
        Applied beside the weights, which stay as they are.
    cache_types : (DType, DType)
        How keys and values are kept: see `engine.dtypes.CACHE_TYPES`.
    group : GroupAttention, optional
        Divides positions as the text grows (Self-Extend); the context is then never shifted.
    directions : mapping of int to Tensor
        What a control vector adds to the output of a layer.
    bf16 : {"fast", "exact"}
        Whether activations that meet BF16 weights are rounded to bf16 where that is faster, or stay
        float32. Quantized weights meet 8-bit blocks either way, and F32 and F16 ones float32.
    isa : str, optional
        Kernel variant.
    measure : bool
        Count the time of each op, for `op_times`.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        *,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int = 2,
        n_threads_batch: int | None = None,
        adapters: Sequence[tuple[Adapter, float]] = (),
        cache_types: tuple[DType, DType] = (F16, F16),
        group: GroupAttention | None = None,
        directions: Mapping[int, Tensor] = MappingProxyType({}),
        bf16: str = "fast",
        isa: str | None = None,
        measure: bool = False,
    ) -> None:
        h = model.hparams
        if bf16 not in BF16_MODES:
            raise OptionError(f"--bf16: {bf16} is not one of {', '.join(BF16_MODES)}")
        self.model = model
        self.n_ctx = n_ctx
        self._n_chunk = min(n_batch, n_ubatch, n_ctx)
        if self._n_chunk < 1:
            raise ShapeError(f"chunks of {self._n_chunk} tokens cannot be evaluated")
        self._threads = (n_threads, n_threads_batch or n_threads)
        self._isa = isa
        self._pairs = bf16 == "fast" and prefers_pairs(isa)
        self._n_batch = n_batch
        self._group = group
        self._directions = directions
        self._cache = KVCache(h.n_layer, n_ctx, h.n_head_kv, h.head_dim, *cache_types)
        self._tables = model.rope_tables(range(n_ctx))
        self._given_adapters = list(adapters)
        self._adapters, self._few_adapters = self._join_adapters()
        # By length, rows of the result, and whether they are logits.
        self._measure = measure
        self._op_times = {False: OpTimes(), True: OpTimes()}  # by: is of more than one token
        self._evaluations: OrderedDict[tuple[int, int, bool], _Evaluation] = OrderedDict()
        self._heads: dict[int, _Head] = {}

    @property
    def n_past(self) -> int:
        """Positions that are filled."""
        return int(self._cache.n_past[0])

    @property
    def cache(self) -> KVCache:
        """Keys and values of the positions that are filled."""
        return self._cache

    @property
    def adapters(self) -> Mapping[str, AdapterTensors]:
        """What all adapters together add to a weight, by its name."""
        return self._adapters

    @property
    def directions(self) -> Mapping[int, Tensor]:
        """What control vectors add behind a layer, by its number."""
        return self._directions

    def set_adapter_scale(self, index: int, scale: float) -> None:
        """Apply an adapter with another scale from the next token on.

        Parameters
        ----------
        index : int
            Place among the adapters given.
        scale : float
        """
        adapter, _ = self._given_adapters[index]
        self._given_adapters[index] = (adapter, scale)
        self._adapters, self._few_adapters = self._join_adapters()
        self.op_times()  # those of the graphs that go are not to be lost
        self._evaluations.clear()
        self._heads.clear()

    def _join_adapters(self) -> tuple[dict[str, AdapterTensors], dict[str, AdapterTensors]]:
        every = dict.fromkeys((*llama.LAYER_TENSORS, "token_embd", "output_norm", "output"), 1)
        joined = join_adapters(self._given_adapters, self.model.adapter_shapes(every))
        weights = self.model.weights.by_name
        rounding = [name for name in joined if BY_ID[weights[name].type].block > 1]
        return in_halves(joined, [name for name in rounding if name != "token_embd"])

    def evaluate(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cache.

        Parameters
        ----------
        tokens : sequence of int, at least one

        Returns
        -------
        ndarray of shape (n_vocab,), float32
            Logits of the last token, in memory that the next call overwrites.

        Raises
        ------
        ShapeError
            If there are none, or more than the cache has room for.
        DataError
            If one is not in the vocabulary.
        """
        ids = self._checked(tokens)
        done = 0
        for chunk in self._chunks(ids):
            done += len(chunk)
            result = self._run(chunk, 1, head=done == len(ids))
        assert result.logits is not None
        return result.logits.numpy()[0]

    def evaluate_each(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a few tokens to the cache.

        Returns
        -------
        ndarray of shape (n_tokens, n_vocab), float32
            Logits of each token, in memory that the next call may overwrite. Of up to
            `ops.DOT_TOKENS` they are the same bits as if each token had been evaluated alone.

        Raises
        ------
        ShapeError, DataError
            As `evaluate` does; also if there are more tokens than are evaluated together.
        """
        ids = self._checked(tokens)
        if len(ids) > self._n_chunk:
            raise ShapeError(f"{len(ids)} tokens are more than the {self._n_chunk} of a batch")
        self._regroup()
        logits = self._run(ids, len(ids), head=True).logits
        assert logits is not None
        return logits.numpy()

    def logits(
        self, tokens: Sequence[int] | NDArray[np.int32], first: int = 0
    ) -> Iterator[NDArray[np.float32]]:
        """Append tokens to the cache and give the logits of all but the first of them.

        They come in blocks of at most `LOGIT_BYTES`, in order; tokens are evaluated as blocks are
        asked for.

        Parameters
        ----------
        tokens : sequence of int, at least one
        first : int
            Tokens without logits at the beginning.

        Returns
        -------
        iterator of ndarray of shape (n, n_vocab), float32
            In memory that the next block overwrites.

        Raises
        ------
        ShapeError, DataError
            As `evaluate` does.
        """
        return self._logits(self._checked(tokens), first)

    def _logits(self, ids: NDArray[np.int64], first: int) -> Iterator[NDArray[np.float32]]:
        rows = max(1, LOGIT_BYTES // (4 * self.model.hparams.n_vocab))
        done = 0
        for chunk in self._chunks(ids):
            done += len(chunk)
            wanted = min(len(chunk), max(0, done - first))
            hidden = self._run(chunk, max(1, wanted), head=False).hidden
            for row in range(hidden.rows - wanted, hidden.rows, rows):
                part = hidden.numpy()[row : row + rows]
                head = self._head(len(part))
                head.hidden[:] = part
                head.graph.run()
                yield head.logits.numpy()

    def _checked(self, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int64]:
        ids = np.asarray(tokens, np.int64)
        n = len(ids)
        if n == 0 or self.n_past + n > self.n_ctx:
            raise ShapeError(f"{n} tokens after {self.n_past} do not fit a context of {self.n_ctx}")
        if ids.min() < 0 or ids.max() >= self.model.hparams.n_vocab:
            raise DataError(
                f"token {ids.min() if ids.min() < 0 else ids.max()} is not in the vocabulary"
            )
        return ids

    def _chunks(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut tokens into what one graph takes; positions are grouped before each batch."""
        for begin in range(0, len(ids), self._n_batch):
            self._regroup()
            batch = ids[begin : begin + self._n_batch]
            for first in range(0, len(batch), self._n_chunk):
                yield batch[first : first + self._n_chunk]

    def _run(self, chunk: NDArray[np.int64], n_last: int, *, head: bool) -> _Evaluation:
        """Evaluate tokens that one graph takes; the result has so many last rows."""
        result = self._evaluation(len(chunk), n_last, head)
        position = self._cache.next_position
        result.ids[:] = chunk
        result.positions[:] = np.arange(position, position + len(chunk))
        result.graph.run()
        self._cache.append(len(chunk))
        return result

    def _evaluation(self, n_tokens: int, n_last: int, head: bool) -> _Evaluation:
        key = (n_tokens, n_last, head)
        found = self._evaluations.get(key)
        if found is None:
            found = self._evaluations[key] = self._build(*key)
        self._evaluations.move_to_end(key)
        others = [k for k in self._evaluations if k[0] > ops.DOT_TOKENS]
        if len(others) > KEPT_GRAPHS:
            self._count(self._evaluations.pop(others[0]).graph, others[0][0])
        return found

    def _plan(self, graph: Graph) -> None:
        graph.plan()
        if self._measure:
            graph.measure()

    def _count(self, graph: Graph, n_tokens: int, *, counted: bool = True) -> None:
        """Take down the times of a graph, which then begins anew."""
        if self._measure:
            self._op_times[n_tokens > 1].add(graph, counted=counted)
            graph.measure()

    def op_times(self) -> tuple[OpTimes, OpTimes]:
        """Tell the time of each op so far, where it is counted: of single tokens, of chunks."""
        for key, evaluation in self._evaluations.items():
            self._count(evaluation.graph, key[0])
        for n_rows, head in self._heads.items():
            self._count(head.graph, n_rows, counted=False)
        return self._op_times[False], self._op_times[True]

    def _graph(self, n_tokens: int) -> Graph:
        graph = Graph(self._threads[n_tokens > 1], self._isa)
        graph.partner = True
        graph.pairs = self._pairs
        return graph

    def _head(self, n_rows: int) -> _Head:
        """Find the graph of the output's product for so many rows."""
        found = self._heads.get(n_rows)
        if found is not None:
            return found
        if len(self._heads) == KEPT_GRAPHS:
            n_old = next(iter(self._heads))
            self._count(self._heads.pop(n_old).graph, n_old, counted=False)
        h = self.model.hparams
        rows = np.zeros((n_rows, h.n_embd), np.float32)
        graph = self._graph(n_rows)
        builder = self._builder(graph, *np.zeros((2, n_rows), np.int32))
        hidden = Tensor.external("hidden", rows, n_rows, h.n_embd)
        logits = graph.keep(builder.logits(hidden))
        self._plan(graph)
        self._heads[n_rows] = _Head(graph, rows, logits)
        return self._heads[n_rows]

    def _build(self, n_tokens: int, n_last: int, head: bool) -> _Evaluation:
        graph = self._graph(n_tokens)
        ids, positions = np.zeros((2, n_tokens), np.int32)
        builder = self._builder(graph, ids, positions)
        hidden = builder.hidden(n_last)
        logits = graph.keep(builder.logits(hidden)) if head else None
        if not head:
            graph.keep(hidden)
        self._plan(graph)
        return _Evaluation(graph, ids, positions, hidden, logits)

    def _builder(
        self, graph: Graph, ids: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> llama.Builder:
        h, cache = self.model.hparams, self._cache

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            ops.cache_store(graph, k, keys, cache.n_past)
            ops.cache_store(graph, v, values, cache.n_past)
            scale = h.head_dim**-0.5
            return ops.attention(
                graph,
                q,
                keys,
                values,
                1,
                h.n_head,
                h.n_head_kv,
                scale,
                cache.n_past,
                pairs=ops.multiplies_pairs(
                    graph, self.model.weights.by_name[f"blk.{layer}.attn_q"]
                ),
            )

        few = len(ids) <= ops.DOT_TOKENS
        builder: llama.Builder = self.model.architecture.Builder(
            graph,
            h,
            self.model.weights.by_name,
            self._few_adapters if few else self._adapters,
            ids,
            positions,
            self._tables,
            attend,
            directions=self._directions,
            round_query=cache.key_type is F16,
        )
        return builder

    @property
    def shifts(self) -> bool:
        """Whether room is made by dropping positions, which grouped ones do not allow."""
        return self._group is None

    def _regroup(self) -> None:
        if self._group is None:
            return
        old = self._cache.positions[: self.n_past]
        new = self._group.regroup(old)
        if new is not old:
            self._cache.move(new, self.model.rope_tables(old - new, unit=True))

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Drop `n_discard` positions behind the first `n_keep` and move the rest down."""
        self._cache.shift(n_keep, n_discard, self.model.rope_tables([n_discard], unit=True))

    def truncate(self, n_past: int) -> None:
        """Forget the positions from `n_past` on."""
        if self._group is not None and n_past < self.n_past:
            self._group.truncate(int(self._cache.positions[n_past]) if n_past else 0)
        self._cache.truncate(n_past)
