"""The C core: every operation of csrc/pyengine.h against its contract, in bits.

Each case is computed by locked_numpy.py (the contract restated), then by the C core on every
instruction set of this build and processor and with 1, 2 and 3 threads, its arrays lying flush
against unreadable pages (guard.py).  The scalar level must equal the restatement, every other run
the scalar level.  No tolerance anywhere.

    pytest tests/test_kernels.py                  the fast part
    pytest tests/test_kernels.py -m slow          large shapes
    tools/check_sanitizers.sh                     the same tests under ASan and UBSan
    tools/check_neon.sh                           kernels_main.c, on an emulated 64-bit ARM
"""

import ctypes
import decimal
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import guard
import locked_numpy as locked
import numpy as np
import pytest
from bits import assert_same_bits, differing
from guard import Memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from locked_numpy import BLOCK, F32, GROUP, Matrix

from pyengine import _core

ffi, lib = _core.ffi, _core.lib

SEED = 1729
OK, NONFINITE, ARGUMENT = lib.PE_OK, lib.PE_ERROR_NONFINITE, lib.PE_ERROR_ARGUMENT
# Every placement alone, then more threads.
RUNS = [("end", 1), ("start", 1), ("shifted", 1), ("end", 2), ("end", 3)]
TYPES = ["F32", "F16", "BF16", "Q8_0", "INT8", "INT4"]
NON_FINITE = [np.nan, -np.nan, np.inf, -np.inf]
# One of each kind at every size of vector and of unrolled loop, and a few beyond.
TAILS = [*range(1, 36), 47, 48, 49, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 130, 191, 255, 256, 257]

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


def examples(count):
    """hypothesis, the same shapes on every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- levels, threads, calls ------------------------------------------------------------------------


def list_levels():
    names = []
    while (name := lib.pe_isa_name(len(names))) != ffi.NULL:
        names.append(ffi.string(name).decode())
    return names


LEVELS = list_levels()
POOLS = {n: ffi.gc(lib.pe_pool_new(n, 0), lib.pe_pool_free) for n in (1, 2, 3)}


@contextmanager
def level(name):
    """That instruction set, really in use; the highest one afterwards."""
    assert lib.pe_isa_select(name.encode()) == OK
    assert ffi.string(lib.pe_isa_active()).decode() == name
    try:
        yield
    finally:
        assert lib.pe_isa_select(LEVELS[-1].encode()) == OK


def pointer(array, kind="float *"):
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


def floats(*arrays):
    return [pointer(array) for array in arrays]


def succeed(status):
    assert status == OK, f"status {status}"


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def one_run(run, name, placement, threads):
    """run(pool, memory) at one level -> copies of its results."""
    memory = Memory(placement)
    with level(name):
        results = as_tuple(run(POOLS[threads], memory))
    memory.check()
    return tuple(np.array(r) for r in results)


def check(run, expected, any_nan=False, runs=RUNS):
    """run(pool, memory) gives expected at the scalar level, and the scalar level's bits elsewhere."""
    expected = as_tuple(expected)
    for name in LEVELS:
        for placement, threads in runs:
            got = one_run(run, name, placement, threads)
            assert len(got) == len(expected)
            for i, (a, b) in enumerate(zip(got, expected)):
                what = f"{name}, {placement}, {threads} threads, output {i}"
                assert_same_bits(a, b, what, any_nan)
            expected = got  # from here on, the scalar level's own


def rng_of(*key):
    return np.random.default_rng([SEED, *(abs(int(k)) for k in key)])


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(F32)


def wide(rng, *shape):
    """Magnitudes from 2^-20 to 2^20: sums in another order come out different."""
    return (normal(rng, *shape) * np.exp2(rng.integers(-20, 21, shape))).astype(F32)


def run_apart(program):
    """A program in a process of its own, with this module as k: what may crash.  -> exit status"""
    environment = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", "import test_kernels as k\n" + program],
                          cwd=Path(__file__).parent, env=environment, capture_output=True)
    return done.returncode


# ---- the tools themselves --------------------------------------------------------------------------


class TestComparison:
    def test_equal_bits_pass(self):
        x = np.array([0.0, -0.0, np.nan, np.inf], F32)
        assert_same_bits(x, x.copy())

    def test_one_ulp_is_found_and_reported(self):
        want = np.linspace(1, 2, 12, dtype=F32).reshape(3, 4)
        got = want.copy()
        got[1, 2] = np.nextafter(got[1, 2], F32(0))
        with pytest.raises(AssertionError, match=r"op: 1 of 12 differ; first at \(1, 2\): .* 1 ulp"):
            assert_same_bits(got, want, "op")

    def test_count_and_largest_difference(self):
        want = np.ones(5, F32)
        got = want.copy()
        got.view(np.uint32)[[1, 4]] += np.array([3, 7], np.uint32)
        with pytest.raises(AssertionError, match=r"2 of 5 differ; first at \(1,\).* 7 ulp"):
            assert_same_bits(got, want)

    def test_sign_of_zero_counts(self):
        assert differing(np.array([-0.0], F32), np.array([0.0], F32)).all()

    def test_nan_payload_counts_unless_told(self):
        a, b = np.array([0x7FC00000, 0xFFC00001], np.uint32).view(F32)[:, None]
        assert differing(a, b).all()
        assert not differing(a, b, any_nan=True).any()


class TestGuard:
    @pytest.mark.parametrize("placement", guard.PLACEMENTS)
    def test_placement_and_poison(self, placement):
        memory = Memory(placement)
        y = memory.output((3, 5), ld=8)
        assert (memory.blocks[0].flat.view(np.uint32) == guard.POISON).all()
        assert memory.blocks[0].flat.size == 2 * 8 + 5
        assert np.isnan(y).all()
        if placement == "shifted":
            assert y.ctypes.data % 64 == 4
        memory.check()

    @pytest.mark.parametrize("placement", guard.PLACEMENTS)
    def test_writes_outside_are_noticed(self, placement):
        for offset, complaint in [(-1, "before"), (0, None), (4, None), (5, "gap"), (13, "past")]:
            memory = Memory(placement)
            memory.output((2, 5), ld=8)
            block = memory.blocks[0]
            at = block.start + 4 * offset
            if not 0 <= at < block.pages.size:
                continue
            block.pages[at : at + 4] = 0
            if complaint is None:
                memory.check()
            else:
                with pytest.raises(AssertionError, match=complaint):
                    memory.check()

    def test_written_input_is_noticed(self):
        memory = Memory("end")
        memory.input(np.arange(4, dtype=F32))[2] = 7
        with pytest.raises(AssertionError, match="input was written, at element 2"):
            memory.check()

    @pytest.mark.skipif(not guard.AVAILABLE, reason="no mprotect")
    @pytest.mark.parametrize("placement, index", [("end", 8), ("start", -1)])
    def test_reading_outside_is_a_fault(self, placement, index):
        program = ("import ctypes, numpy, guard\n"
                   f"x = guard.Memory({placement!r}).output(8)\n"
                   "read = lambda i: ctypes.c_uint32.from_address(x.ctypes.data + 4 * i).value\n"
                   "assert read(0) == read(7) == guard.POISON\n"
                   f"print('inside', flush=True); read({index}); print('outside')\n")
        done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent,
                              capture_output=True, text=True)
        assert done.returncode != 0 and done.stdout == "inside\n", done


def test_expected_build_is_loaded():
    """tools/check_sanitizers.sh says where its build lies, and that it calls the sanitizers."""
    folder = os.environ.get("PYENGINE_SANITIZED_BUILD")
    if not folder:
        pytest.skip("PYENGINE_SANITIZED_BUILD is not set")
    path = Path(_core.__file__).resolve()
    assert path.is_relative_to(Path(folder).resolve())
    content = path.read_bytes()
    assert b"__asan_report_load" in content and b"__ubsan_handle" in content


class TestLevelsAndPool:
    def test_levels(self):
        known = {"scalar", "avx2", "avx512vnni", "neon", "neon_dotprod"}
        assert LEVELS[0] == "scalar" and set(LEVELS) <= known
        assert len(set(LEVELS)) == len(LEVELS)
        for name in LEVELS:
            with level(name):
                pass
        assert ffi.string(lib.pe_isa_active()).decode() == LEVELS[-1]

    def test_out_of_range_names(self):
        assert lib.pe_isa_name(-1) == ffi.NULL
        assert lib.pe_isa_name(len(LEVELS)) == ffi.NULL
        assert lib.pe_isa_name(2**31 - 1) == ffi.NULL

    @pytest.mark.parametrize("name", [b"", b"Scalar", b"scala", b"scalar ", b"sse9"])
    def test_unknown_level_changes_nothing(self, name):
        assert lib.pe_isa_select(name) == ARGUMENT
        assert ffi.string(lib.pe_isa_active()).decode() == LEVELS[-1]

    def test_pool_sizes(self):
        for n in (-1, 0, 1025):
            assert lib.pe_pool_new(n, 0) == ffi.NULL
        for n, pool in POOLS.items():
            assert lib.pe_pool_threads(pool) == n
        lib.pe_pool_free(ffi.NULL)

    def test_pinned_pool(self):
        x = normal(rng_of(1), 5000)
        y = np.empty_like(x)
        pool = lib.pe_pool_new(4, 1)
        succeed(lib.pe_exp(pool, pointer(x), x.size, pointer(y)))
        lib.pe_pool_free(pool)
        assert_same_bits(y, locked.exp(x))

    def test_many_jobs_in_a_row(self):
        """Helpers that spin, helpers that sleep, jobs that end before a helper woke."""
        x = normal(rng_of(2), 3000)
        want, y = locked.exp(x), np.empty_like(x)
        for _ in range(300):
            y[:] = np.nan
            succeed(lib.pe_exp(POOLS[3], pointer(x), x.size, pointer(y)))
            assert_same_bits(y, want)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_pool_after_fork(self):
        """The child has no helpers; it must not wait for them."""
        import signal

        x = normal(rng_of(3), 3000)
        want, y = locked.exp(x), np.empty_like(x)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            status = lib.pe_exp(POOLS[3], pointer(x), x.size, pointer(y))
            os._exit(0 if status == OK and not differing(y, want).any() else 1)
        assert os.waitpid(child, 0)[1] == 0


# ---- the host's floating-point environment ---------------------------------------------------------

# Words of fenv_t, the word that controls rounding and subnormals, and the bits for: round up, flush
# subnormal results to zero, take subnormal operands for zero.
FENV = {"x86_64": (8, 7, 0xC040), "aarch64": (2, 0, 0x01400000)}


@contextmanager
def hostile_environment():
    words, control, bits = FENV[platform.machine()]
    libm = ctypes.CDLL(None)
    saved, changed = (ctypes.c_uint32 * words)(), (ctypes.c_uint32 * words)()
    libm.fegetenv(saved)
    libm.fegetenv(changed)
    changed[control] |= bits
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(saved)


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() not in FENV,
                    reason="layout of fenv_t unknown")
class TestHostEnvironment:
    """A host program may round elsewhere or flush subnormals (any library built with -ffast-math
    does); results must not show it."""

    X = np.concatenate([normal(rng_of(4), 500), normal(rng_of(5), 500) * F32(1e-40)])

    def in_hostile_environment(self, call, want):
        for name in LEVELS:
            for threads in (1, 3):
                got = np.full_like(want, np.nan)
                pool, address = POOLS[threads], pointer(got)
                with level(name):
                    with hostile_environment():
                        status = call(pool, address)
                    succeed(status)
                    assert_same_bits(got, want, f"{name}, {threads} threads")

    def test_elementwise(self):
        x = np.concatenate([self.X, np.linspace(-104, -80, 3000, dtype=F32)])
        address = pointer(x)
        self.in_hostile_environment(lambda pool, y: lib.pe_exp(pool, address, x.size, y),
                                    locked.exp(x))

    def test_rope(self):
        x = self.X.reshape(10, 10, 10)
        cos, sin = normal(rng_of(6), 10, 5), normal(rng_of(7), 10, 5)
        want = locked.rope(x, cos, sin)
        c, s, source = pointer(cos), pointer(sin), ffi.from_buffer(x)

        def call(pool, y):
            ffi.memmove(y, source, x.nbytes)
            return lib.pe_rope(pool, y, 10, 10, 10, 5, c, s)

        self.in_hostile_environment(call, want)

    def test_rope_table(self):
        inv_freq = np.array([1, 0.1, 1e-3, 1e-40], F32)
        frequencies, sin = pointer(inv_freq), np.empty((50, 4), F32)
        sin_address = pointer(sin)
        want, _ = locked.rope_table(1000, 50, inv_freq)
        self.in_hostile_environment(
            lambda _, cos: lib.pe_rope_table(1000, 50, frequencies, 4, cos, sin_address), want)


# ---- quantize_activations --------------------------------------------------------------------------


def run_quantize(x):
    def run(pool, memory):
        tokens, cols = x.shape
        groups = locked.groups_of(cols)
        q = memory.output((tokens, groups * GROUP), np.int16)
        scales = memory.output((tokens, groups))
        succeed(lib.pe_quantize_activations(pool, pointer(memory.input(x)), tokens, cols,
                                            pointer(q, "int16_t *"), pointer(scales)))
        return q, scales

    return run


def check_quantize(x):
    check(run_quantize(x), locked.quantize_activations(x))


def with_largest(rows, largest):
    """rows [n, 127] and a column of +-largest, which fixes the scale of its group."""
    rows = np.asarray(rows, F32)
    column = np.where(np.arange(len(rows)) % 2, -largest, largest).astype(F32)
    return np.column_stack([rows, column])


def tie_rows(s):
    """(k + 1/2) s for every k of int16, both signs, in rows of 126 (the last padded with 0)."""
    k = np.arange(32767)
    ties = np.stack([(k + 0.5) * s, -(k + 0.5) * s], 1).ravel()
    rows = np.zeros((-(-ties.size // 126), 127))
    rows[:, :126].flat[: ties.size] = ties
    return rows


def near_ties():
    """(k + 1/2) s, one ulp more and one less, for any s."""
    rng = rng_of(8)
    largest = wide(rng, 600, 1)[:, 0]
    s = (np.abs(largest) / F32(32767)).astype(np.float64)[:, None]
    x = ((rng.integers(-32700, 32700, (600, 127)) + 0.5) * s).astype(F32)
    x.view(np.uint32)[...] += rng.integers(-1, 2, x.shape).astype(np.uint32)
    return np.column_stack([x, largest])


class TestQuantizeActivations:
    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_every_tail(self, tokens):
        for cols in TAILS:
            check_quantize(wide(rng_of(cols, tokens), tokens, cols))

    def test_shared_out(self):
        for tokens, cols in [(70, 130), (9, 2048), (200, 5), (65, 128)]:
            check_quantize(normal(rng_of(tokens, cols), tokens, cols))

    @pytest.mark.parametrize("s", [2.0**-9, 1.0, 3 * 2.0**-10, 5 * 2.0**7, 255 * 2.0**-40])
    def test_ties_go_to_even(self, s):
        """s has at most 8 bits, so 32767 s and (k + 1/2) s are float32 and x / s is a tie, exactly."""
        x = with_largest(tie_rows(s), 32767 * s)
        q, scales = locked.quantize_activations(x)
        assert (scales == s).all() and (np.abs(q[:, :126]) % 2 == 0).all()
        check(run_quantize(x), (q, scales), runs=[("end", 1), ("start", 3)])

    def test_near_ties(self):
        check_quantize(near_ties())

    def test_quantiser_extremes(self):
        tiny = [0.0, -0.0, 1e-45, 2.0**-126, 2.0**-101, np.nextafter(F32(2.0**-100), F32(0)),
                2.0**-100, np.nextafter(F32(2.0**-100), F32(1)), 2.0**-99, 1.0, 2.0**120,
                np.finfo(F32).max]
        for a in tiny:
            x = np.zeros((2, 131), F32)
            x[0, [3, 129]] = [-a, a]
            x[1] = np.linspace(-float(a), float(a), 131).astype(F32)
            check_quantize(x)

    def test_groups_are_independent(self):
        scale = np.repeat(F32(10.0) ** np.arange(-12, 12, 3, dtype=F32), GROUP)
        check_quantize(normal(rng_of(9), 3, scale.size) * scale)

    @pytest.mark.parametrize("bad", NON_FINITE)
    def test_nonfinite(self, bad):
        for tokens, cols in [(1, 1), (1, 7), (2, 130), (1, 128), (3, 200), (70, 257)]:
            for column in sorted({0, cols // 2, cols - 2, cols - 1} - {-1}):
                x = normal(rng_of(cols), tokens, cols)
                x[-1, column] = bad
                for name in LEVELS:
                    assert self.status(name, x) == NONFINITE

    @pytest.mark.slow
    @pytest.mark.parametrize("bad", NON_FINITE)
    def test_nonfinite_anywhere(self, bad):
        for cols in range(1, 129):
            for column in range(cols):
                x = np.zeros((1, cols), F32)
                x[0, column] = bad
                for name in LEVELS:
                    assert self.status(name, x) == NONFINITE

    @staticmethod
    def status(name, x):
        memory = Memory("end")
        groups = locked.groups_of(x.shape[1])
        q = memory.output((len(x), groups * GROUP), np.int16)
        scales = memory.output((len(x), groups))
        with level(name):
            status = lib.pe_quantize_activations(POOLS[2], pointer(memory.input(x)), *x.shape,
                                                 pointer(q, "int16_t *"), pointer(scales))
        memory.check()
        return status

    @pytest.mark.parametrize("wrong", [
        lambda x, s: np.rint(x * (F32(1) / s)),
        lambda x, s: np.rint(x.astype(np.float64) / s),
        lambda x, s: np.sign(x) * np.floor(np.abs(x / s) + 0.5),
        lambda x, s: np.floor(x / s + 0.5),
        lambda x, s: np.trunc(x / s)],
        ids=["reciprocal", "float64 quotient", "half away from zero", "half up", "truncated"])
    def test_control_wrong_rounding(self, wrong):
        """test_near_ties sees each other way to round."""
        x = near_ties()
        _, s = locked.quantize_activations(x)
        with pytest.raises(AssertionError, match="output 0: .* differ"):
            check(run_quantize(x), (wrong(x, s).astype(np.int16), s))


# ---- matmul ----------------------------------------------------------------------------------------


def random_matrix(rng, kind, rows, cols):
    if kind == "F32":
        return Matrix(kind, wide(rng, rows, cols))
    if kind == "F16":
        return Matrix(kind, (normal(rng, rows, cols) * F32(0.01)).astype(np.float16))
    if kind == "BF16":
        return Matrix(kind, (wide(rng, rows, cols).view(np.uint32) >> 16).astype(np.uint16))
    limit = {"Q8_0": (-128, 128), "INT8": (-127, 128), "INT4": (-7, 8)}[kind]
    codes = rng.integers(*limit, (rows, cols)).astype(np.int8)
    shape = (rows, cols // BLOCK) if kind == "Q8_0" else (locked.groups_of(cols), rows)
    return Matrix(kind, codes, random_scales(rng, shape))


def random_scales(rng, shape):
    return (rng.uniform(0.5, 1, shape) * np.exp2(rng.integers(-12, 1, shape))).astype(np.float16)


def packed(w):
    """The matrix as stored: uint8 [rows, bytes of a row]."""
    rows, cols = w.shape
    if w.type == "INT4":
        nibbles = (w.codes + 8).astype(np.uint8)
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    if w.type == "Q8_0":
        blocks = cols // BLOCK
        out = np.empty((rows, blocks, 2 + BLOCK), np.uint8)
        out[:, :, :2] = np.ascontiguousarray(w.scales).view(np.uint8).reshape(rows, blocks, 2)
        out[:, :, 2:] = w.codes.view(np.uint8).reshape(rows, blocks, BLOCK)
        return out.reshape(rows, -1)
    return np.ascontiguousarray(w.codes).view(np.uint8).reshape(rows, -1)


def place_stack(memory, matrices, extra_scale_ld=0, gap=0):
    """A stack of matrices as a pe_matrix: gap bytes between two experts, extra_scale_ld float16
    between two groups' scales.  The last group's scales end with the last row, as they do where
    up's scales are a view into the second half of gate_up's."""
    first = matrices[0]
    data = np.stack([packed(w).ravel() for w in matrices])
    w = ffi.new("pe_matrix *")
    w.type = getattr(lib, f"PE_{first.type}")
    w.rows, w.cols = first.shape
    w.expert_stride = data.shape[1] + gap
    w.data = pointer(memory.input(data, ld=w.expert_stride), "void *")
    if first.type in ("INT8", "INT4"):
        scales = np.stack([w.scales for w in matrices])
        w.scale_ld = w.rows + extra_scale_ld
        w.scale_expert_stride = scales.shape[1] * w.scale_ld + gap
        placed = memory.input(scales, ld=(w.scale_expert_stride, w.scale_ld))
        w.scales = pointer(placed, "uint16_t *")
    return w


def place_activations(memory, cols, tokens, x=None, q=None, s_x=None):
    """What the matrix does not read is NULL."""
    a = ffi.new("pe_activations *")
    a.tokens, a.cols = tokens, cols
    a.x = ffi.NULL if x is None else pointer(memory.input(x))
    a.q = ffi.NULL if q is None else pointer(memory.input(q), "int16_t *")
    a.scales = ffi.NULL if s_x is None else pointer(memory.input(s_x))
    return a


def run_matmul(matrices, expert, inputs, extra_ldy=0, extra_scale_ld=0, gap=0):
    def run(pool, memory):
        rows, cols = matrices[0].shape
        tokens = len(inputs.get("x", inputs.get("q")))
        w = place_stack(memory, matrices, extra_scale_ld, gap)
        a = place_activations(memory, cols, tokens, **inputs)
        y = memory.output((tokens, rows), ld=rows + extra_ldy)
        succeed(lib.pe_matmul(pool, w, expert, a, pointer(y), rows + extra_ldy))
        return y

    return run


def inputs_for(w, x):
    if w.dense:
        return {"x": x}
    q, s_x = locked.quantize_activations(x)
    return {"q": q, "s_x": s_x}


def check_matmul(w, inputs, runs=RUNS, any_nan=False, **layout):
    check(run_matmul([w], 0, inputs, **layout), locked.matmul(w, **inputs), any_nan, runs)


def check_random_matmul(kind, rows, cols, tokens, runs=RUNS, **layout):
    rng = rng_of(TYPES.index(kind), rows, cols, tokens)
    w = random_matrix(rng, kind, rows, cols)
    check_matmul(w, inputs_for(w, wide(rng, tokens, cols)), runs, **layout)


def columns_step(kind):
    return {"Q8_0": BLOCK, "INT4": 2}.get(kind, 1)


def extreme_inputs(tokens, cols, value, scale):
    """q = value in every real column, +-alternating if value is 0: the largest int32 sums."""
    q = np.zeros((tokens, locked.groups_of(cols) * GROUP), np.int16)
    q[:, :cols] = value or 32767 * (1 - 2 * (np.arange(cols) % 2))
    return {"q": q, "s_x": np.full((tokens, locked.groups_of(cols)), scale, F32)}


@pytest.mark.parametrize("kind", TYPES)
class TestMatmul:
    def test_every_tail_of_columns(self, kind):
        step = columns_step(kind)
        for cols in sorted({-(-c // step) * step for c in TAILS} | {384, 416, 512}):
            check_random_matmul(kind, 3, cols, 2)

    def test_every_number_of_rows(self, kind):
        for rows in [*range(1, 36), 63, 64, 65, 97, 130]:
            check_random_matmul(kind, rows, 160, 1, runs=RUNS[:1] + RUNS[-2:])

    def test_every_number_of_tokens(self, kind):
        for tokens in [*range(1, 18), 31, 32, 33, 65]:
            check_random_matmul(kind, 6, 192, tokens, runs=RUNS[:2])
            check_random_matmul(kind, 33, 64, tokens, runs=RUNS[-1:])

    @examples(60)
    @given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 9), st.integers(0, 3),
           st.integers(0, 3), st.sampled_from(RUNS))
    def test_any_shape(self, kind, rows, cols, tokens, extra_ldy, extra_scale_ld, run):
        step = columns_step(kind)
        check_random_matmul(kind, rows, -(-cols // step) * step, tokens, [run],
                            extra_ldy=extra_ldy, extra_scale_ld=extra_scale_ld)

    def test_strides(self, kind):
        for extra in (1, 3, 29):
            check_random_matmul(kind, 37, 160, 3, extra_ldy=extra, extra_scale_ld=extra)

    def test_stack_of_experts(self, kind):
        rng = rng_of(TYPES.index(kind), 10)
        stack = [random_matrix(rng, kind, 5, 160) for _ in range(4)]
        inputs = inputs_for(stack[0], wide(rng, 3, 160))
        for e, w in enumerate(stack):
            for gap in (0, 64, 2):
                check(run_matmul(stack, e, inputs, extra_scale_ld=gap, gap=gap),
                      locked.matmul(w, **inputs))

    def test_no_tokens(self, kind):
        w = random_matrix(rng_of(11), kind, 5, 64)
        run = run_matmul([w], 0, inputs_for(w, np.zeros((0, 64), F32)))
        check(run, np.zeros((0, 5), F32))

    @pytest.mark.slow
    def test_large(self, kind):
        for rows, cols, tokens in [(2048, 512, 1), (700, 2048, 5), (300, 1056, 70)]:
            check_random_matmul(kind, rows, cols, tokens)

    def test_argument_errors(self, kind):
        memory = Memory("end")
        matrix = random_matrix(rng_of(12), kind, 5, 64)
        w = place_stack(memory, [matrix])
        a = place_activations(memory, 64, 2, **inputs_for(matrix, normal(rng_of(13), 2, 64)))
        y = memory.output((2, 5))

        def status(target=None, field=None, value=None, ldy=5):
            old = field and getattr(target, field)
            if field:
                setattr(target, field, value)
            result = lib.pe_matmul(POOLS[1], w, 0, a, pointer(y), ldy)
            if field:
                setattr(target, field, old)
            return result

        for bad in (-1, 6, 2**31 - 1):
            assert status(w, "type", bad) == ARGUMENT
        for field in ("rows", "cols"):
            for bad in (0, -1):
                assert status(w, field, bad) == ARGUMENT
        for bad in (32, 96, 128):
            assert status(a, "cols", bad) == ARGUMENT
        assert status(w, "data", ffi.NULL) == ARGUMENT
        assert status(a, "tokens", -1) == ARGUMENT
        assert status(ldy=4) == ARGUMENT
        for field in ("x",) if matrix.dense else ("q", "scales"):
            assert status(a, field, ffi.NULL) == ARGUMENT
        if kind in ("INT8", "INT4"):
            assert status(w, "scales", ffi.NULL) == ARGUMENT
            assert status(w, "scale_ld", 4) == ARGUMENT
        assert np.isnan(y).all(), "an error wrote output"
        assert status() == OK
        memory.check()


class TestMatmulEach:
    """Several matrices of one input, as one piece of work: the same as one after another."""

    @pytest.mark.parametrize("tokens", [1, 5, 70])
    def test_outputs_one_after_another(self, tokens):
        rng = rng_of(20, tokens)
        matrices = [random_matrix(rng, kind, rows, 160)
                    for kind, rows in (("Q8_0", 40), ("F32", 1), ("INT8", 7), ("BF16", 33))]
        x = wide(rng, tokens, 160)
        q, s_x = locked.quantize_activations(x)

        def run(pool, memory):
            stored = [place_stack(memory, [w]) for w in matrices]
            a = place_activations(memory, 160, tokens, x=x, q=q, s_x=s_x)
            y = memory.output(tokens * sum(w.shape[0] for w in matrices))
            succeed(lib.pe_matmul_each(pool, ffi.new("pe_matrix *[]", stored), len(stored), a,
                                       pointer(y)))
            return y

        parts = [locked.matmul(w, **({"x": x} if w.dense else {"q": q, "s_x": s_x}))
                 for w in matrices]
        check(run, np.concatenate([part.ravel() for part in parts]))

    def test_argument_errors(self):
        memory = Memory("end")
        matrix = random_matrix(rng_of(21), "F32", 5, 64)
        w = place_stack(memory, [matrix])
        a = place_activations(memory, 64, 2, x=normal(rng_of(22), 2, 64))
        y = memory.output(10 * (lib.PE_EACH + 1))
        pointers = ffi.new("pe_matrix *[]", [w] * (lib.PE_EACH + 1))
        for count in (-1, lib.PE_EACH + 1):
            assert lib.pe_matmul_each(POOLS[1], pointers, count, a, pointer(y)) == ARGUMENT
        a.tokens = -1
        assert lib.pe_matmul_each(POOLS[1], pointers, 2, a, pointer(y)) == ARGUMENT
        assert np.isnan(y).all(), "an error wrote output"
        memory.check()


class TestMatmulColumns:
    """cols that the type excludes."""

    @pytest.mark.parametrize("kind, excluded", [("Q8_0", [1, 16, 31, 33, 127]), ("INT4", [1, 63, 129])])
    def test_excluded(self, kind, excluded):
        memory = Memory("end")
        w = place_stack(memory, [random_matrix(rng_of(14), kind, 2, 128)])
        for cols in excluded:
            a = place_activations(memory, cols, 1, **extreme_inputs(1, cols, 1, 1.0))
            w.cols = cols
            assert lib.pe_matmul(POOLS[1], w, 0, a, pointer(memory.output(2)), 2) == ARGUMENT


LIMITS = {"Q8_0": (-128, 127), "INT8": (-127, 127), "INT4": (-7, 7)}


@pytest.mark.parametrize("kind", LIMITS)
class TestMatmulExtremes:
    COLS = 288

    def matrix(self, kind, codes, scale):
        rows = len(codes)
        shape = (rows, self.COLS // BLOCK) if kind == "Q8_0" else (locked.groups_of(self.COLS), rows)
        return Matrix(kind, np.ascontiguousarray(codes, np.int8),
                      np.broadcast_to(np.asarray(scale, np.float16), shape).copy())

    def codes(self, kind):
        """Rows of: the lowest code, the highest, alternating both ways, 0, 1, -1."""
        low, high = LIMITS[kind]
        odd = np.arange(self.COLS) % 2
        rows = [low + 0 * odd, high + 0 * odd, np.where(odd, low, high), np.where(odd, high, low),
                0 * odd, 1 + 0 * odd, -1 + 0 * odd]
        return np.stack(rows)

    @pytest.mark.parametrize("value", [32767, -32767, 0, 1, -1])
    def test_largest_sums(self, kind, value):
        w = self.matrix(kind, self.codes(kind), 1.0)
        for tokens in (1, 2, 5, 8):
            check_matmul(w, extreme_inputs(tokens, self.COLS, value, 1.0))

    @pytest.mark.parametrize("s_w", [0.0, -0.0, 2.0**-24, 2.0**-15, 2.0**-14, 65504.0, -65504.0, -1.0])
    def test_scales(self, kind, s_w):
        """Zero, subnormal, largest and negative weight scales, with the smallest and largest
        activation scales: 2^-24 * 2^-115 is a subnormal float32 and must not be flushed; 65504 times
        the largest is infinite, and with a sum of 0 a NaN."""
        w = self.matrix(kind, self.codes(kind), s_w)
        for s_x in (0.0, 2.0**-115, 1.5 * 2.0**-115, 1.0, 1.0383e34):
            for value in (32767, 3, 0):
                check_matmul(w, extreme_inputs(3, self.COLS, value, s_x), RUNS[:1], any_nan=True)

    def test_one_column_at_a_time(self, kind):
        """Every column meets its own code: a swapped nibble, block or half shows."""
        rng = rng_of(15)
        w = random_matrix(rng, kind, 5, self.COLS)
        q = np.zeros((self.COLS, locked.groups_of(self.COLS) * GROUP), np.int16)
        q[np.arange(self.COLS), np.arange(self.COLS)] = 1 + np.arange(self.COLS)
        s_x = np.ones((self.COLS, locked.groups_of(self.COLS)), F32)
        check_matmul(w, {"q": q, "s_x": s_x}, runs=RUNS[:1])

    def test_every_code(self, kind):
        low, high = LIMITS[kind]
        codes = np.resize(np.arange(low, high + 1), (9, self.COLS))
        w = self.matrix(kind, codes, 1.0)
        q, s_x = locked.quantize_activations(wide(rng_of(16), 4, self.COLS))
        check_matmul(w, {"q": q, "s_x": s_x})


class TestMatmulDenseExtremes:
    def test_every_f16(self):
        """Every finite half, subnormals too, times 1 in its own column."""
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = np.resize(halves[np.isfinite(halves)], (62, 1024))
        check_matmul(Matrix("F16", halves), {"x": np.eye(1, 1024, 5, dtype=F32)}, runs=RUNS[:1])
        check_matmul(Matrix("F16", halves.reshape(-1, 1)), {"x": np.ones((1, 1), F32)}, runs=RUNS[:1])

    def test_every_bf16(self):
        values = np.arange(1 << 16, dtype=np.uint16)
        values = values[(values & 0x7F80) != 0x7F80].reshape(-1, 1)
        check_matmul(Matrix("BF16", values), {"x": np.ones((1, 1), F32)}, runs=RUNS[:1])

    @pytest.mark.parametrize("cols", [1, 8, 9, 24, 31])
    def test_magnitudes(self, cols):
        """Subnormal products survive in float64; a sum beyond float32 is infinite, not an error."""
        for weight, x in [(1e-45, 1.0), (1e-40, 1e38), (3e38, 3e38), (-3e38, 1.0), (0.0, -1.0)]:
            w = Matrix("F32", np.full((3, cols), weight, F32))
            check_matmul(w, {"x": np.full((2, cols), x, F32)})

    @staticmethod
    def cancelling(kind):
        """Large terms that cancel: what is left is decided by the order of the sum."""
        rng = rng_of(17)
        w, x = random_matrix(rng, kind, 9, 203), wide(rng, 4, 203)
        w.codes[:, 100:200] = w.codes[:, :100]
        x[:, 100:200] = -x[:, :100]
        x[:, 200:] *= F32(1e-20)
        return w, x

    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_cancellation(self, kind):
        w, x = self.cancelling(kind)
        check_matmul(w, {"x": x})

    def test_control_order_of_the_sum(self):
        """A sum in ascending order, or with another tree, is seen to differ."""
        w, x = self.cancelling("F32")
        products = x.astype(np.float64)[:, None, :] * w.values().astype(np.float64)
        other_orders = {
            "ascending": locked.ascending(np.moveaxis(products, 2, 0)),
            "four lanes": locked.halve(locked.lanes(products, 4)),
            "neighbours": pairwise_neighbours(locked.lanes(products, 8)),
        }
        for wrong in other_orders.values():
            with pytest.raises(AssertionError, match="differ"):
                check(run_matmul([w], 0, {"x": x}), wrong.astype(F32))

    def test_control_order_of_the_groups(self):
        """Groups added in falling order, or scales multiplied in another order, are seen."""
        rng = rng_of(18)
        w = random_matrix(rng, "INT8", 9, 640)
        q, s_x = locked.quantize_activations(wide(rng, 4, 640))
        columns = [slice(g * GROUP, (g + 1) * GROUP) for g in range(5)]
        terms = [locked.exact_dot(q[:, c], w.codes[:, c])
                 * (w.scales[g].astype(F32) * s_x[:, g, None]) for g, c in enumerate(columns)]
        other = [(locked.exact_dot(q[:, c], w.codes[:, c]) * w.scales[g].astype(F32))
                 * s_x[:, g, None] for g, c in enumerate(columns)]
        for wrong in (locked.ascending(terms[::-1]), locked.ascending(other)):
            with pytest.raises(AssertionError, match="differ"):
                check(run_matmul([w], 0, {"q": q, "s_x": s_x}), wrong)


def pairwise_neighbours(sums):
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums[..., 0]


# ---- elementwise -----------------------------------------------------------------------------------

FUNCTIONS = ["exp", "sigmoid", "silu", "softplus"]

SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 2.0**-126, 1.0, -1.0, 20.0, np.nextafter(F32(20), F32(21)),
     np.nextafter(F32(20), F32(0)), 88.72283, 88.72284, 88.8, 89.0, 100.0, 100.5, 200.0, 400.5, 709.0, 710.0,
     1e30, 3.4028235e38, -16.6, -17.4, -87.33, -87.34, -88.0, -103.2, -103.9, -103.98, -104.0, -104.1, -107.0,
     -150.0, -200.5, -400.5, -708.0, -745.5, -1e30, -3.4028235e38, np.inf, -np.inf, np.nan, -np.nan], F32)

# Arguments whose value lies within 2^-48 of a midpoint between two float32, relatively (some nearer
# than float64 can tell): found by searching 5e7 arguments.
HARD = {
    "exp": [0x4288942B, 0x337FFFFF, 0x3F5BC24C, 0x4283070F],
    "sigmoid": [0x36280000, 0x368C0000, 0xB6A20000, 0xB6CA0000, 0xB70B0000, 0xB71B0000, 0xB72F0000,
                0x37850000, 0xB7AE8000, 0xB7AF8000],
    "silu": [0xB6200000, 0x3711C456, 0x3958EC88, 0xC2B5D802, 0x40C96984, 0x35A32B2B, 0x38380000],
    "softplus": [0x398B9622, 0xBA095059, 0xBA92CC65],
}


def exact(name, x):
    """The function's value, to some 150 digits."""
    x = Decimal(float(x))
    with decimal.localcontext() as context:
        context.prec = 150
        if name == "exp":
            return x.exp()
        if name == "sigmoid":
            return 1 / (1 + (-x).exp())
        if name == "silu":
            return x / (1 + (-x).exp())
        return (1 + x.exp()).ln()


def nearest_float32(value):
    """The nearest of three candidates; a tie is out of the question for these functions."""
    middle = F32(float(value))
    candidates = [np.nextafter(middle, F32(-np.inf)), middle, np.nextafter(middle, F32(np.inf))]
    return min(candidates, key=lambda c: abs(Decimal(float(c)) - value))


def run_elementwise(name, x, in_place=False):
    def run(pool, memory):
        source = memory.in_out(x) if in_place else memory.input(x)
        y = source if in_place else memory.output(x.shape)
        succeed(getattr(lib, f"pe_{name}")(pool, pointer(source), x.size, pointer(y)))
        return y

    return run


def interesting(rng, n):
    """Arguments of every size: uniform where the functions bend, and by exponent."""
    uniform = rng.uniform(-110, 95, n)
    scaled = rng.standard_normal(n) * np.exp2(rng.integers(-30, 8, n))
    return np.where(rng.random(n) < 0.5, uniform, scaled).astype(F32)


@pytest.mark.parametrize("name", FUNCTIONS)
class TestElementwise:
    def test_every_length(self, name):
        for n in [0, *TAILS, 1023, 1024, 1025, 1030, 3001]:
            x = interesting(rng_of(n), n)
            check(run_elementwise(name, x), getattr(locked, name)(x))

    def test_in_place(self, name):
        for n in [1, 7, 8, 9, 16, 17, 31, 64, 65, 2500]:
            x = interesting(rng_of(n, 1), n)
            check(run_elementwise(name, x, in_place=True), getattr(locked, name)(x))

    def test_special_values(self, name):
        """Each alone, so at every place in a vector, and all together."""
        want = getattr(locked, name)(SPECIAL)
        check(run_elementwise(name, SPECIAL), want, any_nan=True)
        for shift in range(0, len(SPECIAL), 5):
            check(run_elementwise(name, np.roll(SPECIAL, shift)), np.roll(want, shift), any_nan=True,
                  runs=RUNS[:1])
        for x, y in zip(SPECIAL, want):
            check(run_elementwise(name, x[None]), y[None], any_nan=True, runs=RUNS[:1])

    def test_nan_gives_nan(self, name):
        """Quiet and signalling, alone among numbers."""
        for bits in (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF):
            for n in (1, 9, 33):
                x = np.ones(n, F32)
                x.view(np.uint32)[n // 2] = bits
                y = one_run(run_elementwise(name, x), LEVELS[-1], "end", 1)[0]
                assert np.array_equal(np.isnan(y), np.isnan(x))

    def test_hard_arguments(self, name):
        """Where float64 does not decide, by arithmetic of 150 digits; lanes beside them ordinary."""
        hard = np.array(HARD[name], np.uint32).view(F32)
        want = np.array([nearest_float32(exact(name, x)) for x in hard], F32)
        check(run_elementwise(name, hard), want)
        for x, y in zip(hard, want):
            among = np.full(37, 0.5, F32)
            values = getattr(locked, name)(among)
            among[[0, 19, 36]], values[[0, 19, 36]] = x, y
            check(run_elementwise(name, among), values, runs=RUNS[:2])

    def test_small_dyadic_arguments(self, name):
        """m / 2^e with small m: the value's series starts with terms that are near midpoints."""
        m = np.arange(-63, 64, 2, dtype=np.float64)
        x = np.concatenate([m * 2.0**-e for e in range(6, 30)]).astype(F32)
        want = np.array([nearest_float32(exact(name, v)) for v in x], F32)
        check(run_elementwise(name, x), want)

    @pytest.mark.slow
    def test_many(self, name):
        x = interesting(rng_of(19), 1 << 21)
        check(run_elementwise(name, x), getattr(locked, name)(x))

    def test_negative_length(self, name):
        assert getattr(lib, f"pe_{name}")(POOLS[1], ffi.NULL, -1, ffi.NULL) == ARGUMENT


@pytest.mark.parametrize("name, lengths", [("silu_mul", (511, 512, 513, 1025, 3001)),
                                           ("add", (1025, 16384, 50001))])
class TestOfTwoArrays:
    """y may be either of them."""

    @staticmethod
    def run(name, first, second, alias):
        def run(pool, memory):
            placed = [memory.in_out(x) if i == alias else memory.input(x)
                      for i, x in enumerate((first, second))]
            y = memory.output(first.shape) if alias is None else placed[alias]
            succeed(getattr(lib, f"pe_{name}")(pool, *floats(*placed), first.size, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("alias", [None, 0, 1])
    def test_every_length(self, name, lengths, alias):
        for n in [0, *TAILS, *lengths]:
            rng = rng_of(n, 2)
            first, second = interesting(rng, n), wide(rng, n)
            check(self.run(name, first, second, alias), getattr(locked, name)(first, second))

    def test_negative_length(self, name, lengths):
        assert getattr(lib, f"pe_{name}")(POOLS[1], ffi.NULL, ffi.NULL, -1, ffi.NULL) == ARGUMENT


class TestReplay:
    def call(self, operation, *words):
        call = ffi.new("pe_call *", {"operation": operation})
        for word, value in zip(call.words, words):
            if isinstance(value, int):
                word.i = value
            else:
                word.p = ffi.cast("void *", value)
        return call[0]

    def test_calls_are_made_in_order_up_to_the_first_that_fails(self):
        x, y, z = (np.full(4, value, np.float32) for value in (1, 2, 0))
        a, b, c = (ffi.from_buffer("float[]", array) for array in (x, y, z))
        add = lib.pe_operation(b"pe_add")
        calls = ffi.new("pe_call[]", [self.call(add, a, b, 4, c), self.call(add, c, c, 4, c),
                                      self.call(add, a, b, -1, c), self.call(add, c, c, 4, c)])
        failed = ffi.new("int64_t *", -7)
        assert lib.pe_replay(POOLS[1], calls, 2, failed) == OK and failed[0] == -7
        assert np.array_equal(z, np.full(4, 6, np.float32))
        assert lib.pe_replay(POOLS[1], calls, 4, failed) == ARGUMENT and failed[0] == 2
        assert np.array_equal(z, np.full(4, 6, np.float32))

    @pytest.mark.parametrize("operation", [-1, 1000])
    def test_unknown_operations(self, operation):
        failed = ffi.new("int64_t *")
        assert lib.pe_operation(b"pe_pool_free") == -1
        assert lib.pe_replay(POOLS[1], ffi.new("pe_call[]", [self.call(operation)]), 1, failed) == ARGUMENT


class TestSigmoidMul:
    @staticmethod
    def run(x, gate, ld_gate, in_place):
        def run(pool, memory):
            source = memory.in_out(x) if in_place else memory.input(x)
            y = source if in_place else memory.output(x.shape)
            placed = memory.input(gate, ld=ld_gate)
            succeed(lib.pe_sigmoid_mul(pool, *floats(source, placed), ld_gate, *x.shape, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("in_place", [False, True])
    def test_shapes(self, in_place):
        for n in [*TAILS, 511, 513]:
            for rows, extra in [(1, 0), (3, 5), (9, n)]:
                rng = rng_of(n, rows)
                x, gate = wide(rng, rows, n), interesting(rng, rows * n).reshape(rows, n)
                check(self.run(x, gate, n + extra, in_place), locked.sigmoid_mul(x, gate),
                      runs=RUNS[:1] if rows == 1 else RUNS[1:])

    @pytest.mark.parametrize("rows, n", [(-1, 4), (2, 0), (2, -1)])
    def test_argument_errors(self, rows, n):
        assert lib.pe_sigmoid_mul(POOLS[1], ffi.NULL, ffi.NULL, 4, rows, n, ffi.NULL) == ARGUMENT


class TestDeltaGates:
    @staticmethod
    def run(a, b, neg_exp_a_log, dt_bias):
        def run(pool, memory):
            beta, decay = memory.output(a.shape), memory.output(a.shape)
            inputs = [memory.input(v) for v in (a, b, neg_exp_a_log, dt_bias)]
            succeed(lib.pe_delta_gates(pool, *floats(*inputs), *a.shape, *floats(beta, decay)))
            return beta, decay

        return run

    def test_shapes(self):
        for heads in TAILS[:45]:
            for tokens in (1, 2, 9):
                rng = rng_of(heads, tokens)
                values = (normal(rng, tokens, heads) * 5, normal(rng, tokens, heads) * 5,
                          -np.exp(normal(rng, heads) * 3), normal(rng, heads))
                values = [v.astype(F32) for v in values]
                check(self.run(*values), locked.delta_gates(*values), runs=RUNS[::2])

    def test_decay_far_from_one(self):
        """log_decay from -20 to -1e-6, and where exp under- and overflows."""
        a = np.array([[-14, -5, 0, 3, 19, 20, 21, 30, 100]], F32).repeat(5, 0)
        neg = -np.array([1e-6, 1e-3, 0.1, 1, 1, 1, 1, 20, 20], F32)
        values = (a, a[::-1].copy(), neg, np.zeros(9, F32))
        check(self.run(*values), locked.delta_gates(*values))

    @pytest.mark.parametrize("tokens, heads", [(-1, 4), (1, 0), (1, -1)])
    def test_argument_errors(self, tokens, heads):
        null = [ffi.NULL] * 4
        assert lib.pe_delta_gates(POOLS[1], *null, tokens, heads, ffi.NULL, ffi.NULL) == ARGUMENT


# ---- norms -----------------------------------------------------------------------------------------


class TestRmsNorm:
    @staticmethod
    def run(x, scale, eps, ldx=None, head_ld=None, in_place=False):
        tokens, heads, n = x.shape
        head_ld = head_ld or n
        ldx = ldx or heads * head_ld

        def run(pool, memory):
            place = memory.in_out if in_place else memory.input
            source = place(x, ld=(ldx, head_ld))
            y = source if in_place else memory.output(x.shape)
            succeed(lib.pe_rms_norm(pool, pointer(source), tokens, ldx, heads, head_ld, n,
                                    pointer(memory.input(scale)), eps, pointer(y)))
            return y

        return run

    def test_every_length(self):
        for n in [*TAILS, 1000, 2048]:
            rng = rng_of(n, 3)
            x, scale = wide(rng, 2, 1, n), normal(rng, n)
            check(self.run(x, scale, 1e-6), locked.rms_norm(x, scale, 1e-6))

    @examples(40)
    @given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 80), st.integers(0, 70), st.integers(0, 9))
    def test_strides(self, tokens, heads, n, head_gap, token_gap):
        """head_ld > n: query and gate interleaved; ldx > heads * head_ld: part of a wider row."""
        rng = rng_of(tokens, heads, n)
        x, scale = wide(rng, tokens, heads, n), normal(rng, n)
        layout = {"head_ld": n + head_gap, "ldx": heads * (n + head_gap) + token_gap}
        check(self.run(x, scale, 1e-6, **layout), locked.rms_norm(x, scale, 1e-6))

    def test_in_place(self):
        for n in (1, 5, 8, 33, 128, 257):
            rng = rng_of(n, 4)
            x, scale = normal(rng, 5, 3, n), normal(rng, n)
            check(self.run(x, scale, 1e-6, in_place=True), locked.rms_norm(x, scale, 1e-6))

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 3e38])
    def test_magnitudes(self, size):
        """Squares under- and overflow float32, not float64."""
        x = np.clip(normal(rng_of(20), 3, 2, 37), -1, 1) * F32(size)
        scale = normal(rng_of(21), 37)
        for eps in (1e-6, 1e-12, 1.0):
            check(self.run(x, scale, eps), locked.rms_norm(x, scale, eps))

    @pytest.mark.slow
    def test_large(self):
        x, scale = normal(rng_of(22), 300, 16, 256), normal(rng_of(23), 256)
        check(self.run(x, scale, 1e-6), locked.rms_norm(x, scale, 1e-6))

    @pytest.mark.parametrize("tokens, heads, n", [(-1, 1, 4), (1, 0, 4), (1, 1, 0), (1, 1, -4)])
    def test_argument_errors(self, tokens, heads, n):
        status = lib.pe_rms_norm(POOLS[1], ffi.NULL, tokens, 4, heads, 4, n, ffi.NULL, 1e-6, ffi.NULL)
        assert status == ARGUMENT


class TestRmsNormGated:
    @staticmethod
    def run(x, z, weight, eps, in_place=False):
        def run(pool, memory):
            source = memory.in_out(x) if in_place else memory.input(x)
            y = source if in_place else memory.output(x.shape)
            succeed(lib.pe_rms_norm_gated(pool, *floats(source, memory.input(z)), *x.shape,
                                          pointer(memory.input(weight)), eps, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("in_place", [False, True])
    def test_shapes(self, in_place):
        for n in [*TAILS, 511, 513]:
            for rows in (1, 19):
                rng = rng_of(n, rows)
                x, z, weight = wide(rng, rows, n), interesting(rng, rows * n), normal(rng, n)
                z = z.reshape(rows, n)
                check(self.run(x, z, weight, 1e-6, in_place), locked.rms_norm_gated(x, z, weight, 1e-6),
                      runs=RUNS[:3] if rows == 1 else RUNS[3:])

    @pytest.mark.parametrize("rows, n", [(-1, 4), (1, 0), (1, -1)])
    def test_argument_errors(self, rows, n):
        null = ffi.NULL
        assert lib.pe_rms_norm_gated(POOLS[1], null, null, rows, n, null, 1e-6, null) == ARGUMENT


class TestL2Norm:
    @staticmethod
    def run(x, scale, ldx):
        tokens, heads, n = x.shape

        def run(pool, memory):
            source, y = memory.input(x, ld=(ldx, n)), memory.output(x.shape)
            succeed(lib.pe_l2_norm(pool, pointer(source), tokens, ldx, heads, n, scale, pointer(y)))
            return y

        return run

    @pytest.mark.parametrize("scale", [1.0, 128**-0.5])
    def test_shapes(self, scale):
        for n in TAILS:
            for tokens, heads, gap in [(1, 1, 0), (2, 3, 5), (9, 2, 0)]:
                x = wide(rng_of(n, tokens), tokens, heads, n)
                check(self.run(x, scale, heads * n + gap), locked.l2_norm(x, scale), runs=RUNS[::2])

    @pytest.mark.parametrize("size", [0.0, 1e-45, 1e-20, 1e-4, 1e20, 3e38])
    def test_magnitudes(self, size):
        x = np.clip(normal(rng_of(24), 3, 2, 37), -1, 1) * F32(size)
        check(self.run(x, 1.0, 74), locked.l2_norm(x, 1.0))

    @pytest.mark.parametrize("tokens, heads, n", [(-1, 1, 4), (1, 0, 4), (1, 1, 0)])
    def test_argument_errors(self, tokens, heads, n):
        assert lib.pe_l2_norm(POOLS[1], ffi.NULL, tokens, 4, heads, n, 1.0, ffi.NULL) == ARGUMENT


# ---- rotary positions --------------------------------------------------------------------------------


def inverse_frequencies(half):
    return (1.0 / 1e7 ** (np.arange(half) / half)).astype(F32)


class TestRopeTable:
    @staticmethod
    def run(start, tokens, inv_freq):
        def run(_, memory):
            cos, sin = (memory.output((tokens, inv_freq.size)) for _ in range(2))
            succeed(lib.pe_rope_table(start, tokens, pointer(memory.input(inv_freq)), inv_freq.size,
                                      *floats(cos, sin)))
            return cos, sin

        return run

    @pytest.mark.parametrize("start", [0, 1, 7, 1000, 262143, 2**23, 2**24 - 40])
    def test_the_stated_steps(self, start):
        for half, tokens in [(1, 1), (3, 9), (32, 40)]:
            inv_freq = inverse_frequencies(half)
            check(self.run(start, tokens, inv_freq), locked.rope_table(start, tokens, inv_freq),
                  runs=RUNS[:3])

    @pytest.mark.parametrize("start", [0, 100000, 2**24 - 2000])
    def test_nearest_float32(self, start):
        """The stated steps are also the rounded cosine and sine, as NumPy's float64 has them."""
        inv_freq = inverse_frequencies(32)
        angle = np.arange(start, start + 2000.0)[:, None] * inv_freq.astype(np.float64)
        want = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
        check(self.run(start, 2000, inv_freq), want, runs=RUNS[:1])

    def test_argument_errors(self):
        table = Memory("end")
        cos, sin = floats(table.output(64), table.output(64))
        one = np.ones(1, F32)
        for start, tokens, half in [(-1, 1, 1), (0, -1, 1), (2**24, 1, 1), (2**24 - 1, 2, 1), (0, 1, 0)]:
            assert lib.pe_rope_table(start, tokens, pointer(one), half, cos, sin) == ARGUMENT
        for bad in (0.0, -0.0, -0.5, np.nextafter(F32(1), F32(2)), np.inf, np.nan):
            inv_freq = np.array([1.0, bad], F32)
            assert lib.pe_rope_table(0, 1, pointer(inv_freq), 2, cos, sin) == ARGUMENT


    def test_start_near_the_largest_integer(self):
        assert run_apart("k.TestRopeTable.far_start()") == 0

    @staticmethod
    def far_start():
        memory = Memory("end")
        one, cos, sin = floats(memory.input(np.ones(1, F32)), memory.output(1), memory.output(1))
        assert lib.pe_rope_table(2**63 - 1, 1, one, 1, cos, sin) == ARGUMENT


class TestRope:
    @staticmethod
    def run(x, cos, sin):
        def run(pool, memory):
            y = memory.in_out(x)
            tables = floats(memory.input(cos), memory.input(sin))
            succeed(lib.pe_rope(pool, pointer(y), *x.shape, cos.shape[1], *tables))
            return y

        return run

    def test_shapes(self):
        for half in [0, *TAILS[:40]]:
            for tokens, heads, rest in [(1, 1, 0), (3, 2, 1), (9, 3, 2 * half)]:
                rng = rng_of(half, tokens)
                n = max(1, 2 * half + rest)
                x = wide(rng, tokens, heads, n)
                cos, sin = normal(rng, tokens, half), normal(rng, tokens, half)
                check(self.run(x, cos, sin), locked.rope(x, cos, sin), runs=RUNS[::2])

    def test_the_rest_stays_in_bits(self):
        """A NaN beyond 2 * half keeps its payload."""
        x = normal(rng_of(25), 2, 2, 9)
        x.view(np.uint32)[..., 8] = 0x7FA12345
        cos, sin = normal(rng_of(26), 2, 4), normal(rng_of(27), 2, 4)
        check(self.run(x, cos, sin), locked.rope(x, cos, sin))

    @pytest.mark.parametrize("tokens, heads, n, half", [(-1, 1, 4, 2), (1, 0, 4, 2), (1, 1, 3, 2), (1, 1, 4, -1)])
    def test_argument_errors(self, tokens, heads, n, half):
        null = ffi.NULL
        assert lib.pe_rope(POOLS[1], null, tokens, heads, n, half, null, null) == ARGUMENT


    def test_half_near_the_largest_integer(self):
        null = "k.ffi.NULL"
        call = f"k.lib.pe_rope(k.POOLS[1], {null}, 1, 1, 4, 2**62, {null}, {null})"
        assert run_apart(f"assert {call} == k.ARGUMENT") == 0


# ---- causal_conv1d -----------------------------------------------------------------------------------


class TestCausalConv1d:
    @staticmethod
    def run(x, weight, state, splits=()):
        """splits: the tokens at which a new call begins."""
        tokens, channels = x.shape
        bounds = [0, *splits, tokens]

        def run(pool, memory):
            placed_state = memory.in_out(state)
            out = []
            for begin, end in zip(bounds, bounds[1:]):
                y = memory.output((end - begin, channels))
                succeed(lib.pe_causal_conv1d(
                    pool, pointer(memory.input(x[begin:end])), end - begin, channels,
                    pointer(memory.input(weight)), len(weight), *floats(placed_state, y)))
                out.append(y)
            return np.concatenate(out), placed_state

        return run

    @staticmethod
    def case(tokens, channels, taps):
        rng = rng_of(tokens, channels, taps)
        return wide(rng, tokens, channels), normal(rng, taps, channels), wide(rng, taps - 1, channels)

    def test_channels(self):
        for channels in TAILS:
            case = self.case(3, channels, 4)
            check(self.run(*case), locked.causal_conv1d(*case))

    @pytest.mark.parametrize("taps", range(1, 17))
    def test_taps_and_tokens(self, taps):
        for tokens in (0, 1, 2, 3, 9, 17):
            case = self.case(tokens, 21, taps)
            check(self.run(*case), locked.causal_conv1d(*case), runs=RUNS[::2])

    def test_many_channels_shared_out(self):
        case = self.case(5, 1000, 4)
        check(self.run(*case), locked.causal_conv1d(*case))

    @pytest.mark.parametrize("taps", [1, 2, 4, 7])
    def test_every_split_equals_one_call(self, taps):
        case = self.case(6, 70, taps)
        whole = locked.causal_conv1d(*case)
        for mask in range(1 << 5):
            splits = [t for t in range(1, 6) if mask >> (t - 1) & 1]
            check(self.run(*case, splits), whole, runs=[RUNS[mask % 5]])
        check(self.run(*case, [0, 3, 3, 6]), whole)  # with calls of no tokens

    @pytest.mark.parametrize("tokens, channels, taps", [(-1, 4, 4), (1, 0, 4), (1, 4, 0), (1, 4, 17)])
    def test_argument_errors(self, tokens, channels, taps):
        null = ffi.NULL
        status = lib.pe_causal_conv1d(POOLS[1], null, tokens, channels, null, taps, null, null)
        assert status == ARGUMENT


# ---- delta_rule --------------------------------------------------------------------------------------


class TestDeltaRule:
    @staticmethod
    def case(tokens, key_heads, value_heads, dk, dv):
        rng = rng_of(tokens, key_heads, value_heads, dk, dv)
        return {
            "query": locked.l2_norm(normal(rng, tokens, key_heads, dk), dk**-0.5),
            "key": locked.l2_norm(normal(rng, tokens, key_heads, dk), 1.0),
            "value": wide(rng, tokens, value_heads, dv),
            "beta": rng.random((tokens, value_heads)).astype(F32),
            "decay": np.exp(-20 * rng.random((tokens, value_heads)) ** 4).astype(F32),
            "key_head": rng.integers(0, key_heads, value_heads).astype(np.int32),
            "recurrent_state": wide(rng, value_heads, dk, dv),
        }

    @staticmethod
    def run(case, splits=(), gap=0):
        tokens, value_heads, dv = case["value"].shape
        key_heads, dk = case["key"].shape[1:]
        bounds = [0, *splits, tokens]
        ld_value = value_heads * dv + gap

        def run(pool, memory):
            state = memory.in_out(case["recurrent_state"])
            key_head = pointer(memory.input(case["key_head"]), "int32_t *")
            outputs = []
            for begin, end in zip(bounds, bounds[1:]):
                part = {k: case[k][begin:end] for k in ("query", "key", "value", "beta", "decay")}
                out = memory.output((end - begin, value_heads, dv))
                succeed(lib.pe_delta_rule(
                    pool, *floats(memory.input(part["query"]), memory.input(part["key"])),
                    pointer(memory.input(part["value"], ld=(ld_value, dv))), ld_value,
                    *floats(memory.input(part["beta"]), memory.input(part["decay"])), end - begin,
                    key_heads, value_heads, dk, dv, key_head, *floats(state, out)))
                outputs.append(out)
            return np.concatenate(outputs), state

        return run

    def check(self, case, runs=RUNS, **layout):
        check(self.run(case, **layout), locked.delta_rule(**case), runs=runs)

    def test_value_widths(self):
        for dv in TAILS:
            self.check(self.case(2, 1, 2, 5, dv))

    def test_key_widths(self):
        for dk in [*range(1, 34), 64, 127, 128]:
            self.check(self.case(2, 1, 2, dk, 9), runs=RUNS[::2])

    def test_largest_value_width(self):
        self.check(self.case(2, 1, 1, 3, 1024), runs=RUNS[:2])

    def test_model_shape(self):
        self.check(self.case(3, 2, 4, 128, 128))

    @pytest.mark.parametrize("tokens", range(0, 10))
    def test_tokens_and_strides(self, tokens):
        self.check(self.case(tokens, 2, 6, 7, 19), gap=tokens)

    @pytest.mark.parametrize("key_head", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]])
    def test_pairing_of_heads(self, key_head):
        """Grouped, tiled, or any other: value head h reads key_head[h]."""
        case = self.case(4, 2, 4, 6, 10)
        case["key_head"] = np.array(key_head, np.int32)
        self.check(case)

    def test_every_split_equals_one_call(self):
        case = self.case(6, 2, 3, 8, 17)
        whole = locked.delta_rule(**case)
        for mask in range(1 << 5):
            splits = [t for t in range(1, 6) if mask >> (t - 1) & 1]
            check(self.run(case, splits), whole, runs=[RUNS[mask % 5]])

    def test_far_decay(self):
        """decay from exp(-20) to exp(-1e-6), and 0 and 1."""
        case = self.case(7, 1, 7, 9, 12)
        decay = np.array([0, np.exp(-20), np.exp(-1), 0.5, np.exp(-1e-3), np.exp(-1e-6), 1], F32)
        case["decay"] = np.stack([np.roll(decay, t) for t in range(7)])
        self.check(case)

    @pytest.mark.slow
    def test_long(self):
        self.check(self.case(65, 4, 8, 128, 128))

    @pytest.mark.parametrize("field, value", [
        ("tokens", -1), ("key_heads", 0), ("value_heads", 0), ("dk", 0), ("dv", 0), ("dv", 1025)])
    def test_argument_errors(self, field, value):
        assert self.status(**{field: value}) == ARGUMENT

    @pytest.mark.parametrize("heads", [[0, 2], [-1, 0], [0, 2**31 - 1]])
    def test_key_head_out_of_range(self, heads):
        assert self.status(key_head=np.array(heads, np.int32)) == ARGUMENT

    @staticmethod
    def status(tokens=1, key_heads=2, value_heads=2, dk=3, dv=3, key_head=np.zeros(2, np.int32)):
        null = ffi.NULL
        return lib.pe_delta_rule(POOLS[1], null, null, null, 6, null, null, tokens, key_heads,
                                 value_heads, dk, dv, pointer(key_head, "int32_t *"), null, null)


# ---- attention -----------------------------------------------------------------------------------------


class TestAttention:
    @staticmethod
    def case(start, tokens, heads, kv_heads, n):
        rng = rng_of(start, tokens, heads, kv_heads, n)
        return {
            "query": normal(rng, tokens, heads, n) * F32(3),
            "key_cache": normal(rng, start + tokens, kv_heads, n),
            "value_cache": wide(rng, start + tokens, kv_heads, n),
            "start": start,
            "scale": F32(n**-0.5),
        }

    @staticmethod
    def call(case, pool, memory):
        """-> the status and out."""
        query, keys = case["query"], case["key_cache"]
        out = memory.output(query.shape)
        status = lib.pe_attention(
            pool, *floats(*(memory.input(case[k]) for k in ("query", "key_cache", "value_cache"))),
            case["start"], len(query), query.shape[1], keys.shape[1], query.shape[2],
            float(case["scale"]), pointer(out))
        return status, out

    def run(self, case):
        def run(pool, memory):
            status, out = self.call(case, pool, memory)
            succeed(status)
            return out

        return run

    def check(self, case, runs=RUNS):
        check(self.run(case), locked.attention(**case), runs=runs)

    def test_head_widths(self):
        for n in TAILS:
            self.check(self.case(5, 2, 2, 1, n), runs=RUNS[::2])

    @pytest.mark.parametrize("start", [0, 1, 6, 14, 15, 16, 30])
    def test_positions_and_tokens(self, start):
        for tokens in (0, 1, 2, 5, 9):
            self.check(self.case(start, tokens, 2, 1, 24), runs=RUNS[::2])

    @pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 1), (4, 2), (6, 2), (6, 3), (5, 5), (16, 2), (34, 1), (64, 2)])
    def test_heads(self, heads, kv_heads):
        self.check(self.case(3, 3, heads, kv_heads, 20))

    def test_model_shape(self):
        self.check(self.case(40, 2, 16, 2, 256), runs=RUNS[:1] + RUNS[-1:])

    def test_long_context(self):
        self.check(self.case(300, 2, 2, 1, 16), runs=RUNS[:2])
        self.check(self.case(95, 3, 8, 1, 16), runs=RUNS[:2])  # 96, 97, 98: whole pieces and not

    @pytest.mark.slow
    def test_longer_context(self):
        self.check(self.case(3000, 5, 4, 2, 64))

    def test_start_equals_recompute(self):
        """Tokens 5.. alone give what they gave among all."""
        case = self.case(0, 12, 4, 2, 33)
        whole = locked.attention(**case)
        for start in range(12):
            for stop in (start + 1, 12):
                part = dict(case, start=start, query=case["query"][start:stop])
                check(self.run(part), whole[start:stop], runs=RUNS[:1])  # the cache may hold more

    def test_the_future_is_not_read(self):
        case = self.case(4, 3, 2, 1, 17)
        want = locked.attention(**case)
        poison = np.full((5, 1, 17), np.nan, F32)
        for name in ("key_cache", "value_cache"):
            case[name] = np.concatenate([case[name], poison])
        check(self.run(case), want)

    def test_equal_and_distant_scores(self):
        """All scores equal; one so far above that the others' exp is 0."""
        case = self.case(9, 1, 2, 1, 16)
        for key in (np.zeros(16), np.eye(16)[3] * 1e3):
            case["key_cache"][4] = key
            self.check(case)
        case["key_cache"][...] = 1
        self.check(case)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite_scores(self, bad):
        """inf in a key meets queries of either sign; here they are positive: a score of +inf."""
        for position in (0, 3, 6):
            case = self.case(6, 1, 2, 1, 19)
            case["query"] = np.abs(case["query"])
            case["key_cache"][position, 0, 7] = bad
            self.check_nonfinite(case)

    def test_negative_infinite_score(self):
        case = self.case(6, 1, 2, 1, 19)
        case["query"] = np.abs(case["query"])
        case["key_cache"][3, 0, 7] = -np.inf
        self.check_nonfinite(case)

    def check_nonfinite(self, case):
        for name in LEVELS:
            for threads in (1, 3):
                memory = Memory("end")
                with level(name):
                    assert self.call(case, POOLS[threads], memory)[0] == NONFINITE
                memory.check()

    @pytest.mark.parametrize("change", [
        {"start": -1}, {"tokens": -1}, {"heads": 0}, {"kv_heads": 0}, {"kv_heads": 3}, {"n": 0}])
    def test_argument_errors(self, change):
        shape = {"start": 0, "tokens": 1, "heads": 4, "kv_heads": 2, "n": 4, **change}
        null = ffi.NULL
        assert lib.pe_attention(POOLS[1], null, null, null, *shape.values(), 0.5, null) == ARGUMENT

    def test_control_order_of_the_dot(self):
        """dot16 in eight lanes, or the mix in another order, is seen to differ."""
        case = self.case(30, 1, 2, 1, 100)
        right = locked.attention(**case)
        wrong = dict(case, key_cache=case["key_cache"][::-1].copy(),
                     value_cache=case["value_cache"][::-1].copy())
        assert differing(locked.attention(**wrong), right).any()
        a, b = case["query"][0, 0], case["key_cache"][:, 0]
        eight = locked.halve(locked.lanes(a * b, 8))
        assert differing(eight, locked.dot16(a, b)).any()
        with pytest.raises(AssertionError, match="differ"):
            check(self.run(case), locked.attention(**wrong))


# ---- router --------------------------------------------------------------------------------------------


class TestRouter:
    @staticmethod
    def call(logits, top_k, pool, memory):
        weights = memory.output((len(logits), top_k))
        selected = memory.output((len(logits), top_k), np.int32)
        status = lib.pe_router(pool, pointer(memory.input(logits)), *logits.shape, top_k,
                               pointer(weights), pointer(selected, "int32_t *"))
        return status, weights, selected

    def run(self, logits, top_k):
        def run(pool, memory):
            status, *results = self.call(logits, top_k, pool, memory)
            succeed(status)
            return tuple(results)

        return run

    def check(self, logits, top_k, runs=RUNS):
        check(self.run(logits, top_k), locked.router(logits, top_k), runs=runs)

    def test_numbers_of_experts(self):
        for experts in TAILS:
            logits = normal(rng_of(experts, 5), 3, experts) * F32(3)
            for top_k in sorted({1, min(8, experts), experts} if experts < 40 else {1, 8}):
                self.check(logits, top_k, runs=RUNS[:3])

    @pytest.mark.parametrize("tokens", [0, 1, 2, 4, 5, 9, 33])
    def test_tokens(self, tokens):
        logits = normal(rng_of(tokens, 6), tokens, 64)
        if tokens:
            self.check(logits, 8)
        else:
            check(self.run(logits, 8), (np.zeros((0, 8), F32), np.zeros((0, 8), np.int32)))

    def test_equal_logits_take_the_lower_index(self):
        for experts in (2, 8, 9, 33, 256):
            _, selected = one_run(self.run(np.full((1, experts), 0.25, F32), min(8, experts)),
                                  LEVELS[-1], "end", 1)
            assert selected[0].tolist() == list(range(min(8, experts)))

    def test_ties_everywhere(self):
        """Few distinct logits, so most places are decided by the tie rule."""
        for experts in (5, 16, 40, 257):
            logits = rng_of(experts, 7).integers(0, 3, (6, experts)).astype(F32)
            self.check(logits, min(8, experts))

    def test_unequal_logits_with_equal_probabilities(self):
        """The tie is of p, not of the logit: far below the greatest every p is 0."""
        logits = np.array([[-300, -200, 0, -250, -150, -400]], F32)
        weights, selected = one_run(self.run(logits, 4), LEVELS[-1], "end", 1)
        assert selected.tolist() == [[2, 0, 1, 3]] and weights.tolist() == [[1, 0, 0, 0]]
        self.check(logits, 6)

    def test_magnitudes(self):
        """logit - m overflows to -inf: a probability of 0, not an error."""
        self.check(np.array([[3e38, -3e38, 0, 3e38]], F32), 4)
        self.check(np.array([[1e-45, -1e-45, 0, -0.0]], F32), 4)

    @pytest.mark.slow
    def test_most_experts(self):
        self.check(normal(rng_of(28), 2, 65536), 8, runs=RUNS[:1])

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nonfinite(self, bad):
        self.check_nonfinite(bad)

    def test_negative_infinity(self):
        self.check_nonfinite(-np.inf)

    def check_nonfinite(self, bad):
        for at in (0, 5, 32):
            logits = normal(rng_of(29), 5, 33)
            logits[-1, at] = bad
            for name in LEVELS:
                with level(name):
                    assert self.call(logits, 4, POOLS[2], Memory("end"))[0] == NONFINITE

    @pytest.mark.parametrize("tokens, experts, top_k", [
        (-1, 4, 1), (1, 0, 0), (1, 0, 1), (1, 4, 0), (1, 4, 5), (1, 65537, 1)])
    def test_argument_errors(self, tokens, experts, top_k):
        null = ffi.NULL
        assert lib.pe_router(POOLS[1], null, tokens, experts, top_k, null, null) == ARGUMENT

    def test_control_tie_rule(self):
        """Taking the higher of two equal ones is seen."""
        logits = np.array([[0, 1, 1, 0, 1]], F32)
        weights, selected = locked.router(logits, 2)
        assert selected.tolist() == [[1, 2]]
        with pytest.raises(AssertionError, match="differ"):
            check(self.run(logits, 2), (weights, np.array([[4, 2]], np.int32)))


# ---- experts -------------------------------------------------------------------------------------------

TRACED = ["routed", "shared_gate", "shared_up", "shared"]


class ExpertsCase:
    """Random weights, inputs and routing of one call."""

    def __init__(self, kinds, num_experts, hidden, ff, shared_ff, tokens, top_k):
        """kinds: the types of gate and up, of down, and of the shared expert's matrices."""
        rng = rng_of(num_experts, hidden, ff, tokens, top_k, *map(TYPES.index, kinds))
        gate, down, shared = kinds
        self.stack = [self.branch(rng, gate, down, hidden, ff) for _ in range(num_experts)]
        self.shared = self.branch(rng, shared, shared, hidden, shared_ff)
        self.quantised = any(not m.dense for m in (*self.stack[0], *self.shared))
        self.hidden, self.ff, self.shared_ff = hidden, ff, shared_ff
        self.x = normal(rng, tokens, hidden)
        order = [rng.permutation(num_experts)[:top_k] for _ in range(tokens)]
        self.selected = np.array(order, np.int32).reshape(tokens, top_k)
        self.weights = rng.random((tokens, top_k)).astype(F32)
        self.gate = normal(rng, tokens) * F32(3)
        self.top_k = top_k
        self.traced = TRACED

    @staticmethod
    def branch(rng, outer, inner, hidden, ff):
        return (random_matrix(rng, outer, ff, hidden), random_matrix(rng, outer, ff, hidden),
                random_matrix(rng, inner, hidden, ff))

    def place_weights(self, memory):
        w = ffi.new("pe_experts_weights *")
        w.num_experts = len(self.stack)
        for i, name in enumerate(("gate", "up", "down")):
            matrices = [branch[i] for branch in self.stack]
            setattr(w, name, place_stack(memory, matrices, extra_scale_ld=i, gap=2 * i)[0])
            setattr(w, f"shared_{name}", place_stack(memory, [self.shared[i]])[0])
        return w

    def place_inputs(self, memory):
        q, s_x = locked.quantize_activations(self.x) if self.quantised else (None, None)
        return place_activations(memory, self.hidden, len(self.x), self.x, q, s_x)

    def place_trace(self, memory):
        widths = {"shared_gate": self.shared_ff, "shared_up": self.shared_ff}
        trace, arrays = ffi.new("pe_experts_trace *"), []
        for name in self.traced:
            arrays.append(memory.output((len(self.x), widths.get(name, self.hidden))))
            setattr(trace, name, pointer(arrays[-1]))
        return trace, tuple(arrays)

    def call(self, pool, memory):
        """-> the status, then y and what is traced."""
        w, a = self.place_weights(memory), self.place_inputs(memory)
        trace, arrays = self.place_trace(memory)
        y = memory.output(self.x.shape)
        status = lib.pe_experts(
            pool, w, a, pointer(memory.input(self.selected), "int32_t *"),
            pointer(memory.input(self.weights)), self.top_k, pointer(memory.input(self.gate)),
            pointer(y), trace if self.traced else ffi.NULL)
        return status, y, *arrays

    def run(self, pool, memory):
        status, *results = self.call(pool, memory)
        succeed(status)
        return tuple(results)

    def expected(self):
        y, trace = locked.experts(self.stack, self.shared, self.x, self.selected, self.weights, self.gate)
        return y, *(trace[name] for name in self.traced)

    def check(self, runs=RUNS):
        check(self.run, self.expected(), runs=runs)


class TestExperts:
    @pytest.mark.parametrize("kinds", [
        *((kind,) * 3 for kind in TYPES), ("Q8_0", "Q8_0", "F32"), ("INT4", "INT8", "BF16"),
        ("F32", "Q8_0", "INT8"), ("INT8", "F16", "Q8_0")], ids="-".join)
    def test_types(self, kinds):
        for tokens in (1, 2, 5):
            ExpertsCase(kinds, 4, 64, 32, 96, tokens, 2).check(RUNS[::2])

    @pytest.mark.parametrize("top_k", [1, 2, 3, 6])
    def test_routing(self, top_k):
        """Experts that nobody chose, experts that everybody chose, 1 to 9 tokens."""
        for tokens in range(1, 10):
            ExpertsCase(("INT8",) * 3, 6, 32, 32, 32, tokens, top_k).check(RUNS[::2])

    def test_tails(self):
        for hidden, ff, shared_ff in [(1, 1, 1), (7, 5, 3), (33, 130, 9), (129, 31, 257)]:
            ExpertsCase(("INT8",) * 3, 3, hidden, ff, shared_ff, 3, 2).check()
            ExpertsCase(("F32",) * 3, 3, hidden, ff, shared_ff, 3, 2).check()

    def test_many_tokens(self):
        ExpertsCase(("Q8_0",) * 3, 8, 160, 64, 32, 40, 3).check(RUNS[:1] + RUNS[-2:])

    def test_tokens_do_not_meet(self):
        """Each token alone gives what it gave among all."""
        case = ExpertsCase(("INT4",) * 3, 5, 64, 32, 32, 7, 2)
        whole, *_ = case.expected()
        rows = case.x, case.selected, case.weights, case.gate
        for t in range(7):
            case.x, case.selected, case.weights, case.gate = (r[t : t + 1] for r in rows)
            got = one_run(case.run, LEVELS[-1], "end", 2)[0]
            assert_same_bits(got, whole[t : t + 1], f"token {t}")

    def test_order_of_selection_has_no_influence(self):
        case = ExpertsCase(("INT8",) * 3, 6, 64, 32, 32, 4, 4)
        want = case.expected()
        case.selected, case.weights = case.selected[:, ::-1].copy(), case.weights[:, ::-1].copy()
        check(case.run, want)

    @pytest.mark.parametrize("traced", [[], TRACED[:1], TRACED[1:3], TRACED[3:]])
    def test_trace_is_optional(self, traced):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 96, 3, 2)
        case.traced = traced
        case.check(RUNS[::2])

    def test_no_tokens(self):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 96, 0, 2)
        case.traced = []
        check(case.run, np.zeros((0, 64), F32))

    def test_fused_gate_up(self):
        """gate and up as two views of one array [experts, 2 ff, hidden]."""
        case = ExpertsCase(("INT8",) * 3, 3, 160, 24, 32, 4, 2)

        def run(pool, memory):
            fused = [Matrix("INT8", np.concatenate([g.codes, u.codes]), np.hstack([g.scales, u.scales]))
                     for g, u, _ in case.stack]
            both = place_stack(memory, fused)
            w, a = case.place_weights(memory), case.place_inputs(memory)
            for view in (w.gate, w.up):
                view.data, view.scales, view.scale_ld = both.data, both.scales, both.scale_ld
                view.expert_stride, view.scale_expert_stride = both.expert_stride, both.scale_expert_stride
            w.up.data = ffi.cast("char *", both.data) + case.ff * case.hidden
            w.up.scales = both.scales + case.ff
            y = memory.output(case.x.shape)
            succeed(lib.pe_experts(
                pool, w, a, pointer(memory.input(case.selected), "int32_t *"),
                pointer(memory.input(case.weights)), 2, pointer(memory.input(case.gate)), pointer(y),
                ffi.NULL))
            return y

        check(run, case.expected()[0])

    def test_scratch_is_kept(self):
        pool = ffi.gc(lib.pe_pool_new(1, 0), lib.pe_pool_free)
        assert lib.pe_pool_scratch_bytes(pool) == 0
        sizes = []
        for tokens in (2, 9, 1):
            ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, tokens, 2).run(pool, Memory("end"))
            sizes.append(lib.pe_pool_scratch_bytes(pool))
        assert 0 < sizes[0] < sizes[1] == sizes[2]

    @pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
    def test_expert_out_of_range(self, bad):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        case.selected[2, 1] = bad
        assert case.call(POOLS[2], Memory("end"))[0] == ARGUMENT

    @pytest.mark.parametrize("field, part, value", [
        ("num_experts", None, 0), ("gate", "cols", 32), ("gate", "rows", 31), ("up", "cols", 32),
        ("up", "rows", 64), ("down", "rows", 63), ("down", "cols", 64), ("shared_gate", "cols", 32),
        ("shared_up", "rows", 31), ("shared_down", "cols", 64), ("shared_down", "rows", 65),
        ("gate", "type", 9), ("down", "type", -1), ("shared_up", "type", 6)])
    def test_shapes_that_do_not_fit(self, field, part, value):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        memory = Memory("end")
        w, a = case.place_weights(memory), case.place_inputs(memory)
        setattr(getattr(w, field), part, value) if part else setattr(w, field, value)
        assert self.status(case, memory, w, a) == ARGUMENT

    def test_bad_top_k(self):
        case = ExpertsCase(("INT8",) * 3, 4, 64, 32, 32, 3, 2)
        case.top_k = 0
        assert case.call(POOLS[1], Memory("end"))[0] == ARGUMENT

    @staticmethod
    def status(case, memory, w, a):
        y = memory.output(case.x.shape)
        return lib.pe_experts(
            POOLS[1], w, a, pointer(memory.input(case.selected), "int32_t *"),
            pointer(memory.input(case.weights)), case.top_k, pointer(memory.input(case.gate)), pointer(y),
            ffi.NULL)

    def nonfinite_case(self, kind, where):
        """An expert, or the shared one, whose gate (*) up overflows."""
        case = ExpertsCase((kind,) * 3, 3, 64, 32, 32, 3, 2)
        gate, up, _ = case.stack[int(case.selected[1, 0])] if where == "routed" else case.shared
        for w in (gate, up):
            if w.dense:
                w.codes[...] = 1e37
            else:
                w.scales[...] = 65504.0
        case.x[1] = 1e18 if w.dense else 1e34
        return case

    @pytest.mark.parametrize("where", ["routed", "shared"])
    def test_nonfinite_intermediate(self, where):
        case = self.nonfinite_case("INT8", where)
        for name in LEVELS:
            with level(name):
                assert case.call(POOLS[2], Memory("end"))[0] == NONFINITE

    @pytest.mark.parametrize("where", ["routed", "shared"])
    def test_nonfinite_intermediate_of_dense_experts(self, where):
        assert self.nonfinite_case("F32", where).call(POOLS[1], Memory("end"))[0] == NONFINITE

    def test_missing_activations(self):
        """In a process of its own: it crashes."""
        program = ("case, memory = k.ExpertsCase(('INT8',) * 3, 4, 64, 32, 32, 3, 2), k.Memory('end')\n"
                   "w, a = case.place_weights(memory), case.place_inputs(memory)\n"
                   "a.q = k.ffi.NULL\n"
                   "assert k.TestExperts.status(case, memory, w, a) == k.ARGUMENT\n")
        assert run_apart(program) == 0

    def test_control_order_of_the_experts(self):
        """Contributions added as selected, not by ascending index, are seen."""
        case = ExpertsCase(("INT8",) * 3, 6, 64, 32, 32, 4, 4)
        routed = np.zeros(case.x.shape, F32)
        for t in range(4):
            for e, weight in zip(case.selected[t], case.weights[t]):
                routed[t] += locked.feed_forward(*case.stack[e], case.x[t : t + 1])[0] * weight
        case.traced = ["routed"]
        with pytest.raises(AssertionError, match="differ"):
            check(lambda pool, memory: case.run(pool, memory)[1], routed)
