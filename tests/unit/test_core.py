"""Pins that the core needs torch, tqdm and safetensors alone: it trains as the reference does where nothing else can be
imported, imports no other library where they are, and says what to install when they are asked for.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What lift_ds uses beside, which the finder below hides.
OTHERS = ("deepspeed", "transformers", "accelerate", "datasets", "trl", "peft", "psutil", "huggingface_hub")

ALONE = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OTHERS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""

TRAINS = """
import torch
from torch import nn
import lift_ds
from lift_ds.reference import ReferenceLift

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32, bias=False), nn.Tanh(), nn.Linear(32, 8, bias=False)).double()

def loss_of(model, step):
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - 1).square().mean()

config = lift_ds.LiftConfig(density=0.2, lra_rank=4, refresh_interval=3, solver="svd", lr=1e-2)
model, plain = build(), build()
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
lift_ds.attach(model, config)
optimizer = lift_ds.LiftAdamW(model, lr=config.lr)
reference = ReferenceLift({name: p for name, p in plain.named_parameters()}, config)
for step in range(7):
    loss_of(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(plain, step).backward()
    reference.step()
assert [report.step for report in lift_ds.refreshes(model)] == [3, 6]
lift_ds.detach(model)
assert model.state_dict().keys() == before.keys()
for name, tensor in model.state_dict().items():
    torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-10, atol=1e-12)
    assert 0 < (tensor != before[name]).double().mean() < 0.7
print("trained")
"""

IMPORTS = """
import sys
import lift_ds
lift_ds.attach, lift_ds.detach, lift_ds.LiftAdamW, lift_ds.LiftConfig, lift_ds.principal_indices, lift_ds.refreshes
"""


def run(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.strip()


def test_it_trains_without_them() -> None:
    """In float64, where two orders of the same sums differ by 1e-15 a step."""
    assert run(ALONE + TRAINS) == "trained"


@pytest.mark.parametrize(("name", "package"), [("initialize", "deepspeed"), ("LiftCallback", "transformers")])
def test_what_needs_them_says_so(name: str, package: str) -> None:
    asked = f"import lift_ds\ntry:\n    lift_ds.{name}\nexcept ImportError as error:\n    print(error)\n"
    assert run(ALONE + asked) == f"lift_ds.{name} needs {package}, which is not installed: pip install {package}"


@pytest.mark.parametrize("code", [IMPORTS, "import sys\nfrom lift_ds import cli\ncli._parser().format_help()\n"])
def test_it_imports_none_of_them(code: str) -> None:
    """Nor torch's compiler, which takes longer to import than torch."""
    unwanted = (*OTHERS, "torch._dynamo")
    assert run(f"{code}print([name for name in {unwanted!r} if name in sys.modules])") == "[]"
