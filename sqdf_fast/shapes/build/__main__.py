"""``python -m sqdf_fast.shapes.build <part>``: make one part of the embedded world.

The defaults are the settings of the shipped weights; ``--smoke`` runs a part in seconds to show that it works.
Results are the same bit for bit only on the same kind of processor and with the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import click
import torch

from sqdf_fast.shapes import pipeline_folder
from sqdf_fast.shapes.build.judge import train_judge
from sqdf_fast.shapes.build.sheet import report_samples, save_sheet
from sqdf_fast.shapes.build.taste import train_taste
from sqdf_fast.shapes.build.unet import train_unet
from sqdf_fast.shapes.build.vae import finish_decoder, train_vae
from sqdf_fast.shapes.judge import load_judge

SEEDS = {"vae": 0, "unet": 1, "judge": 1000, "taste": 2000, "taste-held-out": 2001, "samples": 3000, "sheet": 7}
STEPS = {"vae": 2700, "decoder": 600, "unet": 4600, "judge": 2000, "taste": 300}
SMOKE_STEPS = {"vae": 3, "decoder": 2, "unet": 3, "judge": 3, "taste": 20}


def build(part: str, weights: Path, work: Path, smoke: bool) -> None:
    """Make ``part`` under ``weights``; ``work`` keeps the autoencoder and the training state of the noise predictor."""
    steps = SMOKE_STEPS if smoke else STEPS
    seed, pool = SEEDS[part], {"pool": 64} if smoke else {}
    pipeline, judge = weights / "pipeline", weights / "judge.safetensors"
    if part == "vae":
        train_vae(work / "vae", seed, steps["vae"], **pool)
        finish_decoder(work / "vae", seed + 1, steps["decoder"], **pool)
    elif part == "unet":
        train_unet(pipeline, work / "vae", seed, steps["unet"], work / "unet.pt", **pool)
    elif part == "judge":
        train_judge(judge, seed, steps["judge"], **pool)
    elif part in ("taste", "taste-held-out"):
        train_taste(weights / f"{part}.safetensors", seed, steps["taste"])
    elif part == "samples":
        report_samples(pipeline, load_judge(judge), seed, repeats=1 if smoke else 6)
    else:
        save_sheet(pipeline, work / "shapes_samples.png", seed, columns=1 if smoke else 6)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqdf_fast.shapes.build", description=__doc__)
    parser.add_argument("part", choices=list(SEEDS), help="what to make; in this order from nothing")
    parser.add_argument("--weights", type=Path, default=pipeline_folder().parent, help="where the weights are written")
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="what is not shipped: training states")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few renders")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seed, threads = SEEDS[options.part], torch.get_num_threads()
    click.echo(f"{options.part}: seed {seed}, torch {torch.__version__}, {threads} threads")
    build(options.part, options.weights, options.work, options.smoke)
    click.echo(f"{options.part}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
