"""Using a run: pictures from it, and its scores beside the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqdf_fast.assembly import HeldOut, load_backbone, make_sampler
from sqdf_fast.backbone import Role
from sqdf_fast.checkpoint import disk_errors
from sqdf_fast.config import Config
from sqdf_fast.engine.noise import Stream, sample_seeds
from sqdf_fast.engine.rollouts import decode_images
from sqdf_fast.errors import UserError
from sqdf_fast.evaluate import evaluate_images, load_judges
from sqdf_fast.prompts import load_prompts
from sqdf_fast.report import image_grid, save_png
from sqdf_fast.rewards import load_reward
from sqdf_fast.rewards.preprocess import to_pil
from sqdf_fast.run_folder import RunFolder

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Scores of a base model and of the model fine-tuned from it, on the same prompts and seeds.

    Attributes:
        base, tuned: the ``eval_*`` values of :func:`sqdf_fast.evaluate.evaluate_images`.
    """

    base: Scores
    tuned: Scores

    def as_dict(self) -> dict[str, Scores]:
        return {"base": self.base, "tuned": self.tuned}

    def as_text(self) -> str:
        """A table, one score a line; 95 % bootstrap intervals in brackets."""
        lines = [f"{'':<24}{'base':>28}{'fine-tuned':>28}"]
        for name in self.base:
            if name.endswith(("_low", "_high", "_std")) or self.base[name] is None:
                continue
            label = name.removeprefix("eval_").replace("_", " ")
            lines.append(f"{label:<24}{_shown(self.base, name):>28}{_shown(self.tuned, name):>28}")
        return "\n".join(lines)


def _shown(scores: Scores, name: str) -> str:
    value, low, high = scores[name], scores.get(f"{name}_low"), scores.get(f"{name}_high")
    if value is None:
        return "-"
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def draw(run: Path, prompts: Sequence[str], *, number: int, seed: int, base: bool, output: Path) -> None:
    """Sample ``number`` pictures of each prompt into one labelled PNG.

    Args:
        run: a run folder; base: draw from its base model instead of the fine-tuned one.

    Raises:
        UserError: no run, no trained LoRA in it, or the picture cannot be written.
    """
    folder, config = RunFolder.open(run)
    backbone = load_backbone(_without_lookahead(config), _trained(folder, config))
    repeated = [prompt for prompt in prompts for _ in range(number)]
    seeds = sample_seeds(seed, Stream.EVALUATION, 1, len(repeated))
    latents = make_sampler(config, backbone).sample(repeated, seeds, role=_role(base)).x0
    images = decode_images(backbone.family, latents, config.sampling.batch_size)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(to_pil(images), repeated, columns=number), output)


def compare_with_base(run: Path, *, prompts: str | None, images_per_prompt: int | None, seed: int) -> Comparison:
    """Judge the fine-tuned model and its base model on the same held-out prompts and noise.

    Args:
        prompts: named set or file; None: the run's held-out prompts.
        images_per_prompt: None: the run's own.
        seed: of the noise; the run's own evaluations use 0.

    Raises:
        UserError: no run, no trained LoRA in it, or prompts that cannot be read.
    """
    folder, config = RunFolder.open(run)
    changes: dict[str, str | int | None] = {"prompts": prompts, "images_per_prompt": images_per_prompt}
    if prompts is not None:
        changes["num_prompts"] = len(load_prompts(prompts))
    given = {key: value for key, value in changes.items() if value is not None}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=given)})
    held_out = HeldOut.of(config, seed)
    backbone = load_backbone(_without_lookahead(config), _trained(folder, config))
    family, sampler = backbone.family, make_sampler(config, backbone)
    reward = load_reward(config.reward, device=family.device, dtype=family.dtype, **config.reward_options)
    judges = load_judges(config.model, reward)

    def judged(role: Role) -> Scores:
        latents = sampler.sample(held_out.prompts, held_out.seeds, role=role).x0
        images = decode_images(family, latents, config.sampling.batch_size)
        return evaluate_images(images.to(family.device), held_out.prompts, reward, judges)

    return Comparison(base=judged("reference"), tuned=judged("policy"))


def _role(base: bool) -> Role:
    return "reference" if base else "policy"


def _trained(run: RunFolder, config: Config) -> str:
    folder = run.policy(config)
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"run {run.path} has no trained {folder.name} yet; continue it with: sqdf-fast train --resume {run.path}"
        )
    return str(folder)


def _without_lookahead(config: Config) -> Config:
    # Sampling needs no consistency model: its LoRA need not be there.
    return config.model_copy(update={"objective": config.objective.model_copy(update={"lookahead": "tweedie"})})
