"""Channels that awq scales: what a fold leaves as it is, which one is chosen, the files, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from calibrating import calibrate, exaggerate
from hypothesis import given
from hypothesis import strategies as st
from imatrices import entries, write
from outliers import with_outliers
from paths import GOLDEN, TESTS

import pyengine
from pyengine.calibration import imatrix
from pyengine.calibration.calibrate import describe_run, take_statistics
from pyengine.census.texts import Text
from pyengine.checkpoint import provenance
from pyengine.checkpoint.names import layer_of
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.tensor import Tensor
from pyengine.core.threads import Pool
from pyengine.errors import InputError, PyengineError
from pyengine.merge.sources import open_models
from pyengine.probabilities import log_softmax
from pyengine.quantizer import folds, quality
from pyengine.quantizer.folds import ALPHAS, MOST, Folds, LayerFold, exponents_of
from pyengine.quantizer.plan import plan
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import check_files
from pyengine.reference import ReferenceModel

pytestmark = pytest.mark.filterwarnings("ignore:calibration. layer:pyengine.errors.PyengineWarning")


def bits_of(checkpoint, bits=4):
    return {t.name: bits for parameter in plan(checkpoint, bits) if parameter.bits for t in parameter.sources}


def folds_of(checkpoint, statistics=None):
    return Folds(Pool(1), checkpoint, statistics, bits_of(checkpoint), 128)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- a fold leaves the model as it is ----------------------------------------------------------


def folded(checkpoint, fold_of):
    """The checkpoint in float32 with every layer folded; fold_of(index) -> LayerFold."""
    tensors, quantized = {}, bits_of(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        index = layer_of(name)
        fold = LayerFold() if index is None else fold_of(index)
        if name in quantized:
            experts = range(tensor.shape[0]) if len(tensor.shape) == 3 else [None]
            parts = [fold.rows(tensor.float64(e).astype(np.float32), name, e, 0) for e in experts]
            values = np.stack(parts).reshape(tensor.shape)
        else:
            values = fold.plain(tensor).float64().astype(np.float32)
        tensors[name] = Tensor(name, "F32", tensor.shape, values, file_name=name)
    return dataclasses.replace(checkpoint, tensors=tensors, value_head_order="grouped")


UNFOLDED = {
    *("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.conv1d.weight"),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
}


@pytest.mark.parametrize("name", ["pattern31", "dense", "next"])
@pytest.mark.parametrize("of_norms", [0, MOST])
def test_a_fold_alone_leaves_the_model(name, of_norms, monkeypatch):
    """In float64: the same bits; but where 1 + a norm's weight, divided, less 1 needs more than 24 bits."""
    checkpoint, rng = open_checkpoint(GOLDEN / f"{name}.gguf"), np.random.default_rng(3)

    def some(self, site):
        name = site.linears[0][0]
        n = checkpoint.tensors[name].shape[-1] if site.shared is None else int(site.shared.max()) + 1
        reads_norm = site.shared is None and "down_proj" not in name
        return rng.integers(-MOST, (of_norms if reads_norm else MOST) + 1, n).astype(np.int32)

    monkeypatch.setattr(Folds, "_best", some)
    every = [folds_of(checkpoint).layer(i) for i in range(checkpoint.config.num_hidden_layers)]
    unfolded = folded(checkpoint, lambda index: LayerFold())
    other = folded(checkpoint, lambda index: every[index])
    changed = {n for n in checkpoint.tensors if not same(unfolded.tensors[n], other.tensors[n])}
    left = {n.rsplit("layers.", 1)[-1].split(".", 1)[-1] for n in set(checkpoint.tensors) - changed}
    assert left - {"embed_tokens.weight", "norm.weight", "weight"} <= UNFOLDED
    wanted, got = (ReferenceModel(c).forward([1, 2, 3, 4, 5]) for c in (unfolded, other))
    if of_norms == 0:
        assert np.array_equal(wanted, got)
        wrong = dict(other.tensors)
        n = "model.layers.0.input_layernorm.weight"  # not 1 + weight
        values = np.ldexp(checkpoint.tensors[n].float64(), -every[0].divided[n, None]).astype(np.float32)
        wrong[n] = Tensor(n, "F32", values.shape, values, file_name=n)
        planted = ReferenceModel(dataclasses.replace(other, tensors=wrong)).forward([1, 2, 3, 4, 5])
        assert np.abs(wanted - planted).max() > 2**-10 * np.abs(wanted).max()
    else:
        assert np.abs(wanted - got).max() < 2**-20 * np.abs(wanted).max()


def same(a, b):
    return np.array_equal(a.float64(), b.float64())


# ---- which fold --------------------------------------------------------------------------------


@given(st.lists(st.floats(2.0**-60, 2.0**60), min_size=1, max_size=40), st.sampled_from(ALPHAS))
def test_exponents(means, alpha):
    """Whole, bounded, greater for a greater channel; of equal channels none."""
    means = np.array(means)
    found = exponents_of(means, alpha)
    assert found.dtype == np.int32 and np.abs(found).max() <= MOST
    assert (np.diff(found[np.argsort(means)]) >= 0).all()
    assert not exponents_of(np.full(7, means[0]), alpha).any()
    logs = np.log2(means)
    wanted = alpha / 2 * (logs - logs.mean())
    assert (np.abs(np.clip(wanted, -MOST, MOST) - found) < 0.5 + 0.1).all()


def planted(statistics, linears, columns):
    """Statistics in which columns are 64 times as great, in mean square."""
    sums = dict(statistics.sums)
    for name in linears:
        sums[name] = sums[name] * np.where(columns, 64.0**2, 1.0)
    return dataclasses.replace(statistics, sums=sums)


def test_a_scale_that_was_planted_is_found(tmp_path):
    """Channels 64 times as great, whose weights are so much smaller: scales bring them back."""
    checkpoint = open_checkpoint(GOLDEN / "dense.gguf")
    statistics = imatrix.read(calibrate("dense", tmp_path / "s.gguf", 60), checkpoint)
    name = "model.layers.0.mlp.down_proj.weight"
    width = checkpoint.tensors[name].shape[-1]
    columns = np.arange(width) % 16 == 5
    fold = LayerFold()
    fold.columns[name, None] = np.where(columns, -6, 0).astype(np.int32)
    tensors = dict(checkpoint.tensors)
    values = fold.rows(tensors[name].rows_float32(None, 0, tensors[name].shape[0]), name, None, 0)
    tensors[name] = Tensor(name, "F32", values.shape, values, file_name=name)
    small = dataclasses.replace(checkpoint, tensors=tensors)
    site, errors = folds._Site([(name, None)]), {}
    search = folds_of(small, planted(statistics, [name], columns))
    found = search._best(site)
    assert found[columns].min() >= MOST - 1 > found[~columns].max()
    for way, exponents in (("without", 0 * found), ("with", found)):
        errors[way] = search._error(site, exponents)
    assert errors["with"] < 0.5 * errors["without"]


@pytest.mark.slow
def test_outliers_are_what_it_is_for(tmp_path):
    """The trained model with great channels: the same bits in float64, but not the same to gptq."""
    trained = TESTS / "trained" / "bf16.gguf"
    path = with_outliers(trained, tmp_path / "great.gguf")
    ids = np.random.default_rng(5).integers(0, 2048, 48)
    plain, great = (pyengine.load(p, arithmetic="float64").forward(ids[:6]) for p in (trained, path))
    assert np.array_equal(plain, great)
    model = pyengine.load(path, threads=2)
    text = Text("t", "0" * 64, 900, np.random.default_rng(6).integers(0, 2048, 900))
    take_statistics(model, describe_run(model, [text], 128), tmp_path / "s.gguf")
    source, divergence = log_softmax(model.forward(ids)), {}
    for scale in "gptq", "awq":
        quantize(path, int4=tmp_path / scale, scale=scale, calibration=tmp_path / "s.gguf", threads=2)
        made = log_softmax(pyengine.load(tmp_path / scale, threads=2).forward(ids))
        divergence[scale] = float((np.exp(source) * (source - made)).sum(axis=1).mean())
    assert divergence["awq"] < 0.5 * divergence["gptq"]


# ---- files -------------------------------------------------------------------------------------


def test_layout_provenance_and_verification(tmp_path):
    """Names, shapes, dtypes and configuration of every other method; the source gives it again."""
    source = GOLDEN / "dense.gguf"
    path = exaggerate(calibrate("dense", tmp_path / "s.gguf", 30))
    how = {"scale": "awq", "calibration": path}
    quantize(source, int4=tmp_path / "awq", int8=tmp_path / "awq8", **how)
    quantize(source, int4=tmp_path / "absmax")
    one, other = (open_checkpoint(tmp_path / way) for way in ("awq", "absmax"))
    assert [(t.name, t.dtype, t.shape) for t in one.file.tensors.values()] == [
        (t.name, t.dtype, t.shape) for t in other.file.tensors.values()
    ]
    configs = [json.loads(files(tmp_path / way)["config.json"]) for way in ("awq", "absmax")]
    assert configs[0] == configs[1]
    norms = [name for name in one.tensors if name.endswith("layernorm.weight")]
    assert any(not same(one.tensors[name], other.tensors[name]) for name in norms)
    said = provenance.read(tmp_path / "awq")
    assert said["method"] == "awq" and said["seed"] == 1729
    assert said["calibration"]["sha256"] == provenance.describe_file(path)["sha256"]
    result = check_files(tmp_path / "awq", tmp_path / "awq8", source, path)
    assert not result.faults and sum(f"as {source} gives it" in line for line in result.checked) == 2
    with pytest.raises(InputError, match="got awq, whose channels are scaled"):
        quality.measure(tmp_path / "awq", source)
    with pytest.raises(InputError, match="can be added to another model's, got awq"):
        open_models((str(source), str(tmp_path / "awq")), str(source))


def test_refused(tmp_path):
    source = GOLDEN / "dense.gguf"
    cases = [
        ({}, "scale: awq: want --calibration STATS"),
        ({"calibration": tmp_path / "none.gguf"}, "none.gguf"),
        ({"calibration": write(tmp_path / "i.gguf", entries("dense"))}, "awq: want statistics of `pyengine"),
        ({"calibration": tmp_path / "i.gguf", "group_size": 32}, "group size: want 128.* for awq, got 32"),
    ]
    for options, message in cases:
        with pytest.raises(PyengineError, match=message) as error:
            quantize(source, int4=tmp_path / "out", scale="awq", **options)
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]
