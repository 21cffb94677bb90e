"""How the C core is built: cffi in API mode, out of line.

A file NAME_LEVEL.c belongs to an instruction set (`levels`), every other .c file is scalar code.  The
scalar files make up the extension module `pyengine._core`.  The files of each instruction set are a
static library of its own, compiled with its own flags, so that no instruction above the platform's
baseline can leak into code that runs on every processor.  `setup.py` reads `libraries` and
`ffibuilder` from here.
"""

import platform
import sys
from pathlib import Path

import cffi

HERE = Path(__file__).parent

# Bits first: no contraction to FMA, no reassociation.  -fno-math-errno lets sqrt be one instruction.
FLAGS = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
]

# dispatch.c asks the processor for the features behind these flags: change both together.
AVX2 = ["-mavx2", "-mf16c", "-mfma"]
AVX512VNNI = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
# AMX is written as assembly, for compilers that do not know its flags.
X86 = {"avx2": AVX2, "avx512vnni": AVX512VNNI, "avx512amx": AVX512VNNI}
ARM = {"neon": [], "neon_dotprod": ["-march=armv8.2-a+dotprod"]}


def levels(machine=None):
    """{instruction set: its compiler flags} for a processor family, lowest first."""
    machine = (machine or platform.machine()).lower()
    if machine in ("x86_64", "amd64"):
        return X86
    if machine in ("aarch64", "arm64"):
        return ARM
    return {}


def level_of(path):
    """The instruction set that a file belongs to; None: scalar."""
    return next((level for level in (*X86, *ARM) if path.stem.endswith(f"_{level}")), None)


def sources_of(level):
    """The files of an instruction set; of None: the scalar ones."""
    return sorted(path for path in HERE.glob("*.c") if level_of(path) == level)


def macros_of(level, machine=None):
    """[(name, value)] for the files of an instruction set, or for the scalar ones (None).

    PE_HAVE_LEVEL tells dispatch.c which instruction sets there are; PE_TYPE_FILES names the files of
    weight types, matmul_TYPE.c or matmul_TYPE_LEVEL.c: see kernels.h.
    """
    names = [path.stem.removesuffix(f"_{level}") for path in sources_of(level)]
    types = [name.removeprefix("matmul_") for name in names if name.startswith("matmul_")]
    present = [] if level else [(f"PE_HAVE_{name.upper()}", "1") for name in levels(machine)]
    return [*present, ("PE_TYPE_FILES", "".join(f"PE_TYPE_FILE({name})" for name in types))]


def relative(path):
    # setuptools wants paths relative to setup.py, with forward slashes.
    return f"csrc/{path.name}"


def print_compilations(machine=None):
    """`source flags` lines: the whole core for a machine, for those who build it without Python."""
    for level, flags in {None: [], **levels(machine)}.items():
        macros = [f"-D{name}={value}" for name, value in macros_of(level, machine)]
        for path in sources_of(level):
            print(relative(path), *FLAGS, *flags, *macros)


HEADERS = [relative(path) for path in sorted(HERE.glob("*.h"))]

libraries = [
    (
        f"pyengine_level_{level}",
        {
            "sources": [relative(path) for path in sources_of(level)],
            "include_dirs": ["csrc"],
            "macros": macros_of(level),
            "obj_deps": {"": HEADERS},
            "cflags": FLAGS + flags,
        },
    )
    for level, flags in levels().items()
]


def declarations():
    """The part of pyengine.h that cffi parses."""
    header = (HERE / "pyengine.h").read_text()
    return header.split("/* CDEF BEGIN */")[1].split("/* CDEF END */")[0]


ffibuilder = cffi.FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pyengine._core",
    '#include "pyengine.h"',
    sources=[relative(path) for path in sources_of(None)],
    depends=[*HEADERS, *(source for _, library in libraries for source in library["sources"])],
    include_dirs=["csrc"],
    define_macros=macros_of(None),
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
)

if __name__ == "__main__":
    print_compilations(*sys.argv[1:2])
