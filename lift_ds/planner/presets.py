"""Named model sizes: which model of the Hugging Face hub each stands for, and its shapes.

    python -m lift_ds.planner.presets 7B      # prints meta-llama/Llama-2-7b-hf

The shapes are those of each model's published config.json, so that planning needs no network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model by its name on the hub and the fields of its config.json that shapes depend on."""

    hub_name: str
    config: dict[str, Any]


def _decoder(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


PRESETS = {
    "1B": Preset(
        "meta-llama/Llama-3.2-1B",
        _decoder("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    ),
    "3B": Preset(
        "meta-llama/Llama-3.2-3B",
        _decoder("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    ),
    "7B": Preset("meta-llama/Llama-2-7b-hf", _decoder("llama", 4096, 11008, 32, 32, 32, 32000)),
    "8B": Preset("meta-llama/Meta-Llama-3-8B", _decoder("llama", 4096, 14336, 32, 32, 8, 128256)),
    "13B": Preset("meta-llama/Llama-2-13b-hf", _decoder("llama", 5120, 13824, 40, 40, 40, 32000)),
    "32B": Preset("Qwen/Qwen2.5-32B", _decoder("qwen2", 5120, 27648, 64, 40, 8, 152064)),
    "70B": Preset("meta-llama/Llama-2-70b-hf", _decoder("llama", 8192, 28672, 80, 64, 8, 32000)),
    "MIXTRAL-8X7B": Preset(
        "mistralai/Mixtral-8x7B-v0.1",
        _decoder("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
    ),
    "QWEN3-30B-A3B": Preset(
        "Qwen/Qwen3-30B-A3B",
        _decoder(
            "qwen3_moe",
            2048,
            6144,
            48,
            32,
            4,
            151936,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        ),
    ),
    "GPT-OSS-20B": Preset(
        "openai/gpt-oss-20b",
        _decoder(
            "gpt_oss",
            2880,
            2880,
            24,
            64,
            8,
            201088,
            head_dim=64,
            num_local_experts=32,
            num_experts_per_tok=4,
            layer_types=["sliding_attention", "full_attention"] * 12,
        ),
    ),
}


def preset_named(name: str) -> Preset | None:
    """Return the preset of a name, in whatever case; None where there is none."""
    return PRESETS.get(name.upper())


def main(arguments: list[str] | None = None) -> int:
    """Print the hub's name of a preset; 2 for an unknown one."""
    given = sys.argv[1:] if arguments is None else arguments
    preset = preset_named(given[0]) if len(given) == 1 else None
    if preset is None:
        print(f"error: size {' '.join(given) or '(none)'} is not one of {', '.join(PRESETS)}", file=sys.stderr)
        return 2
    print(preset.hub_name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
