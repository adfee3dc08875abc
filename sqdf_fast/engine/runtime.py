"""From a configuration to what it names: device, precision, model, sampler, held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqdf_fast.backbone import Backbone
from sqdf_fast.config import Config
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.sampler import Sampler
from sqdf_fast.errors import UserError
from sqdf_fast.families import Family, load_family, set_attention
from sqdf_fast.kernels.philox import derive_seed
from sqdf_fast.prompts import load_prompts
from sqdf_fast.schedule import DenoisingSchedule


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
        # Parts of torch.cuda want the number.
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
    """The model of a configuration with its adapters. Raises UserError when something of it cannot be had.

    Args:
        policy: folder of a trained LoRA, or in full-parameter mode of a network, to start from; None: a fresh one.
    """
    device = pick_device(config.device)
    family = load_family(
        config.model,
        device=loading_device(config, device),
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
        consistency_lora=_consistency_lora(config, family),
        base=config.policy.base,
    )
    family.device = device
    for parameter in backbone.policy_parameters.values():
        parameter.data = parameter.data.to(device)
    return backbone


def loading_device(config: Config, device: torch.device) -> torch.device:
    """Where frozen weights are read to."""
    # Frozen weights that come and go may be more than the device holds at once. Quantising needs the device.
    on_host = config.execution.offload == "staged" and config.execution.quantization == "none"
    return torch.device("cpu") if on_host else device


def _consistency_lora(config: Config, family: Family) -> str | None:
    if config.objective.lookahead != "consistency" and config.policy.base != "consistency":
        return None
    source = config.consistency_lora or family.default_consistency_lora()
    if source is None:
        raise UserError(
            f"model {config.model!r} has no consistency LoRA of its own; "
            "give consistency_lora (`sqdf-fast distill` makes one) or set objective.lookahead=tweedie"
        )
    return source


def make_sampler(config: Config, backbone: Backbone) -> Sampler:
    """The sampler of a configuration: along the family's own scheduler, or in multistep consistency sampling."""
    sampling = config.sampling
    family, steps = backbone.family, sampling.num_inference_steps
    if config.policy.base == "consistency":
        schedule = DenoisingSchedule.consistency_sampling(family.scheduler, steps)
    else:
        schedule = family.schedule(steps, sampling.eta)
    return Sampler(
        backbone,
        schedule,
        guidance_scale=sampling.guidance_scale,
        batch_size=sampling.batch_size,
        merge_lora=sampling.merge_lora,
        channels_last=sampling.channels_last,
        compilation=sampling.compile,
        impl=config.impl,
    )


@dataclass(frozen=True)
class HeldOut:
    """What every evaluation of a run samples: the same prompts and seeds each time."""

    prompts: list[str]
    seeds: Tensor

    @staticmethod
    def of(config: Config, seed: int = 0) -> HeldOut:
        """A fixed choice among the held-out prompts, each ``images_per_prompt`` times.

        The seed is not the run's: runs of different seeds are judged on the same noise.
        """
        evaluation = config.evaluation
        pool = load_prompts(evaluation.prompts or config.prompts)
        count = min(evaluation.num_prompts, len(pool))
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
        chosen = [pool[i] for i in sorted(order[:count].tolist())]
        prompts = [prompt for prompt in chosen for _ in range(evaluation.images_per_prompt)]
        return HeldOut(prompts, sample_seeds(seed, Stream.EVALUATION, 0, len(prompts)))


def encode_all(family: Family, prompts: Sequence[str], at_once: int = 8) -> None:
    """Encode every prompt now, a few at a time, so that the text encoders are needed no more."""
    for start in range(0, len(prompts), at_once):
        family.encode(prompts[start : start + at_once])
