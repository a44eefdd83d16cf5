"""How much of D_F - D_c, the matching term's difference, survives in bfloat16 and in float16.

    python benchmarks/half_precision.py [--models tiny tiny-flow sd15 sdxl sd35-medium] [--out FILE]

The critic's D_F and the teacher's D_c are nearly equal, so a small error of each is a large one of their difference.
Each row is a network with a critic's adapter of rank 64 on all layers, scaled so that the gap |D_F - D_c| / |D_c| is
the one that the row names; the same numbers in float32 are the truth. Whole and thinned layouts have their true widths
and random weights (fan-in scaled, Student's t of 5, as long-tailed as trained ones); the bundled models are trained.

A graphics card multiplies half numbers, sums in float32, and rounds what a kernel writes. On a CPU that is done here:
products, convolutions and attention widen their inputs, compute in float32 and round once; all else is torch's own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from onestep.core.cond import Cond
from onestep.core.families import bind_diffusers
from onestep.core.roles import Roles
from onestep.pipelines.adapt import adapt, denoiser_of
from onestep.pipelines.load import load
from onestep.pipelines.shells import CONFIGS

HALVES = (torch.float16, torch.bfloat16)
HEAVY = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")
}
THIN: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {"transformer_layers_per_block": [1, 2, 2], "layers_per_block": 1},
    "sd35-medium": {"num_layers": 8, "dual_attention_layers": [0, 1, 2, 3]},
}
SIDE = {"sd15": 16, "sdxl": 16, "sd35-medium": 16, "tiny": 8, "tiny-flow": 8}
GAPS = (0.02, 0.1)
TIMES = (900.0, 500.0, 150.0)


class AsOnACard(TorchDispatchMode):
    """Heavy operations on half numbers: float32 inside, one rounding at the end. largest: of what they wrote."""

    largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        half = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in HALVES), None)
        if half is None or func.overloadpacket not in HEAVY:
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, Tensor) and a.dtype in HALVES else a for a in args]
        made = func(*wide, **(kwargs or {}))
        first = made[0] if isinstance(made, tuple) else made
        self.largest = max(self.largest, float(first.abs().max()))
        rounded = first.to(half)
        return (rounded, *made[1:]) if isinstance(made, tuple) else rounded


def like_trained(network: torch.nn.Module, seed: int = 0) -> None:
    """Random weights with the scales and tails of trained ones."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.1 + (name.endswith("weight") or 0.0)
            continue
        normal = torch.randn(weight.shape, generator=draw)
        chi = sum(torch.randn(weight.shape[0], generator=draw) ** 2 for _ in range(5)) / 3
        tail = (1 / torch.as_tensor(chi).clamp_min(0.05).sqrt()).reshape(-1, *[1] * (weight.ndim - 1))
        weight.data = normal * tail * weight[0].numel() ** -0.5


def network_of(model: str) -> tuple[Any, Any]:
    """(denoiser with roles, network) of a bundled model or of a layout, float32."""
    if model.startswith("tiny"):
        host: Any = adapt(load(model))
        return host.denoiser, host.network
    part = "transformer" if (CONFIGS / model / "transformer").is_dir() else "unet"
    config = json.loads((CONFIGS / model / part / "config.json").read_text()) | THIN[model]
    network = getattr(diffusers, config["_class_name"]).from_config(config).eval().requires_grad_(False)
    like_trained(network)
    told = json.loads((CONFIGS / model / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, told["_class_name"]).from_config(told)
    pipe = SimpleNamespace(**{part: network}, scheduler=scheduler, text_encoder_2=None)
    roles = Roles(bind_diffusers(network))
    roles.install()
    return denoiser_of(pipe, roles), network


def told_of(model: str, network: Any, rows: int) -> Cond:
    """Text embeddings of unit variance, of the widths that the network reads."""
    draw, config = torch.Generator().manual_seed(5), network.config
    width = config.get("joint_attention_dim") or config["cross_attention_dim"]
    text = torch.randn(rows, 77, width, generator=draw)
    sizes = 6 * (config.get("addition_time_embed_dim") or 0)
    pooled = (
        config.get("pooled_projection_dim") or (config.get("projection_class_embeddings_input_dim") or sizes) - sizes
    )
    cond = Cond(text, pooled=torch.randn(rows, pooled, generator=draw)) if pooled else Cond(text)
    return cond.with_(size=torch.full((rows, 6), 1024.0)) if sizes else cond


@contextmanager
def in_dtype(network: Any, dtype: torch.dtype) -> Iterator[AsOnACard]:
    """Within, ``network`` computes in ``dtype``; afterwards it is what it was."""
    before = {name: value.data for name, value in network.named_parameters()}
    with AsOnACard() as card:
        torch.nn.Module.to(network, dtype)  # diffusers' own warns
        yield card
    for name, value in network.named_parameters():
        value.data = before[name]


@torch.no_grad()
def difference(denoiser: Any, x: Tensor, sigma: Tensor, cond: Cond, teacher: Tensor | None = None) -> Tensor:
    """D_F - D_c, of two calls. teacher: D_c, where it is known."""
    with denoiser.roles.use("critic", train=False):
        critic = denoiser(x, sigma, cond)
    return critic - (denoiser(x, sigma, cond) if teacher is None else teacher)


def rows_of(model: str, stored: torch.dtype) -> Iterator[list[str]]:
    """Rows of the table, with the base's weights as ``stored``."""
    torch.manual_seed(0)
    denoiser, network = network_of(model)
    for value in network.parameters():
        value.data = value.data.to(stored).float()
    roles, side = denoiser.roles, SIDE[model]
    roles.add("critic", min(64, 16 if model.startswith("tiny") else 64), 0)
    unit = {name: torch.randn(b.shape) for name, (_, b) in roles.state("critic").items()}
    channels = int(network.config.in_channels)
    x, cond = torch.randn(len(TIMES), channels, side, side), told_of(model, network, len(TIMES))
    sigma = denoiser.schedule.sigma_of_time(torch.tensor(TIMES, dtype=torch.float64))
    with torch.no_grad():
        teacher = denoiser(x, sigma, cond)
    size = 1e-3
    for gap in GAPS:
        for _ in range(3):  # the gap is nearly proportional to B
            for name, (_, b) in roles.state("critic").items():
                b.copy_(size * unit[name])
            true = difference(denoiser, x, sigma, cond, teacher)
            found = float((true.flatten(1).norm(dim=1) / teacher.flatten(1).norm(dim=1)).mean())
            size *= gap / found
        for dtype in HALVES:
            with in_dtype(network, dtype) as card:
                half = difference(denoiser, x, sigma, cond)
            cos = torch.cosine_similarity(half.flatten(1), true.flatten(1), dim=1)
            error = (half - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
            yield [
                *(model, _short(stored), f"{found:.3f}", _short(dtype)),
                *(f"{value:.4f}" for value in cos.tolist()),
                f"{float(error.mean()):.3f}",
                f"{card.largest:.0f}",
            ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-flow", *THIN])
    parser.add_argument("--stored", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    times = [f"cosine at {time:.0f}" for time in TIMES]
    head = ["model", "weights", "gap", "computed in", *times, "error", "largest number"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    print(*lines, sep="\n", flush=True)
    for model in told.models:
        for stored in told.stored:
            start = time.monotonic()
            for row in rows_of(model, getattr(torch, stored)):
                lines.append("| " + " | ".join(row) + " |")
                print(lines[-1], f"{time.monotonic() - start:.0f} s", flush=True)
                if told.out:
                    told.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
