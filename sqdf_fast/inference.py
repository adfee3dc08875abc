"""Using a run: pictures from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqdf_fast.assembly import load_backbone, make_sampler
from sqdf_fast.backbone import Role
from sqdf_fast.checkpoint import disk_errors
from sqdf_fast.config import Config
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.rollouts import decode_images
from sqdf_fast.errors import UserError
from sqdf_fast.report import image_grid, save_png
from sqdf_fast.rewards.preprocess import to_pil
from sqdf_fast.run_folder import RunFolder


def draw(run: Path, prompts: Sequence[str], *, number: int, seed: int, base: bool, output: Path) -> None:
    """Sample ``number`` pictures of each prompt into one labelled PNG.

    Args:
        run: a run folder; base: draw from its base model instead of the fine-tuned one.

    Raises:
        UserError: no run, no trained LoRA in it, or the picture cannot be written.
    """
    folder, config = RunFolder.open(run)
    backbone = load_backbone(for_sampling(config), trained_policy(folder, config))
    repeated = [prompt for prompt in prompts for _ in range(number)]
    seeds = sample_seeds(seed, Stream.EVALUATION, 1, len(repeated))
    latents = make_sampler(config, backbone).sample(repeated, seeds, role=_role(base)).x0
    images = decode_images(backbone.family, latents, config.sampling.batch_size)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(to_pil(images), repeated, columns=number), output)


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
