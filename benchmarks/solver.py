"""How near the teacher's few steps are to its ODE: first order and second, against 100 steps, on the bundled models.

    python benchmarks/solver.py [--models tiny tiny-flow] [--prompts 8] [--guidance 4] [--out
    benchmarks/results/solver.md]

The error is the rms over all latents of what is drawn from one noise, over the standard deviation of the 100 steps'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from onestep.core.randomness import normal
from onestep.core.sampling import fewer, teacher_sample
from onestep.pipelines.adapt import adapt
from onestep.pipelines.load import load

PROMPTS = Path(__file__).resolve().parents[1] / "pipelines" / "tiny" / "prompts.txt"
MANY = 100


@torch.no_grad()
def errors(model: str, count: int, guidance: float, steps: list[int]) -> list[str]:
    """Rows of the table."""
    host = adapt(load(model))
    size = host.native_size
    cond = host.encode(PROMPTS.read_text("utf-8").splitlines()[:count], size)
    null = cond.null_like(host.encode([""], size))
    noise = normal(host.latent_shape(size), 0, "solver", 0, range(count))

    def drawn(number: int, second_order: bool) -> torch.Tensor:
        return teacher_sample(host.denoiser, cond, null, noise, number, guidance, second_order=second_order)

    reference, lines = drawn(MANY, False), []
    for number in steps:
        for second_order in (False, True):
            taken = fewer(number) if second_order else number
            error = (drawn(number, second_order) - reference).square().mean().sqrt() / reference.std()
            order = "second" if second_order else "first"
            lines.append(f"| {model} | {number} | {order} | {taken} | {float(error):.4f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["tiny", "tiny-flow"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", nargs="+", type=int, default=[20])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [
        f"{args.prompts} prompts, guidance {args.guidance:g}, against {MANY} steps of first order",
        "",
        "| model | teacher_steps | order | steps taken | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for model in args.models:
        lines += errors(model, args.prompts, args.guidance, args.steps)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
