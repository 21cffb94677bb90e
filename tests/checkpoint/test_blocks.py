"""What a GGUF's metadata claims of its blocks, and what its tensors show."""

import numpy as np
import pytest
from gguf.constants import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN
from rewrite import rewrite

import pyengine
from pyengine import demo
from pyengine.checkpoint.config import FULL, LINEAR
from pyengine.checkpoint.open import open_checkpoint
from pyengine.errors import CheckpointError, FileFormatError
from pyengine.files.gguf import GGUF

NEXTN, PLAIN = GOLDEN / "nextn.gguf", GOLDEN / "pattern31.gguf"
IDS = np.arange(40)


def changed(tmp_path, source, drop=(), **change):
    keys = {f"qwen35moe.{key.replace('__', '.')}": value for key, value in change.items()}
    return rewrite(source, tmp_path / "x.gguf", keys, drop=drop)


def block(source, number):
    return [name for name in GGUF.open(source).tensors if name.startswith(f"blk.{number}.")]


def fault(path):
    with pytest.raises((FileFormatError, CheckpointError)) as caught:
        open_checkpoint(path)
    return str(caught.value).removeprefix(f"{path}: ").removeprefix("qwen35moe.")


# ---- next-token blocks ---------------------------------------------------------------------------


def test_a_trunk_block_is_no_next_token_block(tmp_path):
    path = changed(tmp_path, demo.CHECKPOINT, nextn_predict_layers=(1, V.UINT32))
    assert fault(path) == "nextn_predict_layers: want nextn.* tensors in block 3, got 1 and none there"


def test_a_stripped_block_is_not_needed(tmp_path):
    path = changed(tmp_path, NEXTN, drop=block(NEXTN, 2))
    for arithmetic in ("float64", "locked"):
        want, got = (pyengine.load(p, arithmetic).forward(IDS) for p in (NEXTN, path))
        assert (want == got).all()


def test_a_half_stripped_block_is_refused(tmp_path):
    names = [name for name in block(NEXTN, 2) if ".nextn." in name]
    assert len(names) >= 4
    message = "nextn_predict_layers: want nextn.* tensors in block 2, got 1 and none there"
    assert fault(changed(tmp_path, NEXTN, drop=names)) == message


@pytest.mark.parametrize("value, got", [(None, "no such key"), ((0, V.UINT32), "0")])
@pytest.mark.parametrize("blocks", [3, 2])
def test_a_forgotten_key_is_refused_and_the_tensors_are_named(tmp_path, value, got, blocks):
    path = changed(tmp_path, NEXTN, nextn_predict_layers=value, block_count=(blocks, V.UINT32))
    message = fault(path)
    assert message.startswith("blk.2.nextn.")
    assert message.endswith(f": want qwen35moe.nextn_predict_layers to count block 2 of {blocks}, got {got}")


def test_a_key_that_counts_too_many_is_refused(tmp_path):
    path = changed(tmp_path, NEXTN, nextn_predict_layers=(2, V.UINT32))
    assert fault(path) == "nextn_predict_layers: want nextn.* tensors in block 1, got 2 and none there"


# ---- kinds of layers -----------------------------------------------------------------------------


def test_without_a_key_the_interval_is_4(tmp_path):
    path = changed(tmp_path, PLAIN, full_attention_interval=None, attention__recurrent_layers=None)
    want, got = (open_checkpoint(p) for p in (PLAIN, path))
    assert got.config == want.config and got.config.layer_types == (LINEAR, LINEAR, LINEAR, FULL)
    assert (pyengine.load(path, "locked").forward(IDS) == pyengine.load(PLAIN, "locked").forward(IDS)).all()


@pytest.mark.parametrize("name", ["nextn", "fused", "tied", "bfloat16", "yarn"])
def test_a_default_that_the_tensors_contradict_is_no_guess(tmp_path, name):
    path = changed(
        tmp_path, GOLDEN / f"{name}.gguf", full_attention_interval=None, attention__recurrent_layers=None
    )
    message = fault(path)
    assert message.startswith("full_attention_interval: want this key, for blk.")
    assert message.endswith(" contradicts the default of 4, got no such key")


@settings(max_examples=30, deadline=None)
@given(kinds=st.lists(st.booleans(), min_size=4, max_size=4), key=st.sampled_from(["recurrent", "kv"]))
def test_claims_of_kinds_load_only_as_the_tensors_are(tmp_path_factory, kinds, key):
    """Every claim but the right one is refused, whichever key makes it."""
    change = {"full_attention_interval": None, "attention__recurrent_layers": None}
    if key == "recurrent":
        change["attention__recurrent_layers"] = (kinds, V.ARRAY, V.BOOL)
    else:
        change["attention__head_count_kv"] = ([0 if k else 1 for k in kinds], V.ARRAY, V.INT32)
    path = changed(tmp_path_factory.mktemp("x"), PLAIN, **change)
    if kinds == [True, True, True, False] or (key == "kv" and not any(kinds)):
        assert open_checkpoint(path).config == open_checkpoint(PLAIN).config
    else:
        fault(path)


# ---- head counts, one a layer --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [V.INT32, V.UINT32, V.INT64])
@pytest.mark.parametrize("source, counts", [(PLAIN, [0, 0, 0, 1]), (PLAIN, [1] * 4), (NEXTN, [0, 2, 2])])
def test_head_counts_of_each_layer(tmp_path, kind, source, counts):
    path = changed(tmp_path, source, attention__head_count_kv=(counts, V.ARRAY, kind))
    assert open_checkpoint(path).config == open_checkpoint(source).config


def test_the_array_alone_says_the_kinds(tmp_path):
    path = changed(
        tmp_path,
        NEXTN,
        full_attention_interval=None,
        attention__recurrent_layers=None,
        attention__head_count_kv=([0, 2, 0], V.ARRAY, V.INT32),
    )
    assert open_checkpoint(path).config == open_checkpoint(NEXTN).config


@pytest.mark.parametrize(
    "counts, message",
    [
        ([0, 0, 1, 0], "want 1 or more for block 3 of full attention, got 0"),
        ([0, 0, 0, -1], "want 1 or more for block 3 of full attention, got -1"),
        ([2, 0, 0, 1], "want 2 for block 3 as for others, got 1"),
        ([0, 0, 1], "want 4 entries as block_count, got 3"),
    ],
)
def test_head_counts_that_contradict_are_named(tmp_path, counts, message):
    path = changed(tmp_path, PLAIN, attention__head_count_kv=(counts, V.ARRAY, V.INT32))
    assert fault(path) == f"attention.head_count_kv: {message}"


def test_query_heads_of_each_layer(tmp_path):
    path = changed(tmp_path, PLAIN, attention__head_count=([0, 0, 0, 2], V.ARRAY, V.INT32))
    assert open_checkpoint(path).config == open_checkpoint(PLAIN).config
    path = changed(tmp_path, PLAIN, attention__head_count=([0.5] * 4, V.ARRAY, V.FLOAT32))
    assert fault(path) == "attention.head_count: want list of int, got array of 4 float32"
