"""Which part of a flat group of ZeRO stage 1 or 2 belongs to which parameter, also with `"round_robin_gradients"`.

DeepSpeed links each parameter to the fragment of its flat group that this rank holds. It flattens a group in the order
of `round_robin_bit16_groups`, and links in that of `bit16_groups`. With the option the two differ, and every state that
is read or written through the links is another parameter's (DeepSpeed 0.19.8).
"""

from __future__ import annotations

import types
from typing import Any

from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params


def link_in_flat_order(wrapper: DeepSpeedZeroOptimizer) -> None:
    """Link the parameters to the fragments that are theirs, now and whenever DeepSpeed links them again.

    No collective runs. The addresses that a checkpoint gets are those of the links.

    Args:
        wrapper: DeepSpeed's optimizer.
    """
    wrapper._link_all_hp_params = types.MethodType(_link, wrapper)
    wrapper._link_all_hp_params()
    if wrapper.cpu_offload:
        wrapper._create_optimizer_mapping()
    wrapper._param_slice_mappings = wrapper._create_param_mapping()


def refuse_universal_by_wrong_links(wrapper: Any) -> None:
    """Refuse to go on from a universal checkpoint that DeepSpeed has loaded before the links were right.

    Args:
        wrapper: DeepSpeed's optimizer, to which LIFT is not bound yet.

    Raises:
        ValueError: the configuration has `"round_robin_gradients": true`.
    """
    if getattr(wrapper, "round_robin_gradients", False):
        raise ValueError(
            '"round_robin_gradients": true: DeepSpeed has given the states of a universal checkpoint to other '
            "parameters than theirs; leave the option out to resume from one in a Trainer"
        )


def _link(self: Any) -> None:
    """What DeepSpeed's method of this name does, with the place of each parameter in the flat group."""
    if self.cpu_offload:
        self._get_offload_gradient_dict()
    for group, parameters in enumerate(self.round_robin_bit16_groups):
        ranks = self.real_dp_process_group[group]
        size = self.bit16_groups_flat[group].numel() // comm.get_world_size(group=ranks)
        link_hp_params(
            lp_param_list=parameters,
            flat_hp_partition=self.single_partition_of_fp32_groups[group],
            gradient_dict=self.averaged_gradients,
            offload_gradient_dict=self.offload_gradient_dict,
            use_offload=self.cpu_offload,
            param_group_index=group,
            partition_start=comm.get_rank(group=ranks) * size,
            partition_size=size,
            dp_group=ranks,
            param_offsets=self.round_robin_bit16_offsets[group],
        )
