"""The page on scaling: its tables are current, and the formulas behind them count what is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engine.lora import KINDS
from engine.model import Model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """The script that writes the tables."""
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "bench" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_current(scaling: ModuleType) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    made = scaling.with_tables(page, scaling.tables(scaling.read_results()))
    assert made == page, "run make docs"


def test_a_page_without_a_place_for_a_table_is_an_error(scaling: ModuleType) -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        scaling.with_tables("# Scaling\n", {"start": "| |"})


def test_parameters_are_those_of_an_adapter_of_default_ranks(scaling: ModuleType) -> None:
    model = Model.load(ROOT / "tests" / "data" / "mini-gqa-f32.gguf")
    h = model.hparams
    shape = scaling.Shape("mini", h.n_layer, h.n_embd, h.n_ff, h.n_embd_kv, h.n_vocab, 32)
    ranks = {kind: 1 if kind.endswith("norm") else scaling.RANK for kind in KINDS}
    shapes = model.adapter_shapes(ranks)
    assert shape.n_parameters == sum(r * (n + m) for _, n, m, r in shapes)


def test_a_sum_takes_nothing_alone_and_not_quite_twice_its_bytes_on_many(
    scaling: ModuleType,
) -> None:
    assert scaling.sum_seconds(1e9, 1, 10) == 0
    once = 1e9 / (10e9 / 8 * scaling.LINK_SHARE)
    assert scaling.sum_seconds(1e9, 2, 10) == pytest.approx(once, rel=1e-3)
    assert scaling.sum_seconds(1e9, 64, 10) == pytest.approx(2 * 63 / 64 * once, rel=1e-2)


def test_a_sum_that_the_reverse_pass_hides_costs_its_last_part_alone(scaling: ModuleType) -> None:
    shape = scaling.SHAPES[0]
    alone = scaling.iteration_seconds(shape, 1, 1, 1e12)
    assert alone == shape.flops(scaling.HOST_TOKENS) / 1e12
    last = scaling.sum_seconds(4 * scaling.RANK * (shape.n_embd + shape.n_vocab), 8, 1)
    assert scaling.iteration_seconds(shape, 8, 1, 1e12) == pytest.approx(alone + last)
    assert scaling.iteration_seconds(shape, 8, 1, 1e15) > alone / 1000 + last
