"""What a pipeline is called with, checked before anything is computed: texts, noise, sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError

OUTPUTS = ("pil", "np", "pt", "latent")
SEEDS = range(-(2**63), 2**64)


def checked(prompts: int, each: Any, generator: Any, seed: Any, output_type: Any = "pil") -> Any:
    """The generator, that of ``seed`` where there is one, for ``each`` pictures of ``prompts`` prompts."""
    if output_type not in OUTPUTS:
        raise OneStepError(f"output_type is {output_type!r:.40}: choose one of {', '.join(OUTPUTS)}")
    generator = generator_of(generator, seed)
    check_generator(generator, prompts * check_count(each, "num_images_per_prompt"))
    return generator


def texts_of(value: Any, name: str = "prompt") -> list[str]:
    """``value``, a text or several, as a list. Raises OneStepError for none, and for what is no text."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise OneStepError(f"{name} is {value!r:.60}, no text: give a text, or a list of texts")
    texts = list(value)
    if not texts:
        raise OneStepError(f"{name} is an empty list: give at least one text")
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise OneStepError(f"{name} number {number} is {text!r:.60}, a {type(text).__name__}: give a text")
    return texts


def generator_of(generator: Any, seed: int | None) -> Any:
    """The generator of ``seed``, where there is one, on the CPU; else ``generator``."""
    if seed is None:
        return generator
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in SEEDS:
        raise OneStepError(f"seed is {seed!r:.40}: give a whole number from {SEEDS.start} to {SEEDS.stop - 1}")
    return torch.Generator().manual_seed(seed)


def check_generator(generator: Any, pictures: int) -> None:
    """Raises OneStepError where this is neither none, one generator for all pictures, nor one for each."""
    listed = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
    strange = [found for found in listed if not isinstance(found, torch.Generator)]
    if strange:
        raise OneStepError(f"generator holds {strange[0]!r:.60}: give a torch.Generator, or a list of them")
    if isinstance(generator, list | tuple) and len(generator) != pictures:
        raise OneStepError(
            f"there are {len(generator)} generators for {pictures} pictures: give one for all, or one for each picture"
        )


def check_latents(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """``latents``, which must be ``shape`` of finite numbers."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        what = f"a tensor of {latents.dtype}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        raise OneStepError(f"latents is {what}: give a tensor of standard normal noise, {list(shape)}")
    if tuple(latents.shape) != shape:
        raise OneStepError(
            f"latents is {list(latents.shape)}, these pictures start from {list(shape)}: give that shape, one row for "
            "each picture, or another width and height"
        )
    if not bool(latents.isfinite().all()):
        raise OneStepError("latents holds numbers that are not finite (NaN or infinite): give standard normal noise")
    return latents


def check_count(value: Any, name: str) -> int:
    """``value`` as a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OneStepError(f"{name} is {value!r:.40}: give a whole number of at least 1")
    return value
