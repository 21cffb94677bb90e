"""Codes and scales against PyTorch's restatement of the rule, in every bit."""

import numpy as np
import pytest
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDEN

from pyengine.checkpoint.open import open_checkpoint
from pyengine.core import ops
from pyengine.core.matrices import Matrix
from pyengine.core.threads import Pool
from pyengine.quantizer.plan import plan
from pyengine.quantizer.quantize import quantize
from pyengine.quantizer.rule import quantize_groups
from pyengine.testing import Format
from pyengine.testing.quantizer import strategies

torch = pytest.importorskip("torch")

import quantizer_torch  # noqa: E402

pytestmark = pytest.mark.golden

CASES = [(bits, scale) for bits in (8, 4) for scale in ("absmax", "mse")]


def restated(x, bits, group, scale):
    codes, scales = quantizer_torch.quantize_weights(torch.from_numpy(x), {8: 127, 4: 7}[bits], group, scale)
    return codes, scales.numpy()


@pytest.mark.parametrize("bits, scale", CASES)
@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.gguf")))
def test_what_is_written(tmp_path, name, bits, scale):
    source = GOLDEN / f"{name}.gguf"
    quantize(source, **{f"int{bits}": tmp_path / "out"}, scale=scale)
    written = open_checkpoint(tmp_path / "out").file.tensors
    parameters = [p for p in plan(open_checkpoint(source), bits) if len(p.entries) == 2]
    assert len(parameters) > 10
    for parameter in parameters:
        codes_entry, scales_entry = parameter.entries
        x = np.concatenate([t.float64().astype(np.float32) for t in parameter.sources], axis=-2)
        codes, scales = restated(x.reshape(-1, x.shape[-1]), bits, 128, scale)
        if bits == 4:
            codes = quantizer_torch.pack_int4(codes)
        scales = np.swapaxes(scales.reshape(*x.shape[:-1], -1), -1, -2)
        assert_same_bits(
            codes.numpy().reshape(codes_entry.shape), written[codes_entry.name].data, codes_entry.name
        )
        assert_same_bits(np.ascontiguousarray(scales), written[scales_entry.name].data, scales_entry.name)


@pytest.mark.parametrize("bits, scale", CASES)
@pytest.mark.parametrize("group", [128, 32, 10])
def test_rows_of_every_kind(bits, scale, group):
    largest = {8: 127, 4: 7}[bits]
    pool = Pool(2)

    @given(strategies.matrices(Format(largest, group)), st.booleans())
    @settings(deadline=None, derandomize=True, max_examples=100 if scale == "absmax" else 25)
    def check(x, negative):
        x = np.ascontiguousarray(-x if negative else x)
        codes, scales = restated(x, bits, group, scale)
        for what, (got_codes, got_scales) in {
            "NumPy": quantize_groups(x, largest, group, scale),
            "C": ops.quantize_weights(
                pool, Matrix("F32", x.shape[1], x), None, None, 0, len(x), largest, group, scale
            ),
        }.items():
            assert_same_bits(got_scales, scales, f"{what}'s scales")
            assert_same_bits(got_codes, codes.numpy(), f"{what}'s codes")

    check()


def test_its_float16_is_the_nearest_of_all():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = (halves[:-1] + halves[1:]) / 2  # exact in float64
    for x in (halves, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)):
        assert np.array_equal(quantizer_torch.f16(torch.from_numpy(x)).numpy(), x.astype(np.float16))
    beyond = torch.tensor([65519.99, 65520.0, 1e9], dtype=torch.float64)
    assert quantizer_torch.f16(beyond).tolist() == [65504.0, float("inf"), float("inf")]
