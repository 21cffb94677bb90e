"""The key-value cache: it grows in place, takes the memory of its rows, and is copied row by row."""

import copy
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

import pyengine
from pyengine.decoder import reserved, state
from pyengine.decoder.state import KeyValueCache

CONFIG = pyengine.open_checkpoint(GOLDEN / "pattern31.gguf").config
ROW = (CONFIG.num_key_value_heads, CONFIG.head_dim)


def rows(start, stop, dtype=np.float32):
    """Every element another, at every position another."""
    numbers = np.arange(start * ROW[0] * ROW[1], stop * ROW[0] * ROW[1])
    return (numbers % 2039).astype(dtype).reshape(stop - start, *ROW)


def assert_holds(cache, length):
    assert cache.length == length
    want = rows(0, length, cache.keys.dtype)
    assert np.array_equal(cache.keys, want) and np.array_equal(cache.values, -want)


def filled(config, length, dtype=np.float32):
    cache = KeyValueCache(config, dtype)
    cache.append(rows(0, length), -rows(0, length))
    return cache


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_it_grows_in_place(dtype):
    cache, places = KeyValueCache(CONFIG, dtype), set()
    for i in range(600):
        cache.append(rows(i, i + 1), -rows(i, i + 1))
        places.add((cache.keys.ctypes.data, cache.values.ctypes.data))
    assert_holds(cache, 600)
    assert len(places) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_long_context_takes_the_memory_of_its_rows():
    """Addresses for 2^20 positions, 20 layers: 8 TB."""
    config = replace(CONFIG, max_position_embeddings=1 << 24, num_key_value_heads=8, head_dim=6144)
    before = resident()
    caches = [KeyValueCache(config, np.float32) for _ in range(20)]
    row = np.ones((1, 8, 6144), np.float32)
    for cache in caches:
        cache.append(row, row)
        assert cache._keys.shape[1] == state.MOST_RESERVED
    took = resident() - before
    assert 20 * 2 * row.nbytes <= took <= sum(cache.nbytes for cache in caches) + (8 << 20)
    assert caches[0].nbytes == 2 * row.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_copy_takes_the_memory_of_the_rows_that_it_has():
    config = replace(CONFIG, num_key_value_heads=2, head_dim=256)
    cache, many = KeyValueCache(config, np.float32), np.ones((8192, 2, 256), np.float32)  # 2 * 16.8 MB
    cache.append(many, many)
    before = resident()
    copies = [cache.copy_of(100) for _ in range(20)]
    assert resident() - before <= sum(one.nbytes for one in copies) + (1 << 20)
    assert copies[0].nbytes == 4 * 102_400  # 25 pages of each head's keys, of its values


def test_beyond_its_addresses_it_doubles():
    config = replace(CONFIG, max_position_embeddings=5)
    cache = KeyValueCache(config, np.float32)
    capacities = set()
    for i in range(100):
        cache.append(rows(i, i + 1), -rows(i, i + 1))
        capacities.add(cache._keys.shape[1])
    assert_holds(cache, 100)
    assert capacities == {10, 20, 40, 80, 160}


def test_a_system_that_refuses_addresses(monkeypatch):
    made = []

    class Refused(reserved.Reserved):
        def __init__(self, count, shape, dtype):
            if shape[0] > 300:
                raise MemoryError
            made.append(shape[0])
            super().__init__(count, shape, dtype)

    monkeypatch.setattr(state, "Reserved", Refused)
    cache = filled(CONFIG, 200)
    assert made == [256] and CONFIG.context == 4096
    assert_holds(cache, 200)
    cache.append(rows(200, 300), -rows(200, 300))
    assert_holds(cache, 300)
    with pytest.raises(MemoryError):
        cache.append(rows(300, 301), -rows(300, 301))


def test_no_addresses_at_all():
    with pytest.raises(MemoryError, match="bytes of addresses"):
        reserved.Reserved(4, (1 << 50, 256), np.float32)


def test_huge_pages_are_asked_for_behind_the_first_small_ones():
    memory = reserved.Reserved(3, (9 << 20,), np.uint8)
    for nbytes in (1, reserved.HUGE_FROM, reserved.HUGE_FROM + 1, 9 << 20):
        memory.will_use(nbytes)
        assert memory._advised == (nbytes > reserved.HUGE_FROM and sys.platform.startswith("linux"))
    memory.array[:] = 7
    assert memory.array.sum(dtype=np.int64) == 7 * memory.array.size


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_it_can_be_written_and_read_again(again):
    cache = filled(CONFIG, 30)
    other = again(cache)
    assert_holds(other, 30)
    other.append(rows(30, 31), -rows(30, 31))
    assert_holds(cache, 30)
    assert_holds(other, 31)


@given(steps=st.lists(st.tuples(st.sampled_from("append rewind copy restore".split()), st.integers(0, 40))))
@settings(max_examples=40, deadline=None)
def test_any_life(steps):
    """A cache is as many rows as it should be, whatever was done to it and to its copies."""
    config = replace(CONFIG, max_position_embeddings=64)
    cache, others = KeyValueCache(config, np.float32), []
    for step, number in steps:
        length = cache.length
        if step == "append":
            cache.append(rows(length, length + number), -rows(length, length + number))
        elif step == "rewind":
            cache.rewind(min(number, length))
        elif step == "copy":
            others.append((cache.copy_of(min(number, length)), min(number, length)))
        else:
            arrays = {name: array.copy() for name, array in cache.arrays().items()}
            others.append((cache, length))
            cache = KeyValueCache(config, np.float32)
            cache.set_arrays(arrays, length)
    for one, length in [*others, (cache, cache.length)]:
        assert_holds(one, length)
