"""What each key of a GGUF's metadata and each field of a config.json means to this package.

A key belongs to one of three lists:

    READ      the reader takes its value
    HARMLESS  its value changes no logit
    NEUTRAL   it says that the model computes something else, unless it has one of the values listed

A key of NEUTRAL with another value is refused: FileFormatError.  A key of no list is a
`UnknownKeyWarning` with its name.  A null of a config.json counts as no field.

Sources: `llm_kv` in llama.cpp's llama-arch.cpp with the values that its model saver writes for what a
model does not have, gguf-py's constants.Keys, ollama's converter of Qwen3-Next, and the configuration
classes of transformers.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import FileFormatError, UnknownKeyWarning, quote

if TYPE_CHECKING:
    import os

    Where = str | os.PathLike[str]  # a file, or its name, in messages


class Lists(NamedTuple):
    """The three lists of one kind of file; prefixes of names that are harmless."""

    read: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    neutral: dict[str, tuple[Any, ...]] = {}
    harmless_prefixes: tuple[str, ...] = ()

    def __or__(self, more: Lists) -> Lists:
        """Both: of all families, and of one, which may read what others need to be neutral."""
        neutral = {key: values for key, values in self.neutral.items() if key not in more.read}
        return Lists(
            self.read | more.read,
            self.harmless | more.harmless,
            neutral | more.neutral,
            self.harmless_prefixes + more.harmless_prefixes,
        )


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _each(text: str, *values: Any) -> dict[str, tuple[Any, ...]]:
    return dict.fromkeys(text.split(), values)


# ---- GGUF: the keys behind the architecture; a family adds its own: see Family.gguf_keys ------------

GGUF = Lists(
    read=_names("""
        block_count context_length embedding_length embedding_length_out vocab_size nextn_predict_layers
        full_attention_interval attention.recurrent_layers
        attention.head_count attention.head_count_kv attention.key_length attention.value_length
        attention.layer_norm_rms_epsilon attention.scale
        rope.dimension_count rope.dimension_sections rope.freq_base rope.scale_linear
        rope.scaling.type rope.scaling.factor rope.scaling.original_context_length
        rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
        ssm.conv_kernel ssm.group_count ssm.inner_size ssm.state_size ssm.time_step_rank
    """),
    harmless=_names("""
        features_length n_deepstack_layers pooling_type decoder_start_token_id
        attention.layer_norm_epsilon attention.group_norm_epsilon attention.group_norm_groups
        attention.key_length_swa attention.value_length_swa rope.dimension_count_swa rope.freq_base_swa
        rope.scaling.finetuned rope.mrope_section rope.mrope_interleaved mrope_sections mrope_interleaved
        image_token_id video_token_id vision_start_token_id vision_end_token_id
    """),
    harmless_prefixes=("vision.", "classifier."),
    neutral={
        **_each(
            """
            activation_sparsity_scale altup.active_idx altup.num_inputs
            attention.clamp_kqv attention.decay_lora_rank attention.gate_lora_rank
            attention.iclr_lora_rank attention.indexer.head_count attention.indexer.key_length
            attention.indexer.top_k attention.key_length_mla attention.kv_lora_rank
            attention.max_alibi_bias attention.q_lora_rank attention.relative_buckets_count
            attention.shared_kv_layers attention.sliding_window attention.sliding_window_pattern
            attention.temperature_length attention.temperature_scale attention.value_length_mla
            attention.value_residual_mix_lora_rank attn_logit_softcapping convnext.block_count
            convnext.embedding_length decoder_block_count dense_2_feat_in dense_2_feat_out
            dense_3_feat_in dense_3_feat_out embedding_length_per_layer_input
            expert_chunk_feed_forward_length experts_per_group final_logit_softcapping
            hash_layer_count hyper_connection.count kda.head_dim leading_dense_block_count
            moe_latent_size posnet.block_count posnet.embedding_length rescale_every_n_layers
            rope.scaling.alpha rope.scaling.yarn_log_multiplier router_logit_softcapping
            shortconv.l_cache swiglu_clamp_exp swiglu_clamp_shexp time_decay_extra_dim
            time_mix_extra_dim token_shift_count wkv.head_size
        """,
            0,
        ),
        **_each(
            """
            attention.output_scale attention.value_scale embedding_scale expert_group_count
            expert_group_scale expert_group_used_count expert_weights_scale
            interleave_moe_layer_step logit_scale moe_every_n_layers residual_scale expert_shared_count
        """,
            0,
            1,
        ),
        **_each("ssm.dt_b_c_rms swin_norm use_parallel_residual", False),
        **_each("attention.causal expert_weights_norm norm_top_k_prob ssm.v_head_reordered", True),
        **_each("hidden_act hidden_activation", "silu"),
        "expert_gating_func": (0, 1),  # 1: softmax; 0: the architecture's own
        "rope.scaling.attn_factor": (1,),
        "rope.scaling.yarn_ext_factor": (1, -1),  # -1: not set
        "tensor_data_layout": ("", "reference"),
    },
)

# ---- config.json: its fields, those of its text_config, of its rotary dictionaries; a family's own
# fields are in Family.hf_keys ----------------------------------------------------------------------

HF = Lists(
    read=_names("""
        text_config model_type vocab_size hidden_size num_hidden_layers layer_types
        full_attention_interval rms_norm_eps num_attention_heads num_key_value_heads head_dim
        rope_parameters rope_scaling rope_type type rope_theta partial_rotary_factor mrope_section
        original_max_position_embeddings max_position_embeddings
        linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim
        linear_conv_kernel_dim tie_word_embeddings eos_token_id pad_token_id
        pyengine_group_size sliding_window use_sliding_window
    """),
    harmless=_names("""
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
        _experts_implementation _experts_implementation_internal _name_or_path name_or_path
        architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
        bos_token_id chunk_size_feed_forward cls_token_id custom_pipelines decoder_start_token_id
        do_sample dtype experts_implementation finetuning_task gradient_checkpointing hidden_dropout
        id2label image_token_id image_token_index initializer_range is_decoder
        label2id language_model_only length_penalty mamba_ssm_dtype mask_token_id max_length
        max_new_tokens max_window_layers min_length mrope_interleaved mtp_num_hidden_layers
        mtp_use_dedicated_embeddings no_repeat_ngram_size num_beams num_labels
        num_nextn_predict_layers num_return_sequences output_attentions output_hidden_states
        output_router_logits output_scores prefix pretraining_tp problem_type pruned_heads
        pyengine_bits pyengine_mix remove_invalid_values repetition_penalty resid_pdrop return_dict
        return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
        task_specific_params temperature tf_legacy_loss tie_encoder_decoder time_step_limit
        tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
        unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache video_token_id
        video_token_index vision_config vision_end_token_id vision_start_token_id vision_token_id
    """),
    harmless_prefixes=("transformers.js", "unsloth_"),
    neutral={
        **_each("activation activation_function hidden_act hidden_activation", "silu"),
        **_each(
            """
            add_bias_linear add_cross_attention alibi allow_neg_eigval attention_bias
            attention_out_bias attention_qkv_bias bias expert_bias ffn_bias is_encoder_decoder
            layernorm_1p linear_allow_neg_eigval lm_head_bias mlp_bias moe_router_enable_expert_bias
            multi_query o_proj_bias qkv_bias rope_interleaved router_bias scale_embedding use_bias
            use_expert_bias use_mla use_parallel_residual zero_centered_gamma
        """,
            False,
        ),
        **_each(
            """
            attn_output_gate norm_topk_prob normalize_expert_weights qk_layernorm qk_norm use_qk_norm
            use_rope
        """,
            True,
        ),
        **_each(
            """
            attention_chunk_size attention_softcap attention_window attn_logit_softcapping
            final_logit_softcapping first_k_dense_replace kv_lora_rank logits_soft_cap
            num_kv_shared_layers q_lora_rank router_logit_softcapping sliding_window_size window_size
            zero_expert_num
        """,
            0,
        ),
        **_each(
            """
            attn_output_multiplier decoder_sparse_step embedding_multiplier embedding_scale
            logit_scale logits_scale logits_scaling moe_layer_freq n_shared_experts num_shared_experts
            output_multiplier residual_multiplier residual_scale routed_scaling_factor
        """,
            1,
        ),
        **_each("n_group topk_group", 0, 1),
        **_each("""
            attention_multiplier attention_scale cache_implementation compression_config
            dual_chunk_attention_config layer_scale layer_scale_init_value layerscale_value
            per_layer_config quantization quantization_config query_pre_attn_scalar router_scale
            sparse_attention_config sparsity_config
        """),
        **_each("mlp_only_layers no_rope_layers", []),
        "mlp_layer_types": ("sparse",),
        **_each("moe_router_score_function router_activation score_function scoring_func", "softmax"),
        "position_embedding_type": ("rope", "rotary"),
        "output_gate_type": ("swish", "silu"),
        "pyengine_dequantize": ("exact",),
        "topk_method": ("greedy",),
    },
)

ROPE = Lists(
    read=_names("""
        rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings
        attention_factor beta_fast beta_slow mscale mscale_all_dim truncate mrope_section
    """),
    harmless=_names("mrope_interleaved finetuned"),
    neutral={
        **_each("attn_factor extrapolation_factor", 1),
        **_each("alpha", 0),
        **_each("""
            short_factor long_factor short_mscale long_mscale low_freq_factor high_freq_factor
            full_attention linear_attention sliding_attention
        """),
    },
)

PER_LAYER = ("mlp_layer_types", "moe_layer_freq")  # fields of a config.json

# ---- the rule ------------------------------------------------------------------------------------

MOST_WARNINGS = 20  # of one file: a hostile one may hold a million


def check(values: dict[str, Any], lists: Lists, where: Where, prefix: str = "") -> None:
    """FileFormatError for the first key of NEUTRAL that has another value, UnknownKeyWarning for the
    keys of no list.  prefix: what stands before the keys in messages."""
    unknown = []
    for key, value in values.items():
        if key in lists.neutral:
            check_neutral(value, lists.neutral[key], where, prefix + key)
        elif not (key in lists.read or key in lists.harmless or key.startswith(lists.harmless_prefixes)):
            unknown.append(prefix + key)
    warn_unknown(unknown, where)


def check_neutral(value: Any, neutral: tuple[Any, ...], where: Where, label: str) -> None:
    """FileFormatError unless the value is one of those that change nothing; of an array of a GGUF, and of a
    list of PER_LAYER's fields, unless each value is."""
    value = value.tolist() if (array := isinstance(value, np.ndarray)) else value
    several = array or (isinstance(value, list) and label.rsplit(".", 1)[-1] in PER_LAYER)
    for one in value if several else [value]:
        if one is not None and not any(_same(one, other) for other in neutral):
            raise FileFormatError(where, label, f"want {_words(neutral)}, got {quote(value)}")


def warn_unknown(names: list[str], where: Where) -> None:
    for name in names[:MOST_WARNINGS]:
        message = FileFormatError(where, name, "not a key that is known here; it is ignored")
        warnings.warn(str(message), UnknownKeyWarning, stacklevel=2)
    if len(names) > MOST_WARNINGS:
        more = FileFormatError(
            where, f"{len(names) - MOST_WARNINGS} more", "not known here; they are ignored"
        )
        warnings.warn(str(more), UnknownKeyWarning, stacklevel=2)


def _same(value: Any, other: Any) -> bool:
    """Equal, and of one kind: a truth value is the same truth value, a text is a text."""
    if isinstance(other, bool):
        return value is other
    if isinstance(other, list):
        return bool(value == other)
    if isinstance(other, str) or isinstance(value, str):
        return isinstance(value, str) and value == other
    return isinstance(value, (int, float)) and value == other


def _words(neutral: tuple[Any, ...]) -> str:
    values = [json.dumps(value) for value in neutral]
    return " or ".join([*values, "no such key"])
