"""Hosts with random weights, in the layouts whose configurations travel with us: no checkpoint is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from cost import fill
from torch import Tensor, nn

from onestep.core.cond import Cond
from onestep.core.families import bind_diffusers, blocks_of, select
from onestep.core.roles import Roles
from onestep.core.stored import store, widened
from onestep.pipelines.adapt import DiffusersHost, denoiser_of
from onestep.pipelines.networks import port_of
from onestep.pipelines.shells import layout, of_host
from onestep.pipelines.text import widths

STORED = ("float32", "bfloat16", "float8", "nf4")
TOKENS = 77
SMALL = {"small": (32, 64, 64, 64), "tiny": (32, 64)}
"""U-Nets of few channels, by those of each level."""


class RandomHost(DiffusersHost):
    """texts: numbers drawn from each text, in the place of an encoder's."""

    base_hash = encoder_hash = "random"  # type: ignore[assignment]

    def texts(self, prompts: Sequence[str], padded: bool = True, negative: bool = False) -> Cond:
        text, pooled = widths(self.network)
        rows = [_drawn(prompt, TOKENS * text + (pooled or 0)) for prompt in prompts]
        tokens = torch.stack([row[: TOKENS * text].view(TOKENS, text) for row in rows])
        return Cond(tokens, pooled=torch.stack([row[TOKENS * text :] for row in rows]) if pooled else None)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        yield


def _drawn(text: str, size: int) -> Tensor:
    seed = int.from_bytes(text.encode()[:6], "little")
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def host_of(name: str, device: torch.device, stored: str = "", targets: str = "all") -> RandomHost:
    """The host of a layout: "sd15", "sdxl" and so on, or one of `SMALL`. stored: one of `STORED`, how
    its blocks' weights are; those that are not float32 compute in bfloat16, in which a CPU is slow: bfloat16 on a card
    and float32 on a CPU where it is empty."""
    stored = stored or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = torch.float32 if stored == "float32" else torch.bfloat16
    pipe = _small(SMALL[name], dtype) if name in SMALL else layout(name, dtype=dtype).pipe
    pipe.tokenizer = SimpleNamespace(model_max_length=TOKENS)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(0)
    for module in (network, pipe.vae):
        module.to_empty(device=device)
        fill(module)
    put(network, stored)
    host = RandomHost(pipe, denoiser_of(pipe, Roles([])), device)
    host.denoiser.roles = Roles(select(bind_diffusers(network), targets), port_of(network))
    return host


def shells_of(host: RandomHost) -> Any:
    """What `training.plan` counts its runs on."""
    return lambda targets: of_host(host, targets)


def _small(channels: tuple[int, ...], dtype: torch.dtype) -> SimpleNamespace:
    """With text as wide as SD1.5's, in its schedule, on the meta device."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    above = len(channels) - 1
    levels = {"down_block_types": ("CrossAttnDownBlock2D",) * above + ("DownBlock2D",)}
    levels |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * above}
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **levels, block_out_channels=channels, layers_per_block=1, cross_attention_dim=768, sample_size=8
        )
        two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(**two, block_out_channels=(32, 32))
    for module in (unet, vae):
        nn.Module.to(module, dtype).requires_grad_(False).eval()
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    nobody = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    return SimpleNamespace(unet=unet, vae=vae, scheduler=scheduler, config={"_name_or_path": "small"}, **nobody)


# -- storage -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def put(network: nn.Module, stored: str) -> None:
    """Store the weights of a network's blocks in "float8" with scales, or in "nf4" by bitsandbytes."""
    if stored not in ("float8", "nf4"):
        return
    for block in blocks_of(network):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if stored == "float8" and type(layer) in (nn.Linear, nn.Conv2d):
                    store(layer)
                elif stored == "nf4" and type(layer) is nn.Linear:
                    setattr(parent, name, in_four_bits(layer))


def in_four_bits(layer: nn.Linear) -> nn.Module:
    """As diffusers' bitsandbytes quantiser makes it."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to(layer.weight.device).requires_grad_(False)  # type: ignore[no-any-return]


def weight_of(layer: Any) -> Tensor:
    """The weight that a layer computes with, in float32 on the CPU."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).detach().float().cpu()
    return widened(weight.detach(), getattr(layer, "weight_scale", None), torch.float32).cpu()
