"""Diversity in diffusers: the base draws a picture's first part, a few-step pipeline the rest (arXiv:2503.10637)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.cond import Cond
from ..core.diversity import base_levels, descend, remaining
from ..core.errors import OneStepError
from ..core.recipe import Recipe, recipe_of
from ..core.schedule import of_size
from .adapt import DiffusersHost, denoiser_of, network_of
from .call_values import checked, texts_of
from .one_step import Generator, OneStepPipeline

GUIDANCE = 4.0


@torch.no_grad()
def diverse(
    fast: OneStepPipeline,
    prompt: str | Sequence[str],
    *,
    base: Any = None,
    base_steps: int = 20,
    guidance: float | None = None,
    hand_over: float = 0.0,
    recipe: Recipe | str | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_images_per_prompt: int = 1,
    generator: Generator = None,
    seed: int | None = None,
    adapter_name: str = "onestep",
    **call: Any,
) -> Any:
    """Pictures whose first part the base draws in its many steps, and the rest ``fast`` by its recipe.

    fast: with a One-Step LoRA, or a few-step model by itself. base: the pipeline that begins, over the same autoencoder
    and with a network of its own; None is ``fast`` without the LoRA ``adapter_name``, all its other LoRAs left on.
    base_steps: of the base's whole run, 1 to 1000; it takes only those above the hand-over. guidance: the base's scale
    (None: 4), for Flux-dev the one that it is told (None: 3.5).
    hand_over: where ``fast`` takes over, as a share of its time in 0 to 1; 0 is its second step. A recipe of one step
    needs a level that the model was trained at. negative_prompt: one for all pictures.
    All else as `OneStepPipeline` takes it. Raises OneStepError where nothing is left to the base, or the two do not
    share an autoencoder.

        fast = OneStepPipeline.from_pipe(pipe)
        fast.load_one_step_lora("four_steps.safetensors")
        pictures = diverse(fast, "a lighthouse in a storm", num_images_per_prompt=4, seed=0).images
    """
    recipe = fast.recipe if recipe is None else recipe_of(recipe)
    few, many = fast.host(recipe), _base_host(fast, recipe, base)
    _check(fast, base, base_steps)
    trained = recipe.sizes[0] if recipe.sizes else few.native_size
    size = width or trained[0], height or trained[1]
    prompts = texts_of(prompt)
    generator = checked(len(prompts), num_images_per_prompt, generator, seed)
    rest = remaining(recipe, few.denoiser.schedule, hand_over)
    shape = many.latent_shape(size)
    levels = base_levels(of_size(many.denoiser.schedule, shape), base_steps, few.denoiser.schedule, rest)
    cond, null, scale = _told(many, prompts, negative_prompt, size, guidance)
    cond = cond.repeat(num_images_per_prompt).to(many.device)
    noise = _noise(many, (len(cond), *shape), generator)
    with _without(network_of(fast), adapter_name) if base is None else nullcontext():
        latents = descend(many.denoiser, levels, cond, cond.null_like(null.to(many.device)), noise, scale)
    shared: dict[str, Any] = {"negative_prompt": negative_prompt, "num_images_per_prompt": num_images_per_prompt}
    return fast(
        prompts, recipe=rest, latents=latents, generator=generator, width=size[0], height=size[1], **shared, **call
    )


def _base_host(fast: OneStepPipeline, recipe: Recipe, base: Any) -> DiffusersHost:
    """The base behind the contract; what the recipe's network answers is not what the base answers."""
    if base is None:
        return fast.host(recipe.of_base)
    return DiffusersHost(base, denoiser_of(base), network_of(base).device)


def _told(
    host: DiffusersHost, prompts: list[str], negative: str, size: tuple[int, int], guidance: float | None
) -> tuple[Cond, Cond, float]:
    """The base's conditions, its negative, and the scale of classifier-free guidance."""
    cond, null = host.encode(prompts, size), host.encode([negative], size, negative=True)
    if host.denoiser.guidance == "cfg":
        return cond, null, GUIDANCE if guidance is None else guidance
    if host.denoiser.guidance == "embedded" and guidance is not None:
        return cond.with_(guidance=torch.full((len(cond),), float(guidance))), null, 1.0
    return cond, null, 1.0 if guidance is None else guidance


def _noise(host: DiffusersHost, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return randn_tensor(shape, generator=generator, device=host.device, dtype=host.network.dtype).float()


@contextmanager
def _without(network: Any, adapter: str) -> Iterator[None]:
    """Within, the network's LoRA of this name adds nothing."""
    layers = [module for module in network.modules() if adapter in getattr(module, "scaling", {})]
    if not layers or any(adapter in layer.merged_adapters for layer in layers):
        raise OneStepError(
            f"this pipeline has no LoRA {adapter!r:.60} that can be taken off for the base's part: load it with "
            "load_one_step_lora and do not fuse it, or give the base as a pipeline of its own"
        )
    scales = [layer.scaling[adapter] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[adapter] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[adapter] = scale


def _check(fast: OneStepPipeline, base: Any, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise OneStepError(f"base_steps is {steps!r:.40}: give a whole number from 1 to 1000; 20 is usual")
    if base is None:
        return
    if network_of(base) is network_of(fast):
        raise OneStepError(
            "base and fast share one network, LoRA and all: leave base out, or load the base as a pipeline of its own"
        )
    told = ("latent_channels", "scaling_factor", "shift_factor", "z_dim", "latents_mean", "latents_std")
    kinds = [{name: vae[name] for name in told if vae.get(name)} for vae in (fast.vae.config, base.vae.config)]
    if kinds[0] != kinds[1]:
        raise OneStepError(
            f"the base's autoencoder ({_words(kinds[1])}) is not the few-step model's ({_words(kinds[0])}): a picture "
            "can pass only between models of one autoencoder"
        )


def _words(kind: dict[str, Any]) -> str:
    """An autoencoder's channels and scale, for a person; statistics of each channel would be a page."""
    return ", ".join(f"{name} {value}" for name, value in kind.items() if not isinstance(value, list | tuple))
