"""A loaded diffusers pipeline as a host: its network behind the contract, its own text encoding, its decoder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.compiled import uncompile, unwrapped
from ..core.cond import Cond
from ..core.denoiser import PREDICTIONS, Denoiser
from ..core.errors import OneStepError
from ..core.families import (
    FAMILIES,
    bind_diffusers,
    blocks_of,
    check_size,
    detect,
    refuse_text,
    select,
)
from ..core.licences import BASE, BASE_LORA, Part
from ..core.lora_fused import Host as LoraHost
from ..core.recipe import Recipe
from ..core.roles import Roles
from ..core.stored import holds_float8, in_float8
from ..core.weights_hash import hash_of
from .autoencoder import Autoencoder, differentiable, factor_of, native_size, refuse_decoder_alone
from .encode import encode_text
from .flux_attention import fused_attention
from .kinds import pipeline_for
from .modular import name_of
from .network_inputs import Extras
from .networks import NETWORKS, has_ip_adapter, port_of
from .places import channels_last, is_quantized, on_device, place
from .schedules import prediction_of, schedule_in
from .steer_served import is_steered
from .text import encoders_of
from .trainable import prepare
from .two_experts import refuse_kind
from .variants import refuse_variant

PROMPTS_AT_ONCE = 16


def adapt(pipe: Any, *, targets: str = "all", device: torch.device | str | None = None) -> DiffusersHost:
    """A pipeline of a family in `core.families` as a host.

    targets: which layers carry adapters, "all", "attention+mlp" or "attention". device: where it trains and draws;
    by default where the network lies. Raises OneStepError for a pipeline of another kind.
    """
    refuse_kind(pipe)
    network = network_of(pipe)
    prepare(pipe, network)
    device = torch.device(device or network.device)
    if in_float8(network) and not holds_float8(device):
        raise OneStepError(f"{device} does not hold float8: load the base in float16 or bfloat16")
    warn_of_float32(network, device)
    if has_ip_adapter(network):
        raise OneStepError("this pipeline has an IP-Adapter, which is not trained with: call unload_ip_adapter() first")
    roles = Roles(select(bind_diffusers(network), targets), port_of(network))
    host = DiffusersHost(pipe, denoiser_of(pipe, roles), device)
    roles.install()
    host.compile_again = uncompile(network)
    return host


def warn_of_float32(network: Any, device: torch.device) -> None:
    """Weights that diffusers loaded without being told a dtype take twice the memory on a GPU, and twice the time."""
    half = FAMILIES[detect(network)].half
    if device.type != "cpu" and network.dtype == torch.float32:
        warnings.warn(
            f"the {type(network).__name__} is float32 on {device}: twice the memory and half the speed, or less. Load "
            f"it with from_pretrained(..., torch_dtype=torch.{half}); the adapters are float32 all the same",
            stacklevel=3,
        )


def network_of(pipe: Any) -> Any:
    """The pipeline's U-Net or transformer, as it was before torch.compile."""
    return unwrapped(called_network(pipe))


def called_network(pipe: Any) -> Any:
    """What the pipeline calls: its U-Net or transformer, or what torch.compile made of it."""
    # a compiled network has no truth value
    for network in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)):
        if isinstance(network, nn.Module):
            return network
    raise OneStepError(f"a {type(pipe).__name__} has no U-Net or transformer: give a loaded text-to-image pipeline")


def target_names(network: Any) -> list[str]:
    """Names of the targets, also where a LoRA is attached."""
    try:
        return [target.name for target in bind_diffusers(network)]
    except OneStepError:
        return [path for path, module in network.named_modules() if hasattr(module, "lora_A")]


def denoiser_of(
    pipe: Any, roles: Roles | None = None, *, recipe: Recipe | None = None, extras: Extras | None = None
) -> Denoiser:
    """D(x, sigma, cond) -> x0 of a pipeline's network. recipe: what the network answers, and the times that it is
    given, where that is not as the scheduler says. extras: what it is given beside latents, time and text."""
    network = network_of(pipe)
    family = detect(network)
    refuse_variant(family, network, getattr(pipe, "text_encoder_2", None), getattr(pipe, "vae", None))
    answered = recipe.prediction if recipe is not None else None
    wrap = PREDICTIONS[answered or prediction_of(pipe.scheduler)]
    # adapters hang in the network itself; without any it is called as the pipeline calls it, compiled or not
    called = network if roles is not None else called_network(pipe)
    return wrap(
        NETWORKS[family](called, extras or Extras()),
        schedule_in(pipe, family),
        roles or Roles([]),
        FAMILIES[family].guidance_of(network.config),
        recipe.time_scale if recipe is not None else 1.0,
        # for adapters' rows, texts of several lengths are calls of their own; whatever else acts on rows sees one batch
        max(FAMILIES[family].filled, int(FAMILIES[family].one_stream)) if roles is not None else 0,
        FAMILIES[family].norm,
    )


@dataclass
class DiffusersHost:
    """See `training.host.Host`. ``on_poll`` is called at every micro-step and raises to cancel."""

    pipe: Any
    denoiser: Denoiser
    device: torch.device
    on_poll: Callable[[], None] | None = None
    memory_required: int = 0
    streamed: bool = False

    def __post_init__(self) -> None:
        self.network = network_of(self.pipe)
        self.family = detect(self.network)
        self._known = FAMILIES[self.family]
        self.name = Path(name_of(self.pipe) or type(self.pipe).__name__).name
        self.blocks = blocks_of(self.network)
        self.in_place: list[nn.Module] = []
        self._decoder: Autoencoder | None = None
        self.compile_again: Callable[[], None] = lambda: None

    @property
    def loader(self) -> LoraHost:
        return "diffusers"

    @property
    def made_of(self) -> list[Part]:
        told = name_of(self.pipe)
        loras = [(BASE_LORA, str(name), None) for name in getattr(self.network, "peft_config", {})]
        return [(BASE, self.name, Path(told) if told and Path(told).exists() else None), *loras]

    @cached_property
    def base_hash(self) -> str:
        return hash_of([self.network])

    @cached_property
    def encoder_hash(self) -> str:
        return hash_of(encoders_of(self.pipe))

    # -- text and pictures --------------------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int], padded: bool = True, negative: bool = False
    ) -> Cond:
        """The conditions of ``prompts`` at ``size`` (width, height), by the pipeline's own encode_prompt. padded,
        negative: as in `encode_text`."""
        return self.with_sizes(self.texts(prompts, padded, negative).to("cpu", torch.float32), size)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], padded: bool = True, negative: bool = False) -> Cond:
        """What ``encode`` gives without what a size adds, in the encoders' own dtype. A few prompts at a time, each
        part on the CPU at once."""
        with self.on_device(*encoders_of(self.pipe)):
            starts = range(0, len(prompts), PROMPTS_AT_ONCE)
            few = (prompts[start : start + PROMPTS_AT_ONCE] for start in starts)
            encoded = partial(encode_text, self.pipe, padded=padded, device=self.device, negative=negative)
            found = [encoded(texts).to("cpu") for texts in few]
        refuse_text(self.family, self.network.config, found[0].text.shape[-1])
        return Cond.concat(found)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within, the text encoders lie on the device, and the network off it where that is a card: both may be too
        much for it."""
        away = [] if self.device.type == "cpu" or is_quantized(self.network) else [self.network]
        with on_device(torch.device("cpu"), *away), self.on_device(*encoders_of(self.pipe)):
            yield

    @property
    def kind(self) -> str:
        """Whose encode_prompt the pipeline's is, one of `kinds.PIPELINES`."""
        return pipeline_for(self.network)

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        """``cond`` with what this family reads beside the text: SDXL the sizes, Flux-dev its guidance."""
        width, height = size
        if self.sdxl:
            ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            return cond.with_(size=ids.expand(len(cond), 6).clone())
        if self.denoiser.guidance == "embedded":
            return cond.with_(guidance=torch.full((len(cond),), self._known.usual_guidance))
        return cond

    @property
    def sdxl(self) -> bool:
        """Whether the U-Net is told pooled text and sizes."""
        return self._known.unet and self.network.config.addition_embed_type == "text_time"

    def decode(self, latents: Tensor, generator: Any = None) -> Tensor:
        """[B, 3, H, W] pictures in [0, 1]. generator: one, or one a picture, for an autoencoder that draws noise."""
        draws = generator if isinstance(generator, list | tuple) else [generator] * len(latents)
        return self._autoencoder.decode(latents, draws)

    def decoding(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        return differentiable(self.pipe.vae, self.device)

    def latents_of(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] pictures in [0, 1] -> latents (the posterior's mode) in the model's own scale, as in decode."""
        refuse_decoder_alone(self.pipe.vae, self.name)
        return self._autoencoder.encode(pictures)

    @property
    def _autoencoder(self) -> Autoencoder:
        """Of the VAE that the pipeline has now."""
        if self._decoder is None or self._decoder.vae is not self.pipe.vae:
            self._decoder = Autoencoder(self.pipe.vae, self.device)
        return self._decoder

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        width, height = size
        factor = self._known.folded * factor_of(self.pipe.vae)
        check_size(self.name, self.family, size, factor)
        return self._known.channels(self.network.config), height // factor, width // factor

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels at which the model was trained."""
        return native_size(self.pipe, self.network)

    # -- training -----------------------------------------------------------------------------------------------------

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within, the network is frozen on the training device, encoders and VAE are off it. All is undone after."""
        if any(hasattr(module, "_hf_hook") for module in self.network.modules()):
            raise OneStepError("this pipeline is under CPU offload: call pipe.remove_all_hooks() before training it")
        if is_steered(self.network):
            raise OneStepError("this pipeline is steered by a negative: leave `steered` before training it")
        others = [*encoders_of(self.pipe), self.pipe.vae]
        places = [(module, module.device) for module in (self.network, *others)]
        flags = [(parameter, parameter.requires_grad) for parameter in self.network.parameters()]
        mode, checkpointing = self.network.training, self.network.is_gradient_checkpointing
        try:
            if not self.streamed:
                place(self.network, self.device)
            for module in others:
                place(module, torch.device("cpu"))
            self.network.requires_grad_(False).eval()
            # diffusers' own checkpointing would recompute under whatever role is active then
            self.network.disable_gradient_checkpointing()
            last = self._known.unet and self.device.type == "cuda"
            with channels_last(self.network, last), fused_attention(self.network):
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            self.network.train(mode)
            if checkpointing:
                self.network.enable_gradient_checkpointing()
            for module, before in places:
                place(module, before)

    def release(self) -> None:
        """Take the adapters' hooks off the network: the pipeline is as it was."""
        self.denoiser.roles.remove()
        self.compile_again()

    def check_file(self, path: Path) -> str:
        from .check import check_file

        return check_file(self.pipe, path)

    def poll(self) -> None:
        if self.on_poll is not None:
            self.on_poll()

    def on_device(self, *modules: Any) -> AbstractContextManager[None]:
        """Within, ``modules`` lie on the training device; afterwards again where they were."""
        return on_device(self.device, *modules)
