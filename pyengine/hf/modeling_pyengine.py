"""Qwen3.5 and Qwen3-Next in INT8, INT4 or both as `pyengine quantize` writes them, in transformers.

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

The model is transformers' own `Qwen3_5MoeForCausalLM`, `Qwen3_5ForCausalLM` or `Qwen3NextForCausalLM`.  Its
attention and delta-net projections, MLPs, shared experts, routers and routed experts hold the checkpoint's
tensors as they are stored, and dequantize them in each forward pass: a weight is code * scale, one float16
scale for each row and group of `pyengine_group_size` columns, no zero points.  Weights never exist as floats
except those of the module at work; of the routed experts, those of the one expert at work.

    tensor                       INT8                              INT4
    NAME.weight                  weight_i8 int8 [out, in]          weight_i4 uint8 [out, in / 2]
                                 weight_scale_i8                   weight_scale_i4
    experts.gate_up_proj,        gate_up_proj_q8                   gate_up_proj_q4 uint8
    experts.down_proj              int8 [experts, out, in]           [experts, out, in / 2]
                                 gate_up_proj_scale_q8             gate_up_proj_scale_q4

Scales are float16 [n_groups, out], or [experts, n_groups, out].  An INT4 byte holds two columns, the
even one in its low nibble, each as code + 8.

`config.pyengine_bits` says which of the two a weight is.  Of a mixed checkpoint `config.pyengine_mix` does:
[[pattern, bits]], of which the first that matches the weight's name decides (fnmatch's patterns; a last
".weight" may be left out).  `pyengine_bits` is then what no pattern matches.

`config.pyengine_dequantize` says what a weight is rounded to:
    "exact"      the activations' dtype: not at all in float32 and float64, which hold every product
    "bfloat16"   bfloat16, whatever the activations are: what a server that keeps bfloat16 weights has

This file needs torch and transformers >= 5 and nothing else.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeExperts,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTopKRouter,
)
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextExperts,
    Qwen3NextForCausalLM,
    Qwen3NextTopKRouter,
)

# Linears that the checkpoint keeps as floats: too small, or too sensitive, to be worth fewer bits.
KEPT = ("in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate", "lm_head")

# Parameters that stay float32, as the checkpoint has them, in a model loaded in half precision: the decay
# of the delta net, of which an exponential is taken, and the norms, whose modules compute in float32.  Every
# other float meets activations in one operation, and must have their dtype.
FLOAT32 = ("A_log", "dt_bias", "norm.weight")


class PyengineConfig(Qwen3_5MoeTextConfig):
    """Qwen3_5MoeTextConfig, and how the weights are stored.

    A model type of its own: as `qwen3_5_moe_text`, the checkpoint would load without this file, with
    random numbers for every weight whose name transformers does not know.
    """

    model_type = "pyengine_qwen3_5_moe"
    base_model_tp_plan = None  # tensor parallelism would have to split codes and scales together

    pyengine_bits: int = 8
    pyengine_mix: list | None = None
    pyengine_group_size: int = 128
    pyengine_dequantize: str = "exact"


class PyengineDenseConfig(Qwen3_5TextConfig):
    """The same of Qwen3_5TextConfig."""

    model_type = "pyengine_qwen3_5"
    base_model_tp_plan = None

    pyengine_bits: int = 8
    pyengine_mix: list | None = None
    pyengine_group_size: int = 128
    pyengine_dequantize: str = "exact"


class PyengineNextConfig(Qwen3NextConfig):
    """The same of Qwen3NextConfig."""

    model_type = "pyengine_qwen3_next"
    base_model_tp_plan = None

    pyengine_bits: int = 8
    pyengine_mix: list | None = None
    pyengine_group_size: int = 128
    pyengine_dequantize: str = "exact"


AnyConfig = PyengineConfig | PyengineDenseConfig | PyengineNextConfig

# ---- modules that hold codes and scales ------------------------------------------------------


class Quantized(nn.Module):
    """Codes and float16 scales as parameters without gradients, whose dtypes nothing changes.

    Parameters and not buffers: accelerate leaves buffers on the device when it offloads a module.
    """

    def set_format(self, config: AnyConfig, path: str) -> None:
        """path: the module's, which with a weight's name is the name that patterns are of."""
        self.path, self.mix, self.rest = path, config.pyengine_mix or [], config.pyengine_bits
        self.bits: dict[str, int] = {}  # by the weight's name
        self.group_size, self.rounding = config.pyengine_group_size, config.pyengine_dequantize
        for bits in (self.rest, *(bits for _, bits in self.mix)):
            if bits not in (8, 4):
                raise ValueError(f"pyengine_bits, pyengine_mix: want 8 or 4, got {bits!r}")
        if self.rounding not in ("exact", "bfloat16"):
            raise ValueError(f"pyengine_dequantize: want 'exact' or 'bfloat16', got {self.rounding!r}")

    def add_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Empty codes and scales of a weight [.., out, in], under the checkpoint's names."""
        *stack, rows, cols = shape
        self.bits[name] = bits_of(f"{self.path}.{name}", self.mix, self.rest)
        width, dtype = (cols, torch.int8) if self.bits[name] == 8 else (cols // 2, torch.uint8)
        codes, scales = self._names(name, bool(stack))
        groups = -(-cols // self.group_size)
        self.register_parameter(codes, _parameter((*stack, rows, width), dtype))
        self.register_parameter(scales, _parameter((*stack, groups, rows), torch.float16))

    def weight_of(self, name: str, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """A weight [out, in] in `dtype`, dequantized; of one expert of a stack, if it is one."""
        codes, scales = (getattr(self, n) for n in self._names(name, expert is not None))
        if expert is not None:
            codes, scales = codes[expert], scales[expert]
        weight = dequantize(codes, scales, self.group_size, dtype)
        return weight.to(torch.bfloat16).to(dtype) if self.rounding == "bfloat16" else weight

    def _names(self, name: str, stacked: bool) -> tuple[str, str]:
        mark = f"{'q' if stacked else 'i'}{self.bits[name]}"
        return f"{name}_{mark}", f"{name}_scale_{mark}"

    def register_parameter(self, name, param):
        # Loading wraps every floating tensor as a parameter that wants a gradient.
        super().register_parameter(name, None if param is None else param.requires_grad_(False))

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` and its like convert what is floating: the scales would be
        # rounded, and the model with them.  As integers they follow to devices only.
        def as_bits(tensor):
            if tensor.dtype != torch.float16:
                return fn(tensor)
            return fn(tensor.view(torch.int16)).view(torch.float16)

        return super()._apply(as_bits, recurse)


class QuantizedLinear(Quantized):
    """`nn.Linear` without a bias."""

    def __init__(self, config: AnyConfig, path: str, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.set_format(config, path)
        self.add_weight("weight", (out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_of("weight", x.dtype))

    def extra_repr(self) -> str:
        bits = self.bits["weight"]
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


class QuantizedRouter(Quantized):
    """The router; with transformers' own as its other base, which `output_router_logits` looks for."""

    def __init__(self, config: PyengineConfig | PyengineNextConfig, path: str):
        super().__init__(config)
        del self.weight
        self.set_format(config, path)
        self.add_weight("weight", (self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor):
        """[tokens, hidden] -> logits [tokens, experts], weights and indices [tokens, top_k]."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(hidden_states, self.weight_of("weight", hidden_states.dtype))
        probabilities = F.softmax(logits, dtype=torch.float32, dim=-1)
        weights, indices = torch.topk(probabilities, self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), indices


class QuantizedMoeRouter(QuantizedRouter, Qwen3_5MoeTopKRouter):
    pass


class QuantizedNextRouter(QuantizedRouter, Qwen3NextTopKRouter):
    pass


class QuantizedExperts(Quantized):
    """The routed experts: 3-D codes and scales, gate rows before up rows."""

    def __init__(self, config: PyengineConfig | PyengineNextConfig, path: str):
        super().__init__()
        self.num_experts, hidden = config.num_experts, config.hidden_size
        self.set_format(config, path)
        self.add_weight("gate_up_proj", (self.num_experts, 2 * config.moe_intermediate_size, hidden))
        self.add_weight("down_proj", (self.num_experts, hidden, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states [tokens, hidden]; index and weights [tokens, top_k] -> [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            y = self._expert(expert, hidden_states[token]) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.weight_of("gate_up_proj", x.dtype, expert)).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.weight_of("down_proj", x.dtype, expert))


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """codes int8 [out, in] or uint8 [out, in / 2], scales float16 [n_groups, out] -> [out, in].

    Seven bits times eleven: float32 holds every product, and it is rounded to `dtype` once.
    """
    if codes.dtype == torch.uint8:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_column = scales.to(wide).T.repeat_interleave(group_size, dim=-1)[:, : codes.shape[-1]]
    return (codes.to(wide) * per_column).to(dtype)


def bits_of(name: str, mix: list, rest: int) -> int:
    """Of a parameter: by the first pattern that matches its name, with or without a last ".weight"."""
    names = name, name.removesuffix(".weight")
    return next((bits for pattern, bits in mix if any(fnmatchcase(n, pattern) for n in names)), rest)


def _parameter(shape, dtype):
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


# ---- the model -------------------------------------------------------------------------------


class PyengineForCausalLM(Qwen3_5MoeForCausalLM):
    """`Qwen3_5MoeForCausalLM` whose linears, routers and experts are quantized."""

    config_class = PyengineConfig
    _keep_in_fp32_modules_strict = FLOAT32
    _can_compile_fullgraph = False  # the loop over the experts that were hit depends on data
    _tp_plan = None

    def __init__(self, config: PyengineConfig):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            _quantize_modules(layer, config, f"model.layers.{i}")


class PyengineDenseForCausalLM(Qwen3_5ForCausalLM):
    """`Qwen3_5ForCausalLM` whose linears are quantized."""

    config_class = PyengineDenseConfig
    _keep_in_fp32_modules_strict = FLOAT32
    _tp_plan = None

    def __init__(self, config: PyengineDenseConfig):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            _quantize_modules(layer, config, f"model.layers.{i}")


class PyengineNextForCausalLM(Qwen3NextForCausalLM):
    """`Qwen3NextForCausalLM` whose linears, routers and experts are quantized."""

    config_class = PyengineNextConfig
    _keep_in_fp32_modules_strict = FLOAT32
    _can_compile_fullgraph = False
    _tp_plan = None

    def __init__(self, config: PyengineNextConfig):
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            _quantize_modules(layer, config, f"model.layers.{i}")


def _quantize_modules(module: nn.Module, config: AnyConfig, above: str) -> None:
    """Replace what the checkpoint has quantized, everywhere below `module`, whose path is `above`."""
    for name, child in module.named_children():
        path = f"{above}.{name}"
        if isinstance(child, nn.Linear) and name not in KEPT:
            if child.bias is not None:
                raise ValueError(f"{name}: want no bias, got one (attention_bias)")
            setattr(module, name, QuantizedLinear(config, path, child.in_features, child.out_features))
        elif isinstance(child, Qwen3_5MoeTopKRouter):
            setattr(module, name, QuantizedMoeRouter(config, path))
        elif isinstance(child, Qwen3NextTopKRouter):
            setattr(module, name, QuantizedNextRouter(config, path))
        elif isinstance(child, (Qwen3_5MoeExperts, Qwen3NextExperts)):
            setattr(module, name, QuantizedExperts(config, path))
        else:
            _quantize_modules(child, config, path)
