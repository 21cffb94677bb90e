"""quality: the figures against a computation of their own, the three outputs, what is refused."""

import json
import math

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from paths import GOLDEN
from rewrite import rewrite

from pyengine.checkpoint.families import model_specs
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.demo import CHECKPOINT
from pyengine.errors import CheckpointError, InputError
from pyengine.files.gguf import GGUF
from pyengine.quantizer import quality, quality_report
from pyengine.quantizer.quantize import quantize

PLAIN, NEXTN = GOLDEN / "pattern31.gguf", GOLDEN / "nextn.gguf"


@pytest.fixture(params=["pattern31", "odd"])
def source(request, odd_model):
    return odd_model if request.param == "odd" else PLAIN


def by_hand(x, y, group):
    """(relative error, SNR, (row, group) of the worst group, its error) of x, y [rows, cols]."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1])
    error = np.linalg.norm(x - y) / np.linalg.norm(x)
    padding = [(0, 0), (0, -x.shape[1] % group)]
    noise, signal = (
        np.linalg.norm(np.pad(values, padding).reshape(len(x), -1, group), axis=-1) for values in (x - y, x)
    )
    ratios = noise / np.where(signal, signal, 1)
    place = np.unravel_index(ratios.argmax(), ratios.shape)
    return error, -20 * math.log10(error) if error else math.inf, place, ratios[place]


@pytest.mark.parametrize("bits, group", [(8, 128), pytest.param(4, 128, marks=pytest.mark.slow), (4, 32)])
def test_figures_of_a_directory(tmp_path, monkeypatch, source, bits, group):
    monkeypatch.setattr(quality, "COMPARED_VALUES", 1000)  # several blocks of rows, the last of them short
    quantize(source, **{f"int{bits}": tmp_path / "out"}, group_size=group)
    before, after = (open_checkpoint(path).tensors for path in (source, tmp_path / "out"))
    measured = quality.measure(tmp_path / "out", source)
    specs = model_specs(open_checkpoint(source).config)
    assert [f.name for f in measured.tensors] == [spec.name for spec in specs]
    for figures, spec in zip(measured.tensors, specs):
        x, y = before[spec.name].float64(), after[spec.name].float64()
        assert figures.type == after[spec.name].type and figures.values == x.size
        if figures.type != f"INT{bits}":
            error = np.linalg.norm(x - y) / np.linalg.norm(x)
            assert math.isclose(figures.relative_error, error, rel_tol=1e-12)
            continue
        error, snr, (row, place), worst = by_hand(x, y, group)
        assert math.isclose(figures.relative_error, error, rel_tol=1e-12)
        assert math.isclose(figures.snr_db, snr, rel_tol=1e-12)
        got = figures.worst
        if x.ndim == 3:
            row -= (got.expert or 0) * x.shape[1]
        if error:
            assert (got.row, got.group) == (row, place) and (got.expert is None) == (x.ndim == 2)
        assert math.isclose(got.relative_error, worst, rel_tol=1e-12)


def test_a_layer_and_the_whole_are_their_tensors_together(tmp_path, source):
    quantize(source, int4=tmp_path / "out")
    before, after = (open_checkpoint(path).tensors for path in (source, tmp_path / "out"))
    measured = quality.measure(tmp_path / "out", source)
    config = open_checkpoint(source).config
    assert [f.name for f in measured.layers] == [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    for figures in [*measured.layers, measured.quantized, measured.whole]:
        names = [
            spec.name
            for spec in model_specs(config)
            if figures.name == "whole"
            or after[spec.name].type == "INT4"
            and (figures.name == "quantized tensors" or spec.name.startswith(figures.name + "."))
        ]
        x, y = (np.concatenate([tensors[n].float64().ravel() for n in names]) for tensors in (before, after))
        assert figures.values == x.size and x.size
        assert math.isclose(figures.relative_error, np.linalg.norm(x - y) / np.linalg.norm(x), rel_tol=1e-12)
    worst = max(measured.tensors, key=lambda f: f.worst.relative_error)
    assert measured.whole.worst == worst.worst == measured.quantized.worst
    assert measured.quantized.signal < measured.whole.signal


def test_a_forecast_is_what_quantize_then_gives(tmp_path, source):
    forecasts = quality.forecast(source, threads=1)
    assert [f.label for f in forecasts] == ["int8 absmax", "int8 mse", "int4 absmax", "int4 mse"]
    for scale in ("absmax", "mse"):
        quantize(source, tmp_path / f"8{scale}", tmp_path / f"4{scale}", scale=scale)
        for bits in (8, 4):
            measured = quality.measure(tmp_path / f"{bits}{scale}", source)
            (forecast,) = [f for f in forecasts if f.label == f"int{bits} {scale}"]
            assert forecast.tensors == measured.tensors


@pytest.mark.parametrize("source", [CHECKPOINT, *sorted(GOLDEN.glob("*.gguf"))], ids=lambda p: p.stem)
def test_what_a_searched_scale_gains(source, capsys):
    absmax8, mse8, absmax4, mse4 = (f.quantized for f in quality.forecast(source))
    gains = {
        bits: mse.snr_db - absmax.snr_db for bits, absmax, mse in ((8, absmax8, mse8), (4, absmax4, mse4))
    }
    with capsys.disabled():
        print(
            f"\n{source.stem:>12}: INT8 {absmax8.snr_db:.2f} dB, --scale mse +{gains[8]:.3f}; "
            f"INT4 {absmax4.snr_db:.2f} dB, +{gains[4]:.3f}",
            end="",
        )
    assert 0 < gains[8] < gains[4]


def test_equal_values_have_no_noise():
    measured = quality.measure(PLAIN, PLAIN)
    assert measured.whole.relative_error == 0 and measured.whole.snr_db == math.inf
    assert {f.type for f in measured.tensors} == {"Q8_0", "F32"}
    assert json.loads(quality_report.as_json([measured]))[0]["whole"]["snr_db"] is None


def test_zeros_in_the_source():
    assert quality.Figures("x", "", 2, 0.0, 0.0, None).relative_error == 0
    assert quality.Figures("x", "", 2, 0.0, 1.0, None).relative_error == math.inf
    assert quality.Figures("x", "", 2, 0.0, 1.0, None).snr_db == -math.inf


def test_the_types_that_are_written():
    for bits in (8, 4):
        (forecast,) = quality.forecast(PLAIN, [bits], ["absmax"])
        assert {f.type for f in forecast.tensors} == {f"INT{bits}", "BF16", "F32"}


# ---- the command -----------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    quantize(NEXTN, tmp_path / "int8", tmp_path / "int4")
    twins = [str(tmp_path / "int8"), str(tmp_path / "int4")]
    assert main(["quality", *twins, "--source", str(NEXTN), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [m["label"] for m in said] == twins
    measured = [quality.measure(twin, NEXTN) for twin in twins]
    assert said[1]["whole"]["snr_db"] == measured[1].whole.snr_db
    assert said[1]["layers"][1]["worst_group"] == measured[1].layers[1].worst._asdict()
    assert len(said[0]["tensors"]) == len(measured[0].tensors)

    assert main(["quality", *twins, "--source", str(NEXTN)]) == 0
    (whole,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("whole "))
    assert whole.split()[1::2] == [f"{m.whole.snr_db:.2f}" for m in measured]
    assert main(["quality", twins[0], "--source", str(NEXTN)]) == 0
    out = capsys.readouterr().out
    worst = measured[0].whole.worst
    (whole,) = (line for line in out.splitlines() if line.startswith("whole "))
    assert worst.tensor.removeprefix("model.").removesuffix(".weight") + " [" in whole
    assert f"{worst.row}] group {worst.group}" in whole
    assert main(["quality", str(NEXTN), "--int4", "--scale", "mse", "--group-size", "32"]) == 0
    assert "INT4" in capsys.readouterr().out


@pytest.mark.parametrize("form", [quality_report.as_table, quality_report.as_markdown])
@pytest.mark.parametrize("scales", [["absmax"], ["absmax", "mse"]])
def test_the_table_names_every_changed_tensor_and_counts_the_others(form, scales):
    """Whatever the model: a row per tensor that differs, no row without a figure, no long line."""
    for source in (PLAIN, NEXTN, CHECKPOINT):
        forecasts = quality.forecast(source, [4], scales)
        text = form(forecasts)
        rows = [line.strip("|").split() for line in text.splitlines() if line]
        equal = [
            figures[0]
            for figures in zip(*(f.tensors for f in forecasts))
            if not any(f.relative_error for f in figures)
        ]
        for tensor in forecasts[0].tensors:
            named = [row for row in rows if row[0] == quality_report.short_name(tensor.name)]
            assert len(named) == (tensor not in equal)
        counts = [line for line in text.splitlines() if "tensors equal the source" in line]
        assert len(counts) == 1 and f"{len(equal)} tensors equal" in counts[0]
        assert " inf" not in text and max(map(len, text.splitlines())) <= 110


def test_the_table_of_equal_models_and_of_many():
    same = quality.measure(PLAIN, PLAIN)
    lines = quality_report.as_table([same]).splitlines()
    assert len(lines) == 5 and lines[2].split()[:2] == ["whole", "0.000e+00"]
    assert lines[-1].startswith(f"{len(same.tensors)} tensors equal the source in every value: ")
    many = quality_report.as_table([same] * 30)
    assert f"30: {PLAIN}" in many and "30: dB" in many
    part = [quality.measure(PLAIN, PLAIN), *quality.forecast(PLAIN, [8], ["absmax"])]
    assert "equal" in next(line for line in quality_report.as_table(part).splitlines() if "lm_head" in line)


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_the_plot(tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"a.{suffix}"
    assert main(["quality", str(PLAIN), "--int8", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([PLAIN, NEXTN], "want --source SRC"),
        ([PLAIN, "--source", PLAIN, "--int8"], "--int8: want it without --source"),
        ([PLAIN, "--source", PLAIN, "--group-size", "32"], "--group-size: want it without --source"),
        ([PLAIN, "--source", NEXTN], "model.embed_tokens.weight: want (128, 64), as in"),
        ([PLAIN, "--group-size", "33"], "group size: want an even number"),
        ([PLAIN, "--plot", "x.pdf"], "want a file name that ends in .png or .svg"),
        (["nothing"], "want a GGUF file or a checkpoint directory, got no such path"),
    ],
)
def test_one_line_and_exit_2(capsys, arguments, message):
    assert main(["quality", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_a_quantized_directory_without_its_source(tmp_path):
    quantize(PLAIN, tmp_path / "int8")
    with pytest.raises(InputError, match="want floats or a GGUF, got a checkpoint that is quantized"):
        quality.forecast(tmp_path / "int8")


def test_values_that_are_not_finite(tmp_path):
    data = GGUF.open(PLAIN).tensors["blk.1.attn_gate.weight"].data.copy()
    data[5, 34:36] = np.array([0x7E00], np.uint16).view(np.uint8)
    bad = rewrite(PLAIN, tmp_path / "bad.gguf", tensors={"blk.1.attn_gate.weight": (data, T.Q8_0)})
    with pytest.raises(CheckpointError, match="blk.1.attn_gate.weight: row 5, group 0: want finite"):
        quality.forecast(bad)
    for candidate, source in ((bad, PLAIN), (PLAIN, bad)):
        with pytest.raises(CheckpointError, match="layers.1.linear_attn.in_proj_z.weight: want finite"):
            quality.measure(candidate, source)
