"""The schema of a trace's header takes the traces that are written, and refuses those that are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from paths import GOLDEN
from peer import Peer

import pyengine
from pyengine.errors import FileFormatError
from pyengine.oracle import trace as trace_module
from pyengine.oracle.trace import LLAMA_CPP, Trace, record_trace

SCHEMA = json.loads(Path(trace_module.__file__).with_name("trace.schema.json").read_text())
README = Path(trace_module.__file__).with_name("README.md")
TYPES = {"object": dict, "array": list, "string": str, "integer": int}
NOTES = {"$schema", "$defs", "title", "description", "contentMediaType"}


def faults(value, schema, at="header"):
    """Where a value breaks a schema of the few keywords that ours uses; any other is an error."""
    schema = dict(schema)
    if "$ref" in schema:
        schema = dict(SCHEMA["$defs"][schema.pop("$ref").removeprefix("#/$defs/")])
    known = {key: schema.pop(key) for key in list(schema) if key in CHECKS or key in NOTES}
    assert not schema, f"a keyword that the test does not know: {schema}"
    if "type" in known and not (isinstance(value, TYPES[known["type"]]) and not isinstance(value, bool)):
        return [f"{at}: want {known['type']}"]
    return [
        fault for key, rule in known.items() if key in CHECKS for fault in CHECKS[key](value, rule, known, at)
    ]


def _of_properties(value, rule, schema, at):
    for name, item in value.items():
        patterns = schema.get("patternProperties", {})
        other = next(
            (patterns[p] for p in patterns if re.search(p, name)), schema.get("additionalProperties")
        )
        inner = rule.get(name, other)
        if inner is not None:
            yield from faults(item, inner, f"{at}.{name}")


def _of_text(value, rule, schema, at):
    try:
        inner = json.loads(value)
    except ValueError:
        return [f"{at}: want JSON"]
    return faults(inner, rule, at)


CHECKS = {
    "type": lambda value, rule, schema, at: [],
    "additionalProperties": lambda value, rule, schema, at: [],
    "patternProperties": lambda value, rule, schema, at: [],
    "properties": _of_properties,
    "contentSchema": _of_text,
    "required": lambda value, rule, schema, at: [f"{at}.{name}" for name in rule if name not in value],
    "const": lambda value, rule, schema, at: [] if value == rule else [at],
    "enum": lambda value, rule, schema, at: [] if value in rule else [at],
    "minItems": lambda value, rule, schema, at: [] if len(value) >= rule else [at],
    "maxItems": lambda value, rule, schema, at: [] if len(value) <= rule else [at],
    "minLength": lambda value, rule, schema, at: [] if len(value) >= rule else [at],
    "minimum": lambda value, rule, schema, at: [] if value >= rule else [at],
    "uniqueItems": lambda value, rule, schema, at: [] if len(set(value)) == len(value) else [at],
    "items": lambda value, rule, schema, at: [f for item in value for f in faults(item, rule, at)],
}


def header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


IDS = [3, 1, 4]


@pytest.fixture(scope="module")
def model():
    return pyengine.load(GOLDEN / "pattern31.gguf", "float64")


@pytest.mark.parametrize("kind", ["reference", "peer", "float16", "llama.cpp", "last row"])
def test_a_trace_that_is_written_fits(tmp_path, model, kind):
    trace = record_trace(model, IDS)
    if kind == "peer":
        trace = Peer(GOLDEN / "pattern31.gguf").run(np.array(IDS))
    elif kind == "float16":
        half = {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in trace.tensors.items()}
        trace = Trace(trace.ids, half, "mine")
    elif kind == "llama.cpp":
        trace = Trace(trace.ids, {"l_out-0": trace.tensors["model.layers.0"]}, "llama.cpp", LLAMA_CPP)
    elif kind == "last row":
        trace.tensors["lm_head"] = trace.tensors["lm_head"][-1:]
    trace.save(tmp_path / "t")
    assert faults(header(tmp_path / "t"), SCHEMA) == []
    Trace.load(tmp_path / "t")


def _metadata(**changes):
    def change(header):
        for key, value in changes.items():
            header["__metadata__"].pop(key, None)
            if value is not None:
                header["__metadata__"][key] = value

    return change


def _tensor(name, **changes):
    return lambda header: header[name].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        _metadata(format="other"),
        _metadata(format=None),
        _metadata(order=None),
        _metadata(order="["),
        _metadata(order="{}"),
        _metadata(order='["lm_head", "lm_head"]'),
        _metadata(order="[1]"),
        _metadata(names="mine"),
        _tensor("input_ids", dtype="F32"),
        _tensor("input_ids", shape=[1, 3]),
        _tensor("lm_head", dtype="I8"),
        lambda header: header.pop("input_ids"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path, model, change):
    trace = record_trace(model, IDS)
    Trace(trace.ids, {"lm_head": trace.tensors["lm_head"]}).save(tmp_path / "t")
    broken = header(tmp_path / "t")
    change(broken)
    assert faults(broken, SCHEMA)
    data = (tmp_path / "t").read_bytes()
    text = json.dumps(broken).encode()
    rest = data[8 + int.from_bytes(data[:8], "little") :]
    (tmp_path / "t").write_bytes(len(text).to_bytes(8, "little") + text + rest)
    with pytest.raises(FileFormatError):
        Trace.load(tmp_path / "t")


def test_the_readme_lists_every_tensor(model):
    """Of a layer by its parts, as the docstring of trace.py does."""
    text = README.read_text() + trace_module.__doc__
    for name in record_trace(model, IDS).tensors:
        part = re.sub(r"^model\.layers\.\d+\.?", "", name)
        assert part.rpartition(".")[2] in text


def test_the_options_of_the_readme_exist():
    from pyengine.cli import _parser

    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    options = {option for action in commands["verify"]._actions for option in action.option_strings}
    for line in README.read_text().splitlines():
        if "pyengine verify " in line:
            assert set(re.findall(r"(?<= )--[a-z-]+", line)) <= options, line
