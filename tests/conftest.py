import gc
import json
import os

import pytest
from paths import GOLDEN

from pyengine.core.processors import physical_cores
from pyengine.core.threads import active_isa, available_isas, select_isa

collect_ignore = ["testing/example_project"]  # a project of its own: test_plugin.py runs it


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """`pytest` alone runs the files of tests on all processors; with `-n 0`, or only some tests, on one."""
    option = config.option
    alone = config.args_source == config.ArgsSource.TESTPATHS and option.markexpr == "not slow and not golden"
    unsaid = getattr(option, "numprocesses", 0) is None and not (option.usepdb or option.collectonly)
    if alone and unsaid and "PYTEST_XDIST_WORKER" not in os.environ:
        option.numprocesses, option.dist = physical_cores(), "loadfile"


def pytest_collection_finish():
    """The garbage collector need not walk through thousands of tests each time that a test calls it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory):
    """Child processes would find the checkout's sources, without a C core, before the installed package."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(before)


@pytest.fixture(params=available_isas())
def each_isa(request):
    """The name of every instruction set this machine has; the highest is in use again afterwards."""
    select_isa(request.param)
    assert active_isa() == request.param
    yield request.param
    select_isa(available_isas()[-1])


@pytest.fixture(scope="session")
def odd_model(tmp_path_factory):
    """A GGUF that differs from pattern31.gguf in every dimension."""
    from odd_model import write_odd_model

    return write_odd_model(tmp_path_factory.mktemp("odd") / "odd.gguf")


@pytest.fixture(scope="session")
def golden():
    """tests/golden/LOCK.json, parsed; tools/golden/make_golden.py says what it holds."""
    return json.loads((GOLDEN / "LOCK.json").read_text())


@pytest.fixture(scope="session")
def golden_path():
    """golden_path(name) is a file of tests/golden/."""
    return lambda name: GOLDEN / name
