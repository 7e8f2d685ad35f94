"""One engine in a comparison, a process of its own: ``python -m bench.engines NAME CASE``.

CASE is JSON. The process loads what the case needs, warms up, and answers on standard output with
a line of JSON; then with another for each line that it reads, after a round of the case.

An engine is a class, a kind of case a method: it prepares, and gives a function that does a round
and returns figures. Peers run in interpreters of their own, where the compiled engine may be
missing: it is imported by `Ours` alone.
"""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "tests" / "data" / "play.txt"
N_SHORT = 16  # tokens of the prompt that generation continues
N_WARM = 8
CHECKED = 64  # logits that are compared between engines
PRODUCT_SECONDS = 0.3

Figures = dict[str, Any]
Round = Callable[[], Figures]


def token_ids(n: int) -> list[int]:
    """Tokens that no vocabulary gives a special meaning, and no two neighbours alike."""
    return [1000 + 7 * i % 4999 for i in range(n)]


def seconds_of(run: Callable[[], object]) -> float:
    """Time of one run."""
    begin = perf_counter()
    run()
    return perf_counter() - begin


def repeated(run: Callable[[], object]) -> Figures:
    """Median time of as many runs as fit in PRODUCT_SECONDS, five at least."""
    run()
    times = [seconds_of(run)]
    total = times[0]
    while len(times) < 5 or total < PRODUCT_SECONDS:
        times.append(seconds_of(run))
        total += times[-1]
    return {"seconds": statistics.median(times)}


def of_iterations(stamps: list[float], usage: resource.struct_rusage) -> Figures:
    """Median time between iterations, the first left out, and the peak of memory."""
    seconds = statistics.median(b - a for a, b in pairwise(stamps[1:]))
    return {"seconds": seconds, "megabytes": usage.ru_maxrss * 1024 / 1e6}


class Inference(ABC):
    """Prompt and generation, for an engine that can forget and evaluate."""

    @abstractmethod
    def load(self, case: Figures, n_ctx: int) -> None:
        """Make the model ready for so many positions."""

    @abstractmethod
    def evaluate(self, ids: list[int]) -> np.ndarray:
        """Append tokens; logits of the last."""

    @abstractmethod
    def forget(self) -> None:
        """Begin again with no tokens."""

    def prompt(self, case: Figures) -> Round:
        ids = token_ids(case["tokens"])
        self.load(case, len(ids))

        def run() -> Figures:
            self.forget()
            begin = perf_counter()
            logits = self.evaluate(ids)
            seconds = perf_counter() - begin
            return {"seconds": seconds, "logits": logits[:CHECKED].tolist()}

        return run

    def generation(self, case: Figures) -> Round:
        ids = token_ids(N_SHORT + case["tokens"])
        self.load(case, len(ids))

        def run(n: int = case["tokens"]) -> Figures:
            self.forget()
            self.evaluate(ids[:N_SHORT])
            times = [seconds_of(lambda i=i: self.evaluate([i])) for i in ids[N_SHORT:][:n]]
            return {"seconds": sum(times)}

        run(N_WARM)
        return run


class Ours(Inference):
    def peak(self, case: Figures) -> Round:
        from bench.peaks import measure_peak, to_read
        from engine.kernels import active_isa

        isa, data = active_isa(), to_read()
        return lambda: {"isa": isa, "peak": measure_peak(isa, case["threads"], data).rounded()}

    def load(self, case: Figures, n_ctx: int) -> None:
        from engine import Context, Model

        self.context = Context(Model.load(case["model"]), n_ctx, n_threads=case["threads"])

    def evaluate(self, ids: list[int]) -> np.ndarray:
        return self.context.evaluate(ids)

    def forget(self) -> None:
        self.context.truncate(0)

    def product(self, case: Figures) -> Round:
        from engine import ops
        from engine.dtypes import BF16
        from engine.graph import Graph
        from engine.kernels import encode_bf16, prefers_pairs
        from engine.tensor import Tensor

        x, w = operands(case)
        graph = Graph(case["threads"])
        graph.pairs = prefers_pairs()
        stored = Tensor.external("w", encode_bf16(w.reshape(-1)), *w.shape, BF16.id)
        graph.keep(ops.linear(graph, Tensor.external("x", x, *x.shape), stored))
        return lambda: repeated(graph.run)

    def training(self, case: Figures) -> Round:
        """The command itself, anew in each round: this process stays small, as children inherit
        the peak of the process that started them."""
        command = [sys.executable, "-m", "engine.tools.finetune", "--model-base", case["model"]]
        command += ["--train-data", str(TEXT), "--checkpoint-in", "", "--checkpoint-out", ""]
        command += ["--lora-out", "", "--batch", str(case["batch"]), "--ctx", str(case["ctx"])]
        command += ["--seed", "1", "--threads", str(case["threads"])]
        command += ["--adam-iter", str(case["iterations"] + 1)]
        command += ["--use-checkpointing" if case["checkpointing"] else "--no-checkpointing"]
        return lambda: of_iterations(*iterations_of(command))

    def start(self, case: Figures) -> Round:
        command = [sys.executable, "-m", "engine.tools.main", "--help"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return lambda: {"seconds": seconds_of(lambda: subprocess.run(command, **quiet))}


def operands(case: Figures) -> tuple[np.ndarray, np.ndarray]:
    """Activations and weights of a product, float32."""
    n_tokens, n_in, n_out = case["shape"]
    rng = np.random.default_rng(1)
    return (
        rng.standard_normal((n_tokens, n_in), np.float32),
        rng.standard_normal((n_out, n_in), np.float32),
    )


def iterations_of(command: list[str]) -> tuple[list[float], resource.struct_rusage]:
    """Run finetune: when each of its lines came, and what it used."""
    stamps = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"iter= *\d+", line):
                stamps.append(perf_counter())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(said.read().strip() or f"status {process.returncode}")
    return stamps, usage


class LlamaCpp(Inference):
    def load(self, case: Figures, n_ctx: int) -> None:
        """Keep the faster of its two ways of attention."""
        import llama_cpp

        def timed(flash: bool) -> tuple[float, Any]:
            self.llama = llama_cpp.Llama(
                case["model"],
                n_ctx=n_ctx,
                n_threads=case["threads"],
                n_threads_batch=case["threads"],
                flash_attn=flash,
                verbose=False,
            )
            ids = token_ids(n_ctx if case["kind"] == "prompt" else N_SHORT)
            self.evaluate(ids[:N_WARM])
            self.forget()
            return seconds_of(lambda: self.evaluate(ids)), self.llama

        self.llama = min((timed(flash) for flash in (False, True)), key=lambda pair: pair[0])[1]

    def evaluate(self, ids: list[int]) -> np.ndarray:
        import llama_cpp

        self.llama.eval(ids)
        pointer = llama_cpp.llama_get_logits(self.llama.ctx)
        return np.ctypeslib.as_array(pointer, (self.llama.n_vocab(),))

    def forget(self) -> None:
        self.llama.reset()


class Torch(Inference):
    def load(self, case: Figures, n_ctx: int) -> None:
        import torch

        torch.set_num_threads(case["threads"])
        self.model = torch_model(case["model"]).eval()
        self.forget()

    def evaluate(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(
                torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        self.cache = out.past_key_values
        return out.logits[0, -1].float().numpy()

    def forget(self) -> None:
        self.cache = None

    def product(self, case: Figures) -> Round:
        import torch

        torch.set_num_threads(case["threads"])
        x, w = (torch.from_numpy(a).bfloat16() for a in operands(case))

        def run() -> None:
            with torch.inference_mode():
                torch.nn.functional.linear(x, w)

        return lambda: repeated(run)

    def training(self, case: Figures) -> Round:
        """Adapters of rank 4 on the linear layers, by PEFT; the weights bf16, AdamW."""
        import torch
        from peft import LoraConfig, get_peft_model

        torch.set_num_threads(case["threads"])
        base = torch_model(case["model"])
        if case["checkpointing"]:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
            base.config.use_cache = False
        names = sorted({name.rsplit(".", 1)[1] for name in LAYER_NAMES.values() if "_proj" in name})
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=names)).train()
        adapters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-3)
        n = case["batch"] * case["ctx"]
        ids = torch.tensor(token_ids(n)).reshape(case["batch"], case["ctx"])

        def iteration() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def run() -> Figures:
            stamps = list(iterate(iteration, case["iterations"]))
            return of_iterations(stamps, resource.getrusage(resource.RUSAGE_SELF))

        return run


def iterate(iteration: Callable[[], None], n: int) -> Iterator[float]:
    """Times before, between and after `n` iterations that count, and one that does not."""
    yield perf_counter()
    for _ in range(n + 1):
        iteration()
        yield perf_counter()


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def publishers_name(name: str) -> str:
    """Name of a tensor in the publishers' form."""
    ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.removesuffix(".weight").split(".")
    if parts[0] in ends:
        return f"{ends[parts[0]]}.weight"
    return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"


def publishers_rows(rows: Any, n_head: int) -> Any:
    """Rows of a query or key projection in the publishers' order: halves of a head, not pairs."""
    n_out, n_in = rows.shape
    return rows.reshape(n_head, n_out // n_head // 2, 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)


def torch_model(path: str) -> Any:
    """The same numbers as a model of transformers, its weights bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from engine.gguf import read_gguf

    file = read_gguf(path)

    def value(key: str) -> Any:
        return file.metadata[f"llama.{key}"]

    heads = {"attn_q": value("attention.head_count"), "attn_k": value("attention.head_count_kv")}
    state = {}
    for name, info in file.tensors.items():
        stored = {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype.name]
        # Not from the map: its pages would count as memory of the process.
        raw = np.fromfile(path, np.uint8, info.n_bytes, offset=info.offset)
        tensor = torch.from_numpy(raw).view(stored).reshape(info.shape)
        n_head = heads.get(name.split(".")[-2])
        if n_head:
            tensor = publishers_rows(tensor, n_head)
        state[publishers_name(name)] = tensor.bfloat16()
    tied = "lm_head.weight" not in state
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        vocab_size=len(state["model.embed_tokens.weight"]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=file.metadata.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


ENGINES = {"ours": Ours, "llama.cpp": LlamaCpp, "torch": Torch}


def main() -> None:
    """Prepare, then a round for each line read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    case = json.loads(sys.argv[2])
    run = getattr(ENGINES[sys.argv[1]](), case["kind"])(case)
    warm_up = run() if case["kind"] in ("prompt", "product", "peak") else {}
    print(json.dumps(warm_up), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(run()), file=answers, flush=True)


if __name__ == "__main__":
    main()
