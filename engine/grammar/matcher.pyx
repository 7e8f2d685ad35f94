"""Which tokens may follow under a grammar.

A text follows a grammar as a pushdown automaton: a **stack** holds what is still to come, and where
a rule has alternatives there are several. The set of stacks after some characters is a **state**.
States are made when a text first reaches them; what they lead to is kept in a table by state and
class of characters (characters that no set of the grammar tells apart are one class), so that all
tokens of a vocabulary are looked at in a walk over their bytes that shares prefixes.

Tokens are bytes, and may end inside of a character: then it must have a completion that the grammar
allows. What is not UTF-8 is never allowed.
"""

cimport cython
from libc.math cimport INFINITY
from libc.stdint cimport int32_t, uint8_t
from libc.stdlib cimport free, malloc, realloc

import numpy as np

from engine.errors import DataError, ShapeError
from engine.grammar.gbnf import LAST_CODE_POINT, GrammarError

cdef enum:
    UNKNOWN = -2
    DEAD = -3
    END = -2147483648  # behind the last element of each alternative
    EMPTY = 0  # the stack with nothing to come

# A table grown beyond the first number of entries is begun anew at the next token; the second is
# beyond what any sensible grammar needs for one token. So many stacks are no sensible grammar.
cdef Py_ssize_t MANY_ENTRIES = 1 << 22
cdef Py_ssize_t MOST_ENTRIES = 1 << 26
cdef Py_ssize_t MOST_STACKS = 20000


@cython.final
cdef class Automaton:
    """States of a text under a grammar, made as they are met.

    Parameters
    ----------
    grammar : Grammar
    """

    def __cinit__(self, grammar):
        self.lay_out(grammar.rules)
        self.divide(grammar.terminals)
        self.forget()
        self.first = self.state_of(self.closed(
            [self.node(start, EMPTY) for start in self.starts[grammar.root]]
        ))

    def __dealloc__(self):
        free(self.table)
        free(self.may_end)

    cdef int lay_out(self, rules) except -1:
        """Put all alternatives in one list, each with END behind it."""
        self.elements, self.starts = [], []
        for alternatives in rules:
            begins = []
            for sequence in alternatives:
                begins.append(len(self.elements))
                self.elements += [*sequence, END]
            self.starts.append(begins)
        return 0

    cdef int divide(self, terminals) except -1:
        """Divide all code points into classes that no terminal tells apart."""
        cdef int32_t code
        bounds = {0, 0xD800, 0xE000}
        for ranges in terminals:
            for low, high in ranges:
                bounds |= {low, high + 1}
        ordered = sorted(bound for bound in bounds if bound <= LAST_CODE_POINT)
        self.bounds = np.array(ordered, np.int32)
        self.n_classes = len(ordered)
        self.surrogates = self.class_of(0xD800)
        self.terminal_classes = [
            [
                (self.class_of(low), self.class_of(min(high, LAST_CODE_POINT)))
                for low, high in ranges
                if low <= LAST_CODE_POINT
            ]
            for ranges in terminals
        ]
        for code in range(128):
            self.ascii_classes[code] = self.class_of(code)
        return 0

    cdef int32_t class_of(self, int32_t code) noexcept:
        cdef int32_t low = 0, high = self.n_classes, middle
        while high - low > 1:
            middle = (low + high) // 2
            if self.bounds[middle] <= code:
                low = middle
            else:
                high = middle
        return low

    # ---- stacks: the place of an element that comes next, and the stack below ------------------

    cdef int32_t node(self, Py_ssize_t place, int32_t below) except -1:
        """Return the stack with an element's place on top; the one below where nothing is left."""
        if self.elements[place] == END:
            return below
        key = (place, below)
        found = self.node_ids.get(key)
        if found is None:
            found = self.node_ids[key] = len(self.node_places)
            self.node_places.append(place)
            self.node_parents.append(below)
        return found

    cdef tuple closed(self, list waiting):
        """Write out rules on top of stacks until terminals, or nothing, stand there."""
        cdef int32_t node, rest
        cdef Py_ssize_t place
        seen = set(waiting)
        waiting = list(seen)
        found = []
        while waiting:
            node = waiting.pop()
            element = END if node == EMPTY else self.elements[self.node_places[node]]
            if node == EMPTY or element >= 0:
                found.append(node)
                if len(found) > MOST_STACKS:
                    raise GrammarError(
                        f"the grammar can read the text in more than {MOST_STACKS} ways; "
                        "make its alternatives begin differently"
                    )
                continue
            rest = self.node(self.node_places[node] + 1, self.node_parents[node])
            for place in self.starts[~element]:
                below = self.node(place, rest)
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)
        return tuple(sorted(found))

    # ---- states: sets of stacks ------------------------------------------------------------------

    cdef int32_t state_of(self, tuple stacks) except -1:
        cdef Py_ssize_t i, begin
        found = self.state_ids.get(stacks)
        if found is not None:
            return found
        if self.n_states == self.capacity:
            self.grow()
        begin = self.n_states * self.n_classes
        for i in range(begin, begin + self.n_classes):
            self.table[i] = UNKNOWN
        self.table[begin + self.surrogates] = DEAD
        self.may_end[self.n_states] = EMPTY in stacks
        self.states.append(stacks)
        self.state_ids[stacks] = self.n_states
        self.n_states += 1
        return self.n_states - 1

    cdef int grow(self) except -1:
        cdef Py_ssize_t capacity = max(64, 2 * self.capacity)
        cdef void *moved
        if capacity * self.n_classes > MOST_ENTRIES:
            raise GrammarError("the grammar needs too much memory; make it smaller")
        moved = realloc(self.table, capacity * self.n_classes * sizeof(int32_t))
        if not moved:
            raise MemoryError
        self.table = <int32_t *>moved
        moved = realloc(self.may_end, capacity)
        if not moved:
            raise MemoryError
        self.may_end = <uint8_t *>moved
        self.capacity = capacity
        return 0

    cdef int forget(self) except -1:
        self.node_ids, self.node_places, self.node_parents = {}, [None], [None]
        self.state_ids, self.states = {}, []
        self.n_states = 0
        return 0

    cdef bint is_full(self) noexcept:
        return self.n_states * self.n_classes > MANY_ENTRIES

    cdef int32_t restart(self, int32_t state) except -1:
        """Forget all states but the first and one more; returns what that is called now."""
        kept = [self.places_of(self.states[self.first]), self.places_of(self.states[state])]
        self.forget()
        self.first, state = [self.state_of(self.stacks_of(stacks)) for stacks in kept]
        return state

    cdef list places_of(self, tuple stacks):
        """Spell stacks out: their places, from the top down."""
        spelled = []
        for node in stacks:
            places = []
            while node != EMPTY:
                places.append(self.node_places[node])
                node = self.node_parents[node]
            spelled.append(places)
        return spelled

    cdef tuple stacks_of(self, list spelled):
        nodes = []
        for places in spelled:
            node = EMPTY
            for place in reversed(places):
                node = self.node(place, node)
            nodes.append(node)
        return tuple(sorted(nodes))

    # ---- steps -----------------------------------------------------------------------------------

    cdef int32_t next_state(self, int32_t state, int32_t class_) except -1:
        cdef int32_t *entry = &self.table[state * <Py_ssize_t>self.n_classes + class_]
        if entry[0] == UNKNOWN:
            return self.find_next(state, class_)
        return entry[0]

    cdef int32_t find_next(self, int32_t state, int32_t class_) except -1:
        cdef int32_t low, high, found = DEAD
        after = []
        for node in self.states[state]:
            if node == EMPTY:
                continue
            place = self.node_places[node]
            for low, high in self.terminal_classes[self.elements[place]]:
                if low <= class_ <= high:
                    after.append(self.node(place + 1, self.node_parents[node]))
                    break
        if after:
            found = self.state_of(self.closed(after))
        self.table[state * <Py_ssize_t>self.n_classes + class_] = found
        return found

    cdef bint may_complete(self, int32_t state, int32_t low, int32_t high) except -1:
        """Whether some code point from low to high may follow."""
        cdef int32_t class_
        for class_ in range(self.class_of(low), self.class_of(high) + 1):
            if self.next_state(state, class_) != DEAD:
                return True
        return False

    cdef bint step(self, const Cursor *before, uint8_t byte, Cursor *after) except -1:
        """Read a byte; false when no text of the grammar goes on with it."""
        cdef int32_t low, high
        after[0] = before[0]
        if before.n_missing > 0:
            if byte & 0xC0 != 0x80:
                return False
            after.n_missing -= 1
            after.code = before.code << 6 | byte & 0x3F
        elif byte < 0x80:
            after.state = self.next_state(before.state, self.ascii_classes[byte])
            return after.state != DEAD
        elif 0xC2 <= byte <= 0xDF:
            after.n_missing, after.code, after.lowest = 1, byte & 0x1F, 0x80
        elif 0xE0 <= byte <= 0xEF:
            after.n_missing, after.code, after.lowest = 2, byte & 0x0F, 0x800
        elif 0xF0 <= byte <= 0xF4:
            after.n_missing, after.code, after.lowest = 3, byte & 0x07, 0x10000
        else:
            return False
        low = after.code << 6 * after.n_missing
        high = min(low | (1 << 6 * after.n_missing) - 1, 0x10FFFF)
        low = max(low, after.lowest)
        if low > high:
            return False
        if after.n_missing > 0:
            return self.may_complete(before.state, low, high)
        after.state = self.next_state(before.state, self.class_of(low))
        return after.state != DEAD


@cython.final
cdef class TokenTable:
    """The pieces of a vocabulary in the order of their bytes.

    Parameters
    ----------
    pieces : sequence of bytes
        What each token stands for, control tokens by their texts. As in llama.cpp a piece ends at
        its first zero byte, and a token with an empty one follows nothing.
    end_ids : iterable of int
        Tokens that end a text.

    Attributes
    ----------
    n_vocab : int
    """

    def __cinit__(self, pieces, end_ids):
        cdef Py_ssize_t i
        cut = [bytes(piece).partition(b"\0")[0] for piece in pieces]
        self.pieces = cut
        self.n_vocab = len(cut)
        is_end = np.zeros(self.n_vocab, np.uint8)
        is_end[list(end_ids)] = 1
        self.is_end = is_end
        ids = [i for i in range(self.n_vocab) if cut[i] and not is_end[i]]
        ids.sort(key=cut.__getitem__)
        ordered = [cut[i] for i in ids]
        self.ids = np.array(ids, np.int32)
        self.ends = np.flatnonzero(is_end).astype(np.int32)
        self.never = np.array(
            [i for i in range(self.n_vocab) if not cut[i] and not is_end[i]], np.int32
        )
        self.text = b"".join(ordered) or b"\0"
        lengths = np.array([len(piece) for piece in ordered], np.int32)
        self.lengths = lengths
        self.begins = (np.cumsum(lengths) - lengths).astype(np.int32)
        self.shared = np.zeros(len(ordered), np.int32)
        for i in range(1, self.ids.shape[0]):
            self.shared[i] = self.common(i - 1, i)
        self.longest = max([len(piece) for piece in cut], default=0)

    cdef int32_t common(self, Py_ssize_t i, Py_ssize_t j) noexcept:
        """Return how many bytes two pieces have in common at their beginning."""
        cdef int32_t n = 0, most = min(self.lengths[i], self.lengths[j])
        while n < most and self.text[self.begins[i] + n] == self.text[self.begins[j] + n]:
            n += 1
        return n


@cython.final
cdef class GrammarMatcher:
    """Follows one text under a grammar, token by token.

    Parameters
    ----------
    grammar : Grammar
    tokens : TokenTable

    Attributes
    ----------
    tokens : TokenTable
    """

    def __cinit__(self, grammar, TokenTable tokens not None):
        self.tokens = tokens
        self.automaton = Automaton(grammar)
        self.path = <Cursor *>malloc((tokens.longest + 1) * sizeof(Cursor))
        if not self.path:
            raise MemoryError
        self.reset()

    def __dealloc__(self):
        free(self.path)

    def reset(self):
        """Begin a new text."""
        self.cursor = Cursor(self.automaton.first, 0, 0, 0)

    @property
    def may_end(self):
        """Whether the text may end here: bool."""
        return bool(
            self.cursor.n_missing == 0 and self.automaton.may_end[self.cursor.state]
        )

    cpdef bint allows(self, int32_t token) except -1:
        """Whether a token may follow.

        Raises
        ------
        ShapeError
            If `token` is not in the vocabulary.
        """
        if self.is_end(token):
            return self.may_end
        return self.read(token)

    cpdef accept(self, int32_t token):
        """Go on behind a token; one that ends the text leaves everything as it is.

        Raises
        ------
        ShapeError
            If `token` is not in the vocabulary.
        DataError
            If `token` must not follow.
        """
        if not self.allows(token):
            raise DataError(f"token {token} must not follow here under the grammar")
        if self.is_end(token):
            return
        self.cursor = self.path[len(self.tokens.pieces[token])]
        if self.automaton.is_full():
            self.cursor.state = self.automaton.restart(self.cursor.state)

    def allowed(self):
        """Tell which tokens may follow: ndarray of shape (n_vocab,), bool."""
        cdef float[::1] logits = np.zeros(self.tokens.n_vocab, np.float32)
        if self.tokens.n_vocab:
            self.forbid_others(&logits[0])
        return np.asarray(logits) == 0

    cdef bint is_end(self, int32_t token) except -1:
        if not 0 <= token < self.tokens.n_vocab:
            raise ShapeError(
                f"token {token} is not in the vocabulary of {self.tokens.n_vocab} tokens"
            )
        return self.tokens.is_end[token]

    cdef bint read(self, int32_t token) except -1:
        """Read a token's bytes along the path; false when they must not follow."""
        cdef bytes piece = self.tokens.pieces[token]
        cdef Py_ssize_t i
        self.path[0] = self.cursor
        for i in range(len(piece)):
            if not self.automaton.step(&self.path[i], piece[i], &self.path[i + 1]):
                return False
        return len(piece) > 0

    cdef int forbid_others(self, float *logits) except -1:
        """Set the logits of all tokens that must not follow to minus infinity."""
        cdef TokenTable t = self.tokens
        cdef Py_ssize_t i, at
        cdef int32_t dead = t.longest + 1  # prefixes of this length are known to lead nowhere
        for i in range(t.never.shape[0]):
            logits[t.never[i]] = -INFINITY
        if not self.may_end:
            for i in range(t.ends.shape[0]):
                logits[t.ends[i]] = -INFINITY
        self.path[0] = self.cursor
        for i in range(t.ids.shape[0]):
            if t.shared[i] < dead:
                dead = t.longest + 1
                for at in range(t.shared[i], t.lengths[i]):
                    if not self.automaton.step(
                        &self.path[at], t.text[t.begins[i] + at], &self.path[at + 1]
                    ):
                        dead = at + 1
                        break
            if dead <= t.lengths[i]:
                logits[t.ids[i]] = -INFINITY
        return 0
