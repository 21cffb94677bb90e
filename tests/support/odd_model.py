"""A random checkpoint that differs from tests/golden/pattern31.gguf in every dimension."""

from make_slice import write_slice

from pyengine.checkpoint.config import FULL, LINEAR, Config

CONFIG = Config(
    vocab_size=320,
    hidden_size=96,
    layer_types=(LINEAR, LINEAR, LINEAR, FULL, LINEAR),
    rms_norm_eps=1e-5,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
    rotary_dim=16,
    rope_theta=1e6,
    linear_num_key_heads=3,
    linear_num_value_heads=9,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    linear_conv_kernel_dim=3,
    num_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=160,
    mrope_section=(3, 3, 2),
    max_position_embeddings=2048,
)

DIMENSIONS = [
    name
    for name in vars(CONFIG)
    if isinstance(getattr(CONFIG, name), (int, float))
    and name not in ("tie_word_embeddings", "num_nextn_predict_layers", "intermediate_size")
]


def write_odd_model(path):
    write_slice(path, CONFIG)
    return path
