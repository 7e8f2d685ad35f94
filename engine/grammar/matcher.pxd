"""Which tokens may follow under a grammar, for modules that sample."""

from libc.stdint cimport int32_t, uint8_t

cdef struct Cursor:
    int32_t state  # of the automaton, at the last whole character
    int32_t code  # bits of a character of which some bytes were read
    int32_t n_missing  # bytes that it still needs
    int32_t lowest  # code points below this one are written with fewer bytes


cdef class Automaton:
    cdef list elements, starts, terminal_classes
    cdef list node_places, node_parents, states
    cdef dict node_ids, state_ids
    cdef int32_t *table  # of n_states rows by n_classes: the next state, UNKNOWN or DEAD
    cdef uint8_t *may_end  # by state
    cdef Py_ssize_t n_states, capacity
    cdef int32_t[::1] bounds  # first code point of each class
    cdef int32_t ascii_classes[128]
    cdef int32_t n_classes, surrogates, first

    cdef int lay_out(self, rules) except -1
    cdef int divide(self, terminals) except -1
    cdef int32_t class_of(self, int32_t code) noexcept
    cdef int32_t node(self, Py_ssize_t place, int32_t below) except -1
    cdef tuple closed(self, list waiting)
    cdef int32_t state_of(self, tuple stacks) except -1
    cdef int grow(self) except -1
    cdef int forget(self) except -1
    cdef bint is_full(self) noexcept
    cdef int32_t restart(self, int32_t state) except -1
    cdef list places_of(self, tuple stacks)
    cdef tuple stacks_of(self, list spelled)
    cdef int32_t next_state(self, int32_t state, int32_t class_) except -1
    cdef int32_t find_next(self, int32_t state, int32_t class_) except -1
    cdef bint may_complete(self, int32_t state, int32_t low, int32_t high) except -1
    cdef bint step(self, const Cursor *before, uint8_t byte, Cursor *after) except -1


cdef class TokenTable:
    cdef readonly int32_t n_vocab
    cdef list pieces
    cdef uint8_t[::1] is_end
    cdef const uint8_t[::1] text
    cdef int32_t[::1] ids, begins, lengths, shared
    cdef int32_t[::1] never, ends
    cdef Py_ssize_t longest

    cdef int32_t common(self, Py_ssize_t i, Py_ssize_t j) noexcept


cdef class GrammarMatcher:
    cdef readonly TokenTable tokens
    cdef Automaton automaton
    cdef Cursor cursor
    cdef Cursor *path

    cpdef bint allows(self, int32_t token) except -1
    cpdef accept(self, int32_t token)
    cdef bint is_end(self, int32_t token) except -1
    cdef bint read(self, int32_t token) except -1
    cdef int forbid_others(self, float *logits) except -1
