"""The matrix: every op on every stored type in every kernel variant, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import kernels
from engine.dtypes import DType
from engine.tensor import Tensor
from tests import matrix
from tests.matrix import CASES, DOCUMENT, VARIANTS, Case, Column
from tests.test_house import is_probe, listed

CELLS = [(case, dtype) for case in CASES for dtype in case.types]


@pytest.mark.parametrize("case, dtype", CELLS, ids=[f"{c.name}-{t.name}" for c, t in CELLS])
def test_a_cell_is_within_its_bound(
    isa: str, case: Case, dtype: DType, record_property: pytest.FixtureRequest
) -> None:
    if case.pairs and not kernels.has_pairs(isa):
        pytest.skip(f"{isa} has no bf16 products")
    value = matrix.measured(case, isa, dtype)
    record_property("cell", [isa, case.name, dtype.name, value])
    assert value <= 1


def test_every_kernel_is_in_the_matrix() -> None:
    names = {name for kind in listed().values() for name in kind if not is_probe(name)}
    assert {name for case in CASES for name in case.kernels} == names


def test_every_variant_has_a_column() -> None:
    assert set(VARIANTS) == {*kernels.isas(), *kernels.missing_features()}


def test_the_document_shows_what_is_recorded() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert text == matrix.document(text, matrix.kept()), "run make docs"


@pytest.mark.parametrize("column", matrix.kept().values(), ids=lambda c: c.isa)
def test_records_have_all_cells_within_their_bounds(column: Column) -> None:
    pairs = column.isa in ("avx512bf16", "amx")
    wanted = {case.name: [t.name for t in case.types] for case in CASES if pairs or not case.pairs}
    assert {name: list(row) for name, row in column.cells.items()} == wanted, "run make matrix"
    assert all(0 <= value <= 1 for row in column.cells.values() for value in row.values())


def test_a_record_replaces_its_variant_alone(tmp_path: Path) -> None:
    first, second = CASES[0], CASES[5]
    for isa, value in [("avx2", 0.25), ("amx", 0.5), ("amx", 0.75)]:
        values = [(second.name, "F32", value), (first.name, "F32", 0.0)]
        matrix.keep(Column(isa, "a processor", matrix.cells_of(values)), tmp_path)
    columns = matrix.kept(tmp_path)
    assert [c.cells[second.name] for c in columns.values()] == [{"F32": 0.75}, {"F32": 0.25}]
    assert matrix.cell(second, second.types[0], columns["amx"]) == "75 %"
    assert matrix.cell(first, first.types[0], columns["amx"]) == "exact"
    assert matrix.cell(first, first.types[1], columns["amx"]) == ""
    assert matrix.cell(first, first.types[0], columns.get("avx512")) == "not run"


def test_one_bit_of_a_stored_byte_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are given the last byte otherwise: every case that reads stored rows fails."""
    plain, met = matrix.stored, []

    def spoiled(data: matrix.Array, dtype: DType, rows: int, cols: int) -> Tensor:
        met.append(dtype)
        other = data.copy()
        other[-1] ^= 0x40
        return plain(other, dtype, rows, cols)

    monkeypatch.setattr(matrix, "stored", spoiled)
    isa = kernels.isas()[0]
    for case in CASES:
        for dtype in case.types[::4] if kernels.has_pairs(isa) or not case.pairs else ():
            met.clear()
            value = matrix.measured(case, isa, dtype)
            assert (value > 1) is bool(met), (case.name, dtype.name)
