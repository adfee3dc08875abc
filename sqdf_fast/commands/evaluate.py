"""`sqdf-fast evaluate`: runs, LoRAs and base models, judged side by side."""

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
    """A model to judge: its name in tables, its configuration, and the folder or file of its policy, if any."""

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
) -> Verdict:
    """Sample and judge every target, after the base model of the first one, on the same prompts and noise.

    Prompts, reward and judges are those of the first run among the targets, or of the settings.

    Args:
        given: run folders, LoRA folders or files, ``shapes``, diffusers folders or hub ids.
        settings: nested settings; ``preset`` and ``model`` are for targets without a run.
        assignments: nested settings for all targets.
        judges: names for :func:`sqdf_fast.evaluate.load_judges`.
        seed: seed of the noise; a run's own evaluations use 0.

    Raises:
        UserError: a target, the reward or a judge is unknown or cannot be loaded.
    """
    targets = find_targets(given, settings, assignments)
    config = targets[0].config
    held_out = HeldOut.of(config, seed)
    # First, on the CPU: wrong rewards and judges are refused before anything is sampled.
    reward = load_run_reward(config, held_out.prompts, torch.device("cpu"))
    evaluator = Evaluator(config, reward, held_out, judges=judges)
    images: dict[str, Tensor] = {}
    scores: dict[str, Scores] = {}
    with StageProgress() as progress:
        for target in targets:
            runtime = Runtime.load(target.config, prompts=held_out.prompts, policy=target.policy, progress=progress)
            role: Role = "reference" if target.policy is None else "policy"
            images[target.label] = evaluator.images(runtime, role=role, phase=target.label)
            del runtime  # or its weights are on the device beside the next one's
        device = pick_device(config.device)
        reward.to(device)
        for label, sampled in images.items():
            scores[label] = evaluator.judge(sampled, device, is_base=not scores).values
            progress.phase("judging", len(scores), len(images))
    better: dict[str, Better] = {"proxy_reward": "higher", **evaluator.judges.better}
    return Verdict(config.reward, held_out.prompts, seed, scores, better, images)


def find_targets(given: Sequence[str], settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> list[Target]:
    """The targets in order, after the base model of the first, unless that is the first itself.

    All have the reward, prompts and evaluation of the first run; its base model samples as it does.

    Raises:
        UserError: an unknown target, a run without a trained policy, or a LoRA without a base model.
    """
    distinct = list(dict.fromkeys(given))
    targets = [_target(text, settings, assignments) for text in distinct]
    if len({target.label for target in targets}) < len(targets):
        # Folders of the same name: label them by their paths.
        targets = [replace(target, label=text) for target, text in zip(targets, distinct, strict=True)]
    tuned = next((target for target in targets if target.policy), targets[0]).config
    # Nothing of the base model is trained: no copy of its network is needed.
    base = tuned.model_copy(update={"policy": tuned.policy.model_copy(update={"kind": "lora"})})
    judging = {name: getattr(tuned, name) for name in ("reward", "reward_options", "prompts", "evaluation")}
    for number, target in enumerate(targets):
        same = target.policy is None and target.config.model == tuned.model
        targets[number] = replace(target, config=base if same else target.config.model_copy(update=judging))
    first = targets[0]
    if first.policy is None:
        return targets
    label = "base" if all(target.label != "base" for target in targets) else f"base of {first.label}"
    others = [target for target in targets if target.policy or target.config.model != first.config.model]
    return [Target(label, base), *others]


def _target(text: str, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Target:
    path = Path(text)
    if (path / "config.yaml").is_file():
        folder, config = RunFolder.open(path)
        return Target(path.resolve().name, _changed(config, settings, assignments), trained_policy(folder, config))
    is_folder_of_model = (path / "model_index.json").is_file()
    if path.suffix == ".safetensors" if path.is_file() else not is_folder_of_model and any(path.glob("*.safetensors")):
        return Target("/".join(path.resolve().parts[-2:]), _base_of(path, settings, assignments), text)
    # A hub id, unless its owner's name is a folder here: then it is a mistyped path.
    is_hub_id = text.count("/") == 1 and not path.exists() and not path.parent.is_dir()
    if text == "shapes" or text in KNOWN_MODELS or is_folder_of_model or is_hub_id:
        return Target(text, _plain(text, settings, assignments))
    raise UserError(
        f"{text} is not a run (config.yaml), a LoRA (*.safetensors) or a model (shapes, {', '.join(KNOWN_MODELS)}, "
        "a diffusers folder, a hub id owner/name); give one of them, such as a folder that `sqdf-fast train` wrote"
    )


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
    """A run's configuration with the given settings, but its own model."""
    own = config.model_dump(mode="json")
    if settings.get("reward", config.reward) != config.reward:
        # They belong to the run's own reward.
        own["reward_options"] = {}
    flags = {name: value for name, value in settings.items() if name not in ("preset", "model")}
    return _complete(make_config(file=own, assignments=assignments, flags=flags), settings, assignments)


def _complete(config: Config, settings: Mapping[str, Any], assignments: Mapping[str, Any]) -> Config:
    prompts = settings.get("evaluation", {}).get("prompts")
    if prompts and "num_prompts" not in assignments.get("evaluation", {}):
        # The user's own prompts: all of them.
        number = {"num_prompts": len(load_prompts(prompts))}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=number)})
    return with_lookahead(config, "tweedie")
