"""Networks whose text is a language model's: see `networks`, which calls each by its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.lengths import lengths_of
from .network_inputs import Extras, in_dtype, moved
from .padding_mask import without_torchvision
from .patches import pack, positions, unpack


@dataclass(frozen=True)
class ZImageNetwork:
    """ZImageTransformer2DModel of pictures and texts in lists, which reads 1 - sigma and answers x0 - noise."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        answer = self.module(
            list(x.to(self.module.dtype).unsqueeze(2)),
            1 - time.to(x.device, torch.float32) / 1000,
            [tokens[:length] for tokens, length in zip(text, lengths_of(cond), strict=True)],
            joint_attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return -torch.stack(answer).squeeze(2)


@dataclass(frozen=True)
class Flux2Network:
    """Flux2Transformer2DModel over the latents themselves, which reads sigma and, where embedded, the guidance. Places
    have four axes, of which the last numbers a text's tokens."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if cond.mask is not None and not bool(cond.mask.all()):
            raise OneStepError("diffusers' FLUX.2 attends to padding: encode all prompts to the same number of tokens")
        text, _ = in_dtype(cond, x, self.module.dtype)
        height, width = x.shape[-2:]
        answer = self.module(
            pack(x, 1).to(self.module.dtype),
            encoder_hidden_states=text,
            timestep=time.to(x.device, torch.float32) / 1000,
            img_ids=pad(positions(height, width, x.device), (0, 1)),
            txt_ids=pad(torch.arange(text.shape[1], dtype=torch.float32, device=x.device)[:, None], (3, 0)),
            guidance=moved(cond.guidance, x) if self.module.config.guidance_embeds else None,
            joint_attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return unpack(answer, height, width, 1)


@dataclass(frozen=True)
class QwenImageNetwork:
    """QwenImageTransformer2DModel over 2x2 patches of one frame, which reads sigma and, where texts are padded, their
    mask."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        height, width = x.shape[-2:]
        answer = self.module(
            pack(x).to(self.module.dtype),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if cond.mask is None else cond.mask.to(x.device),
            timestep=time.to(x.device, torch.float32) / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return unpack(answer, height, width)


@dataclass(frozen=True)
class AnimaNetwork:
    """CosmosTransformer3DModel of a video of one frame, of which nothing is padding, which reads sigma."""

    module: Any
    extras: Extras = Extras()

    def __post_init__(self) -> None:
        without_torchvision()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if self.extras.attention:
            raise OneStepError("diffusers' Anima takes no joint_attention_kwargs: leave them out")
        text, _ = in_dtype(cond, x, self.module.dtype)
        frames = x.to(self.module.dtype).unsqueeze(2)
        answer = self.module(
            frames,
            time.to(x.device, torch.float32) / 1000,
            text,
            padding_mask=torch.zeros_like(frames[:1, :1, 0]),
            return_dict=False,
        )[0]
        return answer.squeeze(2)


@dataclass(frozen=True)
class Krea2Network:
    """Krea2Transformer2DModel over 2x2 patches behind a text whose tokens all lie at the origin, which reads sigma and,
    where texts are padded, their mask. A token's layers are beside one another in a `Cond`, one behind the other
    there."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        height, width = x.shape[-2:]
        places = positions(height // 2, width // 2, x.device)
        answer = self.module(
            pack(x).to(self.module.dtype),
            encoder_hidden_states=text.unflatten(2, (self.module.config.num_text_layers, -1)),
            timestep=time.to(x.device, torch.float32) / 1000,
            position_ids=pad(places, (0, 0, text.shape[1], 0)),
            encoder_attention_mask=None if cond.mask is None else cond.mask.to(x.device),
            attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return unpack(answer, height, width)


@dataclass(frozen=True)
class WanNetwork:
    """WanTransformer3DModel of a video of one frame, which reads 1000 sigma."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        answer = self.module(
            x.to(self.module.dtype).unsqueeze(2),
            time.to(x.device, torch.float32),
            text,
            attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return answer.squeeze(2)


@dataclass(frozen=True)
class Lumina2Network:
    """Lumina2Transformer2DModel, which reads 1 - sigma and each text at its own length, and answers x0 - noise."""

    module: Any
    extras: Extras = Extras()

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, _ = in_dtype(cond, x, self.module.dtype)
        everywhere = torch.ones(text.shape[:2], dtype=torch.bool, device=x.device)
        answer = self.module(
            x.to(self.module.dtype).contiguous(),
            1 - time.to(x.device, torch.float32) / 1000,
            text,
            everywhere if cond.mask is None else cond.mask.to(x.device),
            attention_kwargs=dict(self.extras.attention or {}) or None,
            return_dict=False,
        )[0]
        return -answer
