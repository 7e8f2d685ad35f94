"""The choice of a kernel variant at import, and the list of variants."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine import kernels
from engine.errors import IsaError
from engine.graph import Graph
from tests.conftest import skip_or_fail

VARIANTS = ("amx", "avx512bf16", "avx512", "avx2")  # best first


def in_child(forced: str | None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter's active variant, with ENGINE_ISA set to `forced`."""
    environment = {k: v for k, v in os.environ.items() if k != "ENGINE_ISA"}
    if forced is not None:
        environment["ENGINE_ISA"] = forced
    script = (
        "from engine.errors import IsaError\n"
        "try:\n"
        "    from engine import kernels\n"
        "    print(kernels.active_isa())\n"
        "except IsaError as e:\n"
        "    print('refused:', e)\n"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_each_variant_runs_or_names_what_it_lacks() -> None:
    runs, lacks = kernels.isas(), kernels.missing_features()
    assert set(runs) | set(lacks) == set(VARIANTS)
    assert not set(runs) & set(lacks)
    assert all(lacks.values())


def test_variants_are_listed_best_first() -> None:
    assert kernels.isas() == tuple(name for name in VARIANTS if name in kernels.isas())


def test_a_variant_includes_those_below_it() -> None:
    assert kernels.isas() == VARIANTS[len(VARIANTS) - len(kernels.isas()) :]


@pytest.mark.parametrize("forced", [None, ""], ids=["unset", "empty"])
def test_the_best_variant_is_chosen_by_itself(forced: str | None) -> None:
    assert in_child(forced).stdout.strip() == kernels.isas()[0]


def test_the_environment_forces_a_variant(isa: str) -> None:
    assert in_child(isa).stdout.strip() == isa


@pytest.mark.parametrize("name", ["sse2", "AVX2", "avx2 ", "avx"])
def test_an_unknown_variant_is_refused_by_name(name: str) -> None:
    out = in_child(name).stdout
    assert out.startswith(f"refused: ENGINE_ISA={name}: no such kernel variant")
    for variant in VARIANTS:
        assert variant in out
    with pytest.raises(IsaError, match="no such kernel variant"):
        Graph(1, name)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_the_machine_lacks_is_refused_by_feature(name: str) -> None:
    lack = kernels.missing_features().get(name)
    if lack is None:
        assert Graph(1, name).isa == name
        return
    out = in_child(name).stdout
    assert out.startswith(f"refused: kernel variant {name}: this machine lacks {lack}")
    with pytest.raises(IsaError, match=lack):
        Graph(1, name)


def test_a_missing_variant_skips_and_a_required_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_REQUIRE_ISA", "avx2,avx512")
    with pytest.raises(pytest.skip.Exception, match="avx512bf16: this machine lacks AVX512_BF16"):
        skip_or_fail("avx512bf16", "AVX512_BF16")
    with pytest.raises(pytest.fail.Exception, match="avx512 must run here, but AVX512F is missing"):
        skip_or_fail("avx512", "AVX512F")
    monkeypatch.delenv("ENGINE_REQUIRE_ISA")
    with pytest.raises(pytest.skip.Exception):
        skip_or_fail("avx512", "AVX512F")
