"""A GGUF's model as a directory of floats, in the forms that people publish."""

import json

import numpy as np

from pyengine.checkpoint.open import open_checkpoint
from pyengine.files.numbers import float32_to_bfloat16
from pyengine.files.safetensors import INDEX_NAME
from pyengine.files.safetensors_writer import SafetensorsWriter

EXPERTS = ".mlp.experts."


def stored(values, dtype):
    """Values of a float32 array in a dtype of safetensors -> (dtype, array to write)."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        return dtype, float32_to_bfloat16(values)
    return dtype, values.astype({"F32": np.float32, "F16": np.float16}[dtype])


def hf_tensors(source, dtype_of=lambda name: "F32", apart=False):
    """{Hugging Face's name: (dtype, array)} of a GGUF; apart: each expert's matrices by themselves."""
    checkpoint, tensors = open_checkpoint(source), {}
    for name, tensor in checkpoint.tensors.items():
        if name == "lm_head.weight" and checkpoint.config.tie_word_embeddings:
            continue
        values = tensor.float64()
        if EXPERTS not in name:
            tensors[name] = values
        elif apart:
            stem, part = name.rsplit(".", 1)
            tensors |= {f"{stem}.{i}.{part}.weight": expert for i, expert in enumerate(values)}
        elif name.endswith(".gate_proj"):
            up = checkpoint.tensors[name.removesuffix("gate_proj") + "up_proj"].float64()
            tensors[name.removesuffix("gate_proj") + "gate_up_proj"] = np.concatenate([values, up], axis=1)
        elif name.endswith(".down_proj"):
            tensors[name] = values
    return {name: stored(values, dtype_of(name)) for name, values in tensors.items()}


def write_file(path, tensors, metadata=None):
    """tensors: {name: (dtype, array)}."""
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with SafetensorsWriter(path, plan, metadata) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)


def write_config(directory, source, **changes):
    directory.mkdir(exist_ok=True)
    config = open_checkpoint(source).config.to_hf() | changes
    (directory / "config.json").write_text(json.dumps(config))


def write_single(directory, source, tensors, **changes):
    write_config(directory, source, **changes)
    write_file(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


def write_shards(directory, source, shards, index=None, **changes):
    """shards: {file name: tensors}; index: {name: file name} beside or in place of them; None: left out."""
    write_config(directory, source, **changes)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        write_file(directory / file, tensors, {"format": "pt", "made_by": "a test"})
    weight_map |= index or {}
    weight_map = {name: file for name, file in weight_map.items() if file}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


def halves(tensors):
    """{file name: tensors} of two shards, every other tensor in each."""
    names = list(tensors)
    return {
        f"model-0000{i + 1}-of-00002.safetensors": {name: tensors[name] for name in names[i::2]}
        for i in range(2)
    }
