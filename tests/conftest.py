import json
import sys
from pathlib import Path

import pytest

collect_ignore = ["example_project"]  # a project of its own: test_plugin.py runs it

GOLDEN = Path(__file__).parent / "golden"

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "tools"))

from pyengine import ops  # noqa: E402


@pytest.fixture(params=ops.available_isas())
def each_isa(request):
    """The name of every instruction set this machine has; the highest is in use again afterwards."""
    ops.select_isa(request.param)
    assert ops.active_isa() == request.param
    yield request.param
    ops.select_isa(ops.available_isas()[-1])


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory):
    """A GGUF that differs from pattern31.gguf in every dimension."""
    from odd_model import write_odd_model

    return write_odd_model(tmp_path_factory.mktemp("odd") / "odd.gguf")


@pytest.fixture(scope="session")
def golden():
    """tests/golden/LOCK.json, parsed; tools/make_golden.py says what it holds."""
    return json.loads((GOLDEN / "LOCK.json").read_text())


@pytest.fixture(scope="session")
def golden_path():
    """golden_path(name) is a file of tests/golden/."""
    return lambda name: GOLDEN / name
