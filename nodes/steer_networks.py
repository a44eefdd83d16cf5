"""How each of ComfyUI's networks takes a negative text: by cross-attention, or in one sequence with the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.utils
import torch
from comfy.ldm.anima.model import Anima
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import FAMILIES, choices
from ..core.guidance import Steering
from .steer_attention import OVERRIDE, CrossOverride, CrossPatch, JointAttention, Reached
from .steer_hooked import hooked_cross, steer_hooked
from .steer_krea2 import FusedAttention
from .steer_modulation import modulated
from .steer_one_stream import steer_stream, within_stream
from .steer_places import behind_picture, numbered
from .steer_variants import why_not_flux, why_not_flux2, why_not_pixart, why_not_qwen, why_not_sd3, why_not_stream

MODELS = choices(name for name, known in FAMILIES.items() if known.steering)
KeysValues = dict[tuple[str, int, int], tuple[Tensor, Tensor]]
"""By the name that attn2_replace has for a block."""


@dataclass
class Call:
    """One steered forward of ``network``.

    x: [B, C, ...] latents. context: [B, L, C] the positive texts. tokens: [n, L', C] the negative, of which the last
    ``empty`` are the empty text's. parts: tokens of each text that it is made of. pooled: [n, P], by which each of them
    is modulated; none where the prompt's modulates all. firsts: the place of each part's first token, for networks that
    number them. chunks: how many conditions lie behind each other in x. rows:
    [B] bool, which are steered; None = all. kept: the negative's keys and values, empty until they are made.
    """

    steering: Steering
    network: Any
    x: Tensor
    context: Tensor
    tokens: Tensor
    empty: int
    parts: list[int]
    pooled: list[Tensor]
    firsts: list[int]
    chunks: int
    rows: Tensor | None
    reached: Reached
    kept: KeysValues

    def spread(self, negative: Tensor) -> Tensor:
        """[n, ...] -> [B, ...]: in turn over each condition's rows, as ComfyUI spreads a batch of prompts."""
        batch = len(self.x)
        if len(negative) == 1:
            return negative.expand(batch, *negative.shape[1:])
        return torch.cat([comfy.utils.repeat_to_batch_size(negative, batch // self.chunks)] * self.chunks)

    def joined(self) -> Tensor:
        """[B, L + L', C]: the negative's tokens behind the positive's."""
        return torch.cat((self.context, self.spread(self.tokens.to(self.context))), 1)

    def modulated(self, options: dict[str, Any]) -> AbstractContextManager[None]:
        """Within, each text's tokens are modulated by its own pooled text."""
        return modulated(self.network, [self.spread(one) for one in self.pooled], [self.context.shape[1], *self.parts])

    def texts(self) -> list[Tensor]:
        """[B, L, C] of each: the positive, the negative and, where there is one, the empty text."""
        away = self.spread(self.tokens.to(self.context))
        end = away.shape[1] - self.empty
        return [self.context, away[:, :end], *([away[:, end:]] if self.empty else [])]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.context.shape[1], self.tokens.shape[1]


@dataclass(frozen=True)
class Served:
    """A class of networks that can be steered.

    family: in `core.guidance.DEFAULTS`. width: of its text. steer: puts a call's patches into ``options``, returns the
    context to run with. variant: why a network of this class is not served after all, or None. keywords: whether its
    forward hands on those it ignores. pooled: whether a pooled text modulates the text's tokens. within: what the
    network's forward runs in, of the call and the same options. hooked: whether those are hooks at all times.
    """

    family: str
    width: Callable[[Any], int]
    steer: Callable[[Call, dict[str, Any]], Tensor]
    variant: Callable[[Any], str | None] = lambda network: None
    keywords: bool = True
    pooled: bool = False
    within: Callable[[Call, dict[str, Any]], AbstractContextManager[None]] = Call.modulated
    hooked: bool = False


def served(model: Any) -> Served:
    """How the MODEL's network takes a negative. OneStepError, with a word, where it does not."""
    network = network_of(model)
    reasons = {kind: kind.variant(network) for kind in SERVED.get(type(network), ())}
    found = next((kind for kind, why in reasons.items() if why is None), None)
    if found is None:
        why = next(iter(reasons.values()), "its network is not known here")
        raise OneStepError(
            f"Negative Steering does not serve {type(model.model).__name__} ({why}): it serves {MODELS}. Use CFG for "
            "its negative"
        )
    return found


def network_of(model: Any) -> Any:
    """A MODEL's network, as it was before torch.compile."""
    return bare(model.get_model_object("diffusion_model"))


def bare(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)


# -- cross-attention --------------------------------------------------------------------------------------------------


def cross_blocks(network: Any) -> Iterator[tuple[tuple[str, int, int], Any]]:
    """Each cross-attention of a U-Net, under the name that attn2_replace has for it."""
    middle = [] if network.middle_block is None else [network.middle_block]
    for name, parts in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)):
        for number, part in enumerate(parts):
            for layer in (layer for layer in bare(part) if isinstance(layer, SpatialTransformer)):
                for index, block in enumerate(layer.transformer_blocks):
                    yield (name, number, index), bare(block).attn2


def why_not_unet(network: Any) -> str | None:
    if any(isinstance(module, SpatialVideoTransformer) for module in network.modules()):
        return "a U-Net for video"
    return None if any(True for _ in cross_blocks(network)) else "it has no cross-attention"


def unet_width(network: Any) -> int:
    return int(next(cross_blocks(network))[1].to_k.in_features)


def check_layers(steering: Steering, network: Any) -> None:
    """Raises OneStepError for a U-Net without a cross-attention among the layers that are to be steered."""
    if not any(acts(steering, key) for key, _ in cross_blocks(network)):
        raise OneStepError("this U-Net has no cross-attention in its decoder: set layers to all")


def acts(steering: Steering, key: tuple[str, int, int]) -> bool:
    """Whether the cross-attention of this name is steered: the decoder is all but the blocks that take in."""
    return steering.layers == "all" or key[0] != "input"


def steer_unet(call: Call, options: dict[str, Any]) -> Tensor:
    """attn2_replace at every cross-attention, around whatever another patch has put there."""
    replaced = options.get("patches_replace", {})
    earlier = replaced.get("attn2", {})
    if not call.kept:
        steered = {key: attn for key, attn in cross_blocks(call.network) if acts(call.steering, key)}
        # by the block's own projections: whatever LoRA is on them acts
        call.kept |= {key: (attn.to_k(call.tokens), attn.to_v(call.tokens)) for key, attn in steered.items()}
    ours = {}
    for key, (k, v) in call.kept.items():
        negative, before = (call.spread(k), call.spread(v)), earlier.get(key, earlier.get(key[:2]))
        ours[key] = CrossPatch(call.steering, negative, call.empty, call.rows, call.reached, before)
    options["patches_replace"] = {**replaced, "attn2": {**earlier, **ours}}
    return call.context


def steer_cross(call: Call, options: dict[str, Any], when: str) -> Tensor:
    """Both texts are the context; a patch "before" or "after" each attention, as the network calls it, tells the
    override which one it is, or which comes next."""
    override = CrossOverride(call.steering, call.lengths, call.empty, call.rows, call.reached, options.get(OVERRIDE))
    patches, kinds = options.get("patches", {}), {"attn1_patch": "self", "attn2_patch": "cross"}
    ours = {name: getattr(override, f"{when}_{kind}_attention") for name, kind in kinds.items()}
    options["patches"] = {**patches, **{name: [*patches.get(name, []), patch] for name, patch in ours.items()}}
    options[OVERRIDE] = override
    return call.joined()


# -- one sequence -----------------------------------------------------------------------------------------------------


def sd3_width(network: Any) -> int:
    return int(network.context_embedder.in_features)


def steer_sd3(call: Call, options: dict[str, Any]) -> Tensor:
    height, width = (-(-side // call.network.patch_size) for side in call.x.shape[-2:])
    return steer_joint(call, options, height * width)


def steer_flux(call: Call, options: dict[str, Any]) -> Tensor:
    if options.get("patches", {}).get("post_input"):
        raise OneStepError(
            "another patch on this MODEL adds tokens to the text (a style reference), which Negative Steering cannot "
            "follow: take one of the two away"
        )
    return steer_joint(call, options, None)


def steer_flux2(call: Call, options: dict[str, Any]) -> Tensor:
    return steer_placed(call, options, numbered)


def steer_qwen(call: Call, options: dict[str, Any]) -> Tensor:
    return steer_placed(call, options, behind_picture)


def steer_krea2(call: Call, options: dict[str, Any]) -> Tensor:
    context, lengths = steer_flux(call, options), (call.context.shape[1], *call.parts)
    options[OVERRIDE] = FusedAttention(options[OVERRIDE], lengths, len(call.x))
    return context


def steer_placed(call: Call, options: dict[str, Any], placed: Callable[..., Any]) -> Tensor:
    """Of networks whose text tokens have places: those of each text are as if it were the only one."""
    context = steer_flux(call, options)
    options["patches"] = {**options.get("patches", {}), "post_input": [partial(placed, call)]}
    return context


def steer_joint(call: Call, options: dict[str, Any], image: int | None) -> Tensor:
    earlier = options.get(OVERRIDE)
    options[OVERRIDE] = JointAttention(call.steering, call.lengths, call.empty, image, call.rows, call.reached, earlier)
    return call.joined()


def stream_width(network: Any) -> int:
    return int(network.cap_embedder[1].in_features)


def flux_width(network: Any) -> int:
    return int(network.txt_in.in_features)


def pixart_width(network: Any) -> int:
    return int(network.y_embedder.y_proj.fc1.in_features)


SERVED: dict[type, tuple[Served, ...]] = {
    UNetModel: (Served("unet", unet_width, steer_unet, why_not_unet),),
    OpenAISignatureMMDITWrapper: (Served("sd3", sd3_width, steer_sd3, why_not_sd3, keywords=False, pooled=True),),
    Flux: (
        Served("flux", flux_width, steer_flux, why_not_flux, pooled=True),
        Served("flux2", flux_width, steer_flux2, why_not_flux2),
    ),
    Chroma: (Served("chroma", flux_width, steer_flux),),
    NextDiT: tuple(
        Served(family, stream_width, steer_stream, partial(why_not_stream, family), within=within_stream, hooked=True)
        for family in ("z_image", "lumina2")
    ),
    Anima: (
        Served(
            "anima",
            lambda network: int(network.blocks[0].cross_attn.k_proj.in_features),
            partial(steer_cross, when="before"),
        ),
    ),
    WanModel: (Served("wan", lambda network: int(network.text_dim), partial(steer_cross, when="after")),),
    QwenImageTransformer2DModel: (Served("qwen_image", flux_width, steer_qwen, why_not_qwen),),
    PixArtMS: (Served("pixart", pixart_width, steer_hooked, why_not_pixart, within=hooked_cross, hooked=True),),
    SingleStreamDiT: (Served("krea2", lambda network: int(network.txtlayers * network.txtdim), steer_krea2),),
}
"""By a network's class; one of several that serves it."""
