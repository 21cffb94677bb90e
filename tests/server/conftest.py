"""A small model that is served, and a client of it."""

import time

import pytest
from chat_models import with_template
from serving import serving

import pyengine
from pyengine import server

NAME = "small"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pyengine.load(with_template(tmp_path_factory.mktemp("served") / "m.gguf"), threads=1)


@pytest.fixture(scope="module")
def app(model):
    return server.create_app(model, NAME, max_tokens=12)


@pytest.fixture(scope="module")
def address(app):
    with serving(app) as address:
        yield address


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai", reason="needs the extra client")


@pytest.fixture(scope="module")
def client(openai, address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def slow_model(model, monkeypatch):
    """A tenth of a second a pass, so that it can be watched."""
    forward = model.forward

    def slowly(*arguments, **options):
        time.sleep(0.1)
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", slowly)
    return model
