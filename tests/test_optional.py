"""The one message about a package that is not installed, and the extras that it names."""

import ast
import re
import sys
from pathlib import Path

import pytest

from pyengine.errors import InputError
from pyengine.optional import DISTRIBUTION, advice, require

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyengine"


def calls_of_require():
    """(file:line, keywords) of every call of `require` in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                plain = [k for k in node.keywords if isinstance(k.value, ast.Constant)]
                yield f"{path.name}:{node.lineno}", {k.arg: k.value.value for k in plain}


def declared():
    """-> (name of the distribution, {extra: names of its packages}) of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    name = re.search(r'^name = "(.+)"', text, re.M)[1]
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[(.*?)\]", section, re.M | re.S)
    return name, {extra: set(re.findall(r'"([\w-]+)', packages)) for extra, packages in extras}


def test_messages_name_what_pyproject_declares():
    name, extras = declared()
    assert name == DISTRIBUTION
    calls = list(calls_of_require())
    assert {keywords["extra"] for _, keywords in calls} == {
        "text",
        "serve",
        "plot",
        "peers",
        "test",
        "distill",
        "train",
        "ray",
        "grammar",
        "lm-eval",
        "merge",
    }
    for where, keywords in calls:
        assert keywords["extra"] in extras, where


def test_no_text_gives_advice_of_its_own():
    for path in PACKAGE.rglob("*.py"):
        for found in re.findall(r"pip install '?([\w-]*)\[", path.read_text()):
            assert found == DISTRIBUTION, path


@pytest.mark.parametrize("module", ["there_is_no_such", "there_is_no_such.part", "json.there_is_no_such"])
def test_a_missing_module(module):
    package = module.partition(".")[0]
    with pytest.raises(InputError) as caught:
        require(module, extra="text", what="chat template")
    assert str(caught.value) == (
        f"chat template: want the package {package}: pip install 'pyengine-lm[text]'"
    )
    with pytest.raises(InputError, match="want the package other-name: "):
        require(module, extra="text", what="chat template", package="other-name")


def test_a_module_that_is_there():
    assert require("json", extra="text", what="x") is sys.modules["json"]
    assert require("os.path", extra="text", what="x") is sys.modules["os.path"]


@pytest.mark.parametrize(
    "body, problem",
    [
        ("import there_is_no_such", "No module named 'there_is_no_such'"),
        ("from json import there_is_none", "cannot import name 'there_is_none'"),
        ("raise RuntimeError('no libc\\nof that age')", r"no libc\nof that age"),
        ("raise OSError('libx.so: cannot open')", "libx.so: cannot open"),
    ],
)
def test_a_module_that_is_broken(tmp_path, monkeypatch, body, problem):
    """Advice to install it again would be wrong: the message says what its import met."""
    (tmp_path / "broken_module.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        require("broken_module", extra="plot", what="plot")
    text = str(caught.value)
    assert text.startswith("plot: want the package broken_module, got one whose import fails: ")
    assert problem in text and "\n" not in text and advice("plot") not in text
