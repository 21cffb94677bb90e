"""Traces that cannot be compared are one line; those of the last token alone can."""

import numpy as np
import pytest
from partial import part
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.oracle.budget import Budget
from pyengine.oracle.oracle import BUDGETS, Oracle
from pyengine.oracle.recorders.llama_cpp import to_hugging_face
from pyengine.oracle.report.text import as_text
from pyengine.oracle.trace import LLAMA_CPP, Trace
from pyengine.testing import assert_trace_equal

MODEL = GOLDEN / "pattern31.gguf"
TOKENS = 12


@pytest.fixture(scope="module")
def oracle():
    return Oracle(None, MODEL)


@pytest.fixture(scope="module")
def ids(oracle):
    return np.random.default_rng(1729).integers(0, oracle.model.config.vocab_size, TOKENS)


@pytest.fixture(scope="module")
def truth(oracle, ids):
    return oracle.trace(ids)


def fails(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"hello, this is a log\n", "another file"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "a NumPy array"),
        (b"PK\x03\x04" + bytes(40), "a zip archive (.npz or PyTorch's)"),
        (b'{"a": 1}   ', "JSON"),
        (b"GGUF\x03\0\0\0" + bytes(40), "a GGUF"),
        (b"\xff" * 8 + b"{", "another file"),
    ],
)
def test_a_file_that_is_not_safetensors(tmp_path, capsys, content, kind):
    path = tmp_path / "mine.bin"
    path.write_bytes(content)
    want = f"{path}: trace: want a safetensors file, got {kind}\n"
    assert fails(capsys, "verify", MODEL, path).endswith(want)
    with pytest.raises(FileFormatError, match="want a safetensors file"):
        assert_trace_equal(path, model=MODEL)


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "empty").write_bytes(b"")
    assert "want some bytes, got an empty file" in fails(capsys, "verify", MODEL, tmp_path / "empty")
    assert "/no/such" in fails(capsys, "verify", MODEL, "/no/such")
    fails(capsys, "verify", MODEL, tmp_path)
    fails(capsys, "verify", tmp_path / "empty", tmp_path / "empty")


@pytest.mark.parametrize("budget", ["exact", "float32"])
def test_ids_of_another_length(tmp_path, truth, capsys, budget):
    path = tmp_path / "t.safetensors"
    Trace(truth.ids[:7], truth.tensors).save(path)
    err = fails(capsys, "verify", MODEL, path, "--budget", budget)
    assert (
        f"{path}: model.embed_tokens: want row t for token t, 7 rows for the 7 input_ids, got shape [12,"
        in err
    )
    with pytest.raises(InputError, match="want row t for token t, 7 rows"):
        assert_trace_equal(Trace(truth.ids[:7], truth.tensors), model=MODEL)


def test_another_row_count_of_one_tensor(truth):
    for rows in (0, 1, 2, TOKENS - 1, TOKENS + 1):
        odd = Trace(truth.ids, {**truth.tensors, "model.layers.1": np.zeros((rows, 4), np.float32)})
        with pytest.raises(InputError, match="model.layers.1: want row t for token t, 12 rows"):
            Oracle(truth).verify(odd)


@pytest.mark.parametrize("value", [{"lm_head": 1}, 3, None, b"path", [1, 2]])
def test_what_is_not_a_trace(value):
    with pytest.raises(InputError, match="candidate: want a Trace, or the path of one, got "):
        assert_trace_equal(value, model=MODEL)
    with pytest.raises(InputError, match="reference: want a Trace" if value is not None else "oracle: want"):
        Oracle(value)


@pytest.mark.parametrize("array", [np.array([["a"]]), np.array([[True]]), np.array([[1j]])])
def test_arrays_that_are_not_numbers(array):
    with pytest.raises(InputError, match="lm_head: want numbers, got "):
        assert_trace_equal(Trace(np.array([1]), {"lm_head": array}), model=MODEL)


def test_a_trace_with_values_that_no_file_holds(tmp_path):
    with pytest.raises(InputError, match="a: want float32, float64, .* got complex128"):
        Trace(np.array([1]), {"a": np.array([[1j]])}).save(tmp_path / "t")


def test_a_batch_of_one_is_taken(oracle, truth):
    batched = Trace(truth.ids, {n: v[None] for n, v in truth.tensors.items()})
    assert oracle.verify(batched).ok


# ---- another model ---------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["exact", "float32"])
def test_another_models_shapes(truth, budget):
    halved = Trace(
        truth.ids, {n: v[:, : v.shape[1] // 2] for n, v in truth.tensors.items() if v.shape[1] > 2}
    )
    with pytest.raises(InputError) as caught:
        assert_trace_equal(halved, model=MODEL, budget=budget)
    assert "model.embed_tokens: want shape [12, " in str(caught.value)
    assert str(caught.value).endswith("have another shape: the trace is of another model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same shapes, other weights."""
    from gguf.constants import GGMLQuantizationType
    from rewrite import rewrite

    from pyengine.files.gguf import GGUF

    random = np.random.default_rng(7)
    tensors = {}
    for name, tensor in GGUF.open(MODEL).tensors.items():
        stored = tensor.data.copy()
        if stored.ndim and stored.shape[-1] % 34 == 0 and stored.dtype == np.uint8:
            codes = stored.reshape(-1, 34)
            codes[:, 2:] = random.integers(-127, 128, codes[:, 2:].shape).astype(np.int8).view(np.uint8)
            tensors[name] = codes.reshape(stored.shape), GGMLQuantizationType.Q8_0
    assert len(tensors) > 20
    return rewrite(MODEL, tmp_path_factory.mktemp("other") / "other.gguf", tensors=tensors)


def test_another_models_weights(tmp_path, other, ids, capsys):
    path = tmp_path / "other.safetensors"
    Peer(other).run(ids).save(path)
    err = fails(capsys, "verify", MODEL, path, "--budget", "float32")
    assert f"{path}: traces: want one of this model, got one of another, " in err
    err = fails(capsys, "verify", MODEL, path)
    assert "got one of another" in err
    assert main(["verify", str(other), str(path), "--budget", "float32"]) == 0


@pytest.mark.parametrize("fault", ["vocabulary", "norm_plus_one_twice", "shared_gate_shape"])
def test_a_broken_port_is_not_another_model(oracle, ids, fault):
    assert oracle.verify(Peer(MODEL, [fault]).run(ids), "float32").guilty


# ---- the last token alone --------------------------------------------------------------------


def last_alone(trace, *names, flat=False):
    tensors = {n: v[-1:] if n in names else v for n, v in trace.tensors.items()}
    if flat:
        tensors |= {n: tensors[n][0] for n in names}
    return Trace(trace.ids, tensors, trace.arithmetic)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["full", "logits", "layers"])
@pytest.mark.parametrize("budget", ["exact", "float32", "bfloat16"])
def test_logits_of_the_last_token_alone(tmp_path, oracle, truth, budget, kind, flat):
    trace = last_alone(part(truth, kind), "lm_head", flat=flat)
    trace.save(tmp_path / "t.safetensors")
    assert oracle.verify(tmp_path / "t.safetensors", budget).ok


def test_a_wrong_last_row_is_found_at_its_token(oracle, ids):
    wrong = Peer(MODEL, ["rope_pairs"]).run(ids)
    verdict = oracle.verify(last_alone(part(wrong, "logits"), "lm_head"), "float32")
    assert verdict.accused.token == TOKENS - 1 and verdict.accused.place.worst[0] == TOKENS - 1
    assert verdict.mistakes[0].name == "RoPE turns pairs (2i, 2i + 1), not halves", as_text(verdict)
    both = oracle.verify(last_alone(wrong, "lm_head", "model.norm"), "float32")
    assert [row.name for row in both.guilty] == ["model.layers.3.self_attn.o_proj"]
    right = oracle.verify(last_alone(Peer(MODEL).run(ids), "lm_head", "model.norm"), "float32")
    assert right.ok, as_text(right)
    exact = Oracle(last_alone(oracle.trace(ids), "lm_head")).verify(wrong)
    assert [r.name for r in exact.rows][-1] == "lm_head" and exact.rows[-1].token == TOKENS - 1


def test_a_budget_knows_the_rows_that_it_was_made_for(tmp_path, oracle, truth):
    alone = last_alone(truth, "lm_head")
    oracle.budget("float32", alone).save(tmp_path / "b.json")
    budget = Budget.load(tmp_path / "b.json")
    assert budget.last_row_alone == ("lm_head",)
    assert oracle.verify(alone, budget).ok
    with pytest.raises(InputError, match="budget: want one for the candidate's rows"):
        oracle.verify(truth, budget)


def test_llama_cpps_logits_of_the_last_token(oracle, truth):
    tensors = {"result_output": truth.tensors["lm_head"][-1], "l_out-3": truth.tensors["model.layers.3"]}
    trace = Trace(truth.ids, tensors, "llama.cpp", LLAMA_CPP)
    turned = to_hugging_face(trace, oracle.model.config)
    assert turned.tensors["lm_head"].shape == (1, 288)
    assert oracle.verify(trace, "float32").ok


# ---- budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["int8", "float33", "/no/such.json", "Float32", "", 7, None])
def test_a_budget_that_is_none(tmp_path, truth, capsys, budget):
    with pytest.raises(InputError) as caught:
        assert_trace_equal(truth, model=MODEL, budget=budget)
    assert str(caught.value) == (
        f"budget: want {', '.join(BUDGETS)}, several joined by +, or the file of one that was saved, "
        f"got {budget!r}"
    )
    if isinstance(budget, str):
        truth.save(tmp_path / "t")
        err = fails(capsys, "verify", MODEL, tmp_path / "t", "--budget", budget)
        assert f"--budget: want {', '.join(BUDGETS)}, several joined by +, or the file" in err


def test_an_arithmetic_that_is_none():
    with pytest.raises(InputError, match="arithmetic: want locked or locked-kv16 or float64, got 'exact'"):
        Oracle(None, MODEL, "exact")
    with pytest.raises(InputError, match="model: want a path, got "):
        Oracle(None, pyengine.load(MODEL, "float64"))
