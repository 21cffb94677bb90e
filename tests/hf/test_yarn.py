"""A directory that transformers wrote, with YaRN: the same logits in transformers and here."""

import json

import numpy as np
import pytest

import pyengine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from golden_models import CONFIGS  # noqa: E402
from hf_float64 import Float64Mode, random_state_dict  # noqa: E402
from locked_torch import yarn_frequencies, yarn_of  # noqa: E402

pytestmark = pytest.mark.golden

IDS = np.random.default_rng(1729).integers(0, 128, 200)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
VARIANTS = {
    "defaults": {},
    "betas": {"beta_fast": 4.0, "beta_slow": 0.5},
    "not truncated": {"truncate": False},
    "attention_factor": {"attention_factor": 1.3},
    "mscale": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "no factor": {"factor": None},
    "no original": {"original_max_position_embeddings": None},
}


@pytest.fixture
def saved(tmp_path, request):
    """A directory that transformers wrote, whose rotary parameters are then the variant's."""
    text = dict(CONFIGS["yarn"])
    parameters = {k: v for k, v in text["rope_parameters"].items() if not k.startswith("beta")}
    parameters = parameters | YARN | VARIANTS[request.param]
    if parameters["original_max_position_embeddings"] is None:
        del parameters["original_max_position_embeddings"]
    model = transformers.Qwen3_5MoeForCausalLM(transformers.Qwen3_5MoeTextConfig(**text)).bfloat16()
    model.load_state_dict(random_state_dict(text, 1729))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": parameters}))
    return tmp_path


@pytest.mark.parametrize("saved", VARIANTS, indirect=True)
def test_float64_logits_are_pyengines(saved):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with Float64Mode(), torch.no_grad():
        want = model(input_ids=torch.as_tensor(IDS)[None]).logits[0].numpy().astype(np.float32)
    assert (pyengine.load(saved, "float64").forward(IDS) != want).sum() <= 1  # on a rounding boundary


@pytest.mark.parametrize("saved", VARIANTS, indirect=True)
def test_the_restatement_has_the_same_frequencies_and_scale(saved):
    config = pyengine.load(saved, "float64").config
    values = json.loads((saved / "config.json").read_text())["rope_parameters"]
    values.setdefault("original_max_position_embeddings", 512)
    values["factor"] = values["factor"] or 4.0
    yarn = yarn_of(values)
    assert yarn.scale == config.rope_scale
    want = yarn_frequencies(config.rope_theta, config.rotary_dim, yarn).numpy()
    assert (want.view(np.int32) == config.inv_freq().view(np.int32)).all()
