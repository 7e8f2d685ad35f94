"""Rows of the comparison: rates, ratios, and targets that move with the machine's peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import (
    CASES,
    REFERENCE,
    UNITS,
    agree,
    quick,
    rate,
    ratio,
    row_names,
    rows_of,
    target,
)
from bench.engines import ENGINES
from bench.models import MAKERS, PACKAGED
from bench.peaks import Peak

AMD, INTEL = REFERENCE["amd"], REFERENCE["intel"]


def case(kind: str):
    return next(c for c in CASES if c.kind == kind and c.targets)


@pytest.mark.parametrize("unit", ["s", "s/iter", "MB"])
def test_where_less_is_better_half_of_it_is_twice_as_good(unit):
    assert ratio(unit, 2.0, 4.0) == 2


@pytest.mark.parametrize("unit", ["tokens/s", "GFLOP/s"])
def test_where_more_is_better_half_of_it_is_half_as_good(unit):
    assert ratio(unit, 2.0, 4.0) == 0.5


def test_on_the_reference_machines_targets_are_those_that_were_set():
    for peak, machine in ((AMD, "amd"), (INTEL, "intel")):
        for kind in ("prompt", "generation", "training", "start"):
            assert target(case(kind), peak, {}) == case(kind).targets[machine]


def test_a_prompts_target_scales_with_products_and_generations_with_reads():
    slow = Peak(INTEL.fma / 2, INTEL.pairs / 2, INTEL.tiles / 2, INTEL.reads / 4)
    assert target(case("prompt"), slow, {}) == case("prompt").targets["intel"] / 2
    assert target(case("generation"), slow, {}) == case("generation").targets["intel"] / 4


def test_a_slower_machine_may_take_longer_but_not_to_start():
    slow = replace(AMD, fma=AMD.fma / 2, pairs=AMD.pairs / 2)
    assert target(case("training"), slow, {}) == 2 * case("training").targets["amd"]
    assert target(case("start"), slow, {}) == case("start").targets["amd"]


def test_where_float32_is_the_faster_vector_unit_it_bounds():
    machine = replace(AMD, fma=2 * AMD.pairs)
    assert target(case("prompt"), machine, {}) == 2 * case("prompt").targets["amd"]


def test_a_products_target_is_a_part_of_the_vectors_peak_or_above_onednn_on_tiles():
    product = case("product")
    assert target(product, AMD, {"torch 2.13": 400}) == product.targets["amd"] * 469
    assert target(product, INTEL, {"torch 2.13": 2000}) == pytest.approx(2300)
    assert target(product, INTEL, {}) is None


def test_seconds_become_tokens_operations_or_stay():
    assert rate(case("prompt"), 0.5) == 2 * case("prompt").args["tokens"]
    product = replace(case("product"), args={"shape": (10, 100, 1000)})
    assert rate(product, 1e-3) == pytest.approx(2.0)
    assert rate(case("training"), 0.25) == 0.25


def test_a_row_has_the_median_of_the_rounds_and_the_ratio_to_each_peer():
    n = case("prompt").args["tokens"]
    rounds = {
        "ours": [{"seconds": s} for s in (0.1, 0.2, 9.0)],
        "torch 2": [{"seconds": s} for s in (0.4, 0.3, 0.8)],
    }
    (row,) = rows_of(case("prompt"), 2, INTEL, rounds)
    assert row["ours"] == n / 0.2
    assert row["peers"] == {"torch 2": {"value": n / 0.4, "ratio": 2.0}}
    assert row["target"]["ratio"] == round(n / 0.2 / case("prompt").targets["intel"], 2)


def test_training_has_a_row_of_memory_with_the_peak_of_the_rounds_and_no_scaling():
    training = next(c for c in CASES if c.memory is not None)
    rounds = {
        "ours": [{"seconds": 1, "megabytes": m} for m in (300, 350)],
        "torch 2": [{"seconds": 2, "megabytes": 700}],
    }
    row = rows_of(training, 2, replace(AMD, fma=1, pairs=1), rounds)[1]
    assert (row["what"], row["unit"], row["ours"]) == (f"{training.what}, memory", "MB", 350)
    assert row["peers"]["torch 2"]["ratio"] == 2
    assert row["target"]["value"] == training.memory


def test_a_product_tells_its_part_of_the_best_peak():
    product = case("product")
    tokens, n_in, n_out = product.args["shape"]
    seconds = 2 * tokens * n_in * n_out / (INTEL.tiles * 1e9 / 4)
    (row,) = rows_of(product, 2, INTEL, {"ours": [{"seconds": seconds}]})
    assert row["of peak"] == 0.25


def test_engines_agree_up_to_rounding_and_not_with_another_model():
    logits = [1.0, -2.0, 0.5, 4.0]
    assert agree(logits, [1.01, -2.02, 0.49, 4.0])
    assert not agree(logits, [4.0, 0.5, -2.0, 1.0])


def test_rows_have_names_of_their_own():
    assert len(set(row_names())) == len(row_names()) > len(CASES)


def test_every_case_can_be_run_by_the_engines_it_names_on_a_model_that_can_be_made():
    for one in CASES:
        assert not one.model or one.model in {*MAKERS, *PACKAGED}
        assert one.kind in UNITS
        for engine in ("ours", *one.peers):
            assert callable(getattr(ENGINES[engine], one.kind))


def test_a_quick_case_is_smaller_and_the_same_row():
    for one in CASES:
        small = quick(one)
        assert small.what == one.what
        assert all(small.args[k] <= v for k, v in one.args.items())
    assert quick(case("prompt")).args["tokens"] < case("prompt").args["tokens"]


def test_a_quick_case_has_no_target_unless_it_is_the_whole_work():
    assert target(quick(case("prompt")), INTEL, {}) is None
    assert quick(case("product")) == case("product")
