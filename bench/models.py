"""Models to measure with, made once in a cache folder: ``python -m bench.models NAME``.

Speed asks for shapes and types, not for sense. The weights of the large ones are random: each
tensor is a piece of one pool of random numbers, so that making a file takes the pool's memory.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.dtypes import BF16, F32, Q8_0, DType
from engine.gguf import KeyType, ValueType, read_gguf, write_gguf
from engine.kernels import decode, encode_bf16
from engine.locate import locate_model

ROOT = Path(__file__).parents[1]
FILE_TYPES = {BF16: 32, Q8_0: 7}
STANDARD_DEVIATION = 0.02
BYTE_TOKENS = 256


@dataclass(frozen=True)
class Shape:
    """A published shape of the llama architecture; output and embedding are two tensors."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    eps: float
    n_vocab: int = 32000
    n_ctx: int = 2048

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the file."""
        wide, n_kv = self.n_embd, self.n_embd // self.n_head * self.n_head_kv
        layer = {
            "attn_norm": (wide,),
            "attn_q": (wide, wide),
            "attn_k": (n_kv, wide),
            "attn_v": (n_kv, wide),
            "attn_output": (wide, wide),
            "ffn_norm": (wide,),
            "ffn_gate": (self.n_ff, wide),
            "ffn_up": (self.n_ff, wide),
            "ffn_down": (wide, self.n_ff),
        }
        blocks = [
            (f"blk.{i}.{name}.weight", shape)
            for i in range(self.n_layer)
            for name, shape in layer.items()
        ]
        table = (self.n_vocab, wide)
        ends = [("output_norm.weight", (wide,)), ("output.weight", table)]
        return [("token_embd.weight", table), *blocks, *ends]

    def keys(self, name: str, dtype: DType) -> list[tuple[str, KeyType, Any]]:
        """Metadata, with a vocabulary of bytes and made-up words."""
        u32 = ValueType.U32
        sizes = {
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "rope.dimension_count": self.n_embd // self.n_head,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
        }
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(BYTE_TOKENS))]
        kinds = [2, 3, 3, *[6] * BYTE_TOKENS]  # unknown, control, byte; below: normal
        tokens += [f"\u2581word{i}" for i in range(self.n_vocab - len(tokens))]
        kinds += [1] * (self.n_vocab - len(kinds))
        return [
            ("general.architecture", ValueType.STRING, "llama"),
            ("general.name", ValueType.STRING, name),
            ("general.file_type", u32, FILE_TYPES[dtype]),
            *((f"llama.{key}", u32, value) for key, value in sizes.items()),
            ("llama.attention.layer_norm_rms_epsilon", ValueType.F32, self.eps),
            ("tokenizer.ggml.model", ValueType.STRING, "llama"),
            ("tokenizer.ggml.tokens", (ValueType.ARRAY, ValueType.STRING), tokens),
            ("tokenizer.ggml.scores", (ValueType.ARRAY, ValueType.F32), [0.0] * self.n_vocab),
            ("tokenizer.ggml.token_type", (ValueType.ARRAY, ValueType.I32), kinds),
            ("tokenizer.ggml.unknown_token_id", u32, 0),
            ("tokenizer.ggml.bos_token_id", u32, 1),
            ("tokenizer.ggml.eos_token_id", u32, 2),
        ]


TINYLLAMA = Shape(22, 2048, 5632, 32, 4, 1e-5)
OPENLLAMA_3B = Shape(26, 3200, 8640, 32, 32, 1e-6)


def pool(dtype: DType, n: int) -> np.ndarray:
    """Stored bytes of `n` normally distributed numbers."""
    rng = np.random.default_rng(1)
    if dtype is BF16:
        values = STANDARD_DEVIATION * rng.standard_normal(n, np.float32)
        return encode_bf16(values).view(np.uint8)
    assert dtype is Q8_0
    blocks = np.empty((n // dtype.block, dtype.block_bytes), np.uint8)
    blocks[:, :2] = np.array([STANDARD_DEVIATION / 40], np.float16).view(np.uint8)
    codes = np.clip(40 * rng.standard_normal((len(blocks), dtype.block), np.float32), -127, 127)
    blocks[:, 2:] = codes.astype(np.int8).view(np.uint8)
    return blocks.reshape(-1)


def make_random(path: Path, name: str, shape: Shape, dtype: DType) -> None:
    """Write a model of random weights; vectors are F32 ones."""
    shapes = shape.tensors()
    largest = max(int(np.prod(sizes)) for _, sizes in shapes)
    numbers = pool(dtype, largest + (1 << 20))
    tensors = []
    for i, (tensor, sizes) in enumerate(shapes):
        if len(sizes) == 1:
            tensors.append((tensor, F32, sizes, np.ones(sizes, np.float32)))
            continue
        n_bytes = int(np.prod(sizes)) // dtype.block * dtype.block_bytes
        first = 997 * i * dtype.block_bytes % (len(numbers) - n_bytes)
        first -= first % dtype.block_bytes
        tensors.append((tensor, dtype, sizes, numbers[first : first + n_bytes]))
    write_gguf(path, shape.keys(name, dtype), tensors)


def make_smollm2_bf16(path: Path) -> None:
    """Decode the packaged model and write its matrices as BF16; embeddings stay tied."""
    with read_gguf(locate_model("smollm2")) as source:
        keys = [
            (
                key,
                source.value_types[key],
                FILE_TYPES[BF16] if key == "general.file_type" else value,
            )
            for key, value in source.metadata.items()
        ]
        tensors = []
        for info in source.tensors.values():
            data = source.data(info.name)
            if len(info.shape) > 1:
                values = decode(info.dtype.id, data, int(np.prod(info.shape)))
                tensors.append((info.name, BF16, info.shape, encode_bf16(values)))
            else:
                tensors.append((info.name, info.dtype, info.shape, data))
        write_gguf(path, keys, tensors)


MAKERS = {
    "tinyllama-bf16": lambda path: make_random(path, "TinyLlama's shape", TINYLLAMA, BF16),
    "openllama-3b-q8_0": lambda path: make_random(path, "OpenLLaMA-3B's shape", OPENLLAMA_3B, Q8_0),
    "smollm2-bf16": make_smollm2_bf16,
}
PACKAGED = {"smollm2-q4_1": "smollm2"}


def find(name: str) -> Path:
    """Path of a model, made if it is not there yet: in BENCH_MODELS, or build/bench-models."""
    if name in PACKAGED:
        return locate_model(PACKAGED[name])
    folder = Path(os.environ.get("BENCH_MODELS") or ROOT / "build" / "bench-models")
    path = folder / f"{name}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        MAKERS[name](path)
    return path


if __name__ == "__main__":
    print(find(sys.argv[1]))
