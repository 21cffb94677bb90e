"""Debian's chromium without a window, driven by selenium."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium(width, height):
    """-> a driver; skips the test where selenium or chromium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not program:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    size = f"--window-size={width},{height}"
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", size):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()
