"""Tables of figures, made from ``bench/results/*.json``: columns for each kind of machine.

``python -m bench.report`` writes them between the markers in README.md (the commands with all
threads) and docs/benchmarks.md (everything); run by ``make docs``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.results import Result, read_results

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- figures: begin, written by bench/report.py -->"
END = "<!-- figures: end -->"


def figure(value: float) -> str:
    """Three significant digits, and never an exponent."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def threads_text(n: int) -> str:
    """Count threads."""
    return f"{n} thread{'s' * (n != 1)}"


def against(other: Mapping[str, float]) -> str:
    """Write a peer's or a target's figure, and how many times better ours is."""
    return f"{figure(other['value'])} (× {other['ratio']:.2f})"


def grid(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Make a Markdown table; the first line is its head, the first `left` columns are texts."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def title(result: Result) -> str:
    """Name a machine and how it was used."""
    machine = result["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, {result['isa']}"


def labels(result: Result) -> list[str]:
    """Names of the peers that were there."""
    return list(dict.fromkeys(name for row in result.get("rows", ()) for name in row["peers"]))


def table(results: Mapping[str, Result], *, brief: bool = False) -> str:
    """Make the comparison's table: a row for each thing measured, in the order it was met.

    Parameters
    ----------
    results : dict of results by kind of machine
    brief : bool
        Leave out products, targets, and rows with fewer threads than the machine has cores.

    Returns
    -------
    str
        Markdown without a line break at its end.
    """
    every = [(result, rows_by_name(result, brief)) for result in results.values()]
    every = [(result, rows) for result, rows in every if rows]
    if not every:
        return "Nothing has been measured yet: `make bench` does it."
    head, lines = [""], []
    for result, _ in every:
        head += [title(result), *labels(result)] + ([] if brief else ["target"])
    for name in dict.fromkeys(name for _, rows in every for name in rows):
        cells = [name]
        for result, rows in every:
            row = rows.get(name)
            peers = row["peers"] if row else {}
            wanted = row.get("target") if row else None
            cells.append(f"{figure(row['ours'])} {row['unit']}" if row else "")
            cells += [against(peers[label]) if label in peers else "" for label in labels(result)]
            cells += [] if brief else [against(wanted) if wanted else ""]
        lines.append(cells)
    return grid([head, *lines])


def rows_by_name(result: Result, brief: bool) -> dict[str, Result]:
    """Rows of one machine; those of fewer threads say so in their name."""
    cores = result["machine"]["cores"]
    found = {}
    for row in result.get("rows", ()):
        few = row["threads"] != cores
        if not (brief and (few or row["unit"] == "GFLOP/s")):
            found[row["what"] + f", {threads_text(row['threads'])}" * few] = row
    return found


def kernels_table(result: Result) -> str:
    """Make the table of the kernels of one machine: a column a variant."""
    found: dict[str, dict[str, str]] = {}
    variants = list(dict.fromkeys(kernel["isa"] for kernel in result.get("kernels", ())))
    for kernel in result.get("kernels", ()):
        rates = [f"{figure(kernel[key])} {key}" for key in ("GFLOP/s", "GB/s") if key in kernel]
        rates += [f"{value} {key}" for key, value in kernel.items() if key.startswith("% ")]
        found.setdefault(kernel["what"], {})[kernel["isa"]] = ", ".join(rates)
    lines = [[what, *(cells.get(isa, "") for isa in variants)] for what, cells in found.items()]
    return grid([["", *variants], *lines])


def full_report(results: Mapping[str, Result]) -> str:
    """Everything that was measured: the comparison, then peaks and kernels of each machine."""
    parts = [table(results)]
    for result in results.values():
        machine = ", ".join(f"{key}: {value}" for key, value in result["machine"].items())
        parts.append(f"### {title(result)}\n\n{machine[0].upper()}{machine[1:]}.")
        peaks = result.get("peaks", {})
        if peaks:
            units = list(next(iter(peaks.values())))
            lines = [
                [name, *(figure(peak[unit]) for unit in units)] for name, peak in peaks.items()
            ]
            parts.append(grid([["peaks: GFLOP/s, reads in GB/s", *units], *lines]))
        if result.get("kernels"):
            parts.append(kernels_table(result))
    return "\n\n".join(parts)


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
        raise ValueError(f"the lines {BEGIN!r} and {END!r} are needed, in this order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def documents() -> dict[Path, str]:
    """What the documents should be."""
    results = read_results()
    contents = {
        ROOT / "README.md": table(results, brief=True),
        ROOT / "docs" / "benchmarks.md": full_report(results),
    }
    return {path: with_table(path.read_text("utf-8"), text) for path, text in contents.items()}


def main() -> int:
    """Write the tables."""
    try:
        for path, text in documents().items():
            path.write_text(text, "utf-8")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
