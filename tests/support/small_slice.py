"""A size of make_slice for tests: blocks of 256 columns fit, and heads are as wide as in the models."""

from pyengine.checkpoint.config import FULL, LINEAR, Config

SMALL = Config(
    vocab_size=300,
    hidden_size=256,
    layer_types=(LINEAR, LINEAR, LINEAR, FULL),
    rms_norm_eps=1e-6,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=128,
    rotary_dim=16,
    rope_theta=1e7,
    linear_num_key_heads=2,
    linear_num_value_heads=8,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
    mrope_section=(3, 3, 2),
)
