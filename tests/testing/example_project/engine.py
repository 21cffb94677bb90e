"""The engine under test: here a NumPy one that can be broken; in your project, yours.

It gives `pyengine.testing.Trace(ids, {module path: array [T, features]})`, or writes a trace file.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from peer import Peer


def trace(model, ids, splits=None):
    faults = filter(None, [os.environ.get("ENGINE_FAULT")])
    return Peer(model, faults).run(ids, splits)
