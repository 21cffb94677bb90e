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
from pyengine.testing.properties import q8_0_values
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


def implementations(largest, group):
    """The NumPy definition, exact rationals, and the C core on every instruction set."""
    def on(isa):
        def quantize(x):
            ops.select_isa(isa)
            try:
                return core(x)
            finally:
                ops.select_isa(ops.available_isas()[-1])
        return quantize

    core = pipeline(largest, group)
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
    bits, dtype = (8, "I8") if largest == 127 else (4, "U8")
    names = f"w_i{bits}", f"w_scale_i{bits}"
    said = {"format": provenance.FORMAT, "source": {}, "twin": {}, "method": Options().method,
            "group_size": group, "bits": bits}

    def save(directory, codes, scales):
        arrays = codes if largest == 127 else pack_int4(codes), np.ascontiguousarray(scales.T)
        entries = [(name, kind, array.shape)
                   for name, kind, array in zip(names, (dtype, "F16"), arrays)]
        with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
            for name, array in zip(names, arrays):
                writer.write(name, array)
        digests = {name: {"sha256": digest} for name, digest in writer.sha256.items()}
        (directory / provenance.FILE_NAME).write_text(json.dumps(said | {"tensors": digests}))

    def load(directory):
        faults, got = verify_files(directory), provenance.read(directory)
        if faults or {key: got[key] for key in said} != said:
            raise CheckpointError(f"{directory}: {faults or got}")
        tensors = SafetensorsDirectory.open(Path(directory)).tensors
        stored, scales = (tensors[name].data.copy() for name in names)
        return stored if largest == 127 else unpack_int4(stored), scales.T
    return save, load


def ours(largest, group=128):
    """Arguments of check_quantizer."""
    save, load = file_pair(largest, group)
    packing = {"pack": pack_int4, "unpack": unpack_int4} if largest == 7 else {
        "pack": lambda codes: codes.view(np.uint8), "unpack": lambda stored: stored.view(np.int8)}
    return {"quantize": pipeline(largest, group), "dequantize": dequantizer(group),
            "format": Format(largest, group, multiple=1 if largest == 127 else 2,
                             tensor_name="blk.0.w"),
            "from_q8_0": pipeline(largest, group, "Q8_0"), "native": implementations(largest, group),
            "save": save, "load": load, **packing}


@pytest.mark.parametrize("largest", [127, 7])
def test_our_quantizers_have_all_21_properties(largest):
    report = check_quantizer(**ours(largest))
    assert list(report.outcomes) == list(ALL)
    assert {outcome.status for outcome in report.outcomes.values()} == {"holds"}, f"\n{report}"
    assert report.ok and not report.failures


# ---- planted mutants -------------------------------------------------------------------------

M, GROUP = 7, 16  # of the mutants: INT4 in small groups
SOUND = ours(M, GROUP)


def checked(x):
    """What a sound quantizer does first: NaN and infinity by name and group, and plain memory."""
    x = np.ascontiguousarray(x)
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"blk.0.w: row {bad[0][0]}, group {bad[0][1] // GROUP}: not finite")
    return x


def float64_per_column(scales, cols):
    return np.repeat(np.where(scales == 0, 1, scales).astype(np.float64), GROUP, axis=1)[:, :cols]


def error_without_a_group(x):
    if not np.isfinite(x).all():
        raise ValueError("blk.0.w is not finite")
    return quantize_groups(x, M, GROUP)


def with_codes(code_of):
    """code_of(x / s) -> codes, after the sound scale."""
    def quantize(x):
        x = checked(x)
        scales = group_scales(x, M, GROUP)
        return code_of(x / float64_per_column(scales, x.shape[1])).astype(np.int8), scales
    return quantize


def with_scales(change):
    """change(x, sound scales) -> scales, before the sound codes, which clip."""
    def quantize(x):
        x = checked(x)
        scales = change(x, group_scales(x, M, GROUP))
        quotient = x / float64_per_column(scales, x.shape[1])
        return np.clip(np.rint(quotient), -M, M).astype(np.int8), scales
    return quantize


def group_maxima(x):
    return np.maximum.reduceat(abs(x), np.arange(0, x.shape[1], GROUP), axis=1)


def smaller_scale(x, scales):
    return (scales * 0.9).astype(np.float16)


def smaller_scale_unclipped(x):
    x = checked(x)
    scales = smaller_scale(x, group_scales(x, M, GROUP))
    return np.rint(x / float64_per_column(scales, x.shape[1])).clip(-127, 127).astype(np.int8), scales


def unrounded_divides(x):
    x = checked(x)
    exact = group_maxima(x).astype(np.float64) / M
    codes = np.rint(x / float64_per_column(exact, x.shape[1])).astype(np.int8)
    return codes, group_scales(x, M, GROUP)


def float32_reciprocal(x):
    x = checked(x)
    scales = group_scales(x, M, GROUP)
    inverse = np.float32(1) / float64_per_column(scales, x.shape[1]).astype(np.float32)
    return np.rint(x * inverse).astype(np.int8), scales


def float16_reciprocal(x):
    x = checked(x)
    scales = group_scales(x, M, GROUP)
    inverse = np.where(scales == 0, 0, np.float16(1) / scales)  # infinite for subnormal scales
    return np.rint(x * np.repeat(inverse, GROUP, axis=1)[:, : x.shape[1]]).astype(np.int8), scales


def underflow_to_zero(x):
    x = checked(x)
    scales = (group_maxima(x) / M).astype(np.float16)
    codes = np.rint(x / float64_per_column(scales, x.shape[1])).clip(-M, M).astype(np.int8)
    return codes, scales


def positive_maximum_only(x, scales):
    return group_scales(np.maximum(x, np.float32(2.0**-24)), M, GROUP)


def minimum_uses_minus_8(x):
    x = checked(x)
    scales = group_scales(np.where(x < 0, x * np.float32(M / (M + 1)), x), M, GROUP)
    return np.clip(np.rint(x / float64_per_column(scales, x.shape[1])), -M - 1, M).astype(np.int8), scales


def boundary_off_by_one(x):
    """The scale of a group is taken of columns that begin one too early."""
    x = checked(x)
    moved = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
    scales = group_scales(moved, M, GROUP)
    return encode(x, scales, M, GROUP), scales


def tail_with_its_neighbour(x, scales):
    if x.shape[1] % GROUP and scales.shape[1] > 1:
        scales = scales.copy()
        scales[:, -1] = scales[:, -2]
    return scales


def one_scale_per_row(x, scales):
    return np.broadcast_to(scales.max(axis=1, keepdims=True), scales.shape).copy()


def error_fed_on(x):
    """Each value takes over the rounding error of the one before it."""
    x = checked(x)
    scales = group_scales(x, M, GROUP)
    quotient = x / float64_per_column(scales, x.shape[1])
    codes, error = np.zeros(x.shape, np.int8), np.zeros(len(x))
    for column in range(x.shape[1]):
        wanted = quotient[:, column] + error
        codes[:, column] = np.clip(np.rint(wanted), -M, M)
        error = wanted - codes[:, column]
    return codes, scales


def dithered():
    rng = np.random.default_rng(1729)
    return with_codes(lambda quotient: np.clip(
        np.floor(quotient + rng.uniform(0, 1, quotient.shape)), -M, M))


def every_second_call_another_tie():
    calls = itertools.count()
    return with_codes(lambda quotient: np.rint(quotient) if next(calls) % 2 else ties_away(quotient))


def ties_away(quotient):
    return np.sign(quotient) * np.floor(abs(quotient) + 0.5)


def memory_order_misread(x):
    return quantize_groups(checked(x.ravel(order="K").reshape(x.shape)), M, GROUP)


def writes_to_its_input(x):
    result = quantize_groups(checked(x), M, GROUP)
    if x.flags.writeable:
        x *= 2
    return result


def threads_by_place(x):
    """Rows past the first are another thread's, which truncates."""
    x = checked(x)
    codes, scales = quantize_groups(x, M, GROUP)
    codes[1:] = np.trunc(x / float64_per_column(scales, x.shape[1]))[1:]
    return codes, scales


def nibbles_swapped(codes):
    return np.ascontiguousarray((packed := pack_int4(codes)) >> 4 | packed << 4)


def padded(nibble):
    """Rows of whole groups: columns past the last are the nibble."""
    def pack(codes):
        missing = -codes.shape[1] % GROUP
        return pack_int4(np.pad(codes, ((0, 0), (0, missing)), constant_values=nibble - 8))
    return pack


def sign_extended(packed):
    """Nibbles read as two's complement, not as code + 8."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8)
    return np.where(codes > 7, codes - 16, codes).astype(np.int8).reshape(len(packed), -1)


def no_checksum(directory):
    tensors = SafetensorsDirectory.open(Path(directory)).tensors
    return unpack_int4(tensors["w_i4"].data), tensors["w_scale_i4"].data.T


def scales_as_float32(directory):
    codes, scales = SOUND["load"](directory)
    return codes, scales.astype(np.float32)


def q8_0_through_float16(blocks):
    """Q8_0's values rounded to float16 on the way."""
    parts = blocks.reshape(len(blocks), -1, 34)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16)
    with np.errstate(over="ignore"):
        x = (scales * parts[..., 2:].view(np.int8)).astype(np.float32).reshape(len(blocks), -1)
    return quantize_groups(np.clip(x, -65504, 65504), M, GROUP)


def q8_0_without_minus_128(blocks):
    """Codes of -128 taken for -127, as a symmetric kernel would."""
    parts = blocks.copy().reshape(len(blocks), -1, 34)
    parts[..., 2:][parts[..., 2:] == 128] = 129
    return SOUND["from_q8_0"](parts.reshape(blocks.shape))


def that_remembers():
    """A dequantize that gives the values of the last quantize, whatever codes it is handed."""
    kept = []

    def quantize(x):
        kept[:] = SOUND["quantize"](x)
        return tuple(kept)
    return {"quantize": quantize, "dequantize": lambda codes, scales: SOUND["dequantize"](*kept)}


def float16_values(codes, scales):
    with np.errstate(over="ignore"):
        return (codes * np.repeat(scales, GROUP, axis=1)[:, : codes.shape[1]].astype(np.float32)
                ).astype(np.float16)


def quantizers(**kinds):
    return {name.replace("_", " "): {"quantize": quantize} for name, quantize in kinds.items()}


MUTANTS = quantizers(
    clips=with_scales(smaller_scale),
    scale_too_small=smaller_scale_unclipped,
    scale_rounded_down=with_scales(lambda x, scales: np.where(
        scales == 0, scales, np.nextafter(scales, np.float16(0)))),
    scale_of_M_and_a_half=with_scales(lambda x, scales: np.where(
        scales == 0, 0, (group_maxima(x) / (M + 0.5)).astype(np.float16) + np.float16(2.0**-24))),
    scale_plus_epsilon=with_scales(lambda x, scales: np.where(
        scales == 0, scales, scales + np.float16(1e-3))),
    float32_scale=with_scales(lambda x, scales: group_maxima(x) / np.float32(M)),
    scale_1_for_zeros=with_scales(lambda x, scales: np.where(scales == 0, np.float16(1), scales)),
    scale_of_the_positive_maximum=with_scales(positive_maximum_only),
    small_scales_become_zero=underflow_to_zero,
    unrounded_scale_divides=unrounded_divides,
    float32_reciprocal=float32_reciprocal,
    float16_reciprocal=float16_reciprocal,
    ties_away=with_codes(ties_away),
    ties_half_up=with_codes(lambda quotient: np.floor(quotient + 0.5)),
    truncates=with_codes(np.trunc),
    negatives_truncated=with_codes(lambda quotient: np.where(
        quotient < 0, np.trunc(quotient), np.rint(quotient))),
    uses_minus_8=minimum_uses_minus_8,
    wraps_at_6=with_codes(lambda quotient: (np.rint(quotient) + 6) % 13 - 6),
    NaN_accepted=lambda x: quantize_groups(np.nan_to_num(x, posinf=1, neginf=-1), M, GROUP),
    infinity_accepted=lambda x: quantize_groups(
        checked(np.where(np.isinf(x), np.copysign(np.float32(1), x), x)), M, GROUP),
    error_without_a_group=error_without_a_group,
    group_boundary_off_by_one=boundary_off_by_one,
    tail_with_its_neighbours_scale=with_scales(tail_with_its_neighbour),
    one_scale_per_row=with_scales(one_scale_per_row),
    error_fed_on=error_fed_on,
    dithered=dithered(),
    every_second_call_another_tie=every_second_call_another_tie(),
    rows_of_other_threads_truncated=threads_by_place,
    memory_order_misread=memory_order_misread,
    writes_to_its_input=writes_to_its_input,
) | {
    "nibbles swapped": {"pack": nibbles_swapped},
    "padding is nibble 0": {"pack": padded(0)},
    "nibbles sign-extended": {"unpack": sign_extended},
    "a kernel with other ties": {"native": {"SIMD": with_codes(ties_away)}},
    "Q8_0 through float16": {"from_q8_0": q8_0_through_float16},
    "Q8_0 without -128": {"from_q8_0": q8_0_without_minus_128},
    "no checksum": {"load": no_checksum},
    "scales read as float32": {"load": scales_as_float32},
    "dequantizes to float16": {"dequantize": float16_values},
    "dequantize remembers": that_remembers(),
}


def kills(mutant) -> set[int]:
    """Numbers of the properties that fail on it."""
    quantize = mutant.get("quantize", SOUND["quantize"])
    # The other ways to quantise have the same fault: that they differ from it would say nothing.
    beside = {"native": {"itself": quantize}, "from_q8_0": lambda blocks: quantize(q8_0_values(blocks))}
    return set(check_quantizer(**SOUND | beside | mutant, examples=50, shrink=False).failures)


@pytest.fixture(scope="module")
def table():
    return {name: kills(mutant) for name, mutant in MUTANTS.items()}


def test_every_mutant_is_killed_and_every_property_kills_one(table, capsys):
    with capsys.disabled():
        print("\n\n" + shown(table))
    assert not [name for name, killers in table.items() if not killers]
    assert set().union(*table.values()) == set(ALL)


def shown(table) -> str:
    width = max(map(len, table))
    lines = [f"{'mutant':{width}}  killed by property",
             " " * width + "  " + " ".join(f"{number:2}" for number in ALL)]
    for name, killers in table.items():
        lines.append(f"{name:{width}}  " + " ".join(" x" if n in killers else " ." for n in ALL))
    counts = [sum(n in killers for killers in table.values()) for n in ALL]
    return "\n".join([*lines, f"{'mutants killed':{width}}  " + " ".join(f"{n:2}" for n in counts)])


def test_the_sound_quantizer_of_the_mutants_is_sound():
    assert not kills({})
    assert not kills({"pack": padded(8)})
