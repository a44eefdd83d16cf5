"""CPU time of a transformer block with its adapters, eager and compiled, over the bare block, and of compiling it.

    python benchmarks/compiled_block.py [--rounds 150] [--out benchmarks/results/compiled-block.md]

A thin block of a U-Net (64 channels, 3 rows of 16 and 8 tokens, rank 4, float32), forward alone, one thread's own
clock, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep.core.compiled import compiled_blocks
from onestep.core.gates import gated_layers
from onestep.core.roles import TEACHER, Roles
from onestep.core.targets import Target, is_adaptable

WIDTH, ROWS = 64, 3
CASES: dict[str, tuple[list[tuple[str, int]], bool]] = {
    "bare, no gradient": ([(TEACHER, ROWS)], False),
    "student, no gradient": ([("student", ROWS)], False),
    "teacher's and critic's rows, no gradient": ([(TEACHER, 1), ("critic", 2)], False),
    "student, with a graph": ([("student", ROWS)], True),
}


class Network(nn.Module):
    def __init__(self) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        torch.manual_seed(0)
        self.block = BasicTransformerBlock(WIDTH, 1, WIDTH, cross_attention_dim=WIDTH)
        self.inputs = torch.randn(ROWS, 16, WIDTH), None, torch.randn(ROWS, 8, WIDTH)

    def forward(self) -> Tensor:
        found: Tensor = self.block(*self.inputs)
        return found


def made() -> tuple[Network, Roles]:
    network = Network().eval().requires_grad_(False)
    roles = Roles([Target(name, module) for name, module in network.named_modules() if is_adaptable(module)])
    for number, role in enumerate(("student", "critic")):
        roles.add(role, 4, number)
    roles.install()
    return network, roles


def milliseconds(network: Network, roles: Roles, name: str, rounds: int) -> float:
    served, grad = CASES[name]
    found = []
    with torch.set_grad_enabled(grad):
        for _ in range(rounds):
            began = time.thread_time()
            with roles.rows(served), roles.capture(ROWS):
                network()
            found.append(1000 * (time.thread_time() - began))
    return statistics.median(found[rounds // 6 :])


def seconds(network: Network, roles: Roles, name: str) -> float:
    """Of the call that compiles."""
    began = time.perf_counter()
    milliseconds(network, roles, name, 1)
    return time.perf_counter() - began


def rows(rounds: int) -> list[str]:
    network, roles = made()
    with gated_layers(network):
        eager = {name: milliseconds(network, roles, name, rounds) for name in CASES}
        with compiled_blocks([network.block], roles):
            took = {name: seconds(network, roles, name) for name in CASES}
            compiled = {name: milliseconds(network, roles, name, rounds) for name in CASES}
    bare = next(iter(eager.values()))
    return [
        f"| {name} | {eager[name]:.2f} | {eager[name] / bare:.2f} | {compiled[name] / bare:.2f} | {took[name]:.0f} s |"
        for name in CASES
    ]


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "| forward | eager, CPU ms | over the bare one | compiled | compiling it |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines = [f"CPU, torch {torch.__version__}, median of {args.rounds} rounds", "", *head, *rows(args.rounds)]
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
