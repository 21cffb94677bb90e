"""Twenty bugs that shipped in engines of this model family, planted: each is caught, and named where an
operation's values can tell.  `pytest tests/test_traps.py -s -k table` prints the table.

They are planted in `peer.py`, which shares no code with the reference; three in the engine itself.
"""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from peer import Peer
from rewrite import GOLDEN, rewrite
from test_golden import activation_quantizer, half_away, half_even

import pyengine
from pyengine import ops
from pyengine.errors import CheckpointError
from pyengine.files.gguf import GGUF
from pyengine.oracle.check import Oracle
from pyengine.oracle.report import as_text, extra_layers
from pyengine.trace import Trace, record_trace

TOKENS = 24


@dataclass(frozen=True)
class Bug:
    """row of the list of traps; how it is planted; what is guilty; how the diagnosis names it."""

    row: int
    text: str
    fault: str
    guilty: str
    named: str | None
    model: str = "pattern31"
    splits: tuple | None = None  # at once
    budget: str = "float32"
    int8: bool = False

    def __str__(self):
        return f"{self.row}-{self.fault}-{self.model}"


DELTA, FULL, MLP = "model.layers.0.linear_attn", "model.layers.3.self_attn", "model.layers.0.mlp"
BUGS = [
    Bug(1, "value heads paired with the wrong key heads", "heads", f"{DELTA}.norm",
        "grouped value heads are paired with key heads as if tiled (g mod n_k)"),
    Bug(1, "the same, three value heads to a key head", "heads", f"{DELTA}.norm",
        "tiled value heads are paired with key heads as if grouped (t div ratio)", "nextn"),
    Bug(2, "conv1d channels scrambled", "conv1d_channels", f"{DELTA}.norm",
        "conv1d: the value heads are un-tiled twice", "nextn"),
    Bug(2, "ssm_a taken as A_log", "ssm_a_as_a_log", f"{DELTA}.norm",
        "ssm_a, which is -exp(A_log), is taken for A_log"),
    Bug(2, "shared gate's shape", "shared_gate_shape", f"{MLP}.shared_expert_gate", None),
    Bug(3, "norm's +1 applied twice", "norm_plus_one_twice", "model.layers.0.input_layernorm",
        "the norm's +1 is there twice: scaled by 2 + weight"),
    Bug(3, "norm's +1 not applied", "norm_plus_one_missing", "model.layers.0.input_layernorm",
        "the norm's +1 is missing: scaled by weight, not by 1 + weight"),
    Bug(4, "1 + w rounded to bfloat16", "norm_in_bfloat16", "model.layers.0.input_layernorm",
        "1 + weight of the norm is rounded to bfloat16"),
    Bug(5, "RoPE pairs (2i, 2i+1)", "rope_pairs", f"{FULL}.o_proj",
        "RoPE turns pairs (2i, 2i + 1), not halves"),
    Bug(5, "partial rotary width dropped", "rope_full_width", f"{FULL}.o_proj",
        "RoPE turns the whole head: the partial rotary width is dropped"),
    Bug(5, "sections misread", "rope_sections", f"{FULL}.o_proj",
        "RoPE's sections are misread: only the temporal one turns, taken as a block"),
    Bug(6, "next-token block counted as a layer", "nextn", "model.norm",
        "the next-token-prediction block were a layer", "nextn"),
    Bug(7, "several tokens with a cache: state dropped", "state_dropped", f"{DELTA}.norm",
        "the convolution's and the recurrent state are dropped at token 10", splits=(10, 14)),
    Bug(8, "prefill and decode disagree", "decode_conv", f"{DELTA}.norm",
        "the convolution's state is a token old at token 23", splits=(23, 1)),
    Bug(9, "chunked delta rule wrong at a length that is no multiple", "last_chunk", f"{DELTA}.norm",
        "the recurrent state is dropped at token 16"),
    Bug(10, "decay far from 1 mixes up coefficients", "decay", f"{DELTA}.norm",
        "the delta rule reads the state before its decay"),
    Bug(11, "left padding ignored at batch 1", "left_padding", f"{DELTA}.norm",
        "left padding is not masked: 3 tokens 0 before the first"),
    Bug(12, "prefix cache without the recurrent state", "prefix_cache", f"{DELTA}.norm",
        "the recurrent state is dropped at token 12", splits=(12, 12)),
    Bug(13, "strides ignored: halves of a head read as one piece", "strides", f"{FULL}.q_norm",
        "query and gate are split across the whole, not head by head"),
    Bug(14, "A_log kept in bfloat16", "a_log_in_bfloat16", f"{DELTA}.norm",
        "A_log is rounded to bfloat16"),
    Bug(16, "routing weights not renormalised", "not_renormalised", f"{MLP}.gate.1",
        "the routing weights are not renormalised"),
    Bug(18, "int8 dot saturates (vpmaddubsw)", "saturating", f"{DELTA}.in_proj_qkv", None,
        budget="int8-activations", int8=True),
    Bug(20, "vocabulary of another model: other ids", "vocabulary", "model.embed_tokens",
        "the embeddings are those of other ids (227 for 220): another vocabulary, or ids that were "
        "changed"),
    Bug(0, "gate and up swapped", "gate_up_swapped", f"{MLP}.shared_expert.down_proj",
        "gate and up are swapped"),
]


def path_of(model):
    return GOLDEN / f"{model}.gguf"


@functools.cache
def oracle(model):
    return Oracle(None, path_of(model))


@functools.cache
def ids_of(model):
    return np.random.default_rng(1729).integers(0, oracle(model).model.config.vocab_size, TOKENS)


@functools.cache
def verdict_of(bug):
    faults = [bug.fault] if bug.fault else []
    trace = Peer(path_of(bug.model), faults, bug.int8).run(ids_of(bug.model), bug.splits)
    return oracle(bug.model).verify(trace, bug.budget)


def names(verdict):
    return [match.name for match in verdict.mistakes] + extra_layers(verdict)


# ---- controls: nothing planted ---------------------------------------------------------------


@pytest.mark.parametrize("model", ["pattern31", "nextn"])
@pytest.mark.parametrize("splits", [None, (10, 1, 13)])
def test_the_peer_without_a_fault_is_within_float32(model, splits):
    verdict = verdict_of(Bug(0, "", "", "", None, model, splits))
    assert verdict.ok and len(verdict.rows) > 40 and not verdict.missing, as_text(verdict)


def test_the_peer_in_int8_is_within_int8_and_beyond_float32():
    control = Bug(18, "", "", "", None, budget="int8-activations", int8=True)
    assert verdict_of(control).ok
    verdict = verdict_of(Bug(18, "", "", "", None, budget="float32", int8=True))
    assert verdict.first.name == f"{DELTA}.in_proj_qkv" and verdict.guilty
    assert names(verdict)[0] == "the activations are int8 in blocks of 32"


# ---- planted in the peer ---------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_bug(bug):
    verdict = verdict_of(bug)
    assert not verdict.ok
    if bug.row == 6:  # nothing that both have is wrong but the last norm's input
        assert verdict.first.name == bug.guilty and bug.named in names(verdict)[0]
        return
    assert verdict.first.name == verdict.guilty[0].name == bug.guilty, as_text(verdict)
    if bug.named:
        assert bug.named in names(verdict), as_text(verdict)
    else:
        assert not names(verdict)


def test_softmax_after_top_k_is_the_same_function_here():
    """Row 16's other half: with renormalised weights the order of the two changes nothing."""
    assert verdict_of(Bug(16, "", "softmax_after_top_k", "", None)).ok


# ---- rows that no trace against float64 shows ------------------------------------------------


def batch_dependent():
    """15: another order of a norm's sum; rounding alone, so that only bits tell."""
    ids, path = ids_of("pattern31"), path_of("pattern31")
    alone, batched = (Peer(path, faults).run(ids) for faults in ([], ["reduction_by_batch"]))
    bits = Oracle(alone).verify(batched)
    return bits, oracle("pattern31").verify(batched, "float32")


def test_a_reduction_that_depends_on_the_batch():
    bits, budget = batch_dependent()
    assert not bits.ok and bits.first.name == "model.layers.0.input_layernorm" and budget.ok


def nan_scale(directory):
    """17: a NaN among the scales of a shipped file -> the error's text, the verdict on its trace."""
    path = GOLDEN / "pattern31.gguf"
    name = "blk.1.attn_gate.weight"
    stored = GGUF.open(path).tensors[name].data.copy()
    stored[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    broken = rewrite(path, directory / "nan.gguf", tensors={name: (stored, GGMLQuantizationType.Q8_0)})
    with pytest.raises(CheckpointError) as caught:
        pyengine.load(broken)
    trace = Peer(broken).run(ids_of("pattern31"))
    return str(caught.value), oracle("pattern31").verify(trace, "float32")


def test_a_nan_scale(tmp_path):
    text, verdict = nan_scale(tmp_path)
    assert "blk.1.attn_gate.weight: scale of block" in text and "NaN" in text
    assert verdict.first.name == verdict.guilty[0].name == "model.layers.1.linear_attn.in_proj_z"


def ties(monkeypatch):
    """19: ties of the engine's activation quantizer rounded away from zero, in bits."""
    model = pyengine.load(GOLDEN / "tied.gguf", threads=1)
    ids = np.random.default_rng(1729).integers(0, model.config.vocab_size, 300)
    want = record_trace(model, ids)
    verdicts = []
    for nearest in (half_even, half_away):
        monkeypatch.setattr(ops, "quantize_activations", activation_quantizer(nearest))
        verdicts.append(Oracle(want).verify(record_trace(model, ids)))
    return verdicts


def test_ties_rounded_away_from_zero(monkeypatch):
    even, away = ties(monkeypatch)
    assert even.ok and not away.ok and away.first.difference.ulp >= 1


# ---- the table -------------------------------------------------------------------------------


def test_the_table(tmp_path, monkeypatch):
    lines = {bug: (bug.row, bug.text, verdict_of(bug), bug.budget) for bug in BUGS}
    rows = [(row, text, verdict.first.name, budget, (names(verdict) or ["-"])[0])
            for row, text, verdict, budget in lines.values() if row]
    bits, _ = batch_dependent()
    rows.append((15, "a norm's sum depends on the batch", bits.first.name, "exact", "-"))
    text, verdict = nan_scale(tmp_path)
    rows.append((17, "NaN scale in a checkpoint", verdict.first.name, "float32", "at load: "
                 + text.rpartition("/")[2]))
    _, away = ties(monkeypatch)
    rows.append((19, "ties rounded away from zero", away.first.name, "exact", "-"))
    assert {row[0] for row in rows} == set(range(1, 21))
    print("\n| row | bug | first tensor | budget | named |\n|--:|---|---|---|---|")
    for row in sorted(rows):
        print("| " + " | ".join(map(str, row)) + " |")


def test_a_trace_of_a_single_tensor_is_judged():
    whole = Peer(path_of("pattern31"), ["rope_pairs"]).run(ids_of("pattern31"))
    part = Trace(whole.ids, {name: whole.tensors[name] for name in ("model.layers.3", "lm_head")})
    verdict = oracle("pattern31").verify(part, "float32")
    assert [row.name for row in verdict.rows] == ["model.layers.3", "lm_head"]
    assert [row.status for row in verdict.rows] == ["guilty", "inherited"]
    assert "RoPE turns pairs (2i, 2i + 1), not halves" in names(verdict)
