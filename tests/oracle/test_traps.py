"""Twenty bugs that shipped in engines of this model family, planted: each is caught, and named where an
operation's values can tell.  `pytest tests/oracle/test_traps.py -s -k table` prints the table.

They are planted in `peer.py`, which shares no code with the reference; three in the engine itself.
"""

import functools

import numpy as np
import pytest
from activation_rounding import activation_quantizer, half_away, half_even
from gguf.constants import GGMLQuantizationType
from paths import GOLDEN
from peer import Peer
from planted_bugs import BUGS, DELTA, Bug, ids_of, names, oracle, path_of
from rewrite import rewrite

import pyengine
from pyengine.core import ops
from pyengine.errors import CheckpointError
from pyengine.files.gguf import GGUF
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace, record_trace


@functools.cache
def verdict_of(bug):
    faults = [bug.fault] if bug.fault else []
    trace = Peer(path_of(bug.model), faults, bug.int8).run(ids_of(bug.model), bug.splits)
    return oracle(bug.model).verify(trace, bug.budget, allow_unknown=bug.row == 6)


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
        monkeypatch.setattr(ops.products, "quantize_activations", activation_quantizer(nearest))
        verdicts.append(Oracle(want).verify(record_trace(model, ids)))
    return verdicts


def test_ties_rounded_away_from_zero(monkeypatch):
    even, away = ties(monkeypatch)
    assert even.ok and not away.ok and away.first.difference.ulp >= 1


# ---- the table -------------------------------------------------------------------------------


def test_the_table(tmp_path, monkeypatch):
    lines = {bug: (bug.row, bug.text, verdict_of(bug), bug.budget) for bug in BUGS}
    rows = [
        (row, text, verdict.first.name, budget, (names(verdict) or ["-"])[0])
        for row, text, verdict, budget in lines.values()
        if row
    ]
    bits, _ = batch_dependent()
    rows.append((15, "a norm's sum depends on the batch", bits.first.name, "exact", "-"))
    text, verdict = nan_scale(tmp_path)
    rows.append(
        (
            17,
            "NaN scale in a checkpoint",
            verdict.first.name,
            "float32",
            "at load: " + text.rpartition("/")[2],
        )
    )
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
    assert [row.status for row in verdict.rows] == ["suspect", "inherited"]
    assert "RoPE turns pairs (2i, 2i + 1), not halves" in names(verdict)
