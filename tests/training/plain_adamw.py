"""The optimizer once more, in plain NumPy: one update at a time, written to be read."""

from __future__ import annotations

import numpy as np


class PlainAdamW:
    """AdamW over a flat array of parameters; moments in `m` and `v`.

    `decay` is one number, or one a parameter: 0 where there is no weight decay.
    """

    def __init__(self, x, *, alpha=1e-3, decay=0.0, beta1=0.9, beta2=0.999, gclip=1.0):
        self.x = x
        self.m, self.v = np.zeros_like(x), np.zeros_like(x)
        self.alpha, self.decay = np.float32(alpha), np.float32(decay)
        self.beta1, self.beta2 = np.float32(beta1), np.float32(beta2)
        self.gclip = gclip

    def norm(self, grad):
        return float(np.sqrt(np.sum((grad * grad).astype(np.float64))))

    def step(self, grad, sched, iteration, norm):
        one, sched = np.float32(1), np.float32(sched)
        g = grad
        if 0 < self.gclip < norm:
            g = grad * np.float32(self.gclip / norm)
        a1 = self.alpha * sched / (one - self.beta1 ** np.float32(iteration))
        a2 = one / (one - self.beta2 ** np.float32(iteration))
        self.m[:] = self.beta1 * self.m + (one - self.beta1) * g
        self.v[:] = self.beta2 * self.v + (one - self.beta2) * g * g
        shrink = one - self.decay * self.alpha * sched
        self.x[:] = self.x * shrink - self.m * a1 / (np.sqrt(self.v * a2) + np.float32(1e-8))
        grad[:] = 0
