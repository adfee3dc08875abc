"""The command line: parse, call, print."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqdf_fast.errors import UserError

if TYPE_CHECKING:
    from sqdf_fast.config import Config

# What the commands import is imported inside them: --help and a typing error must not wait for torch.


class HelpfulGroup(click.Group):
    """A group whose commands are listed in the order of the work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=HelpfulGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sqdf-fast")
def app() -> None:
    """Align a diffusion model with a reward, on one GPU or on the CPU.

    \b
    sqdf-fast train                       fine-tune (without a GPU: the embedded shapes world, in minutes)
    sqdf-fast plan --model sdxl --vram 8G whether and how it fits, without a GPU
    sqdf-fast sample RUN "a red star"     pictures from the fine-tuned model
    sqdf-fast evaluate RUN...             reward, alignment and diversity against the base model
    sqdf-fast compare --budget 12800      SQDF beside other methods, same budget and seeds, one report
    """


@app.command()
@click.option(
    "--preset", help="Named hyperparameters: shapes, aesthetic, sdxl, sd35, flux, hpsv2, hpsv2-script, black-box."
)
@click.option("--model", help="'shapes', a diffusers folder, or a hub id. Default: SD1.5 with a CUDA GPU, else shapes.")
@click.option("--reward", help="A registered one (taste, ...), module:function, or a sum: aesthetic*1.0 + clip*0.5.")
@click.option("--prompts", help="A named set (shapes, animals) or a text file, one prompt a line.")
@click.option("--output", type=click.Path(path_type=Path), help="New run folder. Default: runs/MODEL-REWARD-NNN.")
@click.option("--resume", type=click.Path(path_type=Path), help="Run folder to continue; takes no other settings.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Every random number derives from it.")
@click.option("--alpha", type=float, help="KL coefficient (objective.alpha).")
@click.option("--gamma", type=float, help="Discount per denoising step, in (0, 1] (objective.gamma).")
@click.option(
    "--policy",
    type=click.Choice(["network", "consistency"]),
    help="Train the model, or its consistency model in 4 steps without guidance (policy.base).",
)
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--vram", help="Memory budget: 24G, 8GiB, 24000M or 80%. Plans the run and holds it to that.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="YAML file of settings, e.g. a run's config.yaml.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, e.g. --set policy.rank=8.")
@click.option("--help-settings", is_flag=True, help="List every setting with its meaning and default, and exit.")
def train(
    output: Path | None,
    resume: Path | None,
    file: Path | None,
    assignments: tuple[str, ...],
    help_settings: bool,
    **flags: Any,
) -> None:
    """Fine-tune a diffusion model with SQDF.

    Settings: defaults < --preset < --config < --set < flags. Out of memory? Give --vram: the step is planned for it
    (`sqdf-fast plan` shows how), and the gradient stays the same beyond rounding.
    Ctrl-C saves a checkpoint and says how to go on.
    """
    if help_settings:
        click.echo(_settings_table())
        return
    given = {name: value for name, value in flags.items() if value is not None}
    if resume is not None:
        unwanted = [f"--{name}" for name in given] + ["--set"] * bool(assignments) + ["--config"] * bool(file)
        if unwanted or output is not None:
            named = ", ".join(dict.fromkeys(unwanted + ["--output"] * (output is not None)))
            raise UserError(f"--resume continues a run with its own config.yaml; leave out {named}")
        _train(resume, None)
        return
    config, keep = _config(given, file, assignments)
    _train(output, config, keep)


@app.command()
@click.option("--preset", help="Named hyperparameters, as for train.")
@click.option("--model", help="shapes, sd15, sdxl, sd35-medium, flux1-dev, their hub ids, or a diffusers folder.")
@click.option("--reward", help="A registered reward: aesthetic, hpsv2, taste, ...")
@click.option("--vram", help="What the process may take: 24G, 8GiB, 24000M. Default: the memory of the GPU here.")
@click.option("--gpu", help="GPU whose speed the predicted time is for, e.g. 'RTX 4090'. Default: one of that memory.")
@click.option("--allow", multiple=True, type=click.Choice(["nf4", "int8"]), help="Quantised bases that may be tried.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="YAML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting.")
def plan(
    vram: str | None,
    gpu: str | None,
    allow: tuple[str, ...],
    as_json: bool,
    file: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Predict how a training step fits a card: the fastest settings for --vram, their peak and their time.

    The code that trains runs on tensors without values; neither a GPU nor weights are needed. Exit status 1 when
    nothing fits.
    """
    from sqdf_fast.training.lifecycle import plan_for

    given = {name: value for name, value in flags.items() if value is not None}
    config, keep = _config(given, file, assignments)
    found = plan_for(config, vram or config.vram or "100%", gpu=gpu, allow=allow, keep=keep)
    click.echo(found.as_json() if as_json else found.as_text())
    if not found.fits:
        click.get_current_context().exit(1)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True)
@click.option("--number", "-n", type=click.IntRange(min=1), default=4, show_default=True, help="Pictures a prompt.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--base", is_flag=True, help="Draw from the base model instead of the fine-tuned one.")
@click.option("--best-of", type=click.IntRange(min=1), metavar="N", help="Keep the best of N by the reward.")
@click.option("--guide-scale", type=float, metavar="S", help="Follow S times the reward's gradient in every step.")
@click.option(
    "--guide-by",
    type=click.Choice(["tweedie", "consistency"]),
    default="tweedie",
    show_default=True,
    help="What predicts the picture whose reward guides.",
)
@click.option("--reward", help="Of --best-of and --guide-scale. Default: the run's.")
@click.option("--output", type=click.Path(path_type=Path), help="PNG to write. Default: sample.png in RUN.")
def sample(
    run: Path,
    prompts: tuple[str, ...],
    number: int,
    seed: int,
    base: bool,
    best_of: int | None,
    guide_scale: float | None,
    guide_by: str,
    reward: str | None,
    output: Path | None,
) -> None:
    """Draw pictures for PROMPTS into one grid, from the fine-tuned model of RUN (a run folder) or from a base model.

    \b
    sqdf-fast sample runs/shapes-taste-001 "a red star"
    sqdf-fast sample shapes "a red star" --best-of 8 --reward taste      without any training; docs/baselines.md
    """
    from sqdf_fast.commands.sample import draw

    path = output or _beside(run, "sample-base.png" if base else "sample.png")
    options = _training_free(best_of, guide_scale, guide_by, reward)
    cost = draw(run, list(prompts), number=number, seed=seed, base=base, output=path, **options)
    click.echo(f"{path}")
    if cost is not None:
        click.echo(
            f"network rows {cost.unet_evaluations}, of them with a gradient {cost.unet_backward_rows}; "
            f"pictures scored {cost.reward_evaluations}"
        )


def _training_free(best_of: int | None, guide_scale: float | None, guide_by: str, reward: str | None) -> dict[str, Any]:
    if best_of is not None and guide_scale is not None:
        raise UserError("--best-of and --guide-scale are two ways to better a sample; give one of them")
    if best_of is not None:
        return {"method": "best-of-n", "candidates": best_of, "reward": reward}
    if guide_scale is not None:
        return {"method": "guided", "scale": guide_scale, "estimate": guide_by, "reward": reward}
    if reward is not None:
        raise UserError(f"--reward {reward} has no use here without --best-of N or --guide-scale S")
    return {}


@app.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--prompts", help="Held-out prompts: a named set or a file. Default: the first run's.")
@click.option("--images", type=click.IntRange(min=2), help="Pictures a prompt. Default: the first run's.")
@click.option("--seed", type=int, default=1, show_default=True, help="Other than the runs' evaluations, which use 0.")
@click.option("--reward", help="Reward called proxy. Default: the first run's.")
@click.option("--held-out", multiple=True, metavar="REWARD", help="A reward that training did not see; repeatable.")
@click.option("--judge", "judges", multiple=True, help="clip, lpips, dreamsim, frechet or module:Class; repeatable.")
@click.option("--model", help="Base model of LoRA files that lie in no run folder.")
@click.option("--preset", help="Settings of targets that are no run, as for train.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, for all targets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Sheet of pictures. Default: evaluation.png, in the first run."
)
@click.option("--html", type=click.Path(path_type=Path), help="Also write table and pictures as one HTML page.")
def evaluate(
    targets: tuple[str, ...],
    prompts: str | None,
    images: int | None,
    seed: int,
    held_out: tuple[str, ...],
    judges: tuple[str, ...],
    assignments: tuple[str, ...],
    as_json: bool,
    output: Path | None,
    html: Path | None,
    **flags: str | None,
) -> None:
    """Judge models side by side on held-out prompts and fresh, common noise; docs/evaluation.md.

    A TARGET is a run folder, a LoRA folder or file, or a base model (shapes, a diffusers folder, a hub id). The base
    model of the first one is always among them.
    """
    from sqdf_fast.commands.evaluate import evaluate_models
    from sqdf_fast.config import parse_assignments
    from sqdf_fast.display import StageProgress

    evaluation = {"prompts": prompts, "images_per_prompt": images, "held_out": held_out or None}
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    settings["evaluation"] = {name: value for name, value in evaluation.items() if value is not None}
    verdict = evaluate_models(
        targets,
        settings=settings,
        assignments=parse_assignments(assignments),
        judges=judges,
        seed=seed,
        progress=StageProgress(),
    )
    sheet = output or _beside(Path(targets[0]), "evaluation.png")
    verdict.save_sheet(sheet)
    if html is not None:
        verdict.save_page(html)
    click.echo(json.dumps(verdict.as_dict(), indent=1) if as_json else verdict.as_text())
    if not as_json:
        click.echo("\n".join(str(path) for path in (sheet, html) if path is not None))


@app.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rewards(as_json: bool) -> None:
    """List the rewards that come with it: size, download, input, gradient and licence; docs/rewards.md."""
    from sqdf_fast.rewards import catalogue

    click.echo(json.dumps(catalogue.as_dict(), indent=1) if as_json else catalogue.as_text())


@app.command()
@click.option("--methods", help="Names with commas. Default: sqdf,draft-1,refl,ddpo, or those of --protocol.")
@click.option("--seeds", help="Numbers with commas, one run of each method a seed. Default: 0,1,2.")
@click.option("--budget", help="Of a run: 20000 UNet evaluations (rows through the network), or seconds: 120s.")
@click.option("--points", type=click.IntRange(min=2), help="Evaluations of a run, one before training. Default: 6.")
@click.option("--ablate", help="Axes with commas: gamma, credit, lookahead, buffer, replay-ratio, alpha.")
@click.option("--protocol", "file", type=click.Path(path_type=Path), help="YAML file of a study; docs/compare.md.")
@click.option("--preset", help="Named hyperparameters, as for train.")
@click.option("--model", help="'shapes', a diffusers folder, or a hub id.")
@click.option("--reward", help="What is trained on: a registered one, module:function, or a sum, as for train.")
@click.option("--prompts", help="A named set or a text file, one prompt a line.")
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, for all methods.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time. Default: one a GPU, or one on the CPU.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder, new or to go on with. Default: a new one.")
@click.option("--resume", type=click.Path(path_type=Path), help="Folder to go on with, by its own protocol.yaml.")
def compare(
    methods: str | None,
    seeds: str | None,
    budget: str | None,
    points: int | None,
    ablate: str | None,
    file: Path | None,
    assignments: tuple[str, ...],
    jobs: int | None,
    output: Path | None,
    resume: Path | None,
    **flags: str | None,
) -> None:
    """Train several methods on several seeds under one budget, and report them side by side; docs/compare.md.

    Killed at any time, --resume FOLDER (or the same command with --output FOLDER) goes on: finished runs stay, a
    broken-off one loses at most the work since its last evaluation. Exit status 1 when a run failed.
    """
    from sqdf_fast.compare.command import compare as run_comparison
    from sqdf_fast.compare.command import protocol_of, stored_protocol
    from sqdf_fast.compare.pool import Stopped
    from sqdf_fast.compare.protocol import read_protocol
    from sqdf_fast.config import parse_assignments
    from sqdf_fast.runs.folder import RunFolder

    given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if resume is not None:
        if given or assignments or any((methods, seeds, budget, points, ablate, file, output)):
            raise UserError("--resume goes on by the folder's own protocol.yaml; leave out everything but --jobs")
        protocol, folder = stored_protocol(resume), resume
    else:
        values = read_protocol(file) if file else _short_protocol(given, assignments, budget)
        preset = given.pop("preset", None)
        layers = {**parse_assignments(assignments), **given}
        whole = {"preset": preset, "seeds": _seeds(seeds), "budget": budget, "points": points, "ablate": _names(ablate)}
        names = _names(methods) or ([] if file else _names("sqdf" if ablate else "sqdf,draft-1,refl,ddpo"))
        protocol = protocol_of(values, layers, names, **whole)
        folder = output or RunFolder.next_free(Path("runs"), "compare")
    try:
        table, failed = run_comparison(protocol, folder, jobs)
    except Stopped:
        click.echo(f"Interrupted. Continue with: sqdf-fast compare --resume {folder}", err=True)
        sys.exit(130)
    click.echo(f"{table}\n\n{folder / 'report.html'}")
    if failed:
        first, reason = next(iter(failed.items()))
        again = f"Try them again with: sqdf-fast compare --resume {folder}"
        click.echo(f"{len(failed)} run{'s' * (len(failed) > 1)} failed; {first}: {reason}. {again}", err=True)
        click.get_current_context().exit(1)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html again from what the run folder holds."""
    from sqdf_fast.runs import write_report

    click.echo(f"{write_report(run)}")


@app.command()
@click.option("--model", default="shapes", show_default=True, help="'shapes', a diffusers folder, or a hub id.")
@click.option("--prompts", default="shapes", show_default=True, help="A named set or a text file, one prompt a line.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder for the LoRA.")
@click.option("--preset", help="Named settings: default, shapes. Default: shapes for the shapes model.")
@click.option("--reward", help="Adds its correlation with the final picture's reward to the closing table.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, e.g. --set steps=2000.")
def distill(
    model: str,
    prompts: str,
    output: Path,
    preset: str | None,
    reward: str | None,
    device: str,
    assignments: tuple[str, ...],
) -> None:
    """Make a consistency LoRA for any base model: the look-ahead of `train`, for models that have none.

    Settings and what they did on the shapes model: docs/distill.md.
    """
    from sqdf_fast.config import parse_assignments
    from sqdf_fast.display import StageProgress
    from sqdf_fast.distill import accuracy_table, make_distillation
    from sqdf_fast.distill import distill as make_lora
    from sqdf_fast.engine.loading import pick_device, pick_dtype
    from sqdf_fast.prompts import load_prompts
    from sqdf_fast.rewards import checked_reward, load_reward

    settings = make_distillation(
        preset or ("shapes" if model == "shapes" else "default"), parse_assignments(assignments)
    )
    where = pick_device(device)
    judge = load_reward(reward, device=where) if reward else None
    with StageProgress() as progress:
        summary = make_lora(
            model,
            load_prompts(prompts),
            output,
            settings,
            device=where,
            dtype=pick_dtype("auto", where),
            reward=None if judge is None else partial(checked_reward, judge),
            progress=progress,
        )
    click.echo(accuracy_table(summary["accuracy"]))
    click.echo(f"{output / 'pytorch_lora_weights.safetensors'}")


@app.command()
def doctor() -> None:
    """Show versions, devices, the native library, and which implementation each op takes here and why."""
    from sqdf_fast.commands.doctor import report as environment

    click.echo(environment())


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 2 for bad input (one line on stderr), 130 for an interruption."""
    # diffusers, transformers and peft narrate their loading; a user needs their errors only.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        result = app.main(arguments, prog_name="sqdf-fast", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except UserError as error:
        return _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
        return 2
    except click.ClickException as error:
        return _fail(f"{error.format_message()} (see sqdf-fast --help)")
    except (KeyboardInterrupt, click.Abort):
        return 130


def _fail(message: str) -> int:
    click.echo(f"sqdf-fast: {' '.join(message.split())}", err=True)
    return 2


def _beside(run: Path, name: str) -> Path:
    """``name`` in a run folder, in the current folder where there is none."""
    return run / name if (run / "config.yaml").is_file() else Path(name)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2") from None


def _short_protocol(given: dict[str, Any], assignments: tuple[str, ...], budget: str | None) -> dict[str, Any]:
    """What `compare` begins with where there is no file: the preset that `train` would take."""
    from sqdf_fast.config import parse_assignments

    if budget is None:
        raise UserError("compare needs --budget, such as 20000 UNet evaluations or 120s, or --protocol FILE")
    preset = _default_preset(given, {"file": None, "assignments": parse_assignments(assignments)})
    return {"preset": preset or given.get("preset")}


def _settings_table() -> str:
    from sqdf_fast.config import describe_settings

    return describe_settings()


def _config(given: dict[str, Any], file: Path | None, assignments: tuple[str, ...]) -> tuple[Config, tuple[str, ...]]:
    """The configuration, and the dotted keys that the user set."""
    from sqdf_fast.config import given_settings, make_config, parse_assignments, read_config_file

    layers = {"file": read_config_file(file) if file else None, "assignments": parse_assignments(assignments)}
    objective = {name: given.pop(name) for name in ("alpha", "gamma") if name in given}
    if objective:
        given["objective"] = objective
    if "policy" in given:
        given["policy"] = {"base": given["policy"]}
    return make_config(_default_preset(given, layers), flags=given, **layers), given_settings(flags=given, **layers)


def _default_preset(given: dict[str, Any], layers: dict[str, Any]) -> str | None:
    chosen = [layer for layer in (given, *layers.values()) if layer and ("preset" in layer or "model" in layer)]
    if layers["file"] and "objective" in layers["file"]:
        return None
    if any("preset" in layer for layer in chosen):
        return None
    from sqdf_fast.config import default_preset

    if chosen:
        return default_preset(next(layer["model"] for layer in chosen))
    import torch

    if torch.cuda.is_available():
        return "aesthetic"
    click.echo("No CUDA GPU and no --model: training the embedded shapes model on the CPU.", err=True)
    return "shapes"


def _train(path: Path | None, config: Config | None, keep: tuple[str, ...] = ()) -> None:
    from sqdf_fast.errors import Interrupted
    from sqdf_fast.training.lifecycle import continue_run, new_run

    with _interruption() as stop:
        run = None
        try:
            if config is None:
                assert path is not None
                run = continue_run(path, stop)
            else:
                run = new_run(config, path, stop, keep)
        except Interrupted as ended:
            how = f"Continue with: sqdf-fast train --resume {ended}" if str(ended) else "Nothing was written."
            click.echo(f"Interrupted. {how}", err=True)
            sys.exit(130)
    click.echo(run)


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) asks the run to stop after its current network call, the second one kills it."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        click.echo("Stopping after the current network call; once more to stop at once.", err=True)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
