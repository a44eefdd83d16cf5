"""`One-Step Fast`: from a text, or from frames, to pictures in one node."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.errors import OneStepError
from ..core.recipe import Recipe
from . import autoencoder
from .denoiser import schedule_of
from .load_lora import RecipeSocket
from .sample import drawn, seed_input

MOST_TEXTS, LARGEST = 64, 16384
_texts: WeakKeyDictionary[Any, OrderedDict[str, Any]] = WeakKeyDictionary()
"""CLIP -> text -> CONDITIONING, the latest of each."""


class OneStepFast(io.ComfyNode):  # type: ignore[misc]
    """Text or frames to pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepFast",
            display_name="One-Step Fast",
            category="OneStep/sampling",
            description="Draws a text as One-Step Sample does and decodes it, in one node that keeps its texts. With "
            "images it draws each of them anew, in one step from one noise, so that frames hang together. A VAE of the "
            "TAESD family in Load VAE makes it fastest: at one step decoding costs more than drawing.",
            search_aliases=["one step", "real time", "fast", "turbo", "stream", "img2img", "video frames"],
            inputs=[
                io.Model.Input("model", tooltip="From Load One-Step LoRA."),
                io.Clip.Input("clip", tooltip="Encodes the text, once for each."),
                io.Vae.Input("vae", tooltip="Decodes the pictures, and encodes images where there are any."),
                RecipeSocket.Input("recipe", tooltip="From Load One-Step LoRA."),
                io.String.Input("text", multiline=True, default="", dynamic_prompts=True, tooltip="What to draw."),
                io.Int.Input(
                    "width", default=512, min=16, max=LARGEST, step=8, tooltip="In pixels; images have their own."
                ),
                io.Int.Input("height", default=512, min=16, max=LARGEST, step=8, tooltip="In pixels."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Pictures; of images, how many at once."
                ),
                seed_input(),
                io.Image.Input("images", optional=True, tooltip="Pictures or a video's frames to draw anew."),
                io.Float.Input(
                    "strength",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=False,
                    optional=True,
                    tooltip="How much of an image is drawn anew: the share of the recipe's first time at which it is "
                    "noised. 0.4 to 0.7 are usual; without images it does nothing.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The pictures.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        recipe: Recipe,
        text: str,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        images: Tensor | None = None,
        strength: float = 0.5,
    ) -> io.NodeOutput:
        if recipe.guidance != 1:
            raise OneStepError(
                f"the recipe has guidance {recipe.guidance:g}, which needs a negative: use One-Step Sample for it"
            )
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(1.0)
        guider.inner_set_conds({"positive": encoded(clip, text)})
        if images is None:
            empty = {"samples": torch.zeros(batch_size, 4, height // 8, width // 8), "downscale_ratio_spacial": 8}
            return io.NodeOutput(autoencoder.decoded(vae, drawn(guider, model, empty, recipe, seed)["samples"]))
        one = recipe.at_strength(schedule_of(model.get_model_object("model_sampling")), strength)
        parts = images[..., :3].split(batch_size)
        return io.NodeOutput(torch.cat([anew(guider, model, vae, part, one, seed) for part in parts]))


def encoded(clip: Any, text: str) -> Any:
    """The CONDITIONING of ``text``, encoded once for each CLIP."""
    known = _texts.setdefault(clip, OrderedDict())
    if text not in known:
        known[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    known.move_to_end(text)
    while len(known) > MOST_TEXTS:
        known.popitem(last=False)
    return known[text]


def anew(guider: Any, model: Any, vae: Any, images: Tensor, recipe: Recipe, seed: int) -> Tensor:
    """IMAGE [B, H, W, 3] drawn anew, each from the seed's first noise."""
    # one index for all: ComfyUI then gives each the same noise
    latent = {"samples": autoencoder.encoded(vae, images), "batch_index": [0] * len(images)}
    return autoencoder.decoded(vae, drawn(guider, model, latent, recipe, seed)["samples"])


NODES = [OneStepFast]
