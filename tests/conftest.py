"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data_dir() -> Path:
    """Folder of recorded files."""
    return DATA


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded generator; the seed is printed, and ENGINE_TEST_SEED repeats it."""
    seed = int(os.environ.get("ENGINE_TEST_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
    print(f"ENGINE_TEST_SEED={seed}")
    return np.random.default_rng(seed)
