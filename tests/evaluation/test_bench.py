"""bench, and the tools around it: fields, what a token costs by hand, the three outputs, the plot."""

import csv
import functools
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from paths import GOLDEN, TESTS, TOOLS
from pyengine._core import lib
from small_slice import SMALL

import pyengine
from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.summary import multiply_adds
from pyengine.core.threads import active_isa
from pyengine.errors import InputError
from pyengine.evaluation import bench, bench_report

MODEL = GOLDEN / "pattern31.gguf"

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
LLAMA_BENCH = set(
    "model_filename model_type model_size model_n_params n_batch n_threads n_prompt n_gen "
    "n_depth type_k type_v test_time avg_ns stddev_ns avg_ts stddev_ts samples_ns samples_ts".split()
)
OURS = {"fill", "state_size", "isa", "gb_per_s", "gmac_per_s", "read_bandwidth_gb_per_s", "bandwidth_share"}
OURS |= {"memory", "expert_hit_rate", "missed_bytes_per_token", "read_bytes_per_token", "waiting_share"}


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
        (quantised + one_row) * 34 // 32 + (4 * ROUTERS + VECTORS) * 4
    )
    assert multiply_adds(checkpoint, 1, 1) == LAYERS + HEAD
    assert multiply_adds(checkpoint, 512, 1) == 512 * LAYERS + HEAD


def test_a_tied_head_is_read_whole_but_stored_once():
    checkpoint = open_checkpoint(GOLDEN / "tied.gguf")
    one_row = 160 * 34 // 32
    whole = checkpoint.summary.weight_bytes
    routed = sum(t.data.nbytes for name, t in checkpoint.tensors.items() if ".mlp.experts." in name)
    assert bench.weight_bytes_per_token(checkpoint) == whole + one_row - routed // 3  # 2 of 3 experts


def test_run(results):
    prompt, generation = results
    assert (prompt.test, prompt.n_prompt, prompt.n_gen) == ("pp8", 8, 0)
    assert (generation.test, generation.n_prompt, generation.n_gen) == ("tg4", 0, 4)
    assert prompt.gb_per_s is None and prompt.bandwidth_share is None
    for result in results:
        assert result.model_filename == str(MODEL) and result.isa == active_isa()
        assert result.model_type == "qwen35moe 339K.A218K Q8_0"
        assert len(result.samples_ns) == len(result.samples_ts) == 2
        assert result.avg_ns == round(np.mean(result.samples_ns))
        assert result.avg_ts == pytest.approx(np.mean(result.samples_ts))
        assert result.stddev_ts == pytest.approx(np.std(result.samples_ts, ddof=1))
        tokens = result.n_prompt + result.n_gen
        assert result.samples_ts[0] == pytest.approx(1e9 * tokens / result.samples_ns[0])
    cost = bench.weight_bytes_per_token(open_checkpoint(MODEL))
    cost += 2 * 48 * 4 * (1 + 2 + 3 + 4) / 4  # keys and values of one head, one layer
    assert generation.gb_per_s == pytest.approx(cost * generation.avg_ts / 1e9)
    assert generation.bandwidth_share == pytest.approx(
        generation.gb_per_s / generation.read_bandwidth_gb_per_s
    )
    assert prompt.gmac_per_s == pytest.approx((8 * LAYERS + HEAD) / 8 * prompt.avg_ts / 1e9)
    assert generation.gmac_per_s == pytest.approx((LAYERS + HEAD) * generation.avg_ts / 1e9)


def test_model_size_is_that_of_the_weights(results):
    assert results[0].model_n_params == 338_968
    assert 0 < MODEL.stat().st_size - results[0].model_size < 20_000  # the header


def test_lists_and_zeros():
    results = bench.run(MODEL, n_prompt=[2, 3], n_gen=[0], threads=[1, 2], repetitions=1, depths=[0, 5])
    assert [(r.n_threads, r.test) for r in results] == [
        (threads, test) for threads in (1, 2) for test in ("pp2", "pp3", "pp2 @ d5", "pp3 @ d5")
    ]
    assert results[0].stddev_ns == 0 and results[0].type_k == "f32"
    half = bench.run(MODEL, n_prompt=[2], n_gen=[0], repetitions=1, arithmetic="locked-kv16")
    assert half[0].type_k == half[0].type_v == "f16"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_prompt": [0], "n_gen": [0]}, "want a prompt or a generation"),
        ({"n_prompt": [-1]}, "prompt: want lengths of at least 0, got -1"),
        ({"depths": [-1]}, "depth: want"),
        ({"repetitions": 0}, "repetitions: want at least 1"),
        ({"fill": "guessed"}, "fill: want repeated or computed, got 'guessed'"),
        ({"chunk": 0}, "chunk: want at least 1"),
        ({"threads": [0]}, "threads: want 1 to 1024"),
        ({"arithmetic": "float64"}, "arithmetic: want locked or locked-kv16, got 'float64'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        bench.run(MODEL, **arguments)


def test_a_depth_is_computed_or_repeated(monkeypatch):
    monkeypatch.setattr(bench, "REPEATED", 16)
    model = pyengine.load(MODEL, threads=1)
    computed, repeated = (bench.state_at(model, 40, fill) for fill in bench.FILLS[::-1])
    assert computed.position == repeated.position == 40 and computed.nbytes == repeated.nbytes
    cache, again = computed.layers[3], repeated.layers[3]
    for name in ("keys", "values"):
        rows, repeats = getattr(cache, name), getattr(again, name)
        assert np.array_equal(repeats, np.concatenate([rows[:16], rows[:16], rows[:8]]))
    for fill in bench.FILLS:
        (result,) = bench.run(MODEL, [], [2], [1], 1, depths=[40], fill=fill)
        assert (result.fill, result.n_depth, result.test) == (fill, 40, "tg2 @ d40")
        assert result.state_size == computed.nbytes
    assert bench.state_at(model, 0).position == 0


def test_outputs(results):
    values = json.loads(bench_report.as_json(results))
    assert [set(value) for value in values] == [LLAMA_BENCH | OURS] * 2
    rows = list(csv.DictReader(io.StringIO(bench_report.as_csv(results))))
    assert [row["n_prompt"] for row in rows] == ["8", "0"] and rows[0]["gb_per_s"] == ""
    assert float(rows[1]["avg_ts"]) == values[1]["avg_ts"]
    lines = bench_report.as_markdown(results).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert " pp8 |" in lines[2] and f"{results[1].avg_ts:.2f} ± {results[1].stddev_ts:.2f}" in lines[3]


def test_read_bandwidth():
    assert 0 < bench.read_bandwidth(2, passes=1) < 1e5


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench_report.plot_depths(4096) == [0, 512, 1024, 2048, 4096] and bench_report.plot_depths(600) == [
        0,
        512,
    ]
    results = bench.run(MODEL, n_prompt=[2], n_gen=[2], threads=[1], repetitions=1, depths=[0, 8])
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        bench_report.plot(results, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(InputError, match="want a file name that ends in .png or .svg"):
        bench_report.check_plot(tmp_path / "a.pdf")


def test_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="want the package matplotlib: "):
        bench_report.check_plot("a.png")


# ---- tools -------------------------------------------------------------------------------------


def test_bench_quantize(tmp_path):
    command = [
        sys.executable,
        TOOLS / "bench" / "bench_quantize.py",
        MODEL,
        "--rounds",
        "1",
        "--scratch",
        tmp_path,
    ]
    said = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, check=True, cwd=tmp_path).stdout
    )
    assert said["read"] == MODEL.stat().st_size and said["written"] > said["read"] / 2
    assert said["ratio"] == said["copy_seconds"][0] / said["quantize_seconds"][0]
    assert 0 < said["peak_RssAnon"] < said["peak_VmHWM"] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quantizing_takes_little_memory_whatever_the_size(tmp_path):
    """One layer of the real sizes, 0.86 GB, of which the experts are 0.8: to both twins."""
    import bench_quantize
    import make_slice

    source = tmp_path / "layer.gguf"
    make_slice.write_slice(source, make_slice.slice_config(layers=1, vocabulary=512))
    assert source.stat().st_size > 800e6
    _, most = bench_quantize.quantize(source, tmp_path, [])
    assert most["RssAnon"] < 1 << 29


def peers(*arguments, **options):
    command = [sys.executable, str(TOOLS / "bench" / "bench_peers.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_peers_wants_a_peer(monkeypatch):
    import bench_peers

    monkeypatch.setattr(bench_peers, "installed_peers", list)
    with pytest.raises(ValueError, match=r"want llama-cpp-python or ik-llama-cpp-python \(pip install "):
        bench_peers.peers_of(None)
    with pytest.raises(ValueError, match="want ik-llama-cpp-python"):
        bench_peers.peers_of(["ik_llama.cpp"])
    monkeypatch.setattr(bench_peers, "installed_peers", lambda: ["ik_llama.cpp"])
    assert bench_peers.peers_of(None) == bench_peers.peers_of(["ik_llama.cpp"]) == ["ik_llama.cpp"]
    done = peers(MODEL, "--peers", "vllm")
    assert (done.returncode, done.stdout) == (2, "") and "got 'vllm'" in done.stderr.splitlines()[-1]


def test_what_others_take(capsys):
    import bench_peers

    with bench_peers.Others() as others:
        pass
    assert others.wall > 0 and (others.seconds is None or others.seconds >= -0.02)  # it counts in ticks
    bench_peers.warn(0.04, 1.0, "now")
    bench_peers.warn(None, 1.0, "now")
    assert capsys.readouterr().err == ""
    bench_peers.warn(1.5, 3.0, "during the run")
    assert "not idle: others took 0.50 cores during the run" in capsys.readouterr().err


def test_a_worker_answers():
    commands = [
        {"threads": 1, "prompt": 4, "gen": 0},
        {"threads": 1, "prompt": 0, "gen": 2},
        {"threads": 1, "prompt": 3, "gen": 0, "depth": 1},
    ]
    done = peers(
        "--worker",
        "pyengine",
        "--context",
        "64",
        MODEL,
        input="".join(json.dumps(command) + "\n" for command in commands),
    )
    hello, *answers = map(json.loads, done.stdout.splitlines())
    assert hello["vocab_size"] == 288 and len(answers) == 3
    assert all(answer["seconds"] > 0 and len(answer["logits"]) == 288 for answer in answers)
    assert answers[0]["logits"] == answers[2]["logits"] != answers[1]["logits"]  # the same four tokens


@pytest.mark.slow
@pytest.mark.parametrize("module", ["llama_cpp", "ik_llama_cpp"])
def test_peers(module, tmp_path):
    """On heads of 128, as the models have: ik_llama.cpp computes narrower ones wrongly in a prompt."""
    pytest.importorskip(module)
    import make_slice
    from engines import PEERS

    name = next(name for name, row in PEERS.items() if row[1] == module)
    make_slice.write_slice(tmp_path / "a.gguf", SMALL, "Q8_0")
    options = ["--prompt", 8, "--gen", 4, "--depth", 5, "--rounds", 1, "--threads", 1, "--json"]
    done = peers(tmp_path / "a.gguf", *options, "--peers", name)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["names"] == ["pyengine", name] and [len(version) > 9 for version in report["versions"]]
    assert [row["test"] for row in report["rows"]] == ["tg4 @ d5", "pp8 @ d5"]
    for row in report["rows"]:
        against = row["against"][name]
        assert against["ratio"] > 0 and against["logits_correlation"] > 0.99


@pytest.mark.slow
def test_depths_in_turn(tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("matplotlib")
    import make_slice

    make_slice.write_slice(tmp_path / "a.gguf", SMALL, "Q8_0")
    tool = [sys.executable, TOOLS / "bench" / "bench_depth.py", tmp_path / "a.gguf"]
    options = "--depth 0,5,9 --peer-depth 5 --prompt 8 --gen 2 --rounds 1 --threads 1".split()
    options += ["--plot", tmp_path / "a.svg"]
    done = subprocess.run([*tool, *options, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["depth"] for row in report["rows"]] == [0, 5, 9]
    assert [list(row["engines"]) for row in report["rows"]] == [["pyengine", "llama.cpp"]] * 2 + [
        ["pyengine"]
    ]
    for row in report["rows"]:
        for one in row["engines"].values():
            assert one["memory"] > 1e6 and one["gen"]["median_ts"] > 0 and one["prompt"]["median_ts"] > 0
    assert report["rows"][2]["bytes"] - report["rows"][0]["bytes"] == 9 * 2 * 128 * 4
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    done = subprocess.run([*tool, *options, "--alone"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "| pyengine pp8 t/s |" in done.stdout and "llama.cpp" not in done.stdout


def test_an_engine_goes_back_to_a_depth():
    import engines

    runner = engines.Pyengine(MODEL, 64)
    for depth in (6, 6, 9):
        runner.at_depth(1, depth)
        assert runner.state.position == depth
        runner.forward(np.arange(3))
        assert runner.state.position == depth + 3


def test_two_checkpoints():
    trained = TESTS / "trained" / "bf16.gguf"
    from pyengine.demo import CHECKPOINT

    done = peers(CHECKPOINT, "--other", trained, "--prompt", 8, "--gen", 0, "--rounds", 1, "--threads", 1)
    assert done.returncode == 0 and "bf16.gguf t/s" in done.stdout, done.stderr
    done = peers(CHECKPOINT, "--other", MODEL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(MODEL) in done.stderr


def test_profile_ops(capsys):
    import profile_ops

    model = pyengine.load(MODEL, threads=1)
    seconds, parts = profile_ops.profile(model, [1], [[2, 3], [4]])
    assert all(part.lib is lib for part in profile_ops.PARTS)
    assert {"pe_experts", "pe_matmul_shared_input", "pe_delta_rule"} <= set(parts)
    assert 0 < sum(parts.values()) < seconds
    profile_ops.report("all", seconds, parts, 2)
    times = profile_ops.in_turn(model, [1], [[2], [3], [4]], rounds=2)
    assert model.replays and set(times) == {True, False} and min(times.values()) > 0
    assert "(Python)" in capsys.readouterr().out


def test_attention_alone(capsys):
    import profile_ops

    model = pyengine.load(MODEL, threads=1)
    found = profile_ops.attention_speeds(model, [(3, 20), (1, 5)], 1)
    assert [(one.tokens, one.depth, one.half) for one in found] == [
        (3, 20, False),
        (3, 20, True),
        (1, 5, False),
        (1, 5, True),
    ]
    assert all(one.macs_per_s > 0 and one.bytes_per_s > 0 for one in found)
    profile_ops.report_attention(model, found)
    assert "2 heads on 1 of 48, 1 threads" in capsys.readouterr().out


def test_matmuls_by_type(tmp_path, capsys):
    import make_slice
    import profile_ops

    make_slice.write_slice(tmp_path / "a.gguf", SMALL, "Q8_0")
    model = pyengine.load(tmp_path / "a.gguf", threads=1)
    found, reading, left_out = profile_ops.speeds(model, 3, 1 << 20, 2, alone=lambda threads: 10.0)
    assert all(part.lib is lib for part in profile_ops.PARTS)
    assert reading == 10.0 and left_out == ["F32"]
    types = make_slice.slice_types(SMALL, "Q8_0")
    stored = sum(make_slice.file_bytes(*item) for item in types.items() if item[1] == "Q8_0")
    assert [(row.kind, row.nbytes) for row in found] == [("Q8_0", stored)]
    assert found[0].bytes_per_s > 0 and found[0].macs_per_s > 0
    profile_ops.report_types(model, 3, found, reading, left_out)
    assert f"{found[0].bytes_per_s / 10e9:.0%} |" in capsys.readouterr().out
    few = profile_ops.matrices_by_type(model.checkpoint, most=1)
    assert [len(matrices) for matrices in few.values()] == [1, 1]
    rows = [matrix.rows for matrix in profile_ops.matrices_by_type(model.checkpoint)["Q8_0"]]
    assert rows.count(4 * 256) >= 12  # each stack of experts as one matrix
