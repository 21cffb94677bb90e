"""Budgets of quantized candidates: those that others quantized are within them, mistakes are not.

The reference is the trained model in BF16.  Its weights are quantized by gguf-py, or by other rules than the
budgets', and run by the NumPy port.
"""

import functools

import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from partial import part
from paths import GOLDEN, TESTS
from peer import Peer
from peer_numbers import F, e4m3

from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.oracle.formats import to_e4m3
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.quantized import (
    WEIGHTS,
    to_fp8_and_back,
    to_fp8_rows_and_back,
    to_int4_and_back,
    to_q4_k_and_back,
)
from pyengine.oracle.report.text import as_text
from pyengine.oracle.rounding import Arithmetic, is_arithmetic
from pyengine.testing import record_llama_cpp

TRAINED = TESTS / "trained" / "bf16.gguf"
TOKENS = 12
KINDS = "full", "layers", "logits"


@functools.cache
def oracle():
    return Oracle(None, TRAINED)


def ids():
    return np.random.default_rng(1729).integers(0, 2048, TOKENS)


# ---- the formats -----------------------------------------------------------------------------


def test_e4m3_is_the_nearest():
    x = (
        np.random.default_rng(1729).standard_normal(4000).astype(F)
        * F(2.0) ** np.arange(4000).__mod__(24)
        / F(2**12)
    )
    assert np.array_equal(to_e4m3(x), e4m3(x))
    ties = np.array([1.0625, 1.1875, -1.0625, 449, -1e9, 0, 2.0**-10, 3 * 2.0**-10], F)
    assert to_e4m3(ties).tolist() == [1, 1.25, -1, 448, -448, 0, 0, 2.0**-8]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 300), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_a_format_is_as_near_as_its_step(rows, columns, seed, size):
    x = (np.random.default_rng(seed).standard_normal((rows, columns)) * size).astype(F)
    largest = np.abs(x).max()
    assert np.abs(to_int4_and_back(x) - x).max() <= largest / 14 * 1.001
    # The two float16 numbers of a row are coarse where they are below 2^-14.
    assert np.abs(to_q4_k_and_back(x) - x).max() <= 2 * largest * (1 / 30 + 1 / 63) + 63 * 15 * 2.0**-24
    for narrow in (to_fp8_and_back, to_fp8_rows_and_back):
        assert np.all(np.abs(narrow(x) - x) <= np.maximum(np.abs(x) / 15, largest * 2.0**-18))
    zero = np.zeros((2, 40), F)
    for narrow, _ in WEIGHTS.values():
        assert not narrow(zero).any()


def test_names_of_arithmetics():
    assert Arithmetic.named("fp8+fp8-activations+bfloat16") == Arithmetic(
        "bfloat16", "fp8-activations", "fp8"
    )
    assert Arithmetic.named("bfloat16-state").state == "bfloat16-state"
    assert not is_arithmetic("exact") and not is_arithmetic("fp8+q8_0") and not is_arithmetic(3)
    for name in ("", "fp8+", "q8_0+q4_k", "bfloat16+float16", "int3"):
        with pytest.raises(InputError, match="budget: want float32, .*, bfloat16-state, or one of each kind"):
            Arithmetic.named(name)


# ---- candidates ------------------------------------------------------------------------------


class Quantized(Peer):
    """The port, with its matrices narrowed after they are read; routers stay as they are."""

    def __init__(self, narrow, ends=True, inputs=None, faults=()):
        super().__init__(TRAINED, faults)
        self.narrow, self.ends, self.inputs, self.done = narrow, ends, inputs, {}

    def weight(self, name):
        if name not in self.done:
            values = super().weight(name)
            matrix = values.ndim > 1 and "conv1d" not in name and "gate_inp" not in name
            if matrix and (self.ends or name not in ("token_embd.weight", "output.weight")):
                values = self.narrow(values.reshape(-1, values.shape[-1])).reshape(values.shape).astype(F)
            self.done[name] = values
        return self.done[name]

    def linear(self, x, name, expert=None):
        return super().linear(x if self.inputs is None else self.inputs(x), name, expert)


def by_gguf(kind):
    return lambda x: quants.dequantize(quants.quantize(x, kind), kind)


def per_row(x, largest=448):
    """e4m3 with a scale to each row: another one than the budget's."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), F(1e-20)) / F(largest)
    return e4m3(x / scale) * scale


def groups_of_64(x):
    """Symmetric 4 bits, 64 columns to a scale, as others have them."""
    groups = x.reshape(len(x), -1, min(64, x.shape[1]))
    scale = np.abs(groups).max(-1, keepdims=True) / F(7)
    return (np.clip(np.rint(groups / np.where(scale == 0, 1, scale)), -8, 7) * scale).reshape(x.shape)


CANDIDATES = {
    "q8_0": lambda **more: Quantized(by_gguf(GGMLQuantizationType.Q8_0), **more),
    "q4_k": lambda **more: Quantized(
        by_gguf(GGMLQuantizationType.Q4_1), **more
    ),  # 4 bits, a minimum, 32 columns
    "int4": lambda **more: Quantized(groups_of_64, False, **more),
    "fp8": lambda **more: Quantized(per_row, False, **more),
    "fp8-activations": lambda **more: Quantized(lambda w: w, False, per_row, **more),
    "fp8+fp8-activations": lambda **more: Quantized(per_row, False, per_row, **more),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_quantized_candidate_is_within_its_budget(name):
    trace = CANDIDATES[name]().run(ids())
    for kind in KINDS if name == "int4" else KINDS[:1]:
        verdict = oracle().verify(part(trace, kind), name)
        assert verdict.ok, as_text(verdict)
        assert verdict.budget == name
    assert not oracle().verify(part(trace, "logits"), "float32", seconds=0).ok


@pytest.mark.slow
@pytest.mark.parametrize("file_type, weights", [("MOSTLY_Q8_0", "q8_0"), ("MOSTLY_Q4_K_M", "q4_k")])
def test_llama_cpps_own_files_are_within_the_budget_of_their_weights(tmp_path, file_type, weights):
    """The reference is what they were quantized from."""
    pytest.importorskip("llama_cpp")
    from quantized_models import quantize

    path = quantize(TRAINED, tmp_path / "m.gguf", LlamaFileType[file_type])
    trace = oracle().candidate(record_llama_cpp(path, ids(), threads=1))
    for kind in KINDS:
        verdict = oracle().verify(part(trace, kind), f"{weights}+int8-activations")
        assert verdict.ok, as_text(verdict)
    assert not oracle().verify(trace, "int8-activations", seconds=0).ok


@pytest.mark.slow
@pytest.mark.parametrize("name", CANDIDATES)
def test_a_mistake_is_beyond_the_budget_of_a_quantized_candidate(name):
    """And named, though the candidate is quantized as well."""
    verdict = oracle().verify(CANDIDATES[name](faults=["sigmoid_z"]).run(ids()), name)
    assert not verdict.ok and verdict.first.name == "model.layers.0.linear_attn.norm", as_text(verdict)
    assert verdict.mistakes[0].name == "the gated norm's gate is sigmoid, not silu"


@pytest.mark.parametrize("fault", ["state_bfloat16", pytest.param("kv_bfloat16", marks=pytest.mark.slow)])
def test_states_in_bfloat16_are_no_mistake_if_they_are_meant(fault):
    judge = Oracle(None, GOLDEN / "pattern31.gguf")
    trace = Peer(GOLDEN / "pattern31.gguf", [fault]).run(np.arange(TOKENS))
    assert judge.verify(trace, "bfloat16-state").ok
    assert not judge.verify(trace, "float32", seconds=0).ok
    wrong = Peer(GOLDEN / "pattern31.gguf", [fault, "chunk_boundary"]).run(np.arange(TOKENS))
    assert judge.verify(wrong, "bfloat16-state", seconds=0).first.name == "model.layers.0.linear_attn.norm"


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    CANDIDATES["int4"]().run(ids()).save(tmp_path / "t")
    budget = tmp_path / "b.json"
    assert (
        main(["verify", str(TRAINED), str(tmp_path / "t"), "--budget", "int4", "--write-budget", str(budget)])
        == 0
    )
    assert capsys.readouterr().out.startswith("within the int4 budget: 83 of 83 tensors; nearest to it: ")
    assert main(["verify", str(TRAINED), str(tmp_path / "t"), "--budget", str(budget)]) == 0
