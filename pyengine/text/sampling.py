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
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.keys import warn_unknown
from ..checks import integer, number
from ..errors import FileFormatError, InputError, PyengineWarning, quote
from ..files.strict_json import read_json
from ..probabilities import softmax
from ..seed import SEED

if TYPE_CHECKING:
    from ..files.gguf import GGUF

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


# ---- settings of a checkpoint ----------------------------------------------------------------

# Sampler's keyword, which is also the field of generation_config.json: the key of a GGUF.
_SETTINGS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
    "penalty_last_n": "penalty_last_n",  # transformers has no such field
}
_GGUF_PREFIX = "general.sampling."

# Fields of generation_config.json, and keys of a GGUF, that change what is drawn and are not computed
# here: their values that change nothing.  Null, and an empty list, change nothing either.
_HF_DRAWS = {  # where do_sample is true
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_HF_OTHERS = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
} | dict.fromkeys(
    "bad_words_ids force_words_ids constraints suppress_tokens begin_suppress_tokens forced_bos_token_id "
    "forced_eos_token_id sequence_bias exponential_decay_length_penalty watermarking_config "
    "stop_strings dola_layers".split(),
    (),
)
_GGUF_OTHERS = {"xtc_probability": (0,), "mirostat": (0,)}
_GGUF_SEQUENCE = "penalties", "top_k", "top_p", "min_p", "temperature"

# Fields that change no draw: ids that other readers take, lengths, caches, speed, forms of output.
_HF_HARMLESS = frozenset(
    """
    _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation chat_format compile_config
    continuous_batching_config decoder_start_token_id disable_compile do_sample early_stopping eos_token_id
    is_assistant length_penalty low_memory max_cache_len max_context_size max_length
    max_matching_ngram_size max_new_tokens max_time max_window_size num_assistant_tokens
    num_assistant_tokens_schedule num_return_sequences output_attentions output_hidden_states
    output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens
    remove_invalid_values renormalize_logits return_dict_in_generate speculation_type target_lookbehind
    transformers_version trust_remote_code unk_token_id use_cache use_mtp
    """.split()
)
_GGUF_HARMLESS = frozenset(["sequence", "xtc_threshold", "mirostat_tau", "mirostat_eta"])


def checkpoint_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The sampling that a checkpoint asks for: keywords of `Sampler`, without those that it leaves open.

    A GGUF has it in `general.sampling.*`, a directory in generation_config.json.  That file is read as
    transformers' `generate` reads it:

        do_sample           unless it is true, the likeliest token is taken
        temperature         1 where it is absent
        top_k               50 where it is absent; null, 0 and -1 (vLLM's word) turn it off
        top_p, min_p        off where they are absent or null
        repetition_penalty  looks at every token of the prompt and the answer, not at the last 64,
                            unless the file has penalty_last_n, which `quantize` writes

    A sampler that a file asks for and that is not here (typical_p, xtc, mirostat, beams, ...) is a
    PyengineWarning that names it, a field that is not known an UnknownKeyWarning.  Errors:
    FileFormatError for a value out of range.
    """
    if checkpoint.kind == "gguf":
        where, settings = (
            checkpoint.path,
            _gguf_settings(cast("GGUF", checkpoint.file).metadata, checkpoint.path),
        )
        names = {name: _GGUF_PREFIX + key for name, key in _SETTINGS.items()}
    else:
        where = Path(checkpoint.path) / "generation_config.json"
        settings = _hf_settings(read_json(where), where) if where.exists() else {}
        names = {name: name for name in _SETTINGS}
    try:
        Sampler(**settings)
    except InputError as error:
        name, _, problem = str(error).partition(": ")
        raise FileFormatError(where, names[name], problem) from None
    return settings


def to_generation_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of generation_config.json that say the same to transformers' `generate`, and to
    `checkpoint_settings`.

    transformers does not read penalty_last_n: there a penalty looks at every token.
    """
    sampled = settings.get("temperature", 0) > 0
    fields: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        # Without the field, transformers takes 50; -1 is an error there.
        fields |= settings | {"top_k": max(0, settings.get("top_k", 0))}
        fields.pop("penalty_last_n", None)
    if settings.get("repetition_penalty", 1) != 1:
        fields["repetition_penalty"] = settings["repetition_penalty"]
        fields["penalty_last_n"] = settings.get("penalty_last_n", PENALTY_LAST_N)
    return fields


def _gguf_settings(metadata: Mapping[str, Any], where: Any) -> dict[str, Any]:
    keys = [key.removeprefix(_GGUF_PREFIX) for key in metadata if key.startswith(_GGUF_PREFIX)]
    given = {key: metadata[_GGUF_PREFIX + key] for key in keys}
    _warn_of_others(given, _GGUF_OTHERS, where, _GGUF_PREFIX)
    known = _GGUF_OTHERS.keys() | _GGUF_HARMLESS | set(_SETTINGS.values())
    warn_unknown(sorted(_GGUF_PREFIX + key for key in given.keys() - known), where)
    _warn_of_sequence(given.get("sequence"), where)
    settings = {name: given[key] for name, key in _SETTINGS.items() if key in given}
    # A float32 as the decimal that was meant.
    return {
        name: float(str(np.float32(value))) if isinstance(value, (float, np.floating)) else value
        for name, value in settings.items()
    }


def _warn_of_sequence(sequence: Any, where: Any) -> None:
    """Warn of an order of samplers that is not the order of `Sampler`."""
    if isinstance(sequence, str) and sequence:
        names = [name.strip().replace("-", "_") for name in sequence.split(";")]
        names = ["temperature" if name == "temp" else name for name in names]
        if [name for name in names if name in _GGUF_SEQUENCE] != list(_GGUF_SEQUENCE):
            _warn(
                where, "general.sampling.sequence", f"want {';'.join(_GGUF_SEQUENCE)}, got {quote(sequence)}"
            )


def _hf_settings(fields: dict[str, Any], where: Any) -> dict[str, Any]:
    sampled = fields.get("do_sample")
    if not isinstance(sampled, (bool, type(None))):
        raise FileFormatError(where, "do_sample", f"want true or false, got {quote(sampled)}")
    _warn_of_others(fields, _HF_OTHERS | (_HF_DRAWS if sampled else {}), where)
    known = _HF_OTHERS.keys() | _HF_DRAWS.keys() | _HF_HARMLESS | _SETTINGS.keys()
    warn_unknown(sorted(name for name in fields.keys() - known if fields[name] is not None), where)
    given = {name: fields[name] for name in _SETTINGS if fields.get(name) is not None}
    penalties: dict[str, Any] = {
        name: given[name] for name in ("repetition_penalty", "penalty_last_n") if name in given
    }
    if penalties.get("repetition_penalty", 1) != 1:
        penalties = {"penalty_last_n": -1, **penalties}
    if not sampled:
        return {"temperature": 0.0, **penalties}
    top_k = 0 if "top_k" in fields else 50
    return {"temperature": 1.0, "top_k": top_k, **given, **penalties}


def _warn_of_others(
    given: dict[str, Any], others: Mapping[str, tuple[Any, ...]], where: Any, prefix: str = ""
) -> None:
    for name, neutral in others.items():
        value = given.get(name)
        if not _changes_nothing(value, neutral):
            want = " or ".join([*map(str, neutral), "none"])
            _warn(where, prefix + name, f"want {want}, got {quote(value)}")


def _changes_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or isinstance(value, (list, dict)):
        return not value
    return isinstance(value, (int, float)) and value in neutral


def _warn(where: Any, field: str, problem: str) -> None:
    """In the words of a FileFormatError."""
    problem += ": not computed here, so it does not change what is drawn"
    warnings.warn(str(FileFormatError(where, field, problem)), PyengineWarning, stacklevel=4)


# ---- checks ----------------------------------------------------------------------------------


def _bias(value: Any) -> float:
    return -math.inf if value == -math.inf else number("logit_bias", value, -math.inf, math.inf)
