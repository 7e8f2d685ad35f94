"""How the next token is chosen: the parameters, as users set them and as `main` prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from engine.errors import OptionError

RANDOM_SEED = 0xFFFFFFFF
MAX_FLOAT32 = 3.4028234663852886e38

# In the order in which they work unless told otherwise, with their letters.
SAMPLERS = ("top_k", "tfs_z", "typical_p", "top_p", "min_p", "temperature")
LETTERS = dict(zip("kfypmt", SAMPLERS, strict=True))
ALIASES = {
    "top-k": "top_k",
    "top-p": "top_p",
    "nucleus": "top_p",
    "typical-p": "typical_p",
    "typical": "typical_p",
    "min-p": "min_p",
    "tfs-z": "tfs_z",
    "tfs": "tfs_z",
    "temp": "temperature",
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.

    Reals are rounded to float32 where they are used.

    Attributes
    ----------
    temp : float
        0 or less takes the best token.
    dynatemp_range, dynatemp_exponent : float
        A range above 0 lets the temperature follow the entropy, within ``temp ± range``.
    top_k : int
        Keep the best k; 0 or less keeps all.
    top_p : float
        Keep the best whose probabilities reach this sum; 1 or more is off.
    min_p : float
        Keep what has at least this share of the best token's probability; 0 or less is off.
    tfs_z : float
        Tail-free sampling; 1 or more is off.
    typical_p : float
        Locally typical sampling; 1 or more is off.
    min_keep : int
        Candidates that no cut goes below; at least 1.
    penalty_last_n : int
        Tokens looked back upon; 0 is off, below 0 the whole history.
    penalty_repeat, penalty_freq, penalty_present : float
        Factor on the logits of tokens met, subtrahend per meeting, subtrahend once.
    penalize_nl : bool
        Whether the newline token is penalized too.
    mirostat : int
        0 is off, 1 and 2 are the two versions; the queue is not used then.
    mirostat_tau, mirostat_eta : float
        Target surprise in bits and learning rate.
    logit_bias : dict of int to float
        Added to logits; minus infinity forbids a token.
    samplers : tuple of str
        The queue: canonical names in the order of their work (see `sampler_order`).
    seed : int
        From 0 to 2**32 - 1; `RANDOM_SEED`, the largest, asks the system for one.
    n_probs : int
        Candidates that `Sampler.top` returns.
    cfg_scale : float
        Strength of classifier-free guidance, where a second context's logits are given; 1 leaves
        the logits as probable as they are.

    Raises
    ------
    OptionError
        If a value cannot be used; names the field.
    """

    temp: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    tfs_z: float = 1.0
    typical_p: float = 1.0
    min_keep: int = 0
    penalty_last_n: int = 64
    penalty_repeat: float = 1.0
    penalty_freq: float = 0.0
    penalty_present: float = 0.0
    penalize_nl: bool = False
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    samplers: tuple[str, ...] = SAMPLERS
    seed: int = RANDOM_SEED
    n_probs: int = 0
    cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not abs(value) <= MAX_FLOAT32:
                raise OptionError(f"{f.name}: {value} is not a number that float32 can hold")
        if self.mirostat not in (0, 1, 2):
            raise OptionError(f"mirostat: {self.mirostat} is not 0 (off), 1 or 2")
        if self.penalty_repeat < 1e-30:
            raise OptionError(
                f"penalty_repeat: {self.penalty_repeat} is not above 0; 1 turns the penalty off"
            )
        if self.penalty_last_n > 0x7FFFFFFF:
            raise OptionError(f"penalty_last_n: {self.penalty_last_n} is beyond {0x7FFFFFFF}")
        if not 0 <= self.seed <= 0xFFFFFFFF:
            raise OptionError(f"seed: {self.seed} is not from 0 to {0xFFFFFFFF}")
        for token, bias in self.logit_bias.items():
            if math.isnan(bias):
                raise OptionError(f"logit_bias: token {token} has the bias {bias}")
        for name in self.samplers:
            if name not in SAMPLERS:
                raise OptionError(f"samplers: {name!r} is none of {', '.join(SAMPLERS)}")


def sampler_order(names_or_letters: str, letters: bool | None = None) -> tuple[str, ...]:
    """Read a queue of samplers as users type it.

    Parameters
    ----------
    names_or_letters : str
        Names separated by ``;`` (``top_k;typical;temp``), or one letter a sampler (``kyt``). A
        single word that is a name is read as the name. Empty text is an empty queue.
    letters : bool, optional
        Which of both it is, where that is known.

    Returns
    -------
    tuple of str
        Canonical names, for `SamplingParams.samplers`.

    Raises
    ------
    OptionError
        If a name or letter is unknown; names it.
    """
    names = [name for name in names_or_letters.split(";") if name]
    known = {**{name: name for name in SAMPLERS}, **ALIASES}
    if letters is None:
        letters = ";" not in names_or_letters and names_or_letters not in known
    if letters:
        names, known = list(names_or_letters), LETTERS
    for name in names:
        if name not in known:
            field = "sampling_seq" if letters else "samplers"
            raise OptionError(f"{field}: unknown sampler {name!r}; known are {', '.join(known)}")
    return tuple(known[name] for name in names)


def describe(params: SamplingParams) -> str:
    """Say the parameters as `main` prints them before it generates.

    Parameters
    ----------
    params : SamplingParams

    Returns
    -------
    str
        Two headings with their lines, without a newline at the end.
    """
    p = params
    order = ["CFG", "Penalties", *(["mirostat"] if p.mirostat else p.samplers)]
    return (
        "sampling: \n"
        f"\trepeat_last_n = {p.penalty_last_n}, repeat_penalty = {p.penalty_repeat:.3f},"
        f" frequency_penalty = {p.penalty_freq:.3f}, presence_penalty = {p.penalty_present:.3f}\n"
        f"\ttop_k = {p.top_k}, tfs_z = {p.tfs_z:.3f}, top_p = {p.top_p:.3f},"
        f" min_p = {p.min_p:.3f}, typical_p = {p.typical_p:.3f}, temp = {p.temp:.3f}\n"
        f"\tmirostat = {p.mirostat}, mirostat_lr = {p.mirostat_eta:.3f},"
        f" mirostat_ent = {p.mirostat_tau:.3f}\n"
        "sampling order: \n"
        f"{' -> '.join(order)} "
    )
