"""Proves exp, sigmoid, silu and softplus of the C core: all 2^32 float32 arguments, every level.

    python tools/check/exhaustive_math.py                                # everything
    python tools/check/exhaustive_math.py --function exp --level scalar
    python tools/check/exhaustive_math.py --quick                        # every 997th block and edges

The C core's answer is compared with the float32 nearest to the exact value. numpy gives that value
in float64, right to 2^-49 (checked on a sample before each run); where 2^-48 either way rounds to
two different float32, `decimal` decides between them at 120 digits. NaN must give NaN. What C makes
of an argument does not enter into any of this.

Exit status 1 if any result is wrong; the first wrong ones are printed.
"""

from __future__ import annotations

import argparse
import decimal
import multiprocessing
import struct
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from pyengine._core import ffi, lib

FUNCTIONS = ("exp", "sigmoid", "silu", "softplus")
BLOCK = 1 << 16  # arguments with consecutive bit patterns: a float64 array of them stays in cache
BLOCKS = (1 << 32) // BLOCK
TASK = 64  # blocks in one task of a worker
QUICK_STEP = 997
MARGIN = 2.0**-48
SHOWN = 10
DIGITS = 120  # softplus(-104) = log(1 + 1e-45) leaves 75 of them

# What --quick must not step over: zeros, subnormals, where results leave 1 or 1/2, where they
# overflow or fade out, softplus's change to x at 20, infinities, NaN.
EDGES = (
    0.0,
    1e-45,
    2.0**-126,
    2.0**-125,
    2.0**-25,
    2.0**-24,
    2.0**-23,
    1.0,
    17.328,
    20.0,
    87.337,
    88.7228,
    103.972,
    104.0,
    108.7,
    3.4028235e38,
    float("inf"),
    float("nan"),
)


# ---- the nearest float32 -------------------------------------------------------------------------


def float64_value(function: str, x: np.ndarray) -> np.ndarray:
    """The function of a float64 array without NaN, to a relative error of 2^-49."""
    if function == "exp":
        return np.exp(x)
    if function == "sigmoid":
        return 1.0 / (1.0 + np.exp(-x))
    if function == "silu":
        value = x / (1.0 + np.exp(-x))
        value[x == -np.inf] = -0.0  # the limit
        tiny = silu_is_tiny(x)
        value[tiny] = np.nextafter(0.5 * x[tiny], np.inf)
        return value
    return np.where(x > 20.0, x, np.log1p(np.exp(x)))  # torch's softplus


def silu_is_tiny(x: np.ndarray) -> np.ndarray:
    """Where silu(x), x/2 + x^2/4, lies between x/2 and the next float64 above it.

    That float64 rounds as silu(x) does, though half of these x/2 are ties between subnormals.
    """
    return (np.abs(x) < 2.0**-100) & (x != 0.0)


def exact_value(function: str, x: float) -> decimal.Decimal:
    """The function of a finite x, nearly exactly; needs a context of DIGITS digits."""
    exact = decimal.Decimal(x)
    if function == "exp":
        return exact.exp()
    if function == "sigmoid":
        return 1 / (1 + (-exact).exp())
    if function == "silu":
        return exact / (1 + (-exact).exp())
    return exact if x > 20.0 else (1 + exact.exp()).ln()


def decide(function: str, x: float, one: np.float32, other: np.float32) -> np.float32:
    """Which of two neighbouring float32 the exact value is nearest to."""
    low, high = (one, other) if one < other else (other, one)
    # Infinity stands for 2^128, the next float32 if there were one.
    middle = (float(low) + (2.0**128 if np.isinf(high) else float(high))) / 2
    with decimal.localcontext(prec=DIGITS):
        distance = exact_value(function, x) - decimal.Decimal(middle)
    # Far from any doubt at DIGITS digits about the side on which it lies.
    assert abs(distance) > decimal.Decimal(10) ** -60 * abs(decimal.Decimal(middle)), (function, x)
    return high if distance > 0 else low


def nearest(function: str, x: np.ndarray) -> tuple[np.ndarray, int]:
    """The correctly rounded results for a float32 array without NaN; how many took `decimal`."""
    value = float64_value(function, x.astype(np.float64))
    below = (value * (1.0 - MARGIN)).astype(np.float32)
    above = (value * (1.0 + MARGIN)).astype(np.float32)
    result = value.astype(np.float32)
    undecided = below != above
    if function == "silu":
        undecided &= ~silu_is_tiny(x)
    undecided = np.flatnonzero(undecided)
    for i in undecided:
        result[i] = decide(function, float(x[i]), below[i], above[i])
    return result, len(undecided)


def check_float64(function: str) -> None:
    """Whether this numpy's exp and log1p are as good as float64_value says, on a sample."""
    generator = np.random.default_rng(1)
    x = generator.uniform(-100.0, 88.0, 2000) * 2.0 ** -generator.integers(0, 30, 2000)
    x = x.astype(np.float32).astype(np.float64)
    with decimal.localcontext(prec=DIGITS):
        for argument, value in zip(x.tolist(), float64_value(function, x).tolist()):
            error = decimal.Decimal(value) / exact_value(function, argument) - 1
            if abs(error) > decimal.Decimal(2.0**-49):
                raise SystemExit(f"numpy's {function}({argument!r}) is off by {error:.3e}")


# ---- the C core's answer -------------------------------------------------------------------------


def levels() -> list[str]:
    names = []
    while (name := lib.pe_isa_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


def core_results(function: str, level: str, x: np.ndarray, pool) -> np.ndarray:
    y = np.empty_like(x)
    lib.pe_isa_select(level.encode())
    status = getattr(lib, f"pe_{function}")(
        pool, ffi.from_buffer("float[]", x), x.size, ffi.from_buffer("float[]", y)
    )
    if status != lib.PE_OK:
        raise SystemExit(f"pe_{function}: error {status}")
    return y


@dataclass
class Tally:
    """What one level made of one function."""

    inputs: int = 0
    wrong: int = 0
    shown: list[tuple[int, int, int]] = field(default_factory=list)  # bits: x, want, got

    def add(self, other: Tally) -> None:
        self.inputs += other.inputs
        self.wrong += other.wrong
        self.shown = (self.shown + other.shown)[:SHOWN]


def compare(x: np.ndarray, want: np.ndarray, got: np.ndarray) -> Tally:
    """Bit by bit, except that any NaN is as good as another."""
    wrong = np.flatnonzero((want.view(np.uint32) != got.view(np.uint32)) & ~(np.isnan(want) & np.isnan(got)))
    shown = [tuple(int(a.view(np.uint32)[i]) for a in (x, want, got)) for i in wrong[:SHOWN]]
    return Tally(x.size, len(wrong), shown)


def check_block(function: str, block: int, names: list[str], pool) -> tuple[dict[str, Tally], int]:
    bits = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
    x = bits.astype(np.uint32).view(np.float32)
    want = np.full_like(x, np.nan)
    number = ~np.isnan(x)
    want[number], undecided = nearest(function, x[number])
    tallies = {name: compare(x, want, core_results(function, name, x, pool)) for name in names}
    return tallies, undecided


# ---- sharing out the blocks ----------------------------------------------------------------------


def check_blocks(task: tuple[str, list[int], list[str]]) -> tuple[dict[str, Tally], int]:
    """One worker's task."""
    function, blocks, names = task
    totals, undecided = {name: Tally() for name in names}, 0
    pool = ffi.gc(lib.pe_pool_new(1, 0), lib.pe_pool_free)
    with np.errstate(all="ignore"):
        for block in blocks:
            tallies, count = check_block(function, block, names, pool)
            undecided += count
            for name in names:
                totals[name].add(tallies[name])
    return totals, undecided


def blocks_to_check(quick: bool) -> list[int]:
    if not quick:
        return list(range(BLOCKS))
    chosen = set(range(0, BLOCKS, QUICK_STEP))
    for edge in EDGES:
        for signed in (edge, -edge):
            bits = struct.unpack("<I", struct.pack("<f", signed))[0]
            chosen.update(b % BLOCKS for b in (bits // BLOCK - 1, bits // BLOCK, bits // BLOCK + 1))
    return sorted(chosen)


def progress(results, count: int, function: str):
    if not sys.stderr.isatty():
        return results
    from tqdm import tqdm

    return tqdm(results, total=count, desc=function, unit="task")


def check_function(function: str, names: list[str], blocks: list[int], workers) -> int:
    """Prints one line for each level; returns how many results are wrong."""
    check_float64(function)
    start = time.monotonic()
    tasks = [(function, blocks[i : i + TASK], names) for i in range(0, len(blocks), TASK)]
    totals, undecided = {name: Tally() for name in names}, 0
    for tallies, count in progress(workers.imap(check_blocks, tasks), len(tasks), function):
        undecided += count
        for name in names:
            totals[name].add(tallies[name])
    for name, total in totals.items():
        print(f"{function} {name}: {total.inputs} inputs, {total.wrong} wrong")
        for x, want, got in total.shown:
            value = np.uint32(x).view(np.float32)
            print(f"    x = {value!s} (0x{x:08x}): want 0x{want:08x}, got 0x{got:08x}")
    print(f"{function}: {undecided} decided at {DIGITS} digits, {time.monotonic() - start:.0f} s", flush=True)
    return sum(total.wrong for total in totals.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--function", choices=FUNCTIONS, action="append", help="default: all")
    parser.add_argument("--level", choices=levels(), action="append", help="default: all here")
    parser.add_argument("--quick", action="store_true", help="every 997th block, and the edges")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    names, blocks = options.level or levels(), blocks_to_check(options.quick)
    with multiprocessing.Pool(options.jobs) as workers:
        wrong = sum(
            check_function(function, names, blocks, workers) for function in options.function or FUNCTIONS
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
