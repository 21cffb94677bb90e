"""Data flows one way: files -> checkpoint -> decoder -> generate / verify -> cli."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyengine"

# A module may import modules of its own floor or of a lower one.
FLOORS = [
    {
        "errors",
        "checks",
        "ids",
        "optional",
        "probabilities",
        "progress",
        "seed",
        "tables",
        "_core",
        "_version",
        "hf",
    },
    {"files", "plots"},
    {"checkpoint"},
    {"core"},
    {"decoder"},
    {"reference", "text", "tokenizer"},
    {"load"},
    {"quantizer", "merge", "census", "calibration", "evaluation", "oracle", "distill"},
    {"testing", "server", "demo"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}

ALLOWED = set()


def imports(path):
    """Top-level rooms of pyengine that a module imports."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = ("pyengine", *parts[:-1])[: len(parts) - node.level + 1]
                module = [*base, *(node.module or "").split(".")]
            else:
                module = (node.module or "").split(".")
            if module[0] == "pyengine":
                module = [m for m in module[1:] if m]
                yield from (
                    [module[0]] if module else [a.name if a.name in FLOOR else "__init__" for a in node.names]
                )
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyengine":
                    yield (alias.name.split(".") + ["__init__"])[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in FLOOR, f"{room} has no floor: say in FLOORS where it stands"
    for other in imports(path):
        if (room, other) not in ALLOWED:
            assert FLOOR[other] <= FLOOR[room], f"{path.name} imports {other}, which lies above it"


def test_only_the_cli_prints_or_exits():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "cli" or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called not in ("print", "exit"), f"{path}:{node.lineno}"
