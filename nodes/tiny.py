"""`Load Tiny Demo Model`: the bundled tiny text-to-image models as MODEL, CLIP and VAE."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..core.errors import OneStepError
from .tiny_models.model import load_tiny

BUNDLED = Path(__file__).resolve().parents[1] / "pipelines" / "tiny"
NAMES = ("tiny", "tiny-flow", "tiny-dit")


def bundled_folder(name: str) -> Path:
    folder = BUNDLED / name
    if name not in NAMES or not (folder / "model_index.json").is_file():
        raise OneStepError(
            f"the tiny model {name!r} is not in this installation: choose one of {', '.join(NAMES)}, or install "
            f"the pack again"
        )
    return folder


class LoadTinyDemoModel(io.ComfyNode):  # type: ignore[misc]
    """A real text-to-image model in miniature, on which the other nodes can be tried within seconds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepLoadTinyModel",
            display_name="Load Tiny Demo Model",
            category="OneStep/loaders",
            description="A bundled miniature text-to-image model (32x32 pictures of dungeon tiles) on which "
            "everything can be tried.",
            search_aliases=["demo", "test model", "toy"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(NAMES),
                    tooltip="tiny: a Stable Diffusion style U-Net that predicts noise. tiny-flow: an SD3 style "
                    "transformer with flow matching. tiny-dit: a Z-Image style transformer, also with flow matching.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The denoiser; made for 32x32 pixels, i.e. 8x8 latents."),
                io.Clip.Output(tooltip="Its text encoder; prompts of up to about 22 tokens, e.g. 'a red dragon'."),
                io.Vae.Output(tooltip="Its autoencoder, 4 pixels per latent."),
            ],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*load_tiny(bundled_folder(name)))


NODES = [LoadTinyDemoModel]
