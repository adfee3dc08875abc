"""Train a diffusers pipeline through its callback: collect the states of a call, then take SQDF steps on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sqdf_fast import DenoisingSchedule, UserError, posterior_mean, rewards, sqdf_loss
from sqdf_fast.rewards import Reward
from sqdf_fast.shapes import TRAIN_PROMPTS, pipeline_folder


class SqdfCallback:
    """A `callback_on_step_end` that stores the states of one pipeline call; `update` trains on them.

    Args:
        pipe: pipeline with a DDIM or DDPM scheduler.
        latents: x at index 0, [B, ...]. Pass the same tensor to the call: a callback only sees the state after a step.
        call: keyword arguments of the call; guidance_scale above 1.
    """

    def __init__(self, pipe: StableDiffusionPipeline, latents: Tensor, call: dict[str, Any]) -> None:
        steps, eta = call["num_inference_steps"], call["eta"]
        self.schedule = DenoisingSchedule.from_scheduler(pipe.scheduler, steps, eta).to(latents.device)
        self.guidance_scale, self.states = call["guidance_scale"], [latents]

    def __call__(self, pipe: StableDiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        self.states.append(tensors["latents"])  # x at index step + 1
        self.text = tensors["prompt_embeds"]  # [2B, ...], ordered [uncond; cond]
        return tensors

    def update(self, pipe: StableDiffusionPipeline, optimizer: Optimizer, reward: Reward, prompts: list[str]) -> None:
        """Take one optimizer step on one state of each sample, at an index drawn from the trainable ones."""
        schedule, guidance_scale = self.schedule, self.guidance_scale
        index = schedule.trainable.float().multinomial(len(prompts), replacement=True)
        x = torch.stack([self.states[i][sample] for sample, i in enumerate(index.tolist())])

        def network(x: Tensor, timesteps: Tensor) -> Tensor:
            return pipe.unet(torch.cat([x, x]), timesteps[index].repeat(2), self.text).sample

        def score(x_prev: Tensor) -> Tensor:
            ahead = network(x_prev, schedule.lookahead_timesteps)
            x0 = posterior_mean(x_prev, ahead, schedule.lookahead, index, guidance_scale=guidance_scale)
            images = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5
            return reward(rewards.saturate(images), prompts)

        policy = network(x, schedule.timesteps)
        pipe.unet.disable_adapters()
        with torch.no_grad():
            reference = network(x, schedule.timesteps)
        options = {"alpha": 4.0, "gamma": 0.9, "guidance_scale": guidance_scale, "noise": torch.randn_like(x)}
        result = sqdf_loss(x, policy, reference, schedule, index, score, **options)
        pipe.unet.enable_adapters()
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()


def add_lora(pipe: StableDiffusionPipeline, rank: int) -> list[torch.nn.Parameter]:
    """Freeze a pipeline, add a LoRA to the attention of its UNet and return the trainable parameters."""
    for module in (pipe.vae, pipe.text_encoder, pipe.unet):
        module.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    return [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None).to(device)
    pipe.set_progress_bar_config(disable=True)
    # SD1.5's default, PNDM, is a deterministic multistep method; SQDF needs noisy steps that depend on x_t alone.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    reward = rewards.load_reward(args.reward, device=device)
    parameters = add_lora(pipe, rank=8)
    optimizer = AdamW(parameters, lr=args.learning_rate)
    call = {"num_inference_steps": 10, "guidance_scale": 4.0, "eta": 1.0, "output_type": "pt"}
    side, prompts = pipe.unet.config.sample_size, args.prompts

    def mean_reward() -> float:
        images = pipe(prompts, generator=torch.Generator().manual_seed(args.seed), **call).images
        return reward(images, prompts).mean().item()

    print(f"reward before: {mean_reward():.3f}")
    for _ in range(args.rounds):
        latents = torch.randn(len(prompts), pipe.unet.config.in_channels, side, side).to(device)
        callback = SqdfCallback(pipe, latents, call)
        tensors = ["latents", "prompt_embeds"]
        pipe(
            prompts,
            latents=latents,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=tensors,
            **call,
        )
        for _ in range(args.updates):
            callback.update(pipe, optimizer, reward, prompts)
    print(f"reward after: {mean_reward():.3f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage="%(prog)s [options]")
    parser.add_argument("--model", default=str(pipeline_folder()), help="default: embedded shapes model")
    parser.add_argument("--reward", default="taste", help="built-in reward or module:function; taste knows shapes")
    shapes = list(TRAIN_PROMPTS[:: len(TRAIN_PROMPTS) // 8][:8])
    parser.add_argument(
        "--prompts", nargs="+", default=shapes, metavar="PROMPT", help="prompts, one sample each; default: shapes"
    )
    parser.add_argument("--rounds", type=int, default=3, help="pipeline calls to learn from")
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps per call")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args(argv))
    except (OSError, ValueError, UserError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
