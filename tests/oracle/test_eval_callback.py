"""What llama-eval-callback prints, read as elements with their indices."""

import json

import numpy as np
import pytest
from eval_callback_text import printed
from paths import GOLDEN, TESTS

from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.recorders.eval_callback import read_eval_callback
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import Trace

MODEL = GOLDEN / "pattern31.gguf"
CONVERTER = TESTS / "converter" / "A-Q8_0.gguf"
IDS = np.arange(9) * 7 + 3


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def tensors(oracle):
    """llama.cpp's of a right run, with its names, shapes and head order."""
    truth, c = oracle.trace(IDS).tensors, oracle.model.config
    keys, heads = c.linear_num_key_heads, c.linear_num_value_heads
    tiled = [k * (heads // keys) + j for j in range(heads // keys) for k in range(keys)]
    z = truth["model.layers.0.linear_attn.in_proj_z"].reshape(len(IDS), heads, -1)[:, tiled]
    return {
        "model.input_embed": truth["model.embed_tokens"],
        "attn_norm-0": truth["model.layers.0.input_layernorm"],
        "z-0": z,  # [T, heads, n]: corners of three axes
        "z-0 (reshaped)": z * 9,
        "Kcur_normed-3": truth["model.layers.3.self_attn.k_norm"].reshape(
            len(IDS), c.num_key_value_heads, -1
        ),
        "ffn_moe_topk-1": truth["model.layers.1.mlp.gate.2"].astype(np.int32),
        "ffn_moe_weights_norm-1": truth["model.layers.1.mlp.gate.1"],
        "l_out-2": truth["model.layers.2"],
        "l_out-3": truth["model.layers.3"][-1:],  # the last layer, of the last token alone
        "result_output": truth["lm_head"][-1:],
        "node_17": z,
    }


@pytest.mark.parametrize("version", ["old", "new", "template"])
def test_the_corners_have_their_indices(oracle, tensors, version, tmp_path):
    (tmp_path / "log").write_text(printed(tensors, version, IDS))
    trace = read_eval_callback(tmp_path / "log", IDS, oracle.model.config)
    truth = oracle.trace(IDS).tensors
    assert sorted(trace.tensors) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.0.linear_attn.in_proj_z",
        "model.layers.2",
        "model.layers.3",
        "model.layers.3.self_attn.k_norm",
    ]
    for name, array in trace.tensors.items():
        wanted = trace.part(name, truth[name])
        assert array.shape == wanted.shape and np.abs(array - wanted).max() <= 5.1e-5, name
    assert trace.rows["model.layers.2"].tolist() == [0, 1, 2, 6, 7, 8]
    assert trace.rows["model.layers.3"].tolist() == [8] and trace.resolution == 5e-5
    verdict = oracle.verify(trace, "float32", seconds=5)
    assert verdict.ok and len(verdict.rows) == 7, as_text(verdict)


@pytest.mark.slow
def test_a_wrong_element_is_found_though_only_corners_are_printed(oracle, tensors, tmp_path):
    wrong = {**tensors, "l_out-2": tensors["l_out-2"] + np.float32(0.01)}
    (tmp_path / "log").write_text(printed(wrong, "new", IDS))
    verdict = oracle.verify(
        read_eval_callback(tmp_path / "log", IDS, oracle.model.config), "float32", seconds=1
    )
    assert verdict.first.name == "model.layers.2" and not verdict.guilty, as_text(verdict)


def test_more_digits_are_a_finer_resolution(oracle, tensors, tmp_path):
    (tmp_path / "log").write_text(printed(tensors, "new", IDS, digits=7))
    assert read_eval_callback(tmp_path / "log", IDS, oracle.model.config).resolution == 5e-8


def test_texts_that_cannot_be_read(oracle, tensors, tmp_path):
    config, log = oracle.model.config, tmp_path / "log"
    text = printed(tensors, "old", IDS)
    short = text.replace("...,", "", 1)
    for changed, ids, error, message in [
        ("nothing", IDS, FileFormatError, "text: want tensors that llama-eval-callback prints, got none"),
        (text, IDS + 1, InputError, "want the run of the 9 ids given, got one of"),
        (
            text.replace("number of input tokens = 9", ""),
            IDS[:5],
            FileFormatError,
            "want 64 values for each of 5",
        ),
        (short, IDS, FileFormatError, "want rows of one length|want the corners"),
    ]:
        log.write_text(changed)
        if error is FileFormatError and changed is short:
            lines = text.splitlines()
            at = next(i for i, line in enumerate(lines) if "..., " in line and "[" in line)
            log.write_text(
                "\n".join([*lines[:at], lines[at].replace("..., ", "", 1)[:-20] + "],", *lines[at + 1 :]])
            )
        with pytest.raises(error, match=message):
            read_eval_callback(log, ids, config)


@pytest.mark.slow
def test_the_command(tensors, tmp_path, capsys):
    (tmp_path / "log").write_text(printed(tensors, "old", IDS))
    ids = " ".join(map(str, IDS))
    out = str(tmp_path / "t.safetensors")
    arguments = ["trace", "-m", str(MODEL), "--ids", ids, "--eval-callback", str(tmp_path / "log"), "-o", out]
    assert main(arguments) == 0
    assert Trace.load(out).arithmetic == "llama.cpp, printed"
    assert main(["verify", str(MODEL), out, "--budget", "float32", "--search-seconds", "0"]) == 0
    assert "within the float32 budget: 7 of 83 tensors" in capsys.readouterr().out


@pytest.mark.slow
def test_what_llama_cpp_computes(tmp_path):
    pytest.importorskip("llama_cpp")
    from pyengine.testing import record_llama_cpp

    oracle = Oracle(None, CONVERTER)
    ids = np.array(json.loads((CONVERTER.parent / "expected.json").read_text())["ids"])[:12]
    (tmp_path / "log").write_text(printed(record_llama_cpp(CONVERTER, ids, threads=1).tensors, "new", ids))
    trace = read_eval_callback(tmp_path / "log", ids, oracle.model.config)
    verdict = oracle.verify(trace, "int8-activations", seconds=30)
    assert verdict.ok and len(verdict.rows) > 70, as_text(verdict)
