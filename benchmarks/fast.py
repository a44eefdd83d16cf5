"""Pictures a second of `OneStepPipeline.fast`, beside the pipeline itself, diffusers' own, and the bare network and
decoder.

    python benchmarks/fast.py --layout sd15 --size 128 --rounds 5 [--device cuda --dtype bfloat16 --mode graph]
    python benchmarks/fast.py --model runs/checkpoint --lora one_step.safetensors --size 1024

One round draws one picture each way, in turn; given are each way's median time and its median ratio to the bare
calls of the same round. Weights of a layout are random: its times are those of any weights. Texts are encoded before
the clock starts for fast and for the bare calls, and by the two pipelines at each picture, as they do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onestep.core.recipe import Recipe
from onestep.pipelines.fast import decoded
from onestep.pipelines.load import load
from onestep.pipelines.one_step import OneStepPipeline

PROMPT = "a lighthouse in a storm"


def sd15() -> Any:
    """A pipeline in Stable Diffusion 1.5's layout, with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    channels = (128, 256, 512, 512)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": channels, "layers_per_block": 2}
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    tokenizer = load("tiny").tokenizer
    return StableDiffusionPipeline(AutoencoderKL(**blocks), text, tokenizer, unet, scheduler, **parts)


LAYOUTS = {"sd15": sd15, "tiny": lambda: load("tiny")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, default="sd15")
    parser.add_argument("--model", help="a checkpoint instead of a layout")
    parser.add_argument("--lora", type=Path, help="a one-step LoRA of it")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--mode", default="auto", choices=("auto", "eager", "compile", "graph"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plain = load(args.model) if args.model else LAYOUTS[args.layout]()
    plain.to(args.device, getattr(torch, args.dtype)).set_progress_bar_config(disable=True)
    pipe = OneStepPipeline.from_pipe(plain)
    if args.lora:
        pipe.load_one_step_lora(args.lora)
    recipe = pipe.recipe if args.lora else Recipe((999.0,))
    with torch.inference_mode(), pipe.fast(args.mode, recipe=recipe) as draw:
        ways = ways_of(plain, pipe, draw, recipe, args.size)
        times = timed(ways, args.rounds, args.device)
        report = "\n".join(table(times, args, draw.mode))
    print(report)
    if args.out:
        args.out.write_text(report + "\n", "utf-8")


def ways_of(plain: Any, pipe: Any, draw: Any, recipe: Recipe, size: int) -> dict[str, Callable[[], Any]]:
    """Each way to draw one picture."""
    cond = draw.cond([PROMPT], (size, size))
    shape = (1, *draw.host.latent_shape((size, size)))
    x = torch.randn(shape, device=draw.host.device)
    moment = torch.full((1,), recipe.timesteps[0], device=x.device)
    given = {"width": size, "height": size}
    theirs = {**given, "num_inference_steps": recipe.steps, "guidance_scale": 1.0, "output_type": "pt"}

    def bare() -> Any:
        for _ in range(recipe.steps):
            answer = draw.network(x, moment, cond)
        return decoded(draw.host.pipe.vae, answer)

    return {
        "bare network and decoder": bare,
        "fast": lambda: draw(PROMPT, seed=0, **given),
        "OneStepPipeline": lambda: pipe(PROMPT, seed=0, recipe=recipe, output_type="pt", **given),
        "diffusers": lambda: plain(PROMPT, **theirs),
    }


def timed(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def table(times: dict[str, list[float]], args: argparse.Namespace, mode: str) -> list[str]:
    base = times["bare network and decoder"]
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"`{args.model or args.layout}`, {args.size} pixels, {args.dtype}, fast in mode {mode}, {args.rounds} rounds, "
        f"torch {torch.__version__}, {card}.",
        "",
        "| way | ms a picture | pictures a second | of the bare calls: median (least, greatest) |",
        "|---|---|---|---|",
    ]
    for name, seconds in times.items():
        ratios = [mine / bare for mine, bare in zip(seconds, base, strict=True)]
        middle = statistics.median(seconds)
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        lines.append(f"| {name} | {1000 * middle:.1f} | {1 / middle:.2f} | {spread} |")
    return lines


if __name__ == "__main__":
    main()
