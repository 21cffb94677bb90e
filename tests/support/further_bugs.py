"""More mistakes for `peer.py`, beside those of `planted_bugs.py`: what a table of all of them is made of."""

from planted_bugs import BUGS, DELTA, FULL, MLP, Bug

NORM, HEAD = "model.layers.0.input_layernorm", "lm_head"
SPLIT = (12, 12)


def bug(fault, text, guilty, named, **more):
    return Bug(0, text, fault, guilty, named, **more)


NORMS = [
    bug("eps_outside", "epsilon outside the root", NORM, "the norm's epsilon lies outside the root"),
    bug(
        "layer_norm", "LayerNorm in place of RMSNorm", NORM, "the norm subtracts the mean, as LayerNorm does"
    ),
    bug("no_head_norm", "no norm of query and key", f"{FULL}.q_norm", "q_norm and k_norm are left out"),
    bug("norm_after_rope", "RoPE before q_norm", f"{FULL}.q_norm", "q_norm and k_norm come after RoPE"),
    bug("no_last_norm", "no last norm", "model.norm", "the last norm is left out"),
    bug(
        "whole_gated_norm",
        "the gated norm over all heads",
        f"{DELTA}.norm",
        "the gated norm is taken over all heads at once",
    ),
    bug(
        "gate_before_norm",
        "z before the norm",
        f"{DELTA}.norm",
        "the gated norm takes its gate before the norm",
    ),
    bug("sigmoid_z", "sigmoid of z", f"{DELTA}.norm", "the gated norm's gate is sigmoid, not silu"),
]
ATTENTION = [
    bug("rope_base", "RoPE's base of another model", f"{FULL}.o_proj", "RoPE's base is 1,000,000"),
    bug("no_yarn", "YaRN missed", "model.layers.0.self_attn.o_proj", "YaRN is left out", model="yarn"),
    bug(
        "no_yarn_scale",
        "YaRN's factor missed",
        "model.layers.0.self_attn.o_proj",
        "YaRN's attention factor is left out",
        model="yarn",
    ),
    bug(
        "rope_table_bfloat16",
        "cos and sin in bfloat16",
        f"{FULL}.o_proj",
        "RoPE's cosines and sines are rounded to bfloat16",
    ),
    bug(
        "late_positions",
        "positions one behind after a split",
        f"{FULL}.o_proj",
        "positions are one behind at token 12",
        splits=SPLIT,
    ),
    bug(
        "window",
        "a sliding window of 10",
        f"{FULL}.o_proj",
        "attention sees a window of the last tokens alone at token 10",
    ),
    bug(
        "not_itself",
        "the mask hides the token itself",
        f"{FULL}.o_proj",
        "a token does not attend to itself: the mask is one off",
    ),
    bug(
        "sees_next",
        "the mask shows the next token",
        f"{FULL}.o_proj",
        "a token attends to the one after it: the mask is one off",
    ),
    bug(
        "score_scale",
        "scores scaled by 1 / n",
        f"{FULL}.o_proj",
        "the attention scores are scaled by 1 / n, not by 1 / sqrt(n)",
    ),
    bug(
        "probabilities_bfloat16",
        "softmax in bfloat16",
        f"{FULL}.o_proj",
        "the attention's probabilities are rounded to bfloat16",
    ),
    bug(
        "heads_in_turn",
        "key heads in turn",
        "model.layers.1.self_attn.o_proj",
        "query heads use the key heads in turn, not in groups",
        model="nextn",
    ),
    bug(
        "keys_as_values",
        "fused k and v cut the wrong way round",
        f"{FULL}.k_proj",
        "k_proj and v_proj are exchanged",
    ),
    bug(
        "kv_bfloat16", "keys and values in bfloat16", f"{FULL}.o_proj", "keys and values are kept in bfloat16"
    ),
    bug("kv_float16", "keys and values in float16", f"{FULL}.o_proj", "keys and values are kept in float16"),
    bug(
        "kv_8_bits", "keys and values in e4m3", f"{FULL}.o_proj", "keys and values are kept in 8 bits (e4m3)"
    ),
    bug("no_attention_gate", "no gate of attention", f"{FULL}.o_proj", "the attention's gate is left out"),
    bug(
        "silu_attention_gate",
        "silu as gate of attention",
        f"{FULL}.o_proj",
        "the attention's gate is silu, not sigmoid",
    ),
]
DELTA_NET = [
    bug("late_conv", "conv1d a token late", f"{DELTA}.norm", "conv1d is a token late"),
    bug("reversed_taps", "conv1d's taps reversed", f"{DELTA}.norm", "conv1d's taps are reversed"),
    bug("no_conv_silu", "no silu after conv1d", f"{DELTA}.norm", "the silu after conv1d is left out"),
    bug("no_l2", "no l2 norm", f"{DELTA}.norm", "the l2 norm of query and key is left out"),
    bug(
        "fused_rows",
        "fused in_proj cut wrong: z for values",
        f"{DELTA}.in_proj_qkv",
        "in_proj_z and the values of in_proj_qkv are exchanged",
    ),
    bug("swapped_b_a", "b and a swapped", f"{DELTA}.in_proj_b", "in_proj_a and in_proj_b are exchanged"),
    bug("plain_beta", "beta without sigmoid", f"{DELTA}.norm", "beta is without its sigmoid"),
    bug("no_dt_bias", "no dt_bias", f"{DELTA}.norm", "dt_bias is left out"),
    bug("decay_twice", "decay applied twice", f"{DELTA}.norm", "the decay is applied twice"),
    bug("decay_base_2", "exp2 for exp", f"{DELTA}.norm", "the decay is a power of 2, not of e"),
    bug(
        "early_output",
        "output read before the update",
        f"{DELTA}.norm",
        "a token's output is read from the state before its update",
    ),
    bug(
        "chunk_boundary",
        "chunks of 8 off by a decay",
        f"{DELTA}.norm",
        "the state is decayed twice at every chunk's boundary, the first at token 8",
    ),
    bug("state_bfloat16", "state in bfloat16", f"{DELTA}.norm", "the recurrent state is kept in bfloat16"),
    bug("state_float16", "state in float16", f"{DELTA}.norm", "the recurrent state is kept in float16"),
    bug(
        "transposed_state",
        "state transposed at a split",
        f"{DELTA}.norm",
        "the recurrent state is transposed at token 12",
        splits=SPLIT,
    ),
]
EXPERTS = [
    bug(
        "combined_bfloat16",
        "experts summed in bfloat16",
        f"{MLP}.experts",
        "the routed experts are added up in bfloat16",
    ),
    bug(
        "weighed_inputs",
        "weights on the experts' inputs",
        f"{MLP}.experts",
        "the routing weights multiply the experts' inputs, not their outputs",
    ),
    bug("next_expert", "experts off by one", f"{MLP}.experts", "the experts are numbered from 1"),
    bug(
        "expert_order",
        "weights in another order than experts",
        f"{MLP}.gate.1",
        "the routing weights belong to the experts in the opposite order",
    ),
    bug(
        "one_fewer",
        "one expert too few",
        f"{MLP}.gate.1",
        "the last of the chosen experts is left out, the others' weights are made to add up to 1",
    ),
    bug(
        "softmax_twice",
        "softmax of probabilities",
        f"{MLP}.gate.1",
        "the routing weights are a softmax of the chosen probabilities",
    ),
    bug(
        "router_bfloat16",
        "router's logits in bfloat16",
        f"{MLP}.gate",
        "the router's logits are rounded to bfloat16",
    ),
    bug("gelu", "gelu for silu", f"{MLP}.shared_expert.down_proj", "the experts use gelu, not silu"),
    bug(
        "late_shared_gate",
        "shared gate after the sum",
        MLP,
        "the shared expert's gate comes after the sum with the routed experts",
    ),
    bug("no_shared_gate", "no shared gate", MLP, "the shared expert's gate is left out"),
    bug("no_shared_expert", "no shared expert", MLP, "the shared expert is left out"),
]
ANYWHERE = [
    bug(
        "normed_residual",
        "residual after the norm",
        "model.layers.0.post_attention_layernorm",
        "the residual is taken after the norm, not before it",
    ),
    bug("no_residual", "no residual", "model.layers.0.post_attention_layernorm", "the residual is left out"),
    bug(
        "residual_bfloat16",
        "residual stream in bfloat16",
        "model.layers.0.post_attention_layernorm",
        "the residual stream is rounded to bfloat16",
    ),
    bug(
        "large_embeddings",
        "embeddings times sqrt(hidden)",
        "model.embed_tokens",
        "the embeddings are multiplied by sqrt(hidden size)",
        also=("the values are 8 times what they should be",),
    ),
    bug("soft_cap", "logits soft-capped", HEAD, "the logits are soft-capped: 30 tanh(x / 30)"),
    bug("tied_head", "head tied to the embeddings", HEAD, "the embeddings are used for lm_head"),
    bug("late_logits", "logits a row late", HEAD, "each row is that of the token before"),
]
# Rounding alone: no budget can see them, and two runs of the engine, compared in bits, do.
IN_BITS = [
    bug("norm_rows_by_batch", "a norm's row block by size of batch", NORM, "bits part in", budget="exact"),
    bug(
        "combined_by_batch",
        "the combine path of small batches",
        f"{MLP}.experts",
        "bits part in",
        budget="exact",
        model="nextn",  # three experts: the order of two makes no difference
    ),
]

# From a trace of layers or of logits, these look otherwise: the ids are not in the trace, the weights are
# not the model's, or more is lost than the tensor shows.
OTHERWISE = {
    "state_dropped": "every state is dropped: keys and values, the convolution's and the recurrent state "
    "at token 10",
    "vocabulary": None,
    "nextn": None,
}
ALL = [*BUGS, *NORMS, *ATTENTION, *DELTA_NET, *EXPERTS, *ANYWHERE, *IN_BITS]
