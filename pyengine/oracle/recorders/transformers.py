"""A trace of any transformers model, by forward hooks."""

from __future__ import annotations

import re

import numpy as np

from ...errors import InputError
from ...ids import as_ids
from ..trace import Trace

# Modules whose output adds no information: activations (seen in their consumer), rotary tables, the
# stack as a whole (its output is model.norm's).  conv1d's is longer than the tokens: it is padded.
_UNTRACED = re.compile(r"(|model|.*\.act_fn|.*\.conv1d|.*rotary_emb|.*dropout|model\.visual.*)")


def record(model, ids, splits=None) -> Trace:
    """Every module's output of one sequence, in the order in which the modules finished.

    model   a transformers model for causal language modelling: any dtype, any device, also quantized
    ids     [T] token ids
    splits  lengths that add up to T: the pieces run one after another on one cache, and are joined.
            Without it, one shot and no cache
    -> tensors float32 (exact for 16-bit models), float64 from a float64 model, integers int64.
    The text model of a multimodal one (`model.language_model.`) has the names of a text model.
    Errors: InputError.
    """
    import torch

    ids = as_ids(ids, model.get_input_embeddings().weight.shape[0])
    splits = [len(ids)] if splits is None else list(splits)
    if sum(splits) != len(ids) or min(splits) < 1:
        raise InputError(f"splits: want lengths from 1 on with the sum {len(ids)}, got {splits}")
    device = model.get_input_embeddings().weight.device
    pieces, cache = [], None
    for piece in np.split(ids, np.cumsum(splits)[:-1]):
        outputs: dict[str, np.ndarray] = {}
        handles = [
            module.register_forward_hook(_hook(outputs, _text_name(name), len(piece)))
            for name, module in model.named_modules()
            if not _UNTRACED.fullmatch(_text_name(name))
        ]
        try:
            with torch.no_grad():
                result = model(
                    input_ids=torch.as_tensor(piece, device=device)[None],
                    past_key_values=cache,
                    use_cache=len(splits) > 1,
                )
        finally:
            for handle in handles:
                handle.remove()
        cache = getattr(result, "past_key_values", None)
        pieces.append(outputs)
    tensors = {
        name: np.concatenate([piece[name] for piece in pieces])
        for name in pieces[0]
        if all(name in piece for piece in pieces)
    }
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return Trace(ids, tensors, f"{type(model).__name__} {dtype}".strip())


def _text_name(name: str) -> str:
    return re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)


def _hook(outputs: dict, name: str, tokens: int):
    """A forward hook that copies a module's output; what has no row for each token is left out."""
    import torch

    def hook(module, args, output):
        elements = output if isinstance(output, (tuple, list)) else (output,)
        if name.endswith(".self_attn"):
            elements = elements[:1]  # the rest is the attention matrix
        for index, element in enumerate(elements):
            if isinstance(element, torch.Tensor) and element.numel() and not element.numel() % tokens:
                outputs[f"{name}.{index}" if index else name] = _array(element, tokens)

    return hook


def _array(tensor, tokens: int) -> np.ndarray:
    """[1, T, ...], [T, ...] or [T * heads, width] -> [T, features], a copy."""
    import torch

    kind = torch.int64
    if tensor.is_floating_point():
        kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to("cpu", kind, copy=True).reshape(tokens, -1).numpy()
