"""The page at /, in a real browser."""

import re
import time
import urllib.request

import pytest
from chat_models import with_template
from chromium import chromium
from serving import ask, serving

import pyengine
from pyengine import server

for module in ("tokenizers", "jinja2"):
    pytest.importorskip(module, reason="needs the extra text")
for module in ("uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra serve")

NAME = "small"


@pytest.fixture(scope="module")
def page(address):
    with urllib.request.urlopen(f"{address}/") as answer:
        return answer.read().decode(), answer.headers


def test_it_is_one_file_that_loads_nothing(page):
    html, headers = page
    assert headers["Content-Type"].startswith("text/html")
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", html)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy


def test_it_can_be_left_out(model):
    with serving(server.create_app(model, NAME, page=False)) as address:
        assert ask(address, "/")[0] == 404


def test_nothing_of_an_answer_is_html(page):
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page[0])


# ---- in Chromium ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with chromium(900, 700) as driver:
        yield driver


@pytest.fixture
def chat(browser, tmp_path):
    """A page on a model whose answers are slow enough to be watched -> a driver of it."""
    model = pyengine.load(with_template(tmp_path / "m.gguf"), threads=1)
    forward = model.forward

    def slowly(*arguments, **options):
        time.sleep(0.02)
        return forward(*arguments, **options)

    model.forward = slowly
    with serving(server.create_app(model, NAME)) as address:
        browser.get(address)
        yield Chat(browser)
        errors = [line for line in browser.get_log("browser") if "favicon" not in line["message"]]
        assert errors == []


class Chat:
    def __init__(self, browser):
        from selenium.webdriver.common.by import By

        self.browser, self.by = browser, By
        self.until(lambda: self.one("#model").text == NAME)

    def until(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def all(self, selector):
        return self.browser.find_elements(self.by.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.browser.find_element(self.by.CSS_SELECTOR, selector)

    def keys(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def running(self):
        return self.one("#stop").is_displayed()

    def notes(self):
        return [note.text for note in self.all("article .note")]

    def set(self, **values):
        """Settings, by keyboard: the dialog is open, and each field has a name."""
        from selenium.webdriver.common.keys import Keys

        self.keys(Keys.ALT, "s")
        self.until(lambda: self.one("#settings").is_displayed())
        for name, value in values.items():
            self.one(f"#settings [name={name}]").send_keys(value)
        self.one("#settings button").send_keys(Keys.ENTER)
        self.until(lambda: not self.one("#settings").is_displayed())


@pytest.mark.slow
def test_a_conversation_by_keyboard_alone(chat):
    from selenium.webdriver.common.keys import Keys

    chat.set(max_tokens="40")
    chat.keys("the end", Keys.SHIFT, Keys.ENTER, Keys.NULL, "of <b>the</b> day", Keys.ENTER)
    chat.until(chat.running)
    chat.until(lambda: not chat.running())
    said, answer = chat.all("article")
    assert said.find_element(chat.by.CSS_SELECTOR, ".text").text == "the end\nof <b>the</b> day"
    assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · prompt \d+ \(0 cached\) · [\d.]+ s", chat.notes()[0])
    first = answer.text.splitlines()[:-1]
    chat.keys(Keys.ALT, "r")  # regenerate: the same seed, the same answer
    chat.until(chat.running)
    chat.until(lambda: not chat.running())
    assert len(chat.all("article")) == 2 and chat.all("article")[1].text.splitlines()[:-1] == first
    chat.keys("on", Keys.ENTER)
    chat.until(lambda: len(chat.notes()) == 2 and "cached" in chat.notes()[1])
    assert re.search(r"\([1-9]\d* cached\)", chat.notes()[1])
    chat.keys(Keys.ALT, "n")
    chat.until(lambda: not chat.all("article"))


@pytest.mark.slow
def test_escape_stops_an_answer(chat):
    from selenium.webdriver.common.keys import Keys

    chat.set(max_tokens="5000")
    chat.keys("the end", Keys.ENTER)
    chat.until(lambda: "tokens/s" in " ".join(chat.notes()))
    chat.keys(Keys.ESCAPE)
    chat.until(lambda: not chat.running())
    assert "stopped" in chat.notes()[0]


@pytest.mark.slow
def test_an_error_is_shown(chat):
    from selenium.webdriver.common.keys import Keys

    chat.set(max_tokens="3")
    chat.browser.execute_script("document.querySelector('#settings [name=temperature]').value = '1000'")
    chat.keys("the end", Keys.ENTER)
    chat.until(lambda: chat.all("article .note.error"))
    assert chat.notes() == ["Error: temperature: want a number from 0 to 100, got 1000"]
    chat.browser.get_log("browser")  # Chromium notes every answer with status 400


@pytest.mark.slow
def test_thinking_is_folded(browser, tmp_path):
    """The embedded model thinks; a screenshot is there to be looked at."""
    from selenium.webdriver.common.keys import Keys

    with serving(server.create_app(pyengine.load("default"), NAME)) as address:
        browser.get(address)
        chat = Chat(browser)
        chat.set(thinking="on", max_tokens="60")
        chat.keys("Who is Moses?", Keys.ENTER)
        chat.until(lambda: chat.notes() and "cached" in chat.notes()[0])
        thinking = chat.one("details.thinking")
        assert thinking.is_displayed() and thinking.get_attribute("open") is None
        thinking.find_element(chat.by.CSS_SELECTOR, "summary").send_keys(Keys.ENTER)
        assert thinking.get_attribute("open") and thinking.find_element(chat.by.CSS_SELECTOR, ".text").text
        browser.save_screenshot(str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 5000
