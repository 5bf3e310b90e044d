"""Pins that a model saved after training with adapters computes what it computed with them: LoRA, rsLoRA and DoRA. To
1e-5 of the logits: the sums of float32 are taken in another order.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers

from lift_ds import LiftConfig
from lift_ds.training import arguments, loading, saving

RANK = 4


@pytest.mark.parametrize(
    ("flags", "scale"), [({}, 2.0), ({"use_rslora": True}, 2 * RANK / RANK**0.5), ({"use_dora": True}, 2.0)]
)
def test_the_saved_model_computes_what_the_adapters_did(flags: dict[str, bool], scale: float) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, **sizes))
    plain = copy.deepcopy(base)
    script = arguments.ScriptArguments(method="lora", lora_rank=RANK, **flags)
    model = peft.get_peft_model(base, loading.lora_config(script, LiftConfig(density=0.05)))
    layer = next(module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    assert layer.scaling["default"] == pytest.approx(scale)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = saving.plain_state(model, torch.float32, torch.float32)
    tokens = torch.randint(64, (2, 8))
    untrained = plain(tokens).logits
    plain.load_state_dict(state)
    with torch.no_grad():
        logits, wanted = plain(tokens).logits, model(tokens).logits
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert not torch.allclose(logits, untrained, atol=1e-2)
