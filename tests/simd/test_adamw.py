"""The optimizer's pass over its parameters, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import reference
from tests.compare import assert_close
from tests.graphs import f32, random

# The optimizer takes the variant in force, so each runs in a process of its own.
SCRIPT = """
import sys
from types import SimpleNamespace
import numpy as np
from engine.training.optimizer import AdamW, AdamWParams
given = np.load(sys.argv[1])
a, b = given["x"][: given["a_size"]], given["x"][given["a_size"] :]
pair = SimpleNamespace(a=a, b=b, n_out=int(given["n_out"]))
adapter = SimpleNamespace(flat=given["x"], pairs={"w": pair})
optimizer = AdamW(adapter, AdamWParams(alpha=1e-2, gclip=float(given["gclip"])))
for iteration, gradient in enumerate(given["g"], 1):
    optimizer.step(gradient, float(given["sched"]), iteration)
    assert (gradient == 0).all()
np.savez(sys.argv[2], x=adapter.flat, m=optimizer.m, v=optimizer.v)
"""


@pytest.mark.parametrize("n_out", [1, 5], ids=["norm", "matrix"])
def test_adamw_agrees_with_float64(
    isa: str, n_out: int, rng: np.random.Generator, tmp_path: Path
) -> None:
    n, a_size, sched, gclip = 77, 33, 0.5, 3.0
    x, gradients = random(rng, n), random(rng, 4, n)
    gradients[3] *= f32(0.01)  # below the clip
    given, out = tmp_path / "given.npz", tmp_path / "out.npz"
    np.savez(given, x=x, g=gradients, a_size=a_size, n_out=n_out, sched=sched, gclip=gclip)
    command = [sys.executable, "-c", SCRIPT, str(given), str(out)]
    subprocess.run(command, env=os.environ | {"ENGINE_ISA": isa}, check=True)
    m = v = np.zeros(n)
    decay = np.full(n, 0.1 * 1e-2 * sched)
    if n_out == 1:
        decay[a_size:] = 0  # a norm's B is one number a rank: it has one dimension
    for iteration, g in enumerate(gradients, 1):
        norm = np.sqrt(reference.sum_squares(g))
        x, m, v = reference.adamw(
            x,
            g,
            m,
            v,
            clip=min(1, gclip / norm),
            beta1=0.9,
            beta2=0.999,
            step=1e-2 * sched / (1 - 0.9**iteration),
            correction=1 / (1 - 0.999**iteration),
            decay=decay,
        )
    found = np.load(out)
    size = np.abs(gradients).max()
    assert_close(found["m"], m, size, 16)
    # 1 - 0.999 in float32 is off by 2^-25 / 0.001, that is 500 roundings of the result.
    assert_close(found["v"], v, size * size, 600)
    assert_close(found["x"], x, abs(x) + 0.1, 600)
