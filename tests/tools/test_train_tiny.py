"""The training tool, on a few steps: it runs, and what it holds out is what the tests hold."""

import subprocess
import sys

import numpy as np
import pytest
from debian import has_package
from paths import TESTS, TOOLS

import pyengine
from pyengine.files.gguf import GGUF
from pyengine.text.tokenizer import Tokenizer

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("torch")
    if not has_package("bible-kjv-text"):
        pytest.skip("apt-get knows no bible-kjv-text (apt-get update?)")
    out = tmp_path_factory.mktemp("trained")
    tool = TOOLS / "train" / "train_tiny.py"
    for arguments in (["--steps", "2"], ["--steps", "3", "--resume"]):
        done = subprocess.run([sys.executable, tool, "-o", out, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return out


def test_a_few_steps_give_a_checkpoint_and_its_twin(trained):
    ids = Tokenizer.open(trained).encode("In the beginning")
    for path in (trained, trained / "bf16.gguf"):
        logits = pyengine.load(path).forward(ids)
        assert logits.shape == (len(ids), 2048) and np.isfinite(logits).all()


def test_all_but_the_weights_is_what_is_committed(trained):
    assert (trained / "held_out.txt").read_bytes() == (TESTS / "held_out" / "kjv.txt").read_bytes()
    made, committed = (GGUF.open(path / "bf16.gguf") for path in (trained, TESTS / "trained"))
    assert list(made.metadata) == list(committed.metadata)
    for key in made.metadata:
        assert np.array_equal(made.metadata[key], committed.metadata[key]), key
    assert {name: tensor.shape for name, tensor in made.tensors.items()} == {
        name: tensor.shape for name, tensor in committed.tensors.items()
    }


def test_experts_run_in_order_are_transformers_own():
    torch = pytest.importorskip("torch")
    from train_tiny import CONFIG, experts_in_order
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

    torch.manual_seed(1729)
    config = Qwen3_5MoeTextConfig(**CONFIG, experts_implementation="eager")
    module = Qwen3_5MoeExperts(config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(50, 256, dtype=torch.float64)
    selected = torch.stack([torch.randperm(16)[:4] for _ in range(50)])
    weights = torch.rand(50, 4, dtype=torch.float64)
    with torch.no_grad():
        wanted, got = module(x, selected, weights), experts_in_order(module, x, selected, weights)
    assert (wanted - got).abs().max() < 1e-12 < wanted.abs().max()
