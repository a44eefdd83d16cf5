"""What streaming a base costs: the host's time of its hooks on a CPU; on a card how much of the copies is hidden.

    python benchmarks/streaming.py [--rounds 15] [--layout sdxl] [--size 1024] [--batch 1] [--out
    benchmarks/results/streaming.md]

On a CPU: SDXL's blocks, thin, as in overhead.py, so that copies are next to nothing and what is measured is hooks,
waits and the exchange of weights. On a card: SDXL's (or SD1.5's) real shapes in bfloat16; resident and streamed
forwards and trained passes, the copies alone, and the share of them that did not make the pass longer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from overhead import THIN
from step import LAYOUTS

from onestep.core.checkpoint import checkpoint_blocks
from onestep.core.families import bind_diffusers, blocks_of
from onestep.core.roles import Roles
from onestep.core.streaming import footprint, streamed

GIB = 2**30
PASSES = ("forward", "forward and backward")


class Work:
    """A U-Net with a student on it, and its passes. told: the U-Net's configuration."""

    def __init__(self, told: dict[str, Any], device: torch.device, dtype: torch.dtype, side: int, batch: int) -> None:
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.network = UNet2DConditionModel(**told).to(dtype).eval().requires_grad_(False)
        self.device, self.blocks = device, blocks_of(self.network)
        self.roles = Roles(bind_diffusers(self.network))
        self.roles.add("student", 4, 0, device)
        self.x = torch.randn(batch, 4, side, side, dtype=dtype, device=device)
        self.text = torch.randn(batch, 77, told["cross_attention_dim"], dtype=dtype, device=device)
        self.added: dict[str, Any] | None = None
        if "projection_class_embeddings_input_dim" in told:
            pooled = told["projection_class_embeddings_input_dim"] - 6 * told["addition_time_embed_dim"]
            embeds = torch.randn(batch, pooled, dtype=dtype, device=device)
            self.added = {"text_embeds": embeds, "time_ids": torch.zeros(batch, 6, device=device)}

    @contextmanager
    def placed(self, stream: bool) -> Iterator[Any]:
        """Within, it computes on its device; afterwards it lies on the host."""
        if not stream:
            self.network.to(self.device)
        inner = streamed(self.network, self.blocks, self.device) if stream else None
        ring = inner.__enter__() if inner else None
        try:
            with self.roles.installed(), checkpoint_blocks(self.blocks, self.roles):
                yield ring
        finally:
            if inner:
                inner.__exit__(None, None, None)
            self.network.to("cpu")

    def run(self, kind: str) -> None:
        grad = kind != "forward"
        with torch.set_grad_enabled(grad), self.roles.use("student"):
            captured = self.roles.capture(len(self.x))
        with torch.set_grad_enabled(grad), captured:
            x = self.x.detach().requires_grad_(grad)
            out = self.network(x, torch.tensor(500), encoder_hidden_states=self.text, added_cond_kwargs=self.added)[0]
        if grad:
            torch.autograd.grad(out.float().sum(), self.roles.parameters("student"), allow_unused=True)


def seconds(work: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The median, after two that are not counted: by the thread's own clock on a CPU, by the wall's on a card."""
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    found = []
    for _ in range(rounds + 2):
        began = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - began)
    return statistics.median(found[2:])


def on_cpu(rounds: int) -> list[str]:
    """Rows of what the hooks cost."""
    device = torch.device("cpu")
    work = Work(THIN, device, torch.float32, 8, 3)
    found: dict[bool, list[float]] = {}
    for stream in (False, True):
        with work.placed(stream):
            found[stream] = [seconds(lambda kind=kind: work.run(kind), rounds, device) for kind in PASSES]  # type: ignore[misc]
    rows = [f"{len(work.blocks)} blocks, thin, on a CPU in one thread; not measured on a GPU.", ""]
    rows += ["| pass | resident, CPU ms | streamed, CPU ms | ratio |", "| --- | --- | --- | --- |"]
    for kind, plain, ring in zip(PASSES, found[False], found[True], strict=True):
        rows.append(f"| {kind} | {1000 * plain:.0f} | {1000 * ring:.0f} | {ring / plain:.2f} |")
    return rows


def on_card(layout: str, size: int, batch: int, rounds: int) -> list[str]:
    """Rows of what a card hides of the copies."""
    device = torch.device("cuda")
    work = Work(LAYOUTS[layout], device, torch.bfloat16, size // 8, batch)
    told = footprint(work.network, work.blocks)
    found: dict[bool, list[float]] = {}
    peaks: dict[bool, int] = {}
    for stream in (False, True):
        with work.placed(stream) as ring:
            torch.cuda.reset_peak_memory_stats()
            found[stream] = [seconds(lambda kind=kind: work.run(kind), rounds, device) for kind in PASSES]  # type: ignore[misc]
            peaks[stream] = torch.cuda.max_memory_allocated()
            copies = seconds(lambda ring=ring: copy_all(ring), rounds, device) if ring else 0.0  # type: ignore[misc]
    rows = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {layout} at {size} px, batch {batch}, bfloat16.",
        f"Weights: {told.resident / GIB:.2f} GiB stay, ring {told.ring / GIB:.2f}, streamed {told.streamed / GIB:.2f}; "
        f"the copies of all blocks alone take {copies:.3f} s ({told.streamed / copies / 1e9:.1f} GB/s). Peak "
        f"{peaks[False] / GIB:.2f} GiB resident, {peaks[True] / GIB:.2f} streamed.",
        "",
        "| pass | resident, s | streamed, s | ratio | copies hidden |",
        "| --- | --- | --- | --- | --- |",
    ]
    for passes, (kind, plain, ring) in enumerate(zip(PASSES, found[False], found[True], strict=True), 1):
        hidden = 1 - (ring - plain) / (passes * copies)
        rows.append(f"| {kind} | {plain:.3f} | {ring:.3f} | {ring / plain:.2f} | {100 * hidden:.0f} % |")
    return rows


def copy_all(ring: Any) -> None:
    """Every block's weights into the ring, nothing else at work. The ring is of no use afterwards."""
    for number, packed in enumerate(ring._packed.values()):
        ring._link.wait(ring._link.copy(ring._ring[number % 2][: len(packed.memory)], packed.memory))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layout", choices=list(LAYOUTS), default="sdxl")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    card = torch.cuda.is_available()
    rows = on_card(args.layout, args.size, args.batch, args.rounds) if card else on_cpu(args.rounds)
    print("\n".join(rows))
    if args.out:
        args.out.write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
