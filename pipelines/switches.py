"""What diffusers' pipelines switch on and off in their parts: tiled and sliced decoding, FreeU, fused projections."""

from __future__ import annotations

from typing import Any

from ..core.errors import OneStepError
from .adapt import network_of


class Switches:
    """For a pipeline with a ``vae`` and a U-Net or transformer."""

    def enable_vae_tiling(self: Any) -> None:
        """Decode in overlapping tiles, which takes less memory at large sizes."""
        _of(self.vae, "enable_tiling")()

    def disable_vae_tiling(self: Any) -> None:
        _of(self.vae, "disable_tiling")()

    def enable_vae_slicing(self: Any) -> None:
        """Decode picture by picture, as this pipeline does anyway; it also acts where the VAE is called directly."""
        _of(self.vae, "enable_slicing")()

    def disable_vae_slicing(self: Any) -> None:
        _of(self.vae, "disable_slicing")()

    def enable_freeu(self: Any, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (arXiv:2309.11497), of U-Nets alone: s1, s2 weaken skips, b1, b2 strengthen the backbone."""
        _of(network_of(self), "enable_freeu")(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self: Any) -> None:
        _of(network_of(self), "disable_freeu")()

    def fuse_qkv_projections(self: Any, unet: bool = True, vae: bool = True) -> None:
        """One matrix for query, key and value. unet: of the U-Net or transformer. Not while a LoRA is loaded."""
        network = network_of(self)
        if unet and any(hasattr(module, "lora_A") for module in network.modules()):
            raise OneStepError("projections under a LoRA cannot be fused: fuse_lora() of plain() first, or unload it")
        for part in _chosen(self, unet, vae):
            _of(part, "fuse_qkv_projections")()

    def unfuse_qkv_projections(self: Any, unet: bool = True, vae: bool = True) -> None:
        for part in _chosen(self, unet, vae):
            _of(part, "unfuse_qkv_projections")()


def _chosen(pipe: Any, unet: bool, vae: bool) -> list[Any]:
    return [part for part, wanted in ((network_of(pipe), unet), (pipe.vae, vae)) if wanted]


def _of(part: Any, name: str) -> Any:
    found = getattr(part, name, None)
    if found is None:
        raise OneStepError(f"a {type(part).__name__} has no {name}: this model does without")
    return found
