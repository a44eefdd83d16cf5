"""CPU time of the roles around a network: a forward of SDXL's 794 layers, thin, under its adapters over the bare one.

    python benchmarks/overhead.py [--dtype float32 bfloat16] [--rounds 15] [--out benchmarks/results/overhead.md]

The layers are as many as SDXL's and a few channels wide, so that what is measured is what each layer costs a host that
feeds a fast card: hooks, choice of a role, launches. Each round times every kind of forward once, in one thread and by
the thread's own clock, which other programs do not disturb; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onestep.core.families import bind_diffusers
from onestep.core.roles import Roles

THIN: dict[str, Any] = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "norm_num_groups": 8,
}
ROWS = 3


def forwards(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each kind of forward by its name, the bare ones first."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    bare = UNet2DConditionModel(**THIN).eval().requires_grad_(False).to(dtype=dtype)
    adapted = copy.deepcopy(bare)
    roles = Roles(bind_diffusers(adapted))
    for role in ("student", "critic"):
        roles.add(role, 4, 0)
    roles.install()
    x, time_ids = torch.randn(ROWS, 4, 8, 8, dtype=dtype), torch.zeros(ROWS, 6)
    text, added = torch.randn(ROWS, 7, 32, dtype=dtype), torch.randn(ROWS, 16, dtype=dtype)

    def forward(network: Any, context: Callable[[], AbstractContextManager[Any]], grad: bool) -> Any:
        with torch.set_grad_enabled(grad), context():
            more = {"text_embeds": added, "time_ids": time_ids}
            with roles.capture(ROWS):
                start = x.detach().requires_grad_(grad)
                return network(start, torch.tensor(500), encoder_hidden_states=text, added_cond_kwargs=more)[0]

    blocks = [("teacher", 2), ("critic", 1)]
    return {
        "bare, no gradient": partial(forward, bare, nullcontext, False),
        "student, no gradient": partial(forward, adapted, partial(roles.use, "student"), False),
        "teacher's and critic's rows, no gradient": partial(forward, adapted, partial(roles.rows, blocks), False),
        "bare, with a graph": partial(forward, bare, nullcontext, True),
        "student, with a graph": partial(forward, adapted, partial(roles.use, "student"), True),
    }


def measured(dtype: torch.dtype, rounds: int) -> list[str]:
    """Rows of the table."""
    kinds = forwards(dtype)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for round_ in range(rounds + 1):
        for name, forward in kinds.items():
            began = time.thread_time()
            forward()
            if round_:
                seconds[name].append(time.thread_time() - began)
    lines, bare = [], 1.0
    for name, found in seconds.items():
        middle = statistics.median(found)
        bare = middle if name.startswith("bare") else bare
        kind = str(dtype).removeprefix("torch.")
        lines.append(f"| {kind} | {name} | {1000 * middle:.0f} | {middle / bare:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["| dtype | forward | CPU ms | over the bare one |", "| --- | --- | --- | --- |"]
    for name in args.dtype:
        lines += measured(getattr(torch, name), args.rounds)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
