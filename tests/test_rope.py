"""Rotation tables against the formulas written out pair by pair, and what overrides what."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine import gguf
from engine.errors import FormatError, ShapeError
from engine.gguf import ValueType, write_gguf
from engine.llama import read_hyperparameters
from engine.rope import Rope, RopeOptions

N_ROT, POSITIONS = 64, np.array([0, 1, 2, 77, 1000, 8191])


def plain_angle(rope: Rope, pair: int, position: int, factor: float = 1.0) -> tuple[float, float]:
    """Angle and magnitude of one pair, a formula at a time."""
    kept = position * rope.freq_base ** (-2 * pair / rope.n_rot) / factor
    scale = 1.0 if rope.scaling == "none" else rope.freq_scale
    stretched = scale * kept
    mix = rope.ext_factor
    if mix is None:
        mix = 1.0 if rope.scaling == "yarn" else 0.0
    if mix == 0:
        return stretched, rope.attn_factor

    def dimension(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return rope.n_rot * math.log(ratio) / (2 * math.log(rope.freq_base))

    low = max(0, math.floor(dimension(rope.beta_fast)))
    high = min(rope.n_rot - 1, math.ceil(dimension(rope.beta_slow)))
    place = (pair - low) / max(0.001, high - low)
    keep = (1 - min(1, max(0, place))) * mix
    angle = stretched * (1 - keep) + kept * keep
    return angle, rope.attn_factor * (1 + 0.1 * math.log(1 / scale))


CASES = {
    "none": Rope(N_ROT, scaling="none", freq_scale=0.25),
    "linear": Rope(N_ROT, freq_scale=0.25),
    "another base": Rope(N_ROT, freq_base=500000.0),
    "yarn": Rope(N_ROT, scaling="yarn", freq_scale=1 / 8, original_context=2048),
    "yarn, all of it": Rope(
        N_ROT, 100000.0, "yarn", 1 / 4, 512, 0.7, 1.3, beta_fast=24.0, beta_slow=2.0
    ),
    "yarn without stretching": Rope(N_ROT, scaling="yarn"),
    "yarn that shrinks": Rope(N_ROT, scaling="yarn", freq_scale=2.0),
    "a mixture without yarn": Rope(N_ROT, freq_scale=0.5, ext_factor=0.5, original_context=4096),
    "a ramp without width": Rope(
        N_ROT, scaling="yarn", freq_scale=0.5, beta_fast=1e-9, beta_slow=1e9
    ),
}


@pytest.mark.parametrize("rope", CASES.values(), ids=CASES)
@pytest.mark.parametrize("with_factors", [False, True])
def test_tables_are_the_formulas(rope: Rope, with_factors: bool) -> None:
    factors = np.linspace(1, 8, N_ROT // 2, dtype=np.float32) if with_factors else None
    cos, sin = rope.tables(POSITIONS, factors)
    for row, position in enumerate(POSITIONS):
        for pair in range(N_ROT // 2):
            divisor = 1.0 if factors is None else float(factors[pair])
            angle, magnitude = plain_angle(rope, pair, int(position), divisor)
            want = magnitude * math.cos(angle), magnitude * math.sin(angle)
            assert abs(cos[row, 2 * pair] - want[0]) < 1e-6
            assert abs(sin[row, 2 * pair + 1] - want[1]) < 1e-6
            assert cos[row, 2 * pair] == cos[row, 2 * pair + 1]
            assert sin[row, 2 * pair] == -sin[row, 2 * pair + 1]


@pytest.mark.parametrize("rope", CASES.values(), ids=CASES)
def test_a_unit_rotation_back_undoes_the_way_there(rope: Rope) -> None:
    """Keys that move down are turned by the same angles, without the magnitude once more."""
    cos, sin = rope.tables([9], unit=True)
    np.testing.assert_allclose(np.hypot(cos, sin), 1, rtol=1e-6)
    there, back = rope.tables([12]), rope.tables([3])
    turned = there[0] * cos + there[1] * sin
    np.testing.assert_allclose(turned, back[0], atol=2e-6)


def test_what_the_user_says_replaces_the_file() -> None:
    file = Rope(N_ROT, 10000.0, "yarn", 1 / 8, 2048, attn_factor=1.5)
    assert file.overridden(RopeOptions()) == file
    said = RopeOptions("linear", 20000.0, 0.5, 100, 0.3, 2.0, 16.0, 3.0)
    assert file.overridden(said) == Rope(
        N_ROT, 20000.0, "linear", 0.5, 100, 0.3, attn_factor=3.0, beta_fast=16.0, beta_slow=3.0
    )


def test_no_scaling_is_a_scale_of_one() -> None:
    file = Rope(N_ROT, freq_scale=1 / 8)
    assert file.overridden(RopeOptions(scaling="none")).scale == 1
    assert file.overridden(RopeOptions(scaling="none", freq_scale=0.5)).scale == 1


def test_a_scale_that_was_asked_for_is_used_though_the_file_says_none() -> None:
    rope = Rope(N_ROT, scaling="none").overridden(RopeOptions(freq_scale=0.5))
    assert (rope.scaling, rope.scale) == ("linear", 0.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"freq_base": 0.0},
        {"freq_base": math.inf},
        {"freq_scale": 0.0},
        {"freq_scale": math.nan},
        {"attn_factor": math.inf},
        {"freq_base": 1.0, "scaling": "yarn"},
        {"original_context": 0},
        {"beta_slow": 0.0},
        {"beta_fast": -1.0},
    ],
    ids=str,
)
def test_what_has_no_angles_is_refused(wrong: dict) -> None:
    with pytest.raises(ShapeError):
        Rope(N_ROT, **wrong)


def with_keys(data_dir: Path, path: Path, **more: tuple) -> gguf.GGUFFile:
    """The small model with other keys under llama.rope."""
    file = gguf.read_gguf(data_dir / "mini-f32.gguf")
    metadata = {k: (file.value_types[k], v) for k, v in file.metadata.items()}
    metadata |= {f"llama.rope.{name.replace('__', '.')}": value for name, value in more.items()}
    keys = [(name, *value) for name, value in metadata.items()]
    write_gguf(path, keys, [])
    return gguf.read_gguf(path)


def test_the_keys_of_a_file_are_read(data_dir: Path, tmp_path: Path) -> None:
    file = with_keys(
        data_dir,
        tmp_path / "m.gguf",
        freq_base=(ValueType.F32, 500.0),
        scaling__type=(ValueType.STRING, "yarn"),
        scaling__factor=(ValueType.F32, 4.0),
        scaling__original_context_length=(ValueType.U32, 64),
        scaling__attn_factor=(ValueType.F32, 0.5),
    )
    rope = read_hyperparameters(file, 300).rope
    assert rope == Rope(rope.n_rot, 500.0, "yarn", 0.25, 64, attn_factor=0.5)


def test_the_old_key_of_the_factor_is_read(data_dir: Path, tmp_path: Path) -> None:
    file = with_keys(data_dir, tmp_path / "m.gguf", scale_linear=(ValueType.F32, 2.0))
    rope = read_hyperparameters(file, 300).rope
    assert (rope.scaling, rope.scale, rope.original_context) == ("linear", 0.5, 256)


@pytest.mark.parametrize(
    "more",
    [
        {"scaling__type": (ValueType.STRING, "longrope")},
        {"scaling__factor": (ValueType.F32, -1.0)},
        {"scaling__factor": (ValueType.F64, 1e-320)},
        {"scaling__original_context_length": (ValueType.U32, 0)},
        {"freq_base": (ValueType.F32, 0.0)},
        {"freq_base": (ValueType.F32, 0.5), "scaling__type": (ValueType.STRING, "yarn")},
    ],
    ids=str,
)
def test_keys_that_cannot_be_used_name_the_file(data_dir: Path, tmp_path: Path, more: dict) -> None:
    file = with_keys(data_dir, tmp_path / "m.gguf", **more)
    with pytest.raises(FormatError, match=r"m\.gguf"):
        read_hyperparameters(file, 300)
