"""What sharing one base costs: role rows against separate forwards, and the share of a training step inside the
network.

    python benchmarks/speed.py [--layout sd15|tiny] [--batch 8] [--size 64] [--out benchmarks/results/speed.md]

Ratios are of paired runs in one process (A B A B ...), their median given with the least and the greatest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.recipe import Recipe
from onestep.core.roles import TEACHER, Roles
from onestep.training.engine.batch import Batch
from onestep.training.engine.student import STUDENT, generate
from onestep.training.methods.distribution_matching import CRITIC, DistributionMatching

# (tokens, width) of the text, and the pixels a latent stands for, of each layout.
TEXT = {"sd15": (77, 768), "sd15-quarter": (77, 768), "tiny": (24, 128)}
FACTOR = {"sd15": 8, "sd15-quarter": 8, "tiny": 4}


def networks(layout: str) -> Any:
    """A random-weight network in the layout of a real family, behind the contract, with student and critic away from
    0."""
    if layout == "tiny":
        from onestep.pipelines.adapt import adapt
        from onestep.pipelines.load import load

        return adapt(load("tiny")).denoiser
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from onestep.core.denoiser import EpsDenoiser
    from onestep.core.families import bind_diffusers
    from onestep.pipelines.networks import NETWORKS
    from onestep.pipelines.schedules import schedule_of

    widths = {"sd15": (320, 640, 1280, 1280), "sd15-quarter": (96, 192, 288, 288)}[layout]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8)
    unet.requires_grad_(False).eval()
    roles = Roles(bind_diffusers(unet))
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return EpsDenoiser(NETWORKS["unet"](unet), schedule_of(scheduler), roles)


def with_adapters(roles: Roles, rank: int) -> None:
    for seed, role in enumerate((STUDENT, CRITIC)):
        roles.add(role, rank, 0)
        for _, b in roles.state(role).values():
            b.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
    roles.install()


def paired(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> list[float]:
    """seconds(first) / seconds(second) of each of ``runs`` pairs, after one unmeasured pair."""
    ratios = []
    for run in range(runs + 1):
        seconds = [timed(first), timed(second)] if run % 2 else [timed(second), timed(first)][::-1]
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]


def timed(call: Callable[[], Any]) -> float:
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def rows_against_separate(
    denoise: Any, text: tuple[int, int], batch: int, shape: tuple[int, ...], runs: int
) -> tuple[list[float], float]:
    """Ratios of one forward of teacher and critic rows to two forwards, and their largest relative difference."""
    x, sigma = torch.randn(batch, *shape), torch.full((batch,), 0.5, dtype=torch.float64)
    cond = Cond(torch.randn(batch, *text))
    half = batch // 2

    def together() -> Tensor:
        with denoise.roles.rows([(TEACHER, half), (CRITIC, batch - half)]):
            return denoise(x, sigma, cond)

    def apart() -> Tensor:
        with denoise.roles.use(TEACHER):
            first = denoise(x[:half], sigma[:half], cond[:half])
        with denoise.roles.use(CRITIC):
            return torch.cat([first, denoise(x[half:], sigma[half:], cond[half:])])

    difference = (together() - apart()).abs().max() / apart().std()
    return paired(together, apart, runs), float(difference)


class Clock:
    """Seconds inside forward and backward passes of a denoiser's network."""

    def __init__(self, denoise: Any) -> None:
        self.seconds, self._network = 0.0, denoise.network
        denoise.network = self.forward

    def forward(self, *args: Any) -> Tensor:
        return self.measure(lambda: self._network(*args))

    def measure(self, call: Callable[[], Any]) -> Any:
        synchronise()
        began = time.perf_counter()
        answer = call()
        synchronise()
        self.seconds += time.perf_counter() - began
        return answer


def share_in_network(denoise: Any, text: tuple[int, int], batch: int, shape: tuple[int, ...], runs: int) -> list[float]:
    """Share of a dmd update (one critic update, one of the student) that is spent in passes of the network."""
    cond, null = Cond(torch.randn(batch, *text)), Cond(torch.randn(1, *text))
    host_batch = Batch(cond, null, 0, 0, range(batch), shape, torch.device("cpu"))
    optimizers = {role: torch.optim.AdamW(denoise.roles.parameters(role), 1e-4) for role in (STUDENT, CRITIC)}
    clock, shares = Clock(denoise), []
    for _ in range(runs + 1):
        clock.seconds = 0.0
        seconds = timed(lambda: update(denoise, host_batch, optimizers, clock))
        shares.append(clock.seconds / seconds)
    return shares[1:]


def update(denoise: Any, batch: Batch, optimizers: Any, clock: Clock) -> None:
    """One update of the critic, then one of the student, as the trainer does them."""
    objective, recipe = DistributionMatching(), Recipe.for_student(denoise.schedule, 1, "unet", ((512, 512),))
    with torch.no_grad():
        x = generate(denoise, recipe, batch)
    loss = objective.critic_loss(denoise, batch, x)
    clock.measure(loss.backward)
    apply(denoise.roles, CRITIC, optimizers[CRITIC])
    x = generate(denoise, recipe, batch)
    cotangent, _ = objective.cotangent(denoise, batch, x)
    clock.measure(lambda: x.backward(cotangent))
    apply(denoise.roles, STUDENT, optimizers[STUDENT])


def apply(roles: Roles, role: str, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(roles.parameters(role), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", default="sd15", choices=list(TEXT))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="picture size in pixels")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    denoise = networks(args.layout)
    with_adapters(denoise.roles, args.rank)
    text, factor = TEXT[args.layout], FACTOR[args.layout]
    shape = (4, args.size // factor, args.size // factor)
    ratios, difference = rows_against_separate(denoise, text, args.batch, shape, args.runs)
    shares = share_in_network(denoise, text, max(1, args.batch // 2), shape, max(2, args.runs // 2))
    lines = [
        f"{args.layout} U-Net, {args.size} px, rank {args.rank}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "",
        "| measure | median | least | greatest |",
        "|---|---|---|---|",
        _row(f"role rows / separate forwards, batch {args.batch}", ratios),
        _row(f"share of a dmd update in network passes, batch {max(1, args.batch // 2)}", shares),
        f"| largest difference of the two, in standard deviations | {difference:.1e} | | |",
    ]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


def _row(name: str, values: list[float]) -> str:
    return f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | {max(values):.3f} |"


if __name__ == "__main__":
    main()
