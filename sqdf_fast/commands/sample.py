"""`sqdf-fast sample`: images from a run or a base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sqdf_fast.backbone import Role
from sqdf_fast.config import Config, make_config
from sqdf_fast.display import StageProgress, image_grid, save_png
from sqdf_fast.engine.loading import load_run_reward
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.families.loading import KNOWN_MODELS
from sqdf_fast.files import disk_errors
from sqdf_fast.guided_sampling import Cost, Method, training_free
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
    """Sample ``number`` images of each prompt into one labelled PNG.

    Args:
        run: a run folder; or a base model, "shapes", a known short name or a diffusers folder.
        base: whether to sample from the run's base model instead of the fine-tuned one.
        method: of :func:`sqdf_fast.guided_sampling.training_free`; options: its own.
        reward: what ``method`` maximizes; None: the run's.

    Returns:
        The cost of ``method``; None without one.

    Raises:
        UserError: no run, no trained policy, invalid options, or the file cannot be written.
    """
    config, policy = _opened(run)
    config = with_lookahead(config, "consistency" if options.get("estimate") == "consistency" else "tweedie")
    if reward is not None and reward != config.reward:
        # The options belong to the run's own reward.
        config = config.model_copy(update={"reward": reward, "reward_options": {}})
    repeated = [prompt for prompt in prompts for _ in range(number)]
    seeds = sample_seeds(seed, Stream.EVALUATION, 1, len(repeated))
    role: Role = "reference" if base or policy is None else "policy"
    with StageProgress() as progress:
        scorer = None if method is None else load_run_reward(config, repeated)
        runtime = Runtime.load(config, prompts=repeated, policy=policy, reward=scorer, progress=progress)
        if method is None:
            latents, cost = runtime.sample(repeated, seeds, role=role).x0, None
        else:
            improved = training_free(method, runtime, repeated, seeds, role=role, **options)
            latents, cost = improved.x0, improved.cost
        images = runtime.decode(latents)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        drawn = to_pil(images)
        rows = [drawn[start : start + number] for start in range(0, len(drawn), number)]
        save_png(image_grid(rows, prompts, tile=160), output)
    return cost


def training_free_options(
    best_of: int | None, guide_scale: float | None, guide_by: str, reward: str | None
) -> dict[str, Any]:
    """Keywords of :func:`draw` from command-line options. Raises UserError for options that exclude each other."""
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
    """Configuration and trained policy of a run, or the configuration of a base model."""
    name = str(run)
    known = name == "shapes" or name in KNOWN_MODELS or name in KNOWN_MODELS.values()
    if not (run / "config.yaml").is_file() and (known or (run / "model_index.json").is_file()):
        return make_config("shapes" if name == "shapes" else "aesthetic", flags={"model": name}), None
    folder, config = RunFolder.open(run)
    return config, trained_policy(folder, config)


def trained_policy(run: RunFolder, config: Config) -> str:
    """The folder of a run's trained policy. Raises UserError if none is saved yet."""
    folder = run.policy(config)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"run {run.path} has no trained {folder.name} yet; continue it with: sqdf-fast train --resume {run.path}"
        )
    return str(folder)


def with_lookahead(config: Config, lookahead: Literal["consistency", "tweedie"]) -> Config:
    """The configuration with another look-ahead; "tweedie" samples without a consistency LoRA, which may be missing."""
    return config.model_copy(update={"objective": config.objective.model_copy(update={"lookahead": lookahead})})
