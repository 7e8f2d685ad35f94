"""A publisher's folder: its JSON files, and the shards that hold its tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import EngineError, FormatError
from engine.safetensors import Entry, parse_json, read_entries

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the folder: the file that holds it, and its place there."""

    path: Path
    entry: Entry


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises
    ------
    FormatError, EngineError
        If the file is no JSON object, or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(content, str(path))


def read_sources(folder: Path) -> dict[str, Source]:
    """Find every tensor of a model, whole or in shards, by its published name.

    Raises
    ------
    FormatError
        If a shard is missing, the index and the shards disagree, or a file is not sound.
    """
    index = folder / INDEX
    places = _read_index(index) if index.exists() else {}
    files = sorted(set(places.values())) if places else _list_files(folder)
    found: dict[str, Source] = {}
    for name in files:
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{path}: is missing, {INDEX} names it; download the folder again")
        for tensor, entry in read_entries(path).items():
            if tensor in found:
                first = found[tensor].path.name
                raise FormatError(f"{path}: tensor {tensor}: is in {first} too; download it again")
            found[tensor] = Source(path, entry)
    for tensor, name in places.items():
        if tensor not in found or found[tensor].path.name != name:
            raise FormatError(
                f"{index}: tensor {tensor}: is not in {name}, which should hold it; "
                "download the folder again"
            )
    return found


def _read_index(path: Path) -> dict[str, str]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError(f"{path}: has no weight_map; download it again")
    for tensor, name in places.items():
        # A name with a folder in it could lead anywhere.
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise FormatError(f"{path}: tensor {tensor[:80]!r}: {str(name)[:80]!r} names no file")
    return places


def _list_files(folder: Path) -> list[str]:
    """Files without an index: one, or a set of shards that say how many they are."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    shards = [m for p in folder.glob("model-*.safetensors") if (m := _SHARD.fullmatch(p.name))]
    if not shards:
        pickled = next(folder.glob("pytorch_model*.bin"), None)
        mend = (
            f"{pickled.name} holds pickled weights, save them as safetensors first"
            if pickled
            else "give the folder of a model as its publisher made it"
        )
        raise EngineError(f"{folder}: has no model.safetensors; {mend}")
    count = int(shards[0][2])
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name in names:
        if not (folder / name).is_file():
            raise FormatError(f"{folder / name}: is missing; download the folder again")
    return names
