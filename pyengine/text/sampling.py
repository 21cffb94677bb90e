"""The sampling that a checkpoint asks for, as keywords of `Sampler`; read, and written for another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.keys import warn_unknown
from ..errors import FileFormatError, InputError, PyengineWarning, quote
from ..files.strict_json import read_json
from .sampler import PENALTY_LAST_N, Sampler

if TYPE_CHECKING:
    from ..files.gguf import GGUF

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
