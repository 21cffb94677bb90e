"""The tools of the table of merges: what they hold out, the mother of a few steps, what guides a merge."""

import json
import subprocess
import sys

import numpy as np
import pytest
from debian import has_package
from merge_models import BASE, write_child
from paths import TESTS, TOOLS

import pyengine
from pyengine.census.census import check_alike
from pyengine.checkpoint.open import open_checkpoint
from pyengine.merge.merge import merge


@pytest.fixture(scope="module")
def mother(tmp_path_factory):
    pytest.importorskip("torch")
    if not has_package("dict-jargon"):
        pytest.skip("apt-get knows no dict-jargon (apt-get update?)")
    out = tmp_path_factory.mktemp("mother")
    tool = TOOLS / "train" / "train_mother.py"
    done = subprocess.run([sys.executable, tool, "-o", out, "--steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.golden
def test_a_mother_of_two_steps(mother):
    """It is the father with other weights, and has read nothing of what is held out."""
    from jargon_text import HELD_OUT_BYTES, entries, jargon_text, split

    father, child = (pyengine.load(path) for path in (TESTS / "trained" / "bf16.gguf", mother))
    check_alike(father, child)
    assert not np.array_equal(father.forward([1, 2, 3]), child.forward([1, 2, 3]))
    every = entries(jargon_text())
    training, held_out = split(every)
    assert sorted(training + held_out) == sorted(every)
    assert "".join(held_out) == (mother / "held_out.txt").read_text()
    assert HELD_OUT_BYTES <= len("".join(held_out).encode()) < HELD_OUT_BYTES + 16384
    assert every[0].startswith("(TM)\n") and all(not entry[0].isspace() for entry in every)


def made_census(seed):
    """Of the golden model's 4 layers and 6 experts; expert 5 of layer 1 is dead, expert 2 of layer 3 rare."""
    tokens = np.random.default_rng(seed).integers(50, 150, (4, 6))
    tokens[1, 5], tokens[3, 2] = 1, 15
    return {
        "mean_tokens": 100,
        "layers": [
            {
                "layer": i,
                "experts": [
                    {"expert": e, "tokens": int(n), "share": float(n / row.sum())} for e, n in enumerate(row)
                ],
            }
            for i, row in enumerate(tokens)
        ],
    }


@pytest.mark.slow
def test_what_guides_a_merge(tmp_path, monkeypatch):
    """Dead experts are the father's, bit for bit; use decides the weights."""
    import merge_table

    monkeypatch.setattr(merge_table, "FATHER", BASE)
    child = write_child(tmp_path / "child", 1, dtype="F32")
    censuses = {"father": made_census(2), "mother": made_census(3)}
    (tmp_path / "mother.json").write_text(json.dumps(censuses["mother"]))
    said = merge_table.configurations(child, tmp_path / "mother.json", censuses)
    tensors = {}
    for name, document in said.items():
        (tmp_path / "merge.yaml").write_text(json.dumps(document | {"dtype": "float32"}))
        out = tmp_path / name.replace(" ", "-").replace(":", "")
        merge(tmp_path / "merge.yaml", out)
        tensors[name] = open_checkpoint(out).tensors
    father, mother = open_checkpoint(BASE).tensors, open_checkpoint(child).tensors
    up = "model.layers.{}.mlp.experts.up_proj".format
    for name, kept in (("census: dead experts", {(1, 5)}), ("census: rare experts", {(1, 5), (3, 2)})):
        for layer in range(4):
            for expert in range(6):
                ours, theirs = (t[up(layer)].float64(expert) for t in (tensors[name], father))
                assert np.array_equal(ours, theirs) == ((layer, expert) in kept)
    shares = [[e["share"] for e in censuses[who]["layers"][2]["experts"]] for who in ("father", "mother")]
    for expert, (a, b) in enumerate(zip(*shares)):
        ours, x, y = (t[up(2)].float64(expert) for t in (tensors["census: by use"], father, mother))
        np.testing.assert_allclose(ours, (a * x + b * y) / (a + b), rtol=1e-5, atol=1e-7)
    assert "1 of 24 experts below 0.05 of the mean, 2 below 0.25" in merge_table.below_the_mean(
        "mother", censuses["mother"]
    )
