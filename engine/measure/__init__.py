"""How well a model predicts a text, and how far its predictions are from another's.

====================  =========================================================================
`engine.measure...`
====================  =========================================================================
``windows``           which tokens are evaluated together, and which of them are scored
``softmax``           log-sum-exp of a row of logits
``loss``              the loss of each token, its mean and error: perplexity
``logit_file``        log-probabilities of a text in 16 bits, as `perplexity` files have them
``divergence``        KL divergence and its kin: from a file, or between two contexts
====================  =========================================================================
"""

from engine.measure.divergence import (
    Comparison,
    Divergence,
    Summary,
    compare,
    divergence,
    percentile,
)
from engine.measure.logit_file import LogitFile, LogitWriter, open_logit_writer, read_logit_file
from engine.measure.loss import Mean, perplexity
from engine.measure.windows import Windows, halves, strided, whole

__all__ = [
    "Comparison",
    "Divergence",
    "LogitFile",
    "LogitWriter",
    "Mean",
    "Summary",
    "Windows",
    "compare",
    "divergence",
    "halves",
    "open_logit_writer",
    "percentile",
    "perplexity",
    "read_logit_file",
    "strided",
    "whole",
]
