"""What any adapter that a diffusers pipeline loads has to do: act beside a LoRA, and on another checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor


def in_either_order(make: Callable[[], Any], load: Callable[[Any], Any], answer: Callable[[Any], Tensor]) -> None:
    """The same whether the adapter or a LoRA was there first. make: a pipeline; load: puts the adapter on one."""
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0"])
    found, plain = [], answer(make())
    for adapter_first in (True, False):
        pipe = make()
        for what in ("adapter", "lora") if adapter_first else ("lora", "adapter"):
            if what == "adapter":
                load(pipe)
            else:
                torch.manual_seed(3)
                pipe.unet.add_adapter(config)
        found.append(answer(pipe))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], plain)


def on_another_checkpoint(pipe: Any, load: Callable[[Any], Any]) -> None:
    """The pipeline itself draws with it, and without it as before. load: a context in which it acts."""
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "latent"}
        return pipe("a cat", generator=noise, **how).images

    plain = draw()
    with load(pipe):
        assert not torch.allclose(draw(), plain)
    assert torch.equal(draw(), plain)
