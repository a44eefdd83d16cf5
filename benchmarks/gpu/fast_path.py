"""One-step pictures by `pipelines.fast`: with a CUDA graph and without, beside the bare network and decoder, and beside
what the card's data sheet allows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from part import Case, Run, Table, milliseconds, table_of
from random_host import RandomHost, host_of
from torch.utils.flop_counter import FlopCounterMode

from onestep.core.recipe import Recipe
from onestep.pipelines.autoencoder import decoded
from onestep.pipelines.fast import Fast
from onestep.training.plan.cards import OF_FLOPS, found_card

COLUMNS = ("picture", "ms", "pictures a second", "of the bare calls", "TFLOP", "least ms by the data sheet", "drawn by")
BARE = "bare network and decoder"
PROMPT = "a lighthouse in a storm"


def measure(run: Run) -> Table:
    sizes = [("tiny", 32)] if run.tiny else [("sd15", 512), ("sdxl", 1024)]
    modes = ("eager",) if run.device.type == "cpu" else ("eager", "graph")
    cases = []
    for name, size in sizes:
        drawing = Drawing(run, name, size)
        cases.append(Case(f"{name} {size}: {BARE}", drawing.bare, 8))
        cases += [Case(f"{name} {size}: fast, {mode}", partial(drawing.fast, mode), 8) for mode in modes]
    return table_of(run, COLUMNS, cases, "One picture at a time, its text encoded before.")


class Drawing:
    """Of one layout at one size, whose host is made for its first row."""

    def __init__(self, run: Run, name: str, size: int) -> None:
        self.run, self.name, self.size = run, name, size
        self.recipe = Recipe((999.0,))
        self.least = 0.0

    @torch.inference_mode()
    def bare(self) -> Sequence[Any]:
        host = self.host = host_of(self.name, self.run.device)
        cond = host.encode([PROMPT], (self.size, self.size)).to(host.device)
        x = torch.randn(1, *host.latent_shape((self.size, self.size)), device=host.device)
        time = torch.full((1,), 999.0, device=x.device)

        def call() -> Any:
            return decoded(host.pipe.vae, host.denoiser.network(x, time, cond))  # type: ignore[attr-defined]

        with FlopCounterMode(display=False) as counted:
            call()
        self.flops, self.least = counted.get_total_flops(), milliseconds(self.run, call)
        return self._row(self.least, BARE)

    def fast(self, mode: Any) -> Sequence[Any]:
        with Fast(pipe_of(self.host, self.size), self.recipe, mode) as draw:
            ms = milliseconds(self.run, lambda: draw(PROMPT, seed=0, width=self.size, height=self.size))
            return self._row(ms, draw.mode)

    def _row(self, ms: float, by: str) -> Sequence[Any]:
        card = found_card(self.run.device)
        floor = 1000 * self.flops / (OF_FLOPS * card.half * 1e12) if card else float("nan")
        return ms, 1000 / ms, ms / self.least, self.flops / 1e12, floor, by


def pipe_of(host: RandomHost, size: int) -> Any:
    """What `Fast` asks of a OneStepPipeline, whose own class needs transformers."""
    return SimpleNamespace(
        unet=host.network,
        vae=host.pipe.vae,
        scheduler=host.pipe.scheduler,
        config=SimpleNamespace(embedded_guidance=None),
        host=lambda recipe: host,
        _guidance=None,
        _size=lambda host, recipe, width, height: (width, height),
    )
