"""What was measured, in a file a kind of machine: ``bench/results/<maker>-<best variant>.json``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def processor() -> str:
    """Name of the processor as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def last_level_cache() -> int:
    """Bytes of the largest cache, which a virtual machine may share with others; 0 if unknown."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=0)


def machine() -> Result:
    """Describe the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "last-level cache MB": last_level_cache() >> 20,
        "memory GB": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def machine_kind(isa: str) -> str:
    """Short name of the kind of machine: maker and best variant."""
    text = Path("/proc/cpuinfo").read_text()
    maker = "amd" if "AuthenticAMD" in text else "intel" if "GenuineIntel" in text else "other"
    return f"{maker}-{isa}"


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """Results by kind of machine, sorted by name."""
    files = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text("utf-8")) for path in files}


def merged(old: Sequence[Result], new: Sequence[Result], names: Sequence[str]) -> list[Result]:
    """Rows of both, the new ones instead of old ones of their name and threads, ordered by `names`.

    Rows whose name is not among `names` are left out.
    """
    rows = {(row["what"], row["threads"]): row for row in [*old, *new] if row["what"] in names}
    return [rows[key] for key in sorted(rows, key=lambda k: (names.index(k[0]), -k[1]))]


def keep(isa: str, part: Result, folder: Path = RESULTS) -> Path:
    """Replace the keys of `part` in the file of this kind of machine, and describe the machine."""
    target = folder / f"{machine_kind(isa)}.json"
    found = json.loads(target.read_text("utf-8")) if target.exists() else {}
    content = {**found, "machine": machine(), "isa": isa, **part}
    target.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return target
