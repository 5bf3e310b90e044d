"""Every option of a DeepSpeed file: those tried with LIFT, the others, and the table of all in the documentation.

An option works if five steps with two refreshes end as they do without it: with `EXACT` in the same indices, and in
losses and weights within a tolerance; with `OWN_ARITHMETIC`, which it has by its nature, in losses near those, and with
an optimizer whose state is that of the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import cases

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


_OFFLOAD = {"device": "cpu", "pin_memory": False}
_HPZ = (
    "on four ranks too, to the bit; `frozen_weights` in the `lift` block keeps frozen weights within a node at less "
    "memory, and the two are refused together"
)

OPTIONS = (
    _zero("round_robin_gradients", True, (1, 2), remark="also in bf16, with offload and on four ranks"),
    _zero("reduce_scatter", False, (2,)),
    _zero("contiguous_gradients", False, (2,)),
    _zero("overlap_comm", True, (2, 3)),
    _zero("use_multi_rank_bucket_allreduce", False, (2,)),
    _zero("allgather_partitions", False, (2,)),
    _zero("reduce_bucket_size", 1000, (2, 3)),
    _zero("allgather_bucket_size", 1000, (2,)),
    _zero("offload_optimizer", _OFFLOAD, (1, 2, 3)),
    _zero("offload_param", _OFFLOAD, (3,)),
    _zero("sub_group_size", 1000, (3,)),
    _zero("stage3_param_persistence_threshold", 100_000, (3,)),
    _zero("stage3_max_live_parameters", 10**9, (3,)),
    _zero("stage3_use_all_reduce_for_fetch_params", True, (3,)),
    _zero("stage3_module_granularity_threshold", 300, (3,)),
    _zero("leaf_module", {"classes": ["LlamaDecoderLayer"]}, (3,), remark="`set_z3_leaf_modules` likewise"),
    _zero("zero_hpz_partition_size", 2, (3,), remark=_HPZ),
    _zero("zero_quantized_gradients", True, (3,), bf16=True, remark="leaves out gradients of one dimension, as of θ"),
    Option("data_types.grad_accum_dtype", "fp32", (1, 2, 3), bf16=True),
    Option("communication_data_type", "fp32", (2, 3), bf16=True),
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

#: Options that are tried together, in one run a stage.
TOGETHER = (
    _zero("parameter_alignment", True, (2,)),
    _zero("ignore_unused_parameters", False, (1, 2)),
    _zero("compute_grad_norm", False, (1, 2)),
    _zero("load_from_fp32_weights", False, (1, 2)),
    _zero("stage3_model_persistence_threshold", 10_000, (3,)),
    _zero("stage3_gather_16bit_weights_on_model_save", True, (3,)),
    _zero("stage3_max_reuse_distance", 0, (3,)),
    _zero("stage3_prefetch_bucket_size", 0, (3,)),
    _zero("stage3_allgather_sequential", True, (3,)),
    _zero("memory_efficient_linear", False, (3,)),
    _zero("enable_sanity_checks", True, (3,)),
    _zero("override_module_apply", False, (3,)),
    _zero("log_trace_cache_warnings", True, (3,)),
    Option("checkpoint.use_node_local_storage", True, (1, 2, 3)),
    Option("wall_clock_breakdown", True, (1, 2, 3)),
    Option("disable_allgather", True, (1, 2, 3)),
    Option("disable_python_gc", True, (1, 2, 3)),
    Option("dataloader_drop_last", True, (1, 2, 3)),
    Option("managed_gradient_accumulation", False, (1, 2, 3)),
    Option("memory_breakdown", True, (1, 2, 3)),
    Option("dump_state", True, (1, 2, 3)),
    Option("timers", {"throughput": {"enabled": False}}, (1, 2, 3)),
    Option("comms_logger", {"enabled": True, "verbose": False}, (1, 2, 3)),
    Option("prescale_gradients", True, (1,)),
    Option("gradient_predivide_factor", 2.0, (1,)),
)

#: Random-LTD with a schedule that begins at the whole sequence: all is set up, and no token is dropped.
_TOKENS = {
    "min_value": cases.LENGTH,
    "max_value": cases.LENGTH,
    "schedule_type": "fixed_linear",
    "schedule_config": {"require_steps": 1, "seq_per_step": 1},
}
RANDOM_LTD = {
    "enabled": True,
    "data_routing": {
        "enabled": True,
        "random_ltd": {
            "enabled": True, "total_layer_num": 2, "random_ltd_layer_num": 2, "random_ltd_layer_id": [0, 1],
            "model_mask_name": "attention_mask", "model_type": "decoder", "hidden_state_order": "batch_seq_dim",
            "random_ltd_schedule": _TOKENS,
        },
    },
}  # fmt: skip

_PARITY = "`tests/distributed/test_parity.py`"
_SEQUENCES = "`tests/distributed/test_sequence_parallel.py`"
_NVME, _CHECKPOINTS = "`tests/distributed/test_nvme.py`", "`tests/distributed/test_checkpoints.py`"
_HERE, _NO_EFFECT = "`tests/distributed/test_options.py`", "does not meet LIFT: "

#: Key of an option that has tests elsewhere, or needs none -> what there is to say.
ELSEWHERE = {
    "zero_optimization.stage": f"0 to 3 train as Algorithm 1 does ({_PARITY})",
    "train_batch_size": f"as always ({_PARITY})",
    "train_micro_batch_size_per_gpu": f"as always ({_PARITY})",
    "gradient_accumulation_steps": f"as always ({_PARITY})",
    "bf16": f"trains as Algorithm 1 does in bfloat16 ({_PARITY})",
    "fp16": f"trains in stages 1 to 3, and steps that overflow leave nothing behind ({_HERE})",
    "scheduler": f"as always ({_CHECKPOINTS})",
    "optimizer": "refused: LIFT brings LiftAdamW, whose settings belong into the `lift` block",
    "zero_allow_untested_optimizer": "`lift_ds.initialize` sets it to true",
    "zero_force_ds_cpu_optimizer": "`lift_ds.initialize` sets it to false",
    "zero_optimization.offload_param.nvme_path": f"weights on a disk train as in memory ({_NVME})",
    "zero_optimization.offload_optimizer.nvme_path": f"states on a disk train as in memory ({_NVME})",
    "aio": f"trains with its defaults ({_NVME})",
    "compile": f"`engine.compile()` trains the same ({_HERE})",
    "checkpoint.load_universal": f"not read: loading sees whether a checkpoint is universal ({_CHECKPOINTS})",
    "activation_checkpointing": f"{_NO_EFFECT}for models that call `deepspeed.checkpointing`",
    "zero_optimization.legacy_stage1": "DeepSpeed refuses it",
    "zero_optimization.cpu_offload": "DeepSpeed takes it for `offload_optimizer`",
    "zero_optimization.cpu_offload_param": "DeepSpeed takes it for `offload_param`",
    "zero_optimization.cpu_offload_use_pin_memory": "DeepSpeed does not read it any more",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "DeepSpeed takes it for the option of 16 bits",
    "zero_optimization.save_muon_momentum_buffer_in_memory": f"{_NO_EFFECT}Muon's",
    "zero_optimization.pipeline_loading_checkpoint": f"{_NO_EFFECT}pipelines are refused",
    "pipeline": f"{_NO_EFFECT}pipelines are refused",
    "data_efficiency": f"random-LTD trains as without it where it drops no token ({_HERE}); dropping takes a "
    "kernel for GPUs. A curriculum chooses which data come first, and does not meet LIFT",
    "seq_parallel_communication_data_type": f"bf16 trains, by arithmetic of its own ({_SEQUENCES})",
    "weight_quantization": f"{_NO_EFFECT}for inference",
    "use_data_before_expert_parallelism": f"{_NO_EFFECT}expert parallelism is refused",
    "autotuning": f"{_NO_EFFECT}it starts trainings with other options",
    **dict.fromkeys(
        ("tensorboard", "wandb", "csv_monitor", "comet", "flops_profiler", "steps_per_print", "log_level"),
        f"{_NO_EFFECT}it reports",
    ),
    "vocabulary_size": f"{_NO_EFFECT}it warns of sizes that are no multiple",
    **{
        f"zero_optimization.offload_{what}.{name}": f"another value trains as its default does ({_NVME})"
        for what, names in {
            "param": ("buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
            "optimizer": ("buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
        }.items()
        for name in names
    },
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": f"{_NO_EFFECT}SuperOffload's, which is refused",
}  # fmt: skip

#: Key of a refused option -> a value with which it is refused.
REFUSED_VALUES: dict[str, Any] = {
    "tensor_parallel": {"autotp_size": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
    "hybrid_engine": {"enabled": True},
    "compile.deepcompile": True,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.offload_optimizer.super_offload": True,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.elastic_checkpoint": True,
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
    "fp16": {"enabled": True, "fp16_master_weights_and_grads": True},
    "fp16.enabled": True,
    "datastates_ckpt": {},
}


def table() -> str:
    """Return the table of the documentation: what was tried, and what is refused and why."""
    lines = ["| option | ZeRO stages | |", "|---|---|---|"]
    for option in (*OPTIONS, *TOGETHER):
        stages = ", ".join(map(str, option.stages))
        remark = f"; {option.remark}" if option.remark else ""
        lines.append(f"| `{_json(option.key, option.value)}` | {stages} | {option.outcome}{remark} |")
    for refused in REFUSED:
        stages = ", ".join(map(str, refused.stages)) or "any"
        lines.append(f"| `{_json(refused.key, REFUSED_VALUES[refused.key])}` | {stages} | refused: {refused.why} |")
    lines += [f"| `{key}` | any | {said} |" for key, said in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


def _json(key: str, value: Any) -> str:
    return f'"{key}": {json.dumps(value)}'
