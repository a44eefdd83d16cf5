"""A diffusers network as the contract's: what each family is told, and in which form.

Every network takes x [B, C, h, w] in the model's own latent scale, its time [B] and a `Cond`; it answers [B, C, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from ..core.adapter_module import Port
from ..core.cond import Cond
from ..core.control import entry_of
from ..core.errors import OneStepError
from ..core.families import FAMILIES, detect
from .network_inputs import Extras, in_dtype, joint_mask, moved
from .networks_modern import (
    AnimaNetwork,
    Flux2Network,
    Krea2Network,
    Lumina2Network,
    QwenImageNetwork,
    WanNetwork,
    ZImageNetwork,
)
from .patches import pack, positions, unpack

UNet = UNet2DConditionModel
Transformer = (
    SD3Transformer2DModel
    | FluxTransformer2DModel
    | ZImageTransformer2DModel
    | Flux2Transformer2DModel
    | QwenImageTransformer2DModel
    | CosmosTransformer3DModel
    | Krea2Transformer2DModel
    | WanTransformer3DModel
    | ChromaTransformer2DModel
    | Lumina2Transformer2DModel
    | PixArtTransformer2DModel
)


@dataclass(frozen=True)
class UNetNetwork:
    """UNet2DConditionModel, which reads an index 0 .. T - 1; SDXL's also the pooled text and the sizes."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, pooled = in_dtype(cond, x, self.module.dtype)
        added: dict[str, Any] = {} if pooled is None else {"text_embeds": pooled, "time_ids": moved(cond.size, x)}
        if self.extras.image_embeds:
            added["image_embeds"] = [image.to(self.module.dtype) for image in self.extras.images(x)]
        return self.module(
            x.to(self.module.dtype),
            time.to(x.device, torch.float32),
            encoder_hidden_states=text,
            encoder_attention_mask=None if cond.mask is None else cond.mask.to(x.device),
            added_cond_kwargs=added or None,
            cross_attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class SD3Network:
    """SD3Transformer2DModel, which reads 1000 sigma."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if cond.mask is not None and not bool(cond.mask.all()):
            raise OneStepError("diffusers' SD3 attends to padding: encode all prompts to the same number of tokens")
        text, pooled = in_dtype(cond, x, self.module.dtype)
        joint = dict(self.extras.attention or {})
        for image in self.extras.images(x):
            joint["ip_adapter_image_embeds"] = image.to(self.module.dtype)
        return self.module(
            x.to(self.module.dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time.to(x.device, torch.float32),
            joint_attention_kwargs=joint or None,
            return_dict=False,
        )[0]


@dataclass(frozen=True)
class FluxNetwork:
    """FluxTransformer2DModel over 2x2 patches of the latents, which reads sigma and, where embedded, the guidance."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, pooled = in_dtype(cond, x, self.module.dtype)
        height, width = x.shape[-2:]
        joint = dict(self.extras.attention or {}) | joint_mask(cond.mask, x, height * width // 4)
        if self.extras.image_embeds:
            joint["ip_adapter_image_embeds"] = [image.to(self.module.dtype) for image in self.extras.images(x)]
        answer = self.module(
            pack(x).to(self.module.dtype),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time.to(x.device, torch.float32) / 1000,
            img_ids=positions(height // 2, width // 2, x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            guidance=moved(cond.guidance, x) if self.module.config.guidance_embeds else None,
            joint_attention_kwargs=joint or None,
            return_dict=False,
        )[0]
        return unpack(answer, height, width)


@dataclass(frozen=True)
class ChromaNetwork:
    """ChromaTransformer2DModel over 2x2 patches of the latents, which reads sigma and, where texts are padded, a mask
    over all tokens."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if self.extras.image_embeds:
            raise OneStepError("an IP-Adapter is not served on Chroma: call unload_ip_adapter(), or draw with Flux")
        text, _ = in_dtype(cond, x, self.module.dtype)
        height, width = x.shape[-2:]
        mask = joint_mask(cond.mask, x, height * width // 4).get("attention_mask")
        answer = self.module(
            pack(x).to(self.module.dtype),
            encoder_hidden_states=text,
            timestep=time.to(x.device, torch.float32) / 1000,
            img_ids=positions(height // 2, width // 2, x.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            attention_mask=None if mask is None else mask[:, 0, 0],
            joint_attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return unpack(answer, height, width)


@dataclass(frozen=True)
class PixArtNetwork:
    """PixArtTransformer2DModel, which reads an index 0 .. T - 1 and, where texts are padded, their mask; its answer's
    second half is a variance, which nothing here is drawn by."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        answer = self.module(
            x.to(self.module.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=None if cond.mask is None else cond.mask.to(x.device),
            timestep=time.to(x.device, torch.float32),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            cross_attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return answer[:, : x.shape[1]]


NETWORKS: dict[str, Any] = {
    "unet": UNetNetwork,
    "sd3": SD3Network,
    "flux": FluxNetwork,
    "z_image": ZImageNetwork,
    "flux2": Flux2Network,
    "qwen_image": QwenImageNetwork,
    "anima": AnimaNetwork,
    "krea2": Krea2Network,
    "wan": WanNetwork,
    "chroma": ChromaNetwork,
    "lumina2": Lumina2Network,
    "pixart": PixArtNetwork,
}


def has_ip_adapter(network: Any) -> bool:
    """Whether the network reads image embeddings."""
    if getattr(network, "image_proj", None) is not None:
        return True
    # other U-Nets project their text there
    return getattr(network.config, "encoder_hid_dim_type", None) == "ip_image_proj"


def port_of(network: Any) -> Port:
    """Where adapters act beside the layers that are adapted: a UNet2DConditionModel takes a ControlNet's residuals."""

    def carry(more: dict[str, Any], residuals: list[Tensor]) -> dict[str, Any]:
        *skips, middle = residuals
        if more.get("down_block_additional_residuals") is not None:  # another ControlNet's
            others = [*more["down_block_additional_residuals"], more["mid_block_additional_residual"]]
            *skips, middle = (mine + theirs for mine, theirs in zip(residuals, others, strict=True))
        return more | {"down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}

    family = detect(network)
    return Port(network, carry if FAMILIES[family].unet else None, entry_of(family, network))
