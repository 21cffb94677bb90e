"""Statistics of a text: the model's own bits, any threads, any kill; and what is listed."""

import json

import numpy as np
import pytest
from bits import assert_same_bits
from calibrating import calibrate, texts_of
from paths import GOLDEN

import pyengine
from pyengine.calibration import imatrix
from pyengine.calibration.calibrate import SAVED, _Sums, describe_run, take_statistics
from pyengine.calibration.statistics import few_experts
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.errors import InputError

NAMES = ["legacy", "dense", "next", "pattern31"]


@pytest.mark.parametrize("name", NAMES)
def test_layers_give_the_models_bits(name):
    model = pyengine.load(GOLDEN / f"{name}.gguf")
    ids = texts_of(model.config.vocab_size, 19)[0].ids
    sums, hidden = _Sums(model), None
    wanted, recorded = {}, lambda key, value: wanted.__setitem__(key, value)
    model.forward(ids, record=recorded)
    hidden = model.embed_tokens.stored_float32(rows=ids)
    for all_experts in False, True:
        out = hidden
        for layer in sums.layers:
            out = sums._through(layer, out, all_experts)
            assert_same_bits(out, wanted[layer.name], layer.name)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_squares(name, tmp_path):
    """Of what the model records as inputs, summed one token after another."""
    path = calibrate(name, tmp_path / "s.gguf", 30, 11)
    model = pyengine.load(GOLDEN / f"{name}.gguf")
    stats = imatrix.read(path, model.checkpoint)
    wanted = {}
    for window in stats.run.windows():

        def add(key, value):
            squares = np.square(value, dtype=np.float64).sum(axis=0)
            wanted[key] = wanted.get(key, 0) + squares

        model.forward(stats.run.ids[window], record=add)
    for layer in range(model.config.num_hidden_layers):
        stem = f"model.layers.{layer}"
        x, y = wanted[f"{stem}.input_layernorm"], wanted[f"{stem}.post_attention_layernorm"]
        for key, sums in stats.sums.items():
            if not key.startswith(f"{stem}."):
                continue
            if ".in_proj" in key or ".q_proj" in key or ".v_proj" in key:
                assert np.allclose(sums, x, rtol=1e-6)
            elif key.endswith((".mlp.gate.weight", "shared_expert.up_proj.weight", ".mlp.up_proj.weight")):
                assert np.allclose(sums, y, rtol=1e-6)
            elif key.endswith("out_proj.weight"):
                assert np.allclose(sums, wanted[f"{stem}.linear_attn.norm"], rtol=1e-6)
            elif key.endswith("experts.gate_proj") and sums.ndim == 2:
                chosen = model.config.num_experts_per_tok
                assert stats.counts[key].sum() == 41 * chosen
                assert np.allclose(sums.sum(axis=0), chosen * y, rtol=1e-6)


def test_every_token_through_every_expert(tmp_path):
    path = calibrate("legacy", tmp_path / "s.gguf", 30, all_experts=True)
    stats = imatrix.read(path, open_checkpoint(GOLDEN / "legacy.gguf"))
    assert stats.run.all_experts
    for name, counts in stats.counts.items():
        assert (counts == 30).all(), name
    gate = stats.sums["model.layers.0.mlp.experts.gate_proj"]
    assert_same_bits(gate, np.tile(stats.sums["model.layers.0.mlp.gate.weight"], (len(gate), 1)))


def test_threads_and_a_rerun_change_no_byte(tmp_path):
    paths = [calibrate("next", tmp_path / f"{t}.gguf", threads=t) for t in (1, 3)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_killed_run_continues(tmp_path):
    """To the same bytes, and without computing again what was noted."""
    lengths, context = ([3] * (2 * SAVED + 3)), 3
    whole = calibrate("dense", tmp_path / "whole.gguf", *lengths, context=context)
    model = pyengine.load(GOLDEN / "dense.gguf")
    run = describe_run(model, texts_of(model.config.vocab_size, *lengths), context)
    seen, output = [], tmp_path / "killed.gguf"

    def kill(tokens):
        seen.append(tokens)
        if len(seen) == 2 * SAVED + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_statistics(model, run, output, kill)
    assert not output.exists()
    calls, add = [], _Sums.add_window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Sums, "add_window", lambda *a: calls.append(1) or add(*a))
        take_statistics(model, run, output)
    assert len(calls) == 3
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.gguf", "whole.gguf"]


@pytest.mark.parametrize("damage", ["other run", "no zip"])
def test_notes_of_another_run_are_not_taken(tmp_path, damage):
    whole = calibrate("dense", tmp_path / "whole.gguf")
    output = tmp_path / "s.gguf"
    notes = tmp_path / "s.gguf.notes"
    if damage == "no zip":
        notes.write_bytes(b"PK\x03\x04 cut short")
    else:
        with open(notes, "wb") as file:
            np.savez(file, identity="another", windows=1)
    calibrate("dense", output)
    assert output.read_bytes() == whole.read_bytes() and not notes.exists()


def test_no_text():
    with pytest.raises(InputError, match="at least one"):
        describe_run(pyengine.load(GOLDEN / "dense.gguf"), [])


def test_few():
    assert few_experts(np.array([0, 100, 4, 100, 296])) == [0, 2]
    assert few_experts(np.array([0, 0, 0])) == [0, 1, 2]


def test_command(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("In the beginning God created the heaven and the earth.")
    arguments = ["calibrate", "-m", str(GOLDEN.parent / "trained" / "bf16.gguf"), "-f", str(text), "-o"]
    assert main([*arguments, str(tmp_path / "s.gguf")]) in (0, None)
    said = capsys.readouterr().out
    assert "s.gguf: written, " in said and "below 0.05 of the mean of" in said
    assert main([*arguments, str(tmp_path / "s2.gguf"), "--json", "--all-experts"]) in (0, None)
    assert json.loads(capsys.readouterr().out)["few"] == []
    assert main([*arguments, str(tmp_path / "none" / "s.gguf")]) == 2
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    arguments[4] = str(empty)
    assert main([*arguments, str(tmp_path / "s3.gguf")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "at least one token" in error
