"""Device, precision, model and reward of a configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Config
from sqdf_fast.engine.noise import Stream
from sqdf_fast.errors import UserError
from sqdf_fast.families import Family, load_family, set_attention
from sqdf_fast.kernels.philox import derive_seed
from sqdf_fast.rewards import Reward, load_reward


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises UserError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu or auto"
        ) from None
    if device.type == "cuda" and ":" not in name:
        # torch.cuda needs the number.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on a GPU that has it in hardware, float32 elsewhere."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if bf16 else torch.float32


def load_backbone(config: Config, policy: str | None = None) -> Backbone:
    """The model of a configuration with its adapters.

    Args:
        policy: folder of a trained LoRA, or in full-parameter mode of a network, to start from; None: a new one.

    Raises:
        UserError: a model or adapter cannot be loaded.
    """
    device = pick_device(config.device)
    family = load_family(
        config.model,
        device=loading_device(config),
        dtype=pick_dtype(config.dtype, device),
        resolution=config.resolution,
        quantization=config.execution.quantization,
    )
    set_attention(family, config.execution.attention, device)
    if not family.guided and config.sampling.guidance_scale != 1:
        raise UserError(
            f"model {config.model!r} is guidance-distilled and sampling.guidance_scale is "
            f"{config.sampling.guidance_scale:g}; set it to 1 (its own guidance is an input)"
        )
    backbone = Backbone(
        family,
        rank=config.policy.rank,
        kind=config.policy.kind,
        alpha=config.policy.alpha,
        target_modules=config.policy.target_modules,
        seed=derive_seed(config.seed, Stream.LORA) & (2**63 - 1),
        policy=policy,
        consistency_lora=consistency_source(config, family),
        base=config.policy.base,
    )
    family.device = device
    for parameter in backbone.policy_parameters.values():
        parameter.data = parameter.data.to(device)
    return backbone


def load_run_reward(config: Config, prompts: Sequence[str], device: torch.device | None = None) -> Reward:
    """The reward of a configuration, with these prompts encoded and its text tower dropped.

    Args:
        device: where its weights go; default: where the configuration loads frozen weights.

    Raises:
        UserError: the reward or its weights cannot be loaded.
    """
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    reward = load_reward(config.reward, device=device or loading_device(config), dtype=dtype, **config.reward_options)
    reward.encode_prompts(list(dict.fromkeys(prompts)))
    reward.drop_text_tower()
    return reward


def loading_device(config: Config) -> torch.device:
    """Where frozen weights are loaded: on the host if they are offloaded, else on the run's device."""
    # Offloaded weights may exceed the device's memory. Quantizing needs the device.
    on_host = config.execution.offload == "staged" and config.execution.quantization == "none"
    return torch.device("cpu") if on_host else pick_device(config.device)


def consistency_source(config: Config, family: Family) -> str | None:
    """Folder, file or hub id of the consistency LoRA, if the run needs one. Raises UserError if it is missing."""
    if config.objective.lookahead != "consistency" and config.policy.base != "consistency":
        return None
    source = config.consistency_lora or family.default_consistency_lora()
    if source is None:
        raise UserError(
            f"model {config.model!r} has no consistency LoRA of its own; "
            "give consistency_lora (`sqdf-fast distill` makes one) or set objective.lookahead=tweedie"
        )
    return source
