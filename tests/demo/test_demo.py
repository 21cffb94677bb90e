"""The embedded default, end to end, and that the demonstration can fail."""

import numpy as np

from pyengine.demo.demo import demo
from pyengine.oracle.trace import Trace


def test_demo_says_bits_equal():
    said = []
    assert demo(said.append)
    assert sum("bits equal" in line for line in said) == 3


def test_demo_notices_one_wrong_bit(monkeypatch):
    original = Trace.load
    monkeypatch.setattr(Trace, "load", staticmethod(lambda path: _with_one_bit_changed(original(path))))
    said = []
    assert not demo(said.append)
    assert sum("NOT EQUAL: lm_head: 1 of" in line for line in said) == 3


def _with_one_bit_changed(trace):
    last = trace.tensors["lm_head"].copy()
    last[0, 0] = np.nextafter(last[0, 0], np.float32(np.inf))
    return Trace(trace.ids, trace.tensors | {"lm_head": last})
