"""What negative steering and guidance adapters cost: a forward of each as a ratio to a plain one, in one process.

    python benchmarks/cost.py [--networks sd15 sd3 flux] [--rounds 9] [--out benchmarks/results/cost.md]
    $COMFYUI_PYTHON tests/support/comfy_launch.py $COMFYUI_DIR $PWD/benchmarks/cost.py --host comfyui
    python benchmarks/cost.py --count --networks sd15-whole sdxl sd3-whole flux-whole --rows NASA NAG VSF CFG
    python benchmarks/cost.py --device cuda --dtype bfloat16 --networks sdxl flux-slice [--compile]

Weights are random, of real width. Each round takes every row once, in an order drawn anew; VSF, PERP and rows of twice
the batch come in every fourth. A ratio is the median of row / plain within a round; its interval holds the median in 95
of 100 cases. On one CPU thread the clock is the process' own, which waits for no neighbour. --count measures no time:
it counts the operations in products and convolutions, attention's included, of networks without numbers.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.append(str(Path(__file__).resolve().parent))

PLAIN = "plain"
DOUBLED = ("CFG", "doubled form", "core NAGuidance")
"""Rows of twice the batch."""
SELDOM, SELDOM_IN = ("VSF", "PERP", *DOUBLED), 4
Measured = tuple[float, Tensor]
Row = Callable[[], Measured]
SCALES = {"NASA": 0.25, "NAG": 5.0, "VSF": 1.0, "PERP": 10.0}


@dataclass(frozen=True)
class Case:
    """A network with random weights. side: of its latents, 16 pixels each in FLUX.2, else 8. tokens: of each text.
    blocks: on each level of a U-Net going down, or a transformer's double and single ones, in Z-Image and Lumina 2
    behind how many of each refiner; none of SD3's last kind, whose text goes nowhere. wide: False = a toy."""

    family: str
    side: int
    tokens: int
    blocks: tuple[int, int] = (2, 0)
    wide: bool = True

    def __str__(self) -> str:
        blocks = f"{self.blocks[0]} + {self.blocks[1]} blocks" if self.blocks[1] else f"{self.blocks[0]} blocks"
        level = " a level" if self.family in ("sd15", "sdxl") else ""
        size = f"latents of {self.side}x{self.side}, texts of {self.tokens} tokens"
        return f"{'' if self.wide else 'toy '}{self.family}, {blocks}{level}, {size}"


CASES = {
    "sd15": Case("sd15", 64, 77, (1, 0)),
    "sd15-whole": Case("sd15", 64, 77),
    "sdxl": Case("sdxl", 128, 77),
    "sd3": Case("sd3", 64, 154),
    "sd3-long": Case("sd3", 64, 333),
    "sd3-large": Case("sd3", 128, 333, (1, 0)),
    "flux": Case("flux", 32, 32, (1, 1)),
    "flux-large": Case("flux", 128, 512, (1, 1)),
    "flux-slice": Case("flux", 128, 512, (4, 8)),
    "sd3-whole": Case("sd3", 128, 333, (23, 0)),
    "flux-whole": Case("flux", 128, 512, (19, 38)),
    "z_image": Case("z_image", 32, 32, (2, 1)),
    "z_image-whole": Case("z_image", 128, 128, (30, 2)),
    "klein": Case("flux2", 64, 512, (1, 1)),
    "klein-whole": Case("flux2", 64, 512, (5, 20)),
    "klein-512": Case("flux2", 32, 512, (5, 20)),
    "chroma": Case("chroma", 128, 128, (1, 1)),
    "chroma-small": Case("chroma", 32, 32, (1, 1)),
    "chroma-whole": Case("chroma", 128, 128, (19, 38)),
    "chroma-512": Case("chroma", 64, 128, (19, 38)),
    "krea2": Case("krea2", 32, 32, (1, 0)),
    "krea2-whole": Case("krea2", 128, 128, (28, 0)),
    "krea2-512": Case("krea2", 64, 128, (28, 0)),
    "z_image-512": Case("z_image", 64, 128, (30, 2)),
    "qwen": Case("qwen", 32, 32, (1, 0)),
    "qwen-whole": Case("qwen", 128, 128, (60, 0)),
    "qwen-512": Case("qwen", 64, 128, (60, 0)),
    "lumina2": Case("lumina2", 32, 32, (1, 1)),
    "lumina2-whole": Case("lumina2", 128, 128, (26, 2)),
    "lumina2-512": Case("lumina2", 64, 128, (26, 2)),
    "anima": Case("anima", 64, 512),
    "anima-whole": Case("anima", 128, 512, (28, 0)),
    "anima-512": Case("anima", 64, 512, (28, 0)),
    "wan": Case("wan", 64, 512),
    "wan-whole": Case("wan", 128, 512, (30, 0)),
    "wan-512": Case("wan", 64, 512, (30, 0)),
    "pixart": Case("pixart", 64, 300),
    "pixart-whole": Case("pixart", 128, 300, (28, 0)),
    "pixart-512": Case("pixart", 64, 300, (28, 0)),
    "toy-flux2": Case("flux2", 8, 512, (1, 1), wide=False),
    "toy-sd15": Case("sd15", 8, 7, wide=False),
    "toy-sdxl": Case("sdxl", 8, 7, wide=False),
    "toy-sd3": Case("sd3", 8, 7, wide=False),
    "toy-flux": Case("flux", 8, 7, (1, 1), wide=False),
    "toy-chroma": Case("chroma", 8, 7, (1, 1), wide=False),
    "toy-krea2": Case("krea2", 8, 7, (1, 0), wide=False),
    "toy-z_image": Case("z_image", 8, 7, (1, 1), wide=False),
    "toy-qwen": Case("qwen", 8, 7, wide=False),
    "toy-lumina2": Case("lumina2", 8, 7, (1, 1), wide=False),
    "toy-anima": Case("anima", 8, 7, wide=False),
    "toy-wan": Case("wan", 8, 7, wide=False),
    "toy-pixart": Case("pixart", 8, 7, wide=False),
}


@dataclass
class Times:
    """Of one row: seconds by round, and the most memory that a round has taken, in bytes; 0 = not measured."""

    seconds: dict[int, float] = field(default_factory=dict)
    peak: int = 0


@torch.no_grad()
def fill(network: Any) -> None:
    """Weights drawn so that every layer's numbers stay of the order of 1; buffers (SD3's positions) too."""
    for tensor in network.state_dict().values():
        tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.5)


def timed(call: Callable[[], Tensor], device: torch.device) -> Measured:
    """The seconds of a call, and its result."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, found
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    found = call()
    return clock() - began, found


def measured(rows: dict[str, Row], rounds: int, device: torch.device) -> dict[str, Times]:
    """Every row in ``rounds`` rounds, after one that is not counted and leaves out the seldom ones."""
    order, found = random.Random(0), {name: Times() for name in rows}
    for number in range(-1, rounds):
        due = [name for name in rows if number % SELDOM_IN == 0 or name not in SELDOM]
        for name in order.sample(due, len(due)):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, _ = rows[name]()
            if number >= 0:
                found[name].seconds[number] = seconds
            if device.type == "cuda":
                found[name].peak = max(found[name].peak, torch.cuda.max_memory_allocated())
        seconds = {name: round(found[name].seconds[number], 4) for name in found if number in found[name].seconds}
        print(f"round {number + 1} of {rounds}: {seconds}", file=sys.stderr, flush=True)
    return found


def ratios(row: Times, plain: Times) -> list[float]:
    return sorted(seconds / plain.seconds[number] for number, seconds in row.seconds.items())


def interval(values: list[float]) -> tuple[float, float]:
    """The k-th least and greatest of sorted values, k the largest whose interval misses a median in at most 5 of 100
    cases: 2 sum_{i < k} C(n, i) / 2^n <= 0.05. Of few values, the least and the greatest."""
    n = len(values)
    missed = [2 * sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(1, n // 2 + 1)]
    k = max(1, sum(share <= 0.05 for share in missed))
    return values[k - 1], values[n - k]


def table(found: dict[str, Times]) -> list[str]:
    lines = ["| row | ratio | 95% interval | rounds | seconds | peak GB |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        values = ratios(row, found[PLAIN])
        low, high = interval(values)
        peak = f"{row.peak / 1e9:.2f}" if row.peak else "-"
        seconds = statistics.median(row.seconds.values())
        ratio = f"{statistics.median(values):.3f} | {low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {ratio} | {len(values)} | {seconds:.4g} | {peak} |")
    return lines


def counted(row: Row) -> int:
    """Multiplications and additions in a row's call."""

    def of_attention(q: Any, k: Any, v: Any, *more: Any, **told: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    row()  # the first call tries kernels
    of_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention}
    with FlopCounterMode(display=False, custom_mapping=of_cpu) as counter:
        row()
    return int(counter.get_total_flops())


def counts(makers: dict[str, Callable[[], Row]]) -> list[str]:
    found = {name: counted(make()) for name, make in makers.items()}
    lines = ["| row | ratio | 10^12 operations |", "|---|---|---|"]
    return lines + [f"| {name} | {n / found[PLAIN]:.3f} | {n / 1e12:.3f} |" for name, n in found.items()]


def host_of(name: str) -> Any:
    """The module that has makers(case, device, dtype, backend), of rows by their names, and versions()."""
    if name == "comfyui":
        import cost_comfy

        return cost_comfy
    import cost_diffusers

    return cost_diffusers


def report(name: str, args: argparse.Namespace, host: Any) -> list[str]:
    """A network's heading and table."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with (
        torch.inference_mode(args.host == "comfyui"),
        torch.no_grad(),
        fake_tensor.FakeTensorMode() if args.count else nullcontext(),
    ):
        makers = host.makers(CASES[name], device, dtype, args.compile)
        chosen = {row: make for row, make in makers.items() if row == PLAIN or not args.rows or row in args.rows}
        if args.count:
            return [f"**{CASES[name]}** ({host.versions()}, torch {torch.__version__})", "", *counts(chosen), ""]
        found = measured({row: make() for row, make in chosen.items()}, args.rounds, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    how = f"{args.dtype}, {where}, {torch.get_num_threads()} threads, {args.compile or 'eager'}"
    return [f"**{CASES[name]}** ({how}, {host.versions()}, torch {torch.__version__})", "", *table(found), ""]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="diffusers", choices=["diffusers", "comfyui"])
    parser.add_argument("--networks", nargs="+", default=["sd15", "sd3", "flux"], choices=list(CASES))
    parser.add_argument("--rows", nargs="+", help="only these, beside plain")
    parser.add_argument("--count", action="store_true", help="count operations, in diffusers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", nargs="?", const="inductor", default="", help="a back end of torch.compile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.count:  # Lumina 2 reads its texts' lengths off their mask, which has to keep its numbers
        fake_tensor.CONSTANT_NUMEL_LIMIT = max(2 * case.tokens for case in CASES.values())
    host, found = host_of(args.host), []
    for name in args.networks:
        found.append("\n".join(report(name, args, host)))
        print(found[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(found), "utf-8")


if __name__ == "__main__":
    main()
