"""An engine for `pyengine bisect`: the NumPy port, which dumps what it is asked for.  MODEL FAULT [HOW]"""

import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(__file__))
from peer import Peer


def main(model, fault, how=""):
    ids = [int(i) for i in os.environ["PYENGINE_IDS"].split()]
    wanted = os.environ["PYENGINE_TENSORS"].split("\n")
    if how == "fails":
        print("out of\nmemory", file=sys.stderr)
        return 7
    trace = Peer(model, [fault]).run(ids)
    trace.tensors = {name: array for name, array in trace.tensors.items() if name in wanted}
    assert set(trace.tensors) == set(wanted)
    if how == "other ids":
        trace.ids = trace.ids + 1
    if how == "other shape":
        trace.tensors["lm_head"] = trace.tensors["lm_head"][:, :-1]
    if how == "other tensor":
        trace.tensors = {"model.embed_tokens": np.zeros((len(ids), 64), np.float32)}
    if how == "no trace":
        return 0
    if how == "not a trace":
        with open(os.environ["PYENGINE_TRACE"], "w") as file:
            file.write("GGUF")
        return 0
    trace.save(os.environ["PYENGINE_TRACE"])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
