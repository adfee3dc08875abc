"""The command line: parse, call, print."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sqdf_fast.errors import Interrupted, UserError

# Commands import inside their functions: --help and a mistyped option must not wait for torch.

Command = TypeVar("Command", bound=Callable[..., Any])


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, in the order that --help lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_PRESET = click.option(
    "--preset", help="Named settings: shapes, aesthetic, sdxl, sd35, flux, hpsv2, hpsv2-script, black-box."
)
_MODEL = click.option("--model", help="shapes, sd15, sdxl, sd35-medium, flux1-dev, a diffusers folder or a hub id.")
_REWARD = click.option(
    "--reward", help="A name from `sqdf-fast rewards`, module:function, or a weighted sum: aesthetic*1.0 + clip*0.5."
)
_PROMPTS = click.option("--prompts", help="A named set (shapes, animals) or a text file with one prompt per line.")
_DEVICE = click.option("--device", help="auto, cpu, cuda or cuda:N.")
_CONFIG = click.option(
    "--config", "file", type=click.Path(path_type=Path), help="YAML file of settings, such as a run's config.yaml."
)
_SET = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any setting, such as policy.rank=8; repeatable. `train --help-settings` lists them.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_CHOSEN = _options(_PRESET, _MODEL, _REWARD, _PROMPTS)


class OrderedGroup(click.Group):
    """A group whose commands are listed in the order of the work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="sqdf-fast")
def app() -> None:
    """Align a diffusion model with a reward, on one GPU or on the CPU.

    \b
    sqdf-fast train                       fine-tune (without a GPU: the embedded shapes world, in minutes)
    sqdf-fast plan --model sdxl --vram 8G settings that fit, without a GPU
    sqdf-fast sample RUN "a red star"     images from the fine-tuned model
    sqdf-fast evaluate RUN...             reward, alignment and diversity against the base model
    sqdf-fast compare --budget 12800      SQDF and other methods with the same budget and seeds
    """


@app.command()
@_options(_CHOSEN, _DEVICE)
@click.option("--output", type=click.Path(path_type=Path), help="New run folder. Default: runs/MODEL-REWARD-NNN.")
@click.option("--resume", type=click.Path(path_type=Path), help="Run folder to continue; takes no other options.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Seed of every random number.")
@click.option("--alpha", type=float, help="KL coefficient (objective.alpha).")
@click.option("--gamma", type=float, help="Discount per denoising step, in (0, 1] (objective.gamma).")
@click.option(
    "--policy",
    type=click.Choice(["network", "consistency"]),
    help="Train the model, or its consistency model in 4 steps without guidance (policy.base).",
)
@click.option("--vram", help="Memory budget, such as 24G, 8GiB or 80%. The run is planned for it and kept below it.")
@_options(_CONFIG, _SET)
@click.option("--help-settings", is_flag=True, help="List every setting with its meaning and default, and exit.")
def train(
    output: Path | None,
    resume: Path | None,
    file: Path | None,
    assignments: tuple[str, ...],
    help_settings: bool,
    **flags: Any,
) -> None:
    """Fine-tune a diffusion model with a reward.

    Without --model: Stable Diffusion 1.5 with a CUDA GPU, the embedded shapes model without one.

    Settings, later ones win: defaults, --preset, --config, --set, other options.

    Out of memory? Give --vram; `sqdf-fast plan` shows what changes. The gradient stays the same up to rounding.

    Ctrl-C saves a checkpoint and prints how to continue.
    """
    if help_settings:
        from sqdf_fast.config import Config, describe_settings

        click.echo(describe_settings(Config))
        return
    from sqdf_fast.commands.settings import read_settings

    if resume is None:
        config, keep = read_settings(flags, file, assignments)
    else:
        options = {**flags, "set": assignments or None, "config": file, "output": output}
        if given := [f"--{name}" for name, value in options.items() if value is not None]:
            raise UserError(f"--resume continues a run with its own config.yaml; leave out {', '.join(given)}")
    # Only now: invalid settings are refused before torch is loaded.
    from sqdf_fast.commands.train import interruption
    from sqdf_fast.training.lifecycle import continue_run, new_run

    try:
        with interruption(_say) as stop:
            click.echo(new_run(config, output, stop, keep) if resume is None else continue_run(resume, stop))
    except Interrupted as interrupted:
        how = f"Continue with: sqdf-fast train --resume {interrupted}" if str(interrupted) else "Nothing was written."
        _say(f"Interrupted. {how}")
        sys.exit(130)


@app.command()
@_options(_PRESET, _MODEL, _REWARD)
@click.option("--vram", help="Memory that the process may use, such as 24G or 8GiB. Default: all of this GPU's.")
@click.option("--gpu", help="GPU that times are predicted for, such as 'RTX 4090'. Default: one with that memory.")
@click.option("--allow", multiple=True, type=click.Choice(["nf4", "int8"]), help="Quantization to try; repeatable.")
@_options(_JSON, _CONFIG, _SET)
def plan(
    vram: str | None,
    gpu: str | None,
    allow: tuple[str, ...],
    as_json: bool,
    file: Path | None,
    assignments: tuple[str, ...],
    **flags: Any,
) -> None:
    """Predict the fastest settings of a training step within --vram, their peak memory and their time.

    The training code runs on tensors without data, so neither a GPU nor weights are needed. Exit status 1 if nothing
    fits.
    """
    from sqdf_fast.commands.settings import read_settings
    from sqdf_fast.training.lifecycle import plan_for

    config, keep = read_settings(flags, file, assignments)
    planned = plan_for(config, vram or config.vram or "100%", gpu=gpu, allow=allow, keep=keep)
    click.echo(planned.as_json() if as_json else planned.as_text())
    if not planned.fits:
        click.get_current_context().exit(1)


@app.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1, required=True)
@click.option("--number", "-n", type=click.IntRange(min=1), default=4, show_default=True, help="Images per prompt.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--base", is_flag=True, help="Sample the base model instead of the fine-tuned one.")
@click.option("--best-of", type=click.IntRange(min=1), metavar="N", help="Keep the best of N images by reward.")
@click.option("--guide-scale", type=float, metavar="S", help="Add S times the reward's gradient at every step.")
@click.option(
    "--guide-by",
    type=click.Choice(["tweedie", "consistency"]),
    default="tweedie",
    show_default=True,
    help="How the final image is predicted for --guide-scale.",
)
@click.option("--reward", help="Reward of --best-of and --guide-scale. Default: the run's.")
@click.option("--output", type=click.Path(path_type=Path), help="PNG file. Default: sample.png in RUN.")
def sample(
    run: Path,
    base: bool,
    best_of: int | None,
    guide_scale: float | None,
    guide_by: str,
    reward: str | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Sample images for PROMPTS into one grid, from the fine-tuned model of RUN (a run folder) or from a base model.

    \b
    sqdf-fast sample runs/shapes-taste-001 "a red star"
    sqdf-fast sample shapes "a red star" --best-of 8 --reward taste      without training; docs/baselines.md
    """
    from sqdf_fast.commands.sample import draw, training_free_options

    path = output or _beside(run, "sample-base.png" if base else "sample.png")
    method = training_free_options(best_of, guide_scale, guide_by, reward)
    cost = draw(run, base=base, output=path, **options, **method)
    click.echo(f"{path}")
    if cost is not None:
        click.echo(
            f"network rows {cost.unet_evaluations}, of them with a gradient {cost.unet_backward_rows}; "
            f"images scored {cost.reward_evaluations}"
        )


@app.command()
@click.argument("targets", nargs=-1, required=True, metavar="TARGET...")
@click.option("--prompts", help="Held-out prompts: a named set or a file. Default: the first run's.")
@click.option("--images", type=click.IntRange(min=2), help="Images per prompt. Default: the first run's.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the noise; training evaluates with 0.")
@click.option("--reward", help="Reward to report as the proxy. Default: the first run's.")
@click.option("--held-out", multiple=True, metavar="REWARD", help="A reward that was not trained on; repeatable.")
@click.option("--judge", "judges", multiple=True, help="clip, lpips, dreamsim, frechet or module:Class; repeatable.")
@click.option("--model", help="Base model of LoRA files outside a run folder.")
@_options(_PRESET, _DEVICE, _SET, _JSON)
@click.option(
    "--output", type=click.Path(path_type=Path), help="PNG file of images. Default: evaluation.png in the first run."
)
@click.option("--html", type=click.Path(path_type=Path), help="HTML page with the table and the images.")
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
    """Compare models on held-out prompts with the same noise; docs/evaluation.md.

    A TARGET is a run folder, a LoRA folder or file, or a base model (shapes, a diffusers folder, a hub id). The base
    model of the first one is always included.
    """
    from sqdf_fast.commands.evaluate import evaluate_models
    from sqdf_fast.config import parse_assignments

    evaluation = {"prompts": prompts, "images_per_prompt": images, "held_out": held_out}
    settings: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    settings["evaluation"] = {name: value for name, value in evaluation.items() if value}
    given = parse_assignments(assignments)
    verdict = evaluate_models(targets, settings=settings, assignments=given, judges=judges, seed=seed)
    sheet = output or _beside(Path(targets[0]), "evaluation.png")
    verdict.save_sheet(sheet)
    if html is not None:
        verdict.save_page(html)
    if as_json:
        click.echo(json.dumps(verdict.as_dict(), indent=1))
    else:
        click.echo("\n".join([verdict.as_text(), str(sheet), *([str(html)] if html else [])]))


@app.command()
@_JSON
def rewards(as_json: bool) -> None:
    """List the built-in rewards: size, download, input, gradient and licence; docs/rewards.md."""
    from sqdf_fast.commands.rewards import as_text
    from sqdf_fast.rewards import catalogue

    click.echo(json.dumps(catalogue.as_dict(), indent=1) if as_json else as_text())


@app.command()
@click.option("--methods", help="Comma-separated methods. Default: sqdf,draft-1,refl,ddpo, or those of --protocol.")
@click.option("--seeds", help="Comma-separated seeds; each method runs once per seed. Default: 0,1,2.")
@click.option("--budget", help="Budget of a run: UNet evaluations (network rows) such as 20000, or time such as 120s.")
@click.option("--points", type=click.IntRange(min=2), help="Evaluations per run, one before training. Default: 6.")
@click.option("--ablate", help="Comma-separated ablations: gamma, credit, lookahead, buffer, replay-ratio, alpha.")
@click.option("--protocol", "file", type=click.Path(path_type=Path), help="YAML file of a study; docs/compare.md.")
@_CHOSEN
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, for all methods.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at a time. Default: one per GPU, one on the CPU, all on a cluster.",
)
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm", "debug"]),
    default="local",
    show_default=True,
    help="Where runs are started: processes here, Slurm jobs, or one after the other in this process.",
)
@click.option(
    "--slurm",
    multiple=True,
    metavar="KEY=VALUE",
    help="Settings of each Slurm job: partition=gpu, time=240 (minutes), mem=32G, ...; one GPU and one day by default.",
)
@click.option("--output", type=click.Path(path_type=Path), help="New folder, or one to continue. Default: a new one.")
@click.option("--resume", type=click.Path(path_type=Path), help="Folder to continue with its own protocol.yaml.")
def compare(
    jobs: int | None,
    launcher: str,
    slurm: tuple[str, ...],
    output: Path | None,
    resume: Path | None,
    **options: Any,
) -> None:
    """Train several methods on several seeds under one budget, and report them side by side; docs/compare.md.

    After an interruption, continue with --resume FOLDER, or with the same command and --output FOLDER: finished runs
    are kept, an interrupted one loses at most the work since its last evaluation. Exit status 1 when a run failed.
    """
    from sqdf_fast.compare.command import compare as run_comparison
    from sqdf_fast.compare.command import stored_protocol
    from sqdf_fast.compare.options import chosen_protocol
    from sqdf_fast.config import parse_assignments
    from sqdf_fast.runs.folder import RunFolder

    if resume is None:
        protocol = chosen_protocol(**options)
        folder = output or RunFolder.next_free(Path("runs"), "compare")
    elif output or any(options.values()):
        raise UserError(
            "--resume uses the folder's own protocol.yaml; leave out everything but --jobs, --launcher and --slurm"
        )
    else:
        protocol, folder = stored_protocol(resume), resume
    try:
        table, failed = run_comparison(protocol, folder, jobs, launcher, parse_assignments(slurm))
    except Interrupted:
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
    """Write RUN/report.html from the files of the run."""
    from sqdf_fast.runs import write_report

    click.echo(f"{write_report(run)}")


@app.command()
@click.option("--model", default="shapes", show_default=True, help="shapes, a diffusers folder or a hub id.")
@click.option("--prompts", default="shapes", show_default=True, help="A named set or a text file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder for the LoRA.")
@click.option("--preset", help="Named settings: default or shapes. Default: shapes for the shapes model.")
@click.option("--reward", help="Reward whose correlation with the final image's is added to the closing table.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting, such as steps=2000.")
def distill(output: Path, **options: Any) -> None:
    """Distill any base model into a consistency LoRA, which `train` looks ahead with.

    Settings, and their effect on the shapes model: docs/distill.md.
    """
    from sqdf_fast.commands.distill import make_lora

    click.echo(make_lora(output=output, **options))
    click.echo(f"{output / 'pytorch_lora_weights.safetensors'}")


@app.command()
def doctor() -> None:
    """Show versions, devices, the native library, and which implementation each op uses here and why."""
    from sqdf_fast.commands.doctor import report as environment

    click.echo(environment())


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 2 for bad input (one line on stderr), 130 for an interruption."""
    # diffusers, transformers and peft log how they load; a user needs their errors only.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
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


def _say(message: str) -> None:
    click.echo(message, err=True)


def _fail(message: str) -> int:
    click.echo(f"sqdf-fast: {' '.join(message.split())}", err=True)
    return 2


def _beside(run: Path, name: str) -> Path:
    """``name`` in a run folder, or in the current folder otherwise."""
    return run / name if (run / "config.yaml").is_file() else Path(name)


if __name__ == "__main__":
    sys.exit(main())
