"""Mixed checkpoints: which parameter has how many bits, what is refused, sizes, loading, verification."""

import fnmatch
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.checkpoint import provenance
from pyengine.checkpoint.open import open_checkpoint
from pyengine.cli import main
from pyengine.errors import InputError
from pyengine.files.safetensors import SafetensorsDirectory
from pyengine.quantizer import sizes
from pyengine.quantizer.mix import ACTIVE, Mix
from pyengine.quantizer.plan import plan
from pyengine.quantizer.quantize import plans_of, quantize
from pyengine.quantizer.verify_files import check_files

MODEL = GOLDEN / "pattern31.gguf"
# Layers that differ, an expert's matrices that differ, and q_proj, k_proj that differ.
MIX = "*.layers.0.*=int8,*.experts.down_proj=int4,*.k_proj=int4,*.layers.[13].*=int8"
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: directory}: int8, int4, mixed, and "active", the mix that is the default."""
    root = tmp_path_factory.mktemp("mixed")
    quantize(MODEL, root / "int8", root / "int4", root / "mixed", mix=MIX)
    quantize(MODEL, mixed=root / "active")
    quantize(GOLDEN / "next.gguf", mixed=root / "next", mix=MIX)
    return {kind: root / kind for kind in ("int8", "int4", "mixed", "active", "next")}


def kinds_of(directory):
    return {name: tensor.type for name, tensor in open_checkpoint(directory).tensors.items()}


# ---- which bits ------------------------------------------------------------------------------


CHECKPOINT = open_checkpoint(MODEL)
QUANTIZED = [p.entries[0].name[:-3] for p in plan(CHECKPOINT, 8) if p.bits]

PARTS = ("*", "model", "layers", "[01]", "[!2]", "0", "mlp", "experts", "down_proj", "?_proj", "weight")
PATTERNS = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join), st.sampled_from(QUANTIZED)
)


@given(st.dictionaries(PATTERNS, st.sampled_from(["int8", "int4"]), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_the_first_pattern_that_matches_decides(rules):
    """And the rest is INT4; a list is refused exactly where one of its patterns decides nothing."""
    want, deciders = {}, set()
    for name in QUANTIZED:
        matching = [
            pattern
            for pattern in rules
            if any(re.match(fnmatch.translate(pattern), n) for n in {name, re.sub(r"\.weight$", "", name)})
        ]
        want[name] = {"int8": 8, "int4": 4}[rules[matching[0]]] if matching else 4
        deciders |= set(matching[:1])
    mix = Mix.parse(",".join(f"{pattern}={kind}" for pattern, kind in rules.items()))
    if deciders != set(rules):
        with pytest.raises(InputError, match="^mix: "):
            plan(CHECKPOINT, mix)
        return
    assert {p.entries[0].name[:-3]: p.bits for p in plan(CHECKPOINT, mix) if p.bits} == want
    assert Mix.parse(str(mix)) == mix


def test_the_default_is_int8_for_what_is_always_active(made):
    kinds = kinds_of(made["active"])
    for name, kind in kinds.items():
        if kind in ("INT8", "INT4"):
            assert kind == ("INT4" if ".mlp.experts." in name else "INT8"), name
    assert kinds["model.layers.0.mlp.gate.weight"] == "INT8"
    assert json.loads((made["active"] / "config.json").read_text())["pyengine_mix"] == [
        ["*.mlp.experts.*", 4],
        ["*", 8],
    ]


def test_a_parameter_has_the_bytes_that_it_has_in_the_twin(made):
    tensors = {k: SafetensorsDirectory.open(made[k]).tensors for k in ("int8", "int4", "mixed")}
    kinds = {"INT8": 0, "INT4": 0}
    for name, view in tensors["mixed"].items():
        twin = "int4" if name in tensors["int4"] else "int8"
        assert np.array_equal(view.data, tensors[twin][name].data), name
        kinds["INT4" if name.endswith("4") else "INT8"] += 1
    assert min(kinds.values()) > 10


@pytest.mark.parametrize(
    "mix, message",
    [
        ("", "want PATTERN=int8 or PATTERN=int4 between commas, got ''"),
        ("*", "want PATTERN=int8 or PATTERN=int4 between commas, got '*'"),
        ("=int8", "got '=int8'"),
        ("*=int2", r"got '\*=int2'"),
        ("*=int8,", "got ''"),
        ("*=int8,*=int4", r"'\*': want each pattern once, got it twice"),
        ("*=int8,*.q_proj=int4", r"'\*.q_proj': want parameters that no earlier pattern matches, got none"),
        (
            "lm_head*=int8",
            "want parameters that are quantized, got only ones that stay floats: lm_head.weight",
        ),
        ("*.self_atn.q_proj=int8", "got one of none; nearest name: model.layers.3.self_attn.q_proj.weight"),
        ("*.experts.gate_proj=int8", "nearest name: model.layers.0.mlp.experts.gate_up_proj"),
        ("nothing=int8", "their names end in linear_attn.in_proj_qkv, "),
    ],
)
def test_a_bad_list_is_refused_in_one_line(tmp_path, capsys, mix, message):
    assert main(["quantize", str(MODEL), "--mixed", str(tmp_path / "out"), "--mix", mix]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("pyengine: mix: ") and err.count("\n") == 1 and re.search(message, err), err
    assert not out and not list(tmp_path.iterdir())


def test_options_that_do_not_belong_together(tmp_path, capsys, made):
    assert main(["quantize", str(MODEL), "--int8", str(tmp_path / "out"), "--mix", "*=int8"]) == 2
    assert "--mix: want --mixed DIR" in capsys.readouterr().err
    packed = ["quantize", str(made["mixed"]), "--export", "compressed-tensors"]
    assert main([*packed, "--int8", str(tmp_path / "out")]) == 2
    assert "want --mixed DIR for a checkpoint of this kind" in capsys.readouterr().err
    assert main([*packed, "--mixed", str(tmp_path / "out"), "--mix", "*=int8"]) == 2
    assert "--mix: want it without --export" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- sizes -----------------------------------------------------------------------------------


def test_sizes_are_those_of_the_file(made):
    plans = plans_of(MODEL, made["int8"], made["int4"], made["mixed"], mix=MIX)
    for kind, parameters in plans.items():
        found = sizes.sizes(parameters)
        *parts, total = found
        assert total.purpose == "total" and total.nbytes == sum(part.nbytes for part in parts)
        summary = open_checkpoint(made[kind]).summary
        assert (total.nbytes, total.parameters) == (summary.weight_bytes, summary.parameters)
        tensors = SafetensorsDirectory.open(made[kind]).tensors
        (experts,) = [part for part in parts if part.purpose == "routed experts"]
        assert experts.nbytes == sum(t.nbytes for n, t in tensors.items() if ".mlp.experts." in n)


def test_sizes_come_before_anything_is_written(tmp_path, capsys):
    command = ["quantize", str(MODEL), "--mixed", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    total = open_checkpoint(MODEL).summary
    assert (
        re.search(rf"^total .* {total.parameters:,} ", shown, re.M) and "routed experts       INT4" in shown
    )
    assert main(command) == 0
    assert capsys.readouterr().out == f"{shown}{tmp_path / 'out'}: written\n"


# ---- loading ---------------------------------------------------------------------------------


def test_its_values_are_the_twins(made):
    mixed, int8, int4 = (open_checkpoint(made[kind]) for kind in ("mixed", "int8", "int4"))
    for name, tensor in mixed.tensors.items():
        twin = int4 if tensor.type == "INT4" else int8
        assert np.array_equal(tensor.float64(), twin.tensors[name].float64()), name
    assert {"INT8", "INT4"} <= set(kinds_of(made["mixed"]).values())


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["mixed", "active", "next"])
def test_locked_equals_its_pytorch_restatement(made, kind):
    torch = pytest.importorskip("torch")
    import locked_torch

    torch.set_num_threads(1)
    want, _ = locked_torch.forward(locked_torch.Weights.load(made[kind]), IDS)
    got = {}
    pyengine.load(made[kind], threads=2).forward(IDS, record=lambda name, y: got.update({name: y.copy()}))
    assert set(got) == set(want)
    for name, values in want.items():
        assert got[name].tobytes() == values.astype(got[name].dtype).tobytes(), name


def test_locked_is_near_the_reference(made):
    locked, exact = (pyengine.load(made["mixed"], a).forward(IDS) for a in ("locked", "float64"))
    assert np.abs(locked - exact).max() < 0.05 * np.abs(exact).max()


# ---- verification ----------------------------------------------------------------------------


def test_a_mixed_directory_is_verified_with_its_twins_and_source(made):
    for twin in ("int8", "int4", "active"):
        result = check_files(made["mixed"], made[twin], MODEL if twin == "int8" else None)
        assert not result.faults
        assert f"{made[twin]}: the twin of {made['mixed']}: the same source and method" in result.checked
    said = provenance.read(made["mixed"])
    assert said["twin"]["kind"] == "mixed" and "bits" not in said
    assert said["mix"] == [list(rule) for rule in Mix.parse(MIX).rules]
    assert provenance.read(made["active"])["mix"] == [list(rule) for rule in Mix.parse(ACTIVE).rules]


def test_two_of_one_mix_are_no_twins(made, tmp_path):
    quantize(MODEL, mixed=tmp_path / "again", mix=MIX)
    (fault,) = check_files(made["mixed"], tmp_path / "again").faults
    assert "mix: want the other number of bits than" in fault


@pytest.mark.parametrize(
    "mix, message",
    [
        ([["*", 8]], "mix: want 4 bits of model.layers.0.mlp.experts.gate_up_proj_q4, got 8"),
        ([["*.experts.*", 4]], "bits of model.layers.0.linear_attn.in_proj_qkv.weight_i8, got 4"),
    ],
)
def test_a_forged_mix_is_found(made, tmp_path, mix, message):
    shutil.copytree(made["active"], tmp_path / "out")
    forge(tmp_path / "out", mix=mix)
    assert any(message in fault for fault in check_files(tmp_path / "out").faults)


def test_a_mix_that_decides_nothing_is_not_computed_again(made, tmp_path):
    shutil.copytree(made["active"], tmp_path / "out")
    forge(tmp_path / "out", mix=[["none", 8], ["*.mlp.experts.*", 4], ["*", 8]])
    result = check_files(tmp_path / "out", source=MODEL)
    assert f"{tmp_path / 'out'}: its tensors against the source: no such method" in result.not_checked


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mix": "*=int8"}, r"mix: want \[\[pattern, 8 or 4\]\], got '\*=int8'"),
        ({"mix": [["*", 5]]}, "mix: want"),
        ({"mix": [["*", True]]}, "mix: want"),
        ({"mix": [[8, 8]]}, "mix: want"),
        ({"bits": 8}, "bits: want none beside mix, got 8"),
        ({"mix": None}, "mix: want"),
    ],
)
def test_a_provenance_that_cannot_be_read(made, tmp_path, capsys, fields, message):
    shutil.copytree(made["active"], tmp_path / "out")
    forge(tmp_path / "out", **fields)
    assert main(["verify-files", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and err.count("\n") == 1


def forge(directory, **fields):
    """Other fields, and the sha256 that goes with them."""
    path = directory / provenance.FILE_NAME
    document = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(document | {"sha256": provenance.own_digest(document)}))


def test_info_says_the_mix(made, capsys):
    assert main(["info", str(made["mixed"]), "--provenance"]) == 0
    out = capsys.readouterr().out
    assert "mixed bits" in out and "mix          *.k_proj: 4 bits" in out and "twin         mixed of" in out
