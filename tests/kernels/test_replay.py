"""csrc/replay.c: recorded calls, and the checks of its list by the compiler."""

import re
import subprocess

import numpy as np
import pytest
from c_core import COMPILER, CSRC, needs_compiler
from kernel_runs import ARGUMENT, OK, POOLS, ffi, lib

pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid|underflow|divide by zero):RuntimeWarning")


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
        calls = ffi.new(
            "pe_call[]",
            [
                self.call(add, a, b, 4, c),
                self.call(add, c, c, 4, c),
                self.call(add, a, b, -1, c),
                self.call(add, c, c, 4, c),
            ],
        )
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


# The row of an operation in csrc/replay.c, and what a wrong row could look like.
ROW = "OP(pe_rms_norm_gated, const float *, const float *, int64_t, int64_t, const float *, double, float *)"
WRONG_ROWS = {
    "an integer for a double": ROW.replace("double", "int64_t"),
    "a double for an integer": ROW.replace("int64_t, int64_t", "int64_t, double"),
    "a float for a double": ROW.replace("double", "float"),
    "a narrower integer": ROW.replace("int64_t, int64_t", "int32_t, int64_t"),
    "an integer for a pointer": ROW.replace("const float *, double", "int64_t, double"),
    "a pointer for an integer": ROW.replace("int64_t, int64_t", "const float *, int64_t"),
    "another pointer": ROW.replace("const float *, double", "const int32_t *, double"),
    "an output for an input": ROW.replace("const float *, double", "float *, double"),
    "one argument too few": ROW.replace("int64_t, int64_t", "int64_t"),
    "one argument too many": ROW.replace("int64_t, int64_t", "int64_t, int64_t, int64_t"),
    "two arguments in the wrong order": ROW.replace("const float *, double", "double, const float *"),
    "an unknown operation": ROW.replace("pe_rms_norm_gated", "pe_rms_norm_grated"),
}


class TestRowsOfTheList:
    """The compiler refuses a row of csrc/replay.c that differs from the prototype in pyengine.h."""

    @staticmethod
    def compile(row, tmp_path):
        source = re.sub(r"\\\n\s*", "", (CSRC / "replay.c").read_text())
        found = re.search(r"OP\(pe_rms_norm_gated,.*?\)", source)[0]
        assert re.sub(r"\s+", " ", found) == ROW
        (tmp_path / "replay.c").write_text(source.replace(found, row))
        command = [*COMPILER, "-std=c11", "-w", "-DPE_TYPE_FILES=", f"-I{CSRC}", "-fsyntax-only", "replay.c"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    @needs_compiler
    def test_the_row_as_it_is(self, tmp_path):
        done = self.compile(ROW, tmp_path)
        assert done.returncode == 0, done.stderr

    @needs_compiler
    @pytest.mark.parametrize("mistake", WRONG_ROWS)
    def test_a_mistake_does_not_compile(self, mistake, tmp_path):
        done = self.compile(WRONG_ROWS[mistake], tmp_path)
        assert done.returncode != 0
        assert "pe_rms_norm_g" in done.stderr
