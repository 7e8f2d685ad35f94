"""The stored tensor types, a row each: GGUF id, elements and bytes of a block.

The byte layouts are in ``simd/blocks.h``, decoding and encoding in ``simd/convert.c``. To add a
type, add its row here, its layout there, and its decoder; the tests find it by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """A stored tensor type.

    Attributes
    ----------
    id : int
        Type number in GGUF tensor infos.
    name : str
        Upper-case name as users know it (``Q4_1``).
    block : int
        Elements of a block; a row is a whole number of blocks.
    block_bytes : int
        Bytes of a block.
    """

    id: int
    name: str
    block: int
    block_bytes: int

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` elements; `n` must be a multiple of `block`."""
        if n % self.block:
            raise ValueError(f"{n} elements are not whole blocks of {self.block} ({self.name})")
        return n // self.block * self.block_bytes


F32 = DType(0, "F32", 1, 4)
F16 = DType(1, "F16", 1, 2)
Q4_0 = DType(2, "Q4_0", 32, 18)
Q4_1 = DType(3, "Q4_1", 32, 20)
Q5_0 = DType(6, "Q5_0", 32, 22)
Q5_1 = DType(7, "Q5_1", 32, 24)
Q8_0 = DType(8, "Q8_0", 32, 34)
Q2_K = DType(10, "Q2_K", 256, 84)
Q3_K = DType(11, "Q3_K", 256, 110)
Q4_K = DType(12, "Q4_K", 256, 144)
Q5_K = DType(13, "Q5_K", 256, 176)
Q6_K = DType(14, "Q6_K", 256, 210)
IQ4_NL = DType(20, "IQ4_NL", 32, 18)
IQ4_XS = DType(23, "IQ4_XS", 256, 136)
BF16 = DType(30, "BF16", 1, 2)

BY_ID = {
    t.id: t
    for t in (
        *(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0),
        *(Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS),
    )
}

# How a cache may keep keys and values, by the names that options use.
CACHE_TYPES = {t.name.lower(): t for t in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL)}

# Ids that GGUF files once used and that no reader supports any more.
REMOVED = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

# Ids with a meaning that this engine cannot run yet: named in messages.
UNSUPPORTED = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}
