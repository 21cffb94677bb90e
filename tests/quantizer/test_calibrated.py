"""Checkpoints whose codes a calibration chose: bytes, layers in order, policies, provenance, refusals."""

import json
import warnings

import numpy as np
import pytest
from calibrating import calibrate, exaggerate
from hypothesis import given, settings
from hypothesis import strategies as st
from imatrices import entries, write
from paths import GOLDEN

import pyengine
from pyengine.calibration import imatrix
from pyengine.checkpoint import provenance
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.core import rounding
from pyengine.core.threads import Pool
from pyengine.errors import InputError, PyengineError, PyengineWarning
from pyengine.probabilities import log_softmax
from pyengine.quantizer import calibrated
from pyengine.quantizer.moments import Moments
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.verify_files import check_files

pytestmark = pytest.mark.filterwarnings("ignore:calibration. layer:pyengine.errors.PyengineWarning")

NAMES = ["legacy", "dense", "next", "pattern31", "bfloat16"]


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    """name -> its statistics' file, made once."""
    folder, made = tmp_path_factory.mktemp("stats"), {}

    def of(name):
        if name not in made:
            made[name] = calibrate(name, folder / f"{name}.gguf", 120, 90)
        return made[name]

    return of


@pytest.mark.parametrize(
    "name", [name if name == "bfloat16" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_layout_is_that_of_every_other_method(name, tmp_path, stats):
    """Names, shapes and dtypes; both arithmetics read it; it verifies with its statistics."""
    source = GOLDEN / f"{name}.gguf"
    quantize(source, int4=tmp_path / "gptq", scale="gptq", calibration=stats(name), threads=2)
    quantize(source, int4=tmp_path / "absmax", threads=2)
    one, other = (open_checkpoint(tmp_path / way).file.tensors for way in ("gptq", "absmax"))
    assert [(t.name, t.dtype, t.shape) for t in one.values()] == [
        (t.name, t.dtype, t.shape) for t in other.values()
    ]
    config = [json.loads(files(tmp_path / way)["config.json"]) for way in ("gptq", "absmax")]
    assert config[0] == config[1]
    assert np.isfinite(pyengine.load(tmp_path / "gptq").forward([1, 2, 3])).all()
    result = check_files(tmp_path / "gptq", source=source, calibration=stats(name))
    assert not result.faults and any("as " in line for line in result.checked)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["gptq", "awq"])
def test_threads_a_rerun_and_a_kill_change_no_byte(tmp_path, scale, monkeypatch):
    path = exaggerate(calibrate("next", tmp_path / "s.gguf", 120, 90))  # so that awq folds
    source, how = GOLDEN / "next.gguf", {"scale": scale, "calibration": path, "shard_bytes": 30000}
    quantize(source, int4=tmp_path / "one", int8=tmp_path / "one8", threads=1, **how)
    quantize(source, int4=tmp_path / "three", threads=3, **how)
    wanted = files(tmp_path / "one")
    assert files(tmp_path / "three") == wanted and len(wanted) > 8

    calls, matrix = [], calibrated.CompensatedRounding.matrix

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return matrix(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrated.CompensatedRounding, "matrix", killed)
        quantize(source, int4=tmp_path / "killed", threads=2, **how)
    kept = [p.name for p in (tmp_path / "killed.partial").glob("*.safetensors")]
    assert kept and not (tmp_path / "killed").exists()
    quantize(source, int4=tmp_path / "killed", threads=2, **how)
    assert files(tmp_path / "killed") == wanted


@pytest.mark.slow
def test_both_kinds_of_one_run_are_those_of_two(tmp_path, stats):
    """Each is calibrated behind quantized layers of its own."""
    source, how = (
        GOLDEN / "dense.gguf",
        {"scale": "gptq", "calibration": stats("dense"), "mix": "*.mlp.*=int4,*=int8"},
    )
    quantize(source, int8=tmp_path / "8", int4=tmp_path / "4", mixed=tmp_path / "m", **how)
    quantize(source, int4=tmp_path / "alone", **how)
    quantize(source, mixed=tmp_path / "mixed alone", **how)
    assert files(tmp_path / "4") == files(tmp_path / "alone")
    assert files(tmp_path / "m") == files(tmp_path / "mixed alone")
    result = check_files(tmp_path / "8", twin=tmp_path / "4")
    assert not result.faults


def distance(source, directory, ids):
    """KL divergence of a checkpoint from its source, mean over the tokens."""
    p, q = (log_softmax(pyengine.load(path).forward(ids)) for path in (source, directory))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.slow
def test_it_is_nearer_than_what_has_seen_no_text(tmp_path, stats):
    source = GOLDEN / "pattern31.gguf"
    statistics = imatrix.read(stats("pattern31"), open_checkpoint(source))
    quantize(source, int4=tmp_path / "gptq", scale="gptq", calibration=stats("pattern31"))
    quantize(source, int4=tmp_path / "mse", scale="mse")
    ids = statistics.run.ids[:24]
    assert distance(source, tmp_path / "gptq", ids) < 0.6 * distance(source, tmp_path / "mse", ids)


# ---- statistics of other programs --------------------------------------------------------------


@pytest.mark.slow
def test_weighted_by_columns(tmp_path, stats):
    """Columns that weigh more are nearer to the source; with equal weights, all alike."""
    source = GOLDEN / "pattern31.gguf"
    checkpoint = open_checkpoint(source)
    quantize(source, int4=tmp_path / "w", scale="weighted", calibration=stats("pattern31"))
    quantize(source, int4=tmp_path / "mse", scale="mse")
    statistics = imatrix.read(stats("pattern31"), checkpoint)
    name = "model.layers.0.mlp.experts.down_proj"
    ours, mse = (open_checkpoint(tmp_path / way).tensors[name] for way in ("w", "mse"))
    losses = []
    for made in ours, mse:
        error = made.float64() - checkpoint.tensors[name].float64()
        weights = np.stack([statistics.weights(name, e, error.shape[-1]) for e in range(len(error))])
        losses.append(float((error**2 * weights[:, None]).sum()))
    assert losses[0] < losses[1]
    assert not check_files(tmp_path / "w", source=source, calibration=stats("pattern31")).faults


def test_partial_statistics_warn(tmp_path, stats):
    """Weights without statistics, and experts with few tokens, are told."""
    found = entries("pattern31")
    found.pop("blk.0.attn_qkv.weight")
    sums, counts = found["blk.0.ffn_down_exps.weight"]
    sums[2], counts[2] = 0, 0
    path = write(tmp_path / "i.gguf", found)
    source = GOLDEN / "pattern31.gguf"
    with pytest.warns(PyengineWarning) as told:
        quantize(source, int4=tmp_path / "w", scale="weighted", calibration=path)
    said = [str(warning.message) for warning in told]
    assert any("weights have no statistics" in line and "in_proj_qkv" in line for line in said)
    assert any("stand by the whole layer: 2" in line for line in said)
    assert "run" not in provenance.read(tmp_path / "w")["calibration"]
    with pytest.raises(InputError, match="gptq: want statistics of `pyengine calibrate`"):
        quantize(source, int4=tmp_path / "g", scale="gptq", calibration=path)


# ---- experts without tokens --------------------------------------------------------------------


@pytest.mark.parametrize("all_experts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_unseen_experts_stand_by_their_layer(tmp_path, all_experts):
    """Three tokens leave most experts without any: finite scales, codes near the nearest, a warning."""
    source = GOLDEN / "pattern31.gguf"
    path = calibrate("pattern31", tmp_path / "s.gguf", 3, all_experts=all_experts)
    with pytest.warns(PyengineWarning) as told:
        quantize(source, int4=tmp_path / "g", scale="gptq", calibration=path)
        warnings.warn("one at least", PyengineWarning, stacklevel=1)
    assert any("stand by the whole layer" in str(w.message) for w in told) != all_experts
    made, was = open_checkpoint(tmp_path / "g"), open_checkpoint(source)
    for name, tensor in made.tensors.items():
        values, wanted = tensor.float64(), was.tensors[name].float64()
        assert np.isfinite(values).all(), name
        assert np.linalg.norm(values - wanted) < 0.3 * np.linalg.norm(wanted) + 1e-9, name


# ---- one linear --------------------------------------------------------------------------------


def loss(w, x, y, rounded, group):
    codes, scales = rounded
    v = codes * np.repeat(scales.astype(np.float64), group, axis=1)[:, : w.shape[1]]
    return float(((x @ w.T - y @ v.T) ** 2).sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40))
def test_the_target_is_what_the_source_gives(seed, n):
    """On its own tokens, behind inputs that are wrong: less loss than without the correction."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((16, n)).astype(np.float32)
    x = (rng.standard_normal((3 * n, n)) * np.exp(rng.standard_normal(n))).astype(np.float32)
    y = (x + 0.1 * x[:, ::-1]).astype(np.float32)
    pool, results = Pool(1), []
    for source in x, y:
        moments = Moments(pool, n)
        moments.add(source, y)
        moments.finish()
        results.append(loss(w, x, y, moments.round(w, 0, 127, 128), 128))
    assert results[0] < results[1]


def test_no_token_at_all_is_plain_rounding():
    pool, moments = Pool(1), Moments(Pool(1), 8)
    w = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    moments.finish()
    plain = rounding.round_weights(pool, w, np.full(8, 2.0**-8), 7, 128)
    for one, other in zip(moments.round(w, 0, 7, 128), plain):
        assert np.array_equal(one, other)


# ---- provenance, refusals ----------------------------------------------------------------------


def test_provenance(tmp_path, stats):
    source, directory = GOLDEN / "dense.gguf", tmp_path / "g"
    quantize(source, int4=directory, scale="gptq", calibration=stats("dense"))
    said = provenance.read(directory)
    assert said["method"] == "gptq" and said["seed"] == 1729
    noted = said["calibration"]
    assert noted["sha256"] == provenance.describe_file(stats("dense"))["sha256"]
    assert [text["tokens"] for text in noted["texts"]] == [120, 90] and noted["context"] == 24
    assert not check_files(directory).faults
    result = check_files(directory, source=source)
    assert not result.faults and any("--calibration" in line for line in result.not_checked)
    other = calibrate("dense", tmp_path / "other.gguf", 50)
    (fault,) = check_files(directory, source=source, calibration=other).faults
    assert "calibration.sha256" in fault
    forged = dict(said, calibration=dict(noted, sha256="0" * 64))
    (directory / provenance.FILE_NAME).write_text(json.dumps(forged))
    assert any("twin.id" in fault for fault in check_files(directory).faults)


def test_refused(tmp_path, stats):
    source, out = GOLDEN / "dense.gguf", tmp_path / "out"
    other = stats("bfloat16")
    cases = [
        ({"scale": "gptq"}, "scale: gptq: want --calibration STATS"),
        ({"scale": "weighted"}, "scale: weighted: want --calibration STATS"),
        (
            {"scale": "mse", "calibration": stats("dense")},
            "want scale weighted or gptq or awq, which uses it, got mse",
        ),
        ({"scale": "gptq", "calibration": other}, "in_sum2: want (F32|weights of)"),
        ({"scale": "gptq", "calibration": stats("dense"), "group_size": 32}, "group size: want 128"),
        ({"scale": "rtn", "calibration": stats("dense")}, "scale: want absmax or .* or gptq or awq"),
    ]
    for options, message in cases:
        with pytest.raises(PyengineError, match=message) as error:
            quantize(source, int4=out, **options)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == []


@pytest.mark.slow
def test_command(tmp_path, stats, capsys):
    source = str(GOLDEN / "dense.gguf")
    how = ["--calibration", str(stats("dense"))]
    assert main(["quantize", source, "--int4", str(tmp_path / "a"), *how]) in (0, None)
    assert provenance.read(tmp_path / "a")["method"] == "gptq"
    assert main(["verify-files", str(tmp_path / "a"), "--source", source, *how]) in (0, None)
    assert main(["quantize", source, "--int4", str(tmp_path / "b"), "--scale", "gptq"]) == 2
    assert main(["quantize", source, "--int4", str(tmp_path / "c"), "--calibration", "nowhere.gguf"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "nowhere.gguf" in lines[1]
    assert not (tmp_path / "c.partial").exists()
