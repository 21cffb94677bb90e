"""Files as llama-imatrix writes them."""

import gguf
import numpy as np
from paths import GOLDEN

from pyengine.calibration import imatrix
from pyengine.checkpoint.open import open_checkpoint


def checkpoint(name="pattern31"):
    return open_checkpoint(GOLDEN / f"{name}.gguf")


def entries(name="pattern31", value=1.0, tokens=10.0):
    """{weight of a GGUF: (in_sum2 [n_mat, n], counts [n_mat, 1])} as llama-imatrix gives them."""
    found = {}
    for spec in imatrix.calibrated_specs(checkpoint(name).config):
        experts = spec.shape[0] if len(spec.shape) == 3 else 1
        found[spec.gguf] = (
            np.full((experts, spec.shape[-1]), value * tokens, np.float32),
            np.full((experts, 1), tokens, np.float32),
        )
    return found


def write(path, found, kind="imatrix", **extra):
    """As llama.cpp writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["calib.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for key, value in extra.items():
        writer.add_string(key, value)
    for name, (sums, counts) in found.items():
        if sums is not None:
            writer.add_tensor(name + imatrix.SUMS, sums)
        if counts is not None:
            writer.add_tensor(name + imatrix.COUNTS, counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
