"""ComfyUI's MODEL, CLIP and VAE as a training host: a private copy of the plugged model, gone when the run is over."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management as management
import comfy.utils
import torch
from torch import Tensor

from ..core.cond import Cond
from ..core.denoiser import Denoiser
from ..core.errors import OneStepError
from ..core.families import FAMILIES, bind_comfy, blocks_of, check_size, detect, in_place_of, select
from ..core.licences import Part
from ..core.lora_fused import Host as LoraHost
from ..core.ordinary import make_ordinary
from ..core.roles import Roles
from ..core.weights_hash import hash_of
from .autoencoder import decoded, differentiable, encoded
from .check import check_file
from .denoiser import (
    ComfyDenoiser,
    encode,
    framed,
    in_front,
    port_of,
    refuse_lengths,
    schedule_of,
    unframed,
    with_sizes,
)
from .origin import made_of, name_of
from .own_text import own_text
from .refusals import refuse_encoder, refuse_patches, refuse_variant
from .rotary import training_options
from .stored import keep_stored, refuse_broken, refuse_foreign
from .text_rows import a_row_each

PROBE = ("a photograph of a red apple on a wooden table", "")


@contextmanager
def adapted(model: Any, clip: Any, vae: Any, *, targets: str = "all") -> Iterator[ComfyHost]:
    """``model`` as a host: a deep copy with its weight and sampling patches baked in. Outside inference mode within.

    Raises OneStepError, before the copy is made, for a MODEL with other patches or of an unknown architecture, and for
    another model's text encoder.
    """
    refuse_patches(model)
    # before gigabytes are read for the copy
    refuse_variant(detect(model.model.diffusion_model), model.model, name_of(model))
    refuse_foreign(model.model.diffusion_model)
    refuse_broken(model.model.diffusion_model)
    if clip is not None:
        refuse_encoder(clip, model.model)
    with torch.inference_mode(False), torch.enable_grad():
        host = ComfyHost(private_copy(model), clip, vae, targets, name_of(model), made_of=made_of(model))
        try:
            yield host
        finally:
            host.release()


@dataclass
class ComfyHost:
    """See `training.host.Host`. patcher: a private ModelPatcher of ordinary tensors, its patches baked in."""

    patcher: Any
    clip: Any
    vae: Any
    targets: str
    name: str
    memory_required: int = 0
    streamed: bool = False
    made_of: Sequence[Part] = ()

    def __post_init__(self) -> None:
        self.model = self.patcher.model
        network = self.network = self.model.diffusion_model
        self.family = detect(network)
        self._known = FAMILIES[self.family]
        config = self.model.model_config.unet_config
        targets = select(bind_comfy(self.family, network, config), self.targets)
        roles = Roles(targets, port_of(network, self.family))
        schedule = schedule_of(self.model.model_sampling, self.family)
        guidance = self._known.guidance_of(config)
        self.denoiser: Denoiser = ComfyDenoiser(
            self.model, schedule, roles, guidance, training_options(self.family), self._known.lengths
        )
        self.device = torch.device(self.patcher.load_device)
        self.blocks, self.in_place = blocks_of(network), in_place_of(network)
        if self._known.one_row:
            a_row_each(self.blocks)
        self._training = False

    @property
    def loader(self) -> LoraHost:
        return "comfyui"

    @property
    def computing_dtype(self) -> torch.dtype:
        """What stored weights are cast to at each use."""
        return self.model.get_dtype_inference()  # type: ignore[no-any-return]

    @cached_property
    def base_hash(self) -> str:
        return hash_of([self.network])

    @cached_property
    def encoder_hash(self) -> str:
        """Of what the encoder makes of two texts: that holds its weights, its LoRAs and its clip skip."""
        return encode(self.clip, PROBE, self._pooled).fingerprint()

    # -- text and pictures --------------------------------------------------------------------------------------------

    @property
    def _pooled(self) -> bool:
        return self._known.pooled or self._sdxl

    @property
    def _sdxl(self) -> bool:
        return isinstance(self.model, comfy.model_base.SDXL)

    def encode(self, prompts: Sequence[str], size: tuple[int, int], negative: bool = False) -> Cond:
        with self.encoding():
            return self.with_sizes(self.texts(prompts, negative).to("cpu", torch.float32), size)

    def texts(self, prompts: Sequence[str], negative: bool = False) -> Cond:
        said = prompts if negative else [self._known.said(prompt) for prompt in prompts]
        with own_text(self.model, self.device) as own:
            cond = encode(self.clip, said, self._pooled, own)
        if self._known.lengths == "filled in front":
            cond = in_front(cond, self._known.tokens)
        if self._known.lengths in ("equal", "filled in front"):
            refuse_lengths(cond, prompts)
        return cond

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """ComfyUI puts the encoder in the network's place where both are too much."""
        yield
        if self._training:
            self._load()

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        if self._sdxl:
            return with_sizes(cond, size)
        embedded, usual = self.denoiser.guidance == "embedded", self._known.usual_guidance
        return cond.with_(guidance=torch.full((len(cond),), usual)) if embedded else cond

    def decode(self, latents: Tensor) -> Tensor:
        with torch.inference_mode():
            made = decoded(self.vae, self.model.process_latent_out(framed(self.model, latents.detach().cpu())))
        return self._after_vae(made.movedim(-1, 1)).clamp_(0, 1)

    @contextmanager
    def decoding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        try:
            yield differentiable(self.model, self.vae)
        finally:
            if self._training:
                self._load()

    def latents_of(self, pictures: Tensor) -> Tensor:
        with torch.inference_mode():
            made = self.model.process_latent_in(encoded(self.vae, pictures.movedim(1, -1)))
            return self._after_vae(unframed(self.model, made))

    @torch.inference_mode(False)
    def _after_vae(self, made: Tensor) -> Tensor:
        """An ordinary copy on the CPU; the network again where it is trained: the VAE may have taken its place."""
        if self._training:
            self._load()
        return made.to("cpu", torch.float32, copy=True).clone()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        latent = self.model.latent_format
        factor = int(latent.spacial_downscale_ratio)
        check_size(self.name, self.family, size, factor)
        return int(latent.latent_channels), height // factor, width // factor

    # -- training -----------------------------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[None]:
        _ = (
            self.base_hash
        )  # of the weights as they are stored: some are kept in the computing dtype from the first pass
        before = management.in_training
        management.in_training = self._training = True
        try:
            with torch.inference_mode():
                management.unload_all_models()
            self._load()
            yield
        finally:
            management.in_training, self._training = before, False

    def _load(self) -> None:
        """Put the network on the training device, and the others off it where it is a graphics card. ComfyUI moves
        models in its own mode, as everywhere: others' quantised weights could not be patched again otherwise."""
        with torch.inference_mode():
            for loaded in management.current_loaded_models[:]:
                if self.device.type != "cpu" and loaded.model is not None and loaded.model is not self.patcher:
                    management.unload_model_and_clones(loaded.model)
            if self.streamed:  # none of ComfyUI's business: it is asked for room, and neither moves nor counts it
                management.free_memory(self.memory_required, self.device)
                return
            management.load_models_gpu([self.patcher], memory_required=self.memory_required)
        make_ordinary(self.network)

    def check_file(self, path: Path) -> str:
        return check_file(self.model, list(self.denoiser.roles.targets.values()), self.family, path)

    def poll(self) -> None:
        management.throw_exception_if_processing_interrupted()

    def release(self) -> None:
        """Unload the copy and forget it; nothing else may hold it."""
        self.denoiser.roles.remove()
        for role in self.denoiser.roles.names():
            self.denoiser.roles.drop(role)
        with torch.inference_mode():
            management.unload_model_and_clones(self.patcher)
        self.denoiser.roles.targets.clear()
        self.__dict__ = {"name": self.name, "family": self.family}
        gc.collect()
        management.cleanup_models_gc()
        management.soft_empty_cache()


# -- the copy ---------------------------------------------------------------------------------------------------------


def private_copy(model: Any) -> Any:
    """A patcher on weights of its own, in ordinary tensors, with the plugged model's patches baked in."""
    try:
        copy = model.clone(disable_dynamic=True, force_deepcopy=True)
    except RuntimeError as error:
        raise OneStepError(
            f"this MODEL's loader cannot make a copy of it ({error}): load it with ComfyUI's own loaders"
        ) from None
    bake(copy)
    make_ordinary(copy.model)
    copy.model.requires_grad_(False).eval()
    _avoid_half(copy)
    keep_stored(copy.model.diffusion_model)
    return copy


@torch.no_grad()
def bake(copy: Any) -> None:
    """Weight patches (a LoRA stack) and the sampling patch become part of the copy: they are part of the teacher."""
    for key in list(copy.patches):
        weight = copy.patch_weight_to_device(key, device_to=copy.load_device, return_weight=True)
        comfy.utils.set_attr_param(copy.model, key, weight.to(copy.offload_device))
    for key, value in copy.object_patches.items():
        comfy.utils.set_attr(copy.model, key, value)
    copy.patches.clear()
    copy.object_patches.clear()
    copy.model.current_weight_patches_uuid = None


def _avoid_half(copy: Any) -> None:
    """A CPU is slow in float16. A card goes on in it where ComfyUI does: of the difference of two outputs more is left
    than in bfloat16, and the turns that need one have a loss scale."""
    if copy.model.get_dtype_inference() != torch.float16 or torch.device(copy.load_device).type != "cpu":
        return
    copy.model.manual_cast_dtype = torch.float32
    for module in copy.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
