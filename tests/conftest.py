import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pyengine import ops  # noqa: E402


@pytest.fixture(params=ops.available_isas())
def each_isa(request):
    """The name of every instruction set this machine has; the highest is in use again afterwards."""
    ops.select_isa(request.param)
    assert ops.active_isa() == request.param
    yield request.param
    ops.select_isa(ops.available_isas()[-1])
