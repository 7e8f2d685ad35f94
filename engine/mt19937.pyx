"""The random numbers of C++ programs built with libstdc++, bit for bit.

`MT19937` is ``std::mt19937`` and `NormalFloat` is ``std::normal_distribution<float>(0, 1)``.
Checkpoints store a generator as text, initial adapters and sampled tokens follow from a seed, so
neither may differ from the originals by one bit.

Source: Matsumoto and Nishimura, "Mersenne twister", ACM TOMACS 8(1), 1998; the polar method of
Marsaglia and Bray, SIAM Review 6(3), 1964.
"""

cimport cython
from libc.math cimport fmaf, logf, sqrtf
from libc.stdint cimport uint32_t

import numpy as np

from engine.errors import FormatError

cdef enum:
    N_WORDS = 624
    MIDDLE = 397

cdef uint32_t UPPER_BIT = 0x80000000u
cdef uint32_t LOWER_BITS = 0x7FFFFFFFu
cdef uint32_t TWIST = 0x9908B0DFu


cdef inline uint32_t twisted(uint32_t this, uint32_t following, uint32_t distant) noexcept nogil:
    """Return the renewed word: `this` from its top bit, `following`'s rest and `distant`."""
    cdef uint32_t y = (this & UPPER_BIT) | (following & LOWER_BITS)
    return distant ^ (y >> 1) ^ (TWIST if y & 1 else 0)


@cython.final
cdef class MT19937:
    """Mersenne twister of 32-bit words, ``std::mt19937``.

    Parameters
    ----------
    seed : int, optional
        From 0 to 2**32 - 1.

    Raises
    ------
    OverflowError
        If `seed` is not a 32-bit number.
    """

    def __init__(self, uint32_t seed=5489):
        self.seed(seed)

    cdef void seed(self, uint32_t seed) noexcept nogil:
        cdef int i
        cdef uint32_t before = seed
        self.x[0] = seed
        for i in range(1, N_WORDS):
            before = <uint32_t>1812433253 * (before ^ (before >> 30)) + <uint32_t>i
            self.x[i] = before
        self.p = N_WORDS

    cdef uint32_t next(self) noexcept nogil:
        cdef uint32_t z
        if self.p == N_WORDS:
            renew(self.x)
            self.p = 0
        z = self.x[self.p]
        self.p += 1
        z ^= z >> 11
        z ^= (z << 7) & <uint32_t>0x9D2C5680
        z ^= (z << 15) & <uint32_t>0xEFC60000
        return z ^ (z >> 18)

    def next_word(self):
        """Draw one word, from 0 to 2**32 - 1."""
        return self.next()

    def words(self, Py_ssize_t n):
        """Draw words in a row.

        Parameters
        ----------
        n : int
            How many; 0 draws nothing.

        Returns
        -------
        ndarray of shape (n,), uint32
        """
        cdef Py_ssize_t i
        array = np.empty(n, dtype=np.uint32)
        cdef uint32_t[::1] out = array
        with nogil:
            for i in range(n):
                out[i] = self.next()
        return array

    @property
    def state_text(self):
        """The 624 words and the position, decimal, single spaces between, as ``<<`` writes it.

        It is the raw array: after exactly 624 draws the position is 624, not 0.
        """
        numbers = [self.x[i] for i in range(N_WORDS)]
        return " ".join(map(str, [*numbers, self.p]))

    @classmethod
    def from_text(cls, str text not None):
        """Make the generator whose `state_text` is `text`.

        Raises
        ------
        FormatError
            If `text` is not 624 words and a position; says what is wrong, not which file.
        """
        numbers = text.split()
        if len(numbers) != N_WORDS + 1:
            raise FormatError(
                f"generator state has {len(numbers)} numbers, {N_WORDS + 1} are needed"
            )
        for i, number in enumerate(numbers):
            limit = N_WORDS if i == N_WORDS else 0xFFFFFFFF
            digits = number.isascii() and number.isdecimal() and len(number) <= 10
            if not digits or int(number) > limit:
                raise FormatError(
                    f"generator state: number {i + 1} is {number[:20]!r},"
                    f" not an integer from 0 to {limit}"
                )
        cdef MT19937 made = cls()
        for i in range(N_WORDS):
            made.x[i] = int(numbers[i])
        made.p = int(numbers[N_WORDS])
        return made


cdef void renew(uint32_t *x) noexcept nogil:
    """Renew all words in place; a word may be made from words already renewed."""
    cdef int k
    for k in range(N_WORDS - MIDDLE):
        x[k] = twisted(x[k], x[k + 1], x[k + MIDDLE])
    for k in range(N_WORDS - MIDDLE, N_WORDS - 1):
        x[k] = twisted(x[k], x[k + 1], x[k + MIDDLE - N_WORDS])
    x[N_WORDS - 1] = twisted(x[N_WORDS - 1], x[0], x[MIDDLE - 1])


cdef inline float below_one(MT19937 generator) noexcept nogil:
    """Draw from [0, 1): float(word) rounds to nearest even, so the largest words would give 1."""
    cdef float u = <float>generator.next() * <float>2.3283064365386963e-10  # 2^-32, exact
    cdef float largest = <float>0.99999994  # the float below 1
    return u if u < 1 else largest


@cython.final
cdef class NormalFloat:
    """Standard normal deviates in float32, ``std::normal_distribution<float>(0, 1)``.

    Deviates are made in pairs; the second is kept for the next call, across `fill`s.

    Parameters
    ----------
    generator : MT19937
        Source of the words; shared, not copied.
    """

    def __init__(self, MT19937 generator not None):
        self.generator = generator
        self.has_saved = False

    cdef float next(self) noexcept nogil:
        cdef float x, y, rho, m
        if self.has_saved:
            self.has_saved = False
            return self.saved
        while True:
            x = <float>2 * below_one(self.generator) - <float>1
            y = <float>2 * below_one(self.generator) - <float>1
            # Compilers for CPUs with FMA fuse the first square into the sum. The bits follow it:
            # without fusion one element in ten differs.
            rho = fmaf(x, x, y * y)
            if rho <= 1 and rho != 0:
                break
        m = sqrtf((<float>-2 * logf(rho)) / rho)
        self.saved = x * m
        self.has_saved = True
        return y * m

    def next_float(self):
        """Draw one deviate."""
        return self.next()

    def fill(self, float[::1] out not None, float scale):
        """Fill `out` with deviates cut to [-1, 1] and scaled: the initial values of an adapter.

        Parameters
        ----------
        out : ndarray of shape (n,), float32, C-contiguous
            Written in order.
        scale : float
            Factor, rounded to float32; the product is rounded to float32 too.
        """
        cdef Py_ssize_t i
        cdef float z
        with nogil:
            for i in range(out.shape[0]):
                z = self.next()
                z = <float>-1 if z < -1 else <float>1 if z > 1 else z
                out[i] = scale * z
