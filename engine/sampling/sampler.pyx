"""A sampler for one sequence: its history, what is done to the logits, and the choice."""

cimport cython
from libc.math cimport INFINITY, expf, isinf, log2f, logf
from libc.stdint cimport int32_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import os

import numpy as np

from engine.errors import DataError, OptionError, ShapeError
from engine.grammar.matcher cimport GrammarMatcher
from engine.mt19937 cimport MT19937
from engine.sampling.candidates cimport (
    MIN_P,
    SHORT,
    TEMPERATURE,
    TFS_Z,
    TOP_K,
    TOP_P,
    TYPICAL_P,
    Candidates,
    allocate,
    cut_surprise,
    draw,
    dynamic_temperature,
    first_above,
    first_maximum,
    load_all,
    load_best,
    min_p,
    mirostat_k,
    release,
    softmax,
    tail_free,
    temperature,
    top_k,
    top_p,
    typical,
)
from engine.sampling.params import RANDOM_SEED, SAMPLERS

STEPS = dict(zip(SAMPLERS, (TOP_K, TFS_Z, TYPICAL_P, TOP_P, MIN_P, TEMPERATURE), strict=True))

cdef float MAX_FLOAT32 = <float>3.4028234663852886e38

cdef enum:
    MIN_HISTORY = 64


cdef void log_softmax(float *x, Py_ssize_t n) noexcept nogil:
    """x = ln(exp(x - max) / running float sum), in place."""
    cdef Py_ssize_t i
    cdef float best = x[0], sum = 0
    for i in range(1, n):
        if x[i] > best:
            best = x[i]
    for i in range(n):
        x[i] = expf(x[i] - best)
        sum += x[i]
    for i in range(n):
        x[i] = logf(x[i] / sum)


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
    grammar : GrammarMatcher, optional
        What chosen tokens must follow; it goes on with those that are accepted as chosen.

    Raises
    ------
    OptionError
        If a logit bias is for a token outside the vocabulary.
    ShapeError
        If the grammar's tokens are of another vocabulary.
    """

    cdef Candidates candidates
    cdef MT19937 generator
    cdef GrammarMatcher grammar
    cdef float *logits  # n_vocab, for those that are changed before the choice
    cdef float *guidance  # n_vocab once guidance is given, else NULL
    cdef int32_t *counts  # per token, all zero between calls
    cdef int32_t *history  # a ring
    cdef Py_ssize_t n_history, oldest, n_penalized
    cdef int32_t n_vocab, newline_id
    cdef int32_t[::1] bias_ids
    cdef float[::1] biases
    cdef int32_t[::1] queue
    cdef Py_ssize_t min_keep, n_enough
    cdef int32_t top_k, mirostat
    cdef float temp, dynatemp_low, dynatemp_high, dynatemp_exponent
    cdef float top_p, min_p, tfs_z, typical_p, cfg_scale
    cdef bint is_dynamic, penalize_nl, has_penalties
    cdef float penalty_repeat, penalty_freq, penalty_present
    cdef float mu, mirostat_tau, mirostat_eta
    cdef readonly object params
    cdef readonly uint32_t seed

    def __cinit__(
        self,
        params,
        int32_t n_vocab,
        int32_t newline_id=-1,
        GrammarMatcher grammar=None,
    ):
        if n_vocab < 1:
            raise ShapeError(f"a sampler needs a vocabulary, not {n_vocab} tokens")
        for token in params.logit_bias:
            if not 0 <= token < n_vocab:
                raise OptionError(
                    f"logit_bias: token {token} is not in the vocabulary of {n_vocab} tokens"
                )
        if grammar is not None and grammar.tokens.n_vocab != n_vocab:
            raise ShapeError(
                f"a grammar over {grammar.tokens.n_vocab} tokens for a vocabulary of {n_vocab}"
            )
        cdef float dynatemp_range
        self.grammar = grammar
        last_n = params.penalty_last_n
        self.n_vocab = n_vocab
        self.n_history = max(MIN_HISTORY, last_n)
        self.take_memory()
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
        self.has_penalties = self.n_penalized > 0 and not (
            self.penalty_repeat == 1 and self.penalty_freq == 0 and self.penalty_present == 0
        )
        self.penalize_nl = params.penalize_nl
        self.mirostat = params.mirostat
        self.mirostat_tau = params.mirostat_tau
        self.mirostat_eta = params.mirostat_eta
        self.cfg_scale = params.cfg_scale
        self.mu = 0  # the paper starts at 2 tau; llama.cpp at 0, so choices begin greedy
        self.n_enough = self.count_enough()

    def __dealloc__(self):
        release(&self.candidates)
        free(self.logits)
        free(self.guidance)
        free(self.counts)
        free(self.history)

    cdef int take_memory(self) except -1:
        allocate(&self.candidates, self.n_vocab)
        self.logits = <float *>malloc(self.n_vocab * sizeof(float))
        self.counts = <int32_t *>calloc(self.n_vocab, sizeof(int32_t))
        self.history = <int32_t *>calloc(self.n_history, sizeof(int32_t))
        if not (self.logits and self.counts and self.history):
            raise MemoryError
        return 0

    cdef Py_ssize_t count_enough(self) noexcept:
        """Return how many of the best candidates decide the choice; 0 when it may be any number."""
        cdef Py_ssize_t k = max(self.top_k, self.min_keep)
        if self.temp <= 0:
            return 0 if self.params.n_probs > 0 else 1
        if self.mirostat or self.queue.shape[0] == 0 or self.queue[0] != TOP_K:
            return 0
        return k if self.top_k > 0 and k <= SHORT else 0

    def accept(self, int32_t token, bint chosen=False):
        """Push a token into the history.

        Parameters
        ----------
        token : int
        chosen : bool
            Whether `sample` chose it: the grammar goes on with it then. Tokens of a prompt are not
            the grammar's.

        Raises
        ------
        ShapeError
            If `token` is not in the vocabulary.
        DataError
            If the grammar does not allow a chosen token.
        """
        if not 0 <= token < self.n_vocab:
            raise ShapeError(f"token {token} is not in the vocabulary of {self.n_vocab} tokens")
        if chosen and self.grammar is not None:
            self.grammar.accept(token)
        self.history[self.oldest] = token
        self.oldest = (self.oldest + 1) % self.n_history

    def reset(self):
        """Forget the history and begin the grammar anew; the generator goes on where it is."""
        if self.grammar is not None:
            self.grammar.reset()
        memset(self.history, 0, self.n_history * sizeof(int32_t))
        self.oldest = 0

    def sample(self, const float[::1] logits not None, const float[::1] guidance=None):
        """Choose a token; history and grammar stay as they are.

        A token that the grammar does not allow is chosen once more among those that it does, which
        takes another draw.

        Parameters
        ----------
        logits : ndarray of shape (n_vocab,), float32, C-contiguous
            Not changed.
        guidance : ndarray of shape (n_vocab,), float32, C-contiguous, optional
            Logits of the context that `params.cfg_scale` leads away from. Not changed.

        Returns
        -------
        int

        Raises
        ------
        ShapeError
            If `logits` or `guidance` has another length.
        DataError
            If a logit is NaN or +infinity, or every token is forbidden.
        """
        cdef Candidates *c = &self.candidates
        cdef Py_ssize_t place
        self.check(logits)
        if guidance is not None:
            self.check(guidance)
            self.copy_guidance(&guidance[0])
        place = self.attempt(&logits[0], guidance is not None, False)
        if self.grammar is not None and not self.grammar.allows(c.data[place].id):
            place = self.attempt(&logits[0], guidance is not None, True)
        if c.data[place].logit == -INFINITY:
            self.refuse_all()
        return c.data[place].id

    cdef int refuse_all(self) except -1:
        if self.grammar is None:
            raise DataError("every token is forbidden; allow one by its logit bias")
        if self.grammar.may_end:
            raise DataError(
                "the text that the grammar describes is complete, but no token that ends a text is "
                "allowed; let it go on, or stop after fewer tokens"
            )
        raise DataError("no token of the vocabulary can go on with the grammar here; widen it")

    cdef Py_ssize_t attempt(
        self, const float *logits, bint is_guided, bint by_grammar
    ) except -1:
        """Return the place of a candidate chosen among all, or those that the grammar allows."""
        cdef const float *prepared = self.prepared(logits, is_guided, by_grammar)
        if by_grammar:
            self.grammar.forbid_others(self.logits)
        with nogil:
            return self.choose(prepared)

    cdef int check(self, const float[::1] logits) except -1:
        """Refuse logits of another length, and those that are NaN or +infinity."""
        cdef Py_ssize_t place
        if logits.shape[0] != self.n_vocab:
            raise ShapeError(f"{logits.shape[0]} logits for a vocabulary of {self.n_vocab} tokens")
        place = first_above(&logits[0], self.n_vocab, MAX_FLOAT32)
        if place < self.n_vocab:
            self.candidates.size = 0
            raise DataError(
                f"the logit of token {place} is {logits[place]}; the model's weights may be damaged"
            )
        return 0

    cdef int copy_guidance(self, const float *guidance) except -1:
        if not self.guidance:
            self.guidance = <float *>malloc(self.n_vocab * sizeof(float))
            if not self.guidance:
                raise MemoryError
        memcpy(self.guidance, guidance, self.n_vocab * sizeof(float))
        return 0

    cdef const float *prepared(
        self, const float *logits, bint is_guided, bint must_copy
    ) noexcept nogil:
        """Return the logits with biases, guidance and penalties; themselves without any."""
        cdef Py_ssize_t i
        if not (must_copy or is_guided or self.has_penalties or self.bias_ids.shape[0]):
            return logits
        memcpy(self.logits, logits, self.n_vocab * sizeof(float))
        for i in range(self.bias_ids.shape[0]):
            self.logits[self.bias_ids[i]] += self.biases[i]
        if is_guided:
            self.guide()
        if self.has_penalties:
            self.penalize()
        return self.logits

    cdef void guide(self) noexcept nogil:
        """Lead away from the guidance: l = scale (l - g) + g, both as log-probabilities.

        As in llama.cpp the guidance's are left in place, and a second attempt at a token makes
        log-probabilities of them again, which may move the last bit.
        """
        cdef Py_ssize_t i
        cdef float g
        for i in range(self.n_vocab):
            if isinf(self.logits[i]) and self.logits[i] > 0:
                return  # a token that a bias forces
        log_softmax(self.logits, self.n_vocab)
        log_softmax(self.guidance, self.n_vocab)
        for i in range(self.n_vocab):
            g = self.guidance[i]
            self.logits[i] = self.cfg_scale * (self.logits[i] - g) + g

    cdef void penalize(self) noexcept nogil:
        """Lower the logits of tokens in the penalized part of the history, each once."""
        cdef Py_ssize_t i, start = self.oldest + self.n_history - self.n_penalized
        cdef int32_t token
        cdef float newline_logit = 0
        if self.newline_id >= 0:
            newline_logit = self.logits[self.newline_id]
        for i in range(self.n_penalized):
            self.counts[self.history[(start + i) % self.n_history]] += 1
        for i in range(self.n_penalized):
            token = self.history[(start + i) % self.n_history]
            if self.counts[token]:
                self.penalize_token(token, self.counts[token])
                self.counts[token] = 0
        if self.newline_id >= 0 and not self.penalize_nl:
            self.logits[self.newline_id] = newline_logit

    cdef void penalize_token(self, int32_t token, int32_t count) noexcept nogil:
        # Dividing alone would make tokens with negative logits likelier.
        if self.logits[token] <= 0:
            self.logits[token] *= self.penalty_repeat
        else:
            self.logits[token] /= self.penalty_repeat
        self.logits[token] -= <float>count * self.penalty_freq + self.penalty_present

    cdef Py_ssize_t choose(self, const float *logits) noexcept nogil:
        """Return the place of the chosen candidate."""
        cdef Candidates *c = &self.candidates
        if self.n_enough:
            load_best(c, logits, self.n_vocab, self.n_enough)
        else:
            load_all(c, logits, self.n_vocab)
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
