"""A tiny model's folder as ComfyUI's MODEL, CLIP and VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ...core.families import of_class
from .anima import anima_setup
from .autoencoder import load_vae
from .chroma import chroma_setup
from .flux2 import flux2_setup
from .folder import Weights, has_part, read_config
from .krea2 import krea2_setup
from .latents import fit_preview_colours, latent_format
from .lumina2 import lumina2_setup
from .mmdit import mmdit_setup
from .pixart import pixart_setup
from .qwen import qwen_image_setup
from .text import load_clip
from .unet import unet_setup
from .wan import wan_setup
from .z_image import z_image_setup


def load_tiny(folder: Path) -> tuple[Any, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a diffusers-layout folder with a `unet`, or a `transformer` of SD3 or a
    modern family."""
    vae, latent = load_vae(folder), latent_format(folder)
    fit_preview_colours(latent, vae)
    return load_patcher(str(folder), latent), load_clip(folder), vae


def load_patcher(folder: str, latent: Any, disable_dynamic: bool = False) -> Any:
    """The MODEL alone. ComfyUI calls this again for a deep copy, with disable_dynamic=True."""
    management = comfy.model_management
    setup, weights = setup_of(Path(folder))
    setup.latent_format = latent
    setup.set_inference_dtype(torch.float32, None)
    model = setup.get_model(weights, "", device=management.unet_offload_device())
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, management.get_torch_device(), management.unet_offload_device())
    load_weights(model, weights, patcher)
    patcher.cached_patcher_init = (load_patcher, (folder, latent))
    return patcher


def setup_of(folder: Path) -> tuple[Any, Weights]:
    """The model configuration, and the weights under ComfyUI's names."""
    if has_part(folder, "unet"):
        return unet_setup(folder)
    family = of_class(read_config(folder, "transformer").get("_class_name", ""))
    setups = {"z_image": z_image_setup, "flux2": flux2_setup, "qwen_image": qwen_image_setup}
    setups |= {"anima": anima_setup, "krea2": krea2_setup, "wan": wan_setup, "chroma": chroma_setup}
    setups |= {"lumina2": lumina2_setup, "pixart": pixart_setup}
    return setups.get(str(family), mmdit_setup)(folder)


def load_weights(model: Any, weights: Weights, patcher: Any) -> None:
    wanted, given = set(model.diffusion_model.state_dict()), set(weights)
    if wanted != given:
        odd = sorted(wanted ^ given)
        raise RuntimeError(f"the network and its weights differ in {len(odd)} names, {odd[0]} the first")
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
