"""Tiny models of many architectures of transformers, each with a batch that it computes a loss of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

#: A model, and what it is called with.
Made = tuple[nn.Module, dict[str, Tensor]]

_VOCABULARY = 50
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TEXT = {key: value for key, value in _SIZES.items() if not key.endswith("token_id")}
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HEAD = {"head_dim": 16}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4}
_DEEPSEEK = {
    **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip

#: Model type of a decoder -> what its configuration has beside `_SIZES`.
_DECODERS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": _HEAD, "gemma2": _HEAD, "gemma3_text": _HEAD, "phi": {},
    "phi3": {}, "olmo2": {}, "granite": {}, "cohere": {}, "starcoder2": {}, "gpt2": _GPT2, "gpt_neox": {},
    "gptj": {**_GPT2, "rotary_dim": 8}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "bloom": {"n_layer": 2},
    "falcon": {}, "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "mixtral": _EXPERTS, "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_EXPERTS, **_HEAD}, "gpt_oss": {**_EXPERTS, **_HEAD}, "olmoe": _EXPERTS, "phimoe": _EXPERTS,
    "deepseek_v3": {
        **_DEEPSEEK, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "glm4_moe": {**_DEEPSEEK, **_HEAD}, "granitemoe": _EXPERTS,
    "jetmoe": {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {**_EXPERTS, **_HEAD, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
    "mamba": {"state_size": 4, "time_step_rank": 8}, "falcon_mamba": {"state_size": 4, "time_step_rank": 8},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 16, "n_groups": 1, "expand": 2}, "rwkv": {},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "zamba2": {
        "mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"], "adapter_rank": 4, "attention_head_dim": 32,
        "attention_hidden_size": 128, "num_mem_blocks": 1, "num_key_value_heads": 4,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1, **_HEAD,
        "hybrid_override_pattern": "M*-",
    },
    "granitemoehybrid": {**_EXPERTS, **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16, **_HEAD, "num_hidden_layers": 3},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        **_EXPERTS, **_HEAD, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
#: The same of encoders with a decoder, and of encoders.
_WITH_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    },
}  # fmt: skip
_ENCODERS: dict[str, dict[str, Any]] = {"bert": {}, "modernbert": {}, "deberta-v2": {}, "roberta": {}, "electra": {}}


def _tokens(highest: int = _VOCABULARY, length: int = 16) -> Tensor:
    return torch.randint(3, highest, (2, length))


def _language(kind: str) -> Made:
    for known, automatic in (
        (_DECODERS, transformers.AutoModelForCausalLM),
        (_WITH_DECODERS, transformers.AutoModelForSeq2SeqLM),
        (_ENCODERS, transformers.AutoModelForMaskedLM),
    ):
        if kind in known:
            settings = transformers.AutoConfig.for_model(kind, **{**_SIZES, **known[kind]})
            tokens = _tokens()
            return automatic.from_config(settings), {"input_ids": tokens, "labels": tokens}
    raise KeyError(kind)


def _with_image(model: nn.Module, pixels: Tensor, **more: Tensor) -> Made:
    """Four of the tokens are those of an image."""
    tokens = _tokens(45)
    tokens[:, 2:6] = 49
    labels = tokens.where(tokens < 45, -100)
    return model, {"input_ids": tokens, "labels": labels, "pixel_values": pixels, **more}


def _llava() -> Made:
    settings = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config={"model_type": "clip_vision_model", **_VISION},
        image_token_index=49, vision_feature_layer=-1,
    )  # fmt: skip
    return _with_image(transformers.LlavaForConditionalGeneration(settings), torch.randn(2, 3, 16, 16))


def _gemma3() -> Made:
    settings = transformers.Gemma3Config(
        text_config={"model_type": "gemma3_text", **_TEXT, **_HEAD},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=49, boi_token_index=48, eoi_token_index=47,
    )  # fmt: skip
    kinds = torch.zeros(2, 16, dtype=torch.int64)
    kinds[:, 2:6] = 1
    model = transformers.Gemma3ForConditionalGeneration(settings)
    return _with_image(model, torch.randn(2, 3, 16, 16), token_type_ids=kinds)


def _qwen2_5_vl() -> Made:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    settings = transformers.Qwen2_5_VLConfig(
        text_config={"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 64,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=49, vision_start_token_id=48, vision_end_token_id=47, video_token_id=46,
    )  # fmt: skip
    kinds = torch.zeros(2, 16, dtype=torch.int32)
    kinds[:, 2:6] = 1
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    model = transformers.Qwen2_5_VLForConditionalGeneration(settings)
    return _with_image(model, torch.randn(32, 96), image_grid_thw=grid, mm_token_type_ids=kinds)


def _vit() -> Made:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=5))
    return model, {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 2])}


def _whisper() -> Made:
    settings = transformers.WhisperConfig(
        vocab_size=_VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=20,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(settings)
    return model, {"input_features": torch.randn(2, 16, 40), "labels": _tokens(length=12)}


def _wav2vec2() -> Made:
    settings = transformers.Wav2Vec2Config(
        vocab_size=_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, pad_token_id=0, mask_time_prob=0.0, layerdrop=0.0, ctc_loss_reduction="mean",
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(settings), {"input_values": torch.randn(2, 400), "labels": _tokens(length=6)}


_OTHERS: dict[str, Callable[[], Made]] = {
    "llava": _llava, "gemma3": _gemma3, "qwen2_5_vl": _qwen2_5_vl, "vit": _vit, "whisper": _whisper,
    "wav2vec2": _wav2vec2,
}  # fmt: skip

#: Name -> what it is called in the documentation.
ARCHITECTURES = {
    **dict.fromkeys(_DECODERS, "decoder"),
    **dict.fromkeys(_WITH_DECODERS, "encoder and decoder"),
    **dict.fromkeys(_ENCODERS, "encoder"),
    **dict.fromkeys(("llava", "gemma3", "qwen2_5_vl"), "vision and language"),
    "vit": "vision", "whisper": "speech", "wav2vec2": "speech",
}  # fmt: skip


def make(name: str) -> Made:
    """Return a model, the same at every call, and a batch."""
    torch.manual_seed(0)
    model, batch = _OTHERS[name]() if name in _OTHERS else _language(name)
    return model.train(), batch
