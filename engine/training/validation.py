"""Data that is not trained on, or measured apart: how well the adapter does, batch by fixed batch.

Samples that share text must not be split among training and validation one by one, or the model is
asked what it was just taught: windows over a text, and samples that overlap, are split at one
place, the end of the text being kept for validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.errors import DataError
from engine.mt19937 import MT19937
from engine.tokenizer import Tokenizer
from engine.tokenizer.chat import ChatTemplate
from engine.training.conversations import is_conversations, load_conversations
from engine.training.data import (
    NO_TARGET,
    IndexArray,
    IntArray,
    Samples,
    SplitOptions,
    read_training_text,
    split_samples,
    string_hash,
)

# Forward pass of a batch: the sum of the losses, and how many targets counted.
EvaluateLoss = Callable[[IntArray, IntArray], tuple[float, int]]


def split_validation(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Set a part of the data aside.

    Conversations, and samples that a pattern divides, are drawn; of windows and of overlapping
    samples the end of the text is taken, and training samples that reach into it are left out.

    Parameters
    ----------
    samples : Samples
    fraction : float
        Of the samples, or of the text; between 0 and 1.
    seed : int
        The same samples and seed give the same parts.

    Returns
    -------
    train, validation : Samples
        The first has a hash of its own, so that a checkpoint's shuffle fits only the same split.

    Raises
    ------
    DataError
        If one of the parts would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"a fraction of {fraction} leaves nothing for validation or for training")
    if _are_windows(samples):
        train, validation = _split_windows(samples, fraction)
    elif _overlap(samples):
        train, validation = _split_overlapping(samples, fraction)
    else:
        train, validation = _draw(samples, fraction, seed)
    split = f"validation {fraction!r} {seed}".encode()
    return replace(train, hash=samples.hash ^ string_hash(split)), _everything_else_masked(
        validation
    )


def load_validation(
    path: str | Path,
    tokenizer: Tokenizer,
    n_ctx: int,
    template: ChatTemplate | None = None,
    *,
    split: SplitOptions | None = None,
    mask_prompt: bool | None = None,
    append_eos: bool | None = None,
) -> Samples:
    """Read a file of validation data, conversations or text.

    Parameters are those of `load_conversations` and `split_samples`. A text that no pattern
    divides becomes windows side by side.
    """
    if is_conversations(path):
        return load_conversations(
            path, tokenizer, n_ctx, template, mask_prompt=mask_prompt, append_eos=append_eos
        )
    text = read_training_text(path)
    samples = split_samples(text, str(path), tokenizer, n_ctx, split or SplitOptions())
    if _are_windows(samples):
        samples = _side_by_side(samples, samples.tokens, n_ctx)
    return _everything_else_masked(samples)


def held_out(samples: Samples, at_most: int = 2048, fraction: float = 0.02) -> Samples:
    """Take the end of the data, to tell what was learnt. The data keep it.

    Parameters
    ----------
    samples : Samples
    at_most : int, optional
        Tokens.
    fraction : float, optional
        Of the tokens; but one sample at the least, of which a mask's are taken whole.
    """
    limit = min(at_most, max(1, int(fraction * len(samples.tokens))))
    if _are_windows(samples):
        return _side_by_side(samples, samples.tokens[-limit:], int(samples.size.max()))
    from_end = np.cumsum(samples.size[::-1])
    n = max(1, int(np.searchsorted(from_end, limit, side="right")))
    last = _take(samples, np.arange(len(samples) - n, len(samples)))
    if last.mask is None:
        last = replace(last, size=np.minimum(last.size, at_most))
    return _everything_else_masked(last)


class Validation:
    """Samples in fixed batches, one a row, and their mean loss.

    Parameters
    ----------
    samples : Samples
    n_batch, n_ctx : int
        Rows, and tokens of a row. A longer sample counts with what fits.
    bos, eos : int
        Tokens that begin and pad a row (`engine.training.data.begin_and_end_tokens`).

    Attributes
    ----------
    n_rows, n_batches : int
    n_tokens : int
        Targets that count.

    Raises
    ------
    DataError
        If no token counts in the loss.
    """

    def __init__(self, samples: Samples, n_batch: int, n_ctx: int, bos: int, eos: int) -> None:
        self.n_rows = len(samples)
        self.n_batches = math.ceil(len(samples) / n_batch)
        shape = (self.n_batches * n_batch, n_ctx)
        inputs = np.full(shape, eos, dtype=np.int32)
        targets = np.full(shape, NO_TARGET, dtype=np.int32)
        inputs[:, 0] = bos if samples.begin_token is None else samples.begin_token
        for row, (begin, size) in enumerate(zip(samples.begin, samples.size, strict=True)):
            place = slice(begin, begin + min(size, n_ctx))
            tokens = samples.tokens[place]
            inputs[row, 1 : len(tokens) + 1] = tokens[: n_ctx - 1]
            counts = True if samples.mask is None else samples.mask[place]
            targets[row, : len(tokens)] = np.where(counts, tokens, NO_TARGET)
        self.n_tokens = int(np.count_nonzero(targets != NO_TARGET))
        if not self.n_tokens:
            raise DataError("no token of the validation data counts in the loss")
        rows = (self.n_batches, n_batch, n_ctx)
        self._batches = list(zip(inputs.reshape(rows), targets.reshape(rows), strict=True))

    def loss(self, evaluate_loss: EvaluateLoss) -> float:
        """Take the mean loss over all targets that count.

        Parameters
        ----------
        evaluate_loss : callable (inputs, targets) -> (float, int)
            Gets int32 arrays of shape (n_batch, n_ctx), a target of -1 not to be counted; returns
            the sum of the losses and the number of targets that counted.
        """
        total, counted = 0.0, 0
        for inputs, targets in self._batches:
            batch_total, batch_counted = evaluate_loss(inputs, targets)
            total += batch_total
            counted += batch_counted
        return total / max(1, counted)


def _are_windows(samples: Samples) -> bool:
    """Whether a sample begins at every token of a text, and no pattern divides it."""
    return samples.mask is None and samples.extent is None


def _overlap(samples: Samples) -> bool:
    extent = samples.extent
    return extent is not None and bool(np.any(extent[1:, 0] < extent[:-1, 1]))


def _split_windows(samples: Samples, fraction: float) -> tuple[Samples, Samples]:
    n_tokens, n_ctx = len(samples.tokens), int(samples.size.max())
    cut = n_tokens - max(1, round(fraction * n_tokens))
    if cut < n_ctx:
        raise DataError(
            f"a validation part of {fraction:g} leaves {cut} of {n_tokens} tokens for training, "
            f"less than the context of {n_ctx}; give validation data of their own (--val-data)"
        )
    # The windows that a text of the first part alone would have.
    windows = np.arange(max(1, cut - n_ctx), dtype=np.int64)
    train = replace(_take(samples, windows), tokens=samples.tokens[:cut])
    return train, _side_by_side(samples, samples.tokens[cut:], n_ctx)


def _split_overlapping(samples: Samples, fraction: float) -> tuple[Samples, Samples]:
    assert samples.extent is not None
    n = _part_size(samples, fraction)
    border = samples.extent[-n, 0]
    before = np.flatnonzero(samples.extent[:, 1] <= border)
    if not len(before):
        raise DataError(
            "every sample reaches into the validation part; leave out --overlapping-samples, or "
            "give validation data of their own (--val-data)"
        )
    return _take(samples, before), _take(samples, np.arange(len(samples) - n, len(samples)))


def _draw(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    drawn = np.argsort(MT19937(seed).words(len(samples)), kind="stable")
    n = _part_size(samples, fraction)
    return _take(samples, np.sort(drawn[n:])), _take(samples, np.sort(drawn[:n]))


def _part_size(samples: Samples, fraction: float) -> int:
    if len(samples) < 2:
        raise DataError(
            "a single sample cannot be split; give validation data of their own (--val-data)"
        )
    return min(len(samples) - 1, max(1, round(fraction * len(samples))))


def _take(samples: Samples, index: IndexArray) -> Samples:
    """Leave only some samples, and only their tokens unless others share them."""
    begin, size = samples.begin[index], samples.size[index]
    extent = None if samples.extent is None else samples.extent[index]
    if _are_windows(samples):
        return replace(samples, begin=begin, size=size)
    places = np.concatenate([np.arange(b, b + s) for b, s in zip(begin, size, strict=True)])
    return replace(
        samples,
        tokens=samples.tokens[places],
        begin=np.cumsum(size) - size,
        size=size,
        mask=None if samples.mask is None else samples.mask[places],
        extent=extent,
    )


def _side_by_side(samples: Samples, tokens: IntArray, n_ctx: int) -> Samples:
    """Cut tokens into windows that do not overlap, the last one shorter."""
    begin = np.arange(0, len(tokens), n_ctx, dtype=np.int64)
    size = np.minimum(n_ctx, len(tokens) - begin)
    part = replace(samples, tokens=tokens, begin=begin, size=size)
    return _everything_else_masked(part)


def _everything_else_masked(samples: Samples) -> Samples:
    """Let every token count and nothing else: no padding."""
    if samples.mask is not None:
        return samples
    return replace(samples, mask=np.ones(len(samples.tokens), dtype=np.bool_))
