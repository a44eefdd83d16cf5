"""The training of a teacher, of whichever family: the module `unet`, `flow` or `dit`, which says what is built and
learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .data import Prompts
from .loop import Plan, Training

Loss = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""(x0, noise [B, 4, 8, 8], tiles [B], generator) -> the mean loss of a batch, whose noise levels it draws itself."""


class Family(Protocol):
    """build: fresh networks. loss: what they learn, of the prompts that go with the tiles."""

    def build(self, shape: Any, tokenizer: Any) -> nn.ModuleDict: ...
    def loss(self, modules: nn.ModuleDict, prompts: Prompts, shape: Any) -> Loss: ...


def train(
    family: Family,
    latents: Tensor,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    shape: Any,
    plan: Plan,
    folder: Path,
    snapshot: Callable[[nn.ModuleDict], None] | None = None,
    batch: int = 96,
) -> nn.ModuleDict:
    """latents: [N, 4, 8, 8] of unit std. snapshot(modules) is called now and then with the averaged weights."""
    torch.manual_seed(plan.seed)
    modules = family.build(shape, tokenizer)
    loss = family.loss(modules, prompts, shape)

    def of_batch(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        return loss(latents[rows], noise, rows, generator)

    Training(modules, plan, folder).run(of_batch, snapshot and (lambda: snapshot(modules)))
    return modules.eval()
