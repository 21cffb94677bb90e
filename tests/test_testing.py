"""pyengine.testing: our quantizers have every property, every property sees a fault, others are tried."""

import builtins
import dataclasses
import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from pyengine import ops, provenance
from pyengine.checkpoint import Tensor
from pyengine.codes import encode, group_scales, pack_int4, quantize_groups, unpack_int4
from pyengine.errors import CheckpointError, InputError
from pyengine.files.safetensors import SafetensorsDirectory, SafetensorsWriter
from pyengine.quantize import Options, Pass
from pyengine.testing import PROPERTIES, Format, check_quantizer, strategies
from pyengine.verify_files import verify_files

ALL = range(1, 22)


# ---- our own ---------------------------------------------------------------------------------


def dequantizer(group):
    def dequantize(codes, scales):
        return codes * np.repeat(scales.astype(np.float32), group, axis=1)[:, : codes.shape[1]]
    return dequantize


def pipeline(largest, group, kind="F32"):
    """What `pyengine quantize` does with one matrix: errors by name, the C core, its threads."""
    run = Pass(ops.Pool(2), Options(group_size=group), lambda nbytes: None)

    def quantize(x):
        # Files are mapped and their rows contiguous; the core refuses anything else.
        x = np.ascontiguousarray(x)
        cols = x.shape[1] if kind == "F32" else x.shape[1] // 34 * 32
        tensor = Tensor("w", kind, (len(x), cols), x, file_name="blk.0.w")
        with run.pool.lock:  # a pool serves one caller at a time
            return run._quantize(tensor, None, 0, len(x), largest)
    return quantize


def definitions(largest, group):
    """The NumPy definition, and the C core on every instruction set."""
    def on(isa):
        def quantize(x):
            ops.select_isa(isa)
            try:
                return pipeline_(x)
            finally:
                ops.select_isa(ops.available_isas()[-1])
        return quantize
    pipeline_ = pipeline(largest, group)
    return {"NumPy": lambda x: quantize_groups(x, largest, group),
            "rationals": lambda x: in_rationals(x, largest, group),
            **{isa: on(isa) for isa in ops.available_isas()}}


def in_rationals(x, largest, group):
    """codes.py's rule once more, without floating-point division."""
    codes = np.zeros(x.shape, np.int8)
    scales = np.zeros((len(x), -(-x.shape[1] // group)), np.float16)
    for row, g in np.ndindex(*scales.shape):
        part = slice(g * group, (g + 1) * group)
        values = [Fraction(float(value)) for value in x[row, part]]
        amax = max(map(abs, values))
        if not amax:
            continue
        scale = nearest_float16(amax / largest) or Fraction(1, 2**24)
        if round(amax / scale) > largest:
            scale += Fraction(1, 2**24)  # only subnormal scales get here
        scales[row, g] = float(scale)
        codes[row, part] = [round(value / scale) for value in values]  # round: ties to even
    return codes, scales


def nearest_float16(value: Fraction) -> Fraction:
    exponent = max(-14, next(e for e in range(-200, 20) if Fraction(2) ** (e + 1) > value))
    step = Fraction(2) ** (exponent - 10)
    return round(value / step) * step


def file_pair(largest, group):
    """Codes and scales as a checkpoint's files; read back through `verify-files`."""
    bits, method = (8, "I8") if largest == 127 else (4, "U8"), Options().method
    said = {"format": provenance.FORMAT, "source": {}, "twin": {}, "method": method,
            "group_size": group, "bits": bits[0]}
    names = f"w_i{bits[0]}", f"w_scale_i{bits[0]}"

    def save(directory, codes, scales):
        stored = codes if largest == 127 else pack_int4(codes)
        arrays = dict(zip(names, (stored, np.ascontiguousarray(scales.T))))
        entries = [(name, dtype, a.shape) for (name, a), dtype in zip(arrays.items(), (bits[1], "F16"))]
        with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
        digests = {name: {"sha256": digest} for name, digest in writer.sha256.items()}
        (directory / provenance.FILE_NAME).write_text(json.dumps(said | {"tensors": digests}))

    def load(directory):
        faults = verify_files(directory)
        got = provenance.read(directory)
        if faults or {key: got[key] for key in said} != said:
            raise CheckpointError(f"{directory}: {faults or got}")
        tensors = SafetensorsDirectory.open(Path(directory)).tensors
        stored, scales = (tensors[name].data.copy() for name in names)
        return stored if largest == 127 else unpack_int4(stored), scales.T
    bits = (8, "I8") if largest == 127 else (4, "U8")
    return save, load


def nibbles_of_one_row_more(codes):
    return pack_int4(codes)


def ours(largest, group=128):
    """Arguments of check_quantizer."""
    save, load = file_pair(largest, group)
    packing = {"pack": pack_int4, "unpack": unpack_int4} if largest == 7 else {
        "pack": lambda codes: codes.view(np.uint8), "unpack": lambda stored: stored.view(np.int8)}
    return {"quantize": pipeline(largest, group), "dequantize": dequantizer(group),
            "format": Format(largest, group, multiple=1 if largest == 127 else 2,
                             tensor_name="blk.0.w"),
            "from_q8_0": pipeline(largest, group, "Q8_0"), "native": definitions(largest, group),
            "save": save, "load": load, **packing}


@pytest.mark.parametrize("largest, group", [(127, 128), (7, 128), (127, 32)])
def test_our_quantizers_have_all_21_properties(largest, group):
    report = check_quantizer(**ours(largest, group))
    assert list(report.outcomes) == list(ALL)
    assert {outcome.status for outcome in report.outcomes.values()} == {"holds"}, f"\n{report}"
    assert report.ok and not report.failures
