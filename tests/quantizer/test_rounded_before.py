"""A calibrated run that was killed: what its complete files hold is read, and is not rounded again."""

import shutil

import numpy as np
import pytest
from calibrating import calibrate, exaggerate
from paths import GOLDEN

from pyengine.checkpoint.open import open_checkpoint
from pyengine.checkpoint.writer import DigestSink
from pyengine.quantizer import calibrated, weighted
from pyengine.quantizer import quantize as quantizing
from pyengine.quantizer.plan import plan
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.rounded_before import RoundedBefore

pytestmark = pytest.mark.filterwarnings("ignore:calibration. layer:pyengine.errors.PyengineWarning")

EACH = 1  # shard_bytes: every parameter has a file of its own


def tree(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def interrupt(*arguments, **named):
    raise KeyboardInterrupt


class Killed:
    """A run that was killed when all its files were complete; some of them are lost, and it continues."""

    def __init__(self, root, name, scale, monkeypatch, kind="int4"):
        stats = exaggerate(calibrate(name, root / "stats.gguf", 120, 90))  # so that awq folds
        self.root, self.source, self.kind, self.patch = root, GOLDEN / f"{name}.gguf", kind, monkeypatch
        self.how = {"scale": scale, "calibration": stats, "shard_bytes": EACH, "threads": 2}
        self.made = {kind: root / "made"}
        quantize(self.source, **{kind: root / "whole"}, **self.how)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(quantizing, "write_companions", interrupt)
            quantize(self.source, **self.made, **self.how)
        shutil.copytree(root / "made.partial", root / "kept")
        parameters = plan(open_checkpoint(self.source), {"int4": 4, "int8": 8}[kind])
        self.parameters = dict(zip(sorted(path.name for path in (root / "kept").glob("model-*")), parameters))

    def continue_without(self, lost):
        """lost(parameter) -> [(tensor, expert)] that are rounded, the Moments that are made."""
        partial = self.root / "made.partial"
        shutil.rmtree(self.root / "made", ignore_errors=True)
        shutil.copytree(self.root / "kept", partial, dirs_exist_ok=True)
        wanted = []
        for file, parameter in self.parameters.items():
            if lost(parameter.entries[0].name):
                (partial / file).write_bytes((partial / file).read_bytes()[:-1] + b"\xa5")  # a wrong digest
                if parameter.bits:
                    experts = (
                        range(parameter.entries[0].shape[0])
                        if len(parameter.entries[0].shape) > 2
                        else [None]
                    )
                    wanted += [(t.name, e) for t in parameter.sources for e in experts]
        rounded, moments, by_rows = [], [], calibrated.by_rows

        def noted(tensor, expert, *rest):
            rounded.append((tensor.name, expert))
            return by_rows(tensor, expert, *rest)

        class Noted(calibrated.Moments):
            def __init__(self, *arguments):
                moments.append(self)
                super().__init__(*arguments)

        with self.patch.context() as patch:
            patch.setattr(calibrated, "by_rows", noted)
            patch.setattr(calibrated, "Moments", Noted)
            quantize(self.source, **self.made, **self.how)
        assert tree(self.root / "made") == tree(self.root / "whole")
        assert sorted(rounded, key=str) == sorted(wanted, key=str)
        return rounded, moments


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, scale, kind",
    [
        ("next", "gptq", "int4"),
        ("next", "awq", "int4"),
        ("pattern31", "gptq", "int8"),
        ("legacy", "awq", "int8"),
        ("dense", "gptq", "int4"),
    ],
)
def test_only_what_is_lost_is_rounded_again(tmp_path, monkeypatch, name, scale, kind):
    killed = Killed(tmp_path, name, scale, monkeypatch, kind)
    assert killed.continue_without(lambda name: False) == ([], [])
    assert killed.continue_without(lambda name: "norm" in name) == ([], [])
    last = max(
        n for n in range(99) if any(f"layers.{n}." in p.entries[0].name for p in killed.parameters.values())
    )
    rounded, moments = killed.continue_without(lambda name: f"layers.{last}." in name)
    assert rounded and moments
    rounded, moments = killed.continue_without(lambda name: ".down_proj" in name)
    assert len(moments) == len(rounded)  # those of the inputs are not made
    for part in (
        "gate_up_proj",
        "o_proj",
        "out_proj",
        "q_proj",
        "in_proj",
        "layers.0.mlp",
        "shared_expert.up",
    ):
        killed.continue_without(lambda name, part=part: part in name)
    everything, _ = killed.continue_without(lambda name: True)
    assert len(everything) > len(rounded)


@pytest.mark.slow
def test_what_weighs_columns_alone_rounds_only_what_is_lost(tmp_path, monkeypatch):
    killed = Killed(tmp_path, "next", "weighted", monkeypatch)
    names, by_rows = [], weighted.by_rows

    def noted(tensor, *rest):
        names.append(tensor.name)
        return by_rows(tensor, *rest)

    monkeypatch.setattr(weighted, "by_rows", noted)
    lost = next(file for file, p in killed.parameters.items() if p.bits)
    (tmp_path / "made.partial" / lost).unlink()
    quantize(killed.source, **killed.made, **killed.how)
    assert tree(tmp_path / "made") == tree(tmp_path / "whole")
    assert names == [killed.parameters[lost].sources[0].name]


class Held:
    """A sink that has the tensors of a directory."""

    def __init__(self, directory):
        self.tensors = open_checkpoint(directory).file.tensors

    def read(self, name):
        return self.tensors[name].data


@pytest.mark.parametrize("bits", [8, 4])
def test_it_is_the_matrix_that_a_reader_has(tmp_path, bits):
    """Codes times scales are the reader's values, of a matrix, of gate and up that lie in one, of down."""
    source = open_checkpoint(GOLDEN / "next.gguf")
    quantize(source.path, **{f"int{bits}": tmp_path / "made"})
    parameters, made = plan(source, bits), open_checkpoint(tmp_path / "made")
    before = RoundedBefore(parameters, Held(tmp_path / "made"))
    for name in (tensor.name for p in parameters if p.bits for tensor in p.sources):
        expert = 1 if ".experts." in name else None
        codes, scales = before(name, expert)
        assert codes.dtype == np.int8 and scales.dtype == np.float16 and scales.flags.c_contiguous
        values = codes * np.repeat(scales.astype(np.float32), 128, axis=1)[:, : codes.shape[1]]
        wanted = made.tensors[name].rows_float32(expert, 0, len(codes))
        assert len(codes) == made.tensors[name].shape[-2] and values.tobytes() == wanted.tobytes()
    assert RoundedBefore(parameters, DigestSink())(name, expert) is None
