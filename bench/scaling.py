"""The tables of docs/scaling.md, from a cost model and the figures that it starts from.

``python -m bench.scaling`` writes them between the markers; run by ``make docs``. Where a figure is
measured it comes from ``bench/results/*.json``; what is assumed stands in this file, by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bench.report import figure, title
from bench.results import Result, read_results

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RANK = 4
GIGABITS = (1, 10, 100)
HOSTS = (1, 2, 4, 8, 16, 32, 64)
MESSAGE_SECONDS = 50e-6  # assumed: a message between two hosts over TCP, whatever its size
LINK_SHARE = 0.9  # assumed: what of a link's bits carries payload

# Assumed of machines for prediction.
CACHE_LINE_SECONDS = 60e-9  # a cache line from one core to another
CORES = ((2, 20e9), (8, 60e9), (32, 200e9), (64, 400e9))  # cores, bytes a second from memory


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `bits` is what a stored weight takes."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_kv: int
    n_vocab: int
    bits: float
    tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's matrices."""
        attention = 2 * self.n_embd * self.n_embd + 2 * self.n_embd * self.n_kv
        return attention + 3 * self.n_embd * self.n_ff

    @property
    def head_weights(self) -> int:
        """Weights of the output."""
        return self.n_vocab * self.n_embd

    @property
    def n_parameters(self) -> int:
        """Parameters of adapters at every tensor: rank 4, norms 1, as by default."""
        e, f, kv = self.n_embd, self.n_ff, self.n_kv
        layer = RANK * (2 * (e + e) + 2 * (e + kv) + 3 * (e + f)) + 2 * (e + 1)
        return self.n_layer * layer + 2 * RANK * (e + self.n_vocab) + e + 1

    @property
    def stored_bytes(self) -> float:
        """Bytes of weights that a token meets."""
        return (self.n_layer * self.layer_weights + self.head_weights) * self.bits / 8

    def flops(self, n_tokens: int, *, checkpointing: bool = True) -> float:
        """Multiplications and additions of an iteration: forth, back, and the layers again."""
        times = 3 if checkpointing else 2
        weights = times * self.n_layer * self.layer_weights + 2 * self.head_weights
        return 2.0 * n_tokens * weights


SMOL = Shape("SmolLM2-135M", 30, 576, 1536, 192, 49152, 4.5, tied=True)
SHAPES = (
    Shape("3B (OpenLLaMA's shape)", 26, 3200, 8640, 3200, 32000, 8.5),
    Shape("7B (Llama's shape)", 32, 4096, 11008, 4096, 32000, 8.5),
)
MEASURED = "finetune SmolLM2-135M Q4_1, 4 × 64, checkpointing"
MEASURED_TOKENS = 4 * 64
HOST_TOKENS = 4 * 64
FASTER = 32  # hosts with so many times the measured machine's cores


def rate(result: Result) -> float:
    """FLOP/s at which a machine trained in the measured run; 0 where that was not measured."""
    found = [row["ours"] for row in result.get("rows", ()) if row["what"] == MEASURED]
    return SMOL.flops(MEASURED_TOKENS) / found[0] if found else 0.0


def sum_seconds(n_bytes: float, n_hosts: int, gigabits: float) -> float:
    """Time of a ring's all-reduce: each host sends and receives nearly everything twice."""
    if n_hosts == 1:
        return 0.0
    steps = 2 * (n_hosts - 1)
    return steps * (n_bytes / n_hosts / (gigabits * 1e9 / 8 * LINK_SHARE) + MESSAGE_SECONDS)


def iteration_seconds(shape: Shape, n_hosts: int, gigabits: float, rate: float) -> float:
    """Time of an iteration with the same rows on every host.

    The sum of a layer's gradients begins when its reverse pass is over, so all but the part of the
    embedding, which is last, runs beside the reverse pass of the layers below.
    """
    compute = shape.flops(HOST_TOKENS) / rate
    layers = 2 * 2.0 * HOST_TOKENS * shape.n_layer * shape.layer_weights / rate
    last = 4 * RANK * (shape.n_embd + shape.n_vocab)
    beside = sum_seconds(4 * shape.n_parameters - last, n_hosts, gigabits)
    hidden = layers * (shape.n_layer - 1) / shape.n_layer
    return compute + max(0.0, beside - hidden) + sum_seconds(last, n_hosts, gigabits)


def duration(seconds: float) -> str:
    """Write seconds, or milliseconds below one."""
    return f"{figure(seconds)} s" if seconds >= 1 else f"{figure(1000 * seconds)} ms"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write a table whose columns but the first are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def start_table(results: dict[str, Result]) -> str:
    """What was measured, and the speed that follows."""
    rows = []
    for result in results.values():
        speed = rate(result)
        if not speed:
            continue
        cells = [f"{figure(speed / 1e9)} GFLOP/s"]
        for shape in SHAPES:
            alone, many = (iteration_seconds(shape, n, 1, speed) for n in (1, HOSTS[-1]))
            cells += [duration(alone), f"{100 * alone / many:.1f} %"]
        seconds = SMOL.flops(MEASURED_TOKENS) / speed
        rows.append([title(result), f"{figure(seconds)} s", *cells])
    head = ["machine", f"measured: {SMOL.name}", "so it computes at"]
    for shape in SHAPES:
        head += [f"expected: {shape.name}", f"left of it on {HOSTS[-1]} hosts at 1 Gbit/s"]
    return markdown(head, rows)


def sum_table(shape: Shape) -> str:
    """Time of an all-reduce by hosts and links."""
    n_bytes = 4 * shape.n_parameters
    rows = [
        [str(n), *(duration(sum_seconds(n_bytes, n, g)) for g in GIGABITS)] for n in HOSTS if n > 1
    ]
    return markdown(["hosts", *(f"{g} Gbit/s" for g in GIGABITS)], rows)


def efficiency_table(shape: Shape, rate: float) -> str:
    """Seconds of an iteration and the part of them that computes."""
    rows = []
    for n in HOSTS:
        cells = []
        for g in GIGABITS:
            seconds = iteration_seconds(shape, n, g, rate)
            share = iteration_seconds(shape, 1, g, rate) / seconds
            cells.append(f"{duration(seconds)} ({100 * share:.0f} %)")
        rows.append([str(n), str(n * HOST_TOKENS), *cells])
    return markdown(["hosts", "tokens", *(f"{g} Gbit/s" for g in GIGABITS)], rows)


def barriers(shape: Shape) -> int:
    """Barriers of a token: behind each op of a layer that all workers must see, and the head's.

    Norm, projections, rotation and store, attention, output, sum; norm, gate and up, their
    product, down, sum.
    """
    return 11 * shape.n_layer + 3


def core_table(shape: Shape) -> str:
    """A token's time by what bounds it."""
    rows = []
    for cores, speed in CORES:
        reading = shape.stored_bytes / speed
        waiting = barriers(shape) * cores * CACHE_LINE_SECONDS
        cells = [duration(reading), duration(waiting)]
        at_most = f"{figure(1 / (reading + waiting))} tokens/s"
        rows.append([str(cores), f"{speed / 1e9:.0f} GB/s", *cells, at_most])
    return markdown(["cores", "memory", "reading weights", "barriers", "at most"], rows)


def tables(results: dict[str, Result]) -> dict[str, str]:
    """Every table of the page, by the name in its markers."""
    fast = FASTER * max(rate(result) for result in results.values())
    made = {"start": start_table(results)}
    for key, shape in zip(("3B", "7B"), SHAPES, strict=True):
        n = shape.n_parameters
        head = f"{shape.name}: {n:,} parameters of adapters, {figure(4 * n / 1e6)} MB to sum.\n\n"
        made[f"sum {key}"] = head + sum_table(shape)
        head = f"{shape.name} on hosts of {figure(fast / 1e12)} TFLOP/s:\n\n"
        made[f"fast {key}"] = head + efficiency_table(shape, fast)
    for key, shape in {"small": SMOL, "large": SHAPES[1]}.items():
        made[f"cores {key}"] = f"{shape.name}, {shape.bits:g} bits a weight:\n\n{core_table(shape)}"
    return made


def with_tables(page: str, made: dict[str, str]) -> str:
    """Replace what stands between each table's markers.

    Raises
    ------
    ValueError
        If a table has no place in the page.
    """
    for name, content in made.items():
        begin, end = f"<!-- {name}: begin, written by bench/scaling.py -->", f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{PAGE.name}: no place for the table {begin}")
        page = pattern.sub(lambda _, text=f"{begin}\n{content}\n{end}": text, page)
    return page


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), tables(read_results())), "utf-8")


if __name__ == "__main__":
    main()
