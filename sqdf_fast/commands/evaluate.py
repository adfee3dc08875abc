"""What `sqdf-fast evaluate` is given, runs, LoRAs and base models, judged side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqdf_fast.backbone import Role
from sqdf_fast.commands.sample import trained_policy, with_lookahead
from sqdf_fast.commands.verdict import Scores, Verdict
from sqdf_fast.config import Config, make_config
from sqdf_fast.display import StageProgress
from sqdf_fast.engine.loading import load_run_reward, pick_device
from sqdf_fast.engine.runtime import Runtime
from sqdf_fast.errors import UserError
from sqdf_fast.evaluate.judge import Better
from sqdf_fast.families import KNOWN_MODELS
from sqdf_fast.prompts import load_prompts
from sqdf_fast.runs.folder import RunFolder
from sqdf_fast.training.evaluator import Evaluator, HeldOut


@dataclass(frozen=True)
class Target:
    """A model to be judged.

    Attributes:
        label: what tables call it; config: its model and how it samples.
        policy: folder or file of what was trained; None: the base model itself.
    """

    label: str
    config: Config
    policy: str | None = None


def evaluate_models(
    given: Sequence[str],
    *,
    settings: Mapping[str, Any],
    assignments: Mapping[str, Any],
    judges: Sequence[str] = (),
    seed: int,
    progress: StageProgress | None = None,
) -> Verdict:
    """Sample every target, and before them the base model of the first one, on the same prompts and noise; judge all.

    Prompts, reward and judges are those of the first run among the targets, or of the settings.

    Args:
        given: run folders, LoRA folders or files, ``shapes``, diffusers folders or hub ids.
        settings: top-level settings and sections that are given; ``preset`` and ``model`` are for targets without a
            run.
        assignments: of any setting, for all targets.
        judges: names for :func:`sqdf_fast.evaluate.load_judges`.
        seed: of the noise; a run's own evaluations use 0.
        progress: entered once nothing but sampling and judging is left, then told (stage, done, total, figures).

    Raises:
        UserError: a target that is none, or anything of it, the reward or the judges that cannot be had.
    """
    targets = find_targets(given, settings, assignments)
    config = targets[0].config
    held_out = HeldOut.of(config, seed)
    # Reward and judges on the CPU: what is wrong with them shows before anything is sampled.
    reward = load_run_reward(config, held_out.prompts, torch.device("cpu"))
    evaluator = Evaluator(config, reward, held_out, judges=judges)
    with progress or StageProgress() as shown:
        images = {target.label: _images(target, evaluator, shown) for target in targets}
        # Sampling is over: the device is the reward's.
        device = pick_device(config.device)
        reward.to(device)
        scores: dict[str, Scores] = {}
        for label, found in images.items():
            scores[label] = evaluator.judge(found, device, is_base=not scores).values
            shown.phase("judging", len(scores), len(images))
    better: dict[str, Better] = {"proxy_reward": "higher", **evaluator.judges.better}
    return Verdict(config.reward, held_out.prompts, seed, scores, better, images)


def find_targets(given: Sequence[str], settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> list[Target]:
    """The targets in order, after the base model of the first, where that is not the first itself.

    Raises:
        UserError: a run without a trained policy, or a LoRA whose base model nobody named.
    """
    distinct = list(dict.fromkeys(given))
    found = [_target(text, settings, assignments) for text in distinct]
    if len({target.label for target in found}) < len(found):
        # Folders of the same name: their paths tell them apart.
        found = [replace(target, label=text) for target, text in zip(found, distinct, strict=True)]
    found = _judged_alike(found)
    first = found[0]
    if first.policy is None:
        return found
    label = "base" if all(target.label != "base" for target in found) else f"base of {first.label}"
    others = [target for target in found if target.policy or target.config.model != first.config.model]
    return [Target(label, _base(first.config)), *others]


def _judged_alike(targets: list[Target]) -> list[Target]:
    """With the reward, prompts and evaluation of the first run; its base model samples as it does."""
    tuned = next((target for target in targets if target.policy), targets[0]).config
    judging = {name: getattr(tuned, name) for name in ("reward", "reward_options", "prompts", "evaluation")}
    alike = []
    for target in targets:
        same = target.policy is None and target.config.model == tuned.model
        config = _base(tuned) if same else target.config.model_copy(update=judging)
        alike.append(replace(target, config=config))
    return alike


def _base(config: Config) -> Config:
    # Nothing of the base model is trained: no copy of its network is needed.
    return config.model_copy(update={"policy": config.policy.model_copy(update={"kind": "lora"})})


def _target(text: str, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Target:
    path = Path(text)
    if (path / "config.yaml").is_file():
        folder, config = RunFolder.open(path)
        return Target(path.resolve().name, _changed(config, settings, assignments), trained_policy(folder, config))
    if _is_lora(path):
        label = "/".join(path.resolve().parts[-2:])
        return Target(label, _base_of(path, settings, assignments), text)
    if not _is_model(text):
        raise UserError(
            f"{text} is no run (config.yaml), no LoRA (*.safetensors) and no model (shapes, {', '.join(KNOWN_MODELS)}, "
            "a diffusers folder, a hub id owner/name); give one of them, such as a folder that `sqdf-fast train` wrote"
        )
    return Target(text, _plain(text, settings, assignments))


def _is_model(text: str) -> bool:
    path = Path(text)
    if text == "shapes" or text in KNOWN_MODELS or (path / "model_index.json").is_file():
        return True
    # A hub id, unless its owner's name is a folder here: then it is a mistyped path.
    return text.count("/") == 1 and not path.exists() and not path.parent.is_dir()


def _is_lora(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and not (path / "model_index.json").is_file() and any(path.glob("*.safetensors"))


def _base_of(path: Path, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Config:
    for folder in list(path.resolve().parents)[:2]:
        if (folder / "config.yaml").is_file():
            return _changed(RunFolder.open(folder)[1], settings, assignments)
    if "model" not in settings:
        raise UserError(f"{path} is a LoRA outside a run folder: name its base model with --model")
    return _plain(str(settings["model"]), settings, assignments)


def _plain(model: str, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Config:
    preset = "shapes" if model == "shapes" else "aesthetic"
    config = make_config(preset, assignments=assignments, flags={**settings, "model": model})
    return _complete(config, settings, assignments)


def _changed(config: Config, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Config:
    """A run's configuration with what is given in place of its own; its model stays."""
    own = config.model_dump(mode="json")
    if settings.get("reward", config.reward) != config.reward:
        # They were the other reward's.
        own["reward_options"] = {}
    flags = {name: value for name, value in settings.items() if name not in ("preset", "model")}
    return _complete(make_config(file=own, assignments=assignments, flags=flags), settings, assignments)


def _complete(config: Config, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Config:
    prompts = settings.get("evaluation", {}).get("prompts")
    if prompts and "num_prompts" not in assignments.get("evaluation", {}):
        # Prompts of one's own: all of them.
        number = {"num_prompts": len(load_prompts(prompts))}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=number)})
    return with_lookahead(config, "tweedie")


def _images(target: Target, evaluator: Evaluator, progress: StageProgress) -> Tensor:
    """The target's images of the held-out prompts, float32 [N, 3, H, W] in [0, 1] on the CPU."""
    prompts = evaluator.held_out.prompts
    runtime = Runtime.load(target.config, prompts=prompts, policy=target.policy, progress=progress)
    role: Role = "reference" if target.policy is None else "policy"
    return evaluator.images(runtime, role=role, phase=target.label)
