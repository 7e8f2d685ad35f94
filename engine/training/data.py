"""From a training text to batches: samples, their shuffle, and rows of tokens.

Every random choice follows from one generator whose state a checkpoint keeps, so a resumed run
meets the samples that the interrupted one would have met.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError
from engine.mt19937 import MT19937

IntArray = NDArray[np.int32]
IndexArray = NDArray[np.int64]
MaskArray = NDArray[np.bool_]

# A target that does not count in the loss.
NO_TARGET = -1

# Characters as the splitter sees them: their length comes from the first byte alone, so a text
# that is not UTF-8 has a rhythm of its own. A run of one-byte characters is taken at once.
_CHARACTERS = re.compile(
    rb"[\x00-\xBF]+|[\xC0-\xDF].{0,1}|[\xE0-\xEF].{0,2}|[\xF0-\xFF].{0,3}", re.DOTALL
)


class TextTokenizer(Protocol):
    """What the splitter needs of a tokenizer."""

    @property
    def max_token_bytes(self) -> int:
        """Largest byte length of a token's text as stored."""

    def encode(self, text: bytes) -> list[int]:
        """Turn bytes into tokens, without special tokens."""


class SpecialTokens(Protocol):
    """The ids that end and begin rows; -1 for one that the vocabulary lacks."""

    @property
    def bos_id(self) -> int:
        """Beginning of a sequence."""

    @property
    def eos_id(self) -> int:
        """End of a sequence."""

    @property
    def eot_id(self) -> int:
        """End of a turn."""


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """How a text is cut into samples.

    Attributes
    ----------
    sample_start : bytes
        Samples begin at each occurrence; empty: at every token.
    include_sample_start : bool
        The pattern belongs to its sample.
    overlapping_samples : bool
        A sample is not ended by the next occurrence.
    """

    sample_start: bytes = b""
    include_sample_start: bool = False
    overlapping_samples: bool = False


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of a text: pieces of one list of tokens.

    Attributes
    ----------
    tokens : ndarray of shape (n_tokens,), int32
    begin, size : ndarray of shape (n_samples,), int64
        In tokens; no size is 0.
    hash : int
        64 bits that tell whether a checkpoint's shuffle was made from the same samples.
    warnings : list of str
        For a person, one line each.
    mask : ndarray of shape (n_tokens,), bool, or None
        Which tokens count in the loss. With a mask nothing else counts: no padding, no separators.
        None: everything counts.
    begin_token : int or None
        Token that every sample begins with and that `tokens` leaves out, since rows begin with it;
        None: rows begin with BOS.
    extent : ndarray of shape (n_samples, 2), int64, or None
        Bytes of the text that each sample was made from, first and behind the last; None where
        places in `tokens` say the same.
    """

    tokens: IntArray
    begin: IndexArray
    size: IndexArray
    hash: int
    warnings: list[str] = field(default_factory=list)
    mask: MaskArray | None = None
    begin_token: int | None = None
    extent: IndexArray | None = None

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.begin)

    @property
    def n_unique_tokens(self) -> int:
        """How many different tokens occur."""
        return len(np.unique(self.tokens))

    @property
    def n_counted(self) -> int:
        """How many tokens count in the loss."""
        return len(self.tokens) if self.mask is None else int(np.count_nonzero(self.mask))


def read_training_text(path: str | Path) -> bytes:
    """Read a training text; cheap to call before a model is loaded.

    Raises
    ------
    DataError
        If the file is missing, cannot be read, or is empty.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: training text cannot be read: {error.strerror}") from error
    if not text:
        raise DataError(f"{path}: training text is empty")
    return text


def load_samples(
    path: str | Path,
    tokenizer: TextTokenizer,
    n_ctx: int,
    *,
    sample_start: bytes = b"",
    include_sample_start: bool = False,
    overlapping_samples: bool = False,
) -> Samples:
    """Read a training text and cut it into samples; `split_samples` says how."""
    options = SplitOptions(sample_start, include_sample_start, overlapping_samples)
    return split_samples(read_training_text(path), str(path), tokenizer, n_ctx, options)


def split_samples(
    text: bytes,
    name: str,
    tokenizer: TextTokenizer,
    n_ctx: int,
    options: SplitOptions = SplitOptions(),
) -> Samples:
    """Cut a training text into samples.

    Parameters
    ----------
    text : bytes
    name : str
        The text's file name as the user typed it; enters the hash.
    tokenizer : TextTokenizer
    n_ctx : int
        Tokens of a row. A longer sample is kept whole, a row takes its front.
    options : SplitOptions, optional

    Raises
    ------
    DataError
        If nothing is left to train on.
    """
    extent = None
    if options.sample_start:
        tokens, size, extent, warnings = _split_at_pattern(text, tokenizer, n_ctx, options)
        begin = np.cumsum(size) - size
    else:
        tokens = np.array(tokenizer.encode(text), dtype=np.int32)
        count = max(1, len(tokens) - n_ctx)
        begin = np.arange(count, dtype=np.int64)
        size = np.full(count, min(n_ctx, len(tokens)), dtype=np.int64)
        warnings = []
    if not len(tokens):
        raise DataError(f"{name}: training text holds no sample that is not empty")
    fingerprint = samples_hash(name, begin, size)
    return Samples(tokens, begin, size, fingerprint, warnings, extent=extent)


def _split_at_pattern(
    text: bytes, tokenizer: TextTokenizer, n_ctx: int, options: SplitOptions
) -> tuple[IntArray, IndexArray, IndexArray, list[str]]:
    """Tokenize each sample alone; returns all tokens, sizes and extents without empty samples.

    The warnings come last.
    """
    positions = _occurrences(text, options.sample_start)
    skipped = 0 if options.include_sample_start else len(options.sample_start)
    warnings = []
    if not positions:
        positions, skipped = [0], 0
        warnings.append(
            f"sample start pattern {options.sample_start.decode(errors='backslashreplace')!r}"
            " does not occur. the whole text is one sample."
        )
    begins = np.array(positions, dtype=np.int64) + skipped
    if options.overlapping_samples:
        ends = np.minimum(begins + tokenizer.max_token_bytes * n_ctx, len(text))
    else:
        ends = np.append(np.array(positions[1:], dtype=np.int64), len(text))
    ends = _after_characters(text, ends)
    pieces = [
        np.array(tokenizer.encode(text[begin:end]) if end > begin else [], dtype=np.int32)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
    ]
    sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
    warnings += _size_warnings(sizes, n_ctx)
    extents = np.stack([begins, ends], axis=1)
    return np.concatenate(pieces), sizes[sizes > 0], extents[sizes > 0], warnings


def _occurrences(text: bytes, pattern: bytes) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(pattern), text)]


def _after_characters(text: bytes, ends: IndexArray) -> IndexArray:
    """Move ends that lie inside a character behind it."""
    wide = [m.span() for m in _CHARACTERS.finditer(text) if text[m.start()] >= 0xC0]
    if not wide:
        return ends
    starts, stops = np.array(wide, dtype=np.int64).T
    before = np.searchsorted(starts, ends, side="left") - 1
    inside = (before >= 0) & (ends < stops[before])
    return np.where(inside, stops[before], ends)


def _size_warnings(sizes: IndexArray, n_ctx: int) -> Iterator[str]:
    longer, shorter, empty = sizes[sizes > n_ctx], sizes[(sizes < n_ctx) & (sizes > 0)], sizes == 0
    if len(longer):
        yield (
            f"{len(longer)} samples (max length {longer.max()}) exceed context length of"
            f" {n_ctx}. they are cut off."
        )
    if len(shorter):
        yield (
            f"{len(shorter)} samples (min length {shorter.min()}) are shorter than context"
            f" length of {n_ctx}."
        )
    if empty.any():
        yield f"{np.count_nonzero(empty)} empty samples. they are left out."


_MASK = 0xFFFFFFFFFFFFFFFF
_HASH_FACTOR = 0xC6A4A7935BD1E995
_HASH_SEED = 0xC70F6907


def string_hash(text: bytes) -> int:
    """Hash bytes as libstdc++'s ``std::hash<std::string>`` on 64-bit machines (MurmurHash64A)."""

    def folded(value: int) -> int:
        return value ^ (value >> 47)

    whole = len(text) & ~7
    h = _HASH_SEED ^ (len(text) * _HASH_FACTOR & _MASK)
    for i in range(0, whole, 8):
        group = int.from_bytes(text[i : i + 8], "little")
        mixed = folded(group * _HASH_FACTOR & _MASK) * _HASH_FACTOR & _MASK
        h = (h ^ mixed) * _HASH_FACTOR & _MASK
    if whole < len(text):
        h = (h ^ int.from_bytes(text[whole:], "little")) * _HASH_FACTOR & _MASK
    return folded(folded(h) * _HASH_FACTOR & _MASK)


def samples_hash(name: str, begin: IndexArray, size: IndexArray) -> int:
    """Hash that decides whether a checkpoint's shuffle still fits: the name, begins and sizes."""
    h = string_hash(os.fsencode(name)) ^ (2 * len(begin))
    for numbers in (begin, size):
        h ^= int(np.bitwise_xor.reduce(2 * numbers.astype(np.uint64)))
    return h


@dataclass(slots=True)
class ShuffleState:
    """What a checkpoint keeps of a shuffle: the generator **before** it, and how far it is used.

    Attributes
    ----------
    rng_state : str
        Text of the generator; empty: none yet.
    samples_hash, sample_count : int
        Of the samples it was made for.
    next_sample : int
        Position of the next sample in the shuffled order.
    """

    rng_state: str = ""
    samples_hash: int = 0
    sample_count: int = 0
    next_sample: int = 0

    def fits(self, samples: Samples) -> bool:
        """Whether the shuffle can go on with `samples`."""
        same = self.samples_hash == samples.hash and self.sample_count == len(samples)
        return bool(self.rng_state) and same

    def restart(self, samples: Samples, seed: int) -> None:
        """Begin anew, from a generator seeded with `seed`."""
        self.rng_state = MT19937(seed).state_text
        self.samples_hash = samples.hash
        self.sample_count = len(samples)
        self.next_sample = 0


@dataclass(frozen=True, slots=True)
class ShuffledOrder:
    """One epoch's order.

    Attributes
    ----------
    order : ndarray of shape (n_samples,), int64
        Samples in the order in which they are met.
    offset : ndarray of shape (n_samples,), int64
        Token of each, by position, at which a row begins under random offsets.
    next_rng_state : str
        The generator after the shuffle, from which the next epoch's is made.
    """

    order: IndexArray
    offset: IndexArray
    next_rng_state: str


def shuffle(size: IndexArray, rng_state: str) -> ShuffledOrder:
    """Shuffle samples: by one random word each, then one offset each in the new order.

    Parameters
    ----------
    size : ndarray of shape (n_samples,), int64
        At least 1 each.
    rng_state : str
        Text of the generator; 2 · n_samples words are drawn.
    """
    generator = MT19937.from_text(rng_state)
    order = np.argsort(generator.words(len(size)), kind="stable")
    fraction = generator.words(len(size)).astype(np.float64) / 4294967294.0
    offset = np.trunc((size[order] - 1).astype(np.float64) * fraction).astype(np.int64)
    return ShuffledOrder(order, offset, generator.state_text)


def begin_and_end_tokens(tokenizer: SpecialTokens, source: str) -> tuple[int, int]:
    """Ids that begin a row and that pad it, for vocabularies that lack one.

    Without an end-of-sequence token the end-of-turn token pads; without a beginning-of-sequence
    token the padding token begins rows.

    Raises
    ------
    DataError
        If nothing can pad; names `source`, the model.
    """
    eos = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.eot_id
    if eos < 0:
        raise DataError(
            f"{source}: the vocabulary has neither an end-of-sequence nor an end-of-turn token"
            " (tokenizer.ggml.eos_token_id, tokenizer.ggml.eot_token_id); one is needed to train"
        )
    return (tokenizer.bos_id if tokenizer.bos_id >= 0 else eos), eos


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How rows are filled.

    Attributes
    ----------
    n_batch, n_ctx : int
        Rows, and tokens of a row.
    bos, eos : int
        Tokens that begin and pad a row (`begin_and_end_tokens`).
    fill_with_next_samples : bool
        Behind a short sample others follow, instead of padding.
    separate_with_eos, separate_with_bos : bool
        Put these between the samples of a row.
    sample_random_offsets : bool
        A row's first sample begins at its drawn offset.
    pack_samples : bool
        As many samples as fit whole lie in a row, each as it would be in a row of its own: it
        begins with a row's first token, sees nothing of the others, and no padding counts.
    """

    n_batch: int
    n_ctx: int
    bos: int
    eos: int
    fill_with_next_samples: bool = False
    separate_with_eos: bool = False
    separate_with_bos: bool = True
    sample_random_offsets: bool = False
    pack_samples: bool = False


class Batch(NamedTuple):
    """Rows of tokens.

    Attributes
    ----------
    inputs, targets : ndarray of shape (n_batch, n_ctx), int32
        An input row is its target row one later, with BOS in front. Where a mask leaves a token
        out, its target is -1.
    used : int
        Samples that went in.
    starts : ndarray of shape (n_batch, n_ctx), int32, or None
        Where in its row each token's sample begins, when samples are packed; None: at the row's
        begin.
    """

    inputs: IntArray
    targets: IntArray
    used: int
    starts: IntArray | None = None


class Batches:
    """An endless stream of batches, epoch after epoch.

    Parameters
    ----------
    samples : Samples
    state : ShuffleState
        Where to go on; kept up to date. A state of other samples must be restarted first.
    options : BatchOptions

    Attributes
    ----------
    epochs : int
        Epochs completed since construction.

    Raises
    ------
    FormatError
        If the state's generator is not one.
    """

    def __init__(self, samples: Samples, state: ShuffleState, options: BatchOptions) -> None:
        self.samples = samples
        self.state = state
        self.options = options
        self.epochs = 0
        # A first token that the samples share is part of each: it is not left out between them.
        own = samples.begin_token is not None
        self._begin_token = options.bos if samples.begin_token is None else samples.begin_token
        self._separator = np.array(
            [options.eos] * options.separate_with_eos
            + [self._begin_token] * (own or options.separate_with_bos),
            dtype=np.int32,
        )
        self._shuffled = shuffle(samples.size, state.rng_state)

    def next(self) -> Batch:
        """Draw a batch and move on; past the last sample it wraps within the old order."""
        batch = self._packed() if self.options.pack_samples else self._filled()
        self._advance(batch.used)
        return batch

    def _filled(self) -> Batch:
        """Rows of a sample each, or with others behind it."""
        n_batch, n_ctx = self.options.n_batch, self.options.n_ctx
        targets = np.full((n_batch, n_ctx), self.options.eos, dtype=np.int32)
        counts = np.full((n_batch, n_ctx), self.samples.mask is None)
        used = 0
        for row, row_counts in zip(targets, counts, strict=True):
            used += self._fill_row(row, row_counts, used)
        inputs = np.empty_like(targets)
        inputs[:, 0] = self._begin_token
        inputs[:, 1:] = targets[:, :-1]
        targets[~counts] = NO_TARGET
        return Batch(inputs, targets, used)

    def _packed(self) -> Batch:
        """Rows of as many samples as fit whole, each as in a row of its own."""
        shape = (self.options.n_batch, self.options.n_ctx)
        inputs = np.full(shape, self.options.eos, dtype=np.int32)
        targets = np.full(shape, NO_TARGET, dtype=np.int32)
        starts = np.zeros(shape, dtype=np.int32)
        used = 0
        for row in range(shape[0]):
            used += self._pack_row(inputs[row], targets[row], starts[row], used)
        return Batch(inputs, targets, used, starts)

    def _pack_row(self, inputs: IntArray, targets: IntArray, starts: IntArray, used: int) -> int:
        """Fill a row; returns how many samples it holds, one at the least."""
        place = self._sample(used, self.options.sample_random_offsets)
        begin, n = 0, 0
        while place.stop - place.start <= len(inputs) - begin:
            tokens = self.samples.tokens[place]
            end = begin + len(tokens)
            inputs[begin] = self._begin_token
            inputs[begin + 1 : end] = tokens[:-1]
            mask = self.samples.mask
            targets[begin:end] = (
                tokens if mask is None else np.where(mask[place], tokens, NO_TARGET)
            )
            starts[begin:end] = begin
            begin, n = end, n + 1
            place = self._sample(used + n, at_offset=False)
        starts[begin:] = begin  # padding sees itself, and nobody sees it
        return n

    def _fill_row(self, row: IntArray, counts: MaskArray, used: int) -> int:
        """Fill a row of padding with one sample, or as many as fit; returns how many."""
        filled = self._put_sample(row, counts, 0, used, self.options.sample_random_offsets)
        n = 1
        while self.options.fill_with_next_samples and filled < len(row):
            filled = _put(row, filled, self._separator)
            if filled < len(row):
                filled = self._put_sample(row, counts, filled, used + n, at_offset=False)
                n += 1
        return n

    def _put_sample(
        self, row: IntArray, counts: MaskArray, filled: int, ahead: int, at_offset: bool
    ) -> int:
        """Copy what fits of a sample, and of its mask; returns where the row is filled to."""
        place = self._sample(ahead, at_offset)
        if self.samples.mask is not None:
            _put(counts, filled, self.samples.mask[place])
        return _put(row, filled, self.samples.tokens[place])

    def _sample(self, ahead: int, at_offset: bool) -> slice:
        """Place of the sample that is `ahead` of the next one, cut to a row's length."""
        position = (self.state.next_sample + ahead) % len(self.samples)
        index = self._shuffled.order[position]
        offset = self._shuffled.offset[position] if at_offset else 0
        begin = self.samples.begin[index]
        end = begin + min(self.samples.size[index], offset + self.options.n_ctx)
        return slice(begin + offset, end)

    def _advance(self, used: int) -> None:
        self.state.next_sample += used
        if self.state.next_sample >= len(self.samples):
            self.epochs += 1
            self.state.rng_state = self._shuffled.next_rng_state
            self._shuffled = shuffle(self.samples.size, self.state.rng_state)
            self.state.next_sample = 0


def _put(row: NDArray[Any], begin: int, values: NDArray[Any]) -> int:
    """Copy what fits of `values` into `row`; returns where the row is filled to."""
    end = min(begin + len(values), len(row))
    row[begin:end] = values[: end - begin]
    return end
