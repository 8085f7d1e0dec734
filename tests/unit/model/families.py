"""What becomes of every causal-LM family of the pinned transformers: right, or refused and why.

A family's config is small, with the settings below. When a family changes sides, or a new one appears, a test asks for
a change here.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}

_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128}

MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _MLA),
    **dict.fromkeys(("minicpm3", "youtu"), _MLA),
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "n_routed_experts": 8, "first_k_dense_replace": 1},
    "longcat_flash": _MLA | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 8},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_experts": 8},
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), _MAMBA),
    # scales other than one, as the published models have them
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "hyperclovax": {"logits_scaling": 8.0},
    # the layers that the published models have, and the defaults don't
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 96},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gemma2": {"sliding_window": 16},
    "mistral": {"sliding_window": 16},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64},
    "reformer": {"is_decoder": True},
}


RIGHT = "right"
"""Trained and encoded as transformers would."""

_FAMILIES = {
    RIGHT: """
        apertus arcee bitnet cohere cohere2 cwm diffllama ernie4_5 exaone4 gemma gemma3_text glm glm4 granite
        helium hunyuan_v1_dense hyperclovax internlm3 iquestcoder jais2 llama ministral ministral3 mistral moshi
        olmo olmo2 olmo3 persimmon phi3 qwen2 qwen3 seed_oss smollm3 starcoder2
    """,
    r"is a mixture of experts": """
        afmoe aria_text bailing_hybrid beam cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
        granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 jamba jetmoe kimi_linear kolibri1
        laguna lfm2_moe llama4_text mellum minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe
        qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next solar_open zaya
    """,
    r"a target sees the text past the bottleneck": """
        bamba falcon_h1 lfm3 olmo_hybrid qwen3_5_text recurrent_gemma xglm zamba
    """,
    r"a text's vector depends on its neighbours": """
        lfm2
    """,
    r"\w+ asks for \w+": """
        deepseek_v4 doge flint gemma2 gpt_oss granite_swa granitemoe_swa inkling2_text inkling_text
        mimo_v2_flash vaultgemma
    """,
    r"doesn't hand on where the row's sequences are": """
        nemotron stablelm
    """,
    r"one width for both|heads of different widths": """
        axk1 deepseek_v2 deepseek_v3 gemma4_unified_text glm4_moe_lite longcat_flash minicpm3 youtu
    """,
    r"its LM head does more than a product": """
        modernbert-decoder nanochat phi
    """,
    r"keeps no decoder layers in `model\.layers`": """
        bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom blt
        camembert codegen cpmant ctrl data2vec-text electra ernie falcon falcon_mamba fuyu gemma3 gemma4
        gemma4_unified git got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj hrm_text
        mamba mamba2 marian mbart megatron-bert moss_transcribe_diarize mpt mvp openai-gpt opt pegasus plbart
        prophetnet rembert roberta roberta-prelayernorm roc_bert roformer rwkv trocr whisper xlm xlm-roberta
        xlm-roberta-xl xlnet xlstm xmod
    """,
    r"it can't run with our attention": """
        axk2 deepseek_v32 glm_moe_dsa hy_v4
    """,
    r"no small copy of its config can be made|too large to be tried|itself can't run it": """
        dots3_note dots3_note_text emu3 gemma4_text llama4 mllama phi4_multimodal qwen3_5 qwen3_5_moe zamba2
    """,
    # not tried: transformers builds no model from the small config, nor from its default one
    r"can't build it|Class validation error": """
        cohere_compass_text dbrx gemma3n gemma3n_text gemma4_assistant gemma4_unified_assistant musicgen
        musicgen_melody qwen4_exp qwen4_exp_text reformer
    """,
}

TABLE = {family: outcome for outcome, families in _FAMILIES.items() for family in families.split()}
"""Family to `RIGHT`, or to a pattern of the reason for which it is refused."""


def small_config(family: str) -> Any:
    """A small config of a family, or the default one of a family that is made of several models."""
    more = MORE.get(family, {})
    try:
        config = AutoConfig.for_model(family, **SMALL | more)
    except Exception:
        return AutoConfig.for_model(family)
    return AutoConfig.for_model(family) if config.sub_configs else config
