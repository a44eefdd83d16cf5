"""A MODEL without its weights, as a host on the meta device: what `training.plan` counts a run on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfyui_version
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..core.cond import Cond
from ..core.families import FAMILIES, bind_comfy, blocks_of, detect, in_place_of, select
from ..core.licences import Part
from ..core.lora_fused import Host as LoraHost
from ..core.roles import Roles
from ..training.host import Shells
from ..training.plan.trace import DECODE
from .denoiser import ComfyDenoiser, framed, port_of, schedule_of, unframed, with_sizes
from .origin import name_of
from .refusals import refuse_patches, refuse_variant
from .rotary import training_options
from .stored import hollow_weight, is_quantised, keep_stored, take_room

META = torch.device("meta")


@torch.inference_mode(False)
def hollow(module: nn.Module) -> Any:
    """A copy whose weights are on the meta device, without the hooks that others have put on it."""
    told: dict[int, Any] = {}
    for value in (*module.parameters(), *module.buffers()):
        empty = (
            hollow_weight(value) if is_quantised(value) else torch.empty(value.shape, dtype=value.dtype, device=META)
        )
        told[id(value)] = nn.Parameter(empty, False) if isinstance(value, nn.Parameter) else empty
    for name in ("model_config", "latent_format"):  # read alone, and made so that they cannot be copied
        if hasattr(module, name):
            told[id(getattr(module, name))] = getattr(module, name)
    if getattr(module, "current_patcher", None) is not None:
        told[id(module.current_patcher)] = None
    found = copy.deepcopy(module, told)
    for part, twin in zip(found.modules(), module.modules(), strict=True):
        take_room(part, twin)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return found


def shells_of(model: Any, vae: Any | None, targets: str) -> Shells:
    """Of ``model``, made when it is first asked for."""
    made: list[Shell] = []

    def shell(chosen: str) -> Shell:
        if not made:
            made.append(Shell(model, vae, targets))
        return made[0].shell(chosen)

    return shell


class Shell:
    """See `training.host.Host`. vae: None where no picture is decoded."""

    encoder_hash = base_hash = "none"
    memory_required = 0
    streamed = False
    made_of: Sequence[Part] = ()

    def __init__(self, model: Any, vae: Any | None, targets: str) -> None:
        refuse_patches(model)
        self.family = detect(model.model.diffusion_model)
        self._known = FAMILIES[self.family]
        self.name, self.device = name_of(model), META
        refuse_variant(self.family, model.model, self.name)
        self.model = hollow(model.model)
        self.network = self.model.diffusion_model
        keep_stored(self.network)
        self._decoder = None if vae is None else hollow(vae.first_stage_model)
        self._config = self.model.model_config.unet_config
        guidance, schedule = self._known.guidance_of(self._config), schedule_of(model.model.model_sampling, self.family)
        options = training_options(self.family)
        self.denoiser: Any = ComfyDenoiser(self.model, schedule, Roles([]), guidance, options, self._known.lengths)
        self.blocks, self.in_place = blocks_of(self.network), in_place_of(self.network)
        self.shell(targets)

    def shell(self, targets: str) -> Shell:
        """Itself, with new adapters on ``targets``."""
        bound = select(bind_comfy(self.family, self.network, self._config), targets)
        self.denoiser.roles = Roles(bound, port_of(self.network, self.family))
        return self

    @property
    def loader(self) -> LoraHost:
        return "comfyui"

    @property
    def configuration(self) -> str:
        """What its count hangs on beside its weights' shapes: its configuration, its layers, and whose code runs
        them."""
        told = sorted((name, repr(value)) for name, value in self._config.items())
        kinds = type(self.model.model_sampling).__mro__, self.model.manual_cast_dtype, self.denoiser.guidance
        decoder = [(tuple(value.shape), value.dtype) for value in self._decoder.parameters()] if self._decoder else None
        return repr((comfyui_version.__version__, told, kinds, repr(self.network), repr(self._decoder), decoder))

    def encode(self, prompts: Sequence[str], size: tuple[int, int], negative: bool = False) -> Cond:
        return self.with_sizes(self.texts(prompts), size)

    def texts(self, prompts: Sequence[str], negative: bool = False) -> Cond:
        """Zeros in the place of texts, in their shapes."""
        width, pooled = self._known.widths(self._config)
        told = torch.zeros(len(prompts), pooled) if pooled else None
        return Cond(torch.zeros(len(prompts), self._known.tokens, width), pooled=told)

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        if self._known.unet and cond.pooled is not None:
            return with_sizes(cond, size)
        embedded, usual = self.denoiser.guidance == "embedded", self._known.usual_guidance
        return cond.with_(guidance=torch.full((len(cond),), usual)) if embedded else cond

    @contextmanager
    def encoding(self) -> Iterator[None]:
        yield

    def latents_of(self, pictures: Tensor) -> Tensor:
        """As many as ``pictures``, without numbers."""
        height, width = pictures.shape[2:]
        return torch.empty(len(pictures), *self.latent_shape((width, height)), device=self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The first picture in the place of each, while the decoder's weights are there; without a decoder, none of its
        work."""
        if self._decoder is None:
            channels, height, width = latents.shape[1:]
            return torch.zeros(len(latents), 3, 8 * height, 8 * width)
        weights = [torch.empty_like(weight) for weight in self._decoder.parameters()]
        dtype = next(self._decoder.parameters()).dtype
        with record_function(DECODE):
            picture: Tensor = self._decoder.decode(framed(self.model, latents[:1].to(META, dtype))).float().cpu()
        del weights
        return unframed(self.model, picture).expand(len(latents), -1, -1, -1)

    @contextmanager
    def decoding(self) -> Iterator[Any]:
        """With the decoder's weights there; without a decoder, none of its work."""
        weights = [torch.empty_like(weight) for weight in self._decoder.parameters()] if self._decoder else []

        def decode(latents: Tensor) -> Tensor:
            if self._decoder is None:
                wide = latents.mean(1, keepdim=True).expand(-1, 3, -1, -1)
                return wide.repeat_interleave(8, -1).repeat_interleave(8, -2)
            made = self._decoder.decode(framed(self.model, latents.to(next(self._decoder.parameters()).dtype)))
            return unframed(self.model, made.float())

        yield decode
        del weights

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        latent = self.model.latent_format
        factor = getattr(latent, "spacial_downscale_ratio", 8)
        return latent.latent_channels, height // factor, width // factor

    @contextmanager
    def training(self) -> Iterator[None]:
        before, management.in_training = management.in_training, True  # Flux' rotary embedding has a backward then
        try:
            yield
        finally:
            management.in_training = before

    def check_file(self, path: Path) -> str:
        return ""

    def poll(self) -> None:
        return None
