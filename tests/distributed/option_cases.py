"""Options of a DeepSpeed file that are tried with LIFT, and the table of them in the documentation.

An option works if five steps with two refreshes end as they do without it: with `EXACT` in the same indices, and in
losses and weights within a tolerance; with `OWN_ARITHMETIC`, which it has by its nature, in losses near those, and with
an optimizer whose state is that of the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lift_ds.zero.options import REFUSED

EXACT, OWN_ARITHMETIC = "trains as without it", "trains, by arithmetic of its own"


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        key: dotted, as in the file.
        value: tried.
        stages: of ZeRO, in which it is tried.
        outcome: `EXACT` or `OWN_ARITHMETIC`.
        bf16: whether the weights are bfloat16, which some options are for.
        remark: for the documentation.
    """

    key: str
    value: Any
    stages: tuple[int, ...]
    outcome: str = EXACT
    bf16: bool = False
    remark: str = ""

    def case(self, stage: int) -> str:
        return f"{self.key}={json.dumps(self.value)} stage {stage}"

    def apply(self, config: dict[str, Any]) -> None:
        """Set it in a configuration."""
        *path, last = self.key.split(".")
        for name in path:
            config = config.setdefault(name, {})
        inside = config.get(last)
        config[last] = {**inside, **self.value} if isinstance(inside, dict) else self.value


def _zero(key: str, value: Any, stages: tuple[int, ...], **more: Any) -> Option:
    return Option(f"zero_optimization.{key}", value, stages, **more)


_OFFLOAD = {"device": "cpu"}

OPTIONS = (
    _zero("round_robin_gradients", True, (1, 2), remark="also in bf16, with offload and on four ranks"),
    _zero("reduce_scatter", False, (2,)),
    _zero("contiguous_gradients", False, (2,)),
    _zero("overlap_comm", True, (2, 3)),
    _zero("use_multi_rank_bucket_allreduce", False, (2,)),
    _zero("allgather_partitions", False, (2,)),
    _zero("reduce_bucket_size", 1000, (2, 3)),
    _zero("allgather_bucket_size", 1000, (2,)),
    _zero("parameter_alignment", True, (2,)),
    _zero("ignore_unused_parameters", False, (2,)),
    _zero("compute_grad_norm", False, (2,)),
    _zero("elastic_checkpoint", True, (2,), remark="resuming from its checkpoints was not tried"),
    _zero("offload_optimizer", _OFFLOAD, (1, 2, 3)),
    _zero("offload_param", _OFFLOAD, (3,)),
    _zero("sub_group_size", 1000, (3,)),
    _zero("stage3_param_persistence_threshold", 100_000, (3,)),
    _zero("stage3_max_live_parameters", 10**9, (3,)),
    _zero("stage3_max_reuse_distance", 0, (3,)),
    _zero("stage3_prefetch_bucket_size", 0, (3,)),
    _zero("stage3_use_all_reduce_for_fetch_params", True, (3,)),
    _zero("stage3_allgather_sequential", True, (3,)),
    _zero("stage3_module_granularity_threshold", 300, (3,)),
    _zero("leaf_module", {"classes": ["LlamaDecoderLayer"]}, (3,), remark="`set_z3_leaf_modules` likewise"),
    _zero("memory_efficient_linear", False, (3,)),
    _zero("enable_sanity_checks", True, (3,)),
    _zero("zero_quantized_gradients", True, (3,), bf16=True),
    Option("data_types.grad_accum_dtype", "fp32", (1, 2, 3), bf16=True),
    Option("communication_data_type", "fp32", (2, 3), bf16=True),
    Option("checkpoint.use_node_local_storage", True, (2,)),
    Option("wall_clock_breakdown", True, (2,)),
    Option("torch_autocast", {"enabled": True, "dtype": "bfloat16"}, (2, 3), OWN_ARITHMETIC),
    Option("gradient_clipping", 0.1, (2, 3), OWN_ARITHMETIC),
    Option("gradient_allreduce_op", "sum", (2,), OWN_ARITHMETIC),
    Option(
        "bf16",
        {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        (2, 3),
        OWN_ARITHMETIC,
        bf16=True,
    ),
)

#: Key of a refused option -> a value with which it is refused.
REFUSED_VALUES: dict[str, Any] = {
    "tensor_parallel": {"autotp_size": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
    "hybrid_engine": {"enabled": True},
    "compile.deepcompile": True,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.offload_optimizer.super_offload": True,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "zero_optimization.zero_hpz_partition_size": 2,
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
    "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
}


def table() -> str:
    """Return the table of the documentation: what was tried, and what is refused and why."""
    lines = ["| option | ZeRO stages | |", "|---|---|---|"]
    for option in OPTIONS:
        stages = ", ".join(map(str, option.stages))
        remark = f"; {option.remark}" if option.remark else ""
        lines.append(f"| `{_json(option.key, option.value)}` | {stages} | {option.outcome}{remark} |")
    for refused in REFUSED:
        lines.append(f"| `{_json(refused.key, REFUSED_VALUES[refused.key])}` | any | refused: {refused.why} |")
    return "\n".join(lines) + "\n"


def _json(key: str, value: Any) -> str:
    return f'"{key}": {json.dumps(value)}'
