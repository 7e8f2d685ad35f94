"""Candidates for the next token, and what each sampler does to them."""

from libc.stdint cimport int32_t

from engine.mt19937 cimport MT19937

cdef enum:
    SHORT = 128  # candidates up to which insertion beats a radix sort's fixed cost

cdef enum Step:
    TOP_K
    TFS_Z
    TYPICAL_P
    TOP_P
    MIN_P
    TEMPERATURE

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

cdef int allocate(Candidates *c, Py_ssize_t n) except -1
cdef void release(Candidates *c) noexcept nogil

cdef void load_all(Candidates *c, const float *logits, Py_ssize_t n) noexcept nogil
cdef void load_best(Candidates *c, const float *logits, Py_ssize_t n, Py_ssize_t k) noexcept nogil
cdef Py_ssize_t first_above(const float *logits, Py_ssize_t n, float bound) noexcept nogil
cdef Py_ssize_t first_maximum(const Candidates *c) noexcept nogil
cdef void softmax(Candidates *c) noexcept nogil

cdef void top_k(Candidates *c, int32_t k, Py_ssize_t min_keep) noexcept nogil
cdef void tail_free(Candidates *c, float z, Py_ssize_t min_keep) noexcept nogil
cdef void typical(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil
cdef void top_p(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil
cdef void min_p(Candidates *c, float p, Py_ssize_t min_keep) noexcept nogil
cdef void temperature(Candidates *c, float t) noexcept nogil
cdef void dynamic_temperature(Candidates *c, float low, float high, float exponent) noexcept nogil

cdef Py_ssize_t draw(Candidates *c, MT19937 generator) noexcept nogil
cdef int32_t mirostat_k(const Candidates *c, float mu, float n_vocab) noexcept nogil
cdef void cut_surprise(Candidates *c, float mu) noexcept nogil
