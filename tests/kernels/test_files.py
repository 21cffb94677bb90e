"""csrc/files.c: words that a type refuses, and strings one after another."""

import numpy as np
import pytest
from guard import PLACEMENTS, Memory
from kernel_runs import ffi, lib, rng_of


def first_refused(memory, data, count, stride, width, bits, offset=0):
    placed = memory.input(data)
    return lib.pe_first_refused(ffi.cast("char *", placed.ctypes.data) + offset, count, stride, width, bits)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("width, stride", [(1, 1), (1, 17), (2, 2), (2, 18), (2, 34), (2, 7), (4, 4), (4, 9)])
def test_first_refused(placement, width, stride):
    rng, bits = rng_of(width, stride), {1: 0xFF, 2: 0x7C00, 4: 0x7F800000}[width]
    for count in (0, 1, 2, 63, 64, 65, 200):
        data = rng.integers(0, 256, max(0, (count - 1) * stride + width if count else 0)).astype(np.uint8)
        words = [
            int.from_bytes(data[i * stride : i * stride + width].tobytes(), "little") for i in range(count)
        ]
        for i, word in enumerate(words):  # none is refused
            if word & bits == bits:
                data[i * stride : i * stride + width] = 0
        assert first_refused(Memory(placement), data, count, stride, width, bits) == -1
        for at in (count - 1, count // 2) if count else ():  # the later one first
            data[at * stride : at * stride + width] = 0xFF
            assert first_refused(Memory(placement), data, count, stride, width, bits) == at


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_string_ends(placement):
    strings = [b"", b"a", b"\xff" * 300, b"", b"tail"]
    data = b"".join(len(s).to_bytes(8, "little") + s for s in strings)
    want = np.cumsum([8 + len(s) for s in strings])
    for size in range(len(data) + 1):
        memory = Memory(placement)
        ends = memory.output(len(strings), np.int64)
        placed = memory.input(np.frombuffer(data[:size], np.uint8))
        found = lib.pe_string_ends(
            ffi.cast("void *", placed.ctypes.data),
            size,
            len(strings),
            ffi.cast("int64_t *", ends.ctypes.data),
        )
        memory.check()
        assert found == (want <= size).sum() and ends[:found].tolist() == want[:found].tolist()


def test_a_length_beyond_everything():
    ends = ffi.new("int64_t[1]")
    for length in (1, 2**63 - 1, 2**63, 2**64 - 1):
        assert lib.pe_string_ends(ffi.new("char[8]", length.to_bytes(8, "little")), 8, 1, ends) == 0
