#!/usr/bin/env python3
"""The small files of tests/fuzz_corpus that tools/check/fuzz_files.py starts from; the same bytes each time.

    python tools/check/make_fuzz_corpus.py            # needs the extras golden and peers

Each is a real file of its kind, written by the writer that users have (gguf-py, our own), and small:
what is mutated is the format, not the weights.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as T
from gguf.constants import LlamaFileType
from golden_models import COMMON, SEED, byte_level_tokenizer, rope, write_gguf
from hf_float64 import random_state_dict
from make_quantized import importance, scales
from quantized_models import quantize as quantize_as_llama_cpp
from rewrite import rewrite

import pyengine
from pyengine.files.ggml_blocks import ROWS
from pyengine.files.gguf import GGUF
from pyengine.files.safetensors import DTYPES, SafetensorsFile
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.oracle.trace import Trace, record_trace
from pyengine.quantizer.quantize import quantize
from pyengine.text.gguf_vocabulary import tokenizer_json

CORPUS = Path(__file__).parents[2] / "tests" / "fuzz_corpus"

# Every kind of layer and tensor, in 40 kB.
CONFIG = {
    **COMMON,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": rope(0.5, [2, 1, 1]),
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
# The same with rows of 256, for every block type.
BLOCKS = CONFIG | {"hidden_size": 256, "num_experts": 2, "num_experts_per_tok": 1}
EVERY_BLOCK = {
    "token_embd": "IQ3_S",
    "^output": "Q6_K",
    "blk.0.attn_qkv": "Q4_K",
    "blk.0.attn_gate": "Q5_K",
    "blk.0.ssm_out": "Q4_1",
    "blk.0.ffn_gate_exps": "Q2_K",
    "blk.0.ffn_up_exps": "IQ4_XS",
    "blk.0.ffn_down_exps": "MXFP4",
    "blk.0.ffn_gate_shexp": "NVFP4",
    "blk.0.ffn_up_shexp": "IQ2_XXS",
    "blk.0.ffn_down_shexp": "Q5_0",
    "blk.1.attn_q.weight": "Q3_K",
    "blk.1.attn_k.weight": "IQ1_M",
    "blk.1.attn_v.weight": "IQ2_XS",
    "blk.1.attn_output": "Q5_1",
    "blk.1.ffn_gate_exps": "IQ2_S",
    "blk.1.ffn_up_exps": "IQ3_XXS",
    "blk.1.ffn_down_exps": "IQ4_NL",
    "blk.1.ffn_gate_shexp": "TQ1_0",
    "blk.1.ffn_up_shexp": "TQ2_0",
    "blk.1.ffn_down_shexp": "Q4_0",
    "blk.0.ssm_beta": "IQ1_S",
}
BLOCKS_OF_LOCKED = {  # which has a kernel for each
    "token_embd": "Q2_K",
    "^output": "Q6_K",
    "blk.0.attn_qkv": "Q4_K",
    "blk.0.attn_gate": "Q5_K",
    "blk.0.ssm_out": "Q4_1",
    "blk.0.ffn_gate_exps": "Q2_K",
    "blk.0.ffn_up_exps": "IQ4_XS",
    "blk.0.ffn_down_exps": "MXFP4",
    "blk.0.ffn_gate_shexp": "Q3_K",
    "blk.0.ffn_up_shexp": "Q6_K",
    "blk.0.ffn_down_shexp": "Q5_0",
    "blk.1.attn_q.weight": "Q3_K",
    "blk.1.attn_k.weight": "Q5_0",
    "blk.1.attn_v.weight": "IQ4_XS",
    "blk.1.attn_output": "Q5_1",
    "blk.1.ffn_gate_exps": "Q4_K",
    "blk.1.ffn_up_exps": "Q5_K",
    "blk.1.ffn_down_exps": "IQ4_NL",
    "blk.1.ffn_gate_shexp": "MXFP4",
    "blk.1.ffn_up_shexp": "Q4_1",
    "blk.1.ffn_down_shexp": "Q4_0",
}
TOKENS = ["a", "b", "ab", "Ġ", "<|im_end|>", "<think>"]


def small_tokenizer() -> dict:
    padding = [f"[PAD{i}]" for i in range(len(TOKENS), CONFIG["vocab_size"])]
    return byte_level_tokenizer(300) | {
        "tokens": TOKENS + padding,
        "types": [1, 1, 1, 1, 3, 4] + [5] * len(padding),
        "merges": ["a b"],
        "eos_id": 4,
        "pad_id": 4,
    }


def write_model(path: Path) -> None:
    write_gguf(path, CONFIG, random_state_dict(CONFIG, SEED), name="tiny", tokenizer=small_tokenizer())


def write_blocks(path: Path, types: dict[str, str]) -> None:
    """A model of block types, each tensor of another one."""
    with tempfile.TemporaryDirectory() as folder:
        wide, unscaled = Path(folder) / "wide.gguf", Path(folder) / "unscaled.gguf"
        write_gguf(wide, BLOCKS, random_state_dict(BLOCKS, SEED), name="blocks", file_type="F32")
        quantize_as_llama_cpp(wide, unscaled, LlamaFileType.MOSTLY_Q8_0, types, importance(wide))
        rewrite(unscaled, path, tensors=scales(unscaled))
    made = {tensor.type.name for tensor in GGUF.open(path).tensors.values()}
    if made != {"F32", "Q8_0", *types.values()}:
        raise ValueError(f"{path}: want {types.values()}, got {made}")


def write_header(path: Path, model: GGUF, tensors: list[str]) -> None:
    """The model's metadata with a few of its tensors."""
    writer = gguf.GGUFWriter(path, "qwen35moe")
    for key in model.metadata:
        kind, value = model.metadata.type_of(key), model.metadata[key]
        if key == "general.architecture":
            continue
        if kind.length is None:
            writer.add_key_value(key, value, kind.kind)
        else:
            values = list(value)[:6] if key.startswith("tokenizer") else np.asarray(value).tolist()
            writer.add_key_value(key, values, kind.kind, sub_type=kind.element)
    for name in tensors:
        tensor = model.tensors[name]
        writer.add_tensor(
            name, np.ascontiguousarray(tensor.data), raw_dtype=None if tensor.type == T.F32 else tensor.type
        )
    finish(writer)


def write_every_type(path: Path) -> None:
    """Each type of value and of block."""
    writer = gguf.GGUFWriter(path, "test")
    for add, value in (
        (writer.add_uint8, 255),
        (writer.add_int8, -128),
        (writer.add_uint16, 1),
        (writer.add_int16, -5),
        (writer.add_int32, -9),
        (writer.add_uint64, 2**64 - 1),
        (writer.add_int64, -1),
        (writer.add_float32, 1e-6),
        (writer.add_float64, 0.1),
        (writer.add_bool, True),
        (writer.add_string, "grüß"),
        (writer.add_array, [11, 10, 0]),
        (writer.add_array, [True, False]),
        (writer.add_array, ["a", "", "Ġb"]),
    ):
        add(f"k{len(writer.kv_data[0])}", value)
    writer.add_custom_alignment(64)
    for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0):
        values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
        packed = values if kind == T.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(kind.name, packed, raw_dtype=None if kind in (T.F32, T.F16) else kind)
    finish(writer)


def write_every_block(path: Path) -> None:
    """A row of each block type, two blocks, any bytes."""
    writer, rng = gguf.GGUFWriter(path, "test"), np.random.default_rng(SEED)
    for row in ROWS:
        if not row.dense:
            stored = rng.integers(0, 256, (1, 2 * row.nbytes), dtype=np.uint8)
            writer.add_tensor(row.name, stored, raw_dtype=row.ggml)
    finish(writer)


def write_few(path: Path) -> None:
    """What a reader of headers needs least: a value, a list, two tensors that touch."""
    writer = gguf.GGUFWriter(path, "test")
    writer.add_array("tokens", ["a", "bc"])
    writer.add_tensor("a", np.zeros((2, 8), np.float32))
    writer.add_tensor("b", np.zeros((1, 34), np.uint8), raw_dtype=T.Q8_0)
    finish(writer)


def finish(writer):
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()


def write_tensors(path: Path, tensors: dict, metadata=None) -> None:
    """tensors: name -> (dtype, shape), zeros."""
    with SafetensorsWriter(path, [(n, d, s) for n, (d, s) in tensors.items()], metadata) as writer:
        for name, (dtype, shape) in tensors.items():
            writer.write(name, np.zeros(shape, DTYPES[dtype]))


def main():
    for name in ("gguf", "safetensors", "trace", "json", "ids", "template", "model", "blocks"):
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
    path = CORPUS / "model" / "tiny.gguf"
    write_model(path)
    model = GGUF.open(path)
    write_header(CORPUS / "gguf" / "header", model, ["token_embd.weight", "output_norm.weight"])
    write_every_type(CORPUS / "gguf" / "types")
    write_every_block(CORPUS / "gguf" / "blocks")
    write_blocks(CORPUS / "blocks" / "every", EVERY_BLOCK)
    write_blocks(CORPUS / "blocks" / "locked", BLOCKS_OF_LOCKED)
    write_few(CORPUS / "gguf" / "few")
    (CORPUS / "gguf" / "bare").write_bytes(b"GGUF\3\0\0\0" + bytes(16))

    write_tensors(CORPUS / "safetensors" / "types", {d: (d, (2, 3)) for d in DTYPES}, {"format": "pt"})
    write_tensors(CORPUS / "safetensors" / "two", {"a": ("F32", (2,)), "b": ("U8", (3,))})
    trace = record_trace(pyengine.load(path, threads=1), [1, 2])
    some = {name: array[:, :4] for name, array in list(trace.tensors.items())[:3]}
    Trace(trace.ids, some | {"experts": np.array([[0, 2], [1, 0]])}, "locked").save(CORPUS / "trace" / "some")
    Trace(trace.ids, {"lm_head": trace.tensors["lm_head"][:, :6]}, "locked").save(CORPUS / "trace" / "head")
    part = {"model.layers.0": trace.tensors["model.layers.0"][1:, 2:4]}
    rows, columns = {"model.layers.0": np.array([1])}, {"model.layers.0": np.array([2, 3])}
    steps = Trace(trace.ids, part, "mine", rows=rows, columns=columns, steps=(1, 1), resolution=5e-5)
    steps.save(CORPUS / "trace" / "part")

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "int8"
        quantize(path, directory, shard_bytes=10_000)
        for name in ("config.json", "generation_config.json"):
            (CORPUS / "json" / name).write_bytes((directory / name).read_bytes())
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        said = json.loads((directory / "noesis_provenance.json").read_text())
        first = sorted(directory.glob("*.safetensors"))[0]
        shapes = {
            n: (t.dtype, tuple(min(s, 4) for s in t.shape))
            for n, t in SafetensorsFile.open(first).tensors.items()
        }
    write_tensors(CORPUS / "safetensors" / "shard", shapes, {"format": "pt"})
    index["weight_map"] = dict(list(index["weight_map"].items())[:4])
    said["tensors"] = dict(list(said["tensors"].items())[:3])
    tokenizer = tokenizer_json(model)
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:2]
    for name, value in (("index", index), ("provenance", said), ("tokenizer", tokenizer)):
        (CORPUS / "json" / f"{name}.json").write_text(json.dumps(value))
    np.save(CORPUS / "ids" / "i8.npy", np.array([1, 2, 3]))
    np.save(CORPUS / "ids" / "u2.npy", np.array([4, 5], ">u2"))
    # The other templates were written by hand; the small ones are tried often.
    (CORPUS / "template" / "golden").write_text(small_tokenizer()["chat_template"])
    size = sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file())
    print(f"{CORPUS}: {size:,} bytes")


if __name__ == "__main__":
    main()
