"""csrc/pool.c and csrc/dispatch.c: levels, thread pools, the host's floating-point environment."""

import ctypes
import os
import platform
import sys
from contextlib import contextmanager

import locked_numpy as locked
import numpy as np
import pytest
from bits import assert_same_bits, differing
from kernel_runs import ARGUMENT, LEVELS, OK, POOLS, ffi, level, lib, normal, pointer, rng_of, succeed
from locked_numpy import F32

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


class TestLevelsAndPool:
    def test_levels(self):
        known = {"scalar", "avx2", "avx512vnni", "avx512amx", "neon", "neon_dotprod"}
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


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in FENV, reason="layout of fenv_t unknown"
)
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
        self.in_hostile_environment(lambda pool, y: lib.pe_exp(pool, address, x.size, y), locked.exp(x))

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
            lambda _, cos: lib.pe_rope_table(1000, 50, frequencies, 4, cos, sin_address), want
        )
