"""From a folder to a GGUF file: every bit, key and name, and folders that are not sound."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.convert import read_folder
from engine.convert import tensors as tensors_module
from engine.errors import EngineError
from engine.gguf import GGUFFile, read_gguf
from engine.model import Context, Model
from tests import reference
from tests.hf_folder import Published, published


def convert(folder: Path, outtype: str = "auto", **options: Any) -> GGUFFile:
    path = folder.parent / "out.gguf"
    read_folder(folder, outtype, **options).write(path)
    return read_gguf(path)


def rotated(rows: np.ndarray, n_head: int) -> np.ndarray:
    """The order of rows that the rotation of neighbours wants, row by row."""
    d = len(rows) // n_head
    out = np.empty_like(rows)
    for h in range(n_head):
        for i in range(d // 2):
            for j in range(2):
                out[h * d + 2 * i + j] = rows[h * d + j * d // 2 + i]
    return out


def expected_bits(model: Published, name: str) -> tuple[str, np.ndarray]:
    """GGUF name and the values, in the file's order, of a published tensor."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    stem, _, suffix = name.rpartition(".")
    values = model.tensors[name][1]
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = heads.get(part.split(".")[-1])
        values = rotated(values, model.config[key]) if key else values
        return f"blk.{layer}.{names[part]}.{suffix}", values
    return f"{names[stem]}.{suffix}", values


# ---------------------------------------------------------------- bits


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_bit_of_a_16_bit_folder_is_kept(tmp_path, rng, dtype, n_shards, monkeypatch):
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 1500)  # several pieces a tensor
    model = published(rng, dtype, biases=True, head_dim=8)
    file = convert(model.write(tmp_path / "m", n_shards))
    assert len(file.tensors) == len(model.tensors)
    for published_name in model.tensors:
        name, values = expected_bits(model, published_name)
        info = file.tensors[name]
        assert info.shape == values.shape
        stored = file.data(name)
        if values.ndim == 2:
            assert info.dtype.name == dtype
            assert stored.tobytes() == values.tobytes()
        elif dtype == "BF16":  # vectors are F32: the same bits, and zeros
            assert stored.view("<u4").tolist() == (values.astype(np.uint32) << 16).tolist()
        else:
            assert stored.view("<f4").tolist() == values.astype("<f4").tolist()


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_other_types_are_rounded_as_the_reference_rounds(tmp_path, rng, dtype, outtype):
    model = published(rng, dtype)
    file = convert(model.write(tmp_path / "m"), outtype)
    name, values = expected_bits(model, "model.layers.1.self_attn.q_proj.weight")
    info = file.tensors[name]
    assert info.dtype.name == outtype.upper()
    floats = (
        (values.astype(np.uint32) << 16).view(np.float32)
        if dtype == "BF16"
        else values.astype(np.float32)
    )
    assert file.data(name).tobytes() == np.asarray(reference.encode(info.dtype, floats)).tobytes()
    assert file.tensors["output_norm.weight"].dtype.name == "F32"
    assert file.get_int("general.file_type") == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[outtype]


def test_every_finite_bf16_pattern_survives(tmp_path, rng):
    model = published(rng, intermediate_size=1024, n_vocab=1024)
    patterns = np.arange(65536, dtype="<u2").reshape(1024, 64)
    patterns[(patterns & 0x7F80) == 0x7F80] = 0
    model.tensors["model.embed_tokens.weight"] = "BF16", patterns
    file = convert(model.write(tmp_path / "m"))
    assert file.data("token_embd.weight").tobytes() == patterns.tobytes()


def test_q8_0_zeros_and_ties_are_the_formats_own(tmp_path, rng):
    model = published(rng, "F32")
    values = model.tensors["lm_head.weight"][1]
    values[0] = 0
    values[1, :] = np.linspace(-127, 127, 64) / 2  # products with a half behind the point
    values[1, 0] = 127
    values[2] = 1e-39
    file = convert(model.write(tmp_path / "m"), "q8_0")
    with np.errstate(all="ignore"):
        expected = reference.encode(file.tensors["output.weight"].dtype, values[:2])
    stored = file.data("output.weight").reshape(300, -1)
    assert stored[:2].tobytes() == np.asarray(expected).tobytes()
    assert not stored[2, 2:34].any()  # 1 / scale is infinite there


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path, rng):
    model = published(rng, intermediate_size=80)
    conversion = read_folder(model.write(tmp_path / "m"), "q8_0")
    types = {t.name: t.dtype.name for t in conversion.tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("mlp.down_proj.weight: rows of 80" in line for line in conversion.warnings)


@pytest.mark.parametrize("outtype, name", [("f16", "F16"), ("q8_0", "Q8_0")])
def test_a_value_beyond_the_type_is_refused_with_its_row(tmp_path, rng, outtype, name):
    model = published(rng, "F32")
    model.tensors["model.layers.1.mlp.up_proj.weight"][1][5, 7] = 1e9
    folder = model.write(tmp_path / "m")
    with pytest.raises(
        EngineError, match=f"mlp.up_proj.weight: row 5: a value does not fit {name}"
    ):
        convert(folder, outtype)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_memory_is_bounded_by_a_piece_not_by_the_model(tmp_path, rng):
    model = published(rng, "F16", n_vocab=2000, intermediate_size=4096, hidden_size=1024)
    for name, (dtype, values) in model.tensors.items():
        if values.ndim == 2:
            model.tensors[name] = dtype, np.zeros(values.shape, "<f2")
    folder = model.write(tmp_path / "m")
    assert (folder / "model.safetensors").stat().st_size > 60e6
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from engine.convert import read_folder, tensors\n"
        "tensors.PIECE_BYTES = 1 << 20\n"
        "c = read_folder(Path(sys.argv[1]), 'f32')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); c.write(Path(sys.argv[2])); print(peak() - before)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "o.gguf")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 20_000  # KiB; the largest tensor takes 16,000 as float32
    assert (tmp_path / "o.gguf").stat().st_size > 120e6


# ---------------------------------------------------------------- keys


def test_the_keys_are_those_of_the_config(tmp_path, rng):
    model = published(rng, head_dim=8, rope_theta=5e5, rms_norm_eps=1e-6)
    file = convert(model.write(tmp_path / "m"), name="A name")
    assert dict(list(file.metadata.items())[:17]) == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "A name",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 5e5,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.vocab_size": 300,
        "llama.rope.dimension_count": 8,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "general.file_type": 32,
        "general.quantization_version": 2,
    }


def test_the_newest_gguf_reader_reads_it(tmp_path, rng):
    gguf = pytest.importorskip("gguf")
    model = published(rng, tied=True)
    convert(model.write(tmp_path / "m"))
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    (embedding,) = [t for t in reader.tensors if t.name == "token_embd.weight"]
    assert embedding.tensor_type == gguf.GGMLQuantizationType.BF16
    bits = model.tensors["model.embed_tokens.weight"][1]
    assert embedding.data.tobytes() == bits.tobytes()


@pytest.mark.parametrize("as_parameters", [False, True])
@pytest.mark.parametrize(
    "scaling, keys",
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        ),
        ({"rope_type": "default"}, {}),
        ({"rope_type": "dynamic", "factor": 2.0}, {}),
    ],
)
def test_rope_scaling_is_written_from_either_form(tmp_path, rng, scaling, keys, as_parameters):
    model = published(rng)
    if as_parameters:
        del model.config["rope_theta"]
        model.config["rope_parameters"] = scaling | {"rope_theta": 3e4}
    else:
        model.config |= {"rope_scaling": scaling, "rope_theta": 3e4}
    file = convert(model.write(tmp_path / "m"))
    prefix = "llama.rope.scaling."
    found = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    assert found == keys
    assert file.get_float("llama.rope.freq_base") == 3e4


def test_llama3s_scaling_becomes_a_tensor_of_divisors(tmp_path, rng):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = published(rng, rope_scaling=scaling, hidden_size=256, rope_theta=5e5)
    file = convert(model.write(tmp_path / "m"))
    divisors = file.data("rope_freqs.weight").view("<f4")
    wave = 2 * np.pi * 5e5 ** (np.arange(0, 64, 2) / 64)
    for divisor, length in zip(divisors, wave, strict=True):
        if length < 64 / 4:
            assert divisor == 1
        elif length > 64:
            assert divisor == 8
        else:
            smooth = (64 / length - 1) / 3
            assert divisor == pytest.approx(1 / ((1 - smooth) / 8 + smooth))
    assert {1, 8} < set(divisors.tolist())


def test_a_vocabulary_alone_has_keys_and_no_tensor(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    file = convert(folder, vocab_only=True)
    assert not file.tensors and len(file.metadata["tokenizer.ggml.tokens"]) == 300


def test_a_tied_head_that_was_saved_all_the_same_is_left_out(tmp_path, rng):
    model = published(rng, tied=False)
    model.config["tie_word_embeddings"] = True
    conversion = read_folder(model.write(tmp_path / "m"))
    assert "output.weight" not in {t.name for t in conversion.tensors}
    assert any("lm_head.weight is left out" in line for line in conversion.warnings)


def test_a_window_is_told_of(tmp_path, rng):
    model = published(rng, architectures=["MistralForCausalLM"], sliding_window=32)
    assert any("window of 32" in line for line in read_folder(model.write(tmp_path / "m")).warnings)


@pytest.mark.parametrize("tied", [False, True])
def test_the_engine_runs_what_was_converted(tmp_path, rng, tied):
    model = published(rng, tied=tied, head_dim=24, biases=True)
    folder = model.write(tmp_path / "m")
    read_folder(folder).write(tmp_path / "out.gguf")
    loaded = Model.load(tmp_path / "out.gguf", check_tensors=True)
    assert loaded.warnings == []
    assert np.isfinite(Context(loaded, 32, n_threads=1).evaluate([1, 5, 9])).all()


# ---------------------------------------------------------------- folders that are not sound


def broken(folder: Path, case: str) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    config = folder / "config.json"
    if case == "shard missing":
        shard.unlink()
    elif case == "no weights":
        for path in folder.glob("model*"):
            path.unlink()
    elif case == "pickled":
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK")
    elif case == "shard missing without an index":
        index.unlink()
        shard.unlink()
    elif case == "index names an absent tensor":
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.7.mlp.up_proj.weight"] = shard.name
        index.write_text(json.dumps(content))
    elif case == "index leads outside":
        content = json.loads(index.read_text())
        content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
        index.write_text(json.dumps(content))
    elif case == "index is no json":
        index.write_text("{")
    elif case == "index without a map":
        index.write_text("{}")
    elif case == "no config":
        config.unlink()
    elif case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "header lies about offsets":
        lie(shard, lambda entry: entry["data_offsets"].__setitem__(1, 10**9))
    elif case == "header lies about overlap":
        lie(shard, lambda entry: entry.__setitem__("data_offsets", [0, entry["data_offsets"][1]]))
    elif case == "header lies about its length":
        shard.write_bytes(struct.pack("<Q", 2**63) + shard.read_bytes()[8:])
    elif case == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        change = CONFIGS[case][0]
        config.write_text(json.dumps(json.loads(config.read_text()) | change))


def lie(path: Path, change: Any) -> None:
    content = path.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    change(header[list(header)[2]])
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + n :])


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other architecture": (
        {"architectures": ["GraniteForCausalLM"]},
        "'GraniteForCausalLM' cannot",
    ),
    "no architecture": ({"architectures": []}, "architectures: nothing cannot be converted"),
    "experts": ({"num_local_experts": 8}, "mixtures of experts"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantized folders cannot"),
    "other gate": ({"hidden_act": "gelu"}, "'gelu' cannot be run"),
    "size": ({"hidden_size": "64"}, "hidden_size: '64' is no size"),
    "size negative": ({"num_hidden_layers": -2}, "num_hidden_layers: -2 is no size"),
    "heads": ({"num_key_value_heads": 3}, "3 does not divide 4 heads"),
    "odd head": ({"head_dim": 15}, "15 is odd"),
    "epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps: 0 cannot be used"),
    "flag": ({"tie_word_embeddings": "no"}, "'no' is neither true nor false"),
    "rope kind": ({"rope_scaling": {"rope_type": "longrope"}}, "type 'longrope' cannot"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "factor: nothing cannot be used"),
    "rope list": ({"rope_scaling": [1]}, "[1] is no object"),
    "yarn beta": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 64}},
        "beta_fast 64 cannot be run",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "heads rotated in part"),
    "shape of queries": ({"head_dim": 8}, "has shape 64 × 64, config.json says 32 × 64"),
    "shape of the vocabulary": (
        {"vocab_size": 301},
        "has shape 300 × 64, config.json says 301 × 64",
    ),
    "a layer too few": ({"num_hidden_layers": 1}, "has no place in a llama of 1 layers"),
    "a layer too many": (
        {"num_hidden_layers": 3},
        "model.layers.2.input_layernorm.weight: is missing",
    ),
    "biases missing": ({"attention_bias": True}, "self_attn.q_proj.bias: is missing"),
}
FOLDERS = {
    "shard missing": "model-00002-of-00002.safetensors: is missing",
    "no weights": "has no model.safetensors; give the folder",
    "pickled": "pytorch_model.bin holds pickled weights",
    "shard missing without an index": "model-00002-of-00002.safetensors: is missing",
    "index names an absent tensor": "tensor model.layers.7.mlp.up_proj.weight: is not in",
    "index leads outside": "'../elsewhere.safetensors' names no file",
    "index is no json": "is not sound JSON",
    "index without a map": "has no weight_map",
    "no config": "config.json: is missing or empty",
    "no tokenizer": "has neither tokenizer.model nor tokenizer.json",
    "header lies about offsets": "it has",
    "header lies about overlap": "needs",
    "header lies about its length": "does not fit a file of",
    "cut off": "and at most",
}


@pytest.mark.parametrize("case", [*FOLDERS, *CONFIGS])
def test_a_folder_that_is_not_sound_is_one_line_that_names_the_file(tmp_path, rng, case):
    folder = published(rng).write(tmp_path / "m", 2)
    broken(folder, case)
    with pytest.raises(EngineError) as error:
        convert(folder)
    message = str(error.value)
    expected = FOLDERS.get(case) or CONFIGS[case][1]
    assert expected in message and message.startswith(str(folder)) and "\n" not in message
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tensor_of_another_type_is_named(tmp_path, rng):
    model = published(rng)
    model.tensors["model.norm.weight"] = "I64", np.zeros(64, "<i8")
    with pytest.raises(EngineError, match=r"model\.norm\.weight: has type I64"):
        convert(model.write(tmp_path / "m"))


def test_buffers_of_older_versions_are_passed_over(tmp_path, rng):
    model = published(rng)
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = "F32", np.ones(8, "<f4")
    model.tensors["model.layers.0.attention.bias"] = "I64", np.ones(8, "<i8")
    assert "token_embd.weight" in convert(model.write(tmp_path / "m")).tensors


def test_bytes_changed_or_cut_off_give_a_file_or_one_line(tmp_path, rng):
    folder = published(rng, n_vocab=270).write(tmp_path / "m")
    contents = {p.name: p.read_bytes() for p in folder.iterdir()}
    refused = 0
    for trial in range(150):
        name = list(contents)[trial % len(contents)]
        changed = bytearray(contents[name])
        if trial % 3 == 0:
            del changed[rng.integers(len(changed)) :]
        else:
            for place in rng.integers(0, min(len(changed), 3000), 3):
                changed[place] = rng.integers(256)
        (folder / name).write_bytes(changed)
        try:
            read_folder(folder)
        except EngineError as error:
            refused += 1
            assert "\n" not in str(error)
        (folder / name).write_bytes(contents[name])
    assert refused > 20


# ---------------------------------------------------------------- the command


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine.tools.convert_hf_to_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_command_writes_the_originals_name_into_the_folder(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    done = run(folder, "--use-temp-file", "--verbose")
    assert (done.returncode, done.stdout) == (0, "")
    assert "token_embd.weight," in done.stderr
    assert done.stderr.endswith(f"written to {folder}/ggml-model-bf16.gguf\n")
    assert read_gguf(folder / "ggml-model-bf16.gguf").get_str("general.name") == "m"


def test_the_command_names_the_file_by_its_type(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    assert run(folder, "--outtype=f16", "--outfile", tmp_path / "x-{ftype}.gguf").returncode == 0
    assert (tmp_path / "x-f16.gguf").exists()


def test_the_command_does_not_write_over_the_folders_files(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()
    done = run(folder, "--outfile", folder / "model.safetensors")
    assert done.returncode == 1 and "is a file of the folder" in done.stderr
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ((), "DIR is missing"),
        (("no-such-folder",), "no-such-folder: is no folder"),
        (("x", "--bigendian"), "--bigendian of the original is not offered here"),
        (("x", "--outtype", "q4_0"), "is not one of f32, f16, bf16, q8_0, auto"),
    ],
)
def test_what_the_command_cannot_do_is_one_line_and_status_1(arguments, problem):
    done = run(*arguments)
    assert done.returncode == 1
    first, *others = done.stderr.splitlines()
    assert first.startswith("error: ") and problem in first
    assert not others or "usage: convert-hf-to-gguf" in done.stderr


def test_a_disk_that_fills_leaves_no_file(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run(folder, "--outfile", tmp_path / "out.gguf", preexec_fn=small_files)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out.gguf: cannot be written")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_source_that_shrinks_while_it_is_read_is_told(tmp_path, rng):
    folder = published(rng).write(tmp_path / "m")
    conversion = read_folder(folder)
    shutil.copy(folder / "config.json", folder / "model.safetensors")
    with pytest.raises(EngineError, match="has become shorter"):
        conversion.write(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
