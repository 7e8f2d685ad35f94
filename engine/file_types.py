"""What a quantized file can be: the targets of `quantize`, and their numbers in files.

A target is a mixture: most matrices get its main type, some get another (`engine.mixture`).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.dtypes import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    DType,
)


@dataclass(frozen=True, slots=True)
class Target:
    """A mixture of types.

    Attributes
    ----------
    name : str
    file_type : int
        Value of ``general.file_type``.
    dtype : DType
        Type of most matrices.
    note : str
        What else there is in it, for a person.
    is_copy : bool
        Tensors stay as they are.
    """

    name: str
    file_type: int
    dtype: DType
    note: str = ""
    is_copy: bool = False

    @property
    def bits(self) -> float:
        """Bits that a weight of the main type takes."""
        return 8 * self.dtype.block_bytes / self.dtype.block


_OUTPUT = "output Q6_K"
_SMALL = "attn_v, ffn_down and attn_output larger"
_SOME = "some of attn_v and ffn_down larger"

TARGETS = (
    Target("Q4_0", 2, Q4_0, _OUTPUT),
    Target("Q4_1", 3, Q4_1, _OUTPUT),
    Target("Q5_0", 8, Q5_0, _OUTPUT),
    Target("Q5_1", 9, Q5_1, _OUTPUT),
    Target("Q2_K", 10, Q2_K, f"{_OUTPUT}, {_SMALL}"),
    Target("Q2_K_S", 21, Q2_K, f"{_OUTPUT}; needs an importance matrix"),
    Target("Q3_K_S", 11, Q3_K, _OUTPUT),
    Target("Q3_K_M", 12, Q3_K, f"{_OUTPUT}, {_SMALL}"),
    Target("Q3_K_L", 13, Q3_K, f"{_OUTPUT}, {_SMALL} still"),
    Target("IQ4_NL", 25, IQ4_NL, f"{_OUTPUT}, {_SOME}; 16 uneven steps"),
    Target("IQ4_XS", 30, IQ4_XS, f"{_OUTPUT}, {_SOME}; 16 uneven steps"),
    Target("Q4_K_S", 14, Q4_K, f"{_OUTPUT}, the first of attn_v and ffn_down Q5_K"),
    Target("Q4_K_M", 15, Q4_K, f"{_OUTPUT}, half of attn_v and ffn_down too"),
    Target("Q5_K_S", 16, Q5_K, _OUTPUT),
    Target("Q5_K_M", 17, Q5_K, f"{_OUTPUT}, half of attn_v and ffn_down too"),
    Target("Q6_K", 18, Q6_K),
    Target("Q8_0", 7, Q8_0),
    Target("F16", 1, F16),
    Target("BF16", 32, BF16),
    Target("F32", 0, F32),
    Target("COPY", 0, F32, "tensors as they are", is_copy=True),
)

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Known to the original, but their grids are not here.
NOT_OFFERED = {
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "IQ3_S": 26,
    "IQ3_M": 27,
}

BY_NAME = {target.name: target for target in TARGETS}

# The file's number where all matrices are of one type.
UNIFORM = {
    **{target.dtype: target.file_type for target in reversed(TARGETS) if not target.is_copy},
    Q2_K: 10,
    Q3_K: 11,
    Q4_K: 14,
    Q5_K: 16,
}


def find_target(text: str) -> Target | None:
    """Find the target that a user means by a name, in any case, or by its file type's number."""
    name = text.upper()
    if name.isascii() and name.isdigit():
        return next((t for t in TARGETS if t.file_type == int(name)), None)
    return BY_NAME.get(ALIASES.get(name, name))


def is_known(text: str) -> bool:
    """Tell whether a text names a target, be it one that is not offered."""
    name = text.upper()
    others = {*NOT_OFFERED, *map(str, NOT_OFFERED.values())}
    return find_target(text) is not None or name in others
