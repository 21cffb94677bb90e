"""perplexity: which tokens are scored, llama.cpp's file in bits, the statistics, the commands."""

import ctypes
import json
import math
import platform
import struct
import subprocess
import sys

import numpy as np
import pytest
import quality_table
from gguf.constants import GGUFValueType
from paths import CONVERTER, GOLDEN
from rewrite import rewrite, write_q8_0

import pyengine
from pyengine.cli import main
from pyengine.errors import FileFormatError, InputError
from pyengine.evaluation import perplexity
from pyengine.files.gguf import GGUF, dequantize
from pyengine.files.kld import LogProbs, LogProbsWriter, encode

SEED = 1729
MODEL = CONVERTER / "A-Q8_0.gguf"
LLAMA_CPP = CONVERTER / "llamacpp.kld"
SMALL = GOLDEN / "bfloat16.gguf"


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(SEED).integers(0, 128, 100))
    return path


# ---- which tokens are scored -------------------------------------------------------------------


class Counting:
    """A model whose logits say which ids it has seen, in order, since its state was new."""

    class config:
        vocab_size = 50

    def new_state(self):
        return []

    def forward(self, ids, state, last_only=False):
        rows = []
        for token in ids:
            state.append(int(token))
            rows.append(np.random.default_rng(state).normal(0, 3, 50).astype(np.float32))
        return np.array(rows[-1:] if last_only else rows)


def by_definition(ids, n_ctx, bos=None):
    """-ln p of every scored token, one softmax at a time."""
    model, values = Counting(), []
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        chunk = [int(i) for i in ids[start : start + n_ctx]]
        seen = list(chunk) if bos is None else [bos, *chunk[1:]]
        for i in range(n_ctx // 2, n_ctx - 1):
            logits = model.forward(seen[: i + 1], [])[-1].astype(float)
            values.append(math.log(sum(math.exp(x) for x in logits)) - logits[chunk[i + 1]])
    return values


@pytest.mark.parametrize("n_ctx", [3, 4, 7, 16])
@pytest.mark.parametrize("bos", [None, 9])
def test_the_second_half_of_each_chunk_is_scored(n_ctx, bos):
    ids = np.random.default_rng(SEED).integers(0, 50, 45)
    chunks = perplexity.as_chunks(ids, n_ctx)
    assert chunks.shape == (45 // n_ctx, n_ctx)
    scores = perplexity.join(perplexity.evaluate(Counting(), chunks, bos))
    want = by_definition(ids, n_ctx, bos)
    np.testing.assert_allclose(scores.nll, want, rtol=1e-12)
    assert perplexity.perplexity(scores).value == pytest.approx(math.exp(sum(want) / len(want)))


def test_pieces_and_blocks_change_no_bit(monkeypatch):
    chunks = perplexity.as_chunks(np.random.default_rng(SEED).integers(0, 640, 64), 32)
    model = pyengine.load(MODEL, threads=1)
    whole = perplexity.join(perplexity.evaluate(model, chunks))
    monkeypatch.setattr(perplexity, "FORWARD_TOKENS", 5)
    monkeypatch.setattr(perplexity, "COMPARED_LOGITS", 640 * 3)
    assert np.array_equal(perplexity.join(perplexity.evaluate(model, chunks)).nll, whole.nll)
    logits = np.concatenate([model.forward(chunk)[16:31] for chunk in chunks])
    nll = -perplexity.log_softmax(logits)[np.arange(30), chunks[:, 17:].reshape(-1)]
    assert np.array_equal(nll, whole.nll)


def test_a_text_too_short_is_refused():
    with pytest.raises(InputError, match="want at least 32 tokens for a context of 16, got 31"):
        perplexity.as_chunks(np.zeros(31, int), 16)
    with pytest.raises(InputError, match="context: want at least 3"):
        perplexity.as_chunks(np.zeros(31, int), 2)
    assert perplexity.as_chunks(np.zeros(64, int), 16, 3).shape == (3, 16)


def test_bos(tmp_path):
    flag = "tokenizer.ggml.add_bos_token"
    model = pyengine.load(MODEL, threads=1)
    assert perplexity.bos_id(model.checkpoint) is None
    said = {"tokenizer.ggml.bos_token_id": (7, GGUFValueType.UINT32)}
    for more, want in ({}, perplexity.GPT2_BOS), (said, 7):
        path = rewrite(MODEL, tmp_path / f"{want}.gguf", {flag: (True, GGUFValueType.BOOL), **more})
        checkpoint = pyengine.open_checkpoint(path)
        assert perplexity.bos_id(checkpoint) == want
        pytest.importorskip("tokenizers")
        the = perplexity.text_ids(model.checkpoint, "the")
        assert perplexity.text_ids(checkpoint, "the") == [want, *the]


def test_text_is_read_as_llama_cpp_reads_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\n\n".encode())
    assert perplexity.read_text(path) == "é\r\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="want UTF-8 text, got byte 0xff at 2"):
        perplexity.read_text(path)


# ---- llama.cpp's file --------------------------------------------------------------------------


def test_a_file_of_llama_cpp():
    base = LogProbs.open(LLAMA_CPP)
    assert (base.n_ctx, base.n_vocab, base.tokens.shape) == (128, 640, (2, 128))
    for chunk in range(2):
        log_probs = base.log_probs(chunk)
        assert log_probs.shape == (63, 640) and log_probs.dtype == np.float32
        assert np.array_equal(base.log_probs(chunk, slice(5, 9)), log_probs[5:9])
        np.testing.assert_allclose(np.exp(log_probs.astype(float)).sum(axis=1), 1, atol=1e-4)
        # As logits they are the same up to the rounding of the scale: the codes come back.
        assert np.array_equal(encode(log_probs)["codes"], base._records[chunk]["codes"])


@pytest.mark.parametrize("arithmetic", ["locked", pytest.param("float64", marks=pytest.mark.slow)])
def test_how_far_llama_cpp_is_from_float64(arithmetic):
    """The figures that the file came with: 1.2e-3 and 96.8 %."""
    base, model = LogProbs.open(LLAMA_CPP), pyengine.load(MODEL, arithmetic)
    scores = perplexity.join(perplexity.evaluate(model, base.tokens, base=base))
    assert f"{scores.kld.mean():.1e}" == "1.2e-03" and scores.same_top.sum() == 122


def scalar_record(logits, expf):
    """llama.cpp's quantiser as its source has it: one float32 operation at a time."""
    f = np.float32
    top, low = max(logits), min(logits)
    low = max(low, top - f(16))
    total = 0.0
    for x in logits:
        total += expf(float(x - top))
    log_total = f(math.log(total))
    scale = (top - low) / f(65535)
    codes = [0] * len(logits)
    if scale:
        inverse = f(1) / scale
        for i, x in enumerate(logits):
            if x > low:
                shifted = inverse * (x - low) + f(12582912)
                codes[i] = (int(shifted.view(np.int32)) & 0x7FFFFF) - 0x400000
    codes += [0] * (len(codes) % 2)
    return struct.pack(f"<ff{len(codes)}H", scale, low - top - log_total, *codes)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its expf is the one that is restated")
@pytest.mark.parametrize("n_vocab", [1, 2, 33, 300])
def test_the_bytes_are_llama_cpps(n_vocab):
    expf = ctypes.CDLL("libm.so.6").expf
    expf.argtypes, expf.restype = [ctypes.c_float], ctypes.c_float
    rng = np.random.default_rng(SEED)
    for spread in (0.0, 1e-3, 1.0, 4.0, 30.0):
        logits = rng.normal(2, spread, (8, n_vocab)).astype(np.float32)
        logits[4:] = np.round(logits[4:] * 4) / 4  # ties, in codes and among the likeliest
        want = b"".join(scalar_record(row, expf) for row in logits)
        assert encode(logits).tobytes() == want


def test_written_and_read(tmp_path):
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(0, 33, (3, 9))
    logits = rng.normal(0, 2, (3, 4, 33)).astype(np.float32)
    path = tmp_path / "a.kld"
    with LogProbsWriter(path, tokens, 33) as writer:
        writer.write(logits[0, :1])
        writer.write(logits.reshape(-1, 33)[1:])
        assert not path.exists()
    base = LogProbs.open(path)
    assert np.array_equal(base.tokens, tokens) and base.n_vocab == 33
    for chunk in range(3):
        want = perplexity.log_softmax(logits[chunk])
        step = np.ptp(logits[chunk], axis=1, keepdims=True) / 65535
        assert (abs(base.log_probs(chunk) - want) <= step / 2 + 4e-6).all()


def test_an_incomplete_file_is_none(tmp_path):
    path = tmp_path / "a.kld"
    tokens, row = np.zeros((1, 8), int), np.zeros((1, 5), np.float32)
    with (
        pytest.raises(InputError, match="want logits of 2 more tokens"),
        LogProbsWriter(path, tokens, 5) as writer,
    ):
        writer.write(row)
    with (
        pytest.raises(InputError, match="want at most 3 rows of 5 logits, got 4 of 5"),
        LogProbsWriter(path, tokens, 5) as writer,
    ):
        writer.write(np.zeros((4, 5), np.float32))
    with pytest.raises(ZeroDivisionError), LogProbsWriter(path, tokens, 5):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


GOOD = LLAMA_CPP.read_bytes()
FIRST_RECORD = 20 + 2 * 128 * 4


def patched(offset, kind, value):
    return GOOD[:offset] + struct.pack(kind, value) + GOOD[offset + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "want some bytes"),
        (GOOD[:7], "header: want 20 bytes, got 7"),
        (GOOD[:19], "header: want 20 bytes, got 19"),
        (b"_logitz_" + GOOD[8:], "magic: want b'_logits_'"),
        (GOOD[:20], "size: want 163332 bytes for 2 chunks of 128 tokens and a vocabulary of 640, got 20"),
        (GOOD[:-1], "size: want 163332 bytes"),
        (GOOD + b"\0", "size: want 163332 bytes"),
        (patched(8, "<I", 0), "n_ctx: want at least 3, got 0"),
        (patched(8, "<I", 2), "n_ctx: want at least 3, got 2"),
        (patched(8, "<I", 2**32 - 1), "size: want"),
        (patched(12, "<i", 0), "n_vocab: want at least 1, got 0"),
        (patched(12, "<i", -1), "n_vocab: want at least 1, got -1"),
        (patched(12, "<i", 2**31 - 1), "n_vocab: want at most 268435456"),
        (patched(12, "<i", 2**28), "size: want"),
        (patched(12, "<i", 642), "size: want"),
        (patched(16, "<i", 0), "n_chunk: want at least 1, got 0"),
        (patched(16, "<i", -(2**31)), "n_chunk: want at least 1, got -2147483648"),
        (patched(16, "<i", 2**31 - 1), "size: want"),
        (patched(20, "<i", -1), "token 0 of chunk 0: want 0 to 639, got -1"),
        (patched(20 + 4 * 130, "<i", 640), "token 2 of chunk 1: want 0 to 639, got 640"),
    ],
)
def test_a_hostile_header_is_one_line(tmp_path, content, message):
    path = tmp_path / "bad.kld"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as error:
        LogProbs.open(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "offset, value",
    [
        (0, math.nan),
        (0, math.inf),
        (0, -1e-4),
        (0, 3e38),
        (0, 0.01),
        (4, math.nan),
        (4, -math.inf),
        (4, math.inf),
        (4, 1e30),
        (4, -1e30),
    ],
)
def test_hostile_records_are_one_line(tmp_path, offset, value):
    path = tmp_path / "bad.kld"
    path.write_bytes(patched(FIRST_RECORD + 3 * (8 + 1280) + offset, "<f", value))
    base = LogProbs.open(path)
    assert base.log_probs(0, slice(0, 3)).shape == (3, 640)
    for rows in slice(None), slice(2, 5):
        with pytest.raises(FileFormatError, match="scored token 3 of chunk 0: want log-probabilities, got"):
            base.log_probs(0, rows)


# ---- statistics --------------------------------------------------------------------------------


def test_statistics_are_llama_perplexitys():
    """Against its formulas, written with the sums that it keeps."""
    rng = np.random.default_rng(SEED)
    n = 1001
    base = rng.gamma(2, 1, n)
    nll, kld = base + rng.normal(0, 0.1, n), rng.gamma(1, 0.01, n)
    delta_p = np.exp(-nll) - np.exp(-base)
    scores = perplexity.Scores(nll, base, kld, delta_p, rng.random(n) < 0.9)
    got = perplexity.statistics(scores)

    def mean_and_error(x):
        f = sum(x) / n
        return f, math.sqrt((sum(v * v for v in x) / n - f * f) / (n - 1))

    (q, q_error), (b, b_error) = mean_and_error(nll), mean_and_error(base)
    covariance = (sum(x * y for x, y in zip(nll, base)) / n - q * b) / (n - 1)
    ratio_error = math.sqrt(q_error**2 + b_error**2 - 2 * covariance)
    difference = (
        math.exp(q) - math.exp(b),
        math.sqrt(
            (math.exp(q) * q_error) ** 2 + (math.exp(b) * b_error) ** 2 - 2 * math.exp(q + b) * covariance
        ),
    )
    square, square_error = mean_and_error(delta_p**2)
    top = float(np.mean(scores.same_top))
    for name, want in {
        "perplexity": (math.exp(q), math.exp(q) * q_error),
        "perplexity_base": (math.exp(b), math.exp(b) * b_error),
        "log_perplexity_ratio": (q - b, ratio_error),
        "perplexity_ratio": (math.exp(q - b), math.exp(q - b) * ratio_error),
        "perplexity_difference": difference,
        "same_top": (top, math.sqrt(top * (1 - top) / (n - 1))),
    }.items():
        assert got[name] == pytest.approx(want, rel=1e-9), name
    assert got["correlation"] == pytest.approx(covariance / (q_error * b_error), rel=1e-9)
    assert got["kld"]["mean"] == pytest.approx(mean_and_error(kld), rel=1e-9)
    assert got["delta_p"]["mean"] == pytest.approx(mean_and_error(delta_p), rel=1e-9)
    assert got["delta_p"]["rms"] == pytest.approx(
        (math.sqrt(square), 0.5 / math.sqrt(square) * square_error), rel=1e-9
    )

    ordered = sorted(kld)
    for percentile, value in got["kld"]["percentiles"].items():
        place = percentile / 100 * (n - 1)
        low = int(place)
        want = ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low])
        assert value == pytest.approx(want, rel=1e-9)
    assert (got["kld"]["minimum"], got["kld"]["maximum"]) == (ordered[0], ordered[-1])


def test_a_model_against_itself():
    logits = np.random.default_rng(SEED).normal(0, 3, (20, 30)).astype(np.float32)
    scores = perplexity.compare(logits, perplexity.log_softmax(logits), np.arange(20))
    figures = perplexity.statistics(scores)
    assert not scores.kld.any() and figures["same_top"] == (1, 0) and figures["delta_p"]["rms"] == (0, 0)
    assert figures["log_perplexity_ratio"] == (0, 0) and figures["correlation"] == pytest.approx(1)


def test_compare_by_definition():
    rng = np.random.default_rng(SEED)
    p, q = (perplexity.log_softmax(rng.normal(0, 9, (6, 40)).astype(np.float32)) for _ in "pq")
    scores = perplexity.compare(q.astype(np.float32), p, np.arange(6), resolved=-16)
    q = perplexity.log_softmax(q.astype(np.float32))
    for t in range(6):
        want = sum(math.exp(p[t, i]) * (p[t, i] - q[t, i]) for i in range(40) if p[t, i] > -16)
        assert scores.kld[t] == pytest.approx(want, rel=1e-9)
        assert scores.delta_p[t] == pytest.approx(math.exp(q[t, t]) - math.exp(p[t, t]), rel=1e-9)
        assert scores.same_top[t] == (p[t].argmax() == q[t].argmax())
    assert (p < -16).any()


# ---- the command -------------------------------------------------------------------------------


def test_command(capsys, tmp_path, ids_file):
    base = tmp_path / "base.kld"
    common = "-m", SMALL, "-t", 1
    assert run("perplexity", *common, "--ids-file", ids_file, "-c", 16, "--kl-divergence-base", base) == 0
    out = capsys.readouterr().out
    running, final = out.splitlines()
    chunks = perplexity.as_chunks(np.load(ids_file), 16)
    want = perplexity.join(perplexity.evaluate(pyengine.load(SMALL, threads=1), chunks))
    value, error = perplexity.perplexity(want)
    assert final == f"Final estimate: PPL = {value:.4f} +/- {error:.5f}"
    assert running.startswith("[1]") and running.endswith(f"[6]{value:.4f},") and running.count("[") == 6

    again = "perplexity", *common, "--kl-divergence-base", base, "--kl-divergence"
    assert run(*again) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chunk             PPL               ln(PPL(Q)/PPL(base))")
    assert lines[6].split()[:4] == ["6", f"{value:.4f}", "±", f"{error:.4f}"]
    assert lines[9] == f"Mean PPL(Q)                   : {value:10.6f} ± {error:10.6f}"
    assert lines[-1] == "Same top p: 100.000 ± 0.000 %" and sum("KLD:" in line for line in lines) == 12

    assert run(*again, "--json", "--chunks", 2, "-c", 512, "--ids-file", ids_file) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["n_ctx"], report["n_chunks"], report["tokens"]) == (16, 2, 14)
    assert abs(report["kld"]["mean"]["value"]) < 1e-5
    assert report["kld"]["percentiles"].keys() >= {"50", "99.9"}
    assert report["same_top"] == {"value": 1.0, "error": 0.0}
    assert report["perplexity"]["value"] == pytest.approx(report["perplexity_base"]["value"], rel=1e-4)


def test_text_and_arithmetic(capsys, tmp_path):
    pytest.importorskip("tokenizers")
    text = tmp_path / "text"
    text.write_text("In the beginning was the text, and the text was short.\n" * 3)
    values = []
    for arithmetic in "locked", "float64":
        assert (
            run(
                "perplexity",
                "-m",
                MODEL,
                "-f",
                text,
                "-c",
                16,
                "--chunks",
                -1,
                "--json",
                "--arithmetic",
                arithmetic,
            )
            == 0
        )
        values.append(json.loads(capsys.readouterr().out)["perplexity"]["value"])
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=1e-3)


def test_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert (
            run(
                "perplexity",
                "-m",
                MODEL,
                "--kl-divergence",
                "--kl-divergence-base",
                LLAMA_CPP,
                "--chunks",
                1,
                "--plot",
                tmp_path / name,
            )
            == 0
        )
        assert (tmp_path / name).read_bytes().startswith(start)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "want -f FILE or --ids-file F"),
        (("-f", "/no/text"), "/no/text: No such file"),
        (("--ids-file", "/no/ids"), "/no/ids: want token ids"),
        (("--ids-file", "IDS"), "want at least 1024 tokens for a context of 512, got 100"),
        (("--ids-file", "IDS", "-c", "2"), "context: want at least 3 tokens"),
        (("--ids-file", "IDS", "-c", "9", "--chunks", "0"), "argument --chunks"),
        (
            ("--ids-file", "IDS", "-c", "9", "--kl-divergence-base", "/no/such/dir"),
            "want a file in a directory",
        ),
        (("--ids-file", "IDS", "-f", "IDS"), "not allowed with"),
        (("--kl-divergence",), "want --kl-divergence-base FILE to read"),
        (("--kl-divergence", "--kl-divergence-base", "/no/base"), "/no/base"),
        (("--kl-divergence", "--kl-divergence-base", "IDS"), "magic"),
        (
            ("--kl-divergence", "--kl-divergence-base", LLAMA_CPP),
            "want the model's vocabulary of 128, got 640",
        ),
        (("--kl-divergence", "--kl-divergence-base", LLAMA_CPP, "-c", "127"), "want at least the 128 tokens"),
        (("--plot", "a.png"), "--plot: want --kl-divergence"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, ids_file, arguments, message):
    arguments = [ids_file if a == "IDS" else a for a in arguments]
    assert run("perplexity", "-m", SMALL, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [ids_file]


def test_a_base_of_other_tokens(capsys, ids_file):
    assert (
        run(
            "perplexity",
            "-m",
            MODEL,
            "--kl-divergence",
            "--kl-divergence-base",
            LLAMA_CPP,
            "--ids-file",
            ids_file,
        )
        == 2
    )
    assert f"want the tokens of {ids_file}, got others" in capsys.readouterr().err


# ---- the quality table -------------------------------------------------------------------------


def test_quality_table(capsys, ids_file):
    assert quality_table.main([str(SMALL), "--ids-file", str(ids_file), "-c", "20", "--json", "-t", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["weights"]: row for row in report["rows"]}
    kinds = [f"{kind}, {scale}" for kind in ("INT8", "INT4", "mixed") for scale in ("absmax", "mse")]
    assert list(rows) == ["BF16", "Q8_0", *kinds]
    assert (report["n_chunks"], report["scored_tokens"]) == (5, 45)
    model = pyengine.load(SMALL, threads=1)
    own = perplexity.perplexity(
        perplexity.join(perplexity.evaluate(model, perplexity.as_chunks(np.load(ids_file), 20)))
    )
    assert rows["BF16"]["perplexity"] == own._asdict()
    assert rows["BF16"]["kld"]["value"] == 0 and rows["BF16"]["same_top"]["value"] == 1
    kld = {name: row["kld"]["value"] for name, row in rows.items()}
    assert 0 < kld["Q8_0"] < kld["INT4, absmax"] / 10 and 0 < kld["INT8, mse"] < kld["INT4, mse"] / 10
    assert kld["INT8, mse"] < kld["mixed, mse"] < kld["INT4, mse"]
    assert [row["routing"] is None for row in rows.values()] == [True] + [False] * 7
    nbytes = [rows[name]["bytes"] for name in ("INT4, mse", "mixed, mse", "INT8, mse", "BF16")]
    assert nbytes == sorted(set(nbytes))


def test_the_tables_q8_0(tmp_path):
    """Only matrices change; one that is Q8_0 already keeps its bytes."""
    source = GGUF.open(MODEL)
    same = GGUF.open(write_q8_0(MODEL, tmp_path / "a.gguf"))
    for name, tensor in source.tensors.items():
        assert np.array_equal(same.tensors[name].data, tensor.data)

    source, made = GGUF.open(SMALL), GGUF.open(write_q8_0(SMALL, tmp_path / "b.gguf"))
    assert made.metadata["general.file_type"] == 7 and list(made.tensors) == list(source.tensors)
    for name, tensor in source.tensors.items():
        fits = tensor.type.name == "BF16" and tensor.shape[-1] % 32 == 0
        assert made.tensors[name].type.name == ("Q8_0" if fits else tensor.type.name)
        blocks, values = (
            dequantize(t).reshape(-1, 32 if fits else 1).astype(float) for t in (made.tensors[name], tensor)
        )
        # Half a step, and what rounding the scale to float16 moves 127 of them.
        step = abs(values).max(axis=1, keepdims=True) / 127 * fits
        assert (abs(blocks - values) <= (0.5 + 127 * 2**-11) * step).all()


def test_the_tables_llama_cpp(tmp_path):
    """It computes what llama.cpp's own file has, up to llama.cpp's own dependence on the batch."""
    pytest.importorskip("llama_cpp")
    base = LogProbs.open(LLAMA_CPP)
    model = quality_table.LlamaCpp(MODEL, base.n_ctx, 2)
    scores = perplexity.join(perplexity.evaluate(model, base.tokens, base=base))
    assert scores.kld.mean() < 1e-4


def test_quality_table_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, quality_table.__file__, "/no/such.gguf", "--ids-file", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "/no/such.gguf" in done.stderr
