"""Inside ComfyUI's Python: diffusers' weights in ComfyUI's networks, by ComfyUI's own maps."""

import comfy.ops
import comfy.utils
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel


def same_names(config):
    """ComfyUI has no map of Qwen-Image: its tree has diffusers' own names."""
    network = QwenImageTransformer2DModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    return {key: key for key in network.state_dict()}


MAPS = {
    "unet": comfy.utils.unet_to_diffusers,
    "sd3": comfy.utils.mmdit_to_diffusers,
    "flux": comfy.utils.flux_to_diffusers,
    "z_image": comfy.utils.z_image_to_diffusers,
    "flux2": comfy.utils.flux_to_diffusers,
    "qwen_image": same_names,
}
EMBEDDED = {"time_in": "timestep", "guidance_in": "guidance"}
MODULATED = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
BESIDE = {
    "flux2": {
        **{
            f"time_guidance_embed.{told}_embedder.linear_{at}.weight": f"{path}.{way}_layer.weight"
            for path, told in EMBEDDED.items()
            for at, way in ((1, "in"), (2, "out"))
        },
        **{f"{path}.linear.weight": f"{path}.lin.weight" for path in MODULATED},
    }
}
"""What ComfyUI's map of FLUX.2 lacks."""


def as_published(network):
    """A small Z-Image whose embedding of the time is as wide as the published one's, and diffusers' of any size."""
    if isinstance(network, NextDiT):
        network.t_embedder = TimestepEmbedder(1024, output_size=256, operations=comfy.ops.disable_weight_init)
    return network


def place_of(entry):
    """ComfyUI's word for a diffusers key: its key, (axis, start, length) or None, a function of the weight or None."""
    return (entry, None, None) if isinstance(entry, str) else (*entry, None, None)[:3]


def fill(family, model, weights, config):
    """diffusers' weights into ComfyUI's layers; returns the keys that nothing was written to."""
    key_map = MAPS[family](config) | BESIDE.get(family, {})
    state = model.diffusion_model.state_dict()
    written = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in state.items()}
    for name, value in weights.items():
        key, rows, change = place_of(key_map[name])
        start, length = (0, len(state[key])) if rows is None else rows[1:]
        state[key][start : start + length] = value if change is None else change(value)
        written[key][start : start + length] = True
    return [key for key, done in written.items() if not done.all()]
