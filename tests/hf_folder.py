"""Folders of small random llamas as publishers make them, written without their libraries."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}

# Text by which tokenizers are compared.
SENTENCES = (
    "The ship has three masts, and 1234 ropes.",
    "Isn't it cold?  I'VE been  there\n\n  twice…",
    "naïve café — 東京 🚀",
    "",
)


@dataclass
class Published:
    """A folder before it is written: its config, and tensors by name as (type, values)."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, Array]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, n_shards: int = 1) -> Path:
        """Write the folder: one file of tensors, or shards and their index."""
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text)
        names = list(self.tensors)
        if n_shards == 1:
            (folder / "model.safetensors").write_bytes(safetensors(self.tensors))
            return folder
        places = {}
        for i in range(n_shards):
            file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
            shard = {name: self.tensors[name] for name in names[i::n_shards]}
            places |= dict.fromkeys(shard, file)
            (folder / file).write_bytes(safetensors(shard))
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def safetensors(tensors: dict[str, tuple[str, Array]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, values) in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
    return struct.pack("<Q", len(encoded)) + encoded + data


def random_values(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Weights of a sensible size; every bf16 and f16 pattern of such sizes occurs."""
    values = (rng.standard_normal(shape) * 0.2).astype("<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2")
    return values.astype(NUMPY[dtype])


def published(
    rng: np.random.Generator,
    dtype: str = "BF16",
    *,
    tied: bool = False,
    biases: bool = False,
    n_vocab: int = 300,
    **config: Any,
) -> Published:
    """A llama of two layers with grouped heads, and a byte-level BPE of `n_vocab` tokens."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": n_vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": biases,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    e, f = config["hidden_size"], config["intermediate_size"]
    d = config.get("head_dim") or e // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (n_vocab, e)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        for name, shape in (
            ("input_layernorm", (e,)),
            ("self_attn.q_proj", (q, e)),
            ("self_attn.k_proj", (kv, e)),
            ("self_attn.v_proj", (kv, e)),
            ("self_attn.o_proj", (e, q)),
            ("post_attention_layernorm", (e,)),
            ("mlp.gate_proj", (f, e)),
            ("mlp.up_proj", (f, e)),
            ("mlp.down_proj", (e, f)),
        ):
            shapes[p + name + ".weight"] = shape
            if biases and "self_attn" in name:
                shapes[p + name + ".bias"] = shape[:1]
    shapes["model.norm.weight"] = (e,)
    if not tied:
        shapes["lm_head.weight"] = (n_vocab, e)
    tensors = {name: (dtype, random_values(rng, dtype, s)) for name, s in shapes.items()}
    return Published(config, tensors, byte_level_files(n_vocab))


def byte_characters() -> list[str]:
    """Characters that stand for the bytes 0 to 255 in byte-level vocabularies."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in own else chr(next(others)) for b in range(256)]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_files(n_vocab: int, pre_tokenizer: Any = None) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json: three special tokens, bytes, and some merges."""
    texts = ["<unk>", "<s>", "</s>", *byte_characters()]
    merges = []
    for pair in ("t h", "th e", "Ġ the", "a n", "an d", "Ġ and", "i t", "Ġ it", "e r", "1 2"):
        if len(texts) == n_vocab - 1:
            break
        left, right = pair.split()
        texts.append(left + right)
        merges.append([left, right])
    added = [*({"id": i, "content": texts[i], "special": True} for i in range(3))]
    if len(texts) < n_vocab:
        added.append({"id": len(texts), "content": "<tool>", "special": False})
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    }
    return {
        "tokenizer.json": {
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": pre_tokenizer
            or {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": post,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "model": {
                "type": "BPE",
                "vocab": {text: i for i, text in enumerate(texts)},
                "merges": merges,
                "ignore_merges": True,
                "byte_fallback": False,
            },
        },
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
            "unk_token": "<unk>",
            "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
        },
    }
