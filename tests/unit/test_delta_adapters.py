"""Pins deltas as adapters of PEFT and as patches of vLLM: PEFT loads both formats and computes with the tuned weights,
as far as an addition in their dtype can give them; what an adapter cannot hold is refused by name; patches carry what
is needed to set the same weights.

PEFT adds differences. By Sterbenz' lemma the difference of two numbers within a factor of two of each other has no
rounding error, so that small changes come back to the bit in every dtype. Entries that changed more are off by what
their additions round: half a unit in the last place of the difference, and of the sum.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from cases import token_batch
from helpers import same_bits
from peft import PeftModel
from peft.tuners.supertuning import SupertuningLayer
from safetensors.torch import load_file
from saved_models import NORM, Q, altered, model_in, perturb, refused, rewrite, state
from torch import Tensor
from transformers import AutoModelForCausalLM

from lift_ds import cli
from lift_ds.delta import export_delta, read_patches
from lift_ds.delta.adapters import ADAPTERS
from lift_ds.delta.file import Change

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["shira", "supertuning"]

#: Half a unit in the last place of 1.
EPS = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


def nudge(file: dict[str, Tensor]) -> None:
    """Change a twentieth of each linear layer by up to a third, of one layer more than of the others."""
    drawn = torch.Generator().manual_seed(0)
    for name, tensor in file.items():
        if "_proj" in name:
            chosen = torch.rand(tensor.shape, generator=drawn) < (0.07 if name == Q else 0.05)
            factor = 1 + 0.6 * (torch.rand(tensor.shape, generator=drawn) - 0.5)
            tensor[chosen] = (tensor.float() * factor).to(tensor.dtype)[chosen]


def redraw(file: dict[str, Tensor]) -> None:
    """Give a twentieth of each linear layer values that have nothing to do with the old ones."""
    perturb({name: tensor for name, tensor in file.items() if "_proj" in name})


def loaded(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peft_computes_with_the_tuned_weights(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = model_in(tmp_path / "base", dtype)
    for change in (nudge, redraw):
        tuned = altered(base, tmp_path / change.__name__, change)
        adapter = tmp_path / f"{change.__name__}_adapter"
        assert cli.main(["export", str(base), str(tuned), "--output", str(adapter), "--format", kind]) == 0
        want, old = state(tuned), state(base)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(tuned, dtype="auto").eval()(token_batch(0)).logits
            model = loaded(base, adapter)
            logits = model(token_batch(0)).logits
        got = model.merge_and_unload().state_dict()
        assert got.keys() == want.keys()
        if change is nudge:
            assert torch.equal(logits, expected)
            assert all(torch.equal(got[name], want[name]) for name in want)
        else:
            for name in want:
                before, after = old[name].double(), want[name].double()
                rounded = torch.float32 if kind == "shira" else dtype  # what the difference is held in when it is added
                bound = 2.01 * EPS[rounded] * (after - before).abs() + 1.01 * EPS[dtype] * after.abs()
                assert ((got[name].double() - after).abs() <= bound).all(), name
            torch.testing.assert_close(logits, expected, rtol=0, atol=40 * EPS[dtype] * expected.abs().max().item())


def test_sizes_are_those_that_peft_computes(tmp_path: Path) -> None:
    """By the layer that changed most, and no larger than that; the file names base and task."""
    base = model_in(tmp_path / "base")
    tuned = altered(base, tmp_path / "tuned", nudge)
    changed = {name: int((old != state(tuned)[name]).sum()) for name, old in state(base).items()}
    shapes = {name: state(base)[name].shape for name, number in changed.items() if number}
    for kind in FORMATS:
        assert cli.main(["export", str(base), str(tuned), "--output", str(tmp_path / kind), "--format", kind]) == 0
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
        assert config["task_type"] == "CAUSAL_LM"
        assert sorted(config["target_modules"]) == sorted(name.removesuffix(".weight") for name in shapes)
        if kind == "shira":
            assert config["r"] == max(math.ceil(changed[name] / sum(shape)) for name, shape in shapes.items())
        else:
            most = max(changed[name] / shape.numel() for name, shape in shapes.items())
            assert config["sparsity"] == pytest.approx(1 - most, rel=1e-12)
        for name, positions in load_file(tmp_path / kind / "adapter_model.safetensors").items():
            if name.endswith("_indices"):
                entries = positions.reshape(-1, positions.shape[-1]).T.tolist()
                assert len({tuple(entry) for entry in entries}) == len(entries), "each position once"


def test_a_share_makes_room_for_every_number_of_entries() -> None:
    """PEFT multiplies in floating point and cuts off, by which an entry can be lost."""
    lost = 0
    for changed in range(1, 64 * 48 + 1):
        settings, sizes = ADAPTERS["supertuning"].size({"a": Change((64, 48), "F32", "sparse", changed, "", "")})
        assert sizes["a"] == SupertuningLayer._num_trainable(None, 64 * 48, settings["sparsity"])
        assert changed <= sizes["a"] <= changed + 1
        lost += int(64 * 48 * (1 - (1 - changed / (64 * 48)))) < changed
    assert lost, "otherwise this tries nothing"


def bump(name: str, file: dict[str, Tensor]) -> None:
    if name in file:
        file[name].view(-1)[0] += 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NORM, f"{NORM} of shape [32] changed, and is no matrix of a linear layer"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight changed, and is an embedding"),
        ("mlp.experts.0.w1.weight", "mlp.experts.0.w1.weight changed, and is an embedding or an expert's matrix"),
        ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj of shape [2, 4, 4] changed, and is no matrix"),
    ],
)
def test_what_an_adapter_cannot_hold_is_named(name: str, message: str, tmp_path: Path) -> None:
    base = model_in(tmp_path / "base")
    if "experts" in name:
        shape = (2, 4, 4) if name.endswith("proj") else (4, 4)
        rewrite(base, lambda file: file.update({name: torch.zeros(shape)}))
    tuned = altered(base, tmp_path / "tuned", lambda file: bump(name, file))
    for kind in FORMATS:
        said = refused("export", base, tuned, "--output", tmp_path / "adapter", "--format", kind)
        assert message in said
        assert "--format lift" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_adapters_that_cannot_be_are_refused(tmp_path: Path) -> None:
    base = model_in(tmp_path / "base")
    same = Path(shutil.copytree(base, tmp_path / "same"))
    full = altered(base, tmp_path / "full", lambda file: file[Q].add_(1))
    less = altered(base, tmp_path / "less", lambda file: file.pop("lm_head.weight"))
    out = tmp_path / "out"
    assert "nothing changed" in refused("export", base, same, "--output", out, "--format", "shira")
    assert "is in one of the models alone" in refused("export", base, less, "--output", out, "--format", "supertuning")
    # All 1024 entries of the one are 16 (32 + 32); the other has 512, and not 16 (16 + 32).
    both = altered(full, tmp_path / "both", lambda file: bump("model.layers.0.self_attn.k_proj.weight", file))
    said = refused("export", base, both, "--output", out, "--format", "shira")
    assert "SHiRA has one r for all matrices, 16 for the one that changed most" in said
    assert "k_proj.weight [16, 32] has no r (m + n) entries" in said
    assert not list(tmp_path.glob("out*"))
    assert cli.main(["export", str(base), str(both), "--output", str(out), "--format", "supertuning"]) == 0
    got = loaded(base, out).merge_and_unload().state_dict()
    torch.testing.assert_close(got[Q], state(both)[Q], rtol=0, atol=1e-7)  # a few units in the last place of 1
    assert "is there already" in refused("export", base, both, "--output", out, "--format", "shira")


def test_patches_set_the_tuned_weights(tmp_path: Path) -> None:
    """As vLLM does it: all values where there are no positions, else those at flat positions."""
    base = model_in(tmp_path / "base", torch.bfloat16, "20KB")
    tuned = altered(base, tmp_path / "tuned", lambda file: (redraw(file), bump(NORM, file)))
    file = export_delta(str(base), str(tuned), tmp_path / "delta.safetensors")
    weights, want = state(base), state(tuned)
    for patch in read_patches(file):
        assert patch._fields == ("name", "shape", "dtype", "values", "indices")
        assert tuple(weights[patch.name].shape) == patch.shape
        assert patch.values.dtype == patch.dtype == torch.bfloat16
        assert patch.values.dim() == 1
        if patch.indices is None:
            weights[patch.name] = patch.values.view(patch.shape)
        else:
            assert (patch.indices.diff() > 0).all()
            weights[patch.name].view(-1)[patch.indices.long()] = patch.values
    assert all(same_bits(weights[name], want[name]) for name in want)
    assert len({patch.name for patch in read_patches(file)}) == 1 + sum("_proj" in name for name in want)
