"""A run's figures as files: a table with a row an evaluation, and its loss curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, TextIO

from engine.errors import EngineError, OptionError
from engine.gguf import atomic_write
from engine.training.report import EvaluationReport

COLUMNS = (
    "iteration",
    "samples",
    "tokens",
    "learning_rate",
    "loss",
    "validation_loss",
    "gradient_norm",
    "tokens_per_second",
    "seconds",
)
PLOT_FORMATS = ("svg", "png")


class CsvLog:
    """Writes a row for each evaluation, at once.

    A run that goes on with a checkpoint goes on with the table too: rows of earlier iterations
    stay, and the seconds are counted from theirs.

    Parameters
    ----------
    path : str
    learning_rate : float
        The schedule's factor times this is what a row tells.
    iteration : int
        At which the run begins.

    Raises
    ------
    EngineError
        If the file cannot be written.
    """

    def __init__(self, path: str, learning_rate: float, iteration: int) -> None:
        self.path = path
        self._learning_rate = learning_rate
        kept = _rows_before(path, iteration) if iteration > 0 else []
        self._seconds = float(kept[-1][-1]) if kept else 0.0
        try:
            with atomic_write(path) as out:
                rows = [",".join(row) for row in (COLUMNS, *kept)]
                out.write(("\n".join(rows) + "\n").encode())
            self._file: TextIO = open(path, "a", newline="", buffering=1)
        except OSError as error:
            raise EngineError(f"{path}: cannot be written: {error.strerror}") from error
        self._writer = csv.writer(self._file, lineterminator="\n")

    def add(self, report: EvaluationReport) -> None:
        """Write a row.

        Raises
        ------
        EngineError
            If the disk is full, for one.
        """
        validation = report.validation_loss
        row = (
            report.iteration,
            report.samples,
            report.tokens,
            f"{self._learning_rate * report.sched:.9g}",
            f"{report.loss:.9g}",
            "" if validation is None else f"{validation:.9g}",
            f"{report.gradient_norm:.9g}",
            f"{report.tokens_per_second:.1f}",
            f"{self._seconds + report.elapsed_ms / 1000:.3f}",
        )
        try:
            self._writer.writerow(row)
        except OSError as error:
            raise EngineError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Close the file; every row is in it already."""
        try:
            self._file.close()
        except OSError:
            pass


def _rows_before(path: str, iteration: int) -> list[list[str]]:
    """Rows of an earlier table that are before an iteration; none of a table of another kind."""
    try:
        with open(path, newline="") as file:
            head, *rows = [*csv.reader(file)] or [[]]
    except (OSError, ValueError, csv.Error):
        return []
    if tuple(head) != COLUMNS:
        return []
    whole = [row for row in rows if len(row) == len(COLUMNS) and row[0].isdecimal()]
    return [row for row in whole if int(row[0]) < iteration]


class LossCurves:
    """Collects losses and draws them.

    Parameters
    ----------
    path : str
        Ends in .svg or .png.

    Raises
    ------
    OptionError
        If it ends in something else, or matplotlib is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._format = Path(path).suffix[1:].lower()
        if self._format not in PLOT_FORMATS:
            raise OptionError(f"--plot: {path}: the name must end in .svg or .png")
        if find_spec("matplotlib") is None:
            raise OptionError("--plot: needs matplotlib: pip install 'cylora[plot]'")
        self._losses: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []

    def add(self, report: EvaluationReport) -> None:
        """Take an evaluation's losses."""
        self._losses.append((report.iteration, report.loss))
        if report.validation_loss is not None:
            self._validation.append((report.iteration, report.validation_loss))

    def write(self) -> None:
        """Draw what was collected, if anything was.

        Raises
        ------
        EngineError
            If the file cannot be written.
        """
        if not self._losses:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        _curve(axes, self._losses, label="training", linewidth=1)
        if self._validation:
            _curve(axes, self._validation, label="validation", marker="o", markersize=3)
            axes.legend()
        axes.set_xlabel("iteration")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.3)
        drawn = BytesIO()
        figure.savefig(drawn, format=self._format)
        with atomic_write(self.path) as out:
            out.write(drawn.getvalue())


def _curve(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    axes.plot(*zip(*points, strict=True), **style)
