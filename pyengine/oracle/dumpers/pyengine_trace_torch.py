"""pyengine_trace_torch.py: writes a trace that `pyengine verify` reads, by forward hooks.  Needs torch alone.

Copy this file into your project.  Apache-2.0, as the project pyengine.

    from pyengine_trace_torch import Hooks

    with Hooks(model) as trace:        # any torch.nn.Module with modules named as transformers', or as vLLM's
        model(input_ids)               # each call of the embedding is a step: the prompt, then decoded tokens
    trace.save("mine.safetensors")

then: pyengine verify model.gguf mine.safetensors --budget bfloat16

vLLM, SGLang: give the module inside of the engine, run it eagerly (enforce_eager=True,
--disable-cuda-graph) on one sequence, and say `Hooks(model, names="vllm")`.  `verify` has maps of their fused
modules.  Tensors keep their dtype: bfloat16 stays bfloat16.

`pyengine bisect` runs a program with PYENGINE_IDS, PYENGINE_TENSORS (the names wanted, between newlines) and
PYENGINE_TRACE (the file to write) in its environment: `env_ids()`, and `save()` without a path.
"""

from __future__ import annotations

import ctypes
import json
import os
import re

import torch

DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
# Outputs that add nothing, or that are padded: the whole stack, activations, tables, the convolution.
LEFT_OUT = r"|.*model|.*\.(act_fn|conv1d|rotary_emb|dropout|layers)|.*visual.*|.*\.experts\..+"


class Hooks:
    """A context in which every module's output is kept, on the CPU.

    model       its embedding's module is called embed_tokens; it may be a part of another module
    names       whose names the modules have, if not transformers': vllm, sglang, mlx, candle, or a map's file
    arithmetic  words of your own, for the report
    tokens      numbers of the tokens to keep, of the whole run; None: all
    channels    numbers of the features to keep, of the tensors that have them all; None: all
    left_out    regular expression of modules that are not kept
    """

    def __init__(self, model, names="", arithmetic="", tokens=None, channels=None, left_out=LEFT_OUT):
        self.model, self.names, self.left_out = model, names, re.compile(left_out)
        self.tokens = None if tokens is None else torch.tensor(sorted(set(tokens)))
        self.channels = None if channels is None else torch.tensor(sorted(set(channels)))
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self.arithmetic = arithmetic or f"{type(model).__name__} {str(dtype).removeprefix('torch.')}"
        self.steps: list[torch.Tensor] = []
        self.pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self.handles: list = []

    # ---- recording ----

    def __enter__(self):
        for name, module in self.model.named_modules():
            if name.rpartition(".")[2] == "embed_tokens":
                self.handles.append(module.register_forward_pre_hook(self._begin))
            name = re.sub(r"^(model\.)?language_model\.(model\.)?(?=layers|embed|norm)", "model.", name)
            if not self.left_out.fullmatch(name):
                self.handles.append(module.register_forward_hook(self._hook(name)))
        if not any(name.rpartition(".")[2] == "embed_tokens" for name, _ in self.model.named_modules()):
            raise ValueError("pyengine_trace: want a module called embed_tokens, got none")
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _begin(self, module, arguments):
        self.steps.append(arguments[0].detach().reshape(-1).to("cpu", torch.int64))

    def _hook(self, name):
        def hook(module, arguments, output):
            elements = output if isinstance(output, (tuple, list)) else (output,)
            if name.endswith(".self_attn"):
                elements = elements[:1]  # the rest is the attention matrix
            for index, element in enumerate(elements):
                self.put(f"{name}.{index}" if index else name, element)

        return hook

    def put(self, name, value):
        """A tensor of this step, with a row for each token, or one for the last token."""
        if not self.steps or not isinstance(value, torch.Tensor) or value.dtype not in DTYPES:
            return
        count = len(self.steps[-1])
        if not value.numel() or not wanted(name):
            return
        rows = value.detach()
        if rows.shape[:2] == (1, count) or (rows.ndim > 1 and rows.shape[0] == 1 and count > 1):
            rows = rows[0]
        start = sum(len(step) for step in self.steps[:-1])
        if rows.ndim > 1 and rows.shape[0] % count == 0:
            rows = rows.reshape(count, -1)  # also heads as rows, [T * heads, n]
        elif rows.ndim == 1 and count > 1 and name.endswith(("lm_head", "logits_processor", "norm")):
            rows, start = rows[None], start + count - 1
        elif rows.ndim > 1 and rows.shape[0] == 1:
            rows, start = rows.reshape(1, -1), start + count - 1
        elif rows.ndim == 1 and count == 1:
            rows = rows[None]
        else:
            return
        self.pieces.setdefault(name, []).append((start, rows.to("cpu", copy=True)))

    # ---- the file ----

    def _tensor(self, pieces):
        """-> the tensor, its tokens, its features; None: all."""
        places = torch.cat([torch.arange(start, start + len(rows)) for start, rows in pieces])
        width = pieces[-1][1].shape[1]
        value = torch.cat([rows for _, rows in pieces if rows.shape[1] == width])
        every = sum(len(step) for step in self.steps)
        if self.tokens is not None:
            kept = torch.isin(places, self.tokens)
            value, places = value[kept], places[kept]
        columns = None
        if self.channels is not None and len(self.channels) and int(self.channels[-1]) < width:
            value, columns = value[:, self.channels], self.channels
        return value.contiguous(), None if len(places) == every else places, columns

    def save(self, path=None):
        """Write the file, whole or not at all.  path None: that of PYENGINE_TRACE."""
        path = os.environ["PYENGINE_TRACE"] if path is None else os.fspath(path)
        if not self.pieces:
            raise ValueError("pyengine_trace: want modules that ran, got none")
        tensors, order = {"input_ids": torch.cat(self.steps)}, []
        for name, pieces in self.pieces.items():
            value, rows, columns = self._tensor(pieces)
            if not value.numel():
                continue
            order.append(name)
            tensors[name] = value
            if rows is not None:
                tensors[f"{name}@rows"] = rows
            if columns is not None:
                tensors[f"{name}@columns"] = columns
        metadata = {
            "format": "pyengine-trace-1",
            "order": json.dumps(order),
            "arithmetic": self.arithmetic,
            "steps": json.dumps([len(step) for step in self.steps]),
            **({"names": self.names} if self.names else {}),
        }
        write_safetensors(path, tensors, metadata)


def write_safetensors(path, tensors, metadata):
    header, at = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(f"{path}.partial", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                tensor = tensor.contiguous()
                file.write(ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
        os.replace(f"{path}.partial", path)
    except BaseException:
        if os.path.exists(f"{path}.partial"):
            os.remove(f"{path}.partial")
        raise


# ---- pyengine bisect ----


def wanted(name):
    """Whether PYENGINE_TENSORS asks for a tensor; without the variable every one is wanted."""
    names = os.environ.get("PYENGINE_TENSORS")
    return names is None or name in names.split("\n")


def env_ids():
    """The ids of PYENGINE_IDS, a tensor [1, T]."""
    return torch.tensor([[int(i) for i in os.environ["PYENGINE_IDS"].split()]])
