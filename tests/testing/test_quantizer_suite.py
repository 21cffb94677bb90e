"""pyengine.testing: our quantizers have every property, every property sees a fault, others are tried."""

import dataclasses
import importlib
import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings

import pyengine.testing
from pyengine.checkpoint import provenance
from pyengine.checkpoint.layout import pack_int4, unpack_int4
from pyengine.checkpoint.tensor import Tensor
from pyengine.core.threads import Pool, available_isas, select_isa
from pyengine.errors import CheckpointError, InputError
from pyengine.files.safetensors import SafetensorsDirectory
from pyengine.files.safetensors_writer import SafetensorsWriter
from pyengine.quantizer.options import QuantizeOptions
from pyengine.quantizer.quantize_pass import quantize_rows, source_rows
from pyengine.quantizer.rule import encode, group_scales, quantize_groups
from pyengine.quantizer.verify_files import verify_tensors
from pyengine.testing import PROPERTIES, Format, check_quantizer
from pyengine.testing.quantizer import strategies, suite
from pyengine.testing.quantizer.properties.stored import q8_0_values

ALL = range(1, 22)
CALIBRATED = range(22, 25)  # test_calibrated_suite.py has these


# ---- our own ---------------------------------------------------------------------------------


def dequantizer(group):
    def dequantize(codes, scales):
        return codes * np.repeat(scales.astype(np.float32), group, axis=1)[:, : codes.shape[1]]

    return dequantize


def pipeline(largest, group, kind="F32"):
    """What `pyengine quantize` does with one matrix: errors by name, the C core, its threads."""
    pool, options = Pool(2), QuantizeOptions(group_size=group)

    def quantize(x):
        # Files are mapped and their rows contiguous; the core refuses anything else.
        x = np.ascontiguousarray(x)
        cols = x.shape[1] if kind == "F32" else x.shape[1] // 34 * 32
        tensor = Tensor("w", kind, (len(x), cols), x, file_name="blk.0.w")
        return quantize_rows(pool, source_rows(tensor, None, 0, len(x)), largest, options)

    return quantize


def implementations(largest, group):
    """The NumPy definition, exact rationals, and the C core on every instruction set."""

    def on(isa):
        def quantize(x):
            select_isa(isa)
            try:
                return core(x)
            finally:
                select_isa(available_isas()[-1])

        return quantize

    core = pipeline(largest, group)
    return {
        "NumPy": lambda x: quantize_groups(x, largest, group),
        "rationals": lambda x: in_rationals(x, largest, group),
        **{isa: on(isa) for isa in available_isas()},
    }


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
    said = {
        "format": provenance.FORMAT,
        "engine": {"name": "pyengine", "version": "0"},
        "seed": 1729,
        "source": {"files": [], "tensor_types": {}},
        "method": "absmax",
        "method_in_words": "",
        "group_size": group,
        "bits": bits,
        "twin": {"id": "", "kind": f"int{bits}"},
        "files": {},
        "sha256": "",
    }

    def save(directory, codes, scales):
        arrays = codes if largest == 127 else pack_int4(codes), np.ascontiguousarray(scales.T)
        entries = [(name, kind, array.shape) for name, kind, array in zip(names, (dtype, "F16"), arrays)]
        with SafetensorsWriter(directory / "model.safetensors", entries) as writer:
            for name, array in zip(names, arrays):
                writer.write(name, array)
        digests = {name: {"sha256": digest} for name, digest in writer.sha256.items()}
        (directory / provenance.FILE_NAME).write_text(json.dumps(said | {"tensors": digests}))

    def load(directory):
        faults, got = verify_tensors(directory), provenance.read(directory)
        if faults or {key: got[key] for key in said} != said:
            raise CheckpointError(f"{directory}: {faults or got}")
        tensors = SafetensorsDirectory.open(Path(directory)).tensors
        stored, scales = (tensors[name].data.copy() for name in names)
        return stored if largest == 127 else unpack_int4(stored), scales.T

    return save, load


def ours(largest, group=128):
    """Arguments of check_quantizer."""
    save, load = file_pair(largest, group)
    packing = (
        {"pack": pack_int4, "unpack": unpack_int4}
        if largest == 7
        else {"pack": lambda codes: codes.view(np.uint8), "unpack": lambda stored: stored.view(np.int8)}
    )
    return {
        "quantize": pipeline(largest, group),
        "dequantize": dequantizer(group),
        "format": Format(largest, group, multiple=1 if largest == 127 else 2, tensor_name="blk.0.w"),
        "from_q8_0": pipeline(largest, group, "Q8_0"),
        "native": implementations(largest, group),
        "save": save,
        "load": load,
        **packing,
    }


@pytest.mark.parametrize("largest", [pytest.param(127, marks=pytest.mark.slow), 7])
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
    return with_codes(lambda quotient: np.clip(np.floor(quotient + rng.uniform(0, 1, quotient.shape)), -M, M))


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
        return (codes * np.repeat(scales, GROUP, axis=1)[:, : codes.shape[1]].astype(np.float32)).astype(
            np.float16
        )


def quantizers(**kinds):
    return {name.replace("_", " "): {"quantize": quantize} for name, quantize in kinds.items()}


MUTANTS = quantizers(
    clips=with_scales(smaller_scale),
    scale_too_small=smaller_scale_unclipped,
    scale_rounded_down=with_scales(
        lambda x, scales: np.where(scales == 0, scales, np.nextafter(scales, np.float16(0)))
    ),
    scale_of_M_and_a_half=with_scales(
        lambda x, scales: np.where(
            scales == 0, 0, (group_maxima(x) / (M + 0.5)).astype(np.float16) + np.float16(2.0**-24)
        )
    ),
    scale_plus_epsilon=with_scales(
        lambda x, scales: np.where(scales == 0, scales, scales + np.float16(1e-3))
    ),
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
    negatives_truncated=with_codes(
        lambda quotient: np.where(quotient < 0, np.trunc(quotient), np.rint(quotient))
    ),
    uses_minus_8=minimum_uses_minus_8,
    wraps_at_6=with_codes(lambda quotient: (np.rint(quotient) + 6) % 13 - 6),
    NaN_accepted=lambda x: quantize_groups(np.nan_to_num(x, posinf=1, neginf=-1), M, GROUP),
    infinity_accepted=lambda x: quantize_groups(
        checked(np.where(np.isinf(x), np.copysign(np.float32(1), x), x)), M, GROUP
    ),
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
    return set(check_quantizer(**SOUND | beside | mutant, examples=80, shrink=False).failures)


@pytest.fixture(scope="module")
def table():
    return {name: kills(mutant) for name, mutant in MUTANTS.items()}


@pytest.mark.slow
def test_every_mutant_is_killed_and_every_property_kills_one(table, capsys):
    with capsys.disabled():
        print("\n\n" + shown(table))
    assert not [name for name, killers in table.items() if not killers]
    assert set().union(*table.values()) == set(ALL)


def shown(table) -> str:
    width = max(map(len, table))
    lines = [
        f"{'mutant':{width}}  killed by property",
        " " * width + "  " + " ".join(f"{number:2}" for number in ALL),
    ]
    for name, killers in table.items():
        lines.append(f"{name:{width}}  " + " ".join(" x" if n in killers else " ." for n in ALL))
    counts = [sum(n in killers for killers in table.values()) for n in ALL]
    return "\n".join([*lines, f"{'mutants killed':{width}}  " + " ".join(f"{n:2}" for n in counts)])


@pytest.mark.slow
def test_the_sound_quantizer_of_the_mutants_is_sound():
    assert not kills({})
    assert not kills({"pack": padded(8)})


# ---- quantizers that are not ours ------------------------------------------------------------

Q8_0 = GGMLQuantizationType.Q8_0


def gguf_quantize(x):
    """gguf-py's Q8_0, its blocks taken apart."""
    blocks = gguf.quants.quantize(x, Q8_0).reshape(len(x), -1, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    return blocks[..., 2:].view(np.int8).reshape(x.shape), scales


def gguf_dequantize(codes, scales):
    blocks = np.concatenate(
        [scales[..., None].view(np.uint8), codes.reshape(len(codes), -1, 32).view(np.uint8)], axis=-1
    )
    return gguf.quants.dequantize(blocks.reshape(len(codes), -1), Q8_0)


Q8_0_FORMAT = Format(127, 32, "float16", ties="away", multiple=32)

# d = max |x| / 127 in float32 divides, by way of 1 / d, and is stored as float16.
Q8_0_LACKS = {
    2: "a scale below float16's range is stored as 0",
    3: "the scale that is stored is not the one that divided",
    4: "codes are nearest for the scale before it was rounded",
    5: "x * (1 / d) is rounded twice",
    15: "NaN and infinity are not looked for",
    19: "follows from 3",
}


@pytest.fixture(scope="module")
def q8_0_report():
    return check_quantizer(gguf_quantize, gguf_dequantize, Q8_0_FORMAT)


def test_gguf_q8_0_has_exactly_the_properties_that_its_rule_has(q8_0_report):
    assert set(q8_0_report.failures) == set(Q8_0_LACKS) and not q8_0_report.ok
    without = {
        14: "needs pack and unpack",
        17: "needs native",
        18: "needs from_q8_0",
        20: "needs save and load",
    }
    assert {
        n: outcome.detail for n, outcome in q8_0_report.outcomes.items() if outcome.status == "not applicable"
    } == without
    for number in set(ALL) - set(Q8_0_LACKS) - set(without):
        assert q8_0_report[number].status == "holds", q8_0_report[number]


def test_what_is_declared_is_no_failure():
    format = dataclasses.replace(Q8_0_FORMAT, not_promised=Q8_0_LACKS | {1: "of no reason"})
    report = check_quantizer(gguf_quantize, gguf_dequantize, format, shrink=False)
    assert report.ok and report[1].status == "holds, though not promised"
    assert {n for n in ALL if report[n].status == "fails, as declared"} == set(Q8_0_LACKS)
    assert all(reason in report[n].detail for n, reason in Q8_0_LACKS.items())


def test_the_smallest_example_is_small(q8_0_report):
    for number in (2, 3, 4, 19):
        x = q8_0_report[number].example["x"]
        assert x.shape == (1, 32) and np.count_nonzero(x) <= 2, q8_0_report[number]
    assert "zeros but [0, " in str(q8_0_report[4])


@pytest.mark.golden
def test_compressed_tensors_int8():
    """Its INT8 is symmetric about -1/2: codes from -128 on, of a scale of max |x| / 127.5."""
    torch = pytest.importorskip("torch")
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import calculate_qparams

    args = ct.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="group", group_size=32)

    def quantize(x):
        groups = torch.from_numpy(x.copy()).unflatten(1, (-1, 32))
        scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        codes = forward.quantize(groups.flatten(1), scales, zeros, args, dtype=torch.int8)
        return codes.numpy(), scales.numpy()

    def dequantize(codes, scales):
        return forward.dequantize(torch.from_numpy(codes), torch.from_numpy(scales), None, args).numpy()

    report = check_quantizer(
        quantize,
        dequantize,
        Format(127, 32, "float32", multiple=32, zero_scale=None),
        properties=[1, 2, 6, 8, 9, 10, 13, 15],
        examples=50,
    )
    assert set(report.failures) == {1, 6, 9, 15}, f"\n{report}"


@pytest.mark.golden
def test_torchao_int8():
    """It multiplies by 1 / s, which moves values an ulp from a tie; its least scale is 2^-126."""
    torch = pytest.importorskip("torch")
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    block, limits = (1, 32), (torch.int8, -127, 127)

    def quantize(x):
        weights = torch.from_numpy(x.copy())
        scales, zeros = ao.choose_qparams_affine(weights, ao.MappingType.SYMMETRIC, block, *limits)
        codes = ao.quantize_affine(weights, block, scales, zeros, *limits)
        return codes.numpy(), scales.reshape(len(x), -1).numpy()

    def dequantize(codes, scales):
        return ao.dequantize_affine(
            torch.from_numpy(codes), block, torch.from_numpy(scales), None, *limits
        ).numpy()

    report = check_quantizer(
        quantize,
        dequantize,
        Format(127, 32, "float32", multiple=32, zero_scale=None),
        properties=[1, 2, 3, 5, 6, 7, 8, 9, 13, 15],
        examples=50,
    )
    assert set(report.failures) == {5, 7, 15}, f"\n{report}"


# ---- formats other than ours -----------------------------------------------------------------


def rounded_to(dtype, values):
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(dtype)


def simple(dtype, group, largest=127):
    """The rule for another scale; a scale that rounds to 0 is the least that there is."""
    format = Format(largest, group, dtype)

    def quantize(x):
        size, cols = group or x.shape[1], x.shape[1]
        if not np.isfinite(x).all():
            raise ValueError(f"group {np.argwhere(~np.isfinite(x))[0][1] // size} is not finite")
        amax = np.maximum.reduceat(abs(x), np.arange(0, cols, size), axis=1).astype(np.float64)
        scales = rounded_to(dtype, amax / largest)
        least = scales.dtype.type(format.least_scale)
        scales = np.where((scales == 0) & (amax > 0), least, scales)
        clips = np.rint(amax / np.where(scales == 0, 1, scales)) > largest
        scales = np.where(clips, scales + least, scales)
        s = np.repeat(np.where(scales == 0, 1, scales).astype(np.float64), size, axis=1)
        return np.rint(x / s[:, :cols]).astype(np.int8), scales

    def dequantize(codes, scales):
        cols = codes.shape[1]
        return codes * np.repeat(scales.astype(np.float64), group or cols, axis=1)[:, :cols]

    return quantize, dequantize, format


@pytest.mark.slow
@pytest.mark.parametrize("dtype, group", [("bfloat16", 32), ("float32", 32), ("float32", None)])
def test_other_scales_and_whole_rows(dtype, group):
    report = check_quantizer(*simple(dtype, group), examples=50)
    assert report.ok, f"\n{report}"
    assert report[10].status == ("holds" if group else "not applicable")


def test_groups_down_the_columns():
    quantize, dequantize, format = simple("float16", 32)
    down = dataclasses.replace(format, axis=0)
    turned = [lambda x: tuple(a.T for a in quantize(x.T)), lambda c, s: dequantize(c.T, s.T).T]
    report = check_quantizer(*turned, down, examples=50)
    assert report.ok, f"\n{report}"
    with pytest.raises(InputError, match="want codes .* and scales .*, all of them transposed"):
        check_quantizer(quantize, dequantize, down)


def returning_scales(x, largest, group):
    """Our rule, except that float16 scales below (M + 1) * 2^-24 are rounded up to a few of them."""
    unit = 2.0**-24
    few = [1]
    for k in range(2, largest + 2):
        # The smallest maximum that scale few[-1] clips must not be rounded down by scale k.
        least = (largest + 0.5) * few[-1] / k
        if np.rint(least) >= least:
            few.append(k)
    few = np.array(few) * unit
    amax = np.maximum.reduceat(abs(x), np.arange(0, x.shape[1], group), axis=1).astype(np.float64)
    small = (amax > 0) & (amax < (largest + 0.5) * (largest + 1) * unit)
    index = np.searchsorted((largest + 0.5) * few, amax, side="right")
    scales = np.where(
        small, few[np.minimum(index, len(few) - 1)].astype(np.float16), group_scales(x, largest, group)
    )
    return encode(x, scales, largest, group), scales


@pytest.mark.parametrize("largest", [127, 7])
def test_subnormal_scales_can_be_made_to_return(largest):
    """Property 9 for every scale: ours does not have it, and says so; a small change would."""
    format = Format(largest, 32, scale_returns="always")
    wanted = [1, 2, 3, 4, 9]
    assert check_quantizer(
        lambda x: returning_scales(x, largest, 32), dequantizer(32), format, properties=wanted, examples=200
    ).ok
    # Exhaustively, where it matters: every maximum that is a multiple of a quarter of 2^-24.
    amax = np.arange(1, 4 * 130 * (largest + 1)) * 2.0**-26
    x = amax.astype(np.float32)[:, None]
    for rule, returns in ((returning_scales, True), (quantize_groups, False)):
        codes, scales = rule(x, largest, 32)
        again, same = rule(codes * scales.astype(np.float32), largest, 32)
        where = codes[:, 0] != 0
        assert np.array_equal(scales[where], same[where]) == returns
        assert np.array_equal(codes, again) == returns


# ---- the suite as an API ---------------------------------------------------------------------


def test_the_same_arguments_give_the_same_report():
    reports = []
    for _ in range(2):
        suite._drawn.cache_clear()
        reports.append(
            check_quantizer(
                gguf_quantize,
                gguf_dequantize,
                Format(127, 32, multiple=32),
                properties=[2, 4, 5, 7],
                examples=50,
            )
        )
    assert str(reports[0]) == str(reports[1]) and reports[0].failures


def test_what_a_report_says():
    report = check_quantizer(
        gguf_quantize, gguf_dequantize, Format(127, 32, multiple=32), properties=[1, 3, 14], examples=50
    )
    lines = str(report).splitlines()
    assert lines[0].split() == "1 codes within -M .. M holds".split()
    assert lines[1].split() == "3 nothing clips FAILS".split()
    assert "|x - q s| > s / 2" in lines[2] and "x = float32 [1, 32], zeros but" in lines[3]
    assert lines[-1].strip() == "needs pack and unpack"
    assert report[3].equation == "D = q * s and |x - D| <= s / 2."


def test_every_property_has_an_equation_and_a_fault():
    assert sorted(PROPERTIES) == [*range(1, 21), *CALIBRATED]
    for number, prop in PROPERTIES.items():
        assert prop.number == number and prop.equation.endswith(".")


def test_an_exception_is_a_failure_with_its_input():
    def quantize(x):
        if (x < 0).any():
            raise ZeroDivisionError("negative")
        return quantize_groups(x, 127, 32)

    report = check_quantizer(quantize, dequantizer(32), Format(127, 32), properties=[1])
    assert report[1].detail == "raised ZeroDivisionError: negative"
    assert np.count_nonzero(report[1].example["x"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"largest": 0}, "Format: largest: want a code from 1 on, got 0"),
        ({"group_size": 0}, "Format: group_size"),
        ({"scale_dtype": "float8"}, "Format: scale_dtype: want float16 or bfloat16 or float32"),
        ({"axis": 2}, "Format: axis"),
        ({"ties": "up"}, "Format: ties"),
        ({"multiple": 0}, "Format: multiple"),
        ({"scale_returns": "never"}, "Format: scale_returns"),
        ({"not_promised": {25: "why"}}, "Format: not_promised"),
    ],
)
def test_formats_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Format(**arguments)


@pytest.mark.parametrize(
    "quantize, arguments, message",
    [
        (quantize_groups, {"properties": [25]}, "properties: want numbers from 1 to 24, got 25"),
        (quantize_groups, {"examples": 0}, "examples: want a number from 1 on, got 0"),
        (lambda x: x, {}, "want \\(codes, scales\\), got a ndarray"),
        (lambda x: (x, x[:, :1]), {}, "want codes of an integer dtype, got float32"),
        (lambda x: (x.astype(int), x), {}, r"want codes \(2, 128\) and scales \(2, 1\), got"),
    ],
)
def test_arguments_are_checked(quantize, arguments, message):
    with pytest.raises(InputError, match=message):
        check_quantizer(quantize, dequantizer(128), Format(), **arguments)


def test_without_hypothesis_there_is_one_clear_error(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("pyengine.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(InputError, match=r"want the package hypothesis: pip install 'pyengine-lm\[test\]'$"):
        getattr(importlib.import_module("pyengine.testing"), "check_quantizer")  # noqa: B009


@pytest.mark.parametrize("kind", strategies.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "format", [Format(), Format(7, 16), Format(127, None, "float32"), Format(127, 5, "bfloat16")], ids=str
)
def test_every_kind_of_group_is_within_the_format(kind, format):
    @given(kind(format, 16))
    @settings(max_examples=15, derandomize=True, database=None, deadline=None)
    def check(x):
        assert x.shape == (16,) and x.dtype == np.float32
        assert np.isfinite(x).all() and abs(x).max() <= format.limit

    check()


def test_the_example_of_the_documentation_runs():
    text = pyengine.testing.__doc__
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    with pytest.raises(AssertionError) as caught:
        exec("import numpy as np\n" + code, {})
    assert "15  NaN and infinity                    FAILS" in str(caught.value)
    assert "scales finite, zero for zeros       FAILS" in str(caught.value)


# ---- properties by name ----------------------------------------------------------------------


def test_a_property_is_its_name_and_its_number():
    from pyengine.testing.quantizer.names import Name, property_of
    from pyengine.testing.quantizer.properties import PROPERTIES

    assert list(Name) == [*ALL, *CALIBRATED] and {*PROPERTIES, Name.SELF_CHECK} == set(Name)
    for number, one in PROPERTIES.items():
        assert one.check.__name__.upper() == number.name and property_of(number.name.lower()) is number
    for wrong in ("Ties", "", "tie", 0, 25, None, 1.5):
        assert property_of(wrong) is None
    assert f"{Name.TIES} {Name.TIES!s}" == "5 5"


def test_names_and_numbers_say_the_same():
    declared = Format(127, 32, "float16", multiple=32, not_promised={"not_finite": "why", 5: "so"})
    assert declared.not_promised == {15: "why", 5: "so"}
    with pytest.raises(InputError, match="not_promised: want numbers of properties, 1 to 24, or their names"):
        Format(not_promised={"tie": "so"})
