"""The tools of the kernel tests themselves: comparison of bits, guard pages, the loaded build."""

import os
import subprocess
import sys
from pathlib import Path

import guard
import numpy as np
import pytest
from bits import assert_same_bits, differing
from guard import Memory
from locked_numpy import F32
from paths import SUPPORT

from pyengine import _core

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


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
        program = (
            "import ctypes, numpy, guard\n"
            f"x = guard.Memory({placement!r}).output(8)\n"
            "read = lambda i: ctypes.c_uint32.from_address(x.ctypes.data + 4 * i).value\n"
            "assert read(0) == read(7) == guard.POISON\n"
            f"print('inside', flush=True); read({index}); print('outside')\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=SUPPORT, capture_output=True, text=True)
        assert done.returncode != 0 and done.stdout == "inside\n", done


def test_expected_build_is_loaded():
    """tools/check/check_sanitizers.sh says where its build lies, and that it calls the sanitizers."""
    folder = os.environ.get("PYENGINE_SANITIZED_BUILD")
    if not folder:
        pytest.skip("PYENGINE_SANITIZED_BUILD is not set")
    path = Path(_core.__file__).resolve()
    assert path.is_relative_to(Path(folder).resolve())
    content = path.read_bytes()
    assert b"__asan_report_load" in content and b"__ubsan_handle" in content
