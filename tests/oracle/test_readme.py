"""The answers that the oracle's README shows are those that a user gets."""

import json
from pathlib import Path

import numpy as np
from partial import part
from paths import GOLDEN
from peer import Peer

from pyengine.cli import main
from pyengine.oracle import trace as trace_module
from pyengine.oracle.trace import Trace

README = Path(trace_module.__file__).with_name("README.md")
MODEL = GOLDEN / "pattern31.gguf"


def shown(number):
    """The lines of the README's n-th block of output, without those of values."""
    blocks = README.read_text(encoding="utf-8").split("\n```\n")
    outputs = [block for block in blocks if block.startswith("different: ")]
    return [line for line in outputs[number].splitlines() if "worst at" not in line]


def test_the_answers(tmp_path, capsys):
    ids = np.random.default_rng(1729).integers(0, 288, 24)
    whole = Peer(MODEL, ["rope_pairs"]).run(ids)
    for number, trace in enumerate([part(whole, "logits"), whole]):
        trace.save(tmp_path / "mine.safetensors")
        assert main(["verify", str(MODEL), str(tmp_path / "mine.safetensors"), "--budget", "float32"]) == 1
        lines = capsys.readouterr().out.splitlines()
        wanted = shown(number)
        assert len(wanted) >= 3 and [line for line in lines if line in wanted] == wanted


def test_a_trace_written_without_this_package(tmp_path):
    """As the README's example does, with the safetensors library's layout by hand."""
    logits, ids = np.ones((3, 5), np.float32), np.array([1, 2, 3])
    tensors, entries, data = {"input_ids": ids, "lm_head": logits}, {}, b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": {"i": "I64", "f": "F32"}[array.dtype.kind],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    metadata = {"format": "pyengine-trace-1", "order": json.dumps(["lm_head"]), "arithmetic": "float32"}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert np.array_equal(Trace.load(tmp_path / "t").tensors["lm_head"], logits)
