"""llama.cpp's tensors as a trace: its names, and its order of value heads, turned into Hugging Face's.

llama.cpp hands every tensor of its graph to an evaluation callback (`cb_eval`; the eval-callback
example prints them).  `record_llama_cpp` runs llama-cpp-python with one.  A C++ program writes the
tensors of its callback into a trace file with `"names": "llama.cpp"`.  Their shapes are ggml's `ne`,
reversed, without leading ones.  Of tensors with one name, the first counts.

The names are those of llama.cpp's src/models/qwen35moe.cpp, qwen35.cpp and qwen3next.cpp.  The converter lays
the value heads of the first two out tiled (head t uses key head t mod n_k).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from dataclasses import replace

import numpy as np

from ...checkpoint.config import FULL, LINEAR, Config
from ...checkpoint.families import family_of, value_head_orders
from ...checkpoint.families.qwen3next import qkvz_order
from ...errors import InputError
from ...ids import as_ids
from ...optional import require
from ..trace import LLAMA_CPP, Trace
from ..widths import widths

# llama.cpp's name: Hugging Face's of the same values.
_MODEL = {
    "model.input_embed": ["model.embed_tokens"],
    "model.embed_tokens": ["model.embed_tokens"],  # of qwen3next
    "result_norm": ["model.norm"],
    "result_output": ["lm_head"],
}
_LAYER = {"attn_norm": ["input_layernorm"], "attn_post_norm": ["post_attention_layernorm"], "l_out": [""]}
_EXPERTS = {
    "ffn_moe_logits": ["mlp.gate"],
    "ffn_moe_topk": ["mlp.gate.2"],
    "ffn_moe_weights_norm": ["mlp.gate.1"],
    "ffn_moe_out": ["mlp.experts"],
    "ffn_gate": ["mlp.shared_expert.gate_proj"],
    "ffn_up": ["mlp.shared_expert.up_proj"],
    "ffn_shexp": ["mlp.shared_expert.down_proj", "mlp.shared_expert"],
    "shared_expert_gate": ["mlp.shared_expert_gate"],
    "ffn_out": ["mlp"],
}
_DENSE = {"ffn_gate": ["mlp.gate_proj"], "ffn_up": ["mlp.up_proj"], "ffn_out": ["mlp.down_proj", "mlp"]}
_MIXER = {
    LINEAR: {
        "linear_attn_qkv_mixed": ["linear_attn.in_proj_qkv"],
        "z": ["linear_attn.in_proj_z"],
        "beta": ["linear_attn.in_proj_b"],
        "alpha": ["linear_attn.in_proj_a"],
        "linear_attn_mixed_qkvz": ["linear_attn.in_proj_qkvz"],
        "linear_attn_mixed_ba": ["linear_attn.in_proj_ba"],
        "final_output": ["linear_attn.norm"],
        "linear_attn_out": ["linear_attn.out_proj", "linear_attn"],
    },
    FULL: {
        "Qcur_full": ["self_attn.q_proj"],
        "Kcur": ["self_attn.k_proj"],
        "Vcur": ["self_attn.v_proj"],
        "Qcur_normed": ["self_attn.q_norm"],
        "Kcur_normed": ["self_attn.k_norm"],
        "attn_output": ["self_attn.o_proj", "self_attn"],
    },
}
# What a module's values are, for checkpoint.value_head_orders.
ORDERS = {
    "linear_attn.in_proj_qkv": "channels",
    "linear_attn.in_proj_z": "values",
    "linear_attn.in_proj_b": "heads",
    "linear_attn.in_proj_a": "heads",
    "linear_attn.norm": "values",
}
_WANTED = {*_MODEL, *_LAYER, *_EXPERTS, *_DENSE, *_MIXER[LINEAR], *_MIXER[FULL]}


def to_hugging_face(trace: Trace, config: Config) -> Trace:
    """A trace with llama.cpp's names as one with Hugging Face's; other tensors are left out.

    Errors: InputError, a shape that the model does not have.
    """
    orders, sizes, tensors, rows = value_head_orders(config), widths(config), {}, {}
    last = len(trace.ids) - 1
    for name, array in trace.tensors.items():
        for module in modules_of(name, config):
            order = orders.get(ORDERS.get(module.split(".", 3)[-1]))
            held = trace.rows.get(name)
            count = len(trace.ids) if held is None else len(held)
            tensors[module] = _rows(name, array, count, sizes.get(module), order)
            if held is not None:
                rows[module] = held
            elif len(tensors[module]) <= last:  # the last layer may be computed for the last token alone
                rows[module] = np.array([last])
    if len(family_of(config).in_proj) == 2:
        tensors = _joined_qkvz(tensors, config)
    return replace(trace, tensors=tensors, names="", rows=rows)


def _joined_qkvz(tensors: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """What a GGUF with `attn_qkv` and `attn_gate` gives as in_proj_qkv and in_proj_z, as in_proj_qkvz."""
    joined = {}
    for name, array in tensors.items():
        stem, _, part = name.rpartition("in_proj_")
        other = tensors.get(f"{stem}in_proj_z")
        if part == "qkv" and other is not None:
            joined[f"{stem}in_proj_qkvz"] = np.concatenate([array, other], axis=1)[:, qkvz_order(config)]
        elif part not in ("qkv", "z"):
            joined[name] = array
    return joined


def modules_of(name: str, config: Config) -> list[str]:
    """Hugging Face's names of the tensor `attn_norm-3`; none for what no module puts out."""
    if name in _MODEL:
        return _MODEL[name]
    stem, _, layer = name.rpartition("-")
    if not re.fullmatch(r"\d{1,6}", layer) or int(layer) >= config.num_hidden_layers:
        return []
    mlp = _EXPERTS if config.has_experts(int(layer)) else _DENSE
    parts = (_LAYER | _MIXER[config.layer_types[int(layer)]] | mlp).get(stem, [])
    return [f"model.layers.{layer}.{part}".rstrip(".") for part in parts]


def _rows(name, array, tokens, width, order):
    """width: of a token, where the model has the module."""
    if tokens > 1 and array.size == width:
        rows = array.reshape(1, -1)
    elif array.size % tokens:
        raise InputError(f"{name}: want values for {tokens} tokens, got shape {list(array.shape)}")
    else:
        rows = array.reshape(tokens, -1)
    if order is None:
        return rows
    if rows.shape[1] != len(order):
        raise InputError(f"{name}: want {len(order)} values a token, got {rows.shape[1]}")
    return rows[:, order]


# ---- through llama-cpp-python ----------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """How a ggml_tensor begins."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    ]


_TYPES = {0: np.float32, 1: np.float16, 26: np.int32}  # ggml_type


def record_llama_cpp(path, ids, threads: int | None = None) -> Trace:
    """Run a GGUF through llama-cpp-python over ids [T], and keep what its modules put out.

    -> a trace with llama.cpp's names: `to_hugging_face` turns it.  `verify` and `assert_trace_equal`
    do so themselves.  Errors: InputError: llama-cpp-python is not installed or cannot run the file.
    """
    llama, get = _library()
    vocabulary = np.iinfo(np.int32).max
    ids = as_ids(ids, vocabulary)
    tensors: dict[str, np.ndarray] = {}

    @llama.ggml_backend_sched_eval_callback
    def callback(pointer, ask, _):
        name = get.ggml_get_name(pointer).decode(errors="replace")
        stem, _, layer = name.rpartition("-")
        wanted = name in _MODEL or (stem in _WANTED and layer.isdecimal())  # not "z-0 (reshaped)"
        if wanted and not ask:
            array = _read(pointer, get)
            if array is not None:
                tensors.setdefault(name, array)
        return wanted if ask else True

    with _quiet(), _context(llama, path, len(ids), threads, callback) as context:
        _decode(llama, context, ids, path)
    return Trace(ids, _outputs(tensors), "llama.cpp", LLAMA_CPP)


def _outputs(tensors):
    """Without the names that mean an inner step in a layer with a delta net: its attn_output."""
    linear = {name.rpartition("-")[2] for name in tensors if name.startswith("linear_attn_out-")}
    inner = {f"{stem}-{layer}" for stem in _MIXER[FULL] for layer in linear}
    return {name: array for name, array in tensors.items() if name not in inner}


def _library():
    llama_cpp, _ggml = (
        require(module, extra="peers", what="llama.cpp", package="llama-cpp-python")
        for module in ("llama_cpp", "llama_cpp._ggml")
    )
    get = _ggml.libggml
    base = (
        get
        if hasattr(get, "ggml_get_name")
        else ctypes.CDLL(str(_ggml.libggml_base_path / "libggml-base.so"))
    )
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    base.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    base.ggml_backend_tensor_get.restype = None
    base.ggml_nbytes.argtypes, base.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    return llama_cpp.llama_cpp, base


def _read(pointer, get) -> np.ndarray | None:
    """A tensor's values from whatever memory they are in; None of a type that no module has."""
    tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
    kind = _TYPES.get(tensor.type)
    if kind is None:
        return None
    raw = np.empty(get.ggml_nbytes(pointer), np.uint8)
    get.ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, raw.nbytes)
    shape, strides = list(tensor.ne)[::-1], list(tensor.nb)[::-1]
    array = np.ndarray(shape, kind, raw, strides=strides).copy()
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array.astype(np.int64) if kind is np.int32 else array


@contextlib.contextmanager
def _context(llama, path, tokens, threads, callback):
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        raise InputError(f"{path}: want a GGUF that llama.cpp runs, got one that it refuses")
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = tokens
    parameters.n_threads = parameters.n_threads_batch = threads or os.cpu_count() or 1
    parameters.cb_eval = callback
    context = llama.llama_init_from_model(model, parameters)
    try:
        if not context:
            raise InputError(f"{path}: want a model that llama.cpp runs on {tokens} tokens")
        yield context
    finally:
        if context:
            llama.llama_free(context)
        llama.llama_model_free(model)


def _decode(llama, context, ids, path):
    batch = llama.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        if llama.llama_decode(context, batch):
            raise InputError(f"{path}: want ids that llama.cpp runs, got an error from llama_decode")
    finally:
        llama.llama_batch_free(batch)


@contextlib.contextmanager
def _quiet():
    """llama.cpp writes to the process's own stderr."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
