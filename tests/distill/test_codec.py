"""Layouts of labels: what comes back, within the bound that layout.py states, read by other code."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_runs import examples

from pyengine.distill.codec import decode, encode, float16_codes, label_columns, new_layout
from pyengine.distill.distillkit import config, index_bits
from pyengine.distill.labels import LabelOptions, Labels
from pyengine.errors import InputError

TOP = LabelOptions(top_k=6)
SAMPLED = LabelOptions(top_k=None, draws=6)


def some_labels(rng, rows=5, k=6, vocab=70000, sampled=False, scale=10.0):
    logprobs = -np.sort(rng.exponential(scale, (rows, k)).astype(np.float32), axis=1)
    ids = np.argsort(rng.random((rows, k + 9)), axis=1)[:, :k].astype(np.int32) * (vocab // (k + 9))
    weights = None
    if sampled:
        weights = rng.random((rows, k)).astype(np.float32)
        for row, size in enumerate(rng.integers(1, k + 1, rows)):
            ids[row, size:], logprobs[row, size:], weights[row, size:] = -1, -np.inf, 0
        width = int((ids >= 0).sum(axis=1).max())
        ids, logprobs, weights = (array[:, :width].copy() for array in (ids, logprobs, weights))
    common = {n: rng.random(rows).astype(np.float32) for n in ("true_logprob", "logsumexp", "outside")}
    return Labels(ids, logprobs, weights, **common)


def there_and_back(labels, layout):
    common = {n: getattr(labels, n) for n in ("true_logprob", "logsumexp", "outside")}
    columns = encode(labels, layout)
    assert list(columns) == label_columns(layout)
    return decode(columns | common, layout)


def check(found, labels, bound):
    np.testing.assert_array_equal(found.ids, labels.ids)
    for name in ("weights", "true_logprob", "logsumexp", "outside"):
        np.testing.assert_array_equal(getattr(found, name), getattr(labels, name))
    there = labels.ids >= 0
    x = labels.logprobs[there].astype(np.float64)
    assert (np.abs(found.logprobs[there] - x) <= bound(np.abs(x))).all()
    assert (found.logprobs[~there] == -np.inf).all() and found.logprobs.dtype == np.float32


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bits", [7, 8, 9, 10])
@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1, 20, 2000])
def test_packed_is_within_its_bound(sampled, bits, scale):
    labels = some_labels(np.random.default_rng(bits), 40, sampled=sampled, scale=scale)
    layout = new_layout("packed", SAMPLED if sampled else TOP, 70000, bits)
    check(there_and_back(labels, layout), labels, lambda x: 2.0 ** -(bits + 1) * x + 2.0**-22)


@pytest.mark.parametrize("sampled", [False, True])
def test_lists_are_exact(sampled):
    labels = some_labels(np.random.default_rng(3), sampled=sampled)
    check(
        there_and_back(labels, new_layout("lists", SAMPLED if sampled else TOP, 70000)), labels, np.zeros_like
    )


@given(st.floats(0, 65504, width=32), st.sampled_from([7, 8, 9, 10]))
@examples(300)
def test_float16_codes(x, bits):
    """The nearest of all float16 that the code can name; of two, the even one."""
    step = 1 << (10 - bits)
    known = np.arange(0, 0x7BFF + 1, step, dtype=np.uint16).view(np.float16).astype(np.float64)
    distance = np.abs(known - x)
    nearest = np.flatnonzero(distance == distance.min())
    want = nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0]
    assert float16_codes(np.array([x], np.float32), bits)[0] == want


def test_beyond_float16():
    labels = some_labels(np.random.default_rng(4))
    labels.logprobs[:, -1] = -1e30
    found = there_and_back(labels, new_layout("packed", TOP, 70000))
    assert (found.logprobs[:, -1] <= -65024).all()


@pytest.mark.parametrize("vocab, id_bytes", [(1, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (248320, 3)])
def test_bytes_of_an_id(vocab, id_bytes):
    assert new_layout("packed", LabelOptions(top_k=1), vocab)["id_bytes"] == id_bytes
    ids = np.array([[vocab - 1]], np.int32)
    one = np.zeros((1, 1), np.float32)
    labels = Labels(ids, one, None, one[0], one[0], one[0])
    assert there_and_back(labels, new_layout("packed", LabelOptions(top_k=1), vocab)).ids.tolist() == [
        [vocab - 1]
    ]


def test_packed_bytes_are_as_stated():
    """Read by hand, from layout.py alone."""
    common = [np.zeros(2, np.float32)] * 3
    labels = Labels(
        np.array([[258, 1], [3, 65536]], np.int32),
        np.array([[-1, -1.5], [-0.5, -4]], np.float32),
        None,
        *common,
    )
    columns = encode(labels, new_layout("packed", LabelOptions(top_k=2), 70000, 8))
    assert [columns[f"ids_{i}"] for i in range(3)] == [
        bytes([2, 1, 3, 0]),
        bytes([1, 0, 0, 0]),
        bytes([0, 0, 0, 1]),
    ]
    codes = [int(np.float16(x).view(np.uint16)) >> 2 for x in (1, 1.5, 0.5, 4)]
    gaps = [codes[0], codes[1] - codes[0], codes[2], codes[3] - codes[2]]
    assert columns["gaps_0"] == bytes(g & 255 for g in gaps) and columns["gaps_1"] == bytes(
        g >> 8 for g in gaps
    )


@pytest.mark.parametrize(
    "name, options, bits, message",
    [
        ("csv", TOP, 8, "layout: want packed, lists, distillkit, got 'csv'"),
        ("packed", TOP, 11, "fraction_bits: want 7 to 10, got 11"),
        ("distillkit", SAMPLED, 8, "layout: want top-k labels with distillkit"),
    ],
)
def test_layouts_that_are_refused(name, options, bits, message):
    with pytest.raises(InputError, match=message):
        new_layout(name, options, 100, bits)


def test_columns_of_another_length():
    labels = some_labels(np.random.default_rng(5))
    layout = new_layout("packed", TOP, 70000)
    columns = encode(labels, layout) | {
        n: np.zeros(5, np.float32) for n in ("true_logprob", "logsumexp", "outside")
    }
    columns = {name: value[:-1] if isinstance(value, bytes) else value for name, value in columns.items()}
    with pytest.raises(InputError, match="want 30 in the row, got 29"):
        decode(columns, layout)


# ---- DistillKit --------------------------------------------------------------------------------


def distillkit_ids(data, bits, count):
    """DistillKit's `unpack_from_bytes`: a stream of bits, the highest of each element first."""
    stream = "".join(f"{byte:08b}" for byte in data)
    return [int(stream[i * bits : (i + 1) * bits], 2) for i in range(count)]


def distillkit_logprobs(data, count):
    """The exact part of `decompress_monotonic_logprobs`, exact_dtype float16."""
    return [struct.unpack_from("<e", bytes(data), 2 * i)[0] for i in range(count)]


@pytest.mark.parametrize("vocab", [2048, 70000, 248320])
def test_distillkit_reads_its_columns(vocab):
    labels = some_labels(np.random.default_rng(6), vocab=vocab)
    layout = new_layout("distillkit", TOP, vocab)
    columns = encode(labels, layout)
    bits = index_bits(vocab)
    for ids, logprobs, exact, packed in zip(
        labels.ids, labels.logprobs, columns["compressed_logprobs"], columns["bytepacked_indices"]
    ):
        assert exact.dtype == packed.dtype == np.uint8
        assert len(exact) * 8 + -(-6 * bits // 8) * 8 == len(exact) * 8 + len(packed) * 8
        assert distillkit_ids(packed, bits, 6) == ids.tolist()
        assert distillkit_logprobs(exact, 6) == logprobs.astype(np.float16).tolist()
    check(there_and_back(labels, layout), labels, lambda x: 2.0**-11 * x + 2.0**-25)


@pytest.mark.parametrize("vocab, bits", [(2, 1), (2048, 11), (2049, 12), (151936, 18), (248320, 18)])
def test_bits_of_an_index(vocab, bits):
    assert index_bits(vocab) == bits


def test_the_configuration_is_one_that_distillkit_takes():
    """Its `check_valid`: exact_k <= k, and no more elements of bins than k - exact_k."""
    made = config(50, 248320)
    assert made["exact_k"] == made["k"] == 50 and made["residual_bins"] == [] and made["d"] == 248320
    assert set(made) == {
        *("d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype"),
        *("residual_bins", "delta_encoding", "error_diffusion", "normalize_t"),
    }
