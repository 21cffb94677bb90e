"""The page of a verdict: what is in it, and how it looks and works in a real browser."""

import functools
import html
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from chromium import chromium
from partial import part, renamed
from paths import GOLDEN
from peer import Peer

from pyengine.oracle.mistakes.catalogue import MISTAKES
from pyengine.oracle.oracle import Oracle
from pyengine.oracle.report import heat_map
from pyengine.oracle.report.equations import equations_of
from pyengine.oracle.report.html import as_html
from pyengine.oracle.report.summary import headline
from pyengine.oracle.verdict import Verdict

MODEL = GOLDEN / "pattern31.gguf"
IDS = np.random.default_rng(1729).integers(0, 288, 16)
COMMAND = ["pyengine", "verify", "model.gguf", "my trace.safetensors"]


@functools.cache
def verdict(kind="full", fault="rope_pairs", budget="float32"):
    trace = part(Peer(MODEL, [fault] if fault else []).run(IDS), kind)
    return Oracle(None, MODEL).verify(trace, budget, seconds=60)


def page(kind="full", fault="rope_pairs", budget="float32"):
    return as_html(verdict(kind, fault, budget), COMMAND, {"reference": "model.gguf"})


def text_of(source):
    return html.unescape(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script).*?</\1>", "", source, flags=re.DOTALL))
    )


def test_every_part_of_a_verdict_is_in_it():
    found = text_of(page())
    for wanted in (
        headline(verdict()),
        "Error by layer and token",
        "Error added by module",
        "First and worst elements",
        "The mistake that fits",
        "RoPE turns pairs (2i, 2i + 1), not halves",
        "def rotate(x, positions, inv_freq, scale):",  # the reference's equation
        "order = np.concatenate([np.arange(0, width, 2)",  # and the mistake's
        "pyengine verify model.gguf 'my trace.safetensors'",
        "GUILTY: the operation is beyond its budget",
        "from token: the first with an element beyond the budget",
    ):
        assert wanted in found, wanted
    logits = text_of(page("logits"))
    assert "Dump next" in logits and "model.layers.3" in logits and "lm_head, or anything before it" in logits


@pytest.mark.slow
@pytest.mark.parametrize("kind, fault, budget", [("full", None, "float32"), ("layers", "heads", "exact")])
def test_other_verdicts_have_pages_too(kind, fault, budget):
    found = text_of(page(kind, fault, budget))
    assert headline(verdict(kind, fault, budget)) in found and "The mistake that fits" not in found
    assert "Error by layer and token" in found


def test_a_verdict_of_traces_alone_has_no_heat_map():
    reference = Oracle(None, MODEL).trace(IDS)
    plain = Oracle(reference).verify(Peer(MODEL, ["heads"]).run(IDS))
    found = text_of(as_html(plain))
    assert headline(plain) in found and "Error by layer and token" not in found


def test_it_is_one_file_that_loads_nothing():
    source = page()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", source)
    assert "default-src 'none'" in source
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source)
    for picture in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(re.sub(r"(\w+)=([\w-]+)(?=[\s/>])", r'\1="\2"', picture))


@pytest.mark.slow
def test_names_of_the_candidate_are_text():
    evil = "</script><img onerror=alert(1)>@data@@body@"
    trace = renamed(part(Peer(MODEL).run(IDS), "logits"), lambda name: name)
    trace.tensors[evil] = trace.tensors["lm_head"]
    judged = Oracle(None, MODEL).verify(trace, "float32", allow_unknown=True)
    source = as_html(judged, ["verify", evil], {"candidate": evil})
    assert "<img" not in source and source.count("</script>") == 2
    assert html.escape(evil) in source


@pytest.mark.slow
def test_the_data_is_json_without_infinities():
    nan = part(Peer(MODEL).run(IDS), "layers")
    nan.tensors["model.layers.1"] = nan.tensors["model.layers.1"].copy()
    nan.tensors["model.layers.1"][3] = np.nan
    judged = Oracle(None, MODEL).verify(nan, "float32", seconds=1)
    data = json.loads(re.search(r'id="data">(.*?)</script>', as_html(judged), re.DOTALL)[1])
    row = next(tensor for tensor in data["tensors"] if tensor["name"] == "model.layers.1")
    assert row["total"][3] == -1 and row["total"][2] >= 0 and data["tokens"] == len(IDS)
    assert "c8" in heat_map.layers_by_tokens(judged)


@pytest.mark.slow
def test_many_tokens_are_put_together():
    wide = np.random.default_rng(0).integers(0, 288, 140)
    judged = Oracle(None, MODEL).verify(part(Peer(MODEL).run(wide), "logits"), "float32")
    picture = heat_map.layers_by_tokens(judged)
    cells = [cell.split() for cell in re.findall(r"data-cell='([\d ]+)'", picture)]
    assert len(cells) == heat_map.COLUMNS
    assert [int(c[1]) for c in cells[1:]] == [int(c[2]) for c in cells[:-1]] and cells[-1][2] == "140"


def test_each_mistake_has_equations():
    for mistake in MISTAKES:
        found = equations_of(mistake.name)
        assert found and all(equation.wrong for equation in found), mistake.name
        if mistake.at_token:
            assert equations_of(f"{mistake.name} at token 7") == found
    assert equations_of("the values are 1.01 times what they should be") == []


def test_what_a_verdict_lacks_is_left_out():
    empty = Verdict(True, "exact", None, verdict().rows[:1], [], [], [], False)
    assert "Routing" not in text_of(as_html(empty)) and "Dump next" not in text_of(as_html(empty))


# ---- in Chromium ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium(1100, 900) as driver:
        yield driver


def colours(browser):
    return browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )


@pytest.mark.slow
def test_a_click_on_a_cell_shows_its_modules(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())

    def one(selector):
        return browser.find_element(By.CSS_SELECTOR, selector)

    assert one("#verdict").text.startswith("FAILED: different: ")
    cell = one("#map rect[data-cell='4 7 8']")  # layer 3, token 7
    cell.click()
    panel = one("#chosen").text
    assert panel.startswith("layer 3, token 7")
    guilty = re.search(r"model\.layers\.3\.self_attn\.o_proj (\S+) x (\S+) x GUILTY", panel)
    assert guilty and float(guilty[2]) > 1000
    assert "chosen" in cell.get_attribute("class")
    before = one("#map rect[data-cell='5 7 8']").get_attribute("class")  # the last norm inherits
    one("#kind").send_keys("of the operation")
    assert one("#map rect[data-cell='5 7 8']").get_attribute("class") != before
    one("#map rect[data-cell='1 0 1']").send_keys(Keys.ENTER)  # by keyboard
    assert one("#chosen").text.startswith("layer 0, token 0")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_it_is_readable_in_light_dark_and_print(browser, tmp_path):
    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        seen[scheme] = colours(browser)
        browser.save_screenshot(str(tmp_path / f"{scheme}.png"))  # to be looked at
    assert seen["light"] == ["rgb(255, 255, 255)", "rgb(29, 35, 48)"]
    assert seen["dark"] == ["rgb(18, 22, 29)", "rgb(228, 232, 239)"]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert colours(browser) == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    shown = browser.execute_script("return getComputedStyle(document.getElementById('chosen')).display")
    assert shown == "none"
    wide = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
