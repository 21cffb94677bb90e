"""Every module's output on every golden run, against what PyTorch computed: in bits.

`tools/golden/make_golden.py` made the files, their lock, and says what a run is.  The second half of this
file plants faults, and asks that the same comparison sees them and names the first wrong tensor.
"""

import dataclasses
import warnings

import numpy as np
import pytest
from activation_rounding import activation_quantizer, half_away, half_even
from make_golden import (
    LONGEST,
    MOST_EXCEPTIONS,
    RUNS,
    SHORT,
    GoldenError,
    across_boundaries,
    digest,
    exceptions,
    file_digest,
    pieces,
    prompt,
    read_prompts,
    rounded,
    run_model,
    trace_file,
    trace_of,
    ulps,
)

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.core import ops
from pyengine.core.threads import Pool
from pyengine.decoder.model import LockedModel
from pyengine.oracle.bits import compare_tensors
from pyengine.oracle.trace import Trace
from pyengine.quantizer.quantize import quantize
from pyengine.reference import ReferenceModel

MODELS = ["pattern31", "nextn", "fused", "tied", "bfloat16", "yarn", "dense", "next", "legacy"]
SLOW = ("next", "legacy")  # of which plain pytest runs short prompts alone
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]


# ---- against the lock ------------------------------------------------------------------------


class Golden:
    """The lock, and how a run of pyengine is held against it."""

    def __init__(self, lock, path):
        self.lock, self.path = lock, path
        self.prompts = read_prompts()
        self.crossed = {}  # values rounded otherwise here than where the goldens were made: tensor

    def run(self, model, name, run):
        return run_model(model, prompt(self.prompts, name, run), run)

    def first_difference(self, name, arithmetic, run, tensors):
        """None, or "TENSOR: what is wrong", of the first tensor that is not the lock's."""
        wanted = trace_of(self.lock, name, arithmetic, run)
        if wanted.keys() != tensors.keys():
            return f"{min(wanted.keys() ^ tensors.keys())}: not on both sides"
        for tensor, exact in tensors.items():
            got = rounded(exact)
            if arithmetic == "float64":
                self.apply_exceptions(name, run, tensor, got)
            if digest(got) == wanted[tensor]:
                continue
            if arithmetic == "float64" and self.crosses(name, run, tensor, exact, wanted[tensor]):
                continue
            return self.describe(name, arithmetic, run, tensor, got)
        return None

    def crosses(self, name, run, tensor, exact, wanted):
        """Another processor's float64 sums may: see make_golden.across_boundaries."""
        golden = across_boundaries(exact, wanted)
        if golden is None:
            return False
        for index in map(tuple, np.argwhere(golden != rounded(exact))):
            place = name, sum(pieces(run)), *index, golden[index]  # as make_golden.distinct
            self.crossed[place] = f"{name} {run} {tensor} {list(map(int, index))}"
        return len(self.crossed) <= MOST_EXCEPTIONS

    def apply_exceptions(self, name, run, tensor, got):
        for entry in self.lock["boundary"]:
            if (entry["model"], entry["run"], entry["tensor"]) == (name, run, tensor):
                index, value = tuple(entry["index"]), np.float32(float.fromhex(entry["value"]))
                if ulps(got[index], value) <= 1:
                    got[index] = value

    def describe(self, name, arithmetic, run, tensor, got):
        if run in (SHORT, LONGEST):
            stored = Trace.load(self.path(trace_file(name, arithmetic, run))).tensors
            if tensor in stored:
                return str(compare_tensors(tensor, stored[tensor], got))
        return f"{tensor}: sha256 {digest(got)} is not the lock's"


@pytest.fixture(scope="module")
def goldens(golden, golden_path):
    return Golden(golden, golden_path)


@pytest.fixture
def planted(golden, golden_path):
    """A comparison of its own, so that what a planted fault does is not counted."""
    return Golden(golden, golden_path)


@pytest.fixture(scope="module")
def checkpoints(golden_path, tmp_path_factory):
    """checkpoints(model, arithmetic): the path to load."""
    directory = tmp_path_factory.mktemp("int8")

    def path(model, arithmetic):
        if arithmetic != "locked-int8":
            return golden_path(f"{model}.gguf")
        if not (directory / model).exists():
            quantize(golden_path(f"{model}.gguf"), int8=directory / model)
        return directory / model

    return path


def test_every_file_is_the_locks(golden, golden_path):
    for name, sha256 in golden["files"].items():
        assert file_digest(golden_path(name)) == sha256, name
    assert set(golden["traces"]) == set(MODELS)


def test_the_lock_has_every_run(golden):
    for name in MODELS:
        assert sorted(golden["traces"][name]) == ["float64", "locked", "locked-int8"]
        for runs in golden["traces"][name].values():
            assert sorted(runs) == sorted(RUNS)


@pytest.mark.parametrize("name", MODELS)
def test_int8_checkpoint_is_the_locks(golden, checkpoints, name):
    path = checkpoints(name, "locked-int8") / "model.safetensors"
    assert file_digest(path) == golden["int8"][name]


@pytest.mark.parametrize("arithmetic", ["locked", "locked-int8"])
def test_the_restatement_itself_gives_the_same_bits_in_pieces(golden, arithmetic):
    for name in MODELS:
        runs = golden["traces"][name][arithmetic]
        assert runs["64+1+235"] == runs["300"], name


@pytest.mark.parametrize("name", MARKED)
def test_float64_equals_hugging_face(goldens, checkpoints, name):
    model = pyengine.load(checkpoints(name, "float64"), "float64")
    for run in RUNS:
        tensors = goldens.run(model, name, run)
        difference = goldens.first_difference(name, "float64", run, tensors)
        assert difference is None, f"{name} {run}: {difference}"
    crossed = [text for text in goldens.crossed.values() if text.startswith(f"{name} ")]
    if crossed:
        warnings.warn(f"on a rounding boundary, and rounded the other way here: {crossed}", stacklevel=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("arithmetic", ["locked", "locked-int8"])
@pytest.mark.parametrize("name", MARKED)
def test_locked_equals_the_restatement(goldens, checkpoints, each_isa, name, arithmetic, threads):
    model = pyengine.load(checkpoints(name, arithmetic), threads=threads)
    for run in RUNS:
        tensors = goldens.run(model, name, run)
        difference = goldens.first_difference(name, arithmetic, run, tensors)
        assert difference is None, f"{name} {run}: {difference}"


@pytest.mark.parametrize("arithmetic", ["float64", "locked", "locked-int8"])
@pytest.mark.parametrize("name", SLOW)
def test_short_runs_equal_pytorch(goldens, checkpoints, name, arithmetic):
    model = pyengine.load(checkpoints(name, arithmetic), "float64" if arithmetic == "float64" else "locked")
    for run in ("1", SHORT, "64"):
        tensors = goldens.run(model, name, run)
        assert goldens.first_difference(name, arithmetic, run, tensors) is None, run


# ---- rounding boundaries ---------------------------------------------------------------------


def near_a_boundary(distance):
    """exact [2, 3], the two float32 between which exact[1, 1] lies, that far from their middle."""
    low = np.float32(1 / 3)
    high = np.nextafter(low, np.float32(1))
    exact = np.array([[1.0, 2.0, 3.0], [-1.0, (float(low) + float(high)) / 2 + distance, 0.5]])
    return exact, low, high


@pytest.mark.parametrize("distance, sides", [(9e-13, "high"), (-9e-13, "low")])
def test_an_exception_on_a_boundary_is_listed(distance, sides):
    exact, low, high = near_a_boundary(distance)
    wanted = rounded(exact)
    assert wanted[1, 1] == {"low": low, "high": high}[sides]
    got = wanted.copy()
    got[1, 1] = high if sides == "low" else low
    (entry,) = exceptions(exact, wanted, got)
    assert entry["index"] == [1, 1] and float.fromhex(entry["value"]) == wanted[1, 1]
    assert entry["distance"] == pytest.approx(9e-13, rel=1e-3)
    assert np.array_equal(across_boundaries(exact, digest(got)), got)


def test_a_difference_off_a_boundary_is_an_error():
    exact, low, high = near_a_boundary(1.1e-12)
    wanted, got = rounded(exact), rounded(exact)
    got[1, 1] = low
    with pytest.raises(GoldenError, match=r"^\[1, 1\]: want .*0.33333337.*, got .*0.33333334.*"):
        exceptions(exact, wanted, got)
    assert across_boundaries(exact, digest(got)) is None


def test_two_steps_or_another_expert_are_never_an_exception():
    exact, low, high = near_a_boundary(-1e-16)
    got = rounded(exact)
    got[1, 1] = np.nextafter(high, np.float32(1))
    with pytest.raises(GoldenError):
        exceptions(exact, rounded(exact), got)
    chosen = np.array([[3, 1]])
    with pytest.raises(GoldenError, match=r"^\[0, 1\]: want .*1.*, got .*2"):
        exceptions(chosen, chosen, np.array([[3, 2]]))


# ---- controls: faults that must be seen ------------------------------------------------------


def build(checkpoint, arithmetic):
    if arithmetic == "float64":
        return ReferenceModel(checkpoint)
    return LockedModel(checkpoint, threads=1)


def fault_in(planted, model, name, arithmetic, run=SHORT):
    difference = planted.first_difference(name, arithmetic, run, planted.run(model, name, run))
    assert difference, "the planted fault was not seen"
    return difference


@pytest.mark.parametrize("arithmetic", ["float64", "locked"])
def test_one_step_in_any_tensor_is_seen(planted, checkpoints, arithmetic):
    name = "pattern31"
    model = build(open_checkpoint(checkpoints(name, arithmetic)), arithmetic)
    tensors = planted.run(model, name, SHORT)
    for tensor in tensors:
        changed = {**tensors, tensor: tensors[tensor].copy()}
        last = changed[tensor][-1, -1]
        if last.dtype == np.int64:
            changed[tensor][-1, -1] += 1
        else:
            changed[tensor][-1, -1] = np.nextafter(np.float32(last), np.float32(np.inf))
        assert planted.first_difference(name, arithmetic, SHORT, changed).startswith(f"{tensor}: ")
    assert not planted.crossed
    assert planted.first_difference(name, arithmetic, SHORT, tensors) is None
    del tensors["model.layers.2.mlp.gate.1"]
    assert planted.first_difference(name, arithmetic, SHORT, tensors) == (
        "model.layers.2.mlp.gate.1: not on both sides"
    )


@pytest.mark.parametrize("arithmetic", ["float64", "locked"])
def test_a_norm_scaled_by_its_weight_alone(planted, checkpoints, arithmetic):
    checkpoint = open_checkpoint(checkpoints("pattern31", arithmetic))
    name = "model.layers.1.input_layernorm.weight"
    plain = dataclasses.replace(checkpoint.tensors[name], decode=lambda stored: stored - 2.0)
    checkpoint.tensors[name] = plain  # 1 + what it decodes to is the weight
    difference = fault_in(planted, build(checkpoint, arithmetic), "pattern31", arithmetic)
    assert difference.startswith(
        "model.layers.1.input_layernorm: 384 of 384 values differ, largest distance "
    )
    assert " ulp; first at [0, 0]: want " in difference


def test_value_heads_paired_as_if_grouped(planted, checkpoints):
    checkpoint = open_checkpoint(checkpoints("pattern31", "locked"))
    checkpoint = dataclasses.replace(checkpoint, value_head_order="grouped")
    difference = fault_in(planted, build(checkpoint, "locked"), "pattern31", "locked")
    assert difference.startswith("model.layers.0.linear_attn.norm: ")


def test_value_heads_read_as_if_grouped(planted, checkpoints):
    checkpoint = open_checkpoint(checkpoints("pattern31", "float64"))
    for name, tensor in checkpoint.tensors.items():
        checkpoint.tensors[name] = dataclasses.replace(tensor, row_order=None, col_order=None)
    difference = fault_in(planted, build(checkpoint, "float64"), "pattern31", "float64")
    assert difference.startswith("model.layers.0.linear_attn.in_proj_qkv: ")


@pytest.mark.parametrize("arithmetic", ["float64", "locked"])
def test_the_epsilon_of_the_file_without_its_decimal(planted, checkpoints, arithmetic):
    checkpoint = open_checkpoint(checkpoints("tied", arithmetic))
    widened = float(np.float32(checkpoint.config.rms_norm_eps))
    assert checkpoint.config.rms_norm_eps == 1e-5 != widened
    config = dataclasses.replace(checkpoint.config, rms_norm_eps=widened)
    model = build(dataclasses.replace(checkpoint, config=config), arithmetic)
    difference = fault_in(planted, model, "tied", arithmetic, LONGEST)
    assert difference.startswith("model.layers.0.input_layernorm: ")


# A tie of the activation quantiser rounded away from zero.


def test_the_numpy_quantizer_equals_the_engines():
    pool, random = Pool(1), np.random.default_rng(1729)
    for cols in (1, 96, 128, 129, 300):
        x = random.standard_normal((50, cols)).astype(np.float32)
        x *= np.exp2(random.integers(-120, 20, (50, 1))).astype(np.float32)
        ours = activation_quantizer(half_even)(pool, x)
        for array, engines in zip(ours, ops.quantize_activations(pool, x)):
            assert array.dtype == engines.dtype and array.tobytes() == engines.tobytes()


def test_the_engines_ties_go_to_even():
    pool = Pool(1)
    x = np.array([[32767, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 16384.5, 16385.5]], np.float32)
    q, scales, _ = ops.quantize_activations(pool, x)
    assert scales == 1
    assert q[0, :10].tolist() == [32767, 0, 2, 2, 4, 0, -2, -2, 16384, 16386]
    away, *_ = activation_quantizer(half_away)(pool, x)
    assert away[0, :10].tolist() == [32767, 1, 2, 3, 4, -1, -2, -3, 16385, 16386]


def test_ties_of_activations_rounded_away_from_zero(planted, checkpoints, monkeypatch):
    name = "tied"
    model = pyengine.load(checkpoints(name, "locked"), threads=1)
    monkeypatch.setattr(ops.products, "quantize_activations", activation_quantizer(half_even))
    tensors = planted.run(model, name, SHORT)
    assert planted.first_difference(name, "locked", SHORT, tensors) is None

    differing = []
    monkeypatch.setattr(ops.products, "quantize_activations", activation_quantizer(half_away, differing))
    difference = fault_in(planted, model, name, "locked")
    assert differing[0] == 1  # one tie in 960 activations of the first norm
    assert difference.startswith("model.layers.0.linear_attn.in_proj_qkv: ")
