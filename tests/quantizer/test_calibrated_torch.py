"""Every code and scale of a calibrated checkpoint, restated in PyTorch.

The inputs of each linear come from two runs of the engine, whose bits other tests hold to PyTorch: of the
source, and of the checkpoint that was written.  From there on the restatement stands alone: moments, damping,
target, factors, rounding, and which tokens an expert sees.
"""

import numpy as np
import pytest
from bits import assert_same_bits
from calibrating import calibrate, exaggerate
from paths import GOLDEN

import pyengine
from pyengine.calibration import imatrix
from pyengine.calibration.layer import Layer, embed
from pyengine.checkpoint.open import open_checkpoint
from pyengine.quantizer.quantize import quantize

torch = pytest.importorskip("torch")

import compensate_torch  # noqa: E402
import fold_torch  # noqa: E402
import quantizer_torch  # noqa: E402

pytestmark = [
    pytest.mark.golden,
    pytest.mark.filterwarnings("ignore:calibration. layer:pyengine.errors.PyengineWarning"),
]

F64 = torch.float64


def restated(w, source, made, largest, beside=None):
    """w [R, N], source, made [T, N], beside [T, R] float32 -> codes, scales."""
    x, y = (torch.from_numpy(np.ascontiguousarray(v)).to(F64) for v in (source, made))
    h, c = compensate_torch.products(y, y), compensate_torch.products(x, y)
    total = torch.zeros((), dtype=F64)
    for i in range(len(h)):
        total = total + h[i, i]
    mean = total / len(h)
    damped = h + torch.diag(torch.full((len(h),), 2.0**-8, dtype=F64) * (mean if mean > 0 else 1.0))
    v, u, d = compensate_torch.factors(damped)
    weights = torch.from_numpy(np.ascontiguousarray(w, np.float32))
    b = compensate_torch.products(weights.to(F64).T.contiguous(), c - h)
    if beside is not None:
        b = b + compensate_torch.products(torch.from_numpy(beside).to(F64), y)
    return compensate_torch.round_weights(weights, d, largest, 128, u, v, b)


class Runs:
    """The source's and the written checkpoint's layers, over the windows of the text."""

    def __init__(self, source, directory, run):
        self.models = [pyengine.load(path, threads=2) for path in (source, directory)]
        self.checkpoints = [model.checkpoint for model in self.models]
        self.windows = run.windows()
        self.hidden = [embed(checkpoint, run.ids) for checkpoint in self.checkpoints]

    def layer(self, index):
        return [Layer(m.pool, m.checkpoint, index) for m in self.models]

    def each(self, function):
        """[function(layer, hidden states of a window)], joined over the windows: source, then made."""
        return [
            np.concatenate([function(layer, self.hidden[i][rows]) for rows in self.windows])
            for i, layer in enumerate(self.layers)
        ]


class Fold:
    """Of awq: exponents of a layer by parameter and expert, of columns and of what is divided."""

    def __init__(self, checkpoint, statistics, largest):
        self.tensors, self.config = checkpoint.tensors, checkpoint.config
        self.statistics, self.largest = statistics, largest
        self.columns, self.divided = {}, {}

    def best(self, linears, channel=None):
        found = []
        for parameter, expert in linears:
            w = torch.from_numpy(self.tensors[parameter].float64(expert)).float()
            means = torch.from_numpy(self.statistics.weights(parameter, expert, w.shape[1]))
            found.append((w, means))
        return fold_torch.best(found, self.largest, channel=channel)

    def add(self, readers, e, divided):
        self.columns.update((reader, e) for reader in readers)
        self.divided[divided] = e

    def layer(self, index, inputs, quantized):
        """quantized: a parameter's name -> whether it is."""
        c, stem = self.config, f"model.layers.{index}"
        experts = range(c.num_experts) if inputs.experts else []
        e = self.best([(p, None) for p in inputs.mixer if quantized(p)])
        self.add([(p, None) for p in inputs.mixer], e, (f"{stem}.input_layernorm.weight", None))
        if inputs.mixer_output.endswith("out_proj.weight"):
            channel = list(range(c.linear_value_head_dim)) * c.linear_num_value_heads
            maker = f"{stem}.linear_attn.norm.weight"
        else:
            ratio, n = c.num_attention_heads // c.num_key_value_heads, c.head_dim
            channel = [h // ratio * n + d for h in range(c.num_attention_heads) for d in range(n)]
            maker = f"{stem}.self_attn.v_proj.weight"
        e = self.best([(inputs.mixer_output, None)], channel)
        self.add([(inputs.mixer_output, None)], e[channel], (maker, None))
        self.divided[maker, None] = e
        stacks = [(p, i) for i in experts for p in inputs.experts]
        mlp = [(p, None) for p in inputs.mlp]
        e = self.best([one for one in mlp if quantized(one[0])] + stacks)
        self.add(mlp + stacks, e, (f"{stem}.post_attention_layernorm.weight", None))
        up = next(p for p in inputs.mlp if p.endswith("up_proj.weight"))
        self.add([(inputs.down, None)], self.best([(inputs.down, None)]), (up, None))
        for i in experts:
            down = [(inputs.experts_down, i)]
            self.add(down, self.best(down), (inputs.experts[1], i))

    def weight(self, parameter, expert=None):
        """float64 [R, N], folded"""
        w = self.tensors[parameter].float64(expert)
        if (parameter, expert) in self.columns:
            w = w * 2.0 ** self.columns[parameter, expert].numpy()
        if (parameter, expert) in self.divided:
            w = w / 2.0 ** self.divided[parameter, expert].numpy()[:, None]
        return w

    def input(self, x, parameter, expert=None):
        if (parameter, expert) not in self.columns:
            return x
        return x / (2.0 ** self.columns[parameter, expert].numpy()).astype(np.float32)

    def check_floats(self, made):
        """Every norm and linear that stays floats -> how many were folded."""
        folded = 0
        for (name, _), e in {**self.columns, **self.divided}.items():
            tensor = made.tensors[name]
            if tensor.scales is not None:
                continue
            values = torch.from_numpy(self.tensors[name].float64())
            if name.endswith("norm.weight"):
                wanted = fold_torch.norm(values, e, 1.0 if "layernorm" in name else 0.0)
            else:
                wanted = torch.from_numpy(self.weight(name)).float()
                wanted = wanted.bfloat16().float() if tensor.type == "BF16" else wanted
            assert_same_bits(wanted.numpy(), tensor.stored_float32().reshape(tensor.shape), name)
            folded += int((e != 0).any())
        return folded


CASES = [("pattern31", 4, "gptq"), ("dense", 8, "gptq"), ("pattern31", 4, "awq")]


@pytest.mark.parametrize("name, bits, scale", CASES)
def test_every_code(tmp_path, name, bits, scale):
    source, directory = GOLDEN / f"{name}.gguf", tmp_path / "made"
    path = calibrate(name, tmp_path / "s.gguf", 30, 14)
    if scale == "awq":
        exaggerate(path)
    quantize(source, **{f"int{bits}": directory}, scale=scale, calibration=path)
    statistics = imatrix.read(path, open_checkpoint(source))
    run = statistics.run
    runs, largest, seen = Runs(source, directory, run), {8: 127, 4: 7}[bits], set()
    was, made = runs.checkpoints
    fold = Fold(was, statistics, largest)

    def compare(parameter, x, y, beside=None, expert=None):
        tensor = made.tensors[parameter]
        w = fold.weight(parameter, expert).astype(np.float32)
        codes, scales = restated(w, fold.input(x, parameter, expert), y, largest, beside)
        data, stored = (a if expert is None else a[expert] for a in (tensor.data, tensor.scales))
        if bits == 4:
            codes = quantizer_torch.pack_int4(codes)
        assert_same_bits(codes.numpy(), data, f"{parameter} {expert}")
        assert_same_bits(np.ascontiguousarray(scales.numpy().T), np.ascontiguousarray(stored), parameter)
        seen.add((parameter, expert))

    for index in range(was.config.num_hidden_layers):
        layers = runs.layers = runs.layer(index)
        inputs, hidden = layers[0].inputs, runs.hidden
        if scale == "awq":
            fold.layer(index, inputs, lambda parameter: made.tensors[parameter].scales is not None)
        x, y = runs.each(lambda layer, h: layer.norm("input_layernorm", h))
        for parameter in inputs.mixer:
            if made.tensors[parameter].scales is not None:
                compare(parameter, x, y)
        inner = runs.each(lambda layer, h: layer.mixer_inner(layer.norm("input_layernorm", h)))
        order = was.tensors[inputs.mixer_output].col_order
        in_order = inner[0] if order is None else inner[0][:, order]
        compare(inputs.mixer_output, in_order, inner[1], hidden[0] - hidden[1])
        for i, layer in enumerate(layers):
            hidden[i] = layer.add(hidden[i], layer.linear(inputs.mixer_output, inner[i]))
        x, y = runs.each(lambda layer, h: layer.norm("post_attention_layernorm", h))
        for parameter in inputs.mlp:
            if made.tensors[parameter].scales is not None:
                compare(parameter, x, y)
        outputs = [layer.mlp_inner(v) for layer, v in zip(layers, (x, y))]
        compare(inputs.down, *outputs)
        outputs = [layer.linear(inputs.down, v) for layer, v in zip(layers, outputs)]
        if inputs.experts_down is not None:
            weights, chosen = layers[1].route(y)
            experts = was.config.num_experts
            counts = np.bincount(chosen.reshape(-1), minlength=experts)
            for expert in range(experts):
                some = np.flatnonzero((chosen == expert).any(axis=1))
                factor = weights[chosen == expert][:, None]  # row by row: tokens ascending
                if counts[expert] < 0.05 * counts.mean() or not counts[expert]:
                    some, factor = np.arange(len(y)), np.ones((len(y), 1), np.float32)
                for parameter in inputs.experts:
                    compare(parameter, x[some] * factor, y[some] * factor, expert=expert)
                inner = [layer.expert_inner(expert, v[some]) for layer, v in zip(layers, (x, y))]
                compare(inputs.experts_down, *(v * factor for v in inner), expert=expert)
            routed = [np.zeros_like(v) for v in (x, y)]
            for i, (layer, v) in enumerate(zip(layers, (x, y))):
                weights, chosen = layer.route(v)
                for expert in range(experts):
                    some = np.flatnonzero((chosen == expert).any(axis=1))
                    if len(some):
                        out = layer.linear(inputs.experts_down, layer.expert_inner(expert, v[some]), expert)
                        routed[i][some] += out * weights[chosen == expert][:, None]
            outputs = [
                layer.join(r, v, h) for layer, r, v, h in zip(layers, routed, outputs, (x, y), strict=True)
            ]
        runs.hidden = [layer.add(h, v) for layer, h, v in zip(layers, hidden, outputs)]
    wanted = {name for name, tensor in made.tensors.items() if tensor.scales is not None}
    assert {parameter for parameter, _ in seen} == wanted
    assert scale != "awq" or fold.check_floats(made) > was.config.num_hidden_layers
