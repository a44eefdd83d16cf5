"""From latents to what a call returns: decoded, past a safety checker where there is one, in the type wanted."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from .adapt import DiffusersHost


def finished(
    pipe: Any, host: DiffusersHost, x0: Tensor, output_type: str, generator: Any, return_dict: bool
) -> ImagePipelineOutput | StableDiffusionPipelineOutput | tuple[Any, ...]:
    """The pictures of ``x0``; of a pipeline with a safety checker, also which of them it has blackened."""
    pictures: Any = x0
    flagged = None
    if output_type != "latent":
        decoded, flagged = _checked(pipe, host, host.decode(x0, generator))
        pictures = _in_type(pipe, decoded, output_type)
    if getattr(pipe, "safety_checker", None) is None:
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
    found = (pictures, flagged)
    return StableDiffusionPipelineOutput(*found) if return_dict else found


def _in_type(pipe: Any, pictures: Tensor, output_type: str) -> Any:
    return pipe.image_processor.postprocess(pictures, output_type, do_denormalize=[False] * len(pictures))


def _checked(pipe: Any, host: DiffusersHost, pictures: Tensor) -> tuple[Tensor, list[bool] | None]:
    """[B, 3, H, W] in [0, 1], those that SD's safety checker finds unsafe in black, and which they are."""
    checker = getattr(pipe, "safety_checker", None)
    if checker is None:
        return pictures, None
    seen = pipe.feature_extractor(_in_type(pipe, pictures, "pil"), return_tensors="pt").pixel_values
    if not isinstance(checker, torch.nn.Module):
        found, flagged = checker(images=pictures, clip_input=seen)
    else:
        with host.on_device(checker):
            found, flagged = checker(images=pictures, clip_input=seen.to(host.device, checker.dtype))
    return torch.as_tensor(found), flagged
