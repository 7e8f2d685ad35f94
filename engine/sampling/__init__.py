"""From logits to one token: penalties, samplers and the draw, bit for bit as users know them.

A token is chosen in this order, all in float32 and never fused:

    logits -> biases -> guidance -> penalties -> temperature 0: the first maximum
                                              -> mirostat 1 or 2 -> draw
                                              -> the queue (top_k, tfs_z, typical_p, top_p, min_p,
                                                 temperature by default) -> draw

A token that breaks the grammar is chosen a second time, among those that do not.

=====================  ========================================================================
`engine.sampling...`
=====================  ========================================================================
``params``             `SamplingParams`, how a queue is written, how `main` tells them
``candidates``         sorting, selecting, every sampler, the draw; for Cython alone
``sampler``            `Sampler`: history, biases, guidance, penalties, the choice
=====================  ========================================================================
"""

from engine.sampling.params import RANDOM_SEED, SamplingParams, describe, sampler_order
from engine.sampling.sampler import Sampler

__all__ = ["RANDOM_SEED", "Sampler", "SamplingParams", "describe", "sampler_order"]
