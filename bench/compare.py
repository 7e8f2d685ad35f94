"""Ours and its peers on the same models, one round each in turn: ``python -m bench.compare``.

Each engine is a process of its own that keeps its model and waits while others work. Medians of
the rounds, ratios and targets are printed and kept in ``bench/results/``. A peer is whatever an
interpreter has: llama-cpp-python; PyTorch with transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bench.cases import CASES, SCALING, Case, agree, quick, row_names, rows_of
from bench.peaks import THREADS, Peak
from bench.report import against, figure, threads_text
from bench.results import keep, machine, machine_kind, merged, read_results

ROOT = Path(__file__).parents[1]
# NumPy's threads, which have nothing to do here, would go on spinning.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
PAUSE = 0.3  # seconds: threads of the engine before may still spin, waiting for work
PACKAGES = ("llama_cpp_python", "torch", "transformers", "peft")
# The package of torch's surroundings that a kind of case needs.
NEEDS = {"prompt": "transformers", "generation": "transformers", "training": "peft"}
LIST_VERSIONS = """
import importlib.metadata, json
found = {}
for name in %r:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Peer:
    """An engine of bench/engines.py in an interpreter that has its packages."""

    engine: str
    python: str
    versions: Mapping[str, str]

    @property
    def label(self) -> str:
        name = {"llama.cpp": "llama_cpp_python", "torch": "torch"}[self.engine]
        return f"{name.replace('_', '-')} {self.versions[name].partition('+')[0]}"

    def can(self, case: Case) -> bool:
        return self.engine in case.peers and (
            self.engine != "torch" or NEEDS.get(case.kind, "torch") in self.versions
        )


def find_peers(pythons: Sequence[str]) -> list[Peer]:
    """Look what the interpreters have; the first one counts where two have the same version."""
    peers: dict[str, Peer] = {}
    for python in pythons:
        command = [python, "-c", LIST_VERSIONS % (PACKAGES,)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        versions = json.loads(said)
        for engine, package in (("llama.cpp", "llama_cpp_python"), ("torch", "torch")):
            if package in versions:
                peer = Peer(engine, python, versions)
                peers.setdefault(peer.label, peer)
    return list(peers.values())


class Failed(Exception):
    """A process ended; its text is the last line that it said."""


class Child:
    """An engine with a case, ready to do rounds; made by `started`."""

    def __init__(self, process: subprocess.Popen[str], said: IO[str]) -> None:
        self._process = process
        self._said = said
        self.first = self._answer()

    def round(self) -> dict[str, Any]:
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Failed(f"ended with status {self._process.wait()}") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        raise Failed(lines[-1] if lines else f"ended with status {status}")


@contextmanager
def started(engine: str, python: str, case: Mapping[str, Any]) -> Iterator[Child]:
    """Give a child that has warmed up; it ends with the block.

    Raises
    ------
    Failed
        If it ends before it is ready; so does `Child.round`, if it ends later.
    """
    with (
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            [python, "-m", "bench.engines", engine, json.dumps(case)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        try:
            yield Child(process, said)
        finally:
            process.kill()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Gauge:
    """The machine's peaks, taken in each round: a machine that others share is never the same.

    Measured by a child, for memory that this process once had would count as theirs.
    """

    def __init__(self, child: Child) -> None:
        self._child = child
        self.isa: str = child.first["isa"]
        self.found = [child.first["peak"]]

    def round(self) -> None:
        self.found.append(self._child.round()["peak"])

    def median(self, since: int = 0) -> Peak:
        """Peaks of all rounds, or of those since so many were measured."""
        some = self.found[since:]
        return Peak(**{unit: statistics.median(one[unit] for one in some) for unit in some[0]})


def model_path(name: str) -> str:
    """Path of a model, made in a process of its own if need be."""
    command = [sys.executable, "-m", "bench.models", name]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    if run.returncode:
        raise Failed(run.stderr.strip().rpartition("\n")[2])
    return run.stdout.strip()


def alternate(
    case: Case, n_threads: int, peers: Sequence[Peer], n_rounds: int, gauge: Gauge
) -> dict[str, list[dict[str, Any]]]:
    """Figures of each round by engine; peaks go to the gauge, a peer that fails is left out."""
    told = {**case.args, "kind": case.kind, "threads": n_threads}
    if case.model:
        told["model"] = model_path(case.model)
    with ExitStack() as stack:
        children = {"ours": stack.enter_context(started("ours", sys.executable, told))}
        for peer in peers:
            try:
                child = started(peer.engine, peer.python, told)
                children[peer.label] = stack.enter_context(child)
            except Failed as error:
                note(f"skipped: {peer.label}: {case.what}: {error}")
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
        for _ in range(n_rounds):
            gauge.round()
            for name, child in children.items():
                figures[name].append(child.round())
    return figures


def warn_of_others(case: Case, figures: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Say which peer does not compute the same model."""
    ours = figures["ours"][0].get("logits")
    for name, rounds in figures.items():
        if ours is not None and not agree(ours, rounds[0]["logits"]):
            note(f"warning: {name}: {case.what}: its logits are those of another model")


def line_of(row: Mapping[str, Any]) -> str:
    """One row as it comes."""
    found = {**row["peers"], **({"target": row["target"]} if "target" in row else {})}
    parts = [f"{name} {against(other)}" for name, other in found.items()]
    ours = f"{row['what']}, {threads_text(row['threads'])}: {figure(row['ours'])} {row['unit']}"
    return "; ".join([ours, *parts])


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns for people: ours, each peer and the target with how many times better ours is."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [["", "threads", "ours", "", *names, "target", "of peak"]]
    for row in rows:
        peers = [against(row["peers"][name]) if name in row["peers"] else "" for name in names]
        wanted = against(row["target"]) if "target" in row else ""
        part = f"{100 * row['of peak']:.0f} %" if "of peak" in row else ""
        ours = [figure(row["ours"]), row["unit"]]
        lines.append([row["what"], str(row["threads"]), *ours, *peers, wanted, part])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = {0, 3}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def run_cases(
    options: argparse.Namespace,
    n_threads: int,
    peers: Sequence[Peer],
    gauge: Gauge,
    result: dict[str, Any],
) -> bool:
    """Measure the chosen cases with so many threads into `result`; whether none of ours failed."""
    whole = True
    first = n_threads == options.threads[0]
    for case in CASES:
        if not re.search(options.only, case.what) or not (first or case.kind in SCALING):
            continue
        small = quick(case) if options.quick else case
        able = [peer for peer in peers if first and peer.can(case)]
        before = len(gauge.found)
        try:
            figures = alternate(small, n_threads, able, options.rounds, gauge)
        except Failed as error:
            note(f"failed: {case.what}: {error}")
            whole = False
            continue
        warn_of_others(case, figures)
        rows = rows_of(small, n_threads, gauge.median(before), figures)
        print("\n".join(map(line_of, rows)), flush=True)
        result["rows"] += rows
        result["peaks"][threads_text(n_threads)] = gauge.median().rounded()
        if not options.quick:
            kept(result)
    return whole


def compare(options: argparse.Namespace, peers: Sequence[Peer]) -> tuple[dict[str, Any], bool]:
    """Measure the chosen cases with each count of threads; peers with the first.

    Each case's rows are printed, and kept unless the run is a quick one, before the next begins.

    Returns
    -------
    result : dict
        What is kept.
    whole : bool
        Whether no case of ours failed.
    """
    result: dict[str, Any] = {"peaks": {}, "rows": []}
    whole = True
    for n_threads in options.threads:
        told = {"kind": "peak", "threads": n_threads}
        with started("ours", sys.executable, told) as child:
            gauge = Gauge(child)
            result["isa"] = gauge.isa
            result["peaks"][threads_text(n_threads)] = gauge.median().rounded()
            print(f"{threads_text(n_threads)}, kernels {gauge.isa}: {gauge.median()}", flush=True)
            whole = run_cases(options, n_threads, peers, gauge, result) and whole
    return result, whole


def kept(result: dict[str, Any]) -> Path:
    """Put the rows among those kept of this kind of machine."""
    found = read_results().get(machine_kind(result["isa"]), {})
    rows = merged(found.get("rows", ()), result["rows"], row_names())
    peaks = found.get("peaks", {}) | result["peaks"]
    return keep(result["isa"], {"peaks": peaks, "rows": rows})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--python", action="append", default=[], metavar="PATH",
        help="interpreter that has peers; may be given again (default: this one)")  # fmt: skip
    add("--only", default="", metavar="REGEX", help="only rows whose name has a match")
    add("--rounds", type=int, default=3, metavar="N", help="rounds of each engine (default 3)")
    add("--threads", default=f"{THREADS},1", metavar="N,...",
        type=lambda text: list(dict.fromkeys(int(part) for part in text.split(","))),
        help=f"peers run with the first count (default {THREADS},1)")  # fmt: skip
    add("--quick", action="store_true", help="tiny sizes, one round, nothing kept: does it work?")
    add("--json", metavar="PATH", help="write the figures there too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    return options


def main() -> int:
    """Compare, print, keep."""
    options = parse()
    description = machine()
    print(", ".join(f"{key}: {value}" for key, value in description.items()))
    load = os.getloadavg()[0]
    if load > 0.5:
        note(f"warning: others work on this machine (load {load:.1f}): figures mean little")
    peers = find_peers(options.python or [sys.executable])
    for engine, package in (("llama.cpp", "llama-cpp-python"), ("torch", "PyTorch")):
        if not any(peer.engine == engine for peer in peers):
            note(f"skipped: {package} is not installed; give --python PATH of where it is")
    result, whole = compare(options, peers)
    print("\n" + text_table(result["rows"]))
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": description, **result}, indent=1))
    if not options.quick:
        print(f"kept in bench/results/{machine_kind(result['isa'])}.json")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
