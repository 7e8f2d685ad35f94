"""Candidates for the next token: sorted, selected, cut by one sampler after another, drawn from.

All in float32 and never fused. Sorting is by logit, descending and **stable**: equal logits keep
the order they had, which is lower token first unless `typical` has run. (The C++ sorts of
llama.cpp leave equal logits in an order of their own; nothing else depends on it.)
"""

cimport cython
from libc.math cimport expf, fabsf, isfinite, log2f, logf, powf
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from engine.mt19937 cimport MT19937

cdef enum:
    MIROSTAT_M = 100  # neighbours from which mirostat 1 estimates the exponent
    BLOCK = 64  # logits that are compared with a bound together


# ---- from logits to candidates -----------------------------------------------------------------

cdef int allocate(Candidates *c, Py_ssize_t n) except -1:
    c.data = <Candidate *>malloc(n * sizeof(Candidate))
    c.spare = <Candidate *>malloc(n * sizeof(Candidate))
    c.ranks = <Candidate *>malloc(n * sizeof(Candidate))
    if not (c.data and c.spare and c.ranks):
        raise MemoryError
    return 0


cdef void release(Candidates *c) noexcept nogil:
    free(c.data)
    free(c.spare)
    free(c.ranks)


cdef void load_all(Candidates *c, const float *logits, Py_ssize_t n) noexcept nogil:
    """Make a candidate of each of n tokens, in their order."""
    cdef Py_ssize_t i
    for i in range(n):
        c.data[i].id = <int32_t>i
        c.data[i].logit = logits[i]
        c.data[i].p = 0
    c.size = n
    c.is_sorted = False


cdef inline bint any_above(const float *logits, float bound) noexcept nogil:
    """Whether one of BLOCK logits is above a bound, or not a number."""
    cdef int i, found = 0
    for i in range(BLOCK):
        found |= not logits[i] <= bound
    return found


cdef Py_ssize_t first_above(const float *logits, Py_ssize_t n, float bound) noexcept nogil:
    """Return the place of the first logit above a bound or not a number; n if there is none."""
    cdef Py_ssize_t i = 0
    while i + BLOCK <= n and not any_above(logits + i, bound):
        i += BLOCK
    while i < n and logits[i] <= bound:
        i += 1
    return i


cdef void load_best(
    Candidates *c, const float *logits, Py_ssize_t n, Py_ssize_t k
) noexcept nogil:
    """Make candidates of the first k of n tokens in the stable order alone; 0 < k <= SHORT.

    Of 49,000 shuffled logits about 320 ever enter a list of 40; `first_above` finds those.
    """
    cdef Py_ssize_t i
    c.size = 0
    c.is_sorted = True
    for i in range(min(k, n)):
        insert_best(c.data, &c.size, k, <int32_t>i, logits[i])
    i = c.size
    while i < n:
        i += first_above(logits + i, n - i, c.data[k - 1].logit)
        if i < n:
            insert_best(c.data, &c.size, k, <int32_t>i, logits[i])
            i += 1


cdef inline void insert_best(
    Candidate *best, Py_ssize_t *n_best, Py_ssize_t k, int32_t token, float logit
) noexcept nogil:
    """Let a candidate behind all those seen into the sorted list of the best k, if it is good."""
    cdef Py_ssize_t at
    if n_best[0] < k:
        n_best[0] += 1
    elif not logit > best[k - 1].logit:
        return
    at = n_best[0] - 1
    while at > 0 and best[at - 1].logit < logit:
        best[at] = best[at - 1]
        at -= 1
    best[at].id = token
    best[at].logit = logit
    best[at].p = 0


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
    cdef Py_ssize_t i, n_best = 0, n = c.size if k <= 0 else k
    n = min(max(n, min_keep), c.size)
    if c.is_sorted:
        pass
    elif n <= SHORT:
        for i in range(c.size):
            insert_best(c.spare, &n_best, n, c.data[i].id, c.data[i].logit)
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
