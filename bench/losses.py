"""Losses of one training in bf16 and in float32: ``python -m bench.losses`` runs both.

Takes some minutes, keeps them in docs/losses.csv, draws docs/losses.svg and writes their distance
into docs/bf16.md.
``--draw`` makes figure and text from the kept losses.
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
TABLE, FIGURE, PAGE = (ROOT / "docs" / name for name in ("losses.csv", "losses.svg", "bf16.md"))
COMPUTES = ("f32", "bf16")
COLORS = {"f32": "#1f77b4", "bf16": "#d62728"}
N_ITERATIONS = 200
OPTIONS = [
    "--checkpoint-in", "", "--checkpoint-out", "", "--no-report", "--seed", "1",
    "--batch", "4", "--ctx", "64", "--no-checkpointing", "--adam-alpha", "0.0001", "--warmup", "20",
    "--adam-iter", str(N_ITERATIONS),
]  # fmt: skip
MARKS = ("<!-- losses: begin, written by bench/losses.py -->\n", "<!-- losses: end -->")

# Of the figure, in its units.
WIDTH, LEFT, RIGHT = 760, 56, 744
FONT = 'font-family="sans-serif" font-size="12"'


def train(model: Path, compute: str, folder: Path) -> list[float]:
    """Losses of the command's run, one an iteration."""
    table = folder / f"{compute}.csv"
    command = [sys.executable, "-m", "engine.tools.finetune", "--model-base", str(model)]
    command += ["--train-data", str(ROOT / "tests" / "data" / "play.txt"), *OPTIONS]
    command += ["--lora-out", str(folder / f"{compute}.bin"), "--log-csv", str(table)]
    subprocess.run([*command, "--compute", compute], check=True, stdout=subprocess.DEVNULL)
    with open(table, newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def write_table(path: Path, losses: dict[str, list[float]]) -> None:
    rows = zip(*losses.values(), strict=True)
    lines = [",".join(("iteration", *losses))]
    lines += [f"{i}," + ",".join(f"{loss:.9g}" for loss in row) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n")


def read_table(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = [*csv.DictReader(file)]
    return {compute: np.array([float(row[compute]) for row in rows]) for compute in COMPUTES}


@dataclass(frozen=True)
class Distance:
    """How far losses in bf16 are from those in float32, as parts of the latter."""

    each: np.ndarray

    @classmethod
    def of(cls, losses: dict[str, np.ndarray]) -> Distance:
        return cls(losses["bf16"] / losses["f32"] - 1)

    @property
    def largest(self) -> float:
        return float(np.abs(self.each).max())

    @property
    def mean(self) -> float:
        return float(np.abs(self.each).mean())

    @property
    def mean_signed(self) -> float:
        return float(self.each.mean())


def text(losses: dict[str, np.ndarray]) -> str:
    """What the page says of the losses."""
    distance, f32 = Distance.of(losses), losses["f32"]
    return (
        f"Over {len(f32) - 1} updates the loss falls from {f32[:20].mean():.2f} to"
        f" {f32[-20:].mean():.3f} (means of the first and the last 20\n"
        f"batches). A loss in bf16 is off the float32 one by {100 * distance.mean:.2f} % on average"
        f" and by {100 * distance.largest:.2f} % at most; with the\n"
        f"sign, by {100 * distance.mean_signed:+.3f} % on average.\n"
    )


def panel(
    top: float,
    bottom: float,
    ticks: Sequence[float],
    label: Callable[[float], str],
    title: str,
    lines: dict[str, np.ndarray],
) -> Iterator[str]:
    """A frame, its grid, and a line for each color; the first and last tick are its ends."""
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    for tick in ticks:
        y = place(tick)
        yield f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>'
    yield f'<text x="{LEFT}" y="{top - 8}">{title}</text>'
    for color, values in lines.items():
        step = (RIGHT - LEFT) / (len(values) - 1)
        points = " ".join(f"{LEFT + i * step:.1f},{place(v):.1f}" for i, v in enumerate(values))
        yield f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.2"/>'


def draw(losses: dict[str, np.ndarray]) -> str:
    """Both curves, and below how far one is from the other."""
    n = len(losses["f32"]) - 1
    highest = int(np.ceil(max(values.max() for values in losses.values())))
    curves = {COLORS[compute]: losses[compute] for compute in COMPUTES}
    percent = 100 * Distance.of(losses).each
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 470" {FONT}>',
        f'<rect width="{WIDTH}" height="470" fill="white"/>',
        *panel(30, 270, range(highest + 1), str, "loss", curves),
        *panel(
            310, 430, (-1, -0.5, 0, 0.5, 1), lambda tick: f"{tick:+g} %" if tick else "0",
            "bf16 beside float32", {"#444": percent},
        ),
    ]  # fmt: skip
    for i in range(0, n + 1, 50):
        x = LEFT + (RIGHT - LEFT) * i / n
        parts.append(f'<text x="{x:.1f}" y="448" text-anchor="middle">{i}</text>')
    parts.append('<text x="400" y="464" text-anchor="middle">updates</text>')
    for i, (compute, color) in enumerate(COLORS.items()):
        name = {"f32": "float32", "bf16": "bf16"}[compute]
        parts.append(f'<text x="{640 + 60 * i}" y="22" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def with_text(page: str, made: str) -> str:
    """Replace what stands between the markers."""
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"no place for the losses: {begin}")
    return pattern.sub(lambda _: begin + made + end, page)


def main(arguments: Sequence[str]) -> None:
    """Train unless the kept losses are to be drawn, then write figure and text."""
    if arguments != ["--draw"]:
        from bench.models import find

        model = find("smollm2-bf16")
        with tempfile.TemporaryDirectory() as folder:
            runs = {compute: train(model, compute, Path(folder)) for compute in COMPUTES}
        write_table(TABLE, runs)
    losses = read_table(TABLE)
    FIGURE.write_text(draw(losses))
    PAGE.write_text(with_text(PAGE.read_text("utf-8"), text(losses)), "utf-8")
    print(text(losses), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
