"""tools/bench/distance.py: the table of KL divergences, and what a router's near-tie does to it."""

import sys

import distance
import numpy as np
import pytest
from paths import GOLDEN, TESTS

from pyengine.core.matrices import TYPES
from pyengine.probabilities import log_softmax

RNG = np.random.default_rng(1729)


def main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["distance.py", *map(str, arguments)])
    return distance.main()


def test_a_distance_by_hand():
    p = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]]))
    q = np.log(np.array([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]))
    second = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    found = distance.distance(p, q)
    assert found.mean == pytest.approx(second / 3) and found.most == pytest.approx(second)
    assert found.agreement == pytest.approx(2 / 3) and found.of_arithmetic == found.mean
    before = distance.distance(p, q, 1)
    assert before.mean == found.mean and before.of_arithmetic == before.mean_before == 0
    assert str(before).endswith("; 0.0e+00 before position 1")
    assert distance.distance(p, q, 0).of_arithmetic is None  # nothing is left to compare


def test_the_first_other_expert():
    chosen = {"a": np.array([[0, 1], [0, 2], [1, 2]]), "b": np.zeros((3, 1), np.int64)}
    assert distance.first_other(chosen, chosen) is None and distance.first_other({}, {}) is None
    others = {"a": np.array([[0, 1], [0, 2], [0, 2]]), "b": np.array([[0], [7], [0]])}
    assert distance.first_other(chosen, others) == 1


def test_a_planted_choice_is_seen():
    """The reference takes another expert at one position, and nothing before it changes."""
    import pyengine

    model = pyengine.load(GOLDEN / "pattern31.gguf", "float64")
    ids = np.arange(9)
    p, chosen = distance.run(model, ids)
    forward = model.forward

    def planted(ids, record):
        def put(name, array):
            record(name, array)
            if name == "model.layers.1.mlp.gate.2":
                other = array.copy()
                other[5, 0] = next(e for e in range(6) if e not in array[5])
                record(name, other)
                return other
            return None

        return forward(ids, record=put)

    model.forward = planted
    q, others = distance.run(model, ids)
    assert distance.first_other(chosen, others) == 5
    found = distance.distance(p, q, 5)
    assert found.mean_before == 0 < found.mean


def test_a_dash_and_its_reason(capsys):
    p = log_softmax(RNG.normal(size=(4, 9)))
    ran, reason = distance.distance(p, p), "x.weight: want F32, got IQ1_S"
    rows = [("a.gguf", "IQ1_S Q8_0", {"locked": reason, "locked-kv16": reason, "llama.cpp": ran})]
    title, _, row, empty, last = distance.table(rows)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a.gguf", "IQ1_S Q8_0", "-", "-", "0.0e+00 (0.0e+00)", "-, -, 100.0%"]
    assert len(title) == len(row)
    assert empty == "" and last == f"locked and locked-kv16 of a.gguf: {reason}"
    assert distance.above(rows, 1e-7) == 0
    far = [("a.gguf", "Q8_0", {"locked": ran._replace(mean=2e-7)})]
    assert distance.above(far, None) == 0 and capsys.readouterr().err == ""
    assert distance.above(far, 1e-7) == 1
    assert capsys.readouterr().err == "distance: a.gguf: want at most 1e-07, got 2.0e-07\n"


def test_models_as_they_are(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(monkeypatch, GOLDEN / "dense.gguf", "--tokens", 20, "--limit", 1e-7) == 0
    row, _, reason = capsys.readouterr().out.splitlines()[2:]
    assert reason.startswith("llama.cpp of dense.gguf: import of llama_cpp halted")
    assert row.startswith("| dense.gguf | Q8_0 ") and "before position" not in row
    assert main(monkeypatch, TESTS / "no.gguf") == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(monkeypatch, GOLDEN / "dense.gguf", "--types", "Q8_0,Q9_0")
    assert "--types: want all or some of Q8_0 Q4_0" in capsys.readouterr().err


@pytest.mark.slow
def test_every_type_against_llama_cpp(monkeypatch, capsys):
    """A trained model, quantized by llama.cpp: locked is within 1e-7 of float64, llama.cpp is not in 1e-5."""
    pytest.importorskip("llama_cpp")
    from quantizer_types import FILE_TYPES

    model = TESTS / "trained" / "bf16.gguf"
    assert main(monkeypatch, model, "--types", "all", "--tokens", 120, "--limit", 1e-7) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line[:1] == "|"]
    assert [row[0] for row in rows] == [f"bf16.gguf as {name}" for name in FILE_TYPES]
    for name, types, locked, _, theirs, _ in rows:
        assert (locked == "-") == (not set(types.split()) <= set(TYPES)), name
        assert float(theirs.split()[0]) > 1e-5, name
