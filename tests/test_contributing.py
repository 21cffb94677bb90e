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


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1100


def test_the_readme_shows_the_floors():
    """README's table of floors names each room once, as tests/test_architecture.py has them."""
    floors = runpy.run_path(str(TESTS / "test_architecture.py"))["FLOORS"]
    table = (ROOT / "README.md").read_text().split("| floor |")[1].split("\n\n")[0]
    named = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(\w+(?:\.py|/))`", table)}
    private = {"_core", "_version", "__main__", "__init__", "hf", "tokenizer"}
    assert named - {"csrc", "pyengine"} == set().union(*floors) - private
