"""Logits to the next token.

The order is llama.cpp's default (common/common.h, `common_params_sampling::samplers`):

    logit_bias, penalties, top_k, top_p, min_p, temperature, draw

so top_p and min_p look at the model's own probabilities, and temperature comes after them.

    logit_bias           logit[id] += bias
    repetition_penalty   r: logit *= r where logit <= 0, else logit /= r    } for every id among the
    frequency_penalty    logit -= frequency_penalty * times seen            } last penalty_last_n,
    presence_penalty     logit -= presence_penalty                          } prompt included
    top_k                the k largest logits; of equal ones the lower ids; 0: all
    top_p                the fewest, largest first, whose probabilities sum to top_p; 1: all
    min_p                those of at least min_p times the largest probability; 0: all
    temperature          probabilities = softmax(logits / temperature); 0: the largest logit
    draw                 the first id, ascending, whose cumulative probability exceeds u * their sum

A token that generation forces (the end of a thinking budget) is remembered and takes no draw.

The float32 logits are exact in float64, and all of this is float64.  u is `Generator(PCG64(seed))
.random()`, one a token, none at temperature 0: a seed, the parameters and the logits give the tokens
again.  (NumPy's exp may differ in its last bit from one processor to another; u would have to fall
into that gap, about one draw in 10^15, for a token to change.)
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint
from .config import read_json
from .errors import FileFormatError, InputError

SEED = 1729


class Sampler:
    """Draws tokens, and remembers them for the penalties.

    history   the last ids seen, oldest first; clear it to forget
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                 min_p: float = 0.0, seed: int = SEED, *, repetition_penalty: float = 1.0,
                 presence_penalty: float = 0.0, frequency_penalty: float = 0.0,
                 penalty_last_n: int = 64, logit_bias: dict[int, float] | None = None):
        """penalty_last_n: 0 looks at no token, -1 at all; the rest as above.  InputError: a range."""
        self.temperature = _number("temperature", temperature, 0, math.inf)
        self.top_k = _integer("top_k", top_k, 0)
        self.top_p = _number("top_p", top_p, 0, 1)
        self.min_p = _number("min_p", min_p, 0, 1)
        self.seed = _integer("seed", seed, 0)
        self.repetition_penalty = _number("repetition_penalty", repetition_penalty, 0, math.inf)
        if not self.repetition_penalty:
            raise InputError("repetition_penalty: want more than 0, got 0")
        self.presence_penalty = _number("presence_penalty", presence_penalty, -math.inf, math.inf)
        self.frequency_penalty = _number("frequency_penalty", frequency_penalty, -math.inf, math.inf)
        self.logit_bias = {_integer("logit_bias", i, 0): _bias(b) for i, b in (logit_bias or {}).items()}
        last = _integer("penalty_last_n", penalty_last_n, -1)
        self.history = deque(maxlen=None if last < 0 else last)
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def accept(self, ids) -> None:
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
        """What `sample` would draw from, float64 [vocab], sum 1; draws and remembers nothing."""
        logits = self._adjusted(logits)
        if self.temperature == 0:
            return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
        return self._probabilities(logits)

    def check_vocabulary(self, vocab_size: int) -> None:
        """InputError: a bias for an id that such a vocabulary does not have."""
        beyond = max(self.logit_bias, default=-1)
        if beyond >= vocab_size:
            raise InputError(f"logit_bias: want an id below {vocab_size}, got {beyond}")

    # ---- steps, in their order ----

    def _adjusted(self, logits) -> np.ndarray:
        """float64 [vocab], biased and penalised."""
        logits = np.array(logits, np.float64)
        if logits.ndim != 1 or not logits.size:
            raise InputError(f"logits: want [vocab], got shape {logits.shape}")
        self._bias(logits)
        self._penalize(logits)
        largest = logits.max()  # NaN when there is one
        if not np.isfinite(largest):
            raise InputError(f"logits: want a finite largest one, got {largest}")
        return logits

    def _bias(self, logits):
        self.check_vocabulary(len(logits))
        for token, bias in self.logit_bias.items():
            logits[token] += bias

    def _penalize(self, logits):
        if not self.history:
            return
        ids, counts = np.unique(np.fromiter(self.history, np.int64), return_counts=True)
        seen = logits[ids]
        seen = np.where(seen <= 0, seen * self.repetition_penalty, seen / self.repetition_penalty)
        logits[ids] = seen - (counts * self.frequency_penalty + self.presence_penalty)

    def _probabilities(self, logits) -> np.ndarray:
        """float64 [vocab] after the filters and the temperature."""
        kept = _top_k(logits, self.top_k)
        kept = _top_p(logits, kept, self.top_p)
        kept = _min_p(logits, kept, self.min_p)
        probabilities = np.zeros(len(logits))
        probabilities[kept] = _softmax(logits[kept], self.temperature)
        return probabilities

    def _draw(self, probabilities) -> int:
        cumulative = np.cumsum(probabilities)
        u = self._random.random() * cumulative[-1]
        token = int(np.searchsorted(cumulative, u, side="right"))
        # u < sum, but the product may round up to it: then the last that can be drawn.
        return min(token, int(np.flatnonzero(probabilities)[-1]))


# ---- filters: ids [n] ascending -> those kept, ascending ---------------------------------------


def _top_k(logits, k) -> np.ndarray:
    ids = np.arange(len(logits))
    if not 0 < k < len(logits):
        return ids
    smallest = np.partition(logits, -k)[-k]
    above = ids[logits > smallest]
    equal = ids[logits == smallest][: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _top_p(logits, ids, p) -> np.ndarray:
    if p >= 1:
        return ids
    logits = logits[ids]
    probabilities = _softmax(logits)
    for most in (1024, len(ids)):  # sorting a whole vocabulary takes 30 ms, and is seldom needed
        order = _top_k(logits, most)
        order = order[np.argsort(-logits[order], kind="stable")]
        cumulative = np.cumsum(probabilities[order])
        if cumulative[-1] >= p:
            break
    count = int(np.searchsorted(cumulative, p, side="left")) + 1  # up to the first sum >= p
    return np.sort(ids[order[:count]])


def _min_p(logits, ids, p) -> np.ndarray:
    if p <= 0:
        return ids
    return ids[logits[ids] >= logits[ids].max() + math.log(p)]


def _softmax(logits, temperature=1.0) -> np.ndarray:
    # Shifted before the division: a tiny temperature then gives -inf and 0, and no NaN.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax of logits [vocab], float64 [vocab]."""
    shifted = np.asarray(logits, np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Ids [min(k, vocab)] of the k largest, largest first; of equal ones the lower ids first."""
    ids = _top_k(values, k) if k else np.arange(0)
    return ids[np.argsort(-values[ids], kind="stable")]


# ---- what a checkpoint asks for ----------------------------------------------------------------

# Sampler's keyword: the field of generation_config.json, the key of a GGUF.
_SETTINGS = {
    "temperature": ("temperature", "temp"),
    "top_k": ("top_k", "top_k"),
    "top_p": ("top_p", "top_p"),
    "min_p": ("min_p", "min_p"),
    "repetition_penalty": ("repetition_penalty", "penalty_repeat"),
    "penalty_last_n": (None, "penalty_last_n"),
}


def checkpoint_settings(checkpoint: Checkpoint) -> dict:
    """The sampling that a checkpoint asks for, as keywords of `Sampler`; what it leaves open is absent.

    A GGUF says it in `general.sampling.*`, a directory in generation_config.json, where `do_sample`
    has to be true, as for Hugging Face: else it asks for the likeliest token.  Other samplers that a
    file may name (xtc, mirostat) are not here.  Errors: FileFormatError for a value out of range.
    """
    if checkpoint.kind == "gguf":
        where, settings = checkpoint.path, _gguf_settings(checkpoint.file.metadata)
    else:
        where = Path(checkpoint.path) / "generation_config.json"
        settings = _hf_settings(read_json(where)) if where.exists() else {}
    try:
        Sampler(**settings)
    except InputError as error:
        field, _, problem = str(error).partition(": ")
        raise FileFormatError(where, field, problem) from None
    return settings


def to_generation_config(settings: dict) -> dict:
    """The fields of generation_config.json that say the same to Hugging Face's `generate`."""
    fields = {_SETTINGS[name][0]: value for name, value in settings.items() if _SETTINGS[name][0]}
    sampled = settings.get("temperature", 0) > 0
    if not sampled:
        fields = {name: value for name, value in fields.items() if name == "repetition_penalty"}
    return {"do_sample": sampled, **fields}


def _gguf_settings(metadata) -> dict:
    keys = {name: f"general.sampling.{key}" for name, (_, key) in _SETTINGS.items()}
    settings = {name: metadata[key] for name, key in keys.items() if key in metadata}
    # A float32 as the decimal that was meant.
    return {name: float(str(np.float32(value))) if isinstance(value, (float, np.floating)) else value
            for name, value in settings.items()}


def _hf_settings(fields: dict) -> dict:
    names = [name for name, (field, _) in _SETTINGS.items() if fields.get(field) is not None]
    settings = {name: fields[_SETTINGS[name][0]] for name in names}
    if fields.get("do_sample") is not True:
        return {"temperature": 0.0} | {name: settings[name] for name in ("repetition_penalty",)
                                       if name in settings}
    return {"temperature": 1.0} | settings


# ---- checks ----------------------------------------------------------------------------------


def _number(name, value, low, high) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) \
            or not (low <= value <= high and math.isfinite(value)):
        span = f"from {low} to {high}" if math.isfinite(high) else \
            f"of at least {low}" if math.isfinite(low) else "that is finite"
        raise InputError(f"{name}: want a number {span}, got {value!r}")
    return float(value)


def _integer(name, value, low) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise InputError(f"{name}: want an integer of at least {low}, got {value!r}")
    return int(value)


def _bias(value) -> float:
    return -math.inf if value == -math.inf else _number("logit_bias", value, -math.inf, math.inf)
