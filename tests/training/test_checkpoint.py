"""Checkpoints: recorded ones byte for byte, both orders of moments, files that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.dtypes import F16, F32
from engine.errors import EngineError, FormatError, ShapeError
from engine.gguf import ValueType, read_gguf, write_gguf
from engine.lora import Adapter, check_fits, read_adapter, table_names
from engine.mt19937 import MT19937
from engine.training.checkpoint import read_checkpoint, write_checkpoint
from engine.training.data import ShuffleState
from engine.training.moments import (
    MomentOrder,
    factors_in_order,
    find_order,
    moments_from_file,
    moments_to_file,
)
from engine.training.state import TrainingState, ValidationState

LEFT, RIGHT = MomentOrder.LEFT_TO_RIGHT, MomentOrder.RIGHT_TO_LEFT


@dataclass(frozen=True)
class Sizes:
    """The recorded model's hyperparameters."""

    n_embd: int = 64
    n_ff: int = 192
    n_head: int = 4
    n_head_kv: int = 4
    n_layer: int = 2
    n_rot: int = 16
    rms_eps: float = 1e-5
    rope_freq_base: float = 10000.0
    rope_freq_scale: float = 1.0


def small_shapes(rank=2, n_layer=2):
    """Sizes that tell every tensor apart, in the table's order."""
    return [
        (name, 3 + i, 1 if "norm" in name else 5 + i, 1 if "norm" in name else rank)
        for i, name in enumerate(table_names(n_layer))
    ]


def small(rng, *, r=4, alpha=4.0, n_past=0):
    """Make an adapter and a state in which every value is another."""
    adapter = Adapter(small_shapes(), r, alpha)
    adapter.flat[:] = rng.standard_normal(adapter.flat.size)
    state = TrainingState.fresh(adapter.flat.size, n_past)
    state.m[:] = rng.standard_normal(state.m.size)
    state.v[:] = rng.random(state.v.size) + 0.5
    state.past_losses[:] = rng.random(n_past)
    state.shuffle = ShuffleState(MT19937(3).state_text, 2**63 + 5, 47, 11)
    state.iterations, state.samples, state.tokens, state.epochs = 12, 55, 1600, 2
    state.opt_iteration, state.just_initialized = 12, False
    state.best_loss, state.previous_loss, state.no_improvement = 2.5, 2.75, 3
    return adapter, state


# The recorded files


@pytest.mark.parametrize("name", ["a-chk-10.gguf", "a-chk-20.gguf"])
def test_recorded_checkpoints_are_rewritten_byte_for_byte(data_dir, tmp_path, name):
    read = read_checkpoint(data_dir / name)
    write_checkpoint(tmp_path / name, read.state, read.adapter, Sizes(), read.n_ctx)
    assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()


def test_a_checkpoint_holds_the_adapter_that_was_written_with_it(data_dir):
    for run in ("10", "20"):
        read = read_checkpoint(data_dir / f"a-chk-{run}.gguf").adapter
        written = read_adapter(data_dir / f"a-lora-{run}.bin")
        assert read.shapes == written.shapes
        assert np.array_equal(read.flat, written.flat)


def test_a_recorded_state_is_read(data_dir):
    read = read_checkpoint(data_dir / "a-chk-10.gguf")
    state = read.state
    assert (state.iterations, state.samples, state.tokens, state.epochs) == (10, 40, 1280, 0)
    assert (state.opt_iteration, state.just_initialized, state.no_improvement) == (10, False, 0)
    assert (round(state.best_loss, 6), round(state.previous_loss, 6)) == (9.530985, 9.386117)
    assert (state.shuffle.sample_count, state.shuffle.next_sample) == (16624, 40)
    assert (read.n_ctx, read.has_header, len(state.past_losses)) == (32, False, 0)


@pytest.mark.parametrize(
    ("name", "order"), [("a-chk-10", LEFT), ("a-chk-20", LEFT), ("g-rtl-chk-10", RIGHT)]
)
def test_the_order_of_recorded_moments_is_told_by_their_zeros(data_dir, name, order):
    read = read_checkpoint(data_dir / f"{name}.gguf")
    assert (read.order, read.warnings) == (order, [])


def test_moments_in_either_order_land_on_their_tensors(data_dir):
    # Where no token was met, moments are zero: whole columns of the embedding's B, nothing else.
    for name in ("a-chk-10", "g-rtl-chk-10"):
        read = read_checkpoint(data_dir / f"{name}.gguf")
        places = Adapter(read.adapter.shapes, 4, 4)
        places.flat[:] = read.state.v
        zero = {pair.name for pair in places.pairs.values() if (pair.b == 0).any()}
        assert zero == {"token_embd"}
        assert all((pair.a > 0).all() for pair in places.pairs.values())
        columns = (places.pairs["token_embd"].b == 0).sum(axis=0)
        assert set(columns.tolist()) == {0, 4}


def test_moments_of_the_other_order_are_written_left_to_right(data_dir, tmp_path):
    read = read_checkpoint(data_dir / "g-rtl-chk-10.gguf")
    write_checkpoint(tmp_path / "x.gguf", read.state, read.adapter, Sizes(), read.n_ctx)
    again = read_checkpoint(tmp_path / "x.gguf")
    assert again.order is LEFT
    assert np.array_equal(again.state.m, read.state.m)
    assert np.array_equal(again.state.v, read.state.v)
    written = (tmp_path / "x.gguf").read_bytes()
    original = (data_dir / "g-rtl-chk-10.gguf").read_bytes()
    moments = 2 * (4 * 17221 + 12)  # each padded to 32 bytes
    assert written[:-moments] == original[:-moments]
    assert written[-moments:] != original[-moments:]


# The orders


def test_left_to_right_nests_each_layer_in_the_one_above():
    adapter = Adapter(small_shapes(), 2, 2)
    names = [name for name, half in factors_in_order(adapter, LEFT) if half == "a"]
    assert names == [
        "output",
        "output_norm",
        *(f"blk.1.{k}" for k in ("ffn_down", "ffn_gate", "ffn_norm", "attn_output", "attn_norm")),
        *(f"blk.0.{k}" for k in ("ffn_down", "ffn_gate", "ffn_norm", "attn_output", "attn_norm")),
        "token_embd",
        *(f"blk.0.{k}" for k in ("attn_v", "attn_k", "attn_q", "ffn_up")),
        *(f"blk.1.{k}" for k in ("attn_v", "attn_k", "attn_q", "ffn_up")),
    ]


@pytest.mark.parametrize(("order", "halves"), [(LEFT, ["a", "b"]), (RIGHT, ["b", "a"])])
def test_each_order_holds_every_factor_once(order, halves):
    adapter = Adapter(small_shapes(n_layer=3), 2, 2)
    factors = factors_in_order(adapter, order)
    assert sorted(factors) == sorted((name, half) for name in adapter.pairs for half in "ab")
    assert [half for _, half in factors[:2]] == halves


def joined(parts):
    return np.concatenate([part.ravel() for part in parts])


def test_moments_return_from_a_file_unchanged(rng):
    adapter, state = small(rng)
    vector = joined(moments_to_file(state.m, adapter))
    assert np.array_equal(moments_from_file(vector, adapter, LEFT), state.m)
    assert not np.array_equal(moments_from_file(vector, adapter, RIGHT), state.m)


def test_moments_of_a_tensor_lie_like_its_values_in_the_file():
    adapter = Adapter([("output", 3, 2, 2)], 2, 2)
    flat = np.arange(10, dtype=np.float32)
    assert joined(moments_to_file(flat, adapter)).tolist() == [0, 3, 1, 4, 2, 5, 6, 8, 7, 9]


def second_moment(rng, adapter, order, *, unmet=(), a_moved=True):
    """Make a second moment in `order`: zero for tokens not met, and for A before it moves."""
    vector = []
    for name, half in factors_in_order(adapter, order):
        values = (rng.random(getattr(adapter.pairs[name], half).T.shape) + 0.5).astype(np.float32)
        if half == "a" and not a_moved:
            values[:] = 0
        if (name, half) == ("token_embd", "b"):
            values[list(unmet)] = 0
        vector.append(values.ravel())
    return np.concatenate(vector)


@pytest.mark.parametrize("order", [LEFT, RIGHT])
@pytest.mark.parametrize("a_moved", [True, False])
def test_zeros_tell_the_order(rng, order, a_moved):
    adapter = Adapter(small_shapes(), 2, 2)
    second = second_moment(rng, adapter, order, unmet=(1, 3), a_moved=a_moved)
    assert find_order(second, adapter) == (order, True)


def test_without_zeros_left_to_right_is_assumed_with_a_warning(rng, tmp_path):
    adapter, state = small(rng)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf")
    assert read.order is LEFT
    (warning,) = read.warnings
    assert "LEFT_TO_RIGHT is assumed" in warning


def test_moments_that_are_all_zero_have_no_order_to_warn_of(rng, tmp_path):
    adapter, state = small(rng)
    state.v[:] = 0
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    assert read_checkpoint(tmp_path / "x.gguf").warnings == []


# Round trips


@pytest.mark.parametrize("n_past", [0, 3])
def test_everything_written_is_read_back(rng, tmp_path, n_past):
    adapter, state = small(rng, n_past=n_past)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 77)
    read = read_checkpoint(tmp_path / "x.gguf")
    assert read.adapter.shapes == adapter.shapes
    assert np.array_equal(read.adapter.flat, adapter.flat)
    for name in ("m", "v", "past_losses"):
        assert np.array_equal(getattr(read.state, name), getattr(state, name))
    zeros = {name: np.zeros(0, np.float32) for name in ("m", "v", "past_losses")}
    assert replace(read.state, **zeros) == replace(state, **zeros)
    assert read.n_ctx == 77
    assert read.ranks["attn_q"] == 2 and read.ranks["ffn_norm"] == 1


def test_a_default_run_has_exactly_the_keys_of_the_original(rng, data_dir, tmp_path):
    adapter, state = small(rng)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    with read_gguf(tmp_path / "x.gguf") as made, read_gguf(data_dir / "a-chk-10.gguf") as recorded:
        assert list(made.metadata) == list(recorded.metadata)
        assert dict(made.value_types) == dict(recorded.value_types)


@pytest.mark.parametrize(("r", "alpha"), [(8, 8.0), (4, 8.0), (8, 1.5)])
def test_another_r_or_alpha_is_kept_in_keys_behind_the_others(rng, tmp_path, r, alpha):
    adapter, state = small(rng, r=r, alpha=alpha)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf")
    assert (read.has_header, read.adapter.r, read.adapter.alpha) == (True, r, alpha)
    with read_gguf(tmp_path / "x.gguf") as file:
        assert list(file.metadata)[-2:] == ["training.lora.r", "training.lora.alpha"]


def test_a_scale_by_the_root_of_r_is_kept_even_when_r_and_alpha_say_nothing(rng, tmp_path):
    adapter, state = small(rng)
    adapter.rslora = True
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf").adapter
    assert (read.rslora, read.r, read.alpha, read.scale) == (True, 4, 4, 2)


def test_a_validation_loss_is_kept_in_keys_behind_the_others(rng, tmp_path):
    adapter, state = small(rng, r=8)
    state.validation = ValidationState(2**63 + 9)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    assert read_checkpoint(tmp_path / "x.gguf").state.validation is None  # none taken yet
    for iteration, loss in ((5, 3.3), (10, 2.1), (12, 2.2)):
        state.validation.take(iteration, loss)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf").state.validation
    assert read == state.validation
    assert (read.iteration, read.no_improvement) == (12, 1)
    assert (read.loss, read.best_loss) == (np.float32(2.2), np.float32(2.1))
    with read_gguf(tmp_path / "x.gguf") as file:
        names = [key for key in file.metadata if key.startswith("training.validation.")]
        assert list(file.metadata)[-len(names) :] == names


def test_the_rope_scale_is_stored_as_its_reciprocal(rng, tmp_path):
    adapter, state = small(rng)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(rope_freq_scale=0.25), 32)
    with read_gguf(tmp_path / "x.gguf") as file:
        assert file.get_float("llama.rope.scale_linear") == 4.0


def test_an_adapter_without_some_tensors_is_kept(rng, tmp_path):
    adapter = Adapter(small_shapes()[2:5], 4, 4)
    state = TrainingState.fresh(adapter.flat.size)
    state.v[:] = 1
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf")
    assert read.adapter.shapes == adapter.shapes
    assert (read.ranks["token_embd"], read.ranks["output"]) == (0, 2)


def test_a_state_keeps_no_hold_on_its_file(rng, tmp_path):
    adapter, state = small(rng)
    path = tmp_path / "x.gguf"
    write_checkpoint(path, state, adapter, Sizes(), 32)
    read = read_checkpoint(path)
    path.write_bytes(b"")  # in place: a view of the map would fault now
    assert np.array_equal(read.state.m, state.m)
    assert np.array_equal(read.adapter.flat, adapter.flat)


# Files that do not fit


def rewritten(source, target, *, keys=None, tensors=None, drop=()):
    """Copy a checkpoint with other values of some keys, other tensors, or without some."""
    keys, tensors = dict(keys or {}), dict(tensors or {})
    with read_gguf(source) as file:
        listed = [
            (key, *keys.pop(key, (file.value_types[key], value)))
            for key, value in file.metadata.items()
            if key not in drop
        ]
        held = [
            (name, *tensors.pop(name, (info.dtype, info.shape, file.data(name))))
            for name, info in file.tensors.items()
            if name not in drop
        ]
        assert not keys
        write_gguf(target, listed, held + [(name, *tensor) for name, tensor in tensors.items()])
    return target


U32, U64, TEXT = ValueType.U32, ValueType.U64, ValueType.STRING
FLOATS = np.zeros(17220, dtype=np.float32)

BAD = {
    "another training": ({"training.type": (TEXT, "train_model")}, {}, "training.type is 'train_m"),
    "architecture": ({"general.architecture": (TEXT, "gpt2")}, {}, "'gpt2', not 'llama'"),
    "lbfgs": ({"optimizer.type": (TEXT, "lbfgs")}, {}, "optimizer.type is 'lbfgs'"),
    "version": ({"training.file_version": (U32, 2)}, {}, "training.file_version is 2"),
    "optimizer": ({"optimizer.file_version": (U32, 1)}, {}, "optimizer.file_version is 1"),
    "rank": (
        {"training.lora.rank.attn_q": (U32, 5)},
        {},
        r"tensor blk.0.attn_q.weight has rank 4, training.lora.rank.attn_q is 5",
    ),
    "layers": ({"llama.block_count": (U32, 1)}, {}, "blk.1.* beyond llama.block_count 1"),
    "parameters": (
        {"optimizer.parameter_count": (U64, 17220)},
        {},
        "optimizer.parameter_count is 17220, the tensors hold 17221",
    ),
    "moments": (
        {},
        {"optimizer.adam.first_moments": (F32, (17220,), FLOATS)},
        "first_moments has 17220 elements, optimizer.parameter_count is 17221",
    ),
    "type": (
        {},
        {"output.weight.lora_a": (F16, (64, 4), np.zeros(256, np.float16))},
        "tensor output.weight.lora_a is F16",
    ),
    "factors": (
        {},
        {"output.weight.lora_a": (F32, (64, 3), np.zeros(192, np.float32))},
        "tensor output.weight: lora_a has rank 3, lora_b 4",
    ),
    "dimensions": (
        {},
        {"output.weight.lora_a": (F32, (2, 32, 4), np.zeros(256, np.float32))},
        "output.weight.lora_a has 3 dimensions",
    ),
    "strange tensor": (
        {},
        {"rope_freqs.weight.lora_a": (F32, (1,), np.zeros(1, np.float32))},
        "rope_freqs.weight.lora_a: no tensor of that name",
    ),
    "past": (
        {"optimizer.convergence_past_count": (U32, 2)},
        {},
        "past_loss_values is missing",
    ),
    "past length": (
        {"optimizer.convergence_past_count": (U32, 2)},
        {"optimizer.adam.past_loss_values": (F32, (3,), np.zeros(3, np.float32))},
        "past_loss_values has 3 elements, optimizer.convergence_past_count is 2",
    ),
    "position": (
        {"training.shuffle.next_sample": (U64, 16624)},
        {},
        "next_sample is 16624, there are 16624 samples",
    ),
    "generator": ({"training.shuffle.rng_state": (TEXT, "1 2")}, {}, "rng_state: .* 2 numbers"),
    "iteration": (
        {"optimizer.iteration_count": (ValueType.I32, -1)},
        {},
        "optimizer.iteration_count is -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_contradicts_itself_is_refused_by_name(data_dir, tmp_path, case):
    keys, tensors, problem = BAD[case]
    path = rewritten(data_dir / "a-chk-10.gguf", tmp_path / "bad.gguf", keys=keys, tensors=tensors)
    with pytest.raises(FormatError, match=f"bad.gguf: .*{problem}") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_whatever_is_missing_is_named(data_dir, tmp_path):
    optional = {"general.file_type", "llama.rope.dimension_count", "llama.rope.freq_base"}
    optional |= {"llama.attention.layer_norm_rms_epsilon", "llama.rope.scale_linear"}
    with read_gguf(data_dir / "a-chk-10.gguf") as file:
        things = [*(set(file.metadata) - optional), *file.tensors]
    for thing in things:
        path = rewritten(data_dir / "a-chk-10.gguf", tmp_path / "bad.gguf", drop=[thing])
        with pytest.raises(EngineError, match=f"bad.gguf: .*{thing}"):
            read_checkpoint(path)


def test_a_model_of_other_sizes_is_refused_by_key_with_both_values(data_dir):
    read = read_checkpoint(data_dir / "a-chk-10.gguf")
    read.check_model(Sizes())
    for key, other in {
        "llama.embedding_length is 64, the model's is 32": Sizes(n_embd=32),
        "llama.feed_forward_length is 192, the model's is 1": Sizes(n_ff=1),
        "llama.attention.head_count is 4, the model's is 8": Sizes(n_head=8),
        "llama.attention.head_count_kv is 4, the model's is 2": Sizes(n_head_kv=2),
        "llama.block_count is 2, the model's is 3": Sizes(n_layer=3),
    }.items():
        with pytest.raises(ShapeError, match=rf"a-chk-10\.gguf: {key}"):
            read.check_model(other)
    with pytest.raises(ShapeError, match=r"a-chk-10\.gguf: tensor token_embd: .*64 × 768.*64 × 9"):
        check_fits(read.adapter, [("token_embd", 64, 9, 4)])


def test_other_ranks_are_refused_by_tensor_with_both_values_and_the_remedy(data_dir):
    read = read_checkpoint(data_dir / "a-chk-10.gguf")
    read.check_ranks({})
    read.check_ranks(read.ranks)
    with pytest.raises(ShapeError, match=r"blk\.0\.attn_v has rank 4, 6 .*--checkpoint-in"):
        read.check_ranks({"attn_q": 4, "attn_v": 6})
    with pytest.raises(ShapeError, match="output_norm has rank 1, 0 "):
        read.check_ranks({"output_norm": 0})


def test_a_rank_for_a_tensor_the_checkpoint_lacks_is_refused(rng, tmp_path):
    adapter = Adapter(small_shapes()[2:], 4, 4)
    state = TrainingState.fresh(adapter.flat.size)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf")
    read.check_ranks({"token_embd": 0})
    with pytest.raises(ShapeError, match="token_embd has rank 0, 4 "):
        read.check_ranks({"token_embd": 4})


def test_another_window_of_losses_is_refused_with_both_values(rng, tmp_path):
    adapter, state = small(rng, n_past=3)
    write_checkpoint(tmp_path / "x.gguf", state, adapter, Sizes(), 32)
    read = read_checkpoint(tmp_path / "x.gguf")
    read.check_opt_past(3)
    with pytest.raises(ShapeError, match="past_count is 3, --opt-past is 0"):
        read.check_opt_past(0)


def test_version_0_has_three_short_counters_and_no_shuffle(data_dir, tmp_path):
    with read_gguf(data_dir / "a-chk-10.gguf") as file:
        newer = [key for key in file.metadata if key.startswith("training.shuffle.")]
    old = {
        "training.file_version": (U32, 0),
        "training.iteration_count": (U32, 10),
        "training.sample_count": (U32, 40),
        "training.token_count": (U32, 1280),
    }
    drop = [*newer, "training.epoch_count"]
    path = rewritten(data_dir / "a-chk-10.gguf", tmp_path / "old.gguf", keys=old, drop=drop)
    state = read_checkpoint(path).state
    assert (state.iterations, state.samples, state.tokens, state.epochs) == (10, 40, 1280, 0)
    assert state.shuffle == ShuffleState()


@pytest.mark.parametrize("length", [0, 3, 24, 1000, 20000, 218000])
def test_a_checkpoint_cut_off_is_refused_by_name(data_dir, tmp_path, length):
    (tmp_path / "cut.gguf").write_bytes((data_dir / "a-chk-10.gguf").read_bytes()[:length])
    with pytest.raises(EngineError, match=r"cut\.gguf"):
        read_checkpoint(tmp_path / "cut.gguf")
