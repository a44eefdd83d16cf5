"""A base that bitsandbytes stores in 4 or 8 bits is trained as it is; its input's gradient is of the stored weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from tiny_pipelines import make
from torch import nn

import onestep
from onestep.core.roles import Roles
from onestep.core.targets import Target

pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the dev extra, is not installed")
from quantised_layers import stored  # noqa: E402

FEW: dict[str, Any] = {"method": "regression", "steps": 2, "batch": 2, "pairs": 2, "teacher_steps": 2, "rank": 2}
FEW |= {"sizes": "64x64", "watch_every": 0, "preview_every": 0, "checkpointing": True}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_gradient_to_the_input_is_the_stored_weights(kind: str) -> None:
    """Through the layer and a role's product on it: as many rows of the identity show the weight that it has."""
    torch.manual_seed(0)
    layer = stored(nn.Linear(64, 32), kind)
    roles = Roles([Target("proj", layer)])
    roles.add("student", 2, 0)
    a, b = roles.state("student")["proj"]
    b.normal_()
    with roles.installed(), roles.use("student"), roles.capture(64):
        x = torch.eye(64, requires_grad=True)
        y = layer(x)
        bias = 0 if layer.bias is None else layer.bias
        weight = (y.detach() - bias).t()
        dy = torch.randn(64, 32)
        y.backward(dy)
    assert x.grad is not None
    # int8 also rounds the input of a product
    least = 2e-2 if kind == "int8" else 1e-4
    torch.testing.assert_close(x.grad, dy @ weight, rtol=least, atol=least * float((dy @ weight).abs().max()))
    assert all(p.grad is not None for p in roles.parameters("student"))


@pytest.mark.parametrize("kind", narrowed(["nf4", "int8"], "nf4"))
def test_a_run_on_it_leaves_a_lora(kind: str, tmp_path: Path) -> None:
    pipe = make("sd")
    for block in pipe.unet.modules():
        for name, child in list(block.named_children()):
            if type(child) is nn.Linear and child.in_features % 16 == 0 and "attn" in type(block).__name__.lower():
                setattr(block, name, stored(child, kind))
    names = {type(layer).__name__ for layer in pipe.unet.modules()}
    if not names & {"Linear4bit", "Linear8bitLt"}:
        for name, child in list(pipe.unet.time_embedding.named_children()):
            if type(child) is nn.Linear:
                setattr(pipe.unet.time_embedding, name, stored(child, kind))
    assert {type(layer).__name__ for layer in pipe.unet.modules()} & {"Linear4bit", "Linear8bitLt"}
    result = onestep.distill(pipe, ["a cat"], out=tmp_path / "run", **FEW)
    assert result.path.is_file() and "loads all" in result.check
