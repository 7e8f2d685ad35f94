"""Types of tensors: the recorded choices of the original, and its rules on models of any size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine import dtypes
from engine.dtypes import DType
from engine.errors import FormatError
from engine.file_types import ALIASES, BY_NAME, NOT_OFFERED, TARGETS, UNIFORM, find_target, is_known
from engine.gguf import TensorInfo
from engine.mixture import Choice, Sizes, Wish, choose_types, is_matrix

ROWS = {"ffn_down": 512}  # elements of a row; 256 elsewhere


def model(
    n_layer: int, *, output: bool = True, row: int = 256, dtype: DType = dtypes.F32
) -> list[TensorInfo]:
    """Tensors of a llama model in the order of its converters."""
    layer = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"]
    layer += ["ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    names = ["token_embd", *(f"blk.{i}.{name}" for i in range(n_layer) for name in layer)]
    names += ["output_norm", *["output"] * output]
    infos = []
    for name in names:
        is_norm = name.endswith("norm")
        n = ROWS.get(name.split(".")[-1], 256) * row // 256
        shape = (n,) if is_norm else (128, n)
        infos.append(TensorInfo(f"{name}.weight", shape, dtypes.F32 if is_norm else dtype, 0, 0))
    return infos


def types(target: str, n_layer: int, sizes: Sizes | None = None, **wish: object) -> dict[str, str]:
    """Chosen types by tensor, without the ending of its name."""
    made = Wish(BY_NAME[target], **wish)  # type: ignore[arg-type]
    chosen = choose_types(model(n_layer), sizes or Sizes(n_layer, 4, 2), made)
    return {name.removesuffix(".weight"): choice.dtype.name for name, choice in chosen.items()}


def of_layers(chosen: dict[str, str], kind: str) -> list[str]:
    return [dtype for name, dtype in chosen.items() if name.endswith("." + kind)]


def test_the_choices_are_the_recorded_ones(data_dir: Path) -> None:
    recorded = json.loads((data_dir / "quantize.json").read_text())["quantize"]
    assert set(recorded) == {t.name for t in TARGETS} - {"Q2_K_S", "F32", "COPY"}
    for target, record in recorded.items():
        expected = {name: kind for name, (kind, _) in record["tensors"].items()}
        chosen = {f"{name}.weight": kind for name, kind in types(target, 1).items()}
        assert chosen == expected
        assert BY_NAME[target].file_type == record["file_type"]


def test_some_layers_of_the_middle_sized_mixtures_get_more_bits() -> None:
    for target, main in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")):
        chosen = types(target, 24)
        more = [*range(3), 5, 8, 11, 14, 17, 20, 21, 22, 23]
        expected = ["Q6_K" if i in more else main for i in range(24)]
        assert of_layers(chosen, "attn_v") == expected
        assert of_layers(chosen, "ffn_down") == expected
        assert set(of_layers(chosen, "attn_output")) == {main}


def test_the_first_layers_of_other_mixtures_get_more_bits() -> None:
    chosen = types("Q3_K_M", 32)
    assert of_layers(chosen, "attn_v") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert of_layers(chosen, "ffn_down") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    chosen = types("Q4_K_S", 32)
    assert of_layers(chosen, "attn_v") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert of_layers(chosen, "ffn_down") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    chosen = types("IQ4_XS", 16)
    assert of_layers(chosen, "ffn_down") == ["Q5_K"] * 2 + ["IQ4_XS"] * 14
    assert set(of_layers(types("IQ4_XS", 16, important=True), "ffn_down")) == {"IQ4_XS"}
    chosen = types("Q4_0", 16, important=True)
    assert of_layers(chosen, "ffn_down") == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert set(of_layers(types("Q4_0", 16), "ffn_down")) == {"Q4_0"}


def test_values_that_many_heads_share_get_more_bits() -> None:
    shared, own = Sizes(8, 32, 8), Sizes(8, 32, 16)
    for target, more, fewer in (
        ("Q2_K", "Q4_K", "Q3_K"),
        ("Q2_K_S", "Q4_K", "Q2_K"),
        ("IQ4_NL", "Q5_K", "IQ4_NL"),
    ):
        assert set(of_layers(types(target, 8, shared), "attn_v")) == {more}
        assert set(of_layers(types(target, 8, own), "attn_v")) == {fewer}
    # The 70B model alone: 80 layers with grouped heads.
    assert of_layers(types("Q4_K_M", 80, Sizes(80, 64, 8)), "attn_v")[31] == "Q5_K"
    assert of_layers(types("Q4_K_M", 80, Sizes(80, 64, 64)), "attn_v")[31] == "Q4_K"


def test_a_shared_embedding_is_stored_as_an_output() -> None:
    infos = model(1, output=False)
    for target, expected in (("Q4_K_M", "Q6_K"), ("Q8_0", "Q8_0"), ("F16", "F16")):
        chosen = choose_types(infos, Sizes(1, 4, 2), Wish(BY_NAME[target]))
        assert chosen["token_embd.weight"].dtype.name == expected


def test_rows_that_large_blocks_do_not_fill_get_small_ones() -> None:
    infos = model(1, row=64)
    expected = {"Q2_K": "IQ4_NL", "Q3_K_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K_M": "Q5_0"}
    expected |= {"Q5_K_S": "Q5_1", "Q6_K": "Q8_0"}
    for target, kind in expected.items():
        chosen = choose_types(infos, Sizes(1, 4, 2), Wish(BY_NAME[target]))
        assert chosen["blk.0.attn_q.weight"] == Choice(dtypes.__dict__[kind], BY_NAME[target].dtype)
        assert chosen["output.weight"].dtype is dtypes.Q8_0


def test_rows_that_no_block_fills_are_refused() -> None:
    infos = model(1, row=48)
    with pytest.raises(
        FormatError, match=r"token_embd\.weight: rows of 48 are not whole Q4_0 blocks"
    ):
        choose_types(infos, Sizes(1, 4, 2), Wish(BY_NAME["Q4_0"]))
    with pytest.raises(FormatError, match="rows of 48 are not whole Q5_0 blocks of 32"):
        choose_types(infos, Sizes(1, 4, 2), Wish(BY_NAME["Q4_K_S"]))
    assert choose_types(infos, Sizes(1, 4, 2), Wish(BY_NAME["BF16"]))


def test_wishes_go_before_the_mixture() -> None:
    assert set(types("Q4_K_M", 2, pure=True).values()) == {"Q4_K", "F32"}
    assert types("Q4_K_M", 2, leave_output=True)["output"] == "F32"
    chosen = types("Q4_0", 2, output_type=dtypes.Q8_0, embedding_type=dtypes.F16)
    assert (chosen["output"], chosen["token_embd"]) == ("Q8_0", "F16")
    chosen = types("F16", 2, pure=True, output_type=dtypes.Q5_1)
    assert (chosen["output"], chosen["token_embd"]) == ("Q5_1", "F16")
    # A shared embedding is the output as well; its own wish is the stronger one.
    wish = Wish(BY_NAME["Q4_0"], output_type=dtypes.F16)
    infos = model(1, output=False)
    assert choose_types(infos, Sizes(1, 4, 2), wish)["token_embd.weight"].dtype is dtypes.F16
    wish = replace(wish, embedding_type=dtypes.Q5_0)
    assert choose_types(infos, Sizes(1, 4, 2), wish)["token_embd.weight"].dtype is dtypes.Q5_0
    assert set(types("COPY", 2).values()) == {"F32"}


def test_vectors_and_what_is_small_stay() -> None:
    def info(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, shape, dtypes.F32, 0, 0)

    assert is_matrix(info("blk.0.attn_q.weight", 4, 256))
    assert not is_matrix(info("blk.0.attn_q.bias", 4, 256))
    assert not is_matrix(info("blk.0.attn_norm.weight", 4, 256))
    assert not is_matrix(info("rope_freqs.weight", 1, 256))
    assert not is_matrix(info("position_embd.weight", 4, 256))


def test_a_target_is_found_by_name_alias_and_number() -> None:
    assert find_target("q4_k") is find_target("15") is BY_NAME["Q4_K_M"]
    assert find_target("bf16") is find_target("32") is BY_NAME["BF16"]
    assert find_target("0") is BY_NAME["F32"]
    for nothing in ("", "7b", "Q9", "-1", "1024", "٣"):
        assert find_target(nothing) is None
        assert not is_known(nothing)
    for name, number in NOT_OFFERED.items():
        assert find_target(name) is find_target(str(number)) is None
        assert is_known(name)
        assert is_known(str(number))
    assert set(ALIASES.values()) <= set(BY_NAME)
    assert set(UNIFORM) == set(dtypes.BY_ID.values())
    assert all(find_target(str(number)).dtype is dtype for dtype, number in UNIFORM.items())
