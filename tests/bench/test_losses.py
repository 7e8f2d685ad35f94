"""The kept losses of a training in both precisions: what the page says of them, and the figure."""

from __future__ import annotations

import numpy as np

from bench import losses


def test_losses_in_bf16_are_within_a_percent_of_float32_and_the_run_learns():
    kept = losses.read_table(losses.TABLE)
    assert all(len(values) == losses.N_ITERATIONS + 1 for values in kept.values())
    distance = np.abs(kept["bf16"] / kept["f32"] - 1)
    assert 0 < distance.max() < 0.01
    assert kept["f32"][-20:].mean() < 0.5 * kept["f32"][:20].mean()


def test_figure_and_page_are_of_the_kept_losses():
    kept = losses.read_table(losses.TABLE)
    assert losses.FIGURE.read_text() == losses.draw(kept), "python -m bench.losses --draw"
    page = losses.PAGE.read_text("utf-8")
    assert losses.with_text(page, losses.text(kept)) == page, "python -m bench.losses --draw"
