"""ZeRO-3 with parameters and states on a disk, on the host, and resumed from a save: what each run trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engines
import torch
import torch.distributed as dist
from torch import Tensor, nn

import lift_ds

SIZE, LAYERS, STEPS = 1024, 3, 5
SETTINGS = lift_ds.LiftConfig(density=0.3, lra_rank=4, refresh_interval=2, lr=1e-3)


class Wide(nn.Module):
    """Matrices of which a half is just above what DeepSpeed moves to a disk (a megabyte)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for number in range(LAYERS):
            layer = nn.Linear(SIZE, SIZE, bias=False)
            layer.weight.data = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
            self.add_module(f"layer{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for number in range(LAYERS):
            y = torch.tanh(self.get_submodule(f"layer{number}")(y))
        return (y - torch.sin(3 * x)).square().mean()


#: Options of offloading, each with another value than its default.
PARAMETERS = {"max_in_cpu": 0, "pin_memory": False, "buffer_count": 8}
STATES = {"buffer_count": 5, "pin_memory": False, "pipeline_read": True, "pipeline_write": True, "fast_init": True}


def start(device: str, folder: str, options: bool = False) -> tuple[Any, nn.Module]:
    place = {"device": device} | ({"nvme_path": f"{folder}/nvme"} if device == "nvme" else {})
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": dict(place)}
    zero["offload_param"] = place | {"buffer_size": SIZE * SIZE, "buffer_count": 5}
    if options:
        zero["offload_param"] |= PARAMETERS
        zero["offload_optimizer"] |= STATES
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},  # DeepSpeed writes parameters to a disk in 16 bits whatever they are trained in
        "steps_per_print": 10**9,
    }
    model = Wide().bfloat16()
    return engines.lift_engine(model, config, SETTINGS), model


def run(device: str, folder: str, cut: int | None = None, options: bool = False) -> dict[str, Any]:
    """Five steps with refreshes after the second and the fourth, saved twice and resumed anew after `cut`."""
    engine, model = start(device, folder, options)
    losses = []
    saved = f"{folder}/saved_{cut}_{options}"
    for step in range(STEPS):
        if step == cut:
            engine.save_checkpoint(saved)
            engine.save_checkpoint(saved)  # over what is there, as after a save that was stopped
            engine.destroy()
            engine, model = start(device, folder, options)
            engine.load_checkpoint(saved)
        x = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(step))
        loss = engine(x[2 * dist.get_rank() : 2 * dist.get_rank() + 2].bfloat16())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    swapped = {path.parent.parent.name for path in Path(folder, "nvme").rglob("*.swp")}
    result = {
        "losses": losses,
        "weights": engines.whole_weights(model),
        "indices": engines.whole_indices(model),
        "swapped": swapped,
    }
    engine.destroy()
    return result


if __name__ == "__main__":
    engines.start()
    folder = sys.argv[1]
    Path(folder, "nvme").mkdir(exist_ok=True)
    results = {"cpu": run("cpu", folder), "nvme": run("nvme", folder)}
    results |= {f"cut {cut}": run("nvme", folder, cut) for cut in (1, 2, 3)}
    results |= {"options": run("nvme", folder, options=True), "options, cut 2": run("nvme", folder, 2, options=True)}
    engines.finish(folder, results)
