"""The contributing page and the README send a reader to places that exist."""

import re
import runpy

import pytest
from paths import TESTS

ROOT = TESTS.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "tools").rglob("*.md")),
    *sorted((ROOT / "pyengine").rglob("README.md")),
    *sorted(TESTS.rglob("README.md")),
]


SOURCES = {
    path.name for room in ("pyengine", "csrc", "tests", "tools") for path in (ROOT / room).rglob("*.py")
}


def questions() -> list[tuple[str, str]]:
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    return re.findall(r"^\| (Where .*\?) \| `(.*)` \|$", page, re.MULTILINE)


def test_ten_questions_have_ten_paths():
    assert len(questions()) == len(set(questions())) == 10


@pytest.mark.parametrize("question, path", questions())
def test_the_path_exists(question, path):
    assert (ROOT / path).exists(), question


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link
    named = re.findall(r"(?<![\w/.])((?:pyengine|csrc|tests|tools|\.ci|\.github)/[\w./-]*[\w/])", text)
    for path in named:
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([a-z0-9_]+\.py)`", text):
        assert name in SOURCES, name


def test_what_the_project_file_names_exists():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for package, patterns in tools["setuptools"]["package-data"].items():
        folder = ROOT / "pyengine" if package == "*" else ROOT / package.replace(".", "/")
        for pattern in patterns:
            assert list(folder.rglob(pattern)), f"{package}: {pattern}"
    pytest_options = tools["pytest"]["ini_options"]
    for folder in pytest_options["testpaths"] + pytest_options["pythonpath"]:
        assert (ROOT / folder).is_dir(), folder
    loose = [name for override in tools["mypy"]["overrides"] for name in override["module"]]
    for name in loose:
        if name.startswith("pyengine.") and name != "pyengine._core":  # which is built
            path = ROOT / name.removesuffix(".*").replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1100


def test_the_readme_shows_the_floors():
    """README's table of floors names each room once, as tests/test_architecture.py has them."""
    floors = runpy.run_path(str(TESTS / "test_architecture.py"))["FLOORS"]
    table = (ROOT / "README.md").read_text().split("| floor |")[1].split("\n\n")[0]
    named = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(\w+(?:\.py|/))`", table)}
    private = {"_core", "_version", "__main__", "__init__", "hf", "tokenizer"}
    assert named - {"csrc", "pyengine"} == set().union(*floors) - private
