"""How the C core is built: cffi in API mode, out of line.

The scalar files and the dispatcher make up the extension module `pyengine._core`.  Each instruction
set is a static library of its own, compiled with its own flags, so that no instruction above the
platform's baseline can leak into code that runs on every processor.  `setup.py` reads `libraries`
and `ffibuilder` from here.
"""

import platform
import sys
from pathlib import Path

import cffi

HERE = Path(__file__).parent

# Bits first: no contraction to FMA, no reassociation.  -fno-math-errno lets sqrt be one instruction.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
         "-pthread", "-Wall", "-Wextra"]

SCALAR = ["dispatch", "pool", "matmul", "quantize", "quantize_weights", "activations", "norm", "rope",
          "causal_conv1d", "delta_rule", "attention", "router", "experts", "replay"]

X86 = {
    "avx2": ["-mavx2", "-mf16c", "-mfma"],
    "avx512vnni": ["-mavx2", "-mf16c", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq",
                   "-mavx512vl", "-mavx512vnni"],
}
ARM = {
    "neon": [],
    "neon_dotprod": ["-march=armv8.2-a+dotprod"],
}


def instruction_sets(machine=None):
    """{level: its compiler flags} for a processor family, lowest level first."""
    machine = (machine or platform.machine()).lower()
    if machine in ("x86_64", "amd64"):
        return X86
    if machine in ("aarch64", "arm64"):
        return ARM
    return {}


def sources_of(level):
    """The sibling files of one level: csrc/*_LEVEL.c."""
    return sorted(p for p in HERE.glob(f"*_{level}.c"))


def relative(path):
    # setuptools wants paths relative to setup.py, with forward slashes.
    return f"csrc/{path.name}"


def levels(machine=None):
    """The instruction sets of which there are sources, and their flags."""
    return {level: flags for level, flags in instruction_sets(machine).items() if sources_of(level)}


def defines(machine=None):
    """What tells dispatch.c which levels it has."""
    return [f"PE_HAVE_{level.upper()}" for level in levels(machine)]


def print_compilations(machine=None):
    """`source flags` lines: the whole core for a machine, for those who build it without Python."""
    for name in SCALAR:
        print(f"csrc/{name}.c", *FLAGS, *(f"-D{name}=1" for name in defines(machine)))
    for level, flags in levels(machine).items():
        for path in sources_of(level):
            print(relative(path), *FLAGS, *flags)


HEADERS = [relative(path) for path in sorted(HERE.glob("*.h"))]
LEVELS = levels()

libraries = [
    (f"pyengine_{level}",
     {"sources": [relative(p) for p in sources_of(level)],
      "include_dirs": ["csrc"],
      "obj_deps": {"": HEADERS},
      "cflags": FLAGS + flags})
    for level, flags in LEVELS.items()
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
    sources=[f"csrc/{name}.c" for name in SCALAR],
    depends=HEADERS,
    include_dirs=["csrc"],
    define_macros=[(name, "1") for name in defines()],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
)

if __name__ == "__main__":
    print_compilations(*sys.argv[1:2])
