"""The README's table of figures, made from ``bench/results/*.json``: one column a kind of machine.

``python bench/report.py`` writes it between the two markers in README.md; run by ``make docs``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
BEGIN = "<!-- figures: begin, written by bench/report.py -->"
END = "<!-- figures: end -->"

Result = dict[str, Any]


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Results by kind of machine, sorted by name."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in files}


def figure(value: float) -> str:
    """Three significant digits, and never an exponent."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def table(results: dict[str, Result]) -> str:
    """Make the table: a row for each thing measured, in the order in which it was first met.

    Returns
    -------
    str
        Markdown without a line break at its end.
    """
    if not results:
        return "Nothing has been measured yet: `make bench` does it."
    names = list(dict.fromkeys(row["what"] for r in results.values() for row in r["rows"]))
    heads = [f"{r['processor']}, {r['threads']} threads, {r['isa']}" for r in results.values()]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for name in names:
        cells = []
        for result in results.values():
            found = next((row for row in result["rows"] if row["what"] == name), None)
            cells.append(f"{figure(found['value'])} {found['unit']}" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str, content: str) -> str:
    """Replace what stands between the markers.

    Raises
    ------
    ValueError
        If a marker is missing, or they stand in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: the lines {BEGIN!r} and {END!r} are needed, in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> int:
    """Write the table into the README."""
    try:
        text = with_table(README.read_text("utf-8"), table(read_results()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    README.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
