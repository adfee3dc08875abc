"""Train a LoRA for a Stable Diffusion pipeline in a plain diffusers, peft and accelerate loop.

Load the result with pipe.load_lora_weights(output_dir). Without arguments the script trains the embedded shapes model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from sqdf_fast.shapes import TRAIN_PROMPTS, pipeline_folder
from sqdf_fast.shapes.prompts import attributes_for
from sqdf_fast.shapes.render import render


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [options]")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        default=str(pipeline_folder()),
        help="diffusers folder or hub id; default: embedded shapes model",
    )
    parser.add_argument("--train_data_dir", type=Path, help="images and metadata.jsonl; default: rendered shapes")
    parser.add_argument("--output_dir", type=Path, default=Path("lora"), help="output folder")
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load_data(folder: Path | None, pipe: StableDiffusionPipeline) -> list[tuple[Tensor, str]]:
    """Images [3, H, W] in [-1, 1] and their captions; without a folder, one rendered image per shapes prompt."""
    if folder is None:
        captions: Sequence[str] = TRAIN_PROMPTS
        rendered = render(attributes_for(captions, np.random.default_rng(0)))
        pixels = pipe.image_processor.preprocess(torch.from_numpy(rendered))
    else:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        captions = [row["text"] for row in rows]
        images = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pixels = pipe.image_processor.preprocess(images, height=side, width=side)
    return list(zip(pixels, captions, strict=True))


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    accelerator = Accelerator()
    device = accelerator.device
    pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, safety_checker=None).to(device)
    noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    for module in (pipe.vae, pipe.text_encoder, pipe.unet):
        module.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets)
    pipe.unet.add_adapter(lora)
    parameters = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    data = load_data(args.train_data_dir, pipe)
    sampler = RandomSampler(data, replacement=True, num_samples=args.max_train_steps * args.train_batch_size)
    loader = DataLoader(data, args.train_batch_size, sampler=sampler)
    unet, optimizer, loader = accelerator.prepare(pipe.unet, optimizer, loader)

    def batch_loss(pixels: Tensor, captions: Sequence[str]) -> Tensor:
        states, _ = pipe.encode_prompt(list(captions), device, 1, do_classifier_free_guidance=False)
        with torch.no_grad():
            latents = retrieve_latents(pipe.vae.encode(pixels)) * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), device=device)
        x = noise_scheduler.add_noise(latents, noise, timesteps)
        output = unet(x, timesteps, states).sample

        velocity = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return F.mse_loss(output.float(), target)

    for step, (pixels, captions) in enumerate(loader):
        loss = batch_loss(pixels, captions)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        layers = get_peft_model_state_dict(accelerator.unwrap_model(unet))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        train(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
