"""Adapters in GGUF files and PEFT folders: what others wrote, round trips, and files that lie."""

from __future__ import annotations

import json
import shutil
import struct

import numpy as np
import pytest

from engine.dtypes import F16, F32
from engine.errors import EngineError, FormatError
from engine.gguf import ValueType, read_gguf, write_gguf
from engine.lora import (
    KINDS,
    Adapter,
    BaseInfo,
    create_adapter,
    form_of_path,
    peft_form,
    read_adapter,
    refusals,
    write_adapter,
)
from engine.model import Context, Model
from engine.safetensors import read_safetensors, write_safetensors

BASE = BaseInfo(n_head=4, n_head_kv=2, head_dim=4, n_layer=2, tied=False, name="toy")
N_EMBD, N_VOCAB, N_FF = 12, 10, 20
SIZES = {
    "token_embd": (N_EMBD, N_VOCAB),
    "output": (N_EMBD, N_VOCAB),
    "attn_q": (N_EMBD, 16),
    "attn_k": (N_EMBD, 8),
    "attn_v": (N_EMBD, 8),
    "attn_output": (16, N_EMBD),
    "ffn_gate": (N_EMBD, N_FF),
    "ffn_down": (N_FF, N_EMBD),
    "ffn_up": (N_EMBD, N_FF),
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = [1, 5, 100, 200, 300, 17, 44]
FORM_NAMES = ["x.bin", "x.gguf", "folder/", "x.safetensors"]


def toy_shapes(rank=lambda name: 3, kinds=tuple(SIZES)):
    names = [kind for kind in ("token_embd", "output") if kind in kinds]
    layered = [kind for kind in KINDS if kind in kinds and kind not in names]
    names += [f"blk.{layer}.{kind}" for layer in range(BASE.n_layer) for kind in layered]
    return [(name, *SIZES[name.rpartition(".")[2]], rank(name)) for name in names]


def filled(rng, shapes=None, r=3, alpha=6.0, rslora=False):
    adapter = Adapter(shapes or toy_shapes(), r, alpha, rslora=rslora)
    adapter.flat[:] = rng.standard_normal(adapter.flat.size)
    return adapter


def deltas(adapter):
    """What the adapter adds to each weight, in float64."""
    return {
        pair.name: adapter.scale * pair.b.astype(float).T @ pair.a.astype(float)
        for pair in adapter.pairs.values()
    }


def assert_same_effect(got, expected):
    a, b = deltas(got), deltas(expected)
    assert list(a) == list(b)
    for name in a:
        # Folding rounds B once or twice, each time by half an ulp.
        bound = expected.pairs[name].rank * 2**-23 * np.abs(b[name]).max()
        assert np.abs(a[name] - b[name]).max() <= 4 * bound, name


def logits(model, *adapters):
    pairs = [(adapter, 1.0) for adapter in adapters]
    context = Context(model, 64, n_threads=1, adapters=pairs, cache_types=(F32, F32))
    return context.evaluate(TOKENS).copy()


# ---------------------------------------------------------------- what others wrote


@pytest.mark.parametrize("name", ["", WEIGHTS, "converted.gguf"])
def test_an_adapter_of_peft_and_its_conversion_give_the_recorded_logits(data_dir, name):
    """Saved by peft 0.21.2, converted by llama.cpp's script, evaluated by transformers."""
    model = Model.load(data_dir / "mini-gqa-f32.gguf")
    adapter = read_adapter(data_dir / "peft" / name, BaseInfo.of(model))
    assert (adapter.r, adapter.alpha, len(adapter.pairs), adapter.unused) == (2, 3, 16, [])
    expected = np.load(data_dir / "peft" / "logits.npy")
    assert np.abs(logits(model) - expected).max() > 1
    assert np.abs(logits(model, adapter) - expected).max() < 1e-4


def test_the_two_recorded_forms_hold_the_same_numbers_in_the_same_order(data_dir):
    base = BaseInfo(4, 2, 16, 2, False)
    peft, gguf = (read_adapter(data_dir / "peft" / n, base) for n in (WEIGHTS, "converted.gguf"))
    assert peft.shapes == gguf.shapes
    assert np.array_equal(peft.flat, gguf.flat)


@pytest.mark.parametrize("name", FORM_NAMES)
def test_a_recorded_adapter_survives_every_form(data_dir, tmp_path, name):
    base = BaseInfo(4, 2, 16, 2, False)
    adapter = read_adapter(data_dir / "peft", base)
    write_adapter(adapter, f"{tmp_path}/{name}", base)
    again = read_adapter(f"{tmp_path}/{name}", base)
    assert (again.r, again.alpha, again.shapes) == (2, 3, adapter.shapes)
    assert np.array_equal(again.flat, adapter.flat)


# ---------------------------------------------------------------- round trips


MIXED = {
    "one rank": lambda name: 3,
    "ranks by kind": lambda name: {"attn_q": 5, "ffn_down": 1, "token_embd": 2}.get(
        name.rpartition(".")[2], 3
    ),
    "ranks by layer": lambda name: 2 if name.startswith("blk.1") else 3,
    "nowhere r": lambda name: 4,
    "some layers": lambda name: 0 if name == "blk.0.attn_k" or name.startswith("blk.1") else 3,
}


@pytest.mark.parametrize("name", FORM_NAMES)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", MIXED)
def test_an_adapter_has_the_same_effect_after_a_round_trip(rng, tmp_path, name, rslora, ranks):
    adapter = filled(rng, toy_shapes(MIXED[ranks]), rslora=rslora)
    write_adapter(adapter, f"{tmp_path}/{name}", BASE)
    again = read_adapter(f"{tmp_path}/{name}", BASE)
    assert again.shapes == adapter.shapes
    assert_same_effect(again, adapter)


def test_the_peft_form_keeps_every_bit_even_of_mixed_ranks_and_rslora(rng, tmp_path):
    adapter = filled(rng, toy_shapes(MIXED["ranks by kind"]), alpha=1.7, rslora=True)
    write_adapter(adapter, tmp_path, BASE)
    again = read_adapter(tmp_path, BASE)
    assert (again.r, again.alpha, again.rslora) == (3, 1.7, True)
    assert np.array_equal(again.flat, adapter.flat)


def test_the_bin_form_takes_the_root_of_r_into_b(rng, tmp_path):
    adapter = filled(rng, r=4, rslora=True)
    adapter.write_bin(tmp_path / "x.bin")
    again = read_adapter(tmp_path / "x.bin")
    assert (again.r, again.alpha, again.rslora) == (4, 6, False)
    for name, pair in again.pairs.items():
        assert np.array_equal(pair.a, adapter.pairs[name].a)
        assert np.array_equal(pair.b, 2 * adapter.pairs[name].b)


def test_the_scale_of_a_rank_stabilized_adapter_divides_by_the_root():
    assert Adapter([], 16, 8, rslora=True).scale == 2
    assert create_adapter([], 16, 8, 1, rslora=True).scale == 2
    assert create_adapter([], 16, 8, 1).scale == 0.5


# ---------------------------------------------------------------- layouts


def test_the_gguf_form_has_the_keys_and_layout_that_llama_cpp_loads(rng, tmp_path):
    shapes = [("token_embd", 6, 10, 2), ("blk.0.attn_q", 6, 16, 3)]
    adapter = filled(rng, shapes, r=2, alpha=5)
    write_adapter(adapter, tmp_path / "x.gguf", BASE)
    with read_gguf(tmp_path / "x.gguf") as file:
        assert dict(file.metadata) == {
            "general.architecture": "llama",
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 5.0,
        }
        assert file.value_types["adapter.lora.alpha"] is ValueType.F32
        tensors = {n: file.data(n).view("<f4").reshape(i.shape) for n, i in file.tensors.items()}
    embedding, query = adapter.pairs["token_embd"], adapter.pairs["blk.0.attn_q"]
    assert list(tensors) == [
        "token_embd.weight.lora_a",
        "token_embd.weight.lora_b",
        "blk.0.attn_q.weight.lora_a",
        "blk.0.attn_q.weight.lora_b",
    ]
    assert np.array_equal(tensors["token_embd.weight.lora_a"], embedding.b.T)
    assert np.array_equal(tensors["token_embd.weight.lora_b"], embedding.a.T)
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_a"], query.a)
    # The reader divides by 3, this adapter by 2.
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_b"], query.b.T * np.float32(1.5))


def test_the_peft_form_has_the_names_layout_and_row_order_of_the_publisher(rng, tmp_path):
    kinds = ("token_embd", "output", "attn_q", "attn_v")
    adapter = filled(rng, toy_shapes(MIXED["ranks by kind"], kinds))
    write_adapter(adapter, tmp_path, BASE)
    tensors = read_safetensors(tmp_path / WEIGHTS)
    stem = "base_model.model."
    layer = f"{stem}model.layers.1.self_attn."
    pairs = adapter.pairs
    for name, expected in {
        f"{stem}model.embed_tokens.lora_embedding_A": pairs["token_embd"].b,
        f"{stem}model.embed_tokens.lora_embedding_B": pairs["token_embd"].a.T,
        f"{stem}lm_head.lora_A.weight": pairs["output"].a,
        f"{stem}lm_head.lora_B.weight": pairs["output"].b.T,
        f"{layer}v_proj.lora_B.weight": pairs["blk.1.attn_v"].b.T,
        f"{layer}q_proj.lora_A.weight": pairs["blk.1.attn_q"].a,
    }.items():
        assert np.array_equal(tensors[name], expected), name
    b = pairs["blk.1.attn_q"].b.T
    rows = [head + row for head in range(0, 16, 4) for row in (0, 2, 1, 3)]
    assert np.array_equal(tensors[f"{layer}q_proj.lora_B.weight"], b[rows])
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["embed_tokens", "lm_head", "q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["base_model_name_or_path"] == "toy"
    assert config["rank_pattern"] == {"embed_tokens": 2, "q_proj": 5}
    assert config["alpha_pattern"] == {"embed_tokens": 4, "q_proj": 10}


def test_rows_keep_their_places_in_architectures_without_pairs_of_neighbours(rng, tmp_path):
    base = BaseInfo(4, 2, 4, 2, False, architecture="other")
    adapter = filled(rng)
    write_adapter(adapter, tmp_path, base)
    b = read_safetensors(tmp_path / WEIGHTS)[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    ]
    assert np.array_equal(b, adapter.pairs["blk.0.attn_q"].b.T)


def test_an_adapter_of_some_layers_names_them_in_full(rng, tmp_path):
    write_adapter(filled(rng, toy_shapes(MIXED["some layers"])), tmp_path, BASE)
    modules = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert "layers.0.self_attn.q_proj" in modules
    assert not {"q_proj", "layers.1.self_attn.q_proj"} & set(modules)


def test_half_precision_and_bfloat16_factors_are_read(tmp_path):
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    keys = [
        ("general.architecture", ValueType.STRING, "llama"),
        ("general.type", ValueType.STRING, "adapter"),
        ("adapter.type", ValueType.STRING, "lora"),
        ("adapter.lora.alpha", ValueType.F32, 0.0),
    ]
    tensors = [
        ("output.weight.lora_a", F16, (2, 3), a.astype("<f2")),
        ("output.weight.lora_b", F16, (1, 2), np.ones((1, 2), "<f2")),
    ]
    write_gguf(tmp_path / "x.gguf", keys, tensors)
    adapter = read_adapter(tmp_path / "x.gguf")
    assert np.array_equal(adapter.pairs["output"].a, a)
    assert adapter.scale == 1  # an alpha of 0 says so
    halves = (a.view(np.uint32) >> 16).astype("<u2")
    content = safetensors_file({"x": ("BF16", halves), "y": ("F16", a.astype("<f2"))})
    (tmp_path / "x.safetensors").write_bytes(content)
    tensors = read_safetensors(tmp_path / "x.safetensors")
    assert np.array_equal(tensors["x"], a)
    assert np.array_equal(tensors["y"], a)


def test_whole_tensors_that_cannot_be_applied_are_listed(data_dir, rng, tmp_path):
    adapter = filled(rng)
    write_adapter(adapter, tmp_path, BASE)
    tensors = list(read_safetensors(tmp_path / WEIGHTS).items())
    whole = "base_model.model.model.embed_tokens.base_layer.weight"
    write_safetensors(
        tmp_path / WEIGHTS, [*tensors, (whole, np.ones((10, 12), np.float32))], {"format": "pt"}
    )
    again = read_adapter(tmp_path, BASE)
    assert again.unused == [whole]
    assert np.array_equal(again.flat, adapter.flat)


# ---------------------------------------------------------------- which form, and what it holds


def test_the_form_follows_from_the_ending_of_the_name(tmp_path):
    endings = {
        "x.bin": "bin",
        "x": "bin",
        "ggml-lora-LATEST-f32.gguf": "gguf",
        "x.safetensors": "peft",
        "folder/": "peft",
        str(tmp_path): "peft",
    }
    assert {name: form_of_path(name) for name in endings} == endings


def test_a_form_asked_for_wins_over_the_ending(rng, tmp_path):
    write_adapter(filled(rng), tmp_path / "x.gguf", form="bin")
    assert (tmp_path / "x.gguf").read_bytes()[:4] == b"algg"


def with_norms():
    norms = [("output_norm", N_EMBD, 1, 1), ("blk.0.attn_norm", N_EMBD, 1, 1)]
    return [*norms, ("blk.0.ffn_norm", N_EMBD, 1, 0), ("blk.0.attn_v", N_EMBD, 8, 2)]


@pytest.mark.parametrize("form", ["gguf", "peft"])
def test_norms_are_refused_with_the_options_that_leave_them_out(form):
    (line,) = refusals(with_norms(), form, BASE)
    assert line.endswith("norms (output_norm, attn_norm); add --rank-out-norm 0 --rank-att-norm 0")
    assert refusals(with_norms(), "bin", None) == []


def test_a_tied_embedding_is_refused_in_gguf_alone():
    tied = BaseInfo(4, 2, 4, 2, True)
    (line,) = refusals(toy_shapes(), "gguf", tied)
    assert line.endswith("add --rank-tok-embd 0 --rank-out 0")
    (line,) = refusals(toy_shapes(kinds=("output",)), "gguf", tied)
    assert line.endswith("one tensor; add --rank-out 0")
    assert refusals(toy_shapes(kinds=("attn_q",)), "gguf", tied) == []
    assert refusals(toy_shapes(), "gguf", BASE) == []
    assert refusals(toy_shapes(), "peft", tied) == []


def test_an_alpha_that_a_form_cannot_say_is_refused():
    shapes = toy_shapes()
    assert "alpha 1.5 is not a whole number" in refusals(shapes, "bin", None, 1.5)[0]
    assert refusals(shapes, "bin", None, float("nan"))
    assert "alpha 0 means" in refusals(shapes, "gguf", BASE, 0)[0]
    assert "alpha 0 leaves" in refusals(shapes, "peft", BASE, 0)[0]
    assert refusals(shapes, "gguf", BASE, 1.5) == refusals(shapes, "peft", BASE, 1.5) == []


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors", "folder/"])
def test_what_a_form_cannot_hold_is_not_written(tmp_path, name):
    with pytest.raises(FormatError, match=r"cannot hold .* --rank-out-norm 0"):
        write_adapter(Adapter(with_norms(), 2, 2), f"{tmp_path}/{name}", BASE)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(rng, tmp_path):
    with pytest.raises(EngineError, match=r"missing/x: cannot be made: No such file"):
        write_adapter(filled(rng), f"{tmp_path}/missing/x/", BASE)


# ---------------------------------------------------------------- files that lie


def safetensors_file(tensors, header=None, tail=b""):
    """Encode tensors as {name: (type, array)}; `header` changes entries."""
    entries, data = {}, b""
    for name, (dtype, array) in tensors.items():
        begin, data = len(data), data + array.tobytes()
        entries[name] = {
            "dtype": dtype,
            "shape": array.shape,
            "data_offsets": (begin, len(data)),
        }
    for name, change in (header or {}).items():
        entries[name] = {**entries[name], **change} if isinstance(change, dict) else change
    encoded = json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data + tail


STEM = "base_model.model.model.layers.0.self_attn.q_proj."
NAME_A, NAME_B = STEM + "lora_A.weight", STEM + "lora_B.weight"
FACTOR_A, FACTOR_B = np.ones((3, N_EMBD), "<f4"), np.ones((16, 3), "<f4")
FACTORS = {NAME_A: ("F32", FACTOR_A), NAME_B: ("F32", FACTOR_B)}
SOUND_CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "init_lora_weights": True}


def deep(n):
    encoded = b'{"a":' * n
    return struct.pack("<Q", len(encoded)) + encoded


HOSTILE_WEIGHTS = {
    "header longer than the file": (struct.pack("<Q", 2**60) + b"{", "header of 1152921504"),
    "no header": (struct.pack("<Q", 0) + b"{", "header of 0 bytes"),
    "short": (b"\1", "header of 1 bytes"),
    "not JSON": (struct.pack("<Q", 4) + b"{abc", "not sound JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not sound JSON"),
    "deep": (deep(200_000), "not sound JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "no JSON object"),
    "twice": (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "'a' is there twice"),
    "no fields": (safetensors_file(FACTORS, {NAME_A: 7}), "its shape or its place is missing"),
    "negative": (safetensors_file(FACTORS, {NAME_A: {"shape": [-3, -12]}}), "its shape"),
    "fraction": (safetensors_file(FACTORS, {NAME_A: {"shape": [3.0, 12]}}), "its shape"),
    "truth": (safetensors_file(FACTORS, {NAME_A: {"shape": [True, 36]}}), "its shape"),
    "huge": (safetensors_file(FACTORS, {NAME_A: {"shape": [2**62, 2**62]}}), "needs 8507059"),
    "empty": (
        safetensors_file(FACTORS, {NAME_A: {"shape": [0, 12], "data_offsets": [0, 0]}}),
        "needs 0 bytes",
    ),
    "type": (safetensors_file(FACTORS, {NAME_A: {"dtype": "I32"}}), "has type I32"),
    "type's type": (safetensors_file(FACTORS, {NAME_A: {"dtype": ["F32"]}}), "has type"),
    "behind": (safetensors_file(FACTORS, {NAME_B: {"data_offsets": [1000, 1192]}}), "bytes 1000"),
    "overlap": (safetensors_file(FACTORS, {NAME_B: {"data_offsets": [0, 192]}}), "expected from"),
    "gap": (safetensors_file(FACTORS, tail=b"\0"), "1 bytes belong to no tensor"),
    "unprintable": (safetensors_file({"a\n": ("F32", FACTOR_A)}), "unprintable name"),
    "unknown": (safetensors_file(FACTORS | {"x": ("F32", FACTOR_A)}), "tensor x: is no LoRA"),
    "half": (safetensors_file({NAME_A: ("F32", FACTOR_A)}), f"{NAME_B} is missing"),
    "nothing": (safetensors_file({}), "holds no tensors"),
    "ranks": (
        safetensors_file(FACTORS | {NAME_B: ("F32", np.ones((16, 2), "<f4"))}),
        "A has rank 3, B 2, adapter_config.json says 3",
    ),
    "rows": (
        safetensors_file(FACTORS | {NAME_B: ("F32", np.ones((8, 3), "<f4"))}),
        "adapts 8 rows, the model has 4 heads of 4",
    ),
    "vector": (safetensors_file(FACTORS | {NAME_A: ("F32", FACTOR_A[0])}), "1 dimensions"),
    "layer": (
        safetensors_file({NAME_A.replace(".0.", ".2."): ("F32", FACTOR_A)}),
        "made for another model",
    ),
    "magnitudes": (
        safetensors_file(FACTORS | {STEM + "lora_magnitude_vector": ("F32", FACTOR_A[0])}),
        "is no LoRA factor",
    ),
    "NaN": (
        safetensors_file(FACTORS | {NAME_B: ("F32", FACTOR_B * np.float32("nan"))}),
        "blk.0.attn_q: its B holds an infinite or NaN",
    ),
    "F64 too large": (
        safetensors_file(FACTORS | {NAME_A: ("F64", FACTOR_A.astype("<f8") * 1e300)}),
        "blk.0.attn_q: its A holds an infinite or NaN",
    ),
}


def put_peft(folder, weights, config):
    (folder / WEIGHTS).write_bytes(weights)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / CONFIG).write_text(text)


def assert_refused(path, problem):
    with pytest.raises(EngineError) as caught:
        read_adapter(path, BASE)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_safetensors_that_lie_are_refused_in_one_line(tmp_path, case):
    content, problem = HOSTILE_WEIGHTS[case]
    put_peft(tmp_path, content, SOUND_CONFIG)
    assert_refused(tmp_path, problem)


HOSTILE_CONFIGS = {
    "not JSON": ("{", "not sound JSON"),
    "NaN": ('{"r": NaN}', "NaN is no JSON"),
    "another method": ({"peft_type": "IA3"}, 'peft_type "IA3" is not supported'),
    "DoRA": ({"use_dora": True}, "use_dora true is not supported"),
    "number for truth": ({"use_dora": 0}, "use_dora 0 is not supported"),
    "other base": ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" is not supported'),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens [1] is not"),
    "no rank": ({"r": None}, "r is null, expected a rank"),
    "rank 0": ({"r": 0}, "r is 0, expected a rank"),
    "rank of truth": ({"r": True}, "r is true, expected a rank"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0, expected a number"),
    "long alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "infinite alpha": ('{"peft_type":"LORA","r":3,"lora_alpha":1e999}', "lora_alpha is Infinity"),
    "alpha's type": ({"lora_alpha": "6"}, 'lora_alpha is "6", expected'),
    "rslora's type": ({"use_rslora": 1}, "use_rslora 1 is not true or false"),
    "patterns' type": ({"rank_pattern": [3]}, "rank_pattern is no JSON object"),
    "pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern (: is no pattern"),
    "pattern's rank": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern q_proj is -1"),
    "another rank": ({"rank_pattern": {"q_proj": 2}}, "A has rank 3, B 3, adapter_config.json"),
    "repeats": ({"rank_pattern": {"a{2147483647}": 3}}, "a{2147483647}: is no pattern: only"),
    "recursion": ({"rank_pattern": {"(?R)": 3}}, "(?R): is no pattern: only"),
    "long": ({"rank_pattern": {"(" * 5000: 3}}, "is no pattern: only"),
    "slow": (
        {"alpha_pattern": {"(([a-z._0-9]|[a-z])+)+[A-Z]": 1}},
        "a pattern takes too long",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_configuration_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.setattr(peft_form, "_MATCH_SECONDS", 0.01)
    change, problem = HOSTILE_CONFIGS[case]
    config = change if isinstance(change, str) else {**SOUND_CONFIG, **change}
    put_peft(tmp_path, safetensors_file(FACTORS), config)
    assert_refused(tmp_path, problem)


def test_patterns_of_a_configuration_choose_by_the_end_of_a_name(tmp_path):
    config = {**SOUND_CONFIG, "alpha_pattern": {"k_proj": 1, r"layers\.[0-3]\..*q_proj": 12}}
    put_peft(tmp_path, safetensors_file(FACTORS), config)
    adapter = read_adapter(tmp_path, BASE)
    assert (adapter.r, adapter.alpha) == (3, 6)
    assert np.all(adapter.pairs["blk.0.attn_q"].b == 2)


def gguf_keys(**changes):
    keys = {
        "general.architecture": (ValueType.STRING, "llama"),
        "general.type": (ValueType.STRING, "adapter"),
        "adapter.type": (ValueType.STRING, "lora"),
        "adapter.lora.alpha": (ValueType.F32, 6.0),
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return [(name, *value) for name, value in keys.items() if value is not None]


def gguf_tensors(*extra, a=(3, 12), b=(16, 3), name="blk.0.attn_q.weight"):
    shapes = [(f"{name}.lora_a", a), (f"{name}.lora_b", b), *extra]
    return [(n, F32, shape, np.ones(shape, "<f4")) for n, shape in shapes if shape]


HOSTILE_GGUF = {
    "model": (gguf_keys(general__type=None), gguf_tensors(), "this is a model file"),
    "checkpoint": (
        gguf_keys(training__type=(ValueType.STRING, "finetune_lora")),
        gguf_tensors(),
        "this is a checkpoint file, an adapter is needed; write its adapter with",
    ),
    "method": (gguf_keys(adapter__type=(ValueType.STRING, "ia3")), gguf_tensors(), "type is ia3"),
    "no method": (gguf_keys(adapter__type=None), gguf_tensors(), "key adapter.type: is missing"),
    "architecture": (
        gguf_keys(general__architecture=(ValueType.STRING, "gemma")),
        gguf_tensors(),
        "for architecture gemma, the model has llama",
    ),
    "NaN": (
        gguf_keys(adapter__lora__alpha=(ValueType.F32, float("nan"))),
        gguf_tensors(),
        "key adapter.lora.alpha: nan cannot be used",
    ),
    "alpha's type": (
        gguf_keys(adapter__lora__alpha=(ValueType.U32, 6)),
        gguf_tensors(),
        "has type U32, a float is expected",
    ),
    "activated": (
        gguf_keys(adapter__alora__invocation_tokens=((ValueType.ARRAY, ValueType.U32), [1])),
        gguf_tensors(),
        "that begin to act at certain tokens",
    ),
    "suffix": (gguf_keys(), gguf_tensors(("output.weight", (1, 1))), "expected a name that ends"),
    "kind": (gguf_keys(), gguf_tensors(name="blk.0.attn_qkv.weight"), "cannot be adapted"),
    "half": (gguf_keys(), gguf_tensors(b=None), "attn_q.weight.lora_b: is missing"),
    "ranks": (gguf_keys(), gguf_tensors(b=(16, 2)), "tensor blk.0.attn_q: A has rank 3, B 2"),
    "cube": (gguf_keys(), gguf_tensors(a=(3, 2, 6)), "lora_a: has 3 dimensions"),
    "nothing": (gguf_keys(), [], "no tensors"),
    "norms alone": (
        gguf_keys(),
        gguf_tensors(("output_norm.weight", (12,)), a=None, b=None),
        "no tensors that can be applied",
    ),
}


@pytest.mark.parametrize("case", HOSTILE_GGUF)
def test_a_gguf_adapter_that_cannot_be_applied_is_refused(tmp_path, case):
    keys, tensors, problem = HOSTILE_GGUF[case]
    write_gguf(tmp_path / "x.gguf", keys, tensors)
    assert_refused(tmp_path / "x.gguf", problem)


def test_a_whole_norm_in_a_gguf_adapter_is_listed_and_left(tmp_path):
    tensors = gguf_tensors(("output_norm.weight", (12,)))
    write_gguf(tmp_path / "x.gguf", gguf_keys(), tensors)
    adapter = read_adapter(tmp_path / "x.gguf", BASE)
    assert (list(adapter.pairs), adapter.unused) == (["blk.0.attn_q"], ["output_norm.weight"])


def test_folders_and_files_of_no_form_are_refused_by_name(tmp_path):
    assert_refused(tmp_path, f"{tmp_path}: is a folder without adapter_config.json")
    (tmp_path / CONFIG).write_text(json.dumps(SOUND_CONFIG))
    assert_refused(tmp_path, f"has no {WEIGHTS}")
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    assert_refused(tmp_path, "save the adapter with safe_serialization=True")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "x.safetensors").write_bytes(safetensors_file(FACTORS))
    assert_refused(tmp_path / "alone" / "x.safetensors", "adapter_config.json: cannot be read")
    assert_refused("/dev/null", "is not a regular file")


def test_the_peft_form_cannot_be_read_without_knowing_the_heads(data_dir):
    for path in (data_dir / "peft", data_dir / "peft" / WEIGHTS):
        with pytest.raises(FormatError, match="can only be read for a model"):
            read_adapter(path)


@pytest.mark.parametrize("name", ["converted.gguf", WEIGHTS, CONFIG])
def test_bytes_changed_or_cut_off_give_an_adapter_or_one_line(data_dir, rng, tmp_path, name):
    base = BaseInfo(4, 2, 16, 2, False)
    for part in (WEIGHTS, CONFIG, "converted.gguf"):
        shutil.copy(data_dir / "peft" / part, tmp_path / part)
    content = (tmp_path / name).read_bytes()
    path = tmp_path if name == CONFIG else tmp_path / name
    refused = 0
    for trial in range(120):
        changed = bytearray(content)
        if trial % 3 == 0:
            del changed[rng.integers(len(content)) :]
        else:
            for place in rng.integers(0, min(len(content), 5000), 3):
                changed[place] = rng.integers(256)
        (tmp_path / name).write_bytes(changed)
        try:
            adapter = read_adapter(path, base)
        except EngineError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert adapter.flat.nbytes <= 40_000
    assert refused > 10


# ---------------------------------------------------------------- against the packages


def test_the_safetensors_package_and_ours_read_each_other(rng, tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = [(f"t{i}", rng.standard_normal((i + 1, 5)).astype("f4")) for i in range(4)]
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    package.save_file(dict(tensors), tmp_path / "theirs")
    loaded = package.load_file(tmp_path / "ours")
    ours = read_safetensors(tmp_path / "theirs")
    assert sorted(loaded) == sorted(ours) == [name for name, _ in tensors]
    for name, tensor in tensors:
        assert np.array_equal(loaded[name], tensor)
        assert np.array_equal(ours[name], tensor)


def test_the_gguf_package_reads_our_adapter(rng, tmp_path):
    package = pytest.importorskip("gguf")
    adapter = filled(rng)
    write_adapter(adapter, tmp_path / "x.gguf", BASE)
    reader = package.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 6.0
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_a"], adapter.pairs["blk.1.ffn_up"].a)


ORACLE_SIZES = {
    "vocab_size": 768,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def neighbours(weight, head_dim):
    """Rows of a publisher's q or k in the order of GGUF: an own writing of the permutation."""
    out = np.empty_like(weight)
    for row in range(len(weight)):
        head, place = divmod(row, head_dim)
        pair, second = divmod(place, 2)
        out[row] = weight[head * head_dim + second * (head_dim // 2) + pair]
    return out


def write_model(path, torch_model, data_dir):
    """Convert a tiny transformers llama to GGUF, with the recorded model's vocabulary."""
    state = {n: t.numpy() for n, t in torch_model.state_dict().items()}
    s, u32 = ORACLE_SIZES, ValueType.U32
    keys = [
        ("general.architecture", ValueType.STRING, "llama"),
        ("llama.context_length", u32, s["max_position_embeddings"]),
        ("llama.embedding_length", u32, s["hidden_size"]),
        ("llama.block_count", u32, s["num_hidden_layers"]),
        ("llama.feed_forward_length", u32, s["intermediate_size"]),
        ("llama.attention.head_count", u32, s["num_attention_heads"]),
        ("llama.attention.head_count_kv", u32, s["num_key_value_heads"]),
        ("llama.attention.key_length", u32, s["head_dim"]),
        ("llama.attention.value_length", u32, s["head_dim"]),
        ("llama.rope.dimension_count", u32, s["head_dim"]),
        ("llama.attention.layer_norm_rms_epsilon", ValueType.F32, 1e-6),
    ]
    with read_gguf(data_dir / "mini-gqa-f32.gguf") as file:
        keys += [(k, file.value_types[k], v) for k, v in file.metadata.items() if "token" in k]
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not torch_model.config.tie_word_embeddings:
        names["output"] = "lm_head"
    modules = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{k}": f"self_attn.{k}_proj" for k in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{k}": f"mlp.{k}_proj" for k in ("gate", "down", "up")},
    }
    for layer in range(s["num_hidden_layers"]):
        names |= {f"blk.{layer}.{k}": f"model.layers.{layer}.{m}" for k, m in modules.items()}
    tensors = []
    for name, module in names.items():
        weight = state[module + ".weight"]
        if name.endswith(("attn_q", "attn_k")):
            weight = neighbours(weight, s["head_dim"])
        tensors.append((name + ".weight", F32, weight.shape, np.ascontiguousarray(weight)))
    write_gguf(path, keys, tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_this_engine_agree_on_each_other_s_adapters(rng, data_dir, tmp_path, tied, rslora):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(int(rng.integers(2**31)))
    config = transformers.LlamaConfig(
        **ORACLE_SIZES, tie_word_embeddings=tied, initializer_range=0.2, rms_norm_eps=1e-6
    )

    def published():
        model = transformers.LlamaForCausalLM(config).float().eval()
        model.load_state_dict(weights)
        return model

    original = transformers.LlamaForCausalLM(config).float().eval()
    weights = original.state_dict()
    write_model(tmp_path / "x.gguf", original, data_dir)
    model = Model.load(tmp_path / "x.gguf")
    base = BaseInfo.of(model)

    def theirs(torch_model):
        with torch.no_grad():
            return torch_model(torch.tensor([TOKENS])).logits[0, -1].numpy()

    plain = logits(model)
    assert np.abs(plain - theirs(original)).max() < 1e-4

    ranks = {kind: 4 for kind in KINDS if "norm" not in kind} | {"attn_q": 3, "token_embd": 2}
    adapter = create_adapter(model.adapter_shapes(ranks), 4, 6, 1, rslora=rslora)
    adapter.flat[:] = rng.standard_normal(adapter.flat.size) * 0.2
    write_adapter(adapter, tmp_path / "ours", base, form="peft")
    loaded = peft.PeftModel.from_pretrained(published(), tmp_path / "ours").eval()
    ours = logits(model, adapter)
    assert np.abs(ours - plain).max() > 0.1
    assert np.abs(ours - theirs(loaded)).max() < 1e-4 * np.abs(ours).max()

    lora_config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=rslora,
        init_lora_weights=False,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
        rank_pattern={"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
        alpha_pattern={"layers.0.mlp.down_proj": 9},
    )
    made = peft.get_peft_model(published(), lora_config).eval()
    made.save_pretrained(tmp_path / "theirs")
    again = read_adapter(tmp_path / "theirs", base)
    assert len(again.pairs) == 10
    expected = theirs(made)
    assert np.abs(expected - plain).max() > 0.1
    assert np.abs(logits(model, again) - expected).max() < 1e-4 * np.abs(expected).max()
