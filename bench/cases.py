"""What is compared: a row each, with what must be reached, and the arithmetic of the table.

A target was set on one of two machines whose peaks are in REFERENCE. Elsewhere it moves with the
peak that bounds the work, so that a slower machine is not blamed and a faster one not praised.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.peaks import Peak

# Zen 4, and a Xeon with AMX; two threads each.
REFERENCE = {"amd": Peak(234, 469, 0, 47.7), "intel": Peak(494, 245, 7500, 29.8)}
ONEDNN = 1.15  # on tiles, a product's target is this many times PyTorch's rate in the same run

LESS_IS_BETTER = {"s", "s/iter", "MB"}
UNITS = {"prompt": "tokens/s", "generation": "tokens/s", "product": "GFLOP/s", "start": "s"}
UNITS["training"] = "s/iter"
# What needs no more than a few minutes with one thread, and shows how the engine scales.
SCALING = {"prompt", "generation", "product"}

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A thing to measure.

    Attributes
    ----------
    what : str
        Name of the row.
    kind : str
        Method of an engine in bench/engines.py.
    args : dict
        What it is told.
    model : str
        Of bench/models.py.
    peers : tuple of str
        Engines that can do it.
    targets : dict
        By machine of REFERENCE; of a product, the part of the best vector unit's peak.
    memory : float, optional
        MB that training may take.
    bound : str
        Attribute of `Peak` that targets scale with; empty: they do not.
    """

    what: str
    kind: str
    args: Mapping[str, Any]
    model: str = ""
    peers: tuple[str, ...] = ()
    targets: Mapping[str, float] = field(default_factory=dict)
    memory: float | None = None
    bound: str = "best"


def _inference(name: str, model: str, peers: tuple[str, ...], rows: Sequence[Any]) -> list[Case]:
    cases = []
    for kind, tokens, amd, intel in rows:
        targets = {"amd": amd, "intel": intel}
        what = f"{name}, {'prompt of ' if kind == 'prompt' else 'generation of '}{tokens}"
        bound = "best" if kind == "prompt" else "reads"
        args = {"tokens": tokens}
        cases.append(Case(what, kind, args, model, peers, targets, bound=bound))
    return cases


def _training(
    name: str,
    model: str,
    shape: tuple[int, int],
    iterations: int,
    *,
    checkpointing: bool,
    memory: float | None = None,
    peers: tuple[str, ...] = ("torch",),
    **targets: float,
) -> Case:
    n_batch, n_ctx = shape
    what = f"finetune {name}, {n_batch} × {n_ctx}{', checkpointing' if checkpointing else ''}"
    args = {
        "batch": n_batch,
        "ctx": n_ctx,
        "iterations": iterations,
        "checkpointing": checkpointing,
    }
    return Case(what, "training", args, model, peers, targets, memory)


def _product(tokens: int, n_in: int, n_out: int, part: float) -> Case:
    what = f"product of {tokens} tokens, {n_in} to {n_out}, BF16"
    targets = {"amd": part}
    return Case(what, "product", {"shape": (tokens, n_in, n_out)}, "", ("torch",), targets)


BOTH = ("llama.cpp", "torch")
SMOL = "SmolLM2-135M BF16"
CASES = [
    Case("main --help", "start", {}, targets={"amd": 0.3, "intel": 0.3}, bound=""),
    *_inference(
        "TinyLlama-1.1B BF16",
        "tinyllama-bf16",
        BOTH,
        [("prompt", 512, 200, 900), ("generation", 128, 22, 13.3)],
    ),
    *_inference(
        SMOL,
        "smollm2-bf16",
        BOTH,
        [
            ("prompt", 512, 1550, 5000),
            ("prompt", 2048, 1150, 4500),
            ("generation", 128, 155, 105),
        ],
    ),
    *_inference(
        "SmolLM2-135M Q4_1",
        "smollm2-q4_1",
        ("llama.cpp",),
        [("prompt", 512, 1550, 4500), ("generation", 128, 330, 400)],
    ),
    _training("SmolLM2-135M Q4_1", "smollm2-q4_1", (4, 64), 8, checkpointing=True, peers=()),
    _training(SMOL, "smollm2-bf16", (4, 64), 8, checkpointing=False, amd=0.45, intel=0.25),
    _training(
        SMOL, "smollm2-bf16", (4, 64), 8, checkpointing=True, memory=450, amd=0.58, intel=0.32
    ),
    _training(SMOL, "smollm2-bf16", (8, 512), 2, checkpointing=False, amd=7, intel=3.2),
    _training(SMOL, "smollm2-bf16", (8, 512), 2, checkpointing=True, memory=1600),
    _training(
        "OpenLLaMA-3B Q8_0",
        "openllama-3b-q8_0",
        (4, 64),
        2,
        checkpointing=True,
        memory=4600,
        peers=(),
        amd=15,
        intel=5,
    ),
    _product(512, 2048, 5632, 0.9),
    _product(512, 576, 1536, 0.85),
    _product(256, 576, 49152, 0.85),
    _product(512, 5632, 2048, 0.9),
    _product(32, 2048, 5632, 0.85),
]


def row_names() -> list[str]:
    """Names of every row that the cases can give, in order."""
    names = []
    for case in CASES:
        names += [case.what, f"{case.what}, memory"] if case.kind == "training" else [case.what]
    return names


def quick(case: Case) -> Case:
    """Shrink a case to a few seconds, to see whether the comparison itself works."""
    least = {"tokens": 32, "iterations": 1, "batch": 2, "ctx": 32}
    args = {name: min(value, least.get(name, value)) for name, value in case.args.items()}
    if args == case.args:
        return case
    return replace(case, args=args, targets={}, memory=None)  # targets are of the whole work


def rate(case: Case, seconds: float) -> float:
    """Turn a round's seconds into the row's unit."""
    if case.kind == "product":
        tokens, n_in, n_out = case.args["shape"]
        return 2 * tokens * n_in * n_out / seconds / 1e9
    return case.args["tokens"] / seconds if "tokens" in case.args else seconds


def ratio(unit: str, ours: float, other: float) -> float:
    """How many times better ours is: above 1 is better, whatever the unit."""
    return other / ours if unit in LESS_IS_BETTER else ours / other


def target(case: Case, peak: Peak, peers: Mapping[str, float]) -> float | None:
    """What must be reached with these peaks; None where nothing was set.

    Parameters
    ----------
    case : Case
    peak : Peak
        Measured in the run, by as many threads.
    peers : dict
        The row's figures by peer.
    """
    if case.kind == "product":
        onednn = [value for name, value in peers.items() if name.startswith("torch")]
        if not peak.tiles:
            return case.targets["amd"] * peak.vector
        return ONEDNN * onednn[0] if onednn else None
    machine = "intel" if peak.tiles else "amd"
    if machine not in case.targets or not case.bound:
        return case.targets.get(machine)
    speed = getattr(peak, case.bound) / getattr(REFERENCE[machine], case.bound)
    then = case.targets[machine]
    return then / speed if UNITS[case.kind] in LESS_IS_BETTER else then * speed


def rows_of(
    case: Case, n_threads: int, peak: Peak, rounds: Mapping[str, Sequence[Figures]]
) -> list[dict[str, Any]]:
    """Make the rows of a case: medians of the rounds of "ours" and of each peer."""
    values = {
        name: rate(case, statistics.median(one["seconds"] for one in figures))
        for name, figures in rounds.items()
    }
    ours = values.pop("ours")
    row = _row(case.what, n_threads, UNITS[case.kind], ours, values, target(case, peak, values))
    if case.kind == "product":
        row["of peak"] = round(ours / peak.best, 3)
    if case.kind != "training":
        return [row]
    memory = {name: max(one["megabytes"] for one in figures) for name, figures in rounds.items()}
    ours = memory.pop("ours")
    return [row, _row(f"{case.what}, memory", n_threads, "MB", ours, memory, case.memory)]


def _row(
    what: str,
    n_threads: int,
    unit: str,
    ours: float,
    peers: Mapping[str, float],
    wanted: float | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "what": what,
        "threads": n_threads,
        "unit": unit,
        "ours": significant(ours),
        "peers": {
            name: {"value": significant(value), "ratio": round(ratio(unit, ours, value), 2)}
            for name, value in peers.items()
        },
    }
    if wanted is not None:
        found = {"value": significant(wanted), "ratio": round(ratio(unit, ours, wanted), 2)}
        row["target"] = found
    return row


def significant(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def agree(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two engines' logits are those of one model: their correlation is nearly 1."""
    return statistics.correlation(a, b) > 0.99
