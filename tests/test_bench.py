"""bench, and the tools around it: fields, what a token costs by hand, the three outputs, the plot."""

import csv
import functools
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rewrite import GOLDEN

import pyengine
from pyengine import bench, memory, ops
from pyengine.checkpoint import open_checkpoint
from pyengine.config import FULL, LINEAR, Config
from pyengine.errors import InputError

MODEL = GOLDEN / "pattern31.gguf"
TOOLS = Path(__file__).parent.parent / "tools"

# pattern31: hidden 64, vocabulary 288, three delta nets (2 key and 4 value heads of 32) and one
# attention (2 heads, 1 key-value head of 48), 2 of 6 experts and a shared one, all 32 wide.
DELTA_NET = 256 * 64 + 128 * 64 + 2 * 4 * 64 + 64 * 128  # qkv, z, a and b, out
ATTENTION = 2 * 96 * 64 + 2 * 48 * 64 + 64 * 96  # query with gate, key and value, output
EXPERTS = (2 + 1) * 3 * 32 * 64
ROUTERS = 6 * 64 + 64  # float32, as are the vectors
HEAD = 288 * 64
LAYERS = 3 * DELTA_NET + ATTENTION + 4 * (EXPERTS + ROUTERS)
DELTA_NET_VECTORS = 256 * 4 + 4 + 4 + 32  # convolution, A, dt, norm
VECTORS = 4 * 2 * 64 + 64 + 3 * DELTA_NET_VECTORS + 2 * 48

# llama-bench's, of those that mean something here.
LLAMA_BENCH = set("model_filename model_type model_size model_n_params n_batch n_threads n_prompt n_gen "
                  "n_depth type_k type_v test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts".split())
OURS = {"isa", "gb_per_s", "gmac_per_s", "read_bandwidth_gb_per_s", "bandwidth_share"}


@pytest.fixture(autouse=True)
def a_small_buffer(monkeypatch):
    small = functools.partial(bench.read_bandwidth, nbytes=1 << 20)
    monkeypatch.setattr(bench, "read_bandwidth", small)


@pytest.fixture
def results():
    return bench.run(MODEL, n_prompt=[8], n_gen=[4], threads=[1], repetitions=2)


def test_what_a_token_costs():
    checkpoint = open_checkpoint(MODEL)
    quantised = 3 * DELTA_NET + ATTENTION + 4 * EXPERTS + HEAD
    one_row = 64
    assert bench.weight_bytes_per_token(checkpoint) == (
        (quantised + one_row) * 34 // 32 + (4 * ROUTERS + VECTORS) * 4)
    assert bench.weight_macs(checkpoint, 1, 1) == LAYERS + HEAD
    assert bench.weight_macs(checkpoint, 512, 1) == 512 * LAYERS + HEAD


def test_a_tied_head_is_read_whole_but_stored_once():
    checkpoint = open_checkpoint(GOLDEN / "tied.gguf")
    one_row = 160 * 34 // 32
    whole = sum(memory.stored_bytes(t) for t in bench._weights(checkpoint))
    routed = sum(t.data.nbytes for name, t in checkpoint.tensors.items() if ".mlp.experts." in name)
    assert bench.weight_bytes_per_token(checkpoint) == whole + one_row - routed // 3  # 2 of 3 experts


def test_run(results):
    prompt, generation = results
    assert (prompt.test, prompt.n_prompt, prompt.n_gen) == ("pp8", 8, 0)
    assert (generation.test, generation.n_prompt, generation.n_gen) == ("tg4", 0, 4)
    assert prompt.gb_per_s is None and prompt.bandwidth_share is None
    for result in results:
        assert result.model_filename == str(MODEL) and result.isa == pyengine.ops.active_isa()
        assert result.model_type == "qwen35moe 339K.A218K Q8_0"
        assert len(result.samples_ns) == len(result.samples_ts) == 2
        assert result.avg_ns == round(np.mean(result.samples_ns))
        assert result.avg_ts == pytest.approx(np.mean(result.samples_ts))
        assert result.stddev_ts == pytest.approx(np.std(result.samples_ts, ddof=1))
        tokens = result.n_prompt + result.n_gen
        assert result.samples_ts[0] == pytest.approx(1e9 * tokens / result.samples_ns[0])
    cost = bench.weight_bytes_per_token(open_checkpoint(MODEL))
    assert generation.gb_per_s == pytest.approx(cost * generation.avg_ts / 1e9)
    assert generation.bandwidth_share == pytest.approx(
        generation.gb_per_s / generation.read_bandwidth_gb_per_s)
    assert prompt.gmac_per_s == pytest.approx((8 * LAYERS + HEAD) / 8 * prompt.avg_ts / 1e9)
    assert generation.gmac_per_s == pytest.approx((LAYERS + HEAD) * generation.avg_ts / 1e9)


def test_model_size_is_that_of_the_weights(results):
    assert results[0].model_n_params == 338_968
    assert 0 < MODEL.stat().st_size - results[0].model_size < 20_000  # the header


def test_lists_and_zeros():
    results = bench.run(MODEL, n_prompt=[2, 3], n_gen=[0], threads=[1, 2], repetitions=1, depths=[0, 5])
    assert [(r.n_threads, r.test) for r in results] == [
        (threads, test) for threads in (1, 2) for test in ("pp2", "pp3", "pp2 @ d5", "pp3 @ d5")]
    assert results[0].stddev_ns == 0 and results[0].type_k == "f32"
    half = bench.run(MODEL, n_prompt=[2], n_gen=[0], repetitions=1, arithmetic="locked-kv16")
    assert half[0].type_k == half[0].type_v == "f16"


@pytest.mark.parametrize("arguments, message", [
    ({"n_prompt": [0], "n_gen": [0]}, "want a prompt or a generation"),
    ({"n_prompt": [-1]}, "prompt: want lengths of at least 0, got -1"),
    ({"depths": [-1]}, "depth: want"),
    ({"repetitions": 0}, "repetitions: want at least 1"),
    ({"chunk": 0}, "chunk: want at least 1"),
    ({"threads": [0]}, "threads: want 1 to 1024"),
    ({"arithmetic": "float64"}, "arithmetic: want locked or locked-kv16, got 'float64'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.run(MODEL, **arguments)


def test_outputs(results):
    values = json.loads(bench.as_json(results))
    assert [set(value) for value in values] == [LLAMA_BENCH | OURS] * 2
    rows = list(csv.DictReader(io.StringIO(bench.as_csv(results))))
    assert [row["n_prompt"] for row in rows] == ["8", "0"] and rows[0]["gb_per_s"] == ""
    assert float(rows[1]["avg_ts"]) == values[1]["avg_ts"]
    lines = bench.as_markdown(results).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert " pp8 |" in lines[2] and f"{results[1].avg_ts:.2f} ± {results[1].stddev_ts:.2f}" in lines[3]


def test_read_bandwidth():
    assert 0 < bench.read_bandwidth(2, passes=1) < 1e5


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench.plot_depths(4096) == [0, 512, 1024, 2048, 4096] and bench.plot_depths(600) == [0, 512]
    results = bench.run(MODEL, n_prompt=[2], n_gen=[2], threads=[1], repetitions=1, depths=[0, 8])
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        bench.plot(results, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match="want a file name that ends in .png or .svg"):
        bench.check_plot(tmp_path / "a.pdf")


def test_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="want matplotlib"):
        bench.check_plot("a.png")


# ---- tools -------------------------------------------------------------------------------------


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))


SMALL = Config(
    vocab_size=300, hidden_size=64, layer_types=(LINEAR, LINEAR, LINEAR, FULL), rms_norm_eps=1e-6,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64, rotary_dim=16, rope_theta=1e7,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
    linear_conv_kernel_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, mrope_section=(3, 3, 2))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_make_slice(tools, tmp_path, kind):
    import make_slice

    make_slice.write_slice(tmp_path / "a.gguf", SMALL, kind)
    model = pyengine.load(tmp_path / "a.gguf")
    assert model.config.layer_types == SMALL.layer_types and model.config.rotary_dim == 16
    assert model.checkpoint.tensors["model.layers.0.mlp.experts.up_proj"].type == kind
    logits = model.forward(np.arange(20))
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3
    make_slice.write_slice(tmp_path / "b.gguf", SMALL, kind)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_slice_has_the_sizes_of_the_model(tools):
    from make_slice import file_bytes, slice_config
    from pyengine.checkpoint import model_specs

    specs = model_specs(slice_config())
    assert sum(file_bytes(spec, "Q8_0") for spec in specs) == 7_378_436_608
    whole = model_specs(slice_config(layers=40, vocabulary=248_320))
    assert sum(int(np.prod(spec.shape)) for spec in whole) == 34_660_610_688


def test_bench_quantize(tmp_path):
    command = [sys.executable, TOOLS / "bench_quantize.py", MODEL, "--rounds", "1", "--scratch", tmp_path]
    said = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True,
                                     cwd=tmp_path).stdout)
    assert said["read"] == MODEL.stat().st_size and said["written"] > said["read"] / 2
    assert said["ratio"] == said["copy_seconds"][0] / said["quantize_seconds"][0]
    assert 0 < said["peak_RssAnon"] < said["peak_VmHWM"] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quantizing_takes_little_memory_whatever_the_size(tools, tmp_path):
    """One layer of the real sizes, 0.86 GB, of which the experts are 0.8: to both twins."""
    import bench_quantize
    import make_slice

    source = tmp_path / "layer.gguf"
    make_slice.write_slice(source, make_slice.slice_config(layers=1, vocabulary=512))
    assert source.stat().st_size > 800e6
    _, most = bench_quantize.quantize(source, tmp_path, [])
    assert most["RssAnon"] < 1 << 29


def peers(*arguments, **options):
    command = [sys.executable, str(TOOLS / "bench_peers.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is here")
def test_peers_wants_llama_cpp():
    done = peers(MODEL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "llama-cpp-python" in done.stderr


def test_a_worker_answers(tools):
    commands = [{"threads": 1, "prompt": 4, "gen": 0}, {"threads": 1, "prompt": 0, "gen": 2}]
    done = peers("--worker", "pyengine", "--context", "64", MODEL,
                 input="".join(json.dumps(command) + "\n" for command in commands))
    hello, *answers = map(json.loads, done.stdout.splitlines())
    assert hello["vocab_size"] == 288 and len(answers) == 2
    assert all(answer["seconds"] > 0 and len(answer["logits"]) == 288 for answer in answers)


@pytest.mark.slow
def test_peers():
    pytest.importorskip("llama_cpp")
    done = peers(MODEL, "--prompt", 8, "--gen", 4, "--rounds", 1, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["test"] for row in rows] == ["tg4", "pp8"]
    assert all(row["ratio"] > 0 and row["logits_correlation"] > 0.99 for row in rows)


def test_two_checkpoints():
    trained = MODEL.parents[1] / "trained" / "bf16.gguf"
    from pyengine.models import CHECKPOINT

    done = peers(CHECKPOINT, "--other", trained, "--prompt", 8, "--gen", 0, "--rounds", 1, "--threads", 1)
    assert done.returncode == 0 and "| bf16.gguf t/s |" in done.stdout, done.stderr
    done = peers(CHECKPOINT, "--other", MODEL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(MODEL) in done.stderr


def test_profile_ops(tools, capsys):
    import profile_ops

    model, before = pyengine.load(MODEL, threads=1), ops.lib
    seconds, parts = profile_ops.profile(model, [1], [[2, 3], [4]])
    assert ops.lib is before
    assert {"pe_experts", "pe_matmul_each", "pe_delta_rule"} <= set(parts)
    assert 0 < sum(parts.values()) < seconds
    profile_ops.report("all", seconds, parts, 2)
    assert model.replays and profile_ops.replayed(model, [1], [[2], [3], [4], [5]]) > 0
    assert "(Python)" in capsys.readouterr().out
