"""Adapters: initial values bit for bit, round trips, and files that lie."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from engine.errors import EngineError, FormatError, ShapeError
from engine.lora import (
    Adapter,
    check_fits,
    create_adapter,
    layer_of,
    read_adapter,
    table_names,
    table_position,
)

SHAPES = [("token_embd", 6, 10, 3), ("output_norm", 6, 1, 1), ("blk.0.attn_q", 6, 8, 2)]
RECORDED = ["init-lora-0.bin", "a-lora-10.bin", "b-lora-16.bin"]


def filled(rng, shapes=SHAPES, r=3, alpha=6):
    """Make an adapter of random values."""
    adapter = Adapter(shapes, r, alpha)
    adapter.flat[:] = rng.standard_normal(adapter.flat.size)
    return adapter


def record(name, rows, type_id=0, sizes=None, position=16):
    """Encode one tensor of a .bin file; `rows` is (n, rank)."""
    sizes = sizes or (rows.shape[::-1] if len(rows) > 1 else rows.shape[1:])
    head = struct.pack(f"<3I{len(sizes)}I", len(sizes), len(name), type_id, *sizes) + name
    return head + bytes(-(position + len(head)) % 32) + rows.tobytes()


def bin_file(*records, magic=b"algg", version=1, r=2, alpha=2):
    content = magic + struct.pack("<3I", version, r, alpha)
    for make in records:
        content += make(len(content))
    return content


def tensor(name, rows, **how):
    return lambda position: record(name, rows, position=position, **how)


A = np.arange(10, dtype="<f4").reshape(5, 2)
B = np.arange(8, dtype="<f4").reshape(4, 2)
WHOLE = (tensor(b"output.weight.loraA", A), tensor(b"output.weight.loraB", B))


def test_every_factor_is_a_view_of_the_flat_array_in_the_order_given():
    adapter = Adapter(SHAPES, 3, 6)
    adapter.flat[:] = np.arange(adapter.flat.size)
    begin = 0
    for pair in adapter.pairs.values():
        for factor, n in ((pair.a, pair.n_in), (pair.b, pair.n_out)):
            expected = np.arange(begin, begin + pair.rank * n).reshape(pair.rank, n)
            assert np.array_equal(factor, expected)
            begin += factor.size
    assert begin == adapter.flat.size
    assert adapter.scale == 2.0


def test_the_initial_adapter_of_seed_42_is_the_recorded_one_byte_for_byte(data_dir, tmp_path):
    recorded = data_dir / "init-lora-0.bin"
    shapes = read_adapter(recorded).shapes
    create_adapter(shapes, 4, 4, seed=42).write_bin(tmp_path / "made.bin")
    assert (tmp_path / "made.bin").read_bytes() == recorded.read_bytes()


def test_the_table_of_names_is_the_recorded_order(data_dir):
    assert list(read_adapter(data_dir / "init-lora-0.bin").pairs) == list(table_names(2))


def test_names_sort_into_the_table_whatever_their_order():
    names = list(table_names(12))
    assert sorted(sorted(names), key=table_position) == names != sorted(names)


@pytest.mark.parametrize(
    "name", ["", "blk", "blk.0", "blk.01.attn_q", "blk.-1.attn_q", "blk.0.output", "blk.²."]
)
def test_names_of_other_tensors_have_no_layer(name):
    with pytest.raises(ValueError, match=r"^"):
        layer_of(name)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_adapters_are_rewritten_byte_for_byte(data_dir, tmp_path, name):
    read_adapter(data_dir / name).write_bin(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()


def test_ranks_of_single_tensors_may_differ_from_the_header(data_dir):
    adapter = read_adapter(data_dir / "b-lora-16.bin")
    assert (adapter.r, adapter.alpha) == (8, 8)
    ranks = {pair.name: pair.rank for pair in adapter.pairs.values()}
    assert (ranks["blk.0.attn_q"], ranks["blk.1.attn_norm"], ranks["output"]) == (6, 2, 8)


def test_written_adapters_read_back_equal(rng, tmp_path):
    adapter = filled(rng)
    adapter.write_bin(tmp_path / "x.bin")
    again = read_adapter(tmp_path / "x.bin")
    assert again.shapes == adapter.shapes
    assert (again.r, again.alpha) == (adapter.r, adapter.alpha)
    assert np.array_equal(again.flat, adapter.flat)


def test_a_file_keeps_one_row_of_rank_numbers_for_every_input(tmp_path):
    (tmp_path / "x.bin").write_bytes(bin_file(*WHOLE))
    pair = read_adapter(tmp_path / "x.bin").pairs["output"]
    assert np.array_equal(pair.a, A.T)
    assert np.array_equal(pair.b, B.T)


def test_half_precision_tensors_are_read(tmp_path):
    halves = tensor(b"output.weight.loraA", A.astype("<f2"), type_id=1)
    (tmp_path / "x.bin").write_bytes(bin_file(halves, WHOLE[1]))
    assert np.array_equal(read_adapter(tmp_path / "x.bin").pairs["output"].a, A.T)


def test_rank_0_makes_no_pair_and_draws_nothing():
    with_gap = [SHAPES[0], ("output_norm", 6, 1, 0), SHAPES[2]]
    a, b = (create_adapter(shapes, 3, 3, 9) for shapes in (with_gap, [SHAPES[0], SHAPES[2]]))
    assert list(a.pairs) == ["token_embd", "blk.0.attn_q"]
    assert a.flat.any()
    assert np.array_equal(a.flat, b.flat)


def test_a_fractional_alpha_cannot_be_written_and_leaves_no_file(rng, tmp_path):
    with pytest.raises(FormatError, match=r"x\.bin: alpha 1\.5"):
        filled(rng, alpha=1.5).write_bin(tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_fits_is_accepted_whatever_the_ranks(rng):
    check_fits(filled(rng), [(n, i, o, 1) for n, i, o, _ in [*SHAPES, ("output", 6, 10, 1)]])


def test_an_adapter_of_another_model_is_refused_with_both_sizes(rng):
    wider = [(name, n_in + 1, n_out, rank) for name, n_in, n_out, rank in SHAPES]
    with pytest.raises(ShapeError, match=r"new adapter: tensor token_embd: .*6 × 10.*7 × 10"):
        check_fits(filled(rng), wider)
    with pytest.raises(ShapeError, match=r"new adapter: tensor blk\.0\.attn_q: .*no such tensor"):
        check_fits(filled(rng), SHAPES[:2])


@pytest.mark.parametrize("bad", [("a", 0, 1, 1), ("a", 1, 1, -1), ("token_embd", 6, 10, 3)])
def test_impossible_shapes_are_refused(bad):
    with pytest.raises(ShapeError, match=bad[0]):
        Adapter([*SHAPES, bad], 1, 1)


HOSTILE = {
    "empty": (b"", "not an adapter"),
    "magic": (bin_file(*WHOLE, magic=b"ggml"), "not an adapter: begins with b'ggml'"),
    "version": (bin_file(*WHOLE, version=2), "version 2"),
    "header": (b"algg\1\0\0\0", "within the header"),
    "rank 0": (bin_file(*WHOLE, r=0), "r is 0"),
    "nothing": (bin_file(), "no tensors"),
    "type": (bin_file(tensor(b"output.weight.loraA", A, type_id=7)), "output.* has type 7"),
    "no dims": (bin_file(lambda _: struct.pack("<3I", 0, 4, 0) + b"abcd"), "0 dimensions"),
    "dims": (bin_file(lambda _: struct.pack("<3I", 2**32 - 1, 4, 0)), "4294967295 dimensions"),
    "name": (bin_file(lambda _: struct.pack("<4I", 1, 2**31, 0, 1)), "name of 2147483648 bytes"),
    "size 0": (bin_file(tensor(b"x.weight.loraA", A, sizes=(0, 5))), "impossible size 0 × 5"),
    "huge": (
        bin_file(tensor(b"x.weight.loraA", A, sizes=(2**31 - 1, 2**31 - 1))),
        "tensor x.weight.loraA ends at byte .* cut off",
    ),
    "not UTF-8": (bin_file(tensor(b"\xff.weight.loraA", A)), "not UTF-8"),
    "line break": (bin_file(tensor(b"a\n.weight.loraA", A)), "unprintable"),
    "suffix": (bin_file(tensor(b"output.weight", A)), "tensor output.weight: expected a name"),
    "twice": (bin_file(*WHOLE, WHOLE[0]), "tensor output.weight.loraA is there twice"),
    "half": (bin_file(WHOLE[0]), "tensor output.weight.loraB is missing"),
    "other half": (bin_file(WHOLE[1]), "tensor output.weight.loraA is missing"),
    "ranks": (
        bin_file(WHOLE[0], tensor(b"output.weight.loraB", B.reshape(2, 4))),
        "tensor output: A has rank 2, B 4",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_lies_is_refused_in_one_line(tmp_path, case):
    content, problem = HOSTILE[case]
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(FormatError, match=f"bad.bin: .*{problem}") as caught:
        read_adapter(tmp_path / "bad.bin")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FormatError, match=r"gone\.bin: cannot be read: No such file"):
        read_adapter(tmp_path / "gone.bin")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    content = bin_file(*WHOLE)
    path = tmp_path / "cut.bin"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            read_adapter(path)


def test_bytes_changed_at_random_give_an_adapter_or_one_line(rng, tmp_path):
    content = bin_file(*WHOLE)
    path = tmp_path / "changed.bin"
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            adapter = read_adapter(path)
        except EngineError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert adapter.flat.nbytes <= 4 * len(content)
    assert refused
