"""Models of transformers with the weights of a GGUF."""

import pytest


def transformers_model(path, dtype):
    """In a dtype of torch; its frequencies float32, as from_pretrained keeps them."""
    torch = pytest.importorskip("torch")
    from hf_float64 import load_float64

    model = load_float64(path)
    inv_freq = model.model.rotary_emb.inv_freq.float()
    model = model.to(getattr(torch, dtype))
    model.model.rotary_emb.inv_freq = inv_freq.double() if dtype == "float64" else inv_freq
    return model
