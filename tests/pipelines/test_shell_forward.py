"""A shell's forward, on the meta device, is as much work as the real network's with a text of as many tokens."""

from __future__ import annotations

import layout_pipelines as layouts
import pytest
import torch
from flops import flops_of
from narrowed import narrowed

from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.shells import of_host
from onestep.training.plan.attention import as_on
from onestep.training.plan.meter import Meter
from onestep.training.plan.trace import Count

BATCH, TOKENS, SIDE = 2, 12, 32


def forward(host: DiffusersHost, tokens: DiffusersHost) -> None:
    """tokens: whose texts they are."""
    size = (SIDE, SIDE)
    cond = tokens.encode(["a", "b"], size).to(host.device)
    x = torch.zeros(BATCH, *host.latent_shape(size), device=host.device)
    sigma = torch.full((BATCH,), 0.5, device=host.device)
    with torch.no_grad():
        host.denoiser(x, sigma, cond)


@pytest.mark.parametrize("name", narrowed(layouts.MAKERS, "lumina2"))
def test_a_shells_forward_is_the_networks_work(name: str) -> None:
    host = adapt(layouts.make(name))
    shell, meter = of_host(host, "all"), Meter()
    shell.tokens = TOKENS
    with as_on("cpu"), meter, meter.part("forward"):
        forward(shell, shell)
    counted = Count.of(meter.trace, BATCH, 1).flops("forward", BATCH, 1)
    assert counted == flops_of(lambda: forward(host, shell)) > 10**5
