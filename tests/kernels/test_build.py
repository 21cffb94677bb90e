"""csrc/build.py: which files belong to which instruction set; a new weight type needs no edit elsewhere."""

import platform
import shutil
import subprocess

import pytest
from c_core import COMPILER, CSRC, compilations, needs_compiler
from kernel_runs import ARGUMENT, LEVELS, POOLS, TYPES, Memory, ffi, level, lib

MACHINES = {"x86_64": ["avx2", "avx512vnni", "avx512amx"], "aarch64": ["neon", "neon_dotprod"], "riscv64": []}
ALL_LEVELS = [name for names in MACHINES.values() for name in names]


def level_of(source):
    """By the name alone: the instruction set after the last matching underscore, or scalar."""
    stem = source.removeprefix("csrc/").removesuffix(".c")
    return next((name for name in ALL_LEVELS if stem.endswith("_" + name)), "scalar")


@pytest.mark.parametrize("machine", MACHINES)
class TestFiles:
    def test_each_file_of_the_machine_once(self, machine):
        sources = [source for source, _ in compilations(machine)]
        assert sorted(sources) == sorted(
            f"csrc/{path.name}"
            for path in CSRC.glob("*.c")
            if level_of(path.name) in ["scalar", *MACHINES[machine]]
        )

    def test_only_files_of_a_level_have_its_instructions(self, machine):
        for source, flags in compilations(machine):
            chosen = [flag for flag in flags if flag.startswith("-m")]
            assert bool(chosen) == (level_of(source) not in ("scalar", "neon")), source

    def test_one_file_of_each_level_fills_its_table(self, machine):
        sources = [source for source, _ in compilations(machine)]
        for name in MACHINES[machine]:
            assert f"csrc/level_{name}.c" in sources


class TestTypes:
    def test_every_number_has_a_row(self):
        """At every level each type up to PE_TYPES is complete, and the numbers around are unknown."""
        assert [getattr(lib, f"PE_{name}") for name in TYPES] == list(range(lib.PE_TYPES))
        for name in LEVELS:
            with level(name):
                status = [self.status(number) for number in range(-1, lib.PE_TYPES + 1)]
                assert status == [ARGUMENT, *[lib.PE_OK] * lib.PE_TYPES, ARGUMENT]

    @staticmethod
    def status(number):
        """Of a matmul whose matrix is zeros, 128 by 256."""
        memory = Memory("end")
        w = ffi.new("pe_matrix *", {"type": number, "rows": 128, "cols": 256, "scale_ld": 128})
        data, scales, x = bytes(128 * 256 * 4), bytes(2 * 128 * 2), bytes(256 * 4)
        w.data, w.scales = ffi.from_buffer(data), ffi.cast("uint16_t *", ffi.from_buffer(scales))
        a = ffi.new("pe_activations *", {"tokens": 1, "cols": 256})
        a.x = a.scales = ffi.cast("float *", ffi.from_buffer(x))
        a.q = ffi.cast("int16_t *", ffi.from_buffer(x))
        a.sums = ffi.cast("int32_t *", ffi.from_buffer(x))
        y = memory.output(128)
        return lib.pe_matmul(POOLS[1], w, 0, a, ffi.cast("float *", y.ctypes.data), 128)


# ---- a new weight type ---------------------------------------------------------------------------

SCALAR = """
#include "kernels.h"

/* Bytes, times a factor that tells the levels apart. */
static void matmul_toy(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    for (int64_t r = row0; r < row1; r++)
        for (int64_t t = 0; t < a->tokens; t++) {
            float sum = 0.0f;
            for (int64_t c = 0; c < w->cols; c++)
                sum += a->x[t * w->cols + c] * ((const uint8_t *)w->data)[r * w->cols + c];
            y[t * ldy + r] = sum * FACTOR;
        }
}
"""
FILL_SCALAR = """
void pe_fill_scalar_toy(pe_kernels *k)
{
    k->type[PE_TOY] = (pe_weight_type){1, 1, .dense = 1};
    k->matmul[PE_TOY] = matmul_toy;
}
"""
FILL_LEVEL = "void pe_fill_LEVEL_toy(pe_kernels *k) { k->matmul[PE_TOY] = matmul_toy; }\n"
MAIN = """
#include "pyengine.h"
#include <stdio.h>
int main(void)
{
    const uint8_t codes[6] = {1, 2, 3, 4, 5, 6};
    const float x[3] = {1, 1, 2};
    const pe_matrix w = {.type = PE_TOY, .rows = 2, .cols = 3, .data = codes};
    const pe_activations a = {.tokens = 1, .cols = 3, .x = x};
    pe_pool *pool = pe_pool_new(2, 0);
    const char *name;
    for (int32_t i = 0; (name = pe_isa_name(i)); i++) {
        float y[2] = {0, 0};
        pe_isa_select(name);
        int32_t status = pe_matmul(pool, &w, 0, &a, y, 2);
        printf("%s %d %g %g\\n", name, status, y[0], y[1]);
    }
    return 0;
}
"""


def add_toy_type(root, levels):
    """One value of the enumeration, one file per level."""
    csrc = root / "csrc"
    header = (csrc / "pyengine.h").read_text()
    (csrc / "pyengine.h").write_text(header.replace("    PE_TYPES ", "    PE_TOY,\n    PE_TYPES ", 1))
    (csrc / "matmul_toy.c").write_text("#define FACTOR 1" + SCALAR + FILL_SCALAR)
    for i, name in enumerate(levels):
        text = f"#define FACTOR {i + 2}" + SCALAR + FILL_LEVEL.replace("LEVEL", name)
        (csrc / f"matmul_toy_{name}.c").write_text(text)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("with_levels", [True, False])
def test_a_new_type_is_one_value_and_its_files(tmp_path, with_levels):
    levels = MACHINES.get(platform.machine(), [])
    shutil.copytree(CSRC, tmp_path / "csrc")
    add_toy_type(tmp_path, levels if with_levels else [])
    (tmp_path / "main.c").write_text(MAIN)
    objects = []
    for source, flags in [*compilations(platform.machine(), tmp_path), ("main.c", ["-std=c11"])]:
        flags = ["-O0" if flag == "-O3" else flag for flag in flags]
        if "level_" in source:  # shifts by an immediate need the optimizer
            flags.append("-O1")
        objects.append(source.rpartition("/")[2].replace(".c", ".o"))
        command = [*COMPILER, *flags, "-Icsrc", "-c", source, "-o", objects[-1]]
        subprocess.run(command, cwd=tmp_path, check=True)
    subprocess.run([*COMPILER, *objects, "-o", "main", "-pthread", "-lm"], cwd=tmp_path, check=True)
    lines = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    factor = {name: i + 2 if with_levels else 1 for i, name in enumerate(levels)} | {"scalar": 1}
    want = [f"{name} 0 {9 * factor[name]} {21 * factor[name]}" for name in LEVELS]
    assert lines.splitlines() == want
