"""Using a run: pictures from it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sqdf_fast.backbone import Role
from sqdf_fast.config import Config, make_config
from sqdf_fast.display import StageProgress, image_grid, save_png
from sqdf_fast.engine.executor import RewardFunction
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.rollouts import decode_images
from sqdf_fast.engine.runtime import load_backbone, make_sampler, pick_device, pick_dtype
from sqdf_fast.errors import UserError
from sqdf_fast.families.loading import KNOWN_MODELS
from sqdf_fast.files import disk_errors
from sqdf_fast.guided_sampling import Cost, Method, training_free
from sqdf_fast.rewards import checked_reward, load_reward
from sqdf_fast.rewards.preprocess import to_pil
from sqdf_fast.runs.folder import RunFolder


def draw(
    run: Path,
    prompts: Sequence[str],
    *,
    number: int,
    seed: int,
    base: bool,
    output: Path,
    method: Method | None = None,
    reward: str | None = None,
    **options: Any,
) -> Cost | None:
    """Sample ``number`` pictures of each prompt into one labelled PNG.

    Args:
        run: a run folder; or a base model, "shapes", a known short name or a diffusers folder.
        base: draw from the run's base model instead of the fine-tuned one.
        method: better them without training, see :func:`sqdf_fast.guided_sampling.training_free`; options: its own.
        reward: that ``method`` goes by; None: the run's.

    Returns:
        What ``method`` has cost; None without one.

    Raises:
        UserError: no run, no trained LoRA in it, or the picture cannot be written; what ``method`` refuses.
    """
    config, policy = _opened(run)
    config = _with_consistency(config) if options.get("estimate") == "consistency" else for_sampling(config)
    backbone = load_backbone(config, policy)
    sampler, role = make_sampler(config, backbone), _role(base or policy is None)
    repeated = [prompt for prompt in prompts for _ in range(number)]
    seeds = sample_seeds(seed, Stream.EVALUATION, 1, len(repeated))
    if method is None:
        latents, cost = sampler.sample(repeated, seeds, role=role).x0, None
    else:
        score = _scorer(config, reward, repeated)
        with StageProgress() as progress:
            options["on_progress"] = lambda done, total: progress("sampling", done, total, {})
            found = training_free(method, backbone, sampler, score, repeated, seeds, role=role, **options)
        latents, cost = found.x0, found.cost
    images = decode_images(backbone.family, latents, config.sampling.batch_size)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(to_pil(images), repeated, columns=number), output)
    return cost


def training_free_options(
    best_of: int | None, guide_scale: float | None, guide_by: str, reward: str | None
) -> dict[str, Any]:
    """Keywords of :func:`draw` for the options of the command line. Raises UserError for a useless combination."""
    if best_of is not None and guide_scale is not None:
        raise UserError("--best-of and --guide-scale are mutually exclusive")
    if best_of is not None:
        return {"method": "best-of-n", "candidates": best_of, "reward": reward}
    if guide_scale is not None:
        return {"method": "guided", "scale": guide_scale, "estimate": guide_by, "reward": reward}
    if reward is not None:
        raise UserError(f"--reward {reward} has no effect without --best-of N or --guide-scale S")
    return {}


def _opened(run: Path) -> tuple[Config, str | None]:
    """Configuration and trained policy of a run, or those of a base model, which has none."""
    name = str(run)
    known = name == "shapes" or name in KNOWN_MODELS or name in KNOWN_MODELS.values()
    if not (run / "config.yaml").is_file() and (known or (run / "model_index.json").is_file()):
        return make_config("shapes" if name == "shapes" else "aesthetic", flags={"model": name}), None
    folder, config = RunFolder.open(run)
    return config, trained_policy(folder, config)


def _scorer(config: Config, spec: str | None, prompts: Sequence[str]) -> RewardFunction:
    device = pick_device(config.device)
    options = config.reward_options if spec in (None, config.reward) else {}
    reward = load_reward(spec or config.reward, device=device, dtype=pick_dtype(config.dtype, device), **options)
    reward.encode_prompts(list(dict.fromkeys(prompts)))
    return partial(checked_reward, reward)


def _role(base: bool) -> Role:
    return "reference" if base else "policy"


def trained_policy(run: RunFolder, config: Config) -> str:
    """The folder of what a run trained. Raises UserError where it has saved nothing yet."""
    folder = run.policy(config)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"run {run.path} has no trained {folder.name} yet; continue it with: sqdf-fast train --resume {run.path}"
        )
    return str(folder)


def for_sampling(config: Config) -> Config:
    """The same model without its consistency LoRA, which sampling does not need and which need not be there."""
    return config.model_copy(update={"objective": config.objective.model_copy(update={"lookahead": "tweedie"})})


def _with_consistency(config: Config) -> Config:
    return config.model_copy(update={"objective": config.objective.model_copy(update={"lookahead": "consistency"})})
