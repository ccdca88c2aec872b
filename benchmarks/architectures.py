"""Model architectures, small and with random weights, as folders that a user might bring: for `make families`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sppo.models.tiny import character_tokenizer

TEXT = {
    "vocab_size": 112, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
HEADS = {"num_key_value_heads": 4}
DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 16}
WINDOW = {"sliding_window": 8}
GEMMA4 = {
    **TEXT, **WINDOW, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 112, "global_head_dim": 8, "final_logit_softcapping": 30.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
TOKENS = {
    "image_token_id": 111, "image_token_index": 111, "video_token_id": 110, "boi_token_index": 109, "eoi_token_index": 108,
    "vision_start_token_id": 107, "vision_end_token_id": 106, "boi_token_id": 109, "eoi_token_id": 108,
}  # fmt: skip
PLAIN = {k: v for k, v in TEXT.items() if k != "head_dim"}

TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    # dense
    "Llama 2, 3": ("llama", TEXT),
    "Mistral": ("mistral", TEXT | WINDOW),
    "Ministral": ("ministral", TEXT | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "Ministral 3": ("ministral3", TEXT),
    "Qwen 2": ("qwen2", PLAIN),
    "Qwen 3": ("qwen3", TEXT),
    "SmolLM 3": ("smollm3", TEXT),
    "Gemma": ("gemma", TEXT),
    "Gemma 2": ("gemma2", TEXT | WINDOW),
    "Gemma 3 text": ("gemma3_text", TEXT | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}),
    "Gemma 3n text": (
        "gemma3n_text",
        TEXT
        | WINDOW
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 112,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "Gemma 4 text": ("gemma4_text", GEMMA4),
    "Phi": ("phi", PLAIN | HEADS),
    "Phi 3, 4": ("phi3", PLAIN),
    "OLMo": ("olmo", PLAIN | HEADS),
    "OLMo 2": ("olmo2", PLAIN | HEADS),
    "OLMo 3": ("olmo3", PLAIN | HEADS | WINDOW),
    "Granite": ("granite", PLAIN | {"logits_scaling": 8.0}),
    "Cohere (Command R)": ("cohere", PLAIN | {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", TEXT | WINDOW),
    "GLM": ("glm", TEXT),
    "GLM 4": ("glm4", TEXT),
    "EXAONE 4": ("exaone4", PLAIN | WINDOW),
    "ERNIE 4.5": ("ernie4_5", TEXT),
    "Seed-OSS": ("seed_oss", TEXT),
    "StableLM": ("stablelm", PLAIN),
    "StarCoder 2": ("starcoder2", PLAIN),
    "Falcon": ("falcon", {**PLAIN, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 64}),
    "GPT-2": (
        "gpt2",
        {"vocab_size": 112, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 1},
    ),
    "GPT-NeoX, Pythia": ("gpt_neox", PLAIN),
    "GPT-J": (
        "gptj",
        {"vocab_size": 112, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    ),
    "BLOOM": ("bloom", {"vocab_size": 112, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("mpt", {"vocab_size": 112, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "OPT": ("opt", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Nemotron": ("nemotron", TEXT),
    "Apertus": ("apertus", PLAIN),
    "Arcee": ("arcee", TEXT),
    "Helium": ("helium", TEXT),
    "Hunyuan": ("hunyuan_v1_dense", TEXT),
    "BitNet": ("bitnet", TEXT),
    "nanochat": ("nanochat", PLAIN),
    "MiniCPM 3": ("minicpm3", PLAIN | LATENT),
    # experts
    "Mixtral": ("mixtral", TEXT | EXPERTS),
    "Qwen 2 MoE": ("qwen2_moe", PLAIN | EXPERTS),
    "Qwen 3 MoE": ("qwen3_moe", TEXT | EXPERTS),
    "OLMoE": ("olmoe", PLAIN | HEADS | EXPERTS),
    "Granite MoE": ("granitemoe", PLAIN | EXPERTS),
    "Phi 3.5 MoE": ("phimoe", PLAIN | EXPERTS),
    "DeepSeek-V2": ("deepseek_v2", TEXT | EXPERTS | LATENT),
    "DeepSeek-V3": ("deepseek_v3", TEXT | EXPERTS | LATENT),
    "GLM 4 MoE": ("glm4_moe", TEXT | EXPERTS),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", TEXT | EXPERTS | {"moe_num_experts": 4, "moe_k": 2}),
    "GPT-OSS": ("gpt_oss", TEXT | EXPERTS | WINDOW),
    "MiniMax M2": ("minimax_m2", TEXT | EXPERTS | {"rotary_dim": 8}),
    "Llama 4 text": ("llama4_text", TEXT | EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8}),
    # states and convolutions
    "MiniMax": ("minimax", TEXT | EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    "Mamba": ("mamba", {**PLAIN, "state_size": 8, "time_step_rank": 4}),
    "Mamba 2": ("mamba2", {**PLAIN, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "Falcon Mamba": ("falcon_mamba", {**PLAIN, "state_size": 8, "time_step_rank": 4}),
    "Falcon-H1": ("falcon_h1", TEXT | MAMBA2 | {"lm_head_multiplier": 0.5}),
    "Bamba": ("bamba", PLAIN | MAMBA2 | {"attn_layer_indices": [1]}),
    "Jamba": ("jamba", PLAIN | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8}),
    "Granite 4": ("granitemoehybrid", PLAIN | MAMBA2 | EXPERTS | {"layer_types": ["mamba", "attention"]}),
    "Nemotron-H": (
        "nemotron_h",
        TEXT
        | EXPERTS
        | {
            "layers_block_type": ["mamba", "attention", "mlp", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "num_hidden_layers": 4,
        },
    ),
    "LFM 2": ("lfm2", PLAIN | {"layer_types": ["conv", "full_attention"]}),
    "LFM 2 MoE": ("lfm2_moe", PLAIN | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "Qwen 3 Next": ("qwen3_next", TEXT | EXPERTS | DELTA),
    "Qwen 3.5 text": ("qwen3_5_text", TEXT | DELTA),
    "Qwen 3.5 MoE text": ("qwen3_5_moe_text", TEXT | EXPERTS | DELTA),
    "RecurrentGemma": (
        "recurrent_gemma",
        {**PLAIN, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    # with a tower
    "Gemma 3": (
        "gemma3",
        {
            "text_config": TEXT | WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            **TOKENS,
        },
    ),
    "Gemma 4": (
        "gemma4",
        {
            "text_config": GEMMA4,
            "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
            "audio_config": None,
            **TOKENS,
        },
    ),
    "Mistral 3": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
            **TOKENS,
        },
    ),
    "Qwen 2 VL": (
        "qwen2_vl",
        {
            "text_config": PLAIN | MROPE,
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "mlp_ratio": 2,
            },
            **TOKENS,
        },
    ),
    "Qwen 2.5 VL": (
        "qwen2_5_vl",
        {"text_config": PLAIN | MROPE, "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]}, **TOKENS},
    ),
    "Qwen 3 VL": ("qwen3_vl", {"text_config": TEXT | MROPE, "vision_config": QWEN_VISION | DEEPSTACK, **TOKENS}),
    "Qwen 3 VL MoE": (
        "qwen3_vl_moe",
        {"text_config": TEXT | EXPERTS | MROPE, "vision_config": QWEN_VISION | DEEPSTACK, **TOKENS},
    ),
    "Qwen 3.5": (
        "qwen3_5",
        {"text_config": TEXT | DELTA | MROPE, "vision_config": QWEN_VISION | {"num_position_embeddings": 16}, **TOKENS},
    ),
    "Qwen 3.5 MoE": (
        "qwen3_5_moe",
        {
            "text_config": TEXT | EXPERTS | DELTA | MROPE,
            "vision_config": QWEN_VISION | {"num_position_embeddings": 16},
            **TOKENS,
        },
    ),
    "SmolVLM": ("smolvlm", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, **TOKENS}),
    "Idefics 3": ("idefics3", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": VISION, **TOKENS}),
    "Llama 3.2 Vision": (
        "mllama",
        {
            "text_config": PLAIN | {"cross_attention_layers": [1], "num_hidden_layers": 4},
            "vision_config": VISION
            | {
                "num_global_layers": 1,
                "attention_heads": 2,
                "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
            **TOKENS,
        },
    ),
    "Llama 4": (
        "llama4",
        {
            "text_config": TEXT | EXPERTS | {"intermediate_size_mlp": 64, "attention_chunk_size": 8},
            "vision_config": VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            **TOKENS,
        },
    ),
    "LLaVA": (
        "llava",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            **TOKENS,
        },
    ),
    "LLaVA OneVision": (
        "llava_onevision",
        {
            "text_config": {"model_type": "qwen2", **PLAIN},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            **TOKENS,
        },
    ),
    "InternVL 3": (
        "internvl",
        {
            "text_config": {"model_type": "qwen2", **PLAIN},
            "vision_config": VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            **TOKENS,
        },
    ),
    "Aya Vision": (
        "aya_vision",
        {
            "text_config": {"model_type": "cohere2", **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            **TOKENS,
        },
    ),
    "GLM 4.1V": (
        "glm4v",
        {
            "text_config": PLAIN
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 2],
                    "partial_rotary_factor": 1.0,
                }
            },
            "vision_config": QWEN_VISION | {"image_size": 32},
            **TOKENS,
        },
    ),
    "LFM 2 VL": (
        "lfm2_vl",
        {
            "text_config": {"model_type": "lfm2", **PLAIN, "layer_types": ["conv", "full_attention"]},
            "vision_config": {"model_type": "siglip2_vision_model", **VISION, "num_patches": 16},
            **TOKENS,
        },
    ),
    "Granite Vision (LLaVA-NeXT)": (
        "llava_next",
        {
            "text_config": {"model_type": "granite", **PLAIN, "logits_scaling": 8.0},
            "vision_config": {"model_type": "siglip_vision_model", **VISION},
            **TOKENS,
        },
    ),
}


def make(name: str, folder: Path, seed: int = 0) -> Any:
    """Save a model of the table and a tokenizer that reads characters; returns the model."""
    kind, sizes = TABLE[name]
    config = AutoConfig.for_model(kind, **sizes)
    factory = AutoModelForImageTextToText if "text_config" in sizes else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory.from_config(config)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    if "text_config" in sizes:  # as published: an image processor beside the weights
        (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}\n')
    return model
