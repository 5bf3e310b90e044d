"""Small configurations of many architectures, each with what the planner is to find in it, and published ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: What the planner says of an architecture.
UNGATED = "feed-forward layers without a gate"
ENCODER = "an encoder and a decoder"
OUTSIDE = "matrices outside the language model's layers"

LLAMA = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50,
}  # fmt: skip
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 32}
_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 32,
    "is_encoder_decoder": True, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_T5 = {"d_model": 16, "d_ff": 40, "num_layers": 3, "num_heads": 4, "d_kv": 6, "vocab_size": 50}
FALCON = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 50}
VISION = {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_CLIP = {"model_type": "clip_vision_model", **VISION}
_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_QWEN_VISION = {
    "depth": 2, "embed_dim": 12, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 16, "in_channels": 3, "patch_size": 4,
}  # fmt: skip
_SMALL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True)
class Case:
    """A configuration, and what is to be found in it.

    Args:
        content: of the config.json; hidden size 16, vocabulary 50, heads 4 where it has heads.
        model: class of transformers that it stands for.
        layers: L.
        intermediate: i.
        key_value: c.
        heads: a.
        said: what the plan says that the formulas do not know of it, in part.
    """

    content: dict[str, Any]
    model: str
    layers: int = 3
    intermediate: int = 40
    key_value: int = 16
    heads: int = 4
    said: tuple[str, ...] = ()


CASES = {
    "llama": Case({"model_type": "llama", **LLAMA}, "LlamaForCausalLM", key_value=8),
    "gpt2": Case({"model_type": "gpt2", **_GPT2, "n_inner": None}, "GPT2LMHeadModel", intermediate=64, said=(UNGATED,)),
    "gpt2 with n_inner": Case({"model_type": "gpt2", **_GPT2, "n_inner": 40}, "GPT2LMHeadModel", said=(UNGATED,)),
    "gptj": Case(
        {"model_type": "gptj", **_GPT2, "rotary_dim": 4}, "GPTJForCausalLM", intermediate=64, said=(UNGATED,)
    ),
    "codegen": Case(
        {"model_type": "codegen", **_GPT2, "rotary_dim": 4}, "CodeGenForCausalLM", intermediate=64, said=(UNGATED,)
    ),
    "gpt_bigcode": Case(
        {"model_type": "gpt_bigcode", **_GPT2, "multi_query": True},
        "GPTBigCodeForCausalLM", intermediate=64, key_value=4, said=(UNGATED,),
    ),
    "gpt_neo": Case(
        {
            "model_type": "gpt_neo", "hidden_size": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 50,
            "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32,
        },
        "GPTNeoForCausalLM", layers=2, intermediate=64, said=(UNGATED,),
    ),
    "gpt_neox": Case(
        {"model_type": "gpt_neox", **LLAMA, "max_position_embeddings": 32}, "GPTNeoXForCausalLM", said=(UNGATED,)
    ),
    "opt": Case(
        {
            "model_type": "opt", "hidden_size": 16, "ffn_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 50, "max_position_embeddings": 32, "word_embed_proj_dim": 8,
        },
        "OPTForCausalLM", said=(UNGATED, f"2 of 20 {OUTSIDE}"),
    ),
    "falcon": Case(
        {"model_type": "falcon", **FALCON}, "FalconForCausalLM", intermediate=64, key_value=4, said=(UNGATED,)
    ),
    "falcon without multi_query": Case(
        {"model_type": "falcon", **FALCON, "multi_query": False, "alibi": True, "bias": True},
        "FalconForCausalLM", intermediate=64, said=(UNGATED,),
    ),
    "falcon, new architecture": Case(
        {"model_type": "falcon", **FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 40},
        "FalconForCausalLM", key_value=8, said=(UNGATED,),
    ),
    "bloom": Case(
        {"model_type": "bloom", "n_embed": 16, "n_layer": 3, "num_attention_heads": 4, "vocab_size": 50},
        "BloomForCausalLM", intermediate=64, said=(UNGATED,),
    ),
    "mpt": Case(
        {
            "model_type": "mpt", "d_model": 16, "n_layers": 3, "n_heads": 4, "vocab_size": 50, "max_seq_len": 32,
            "attn_config": {"attn_impl": "torch", "alibi": True},
        },
        "MptForCausalLM", intermediate=64, said=(UNGATED,),
    ),
    "phi": Case({"model_type": "phi", **LLAMA}, "PhiForCausalLM", key_value=8, said=(UNGATED,)),
    "phi3": Case({"model_type": "phi3", **LLAMA, **_SMALL_IDS}, "Phi3ForCausalLM", key_value=8),
    "mixtral": Case(
        {"model_type": "mixtral", **LLAMA, "num_local_experts": 2},
        "MixtralForCausalLM", intermediate=80, key_value=8, said=("experts",),
    ),
    "modernbert, whose head is named decoder": Case(
        {"model_type": "modernbert-decoder", **LLAMA, **_SMALL_IDS, "cls_token_id": 3, "sep_token_id": 4},
        "ModernBertDecoderForCausalLM", said=(f"1 of 19 {OUTSIDE}",),
    ),
    "gemma3n, with a size for each layer": Case(
        {
            "model_type": "gemma3n_text", **LLAMA, **_SMALL_IDS, "intermediate_size": [40, 40, 40], "head_dim": 4,
            "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3, "vocab_size_per_layer_input": 50,
            "hidden_size_per_layer_input": 4, "laurel_rank": 2, "activation_sparsity_pattern": [0.0] * 3,
        },
        "Gemma3nForCausalLM", key_value=8, said=(f"7 of 49 {OUTSIDE}",),
    ),
    "dots3, whose layers differ": Case(
        {
            "model_type": "dots3_note_text", **LLAMA, **_SMALL_IDS, "num_key_value_heads": 4, "head_dim": 8,
            "kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
            "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "swa_kv_lora_rank": 4,
            "swa_q_lora_rank": 4, "swa_qk_rope_head_dim": 4, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 4,
            "index_head_dim": 8, "index_n_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
            "moe_intermediate_size": 8, "shared_experts_intermediate_size": 8,
        },
        "Dots3NoteForCausalLM", intermediate=8, key_value=32, said=("experts",),
    ),
    "lfm2, whose width is not the one it names": Case(
        {"model_type": "lfm2", **LLAMA, **_SMALL_IDS, "layer_types": ["conv", "full_attention", "conv"]},
        "Lfm2ForCausalLM", intermediate=256, key_value=8, said=("2 of 3 layers without attention",),
    ),
    "mamba": Case(
        {
            "model_type": "mamba", "hidden_size": 16, "expand": 2, "state_size": 4, "num_hidden_layers": 3,
            "vocab_size": 50,
        },
        "MambaForCausalLM", intermediate=32, heads=1, said=("3 of 3 layers without attention",),
    ),
    "mamba2": Case(
        {
            "model_type": "mamba2", "hidden_size": 16, "expand": 2, "state_size": 4, "num_hidden_layers": 3,
            "num_heads": 4, "head_dim": 8, "n_groups": 1, "vocab_size": 50,
            "time_step_limit": [0.0, {"__float__": "Infinity"}],
        },
        "Mamba2ForCausalLM", intermediate=32, heads=1, said=("3 of 3 layers without attention", UNGATED),
    ),
    "jamba": Case(
        {
            "model_type": "jamba", **LLAMA, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "JambaForCausalLM", intermediate=80, key_value=8, said=("2 of 3 layers without attention", "experts"),
    ),
    "t5": Case(
        {"model_type": "t5", **_T5}, "T5ForConditionalGeneration", layers=6, key_value=24, said=(ENCODER, UNGATED)
    ),
    "t5 with a gate": Case(
        {"model_type": "t5", **_T5, "num_decoder_layers": 1, "feed_forward_proj": "gated-gelu"},
        "T5ForConditionalGeneration", layers=4, key_value=24, said=(ENCODER,),
    ),
    "bart": Case(
        {"model_type": "bart", **_BART, "architectures": ["BartModel"]},
        "BartForConditionalGeneration", said=(ENCODER, UNGATED),
    ),
    "bart's decoder": Case(
        {"model_type": "bart", **_BART, "is_encoder_decoder": False, "architectures": ["BartForCausalLM"]},
        "BartForCausalLM", layers=2, said=(UNGATED,),
    ),
    "llava": Case(
        {
            "model_type": "llava", "text_config": {"model_type": "llama", **LLAMA}, "vision_config": _CLIP,
            "image_token_index": 49,
        },
        "LlavaForConditionalGeneration", key_value=8, said=(f"27 of 48 {OUTSIDE}",),
    ),
    "qwen2_vl": Case(
        {"model_type": "qwen2_vl", **LLAMA, **_SMALL_IDS, "vision_config": _QWEN_VISION},
        "Qwen2VLForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
    "qwen2_5_vl": Case(
        {
            "model_type": "qwen2_5_vl",
            "text_config": {"model_type": "qwen2_5_vl_text", **LLAMA, **_SMALL_IDS},
            "vision_config": {
                "depth": 2, "hidden_size": 12, "num_heads": 2, "intermediate_size": 20, "out_hidden_size": 16,
                "in_channels": 3, "patch_size": 4,
            },
        },
        "Qwen2_5_VLForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
    "gemma3": Case(
        {
            "model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **LLAMA, **_SMALL_IDS, "head_dim": 6},
            "vision_config": {**_SIGLIP, "vision_use_head": False}, "mm_tokens_per_image": 4, "image_token_index": 49,
            "boi_token_index": 48, "eoi_token_index": 47,
        },
        "Gemma3ForConditionalGeneration", key_value=12, said=(OUTSIDE,),
    ),
    "mistral3": Case(
        {
            "model_type": "mistral3", "text_config": {"model_type": "mistral", **LLAMA},
            "vision_config": {"model_type": "pixtral", **VISION}, "image_token_index": 49,
        },
        "Mistral3ForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
    "mllama": Case(
        {
            "model_type": "mllama",
            "text_config": {
                "model_type": "mllama_text_model", **LLAMA, **_SMALL_IDS, "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "model_type": "mllama_vision_model", "hidden_size": 12, "intermediate_size": 20,
                "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "image_size": 8, "patch_size": 4,
                "vision_output_dim": 24, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": 49,
        },
        "MllamaForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
    "idefics": Case(
        {
            "model_type": "idefics", **LLAMA, "additional_vocab_size": 0, "cross_layer_interval": 2,
            "use_resampler": False,
            "vision_config": {**VISION, "embed_dim": 12},
            "perceiver_config": {"use_resampler": False},
        },
        "IdeficsForVisionText2Text", said=(OUTSIDE,),
    ),
    "idefics2": Case(
        {
            "model_type": "idefics2", "text_config": {"model_type": "mistral", **LLAMA}, "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 16, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
                "resampler_head_dim": 4, "num_key_value_heads": 1,
            },
            "image_token_id": 49,
        },
        "Idefics2ForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
    "idefics3": Case(
        {
            "model_type": "idefics3", "text_config": {"model_type": "llama", **LLAMA}, "vision_config": VISION,
            "image_token_id": 49,
        },
        "Idefics3ForConditionalGeneration", key_value=8, said=(OUTSIDE,),
    ),
}  # fmt: skip

#: Fields of published files that shapes depend on, and the parameters of these models as their pages give them.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2": (
        124_439_808,
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
    ),
    "opt-350m": (
        331_196_416,
        {
            "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    "opt-1.3b": (
        1_315_758_080,
        {
            "model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 24, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048,
        },
    ),
    "falcon-7b": (
        6_921_720_704,
        {
            "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
            "vocab_size": 65024, "multi_query": True, "bias": False,
        },
    ),
    "t5-base": (
        222_903_552,
        {
            "model_type": "t5", "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12,
            "vocab_size": 32128, "relative_attention_num_buckets": 32,
        },
    ),
    "bart-base": (
        139_420_416,
        {
            "model_type": "bart", "architectures": ["BartModel"], "d_model": 768, "encoder_layers": 6,
            "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_attention_heads": 12,
            "decoder_attention_heads": 12, "vocab_size": 50265, "max_position_embeddings": 1024,
        },
    ),
    "mamba-130m": (
        129_135_360,
        {
            "model_type": "mamba", "hidden_size": 768, "expand": 2, "state_size": 16, "num_hidden_layers": 24,
            "vocab_size": 50280,
        },
    ),
    "bloom-560m": (
        559_214_592,
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880},
    ),
    "llava-1.5-7b": (
        7_063_427_072,
        {
            "model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
                "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
            },
        },
    ),
    "Qwen2-VL-2B": (
        2_208_985_600,
        {
            "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
            "num_hidden_layers": 28, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936,
            "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
        },
    ),
    "gemma-3-4b": (
        4_300_079_472,
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            },
            "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
            },
        },
    ),
}  # fmt: skip
