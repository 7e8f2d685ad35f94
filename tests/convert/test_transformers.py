"""Small random models saved by transformers, converted, and asked the same as the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.convert import read_folder
from engine.dtypes import F32
from engine.gguf import read_gguf
from engine.model import Context, Model
from tests.hf_folder import SENTENCES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

N_VOCAB = 320
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 5e5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "f16": {"dtype": "float16"},
    "f32": {"dtype": "float32"},
    "tied": {"tie_word_embeddings": True},
    "one head of keys": {"num_key_value_heads": 1},
    "free head size": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "shards": {"shards": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": LLAMA3, "hidden_size": 128},
    "yarn": {"rope_parameters": YARN},
    "yarn with a magnitude": {"rope_parameters": YARN | {"attention_factor": 1.3}},
    "mistral": {"kind": "Mistral", "sliding_window": None},
}


def save_tokenizer(folder: Path, add_bos: bool) -> Any:
    """A byte-level BPE trained on a few sentences, in the manner of SmolLM."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_VOCAB - 10,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES] * 3, trainer)
    if add_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return fast


def save_model(folder: Path, case: dict[str, Any], seed: int) -> Any:
    case = dict(case)
    kind, shards = case.pop("kind", "Llama"), case.pop("shards", False)
    dtype = getattr(torch, case.pop("dtype", "bfloat16"))
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": N_VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.15,
            "attn_implementation": "eager",
            **case,
        }
    )
    torch.manual_seed(seed)
    factory = getattr(transformers, f"{kind}ForCausalLM")
    model = factory(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    # Loaded again, as the conversion to `dtype` has rounded the angles as well.
    return factory.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(context: Context, tokens: list[int]) -> np.ndarray:
    return np.stack([context.evaluate([token]).copy() for token in tokens])


@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_gives_the_same_logits_and_the_same_greedy_text(tmp_path, rng, name):
    folder = tmp_path / "m"
    original = save_model(folder, CASES[name], int(rng.integers(2**31)))
    save_tokenizer(folder, add_bos=True)
    outtype = "f32" if CASES[name].get("dtype") == "float32" else "auto"
    read_folder(folder, outtype).write(tmp_path / "m.gguf")
    model = Model.load(tmp_path / "m.gguf")
    assert model.warnings == []

    tokens = rng.integers(0, N_VOCAB, 48).tolist()
    with torch.no_grad():
        expected = original(torch.tensor([tokens])).logits[0].numpy()
    context = Context(model, 64, n_threads=1, cache_types=(F32, F32), bf16="exact")
    got = logits_of(context, tokens)
    # Weights are the same; float32 sums in another order and float32 angles there differ.
    spread = expected.std()
    assert spread > 0.1
    tolerance = 1e-4 * spread
    np.testing.assert_allclose(got, expected, atol=tolerance)

    with torch.no_grad():
        written = original.generate(
            torch.tensor([tokens[:5]]), max_new_tokens=16, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        )[0, 5:].tolist()  # fmt: skip
    context = Context(model, 64, n_threads=1, cache_types=(F32, F32), bf16="exact")
    scores = logits_of(context, tokens[:5])[-1]
    assert len(written) == 16
    for token in written:  # the best here, too, but for ties within the tolerance
        assert scores[token] >= scores.max() - 2 * tolerance
        scores = context.evaluate([token])


def test_what_transformers_saves_as_bf16_is_kept_bit_for_bit(tmp_path, rng):
    original = save_model(tmp_path / "m", {"num_key_value_heads": 4}, int(rng.integers(2**31)))
    save_tokenizer(tmp_path / "m", add_bos=False)
    read_folder(tmp_path / "m", "bf16").write(tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    state = original.to(torch.bfloat16).state_dict()
    for published, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "blk.0.attn_output.weight"),
    ):
        bits = state[published].view(torch.int16).numpy()
        assert file.data(name).tobytes() == bits.tobytes()


@pytest.mark.parametrize("add_bos", [False, True])
def test_texts_become_the_same_tokens(tmp_path, rng, add_bos):
    save_model(tmp_path / "m", {}, 1)
    tokenizer = save_tokenizer(tmp_path / "m", add_bos)
    conversion = read_folder(tmp_path / "m")
    conversion.write(tmp_path / "m.gguf")
    model = Model.load(tmp_path / "m.gguf")
    assert model.file.get_str("tokenizer.ggml.pre") == "smollm"
    assert model.file.get_str("tokenizer.chat_template") == "{{ messages }}"
    assert model.tokenizer.add_bos is add_bos
    for text in SENTENCES:
        expected = tokenizer.encode(text)
        got = model.tokenizer.encode(text.encode(), add_special=True, parse_special=False)
        assert got == expected, text
