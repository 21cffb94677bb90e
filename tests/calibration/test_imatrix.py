"""llama.cpp's imatrix: what is written, people's own files, and files that are refused."""

import gguf
import numpy as np
import pytest
from bits import assert_same_bits
from calibrating import calibrate, texts_of
from imatrices import checkpoint, entries, write
from paths import GOLDEN

import pyengine
from pyengine.calibration import imatrix
from pyengine.calibration.calibrate import _Sums
from pyengine.calibration.statistics import Run
from pyengine.checkpoint.families import value_head_orders
from pyengine.checkpoint.open import open_checkpoint
from pyengine.errors import FileFormatError


def test_what_is_written(tmp_path):
    """Keys, names, shapes and column order of llama.cpp, read by gguf-py; and the same back."""
    path = calibrate("pattern31", tmp_path / "s.gguf")
    model, reader = checkpoint(), gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.chunk_count").contents() == 4  # 60 and 20 tokens in windows of 24
    assert reader.get_field("imatrix.chunk_size").contents() == 24
    assert reader.get_field("imatrix.datasets").contents() == ["0.txt", "1.txt"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stats = imatrix.read(path, model)
    for spec in imatrix.calibrated_specs(model.config):
        sums, counts = tensors[spec.gguf + ".in_sum2"], tensors[spec.gguf + ".counts"]
        experts = spec.shape[0] if len(spec.shape) == 3 else 1
        assert sums.data.shape == (experts, spec.shape[-1]) and counts.data.shape == (experts, 1)
        assert sums.data.dtype == counts.data.dtype == np.float32
        columns = sums.data
        if spec.order == "value columns":
            columns = columns[:, value_head_orders(model.config)["value columns"]]
        assert_same_bits(np.atleast_2d(stats.sums[spec.name]), columns.astype(np.float64))
    assert (stats.chunks, stats.chunk_tokens, stats.datasets) == (4, 24, ["0.txt", "1.txt"])
    assert [(w.start, w.stop) for w in stats.run.windows()] == [(0, 24), (24, 48), (48, 60), (60, 80)]


def test_peoples_own_files(tmp_path):
    """Partial ones too: what a file lacks has weight 1, an expert without tokens its layer's mean."""
    found = entries()
    sums, counts = found["blk.0.ffn_down_exps.weight"]
    sums[:] = np.arange(1, sums.shape[1] + 1) * counts
    sums[1], counts[1] = 0, 0
    found["blk.0.attn_gate.weight"] = (
        np.zeros_like(found["blk.0.attn_gate.weight"][0]),
        np.ones((1, 1), "f"),
    )
    found.pop("blk.1.ffn_gate_exps.weight")
    stats = imatrix.read(write(tmp_path / "i.gguf", found), checkpoint())
    assert stats.run is None and stats.datasets == ["calib.txt"] and stats.chunks == 3
    down = "model.layers.0.mlp.experts.down_proj"
    n = sums.shape[1]
    for expert in range(len(counts)):  # of the silent one too
        assert_same_bits(stats.weights(down, expert, n), np.arange(1.0, n + 1))
    assert stats.few(down) == [1]
    assert_same_bits(stats.weights("model.layers.1.mlp.experts.gate_proj", 0, 5), np.ones(5))
    assert_same_bits(stats.weights("model.layers.0.linear_attn.in_proj_z.weight", None, 64), np.ones(64))


def test_a_stack_without_any_token_weighs_alike(tmp_path):
    found = entries()
    sums, counts = found["blk.0.ffn_down_exps.weight"]
    sums[:], counts[:] = 0, 0
    stats = imatrix.read(write(tmp_path / "i.gguf", found), checkpoint())
    assert_same_bits(stats.weights("model.layers.0.mlp.experts.down_proj", 0, 32), np.ones(32))


def test_fused_names(tmp_path):
    """Of a GGUF with gate and up in one tensor: one input."""
    found = entries()
    value = found.pop("blk.0.ffn_gate_exps.weight")
    found.pop("blk.0.ffn_up_exps.weight")
    found["blk.0.ffn_gate_up_exps.weight"] = value
    stats = imatrix.read(write(tmp_path / "i.gguf", found), checkpoint())
    assert {f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate", "up")} <= set(stats.sums)


def _nan(found):
    found["blk.0.attn_qkv.weight"][0][0, 3] = np.nan


def _negative(found):
    found["blk.0.attn_qkv.weight"][0][0, 3] = -1


def _shape(found):
    found["blk.0.attn_qkv.weight"] = (np.ones((1, 63), np.float32), np.ones((1, 1), np.float32))


def _experts(found):
    found["blk.0.ffn_down_exps.weight"] = (np.ones((3, 32), np.float32), np.ones((3, 1), np.float32))


def _half(found):
    found["blk.0.attn_qkv.weight"] = (found["blk.0.attn_qkv.weight"][0], None)


def _no_tokens(found):
    for _, counts in found.values():
        counts[:] = 0


def _no_experts(found):
    for name in [name for name in found if "_exps" in name]:
        found.pop(name)


def _of_another_program(found):
    found.clear()
    found["decoder.0.fc1"] = (np.ones((1, 8), np.float32), np.ones((1, 1), np.float32))


REFUSED = [
    (_nan, "blk.0.attn_qkv.weight.in_sum2: want finite values of at least 0, got nan"),
    (_negative, "want finite values of at least 0, got -1"),
    (_shape, r"want F32 \[1, 64\] as this model's weight has it, got F32 \[1, 63\]"),
    (_experts, r"want F32 \[6, 32\] as this model's weight has it, got F32 \[3, 32\]"),
    (_half, "blk.0.attn_qkv.weight.counts: want this tensor beside its other half, got none"),
    (_no_tokens, "want statistics of at least one token, got 0"),
    (_no_experts, "want the routed experts of .*pattern31.gguf, got none"),
    (_of_another_program, "want weights of .*pattern31.gguf, got none"),
]


@pytest.mark.parametrize("damage, message", REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_refused(tmp_path, damage, message):
    found = entries()
    damage(found)
    with pytest.raises(FileFormatError, match=message) as error:
        imatrix.read(write(tmp_path / "i.gguf", found), checkpoint())
    assert "\n" not in str(error.value)


def test_no_imatrix(tmp_path):
    with pytest.raises(FileFormatError, match="general.type: want 'imatrix'"):
        imatrix.read(GOLDEN / "pattern31.gguf", checkpoint())
    with pytest.raises(FileFormatError, match="general.type: want 'imatrix', got 'model'"):
        imatrix.read(write(tmp_path / "i.gguf", entries(), kind="model"), checkpoint())


def test_statistics_of_another_model(tmp_path):
    """Of the same shape: a GGUF with one weight changed."""
    path = calibrate("bfloat16", tmp_path / "s.gguf")
    data = bytearray((GOLDEN / "bfloat16.gguf").read_bytes())
    tensor = checkpoint("bfloat16").tensors["model.layers.0.linear_attn.in_proj_qkv.weight"]
    place = data.find(tensor.data.tobytes()[:64])
    data[place] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    with pytest.raises(
        FileFormatError, match="pyengine.calibration.model: want statistics of .*another model"
    ):
        imatrix.read(path, open_checkpoint(other))


@pytest.mark.parametrize(
    "texts", [[], [{"tokens": 79, "name": "a", "sha256": ""}], [{"tokens": 80, "name": ""}]]
)
def test_our_keys_are_checked(tmp_path, texts):
    model = pyengine.load(GOLDEN / "dense.gguf")
    sums, ids = _Sums(model), texts_of(model.config.vocab_size, 80)[0].ids
    sums.add_window(ids[:4], False)
    run = Run(model.checkpoint.fingerprint, ids, texts, 24)
    imatrix.write(tmp_path / "s.gguf", model.checkpoint, sums.sums, sums.counts, run)
    with pytest.raises(FileFormatError, match="want the texts of 80 tokens"):
        imatrix.read(tmp_path / "s.gguf", model.checkpoint)
