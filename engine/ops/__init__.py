"""Every op: shape rule, lowering to its kernel, gradient, side by side.

The formulas are in simd/kernels.h. The functions are the way to make nodes: they take the graph and
tensors and return the tensors written. `gradient` receives a `Gradients` (autograd.pyx):
``grads[t]`` is the gradient of an output, ``grads.add(t, g)`` adds one to an input's, and
``grads.into(t)`` gives the tensor into which an accumulating kernel may write, or None.

================  ============================================================================
`engine.ops...`
================  ============================================================================
``products``      with frozen weights, both ways; the feed-forward part in one step
``adapters``      thin products of adapters, both ways
``rows``          embedding, norm, rotation, gate, sum, zeros, the entry into a cache
``attention``     causal attention, both ways
``loss``          cross-entropy
``probe``         the machine's peaks
``checks``        what every op asks of its tensors; for Cython alone
================  ============================================================================
"""

from engine.ops.adapters import (
    LoraDown,
    LoraGather,
    LoraOuter,
    LoraScatter,
    LoraUp,
    lora_down,
    lora_gather,
    lora_up,
)
from engine.ops.attention import Attention, AttentionBack, attention
from engine.ops.loss import CrossEntropy, cross_entropy
from engine.ops.probe import Probe, probe
from engine.ops.products import (
    DOT_RANK,
    DOT_TOKENS,
    FeedForward,
    Linear,
    LinearBack,
    Pack,
    feed_forward,
    kept_type,
    linear,
    linears,
    meets_within,
    multiplies_pairs,
)
from engine.ops.rows import (
    Add,
    CacheStore,
    Embed,
    RmsNorm,
    RmsNormBack,
    Rope,
    SiluMul,
    SiluMulBack,
    Zero,
    add,
    cache_store,
    embed,
    rms_norm,
    rope,
    silu_mul,
    zero,
)

__all__ = [
    "DOT_RANK",
    "DOT_TOKENS",
    "Add",
    "Attention",
    "AttentionBack",
    "CacheStore",
    "CrossEntropy",
    "Embed",
    "FeedForward",
    "Linear",
    "LinearBack",
    "LoraDown",
    "LoraGather",
    "LoraOuter",
    "LoraScatter",
    "LoraUp",
    "Pack",
    "Probe",
    "RmsNorm",
    "RmsNormBack",
    "Rope",
    "SiluMul",
    "SiluMulBack",
    "Zero",
    "add",
    "attention",
    "cache_store",
    "cross_entropy",
    "embed",
    "feed_forward",
    "kept_type",
    "linear",
    "linears",
    "lora_down",
    "lora_gather",
    "lora_up",
    "meets_within",
    "multiplies_pairs",
    "probe",
    "rms_norm",
    "rope",
    "silu_mul",
    "zero",
]
