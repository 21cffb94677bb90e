"""Which of the planted mistakes are caught and named, from a full trace, from layers, from logits alone; and
right ports, none of which is accused.

`pytest tests/oracle/test_mistakes_table.py -s -m "slow or golden"` prints the table; MISTAKES.md holds it.
"""

import functools
from pathlib import Path

import numpy as np
import pytest
from further_bugs import ALL, IN_BITS, OTHERWISE
from gguf import LlamaFileType
from partial import part
from paths import TESTS
from peer import Peer
from planted_bugs import ids_of, names, oracle, path_of
from transformers_models import transformers_model

from pyengine.oracle import verdict as verdict_module
from pyengine.oracle.mistakes.catalogue import MISTAKES
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import record_trace
from pyengine.testing import record, record_llama_cpp

DOCUMENT = Path(verdict_module.__file__).with_name("MISTAKES.md")
TRAINED = TESTS / "trained" / "bf16.gguf"
KINDS = "full", "layers", "logits"
FEW = {"late_shared_gate", "combined_by_batch"}
# No known mistake is like these.
UNNAMED = {"shared_gate_shape", "saturating"}


@functools.cache
def traces(bug):
    """Of the candidate, and of the reference where the model is not it."""
    path, ids = path_of(bug.model), ids_of(bug.model)
    wrong = Peer(path, [bug.fault], bug.int8).run(ids, bug.splits)
    return wrong, Peer(path).run(ids) if bug in IN_BITS else None


@functools.cache
def verdict_of(bug, kind):
    wrong, right = traces(bug)
    judge = oracle(bug.model) if right is None else Oracle(part(right, kind), path_of(bug.model))
    return judge.verify(part(wrong, kind), bug.budget, allow_unknown=True)


def cell(bug, kind):
    """How the mistake is seen in this kind of trace."""
    verdict = verdict_of(bug, kind)
    if verdict.ok:
        return "MISSED"
    found = names(verdict) + [hint for hint in verdict.hints if hint.startswith("bits part in")]
    right = {bug.named, OTHERWISE.get(bug.fault, bug.named), *bug.also} - {None}
    if not found:
        return "caught"
    if not any(name.startswith(one) or one in name for name in found for one in right):
        return f"FALSE NAME {found[0]}"
    if verdict.mistakes and verdict.mistakes[0].left:
        return "most like it"
    return "named" if len(found) == 1 else f"one of {len(found)}"


def row(bug):
    first = verdict_of(bug, "full").first.name
    return f"| {bug.text} | {first} | {bug.budget} | {' | '.join(cell(bug, kind) for kind in KINDS)} |"


def check(bug):
    verdict = verdict_of(bug, "full")
    assert verdict.first.name == bug.guilty, as_text(verdict)
    assert row(bug) in DOCUMENT.read_text(encoding="utf-8").splitlines(), row(bug)
    for kind in KINDS:
        seen = cell(bug, kind)
        assert "MISSED" not in seen and "FALSE" not in seen, f"{kind}: {as_text(verdict_of(bug, kind))}"
        assert seen != "caught" or bug.named is None or kind != "full", as_text(verdict)


@pytest.mark.parametrize("bug", [bug for bug in ALL if bug.fault in FEW], ids=str)
def test_a_few(bug):
    check(bug)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ALL, ids=str)
def test_every_planted_mistake(bug):
    check(bug)


@pytest.mark.slow
def test_the_table():
    """Faults are counted once, though some are planted in two models."""
    rows = [row(bug) for bug in ALL]
    print("\n" + "\n".join(rows))
    assert len({bug.fault for bug in ALL}) >= 80 and not any("MISSED" in r or "FALSE" in r for r in rows)
    counts = [sum(cell(bug, kind) != "caught" for bug in ALL) for kind in KINDS]
    print(f"\nof {len(ALL)}, named: {counts[0]} (full traces), {counts[1]} (layers), {counts[2]} (logits)")
    assert counts[0] >= len(ALL) - len(UNNAMED) and counts[2] >= len(ALL) - len(UNNAMED) - len(OTHERWISE)


@pytest.mark.slow
def test_what_needs_a_history_leaves_the_first_token():
    """The search relies on it: these are ruled out where the first token is wrong, tried first elsewhere."""
    for name in ("pattern31", "yarn"):
        model, ids = oracle(name).model, ids_of(name)[:6]
        right = record_trace(model, ids[:1]).tensors
        for mistake in MISTAKES:
            if mistake.needs_history:
                made = mistake.made(model, 3)
                with np.errstate(all="ignore"):
                    wrong = record_trace(made, ids if mistake.at_token else ids[:1]).tensors
                for tensor, want in right.items():
                    np.testing.assert_allclose(wrong[tensor][:1], want, 1e-5, 1e-5, err_msg=mistake.name)


# ---- right ports -----------------------------------------------------------------------------


def passes(judge, trace, budget):
    for kind in KINDS:
        verdict = judge.verify(part(trace, kind), budget)
        assert verdict.ok and not verdict.mistakes, f"{kind}: {as_text(verdict)}"
        assert all(flip.kind == "near-tie" for flip in verdict.flips)


@pytest.mark.slow  # test_partial.py has the first of them
@pytest.mark.parametrize("model", ["pattern31", "nextn", "yarn", "tied"])
@pytest.mark.parametrize("splits", [None, (10, 1, 13)])
def test_the_port_without_a_fault(model, splits):
    passes(oracle(model), Peer(path_of(model)).run(ids_of(model), splits), "float32")


@pytest.mark.slow
def test_top_k_before_the_softmax_is_the_same_function():
    """Where the weights add up to 1, a softmax of the chosen logits is what is wanted."""
    passes(
        oracle("pattern31"),
        Peer(path_of("pattern31"), ["softmax_after_top_k"]).run(ids_of("pattern31")),
        "float32",
    )


@pytest.mark.golden
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers(dtype):
    model = transformers_model(path_of("pattern31"), dtype)
    passes(oracle("pattern31"), record(model, ids_of("pattern31")), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_llama_cpp(blocks, tmp_path):
    pytest.importorskip("llama_cpp")
    from quantized_models import quantize

    path = quantize(TRAINED, tmp_path / "m.gguf", LlamaFileType[f"MOSTLY_{blocks}"])
    judge = Oracle(None, path)
    ids = np.random.default_rng(1729).integers(0, judge.model.config.vocab_size, 12)
    trace = judge.candidate(record_llama_cpp(path, ids, threads=1))
    passes(judge, trace, "int8-activations")
