"""What the rectified-flow families share: a transformer, their scheduler and the shift of its noise levels."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from sqdf_fast.families.family import Family


def flow_scheduler(scheduler: Any) -> Any:
    """The Euler scheduler of the same noise levels; other flow samplers have no affine stochastic step."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)


def shift(scheduler: Any, tokens: int) -> dict[str, float]:
    """set_timesteps' ``mu`` for a latent of ``tokens`` patches; nothing where the scheduler's shift is fixed.

    Linear in the length of the sequence through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift),
    as the pipelines of FLUX.1 and Stable Diffusion 3 do.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return {}
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return {"mu": config.base_shift + slope * (tokens - config.base_image_seq_len)}


class FlowFamily(Family):
    """A transformer over 2 x 2 patches of latent positions; see Family."""

    network_part = "transformer"
    # Both streams' projections, as Flow-GRPO trains them.
    lora_targets = (*Family.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    patch = 2
    make_scheduler = staticmethod(flow_scheduler)
