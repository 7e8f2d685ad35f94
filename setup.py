"""Build of the engine: a baseline library, one library a kernel variant, then the extensions.

Every compiler flag of the project lives here. Metadata and settings of tools are in pyproject.toml.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
DEBUG = os.environ.get("ENGINE_CYTHON_DEBUG") == "1"
SANITIZE = os.environ.get("ENGINE_SANITIZE") == "1"
WERROR = os.environ.get("ENGINE_WERROR") == "1"

# Numbers are part of the kernels' contract: no contraction, no -ffast-math, no -march=native.
C_FLAGS = [
    "-std=c11",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-D_POSIX_C_SOURCE=200809L",
]
C_FLAGS += ["-fPIC", "-Wall", "-Wextra"]
EXT_FLAGS = ["-O2", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-Wno-unused-function"]
LINK_FLAGS = ["-fopenmp"]
if WERROR:
    C_FLAGS.append("-Werror")
if SANITIZE:
    SAN = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    C_FLAGS, EXT_FLAGS, LINK_FLAGS = C_FLAGS + SAN, EXT_FLAGS + SAN, LINK_FLAGS + SAN

# One row a variant; dispatch.c lists the same names, best first.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
VARIANTS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16, "amx": AMX}

# A wrapper includes its families; naming them all makes a change in any of them rebuild it.
SIMD_PARTS = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "engine/simd").iterdir()
    if p.suffix in {".c", ".h", ".def"}
)


def kernel_library(name: str, source: str, flags: list[str]) -> tuple[str, dict]:
    """Describe a static library for setuptools' build_clib."""
    build = {"sources": [source], "obj_deps": {"": SIMD_PARTS}, "cflags": C_FLAGS + flags}
    return name, build


# The dispatcher stands first: the linker reads archives in order, and it refers to the variants.
# Distinct wrapper sources: setuptools compiles a source once, whatever the library it is listed in.
LIBRARIES = [
    kernel_library("cylora_dispatch", "engine/simd/dispatch.c", []),
    kernel_library("cylora_team", "engine/simd/team.c", ["-fopenmp"]),
]
LIBRARIES += [
    kernel_library(f"cylora_{isa}", f"engine/simd/variant_{isa}.c", flags)
    for isa, flags in VARIANTS.items()
]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": DEBUG,
    "initializedcheck": DEBUG,
    "cdivision": not DEBUG,
    "embedsignature": True,
}


def extensions() -> list[Extension]:
    """Make one extension of each ``.pyx`` below ``engine/``."""
    found = []
    for path in sorted((ROOT / "engine").rglob("*.pyx")):
        relative = path.relative_to(ROOT)
        name = ".".join(relative.with_suffix("").parts)
        extension = Extension(
            name,
            [str(relative)],
            include_dirs=["engine/simd"],
            depends=SIMD_PARTS,
            extra_compile_args=EXT_FLAGS,
            libraries=["m"],
            extra_link_args=LINK_FLAGS,
        )
        found.append(extension)
    return found


setup(
    libraries=LIBRARIES,
    ext_modules=cythonize(
        extensions(), compiler_directives=DIRECTIVES, build_dir="build/cython", annotate=False
    ),
)
