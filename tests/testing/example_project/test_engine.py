"""What a project puts into its tests.  pyproject.toml names the model and the budget."""

import engine


def test_prefill(pyengine_oracle):
    ids = pyengine_oracle.ids(24)
    pyengine_oracle.assert_trace_equal(engine.trace(pyengine_oracle.path, ids))


def test_decode(pyengine_oracle):
    ids = pyengine_oracle.ids(24)
    pyengine_oracle.assert_trace_equal(engine.trace(pyengine_oracle.path, ids, splits=[22, 1, 1]))
