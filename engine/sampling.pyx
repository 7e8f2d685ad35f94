"""From logits to one token: penalties, samplers and the draw, bit for bit as users know them.

A token is chosen in this order, all in float32 and never fused:

    logits -> biases -> penalties -> temperature 0: the first maximum
                                  -> mirostat 1 or 2 -> draw
                                  -> the queue (top_k, tfs_z, typical_p, top_p, min_p,
                                     temperature by default) -> draw

Candidates start in token order. Sorting is by logit, descending and **stable**: equal logits keep
the order they had, which is lower token first unless typical_p has run. (The C++ sorts of
llama.cpp leave equal logits in an order of their own; nothing else depends on it.)

Guidance by a second context belongs between biases and penalties, a grammar's mask between
penalties and the choice; neither is here yet.
"""

cimport cython
from libc.math cimport INFINITY, expf, fabsf, isfinite, log2f, logf, powf
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset

import math
import os
from dataclasses import dataclass, field, fields

import numpy as np

from engine.errors import DataError, OptionError, ShapeError
from engine.mt19937 cimport MT19937

RANDOM_SEED = 0xFFFFFFFF

cdef double MAX_FLOAT32 = 3.4028234663852886e38

cdef enum:
    MIN_HISTORY = 64
    SHORT = 128  # candidates up to which insertion beats a radix sort's fixed cost
    MIROSTAT_M = 100  # neighbours from which mirostat 1 estimates the exponent

cdef enum Step:
    TOP_K
    TFS_Z
    TYPICAL_P
    TOP_P
    MIN_P
    TEMPERATURE

STEPS = {
    "top_k": TOP_K,
    "tfs_z": TFS_Z,
    "typical_p": TYPICAL_P,
    "top_p": TOP_P,
    "min_p": MIN_P,
    "temperature": TEMPERATURE,
}
LETTERS = dict(zip("kfypmt", STEPS, strict=True))
ALIASES = {
    "top-k": "top_k",
    "top-p": "top_p",
    "nucleus": "top_p",
    "typical-p": "typical_p",
    "typical": "typical_p",
    "min-p": "min_p",
    "tfs-z": "tfs_z",
    "tfs": "tfs_z",
    "temp": "temperature",
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    Reals are rounded to float32 where they are used.

    Attributes
    ----------
    temp : float
        0 or less takes the best token.
    dynatemp_range, dynatemp_exponent : float
        A range above 0 lets the temperature follow the entropy, within ``temp ± range``.
    top_k : int
        Keep the best k; 0 or less keeps all.
    top_p : float
        Keep the best whose probabilities reach this sum; 1 or more is off.
    min_p : float
        Keep what has at least this share of the best token's probability; 0 or less is off.
    tfs_z : float
        Tail-free sampling; 1 or more is off.
    typical_p : float
        Locally typical sampling; 1 or more is off.
    min_keep : int
        Candidates that no cut goes below; at least 1.
    penalty_last_n : int
        Tokens looked back upon; 0 is off, below 0 the whole history.
    penalty_repeat, penalty_freq, penalty_present : float
        Factor on the logits of tokens met, subtrahend per meeting, subtrahend once.
    penalize_nl : bool
        Whether the newline token is penalized too.
    mirostat : int
        0 is off, 1 and 2 are the two versions; the queue is not used then.
    mirostat_tau, mirostat_eta : float
        Target surprise in bits and learning rate.
    logit_bias : dict of int to float
        Added to logits; minus infinity forbids a token.
    samplers : tuple of str
        The queue: canonical names in the order of their work (see `sampler_order`).
    seed : int
        From 0 to 2**32 - 1; `RANDOM_SEED`, the largest, asks the system for one.
    n_probs : int
        Candidates that `Sampler.top` returns.

    Raises
    ------
    OptionError
        If a value cannot be used; names the field.
    """

    temp: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    tfs_z: float = 1.0
    typical_p: float = 1.0
    min_keep: int = 0
    penalty_last_n: int = 64
    penalty_repeat: float = 1.0
    penalty_freq: float = 0.0
    penalty_present: float = 0.0
    penalize_nl: bool = False
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: dict = field(default_factory=dict)
    samplers: tuple = tuple(STEPS)
    seed: int = RANDOM_SEED
    n_probs: int = 0

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not abs(value) <= MAX_FLOAT32:
                raise OptionError(f"{f.name}: {value} is not a number that float32 can hold")
        if self.mirostat not in (0, 1, 2):
            raise OptionError(f"mirostat: {self.mirostat} is not 0 (off), 1 or 2")
        if self.penalty_repeat < 1e-30:
            raise OptionError(
                f"penalty_repeat: {self.penalty_repeat} is not above 0; 1 turns the penalty off"
            )
        if self.penalty_last_n > 0x7FFFFFFF:
            raise OptionError(f"penalty_last_n: {self.penalty_last_n} is beyond {0x7FFFFFFF}")
        if not 0 <= self.seed <= 0xFFFFFFFF:
            raise OptionError(f"seed: {self.seed} is not from 0 to {0xFFFFFFFF}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias):
                raise OptionError(f"logit_bias: token {token} has the bias {bias}")
        for name in self.samplers:
            if name not in STEPS:
                raise OptionError(f"samplers: {name!r} is none of {', '.join(STEPS)}")


def sampler_order(names_or_letters):
    """Read a queue of samplers as users type it.

    Parameters
    ----------
    names_or_letters : str
        Names separated by ``;`` (``top_k;typical;temp``), or one letter a sampler (``kyt``). A
        single word that is a name is read as the name. Empty text is an empty queue.

    Returns
    -------
    tuple of str
        Canonical names, for `SamplingParams.samplers`.

    Raises
    ------
    OptionError
        If a name or letter is unknown; names it.
    """
    names = [name for name in names_or_letters.split(";") if name]
    known = {**{name: name for name in STEPS}, **ALIASES}
    if ";" not in names_or_letters and names_or_letters not in known:
        names, known = list(names_or_letters), LETTERS
    for name in names:
        if name not in known:
            raise OptionError(f"samplers: unknown sampler {name!r}; known are {', '.join(known)}")
    return tuple(known[name] for name in names)


def describe(params):
    """Say the parameters as `main` prints them before it generates.

    Parameters
    ----------
    params : SamplingParams

    Returns
    -------
    str
        Two headings with their lines, without a newline at the end.
    """
    p = params
    order = ["CFG", "Penalties", *(["mirostat"] if p.mirostat else p.samplers)]
    return (
        "sampling: \n"
        f"\trepeat_last_n = {p.penalty_last_n}, repeat_penalty = {p.penalty_repeat:.3f},"
        f" frequency_penalty = {p.penalty_freq:.3f}, presence_penalty = {p.penalty_present:.3f}\n"
        f"\ttop_k = {p.top_k}, tfs_z = {p.tfs_z:.3f}, top_p = {p.top_p:.3f},"
        f" min_p = {p.min_p:.3f}, typical_p = {p.typical_p:.3f}, temp = {p.temp:.3f}\n"
        f"\tmirostat = {p.mirostat}, mirostat_lr = {p.mirostat_eta:.3f},"
        f" mirostat_ent = {p.mirostat_tau:.3f}\n"
        "sampling order: \n"
        f"{' -> '.join(order)} "
    )


cdef struct Candidate:
    int32_t id
    float logit
    float p


cdef struct Candidates:
    Candidate *data
    Candidate *spare  # as long as data: where sorting and selecting put things
    Candidate *ranks  # as long as data: what typical_p sorts
    Py_ssize_t size
    bint is_sorted  # by logit, descending


# ---- sorting -------------------------------------------------------------------------------------

cdef void sort_short(Candidate *data, Py_ssize_t n) noexcept nogil:
    """Sort by logit, descending and stable, by insertion."""
    cdef Py_ssize_t i, at
    cdef Candidate moving
    for i in range(1, n):
        moving = data[i]
        at = i
        while at > 0 and data[at - 1].logit < moving.logit:
            data[at] = data[at - 1]
            at -= 1
        data[at] = moving


cdef inline uint32_t descending_key(float x) noexcept nogil:
    """Map a float to a word that grows as the float falls; both zeros to the same word."""
    cdef uint32_t bits
    x = x + <float>0  # -0 becomes 0
    memcpy(&bits, &x, sizeof(bits))
    return bits if bits >> 31 else bits ^ <uint32_t>0x7FFFFFFF


cdef void sort_long(Candidate *data, Candidate *spare, Py_ssize_t n) noexcept nogil:
    """Sort by logit, descending and stable, by radix: four passes of a byte, back into `data`."""
    cdef uint32_t starts[4][256]
    cdef uint32_t key, count, sum
    cdef Py_ssize_t i
    cdef int digit, pass_
    memset(starts, 0, sizeof(starts))
    for i in range(n):
        key = descending_key(data[i].logit)
        for pass_ in range(4):
            starts[pass_][(key >> (8 * pass_)) & 255] += 1
    for pass_ in range(4):
        sum = 0
        for digit in range(256):
            count = starts[pass_][digit]
            starts[pass_][digit] = sum
            sum += count
    for pass_ in range(4):
        for i in range(n):
            digit = (descending_key(data[i].logit) >> (8 * pass_)) & 255
            spare[starts[pass_][digit]] = data[i]
            starts[pass_][digit] += 1
        data, spare = spare, data


cdef inline void sort_stable(Candidate *data, Candidate *spare, Py_ssize_t n) noexcept nogil:
    if n <= SHORT:
        sort_short(data, n)
    else:
        sort_long(data, spare, n)


cdef void sort(Candidates *c) noexcept nogil:
    if not c.is_sorted:
        sort_stable(c.data, c.spare, c.size)
        c.is_sorted = True


cdef void select_best(
    const Candidate *data, Py_ssize_t n, Py_ssize_t k, Candidate *best
) noexcept nogil:
    """Put the first k of the stable order into `best`, sorted.

    A list kept sorted by insertion: of 49,000 shuffled logits about 320 ever enter a list of 40.
    """
    cdef Py_ssize_t i, at, n_best = 0
    cdef float logit, worst = 0
    for i in range(n):
        logit = data[i].logit
        if n_best == k:
            if not logit > worst:
                continue
        else:
            n_best += 1
        at = n_best - 1
        while at > 0 and best[at - 1].logit < logit:
            at -= 1
        memmove(&best[at + 1], &best[at], (n_best - 1 - at) * sizeof(Candidate))
        best[at] = data[i]
        worst = best[n_best - 1].logit


# ---- samplers: each cuts or changes the candidates -----------------------------------------------

cdef void softmax(Candidates *c) noexcept nogil:
    """Sort, then p = exp(logit - max) / running float sum; infinite logits share everything."""
    cdef Py_ssize_t i
    cdef float best, sum = 0
    sort(c)
    best = c.data[0].logit
    for i in range(c.size):
        if isfinite(best):
            c.data[i].p = expf(c.data[i].logit - best)
        else:
            c.data[i].p = <float>(c.data[i].logit == best)
        sum += c.data[i].p
    for i in range(c.size):
        c.data[i].p /= sum


cdef void top_k(Candidates *c, int32_t k, Py_ssize_t min_keep) noexcept nogil:
    """Keep the k best; k <= 0 keeps all. Sorts."""
    cdef Py_ssize_t n = c.size if k <= 0 else k
    n = min(max(n, min_keep), c.size)
    if c.is_sorted:
        pass
    elif n <= SHORT:
        select_best(c.data, c.size, n, c.spare)
        memcpy(c.data, c.spare, n * sizeof(Candidate))
        c.is_sorted = True
    else:
        sort(c)
    c.size = n


cdef inline float curvature(const Candidate *data, Py_ssize_t i) noexcept nogil:
    cdef float here = data[i].p - data[i + 1].p
    cdef float next = data[i + 1].p - data[i + 2].p
    return fabsf(here - next)


cdef void tail_free(Candidates *c, float z, Py_ssize_t min_keep) noexcept nogil:
    """Cut where the normalised |second differences| of the probabilities have summed beyond z."""
    cdef Py_ssize_t i, n = c.size - 2
    cdef float sum = 0, cumulative = 0
    cdef float flat = <float>1e-6  # below it the curve counts as straight, every share as equal
    if z >= 1 or n <= 0:
        return
    softmax(c)
    for i in range(n):
        sum += curvature(c.data, i)
    for i in range(n):
        cumulative += curvature(c.data, i) / sum if sum > flat else <float>1 / <float>n
        if cumulative > z and i >= min_keep:
            c.size = i
            return


cdef float entropy(const Candidates *c) noexcept nogil:
    """Return H = sum of -p ln p, in nats; a probability that underflowed to 0 adds nothing."""
    cdef Py_ssize_t i
    cdef float sum = 0
    for i in range(c.size):
        if c.data[i].p > 0:
            sum += -c.data[i].p * logf(c.data[i].p)
    return sum


cdef void typical(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil:
    """Keep those nearest to the expected surprise until their sum exceeds p; leaves that order."""
    cdef Py_ssize_t i, n
    cdef float h, cumulative = 0
    if p >= 1:
        return
    softmax(c)
    h = entropy(c)
    for i in range(c.size):
        c.ranks[i].id = <int32_t>i
        c.ranks[i].logit = -fabsf(-logf(c.data[i].p) - h)
    sort_stable(c.ranks, c.spare, c.size)
    n = c.size
    for i in range(c.size):
        c.spare[i] = c.data[c.ranks[i].id]
        cumulative += c.spare[i].p
        if cumulative > p and i + 1 >= min_keep:
            n = i + 1
            break
    memcpy(c.data, c.spare, n * sizeof(Candidate))
    c.size = n
    c.is_sorted = False


cdef void top_p(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil:
    """Keep up to and including the first whose cumulative probability reaches p."""
    cdef Py_ssize_t i
    cdef float cumulative = 0
    if p >= 1:
        return
    softmax(c)
    for i in range(c.size):
        cumulative += c.data[i].p
        if cumulative >= p and i + 1 >= min_keep:
            c.size = i + 1
            return


cdef Py_ssize_t first_maximum(const Candidates *c) noexcept nogil:
    cdef Py_ssize_t i, place = 0
    cdef float best = c.data[0].logit
    if c.is_sorted:
        return 0
    for i in range(1, c.size):
        if not c.data[i].logit > best:
            continue
        best = c.data[i].logit
        place = i
    return place


cdef void min_p(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil:
    """Keep logits >= max + ln p, in the order they have; sorts only when too few would be left."""
    cdef Py_ssize_t i, n = 0
    cdef float lowest
    if p <= 0:
        return
    lowest = c.data[first_maximum(c)].logit + logf(p)
    for i in range(c.size):
        n += c.data[i].logit >= lowest
    if n < min_keep:
        sort(c)
        c.size = min(min_keep, c.size)
        return
    n = 0
    for i in range(c.size):
        if c.data[i].logit >= lowest:
            c.data[n] = c.data[i]
            n += 1
    c.size = n


@cython.cdivision(True)  # also in debug builds: by zero is infinity here, and looked at
cdef void temperature(Candidates *c, float t) noexcept nogil:
    """Divide the logits; where the best would leave float32, take the limit: the best alone."""
    cdef Py_ssize_t i, best = first_maximum(c)
    if not isfinite(c.data[best].logit / t):
        c.data[0] = c.data[best]
        c.size = 1
        return
    for i in range(c.size):
        c.data[i].logit /= t


cdef void dynamic_temperature(Candidates *c, float low, float high, float exponent) noexcept nogil:
    """Divide by low + (high - low) · (entropy / ln n)^exponent."""
    cdef float share
    if c.size <= 1:
        return
    softmax(c)
    share = entropy(c) / -logf(<float>1 / <float>c.size)
    temperature(c, low + (high - low) * powf(share, exponent))


# ---- the draw ------------------------------------------------------------------------------------

cdef double canonical(MT19937 generator) noexcept nogil:
    """Draw from [0, 1) in double from two words, the first being the low part."""
    cdef double two_32 = 4294967296.0
    cdef double low = generator.next()
    cdef double u = (low + generator.next() * two_32) / (two_32 * two_32)
    return u if u < 1 else 1 - 1.1102230246251565e-16  # the double below 1


cdef Py_ssize_t draw(Candidates *c, MT19937 generator) noexcept nogil:
    """Return the place of a candidate drawn by probability, ``std::discrete_distribution``.

    The first partial sum that reaches u; the last one counts as 1. One candidate draws no words.
    """
    cdef Py_ssize_t i
    cdef double u, sum = 0, partial = 0
    softmax(c)
    if c.size == 1:
        return 0
    for i in range(c.size):
        sum += c.data[i].p
    u = canonical(generator)
    for i in range(c.size - 1):
        partial += c.data[i].p / sum
        if partial >= u:
            return i
    return c.size - 1


@cython.cdivision(True)  # also in debug builds: estimates may be infinite or no number
cdef int32_t mirostat_k(const Candidates *c, float mu, float n_vocab) noexcept nogil:
    """Estimate Zipf's exponent s from the best candidates and return the k that mu asks for.

    Source: Basu et al., "Mirostat", arXiv:2007.14966, algorithm 1.
    """
    cdef Py_ssize_t i
    cdef float t, b, s, epsilon, k, sum_tb = 0, sum_tt = 0
    for i in range(min(MIROSTAT_M, c.size) - 1):
        t = logf(<float>(i + 2) / <float>(i + 1))
        b = logf(c.data[i].p / c.data[i + 1].p)
        sum_tb += t * b
        sum_tt += t * t
    s = sum_tb / sum_tt
    epsilon = s - 1
    k = powf((epsilon * powf(2, mu)) / (1 - powf(n_vocab, -epsilon)), 1 / s)
    # A k that no int holds, or no number at all, means all candidates: llama.cpp's conversion
    # of such floats gives the smallest int.
    return <int32_t>k if fabsf(k) < <float>2147483648.0 else 0


cdef void cut_surprise(Candidates *c, float mu) noexcept nogil:
    """Cut at the first candidate with more than mu bits of surprise; at least one stays."""
    cdef Py_ssize_t i
    for i in range(c.size):
        if -log2f(c.data[i].p) > mu:
            c.size = max(i, 1)
            return


# ---- the sampler ---------------------------------------------------------------------------------

@cython.final
cdef class Sampler:
    """Chooses tokens for one sequence: the parameters, the history and one generator.

    Parameters
    ----------
    params : SamplingParams
    n_vocab : int
        Length of the logits.
    newline_id : int
        Token that penalties leave alone unless ``penalize_nl``; -1 when there is none.

    Raises
    ------
    OptionError
        If a logit bias is for a token outside the vocabulary.
    """

    cdef Candidates candidates
    cdef MT19937 generator
    cdef int32_t *counts  # per token, all zero between calls
    cdef int32_t *history  # a ring
    cdef Py_ssize_t n_history, oldest, n_penalized
    cdef int32_t n_vocab, newline_id
    cdef int32_t[::1] bias_ids
    cdef float[::1] biases
    cdef int32_t[::1] queue
    cdef Py_ssize_t min_keep
    cdef int32_t top_k, mirostat
    cdef float temp, dynatemp_low, dynatemp_high, dynatemp_exponent
    cdef float top_p, min_p, tfs_z, typical_p
    cdef bint is_dynamic, penalize_nl
    cdef float penalty_repeat, penalty_freq, penalty_present
    cdef float mu, mirostat_tau, mirostat_eta
    cdef readonly object params
    cdef readonly uint32_t seed

    def __cinit__(self, params, int32_t n_vocab, int32_t newline_id=-1):
        if n_vocab < 1:
            raise ShapeError(f"a sampler needs a vocabulary, not {n_vocab} tokens")
        for token in params.logit_bias:
            if not 0 <= token < n_vocab:
                raise OptionError(
                    f"logit_bias: token {token} is not in the vocabulary of {n_vocab} tokens"
                )
        cdef float dynatemp_range
        last_n = params.penalty_last_n
        self.n_vocab = n_vocab
        self.n_history = max(MIN_HISTORY, last_n)
        self.allocate()
        self.params = params
        self.newline_id = newline_id if newline_id < n_vocab else -1
        is_random = params.seed == RANDOM_SEED
        self.seed = int.from_bytes(os.urandom(4), "little") if is_random else params.seed
        self.generator = MT19937(self.seed)
        self.bias_ids = np.array(list(params.logit_bias), np.int32)
        self.biases = np.array(list(params.logit_bias.values()), np.float32)
        self.queue = np.array([STEPS[name] for name in params.samplers], np.int32)
        self.min_keep = max(1, params.min_keep)
        self.top_k = min(params.top_k, n_vocab) if params.top_k > 0 else 0
        self.top_p = params.top_p
        self.min_p = params.min_p
        self.tfs_z = params.tfs_z
        self.typical_p = params.typical_p
        self.temp = params.temp
        dynatemp_range = params.dynatemp_range
        self.is_dynamic = dynatemp_range > 0
        self.dynatemp_low = max(<float>0, self.temp - dynatemp_range)
        self.dynatemp_high = max(<float>0, self.temp + dynatemp_range)
        self.dynatemp_exponent = params.dynatemp_exponent
        self.n_penalized = last_n if last_n >= 0 else self.n_history
        self.penalty_repeat = params.penalty_repeat
        self.penalty_freq = params.penalty_freq
        self.penalty_present = params.penalty_present
        self.penalize_nl = params.penalize_nl
        self.mirostat = params.mirostat
        self.mirostat_tau = params.mirostat_tau
        self.mirostat_eta = params.mirostat_eta
        self.mu = 0  # the paper starts at 2 tau; llama.cpp at 0, so choices begin greedy

    def __dealloc__(self):
        free(self.candidates.data)
        free(self.candidates.spare)
        free(self.candidates.ranks)
        free(self.counts)
        free(self.history)

    cdef int allocate(self) except -1:
        cdef Candidates *c = &self.candidates
        c.data = <Candidate *>malloc(self.n_vocab * sizeof(Candidate))
        c.spare = <Candidate *>malloc(self.n_vocab * sizeof(Candidate))
        c.ranks = <Candidate *>malloc(self.n_vocab * sizeof(Candidate))
        self.counts = <int32_t *>calloc(self.n_vocab, sizeof(int32_t))
        self.history = <int32_t *>calloc(self.n_history, sizeof(int32_t))
        if not (c.data and c.spare and c.ranks and self.counts and self.history):
            raise MemoryError
        return 0

    def accept(self, int32_t token):
        """Push a token, of the prompt or chosen, into the history.

        Raises
        ------
        ShapeError
            If `token` is not in the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise ShapeError(f"token {token} is not in the vocabulary of {self.n_vocab} tokens")
        self.history[self.oldest] = token
        self.oldest = (self.oldest + 1) % self.n_history

    def sample(self, const float[::1] logits not None):
        """Choose a token; the history stays as it is.

        Parameters
        ----------
        logits : ndarray of shape (n_vocab,), float32, C-contiguous
            Not changed.

        Returns
        -------
        int

        Raises
        ------
        ShapeError
            If `logits` has another length.
        DataError
            If a logit is NaN or +infinity, or every token is forbidden.
        """
        cdef Candidates *c = &self.candidates
        cdef Py_ssize_t place
        cdef bint is_usable
        if logits.shape[0] != self.n_vocab:
            raise ShapeError(f"{logits.shape[0]} logits for a vocabulary of {self.n_vocab} tokens")
        with nogil:
            is_usable = self.load(&logits[0])
            if is_usable:
                self.penalize()
                place = self.choose()
        if not is_usable:
            place = np.flatnonzero(~(np.asarray(logits) < INFINITY))[0]
            raise DataError(
                f"the logit of token {place} is {logits[place]}; the model's weights may be damaged"
            )
        if c.data[place].logit == -INFINITY:
            raise DataError("every token is forbidden; allow one by its logit bias")
        return c.data[place].id

    cdef bint load(self, const float *logits) noexcept nogil:
        """Make candidates of all tokens, biases added; false when a logit is NaN or +infinity."""
        cdef Candidate *data = self.candidates.data
        cdef Py_ssize_t i
        cdef bint is_usable = True
        for i in range(self.n_vocab):
            data[i].id = <int32_t>i
            data[i].logit = logits[i]
            data[i].p = 0
            is_usable &= logits[i] < INFINITY
        for i in range(self.bias_ids.shape[0]):
            data[self.bias_ids[i]].logit += self.biases[i]
        self.candidates.size = self.n_vocab if is_usable else 0
        self.candidates.is_sorted = False
        return is_usable

    cdef void penalize(self) noexcept nogil:
        """Lower the logits of tokens in the penalized part of the history, each once."""
        cdef Candidate *data = self.candidates.data
        cdef Py_ssize_t i, start = self.oldest + self.n_history - self.n_penalized
        cdef int32_t token
        cdef float newline_logit = 0
        if self.penalty_repeat == 1 and self.penalty_freq == 0 and self.penalty_present == 0:
            return
        if self.newline_id >= 0:
            newline_logit = data[self.newline_id].logit
        for i in range(self.n_penalized):
            self.counts[self.history[(start + i) % self.n_history]] += 1
        for i in range(self.n_penalized):
            token = self.history[(start + i) % self.n_history]
            if self.counts[token]:
                self.penalize_token(&data[token], self.counts[token])
                self.counts[token] = 0
        if self.newline_id >= 0 and not self.penalize_nl:
            data[self.newline_id].logit = newline_logit

    cdef void penalize_token(self, Candidate *candidate, int32_t count) noexcept nogil:
        # Dividing alone would make tokens with negative logits likelier.
        if candidate.logit <= 0:
            candidate.logit *= self.penalty_repeat
        else:
            candidate.logit /= self.penalty_repeat
        candidate.logit -= <float>count * self.penalty_freq + self.penalty_present

    cdef Py_ssize_t choose(self) noexcept nogil:
        """Return the place of the chosen candidate."""
        cdef Candidates *c = &self.candidates
        if self.temp <= 0:
            return first_maximum(c)
        if self.mirostat:
            return self.choose_by_surprise()
        self.run_queue()
        return draw(c, self.generator)

    cdef Py_ssize_t choose_by_surprise(self) noexcept nogil:
        """Mirostat: cut by mu, draw, and move mu towards the target surprise."""
        cdef Candidates *c = &self.candidates
        cdef Py_ssize_t place
        temperature(c, self.temp)
        softmax(c)
        if self.mirostat == 1:
            top_k(c, mirostat_k(c, self.mu, <float>self.n_vocab), 1)
        else:
            cut_surprise(c, self.mu)
        place = draw(c, self.generator)
        self.mu -= self.mirostat_eta * (-log2f(c.data[place].p) - self.mirostat_tau)
        return place

    cdef void run_queue(self) noexcept nogil:
        cdef Candidates *c = &self.candidates
        cdef Py_ssize_t i, keep = self.min_keep
        for i in range(self.queue.shape[0]):
            if self.queue[i] == TOP_K:
                top_k(c, self.top_k, keep)
            elif self.queue[i] == TFS_Z:
                tail_free(c, self.tfs_z, keep)
            elif self.queue[i] == TYPICAL_P:
                typical(c, self.typical_p, keep)
            elif self.queue[i] == TOP_P:
                top_p(c, self.top_p, keep)
            elif self.queue[i] == MIN_P:
                min_p(c, self.min_p, keep)
            elif self.is_dynamic:
                dynamic_temperature(
                    c, self.dynatemp_low, self.dynatemp_high, self.dynatemp_exponent
                )
            else:
                temperature(c, self.temp)

    def top(self):
        """Tell the best candidates that were left in the last `sample`.

        Returns
        -------
        list of (int, float)
            At most ``n_probs`` tokens with their probabilities, best first; none before the first
            `sample`.
        """
        cdef Candidates *c = &self.candidates
        cdef Py_ssize_t i, n = self.params.n_probs
        if c.size == 0:
            return []
        softmax(c)
        return [(c.data[i].id, c.data[i].p) for i in range(min(n, c.size))]

    @property
    def recent(self):
        """The history, oldest first: ndarray of shape (max(64, penalty_last_n),), int32."""
        ring = [self.history[i] for i in range(self.n_history)]
        return np.array([*ring[self.oldest:], *ring[: self.oldest]], np.int32)
