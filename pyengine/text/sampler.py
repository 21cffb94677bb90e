"""Logits to the next token.

The order is llama.cpp's default (common/common.h, `common_params_sampling::samplers`):

    logit_bias, penalties, top_k, top_p, min_p, temperature, draw

so top_p and min_p look at the model's own probabilities, and temperature comes after them.

    logit_bias           logit[id] += bias
    repetition_penalty   r: logit *= r where logit <= 0, else logit /= r    } for every id among the
    frequency_penalty    logit -= frequency_penalty * times seen            } last penalty_last_n,
    presence_penalty     logit -= presence_penalty                          } prompt included
    top_k                the k largest logits; of equal ones the lower ids; 0 or -1: all
    top_p                the fewest, largest first, whose probabilities sum to top_p; 1: all
    min_p                those of at least min_p times the largest probability; 0: all
    temperature          probabilities = softmax(logits / temperature); 0: the largest logit
    draw                 the first id, ascending, whose cumulative probability exceeds u * their sum

A token that generation forces (the end of a thinking budget) is remembered and takes no draw.

The float32 logits are exact in float64, and all of this is float64.  u is `Generator(PCG64(seed))
.random()`, one per token, none at temperature 0: a seed, the parameters and the logits give the tokens
again.  (NumPy's exp may differ in its last bit from one processor to another; u would have to fall
into that gap, about one draw in 10^15, for a token to change.)

The seed -1 stands for a fresh seed of 32 bits from the system's source of randomness.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import integer, number
from ..errors import InputError
from ..probabilities import softmax
from ..seed import SEED

PENALTY_LAST_N = 64  # llama.cpp's default


_PARAMETERS = (
    "temperature top_k top_p min_p seed repetition_penalty presence_penalty frequency_penalty "
    "penalty_last_n logit_bias"
).split()


class Sampler:
    """Draws tokens, and remembers them for the penalties.

    history   the last ids seen, oldest first; clear it to forget
    seed      of the draws, never -1: a sampler that was made with -1 has the seed that it drew
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = SEED,
        *,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        penalty_last_n: int = PENALTY_LAST_N,
        logit_bias: dict[int, float] | None = None,
    ):
        """penalty_last_n: 0 looks at no token, -1 at all; the rest as above.  InputError: out of range."""
        self.temperature = number("temperature", temperature, 0, math.inf)
        self.top_k = max(0, integer("top_k", top_k, -1))
        self.top_p = number("top_p", top_p, 0, 1)
        self.min_p = number("min_p", min_p, 0, 1)
        self.seed = integer("seed", seed, -1)
        if self.seed == -1:
            self.seed = secrets.randbits(32)
        self.repetition_penalty = number("repetition_penalty", repetition_penalty, 0, math.inf)
        if not self.repetition_penalty:
            raise InputError("repetition_penalty: want more than 0, got 0")
        self.presence_penalty = number("presence_penalty", presence_penalty, -math.inf, math.inf)
        self.frequency_penalty = number("frequency_penalty", frequency_penalty, -math.inf, math.inf)
        self.logit_bias = {integer("logit_bias", i, 0): _bias(b) for i, b in (logit_bias or {}).items()}
        self.penalty_last_n = integer("penalty_last_n", penalty_last_n, -1)
        self.history: deque[int] = deque(maxlen=None if self.penalty_last_n < 0 else self.penalty_last_n)
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def __repr__(self) -> str:
        return f"Sampler({', '.join(f'{name}={getattr(self, name)!r}' for name in _PARAMETERS)})"

    def accept(self, ids: Iterable[int]) -> None:
        """Remember ids that were not drawn here: the prompt's."""
        self.history.extend(int(i) for i in ids)

    def sample(self, logits: np.ndarray) -> int:
        """logits float32 [vocab] -> the next id, which is remembered.

        -inf bans a token.  Errors: InputError for a shape, a NaN, or no finite logit at all.
        """
        logits = self._adjusted(logits)
        if self.temperature == 0:
            token = int(logits.argmax())  # the first, and lowest id, among equals
        else:
            token = self._draw(self._probabilities(logits))
        self.history.append(token)
        return token

    def distribution(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities of `sample`, float64 [vocab], sum 1.  It draws and remembers nothing."""
        logits = self._adjusted(logits)
        if self.temperature == 0:
            one: NDArray[np.float64] = (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
            return one
        return self._probabilities(logits)

    @property
    def needs_largest(self) -> int | None:
        """k: the next `sample` depends on the k largest logits alone (ties: the lower ids), and finds the
        same id where all others are -inf.  None: it depends on more.

        The token comes from the best of the changed logits, or from the best top_k.  Bias and penalties
        change the logits of so many ids; where none is raised, all but these many of the k largest stay
        above every other.
        """
        best = 1 if self.temperature == 0 else self.top_k
        raised = (
            any(bias > 0 for bias in self.logit_bias.values())
            or self.repetition_penalty < 1
            or min(self.presence_penalty, self.frequency_penalty) < 0
        )
        if not best or raised:
            return None
        penalized = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return best + len(self.logit_bias) + (len(set(self.history)) if penalized else 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError: a bias for an id beyond such a vocabulary."""
        beyond = max(self.logit_bias, default=-1)
        if beyond >= vocab_size:
            raise InputError(f"logit_bias: want an id below {vocab_size}, got {beyond}")

    # ---- steps, in their order ----

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        """logits -> float64 [vocab], biased and penalized."""
        logits = np.array(logits, np.float64)
        if logits.ndim != 1 or not logits.size:
            raise InputError(f"logits: want [vocab], got shape {logits.shape}")
        self._bias(logits)
        self._penalize(logits)
        largest = logits.max()  # NaN when there is one
        if not np.isfinite(largest):
            raise InputError(f"logits: want a finite largest one, got {largest}")
        return logits

    def _bias(self, logits: np.ndarray) -> None:
        self.check_vocabulary(len(logits))
        for token, bias in self.logit_bias.items():
            logits[token] += bias

    def _penalize(self, logits: np.ndarray) -> None:
        if not self.history:
            return
        ids, counts = np.unique(np.fromiter(self.history, np.int64), return_counts=True)
        seen = logits[ids]
        seen = np.where(seen <= 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
        logits[ids] = seen - (counts * self.frequency_penalty + self.presence_penalty)

    def _probabilities(self, logits: np.ndarray) -> np.ndarray:
        """float64 [vocab] after the filters and the temperature."""
        kept = _top_k(logits, self.top_k)
        kept = _top_p(logits, kept, self.top_p)
        kept = _min_p(logits, kept, self.min_p)
        probabilities = np.zeros(len(logits))
        probabilities[kept] = softmax(logits[kept], self.temperature)
        return probabilities

    def _draw(self, probabilities: np.ndarray) -> int:
        cumulative = np.cumsum(probabilities)
        u = self._random.random() * cumulative[-1]
        token = int(np.searchsorted(cumulative, u, side="right"))
        # u < sum, but the product may round up to the sum: then take the last id that can be drawn.
        return min(token, int(np.flatnonzero(probabilities)[-1]))


# ---- filters: ids [n] ascending -> those kept, ascending ---------------------------------------


def _top_k(logits: np.ndarray, k: int) -> np.ndarray:
    ids = np.arange(len(logits))
    if not 0 < k < len(logits):
        return ids
    smallest = np.partition(logits, -k)[-k]
    above = ids[logits > smallest]
    equal = ids[logits == smallest][: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _top_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    if p >= 1:
        return ids
    logits = logits[ids]
    probabilities = softmax(logits)
    for most in (1024, len(ids)):  # to sort a whole vocabulary takes 30 ms, and is seldom needed
        order = _top_k(logits, most)
        order = order[np.argsort(-logits[order], kind="stable")]
        cumulative = np.cumsum(probabilities[order])
        if cumulative[-1] >= p:
            break
    count = int(np.searchsorted(cumulative, p, side="left")) + 1  # up to the first sum >= p
    return np.sort(ids[order[:count]])


def _min_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    if p <= 0:
        return ids
    kept: NDArray[np.int64] = ids[logits[ids] >= logits[ids].max() + math.log(p)]
    return kept


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Ids [min(k, vocab)] of the k largest, largest first; of equal ones the lower ids first."""
    ids = _top_k(values, k) if k else np.arange(0)
    return ids[np.argsort(-values[ids], kind="stable")]


# ---- checks ----------------------------------------------------------------------------------


def _bias(value: Any) -> float:
    return -math.inf if value == -math.inf else number("logit_bias", value, -math.inf, math.inf)
