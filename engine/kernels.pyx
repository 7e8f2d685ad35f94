"""The kernel variants: which one runs here, chosen at import, and the row functions for Python.

Asks cpuid and the operating system's saved register state (``simd/dispatch.c``). The environment
variable ``ENGINE_ISA`` forces a variant by name.
"""

import os

import numpy as np

from engine.errors import IsaError

from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef variant variants[N_VARIANTS]
list_variants(variants)

cdef dict tables = {variants[i].table.isa.decode(): i for i in range(N_VARIANTS)}


cdef const kernels *lookup(str isa) except NULL:
    index = tables.get(isa)
    if index is None:
        raise IsaError(f"ENGINE_ISA={isa}: no such kernel variant; there are {', '.join(tables)}")
    cdef variant *found = &variants[<int>index]
    if found.missing != NULL:
        lack = found.missing.decode()
        raise IsaError(
            f"kernel variant {isa}: this machine lacks {lack}; unset ENGINE_ISA or choose another"
        )
    return found.table


def isas() -> tuple[str, ...]:
    """Names of the variants that this machine runs, best first."""
    return tuple(name for name, i in tables.items() if variants[<int>i].missing == NULL)


def missing_features() -> dict[str, str]:
    """The first missing feature of each variant that this machine cannot run, by its name."""
    return {
        name: variants[<int>i].missing.decode()
        for name, i in tables.items()
        if variants[<int>i].missing != NULL
    }


cdef const kernels *choose() except NULL:
    forced = os.environ.get("ENGINE_ISA")
    if forced:
        return lookup(forced)
    for name in isas():
        return lookup(name)
    lack = variants[N_VARIANTS - 1].missing.decode()
    raise IsaError(f"this processor lacks {lack}; the engine needs AVX2, FMA and F16C")


cdef const kernels *active = choose()


def active_isa() -> str:
    """Name of the variant in force."""
    return active.isa.decode()


cdef const kernels *table(object isa=None) except NULL:
    return active if isa is None else lookup(isa)


cdef void team_run(
    const step *steps, int64_t n_steps, int n_threads, char *scratch, const team_clock *clock
) noexcept nogil:
    c_team_run(steps, n_steps, n_threads, scratch, clock)


cdef dict preferences = {}


def has_pairs(isa=None) -> bool:
    """Whether the variant multiplies bf16 pairs."""
    return table(isa).pairs != 0


def prefers_pairs(isa=None) -> bool:
    """Whether bf16 pairs are the faster way to multiply on this machine.

    Matrix tiles are. Where vectors multiply pairs, the two instructions are timed once (50 us), for
    processors differ: twice the rate of float32 multiply-adds on one, half of it on another.
    """
    cdef const kernels *k = table(isa)
    name = k.isa.decode()
    if name not in preferences:
        preferences[name] = k.pairs == 2 or (k.pairs == 1 and pairs_win(k))
    return preferences[name]


cdef bint pairs_win(const kernels *k) noexcept:
    """A pair product does twice the work of a multiply-add: it may take nearly twice as long."""
    return 2 * fastest(k.probe_fma) > fastest(k.probe_pairs) * 1.2


cdef int64_t fastest(op_fn probe) noexcept:
    """Nanoseconds of a short probe, the best of several."""
    cdef float sink = 0
    cdef worker alone
    cdef probe_args args
    cdef timespec begin, end
    cdef int64_t best = 1 << 62, taken
    alone.index, alone.count = 0, 1
    args.n, args.data, args.sink = 500, NULL, &sink
    for _ in range(8):
        clock_gettime(CLOCK_MONOTONIC, &begin)
        probe(&args, &alone)
        clock_gettime(CLOCK_MONOTONIC, &end)
        taken = (end.tv_sec - begin.tv_sec) * 1000000000 + end.tv_nsec - begin.tv_nsec
        best = min(best, taken)
    return best


def decode(int type_id, const unsigned char[::1] data, int64_t n, isa=None):
    """Decode stored elements.

    Parameters
    ----------
    type_id : int
        GGUF type number.
    data : bytes-like
        At least the bytes of `n` elements.
    n : int
        Elements, a whole number of blocks.
    isa : str, optional
        Variant to use; the one in force by default.

    Returns
    -------
    ndarray of shape (n,), float32

    Raises
    ------
    ValueError
        If the type is unknown, `n` is not whole blocks, or `data` is too short.
    """
    cdef const kernels *k = table(isa)
    cdef int64_t block = block_elements(type_id)
    if block == 0:
        raise ValueError(f"type {type_id} is not known to the kernels")
    if n < 0 or n % block or row_offset(type_id, n) > data.shape[0]:
        raise ValueError(f"{n} elements of type {type_id} do not fit {data.shape[0]} bytes")
    out = np.empty(n, np.float32)
    cdef float[::1] y = out
    if n:
        with nogil:
            k.decode_row(type_id, &data[0], n, &y[0])
    return out


def encode(int type_id, const float[::1] x, isa=None):
    """Store elements by the rules of a type; an infinity or NaN makes its block NaN.

    Parameters
    ----------
    type_id : int
        GGUF type number.
    x : ndarray of shape (n,), float32
        A whole number of blocks.
    isa : str, optional
        Variant to use; the one in force by default.

    Returns
    -------
    ndarray of shape (n_bytes,), uint8

    Raises
    ------
    ValueError
        If the type cannot be written, or `x` is not whole blocks.
    """
    cdef const kernels *k = table(isa)
    cdef int64_t n = x.shape[0]
    if not has_encoder(type_id):
        raise ValueError(f"elements of type {type_id} cannot be written")
    if n % block_elements(type_id):
        raise ValueError(f"{n} elements are not whole blocks of type {type_id}")
    out = np.empty(row_offset(type_id, n), np.uint8)
    cdef unsigned char[::1] y = out
    if n:
        with nogil:
            k.encode_row(type_id, &x[0], n, &y[0])
    return out


def quantize(int type_id, const float[:, ::1] x, const float[::1] importance=None, isa=None):
    """Encode rows as llama.cpp's quantize of June 2024 does, to the byte.

    Unlike `encode` it searches for the scales of the K types and of IQ4.

    Parameters
    ----------
    type_id : int
        GGUF type number.
    x : ndarray of shape (n_rows, n), float32
        Finite; `n` is a whole number of blocks.
    importance : ndarray of shape (n,), float32, optional
        Weight of each column's errors: its mean square in some text (an importance matrix).
    isa : str, optional
        Variant to use; the one in force by default. All give the same bytes.

    Returns
    -------
    ndarray of shape (n_rows, bytes of a row), uint8

    Raises
    ------
    ValueError
        If the type is unknown, `n` is not whole blocks, or `importance` has another length.
    """
    cdef const kernels *k = table(isa)
    cdef int64_t block = block_elements(type_id), rows = x.shape[0], n = x.shape[1], i
    cdef const float *weights = NULL
    if block == 0:
        raise ValueError(f"type {type_id} is not known to the kernels")
    if n % block:
        raise ValueError(f"rows of {n} are not whole blocks of type {type_id}")
    if importance is not None and importance.shape[0] != n:
        raise ValueError(f"{importance.shape[0]} importances do not fit rows of {n}")
    out = np.empty((rows, row_offset(type_id, n)), np.uint8)
    cdef unsigned char[:, ::1] y = out
    if rows and n:
        if importance is not None:
            weights = &importance[0]
        with nogil:
            for i in range(rows):
                k.quantize_row(type_id, &x[i, 0], weights, n, &y[i, 0])
    return out


def encode_bf16(const float[::1] x, isa=None):
    """Round to the nearest bf16, ties to even; subnormals alike, NaN made quiet. Gives uint16."""
    cdef const kernels *k = table(isa)
    out = np.empty(x.shape[0], np.uint16)
    cdef uint16_t[::1] y = out
    if x.shape[0]:
        k.encode_bf16(&x[0], x.shape[0], &y[0])
    return out


def encode_f16(const float[::1] x, isa=None):
    """Round to the nearest half, ties to even. Gives uint16."""
    cdef const kernels *k = table(isa)
    out = np.empty(x.shape[0], np.uint16)
    cdef uint16_t[::1] y = out
    if x.shape[0]:
        k.encode_f16(&x[0], x.shape[0], &y[0])
    return out


def find_invalid(int type_id, const unsigned char[::1] data, int64_t n, isa=None) -> int:
    """Index of the first element or block whose value or scale is infinite or NaN, -1 if none.

    Parameters and errors as in `decode`.
    """
    cdef const kernels *k = table(isa)
    cdef int64_t block = block_elements(type_id), found
    if block == 0:
        raise ValueError(f"type {type_id} is not known to the kernels")
    if n < 0 or n % block or row_offset(type_id, n) > data.shape[0]:
        raise ValueError(f"{n} elements of type {type_id} do not fit {data.shape[0]} bytes")
    if n == 0:
        return -1
    with nogil:
        found = k.find_invalid(type_id, &data[0], n)
    return found


def sum_squares(const float[::1] x, isa=None) -> float:
    """Sum of squares: each square rounded to float32, the sum in float64."""
    return table(isa).sum_squares(&x[0], x.shape[0]) if x.shape[0] else 0.0
