"""Step time and peak memory of `dmd`, roles on one base against three full networks, on random weights of real shape.

    python benchmarks/step.py [--layouts sd15 sdxl] [--sizes 512 1024] [--batches 1 4] [--out
    benchmarks/results/step.md]

One update is one critic update and one of the student, as the trainer does them, bf16 on a GPU, gradient
checkpointing on.
"Three networks" is the same update with student and critic as full trainable copies and a third as teacher, AdamW in
float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.cond import Cond
from onestep.core.denoiser import EpsDenoiser
from onestep.core.families import bind_diffusers, blocks_of
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER, Roles
from onestep.core.schedule import VPSchedule
from onestep.pipelines.networks import NETWORKS
from onestep.training.engine.batch import Batch
from onestep.training.engine.student import STUDENT, generate
from onestep.training.methods.distribution_matching import CRITIC, DistributionMatching

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "small": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 768, "attention_head_dim": 8},
}


def network(layout: str, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**LAYOUTS[layout]).to(dtype).eval().requires_grad_(False)


def batch_of(layout: str, count: int, size: int, device: torch.device) -> Batch:
    width = LAYOUTS[layout]["cross_attention_dim"]
    sdxl = layout == "sdxl"
    pooled, ids = (
        (torch.randn(count, 1280), torch.tensor([[size, size, 0, 0, size, size]] * count)) if sdxl else (None, None)
    )
    cond = Cond(torch.randn(count, 77, width), pooled=pooled, size=ids).to(device)
    return Batch(cond, cond[:1], 0, 0, range(count), (4, size // 8, size // 8), device)


class Shared:
    """Teacher, student and critic on one base; AdamW over the adapters."""

    def __init__(self, layout: str, device: torch.device, dtype: torch.dtype, rank: int) -> None:
        unet = network(layout, device, dtype)
        self.roles = Roles(bind_diffusers(unet))
        self.denoise = EpsDenoiser(NETWORKS["unet"](unet), VPSchedule.scaled_linear(), self.roles)
        for role in (STUDENT, CRITIC):
            self.roles.add(role, rank, 0, device)
        self.roles.install()
        self.optimizers = {role: torch.optim.AdamW(self.roles.parameters(role), 1e-5) for role in (STUDENT, CRITIC)}
        self.contexts = [checkpoint_blocks(blocks_of(unet), self.roles)]


class Separate:
    """The same contract over three full networks: a role is a network."""

    def __init__(self, layout: str, device: torch.device, dtype: torch.dtype, rank: int) -> None:
        base = network(layout, device, dtype)
        self.networks = {TEACHER: base}
        for role in (STUDENT, CRITIC):
            self.networks[role] = copy.deepcopy(base).float().requires_grad_(True)
            self.networks[role].enable_gradient_checkpointing()
            self.networks[role].train()
        self.roles = _Switch()
        self.denoise = EpsDenoiser(self._forward, VPSchedule.scaled_linear(), self.roles)  # type: ignore[arg-type]
        self.optimizers = {
            role: torch.optim.AdamW(self.networks[role].parameters(), 1e-5) for role in (STUDENT, CRITIC)
        }
        self.contexts = [nullcontext()]
        self.dtype = dtype

    def _forward(self, x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
        answers = []
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for role, rows in self.roles.slices(len(x)):
                answers.append(NETWORKS["unet"](self.networks[role])(x[rows], time[rows], cond[rows]))
        return torch.cat(answers)


class _Switch:
    """What a denoiser asks of roles, where each role is a network of its own."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int | None]] = [(TEACHER, None)]

    @contextmanager
    def use(self, role: str, *, train: bool = True) -> Any:
        with self.rows([(role, None)]):
            yield

    @contextmanager
    def rows(self, blocks: Any, *, train: bool = True) -> Any:
        before, self.blocks = self.blocks, blocks
        try:
            yield
        finally:
            self.blocks = before

    def slices(self, batch: int) -> list[tuple[str, slice]]:
        found, at = [], 0
        for role, rows in self.blocks:
            rows = batch if rows is None else rows
            found.append((role, slice(at, at + rows)))
            at += rows
        return found

    def capture(self, batch: int, time: torch.Tensor, cond: Cond) -> Any:
        return _Nothing()


class _Nothing(nullcontext):  # type: ignore[type-arg]
    def guard(self, output: torch.Tensor) -> torch.Tensor:
        return output


def update(setup: Shared | Separate, batch: Batch) -> None:
    objective = DistributionMatching()
    recipe = Recipe.for_student(setup.denoise.schedule, 1, "unet", ((512, 512),))
    with torch.no_grad():
        x = generate(setup.denoise, recipe, batch)
    objective.critic_loss(setup.denoise, batch, x).backward()
    step(setup.optimizers[CRITIC])
    x = generate(setup.denoise, recipe, batch)
    cotangent, _ = objective.cotangent(setup.denoise, batch, x)
    x.backward(cotangent)
    step(setup.optimizers[STUDENT])


def step(optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(kind: type[Shared] | type[Separate], layout: str, size: int, count: int, args: Any) -> str:
    """ "seconds | GB", or why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        with ExitStack() as stack:
            setup = kind(layout, device, dtype, args.rank)
            for context in setup.contexts:
                stack.enter_context(context)
            batch = batch_of(layout, count, size, device)
            seconds = [timed(setup, batch) for _ in range(args.runs + 1)][1:]
    except torch.OutOfMemoryError:
        return "out of memory | -"
    peak = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if device.type == "cuda" else "not measured on a CPU"
    return f"{statistics.median(seconds):.3f} | {peak}"


def timed(setup: Shared | Separate, batch: Batch) -> float:
    began = time.perf_counter()
    update(setup, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", nargs="+", default=["sd15", "sdxl"], choices=list(LAYOUTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    lines = [f"{card}, torch {torch.__version__}, rank {args.rank}, median of {args.runs} updates", ""]
    lines += ["| network | pixels | batch | setup | seconds | peak GB |", "|---|---|---|---|---|---|"]
    for layout in args.layouts:
        for size in args.sizes:
            for count in args.batches:
                for kind, name in ((Shared, "one base, roles"), (Separate, "three networks")):
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    lines.append(
                        f"| {layout} | {size} | {count} | {name} | {measured(kind, layout, size, count, args)} |"
                    )
                    print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
