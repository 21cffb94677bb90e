"""The pytest plugin: options, and the fixture `pyengine_oracle`.

def test_my_engine(pyengine_oracle):
    ids = pyengine_oracle.ids(64)
    pyengine_oracle.assert_trace_equal(my_engine_trace(ids))
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ...seed import SEED

# pytest loads this in every project of an environment that has pyengine: what is not needed for the
# options is imported when a test asks for the fixture.


def pytest_addoption(parser):
    group = parser.getgroup("pyengine", "traces of a model against pyengine's reference")
    for name, text in _OPTIONS.items():
        group.addoption(f"--pyengine-{name}", metavar=name.upper(), default=None, help=text)
        parser.addini(f"pyengine_{name}", help=text, default=None)


_OPTIONS = {
    "model": "GGUF file or checkpoint directory that pyengine_oracle is made of",
    "budget": "budget of assert_trace_equal: exact, float32, bfloat16, float16, int8-activations or a "
    "file (default: exact)",
}


def pytest_configure(config):
    """A budget or a model that cannot be is said before any test runs."""
    budget, model = _option(config, "budget"), _option(config, "model")
    if budget is not None:
        from ...errors import PyengineError
        from ...oracle.oracle import as_budget

        try:
            as_budget(budget)
        except (PyengineError, OSError) as error:
            raise pytest.UsageError(f"pyengine_budget: {str(error).removeprefix('budget: ')}") from None
    if model is not None:
        _check_model(Path(model))


def _check_model(path):
    try:
        readable = path.is_dir() or _starts_as_gguf(path)
        got = "another file"
    except OSError as error:
        readable, got = False, error.strerror
    if not readable:
        raise pytest.UsageError(f"pyengine_model: want a GGUF file or a directory, got {path}: {got}")


def _starts_as_gguf(path):
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _option(config, name):
    """The command line's, else the ini file's, a path of which is relative to it."""
    given = config.getoption(f"--pyengine-{name}")
    if given is not None:
        return given
    value = config.getini(f"pyengine_{name}") or None
    if value and (config.rootpath / value).exists():
        return str(config.rootpath / value)
    return value


@pytest.fixture(scope="session")
def pyengine_oracle(pytestconfig):
    """The oracle of --pyengine-model; skips where none is given."""
    from ...errors import PyengineError
    from ...oracle.oracle import Oracle

    model = _option(pytestconfig, "model")
    if model is None:
        pytest.skip("want --pyengine-model or pyengine_model in the ini file")
    try:
        return _Oracle(Oracle(None, model), _option(pytestconfig, "budget") or "exact")
    except (PyengineError, OSError) as error:
        pytest.fail(f"pyengine: {error}", pytrace=False)


class _Oracle:
    """What the fixture gives.  `path`: the model's; `budget`: the default; `oracle`: an Oracle."""

    def __init__(self, oracle, budget):
        self.oracle, self.budget, self.path = oracle, budget, oracle.path

    @property
    def config(self):
        """The model's hyper-parameters."""
        return self.oracle.model.config

    def ids(self, count, seed=SEED):
        """int64 [count]: token ids of the model's vocabulary, always the same."""
        import numpy as np

        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count)

    def trace(self, ids):
        """The reference's Trace for these ids."""
        return self.oracle.trace(ids)

    def assert_trace_equal(self, candidate, budget=None, allow_unknown=False):
        """A Trace, or a file of one, within the budget; else a failure that names the operation."""
        from ...errors import PyengineError
        from .traces import assert_trace_equal

        __tracebackhide__ = True
        try:
            return assert_trace_equal(
                candidate,
                budget=self.budget if budget is None else budget,
                oracle=self.oracle,
                allow_unknown=allow_unknown,
            )
        except PyengineError as error:
            pytest.fail(f"pyengine: {error}", pytrace=False)
