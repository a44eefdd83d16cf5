"""`Load Control Adapter`: a control trained by method nct as a CONTROL_NET, for core's Apply ControlNet."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import comfy.controlnet
import comfy.ldm.common_dit
import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy_api.latest import io
from torch import Tensor

from ..core.adapter_file import load_adapter
from ..core.control import ControlAdapter, cells_of, check_fit, entry_of, fitted, of_one_frame, tokens
from ..core.control_copy import MAKERS, ControlCopy
from ..core.controls import with_mask
from ..core.errors import OneStepError
from ..core.families import FAMILIES, bind_comfy, detect
from .control_entry import behind_entry, entering
from .places import ADAPTERS, files_of, named_places, path_of, stamp

MASK = "mask"
KINDS = (ADAPTERS, "controlnet")
"""Folders that may hold a control adapter."""
PATCH = 2
"""Latents along a side of one token of SD3 and Flux."""
FIRST_BLOCK = ("double_block", 0)


class LoadControlAdapter(io.ComfyNode):  # type: ignore[misc]
    """Load a control adapter made by OneStep."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepLoadControl",
            display_name="Load Control Adapter",
            category="OneStep/loaders",
            description="Loads a control adapter made by OneStep (method nct) for core's Apply ControlNet. It belongs "
            "to the one-step LoRA that it was trained with.",
            search_aliases=["control", "controlnet", "t2i adapter", "nct", "canny", "edges"],
            inputs=[
                io.Combo.Input(
                    "control_name",
                    options=files_of(*KINDS),
                    tooltip="A file in models/onestep, where Train Adapter puts it (its output file can be plugged in "
                    "here), or in models/controlnet.",
                ),
            ],
            outputs=[
                io.ControlNet.Output(
                    tooltip="For Apply ControlNet. Its image is the control itself (edges, say), not the picture that "
                    "they are of; another size than the picture's is resized, and the log says so."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, control_name: Any = "", **unused: Any) -> Any:
        return stamp(control_name, *KINDS)

    @classmethod
    def execute(cls, control_name: str) -> io.NodeOutput:
        with named_places():
            adapter = load_adapter(path_of(control_name, *KINDS), MAKERS)
        return io.NodeOutput(ControlAdapterNet(adapter.module.requires_grad_(False).eval(), adapter.family))


class ControlAdapterNet(comfy.controlnet.ControlBase):  # type: ignore[misc]
    """The adapter's features as what ComfyUI's U-Net adds behind its input blocks and its middle block, or as what the
    first block of SD3, Flux, FLUX.2, Qwen-Image takes besides its picture, or as what the entry of Z-Image, Lumina 2,
    Wan and PixArt gives; a copy's as core's ControlNet has them."""

    def __init__(self, adapter: ControlAdapter | ControlCopy, family: str, patcher: Any = None) -> None:
        super().__init__()
        self.adapter, self.family = adapter, family
        self.patcher = patcher or comfy.model_patcher.ModelPatcher(
            adapter, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
        )
        self.patch = FAMILIES[family].patch
        self.compression_ratio = adapter.config.cell
        self.concat_mask = adapter.config.control == MASK
        self.cond_hint: Tensor | None = None
        self.sampling: Any = None
        self.blocks: list[int | None] = []
        self.inputs = 0
        self.entry: Any = None

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Find the adapter's places in the model about to be sampled. Raises OneStepError for another base."""
        super().pre_run(model, percent_to_timestep_function)
        network, family = model.diffusion_model, detect(model.diffusion_model)
        if family != self.family:
            raise OneStepError(
                f"this control adapter was made for {self.family[:40]!r} models, this one is {family!r}: use it with "
                "the base that it was made for"
            )
        targets = {t.name: t for t in bind_comfy(family, network, model.model_config.unet_config)}
        if (entry := entry_of(family, network)) is not None:
            targets[entry.name] = entry
        check_fit(self.adapter, targets)
        self.sampling, self.entry = model.model_sampling, targets[self.adapter.config.places[0].name].module
        if FAMILIES[family].unet:
            paths = {module: path for path, module in network.named_modules()}
            places = [paths[targets[place.name].module] for place in self.adapter.config.places]
            found = [re.match(r"input_blocks\.(\d+)\.", path) for path in places]
            self.blocks = [int(match[1]) if match else None for match in found]
            self.inputs = len(network.input_blocks)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, transformer_options: Any) -> Any:
        """What the network adds, and what the controls before this one add."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.timestep_range is not None and not self.timestep_range[1] <= t[0] <= self.timestep_range[0]:
            return previous
        of_frames = x_noisy.ndim == 5  # a video's, of which a picture is one
        features = self._features(of_one_frame(x_noisy) if of_frames else x_noisy, t, cond, batched_number)
        known = FAMILIES[self.family]
        if known.unet:
            return self.control_merge(self._residuals(features), previous, x_noisy.dtype)
        # the options are this call's own; core's lists begin behind the first block, which is too late
        added = self.strength * tokens(features[0])
        if known.one_stream or known.cross_attention or of_frames:  # whose blocks cannot be replaced
            behind_entry(self.entry, added, transformer_options)
        else:
            replaced = transformer_options.setdefault("patches_replace", {}).setdefault("dit", {})
            replaced[FIRST_BLOCK] = entering(added, replaced.get(FIRST_BLOCK))
        return previous

    def _features(self, x: Tensor, t: Tensor, cond: Any, batched_number: int) -> list[Tensor]:
        """The adapter's, for latents ``x`` at the levels ``t`` and the prompts ``cond``, in the order of its places."""
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch, self.patch))
        hint = comfy.controlnet.broadcast_image_to(self._hint(x), len(x), batched_number).expand(len(x), -1, -1, -1)
        if isinstance(self.adapter, ControlCopy):
            seen, time = self.sampling.calculate_input(t, x), self.sampling.timestep(t).float()
            text = cond.get("crossattn_controlnet", cond["c_crossattn"])
            return self.adapter(seen, time, text.to(x.device), hint, vector=cond.get("y"))  # type: ignore[no-any-return]
        if not self.adapter.config.latents:
            return self.adapter(hint)
        grid = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        cells = cells_of(self.sampling.calculate_input(t, x), grid)
        if FAMILIES[self.family].innermost:
            cells = cells.unflatten(1, (-1, self.patch**2)).transpose(1, 2).flatten(1, 2)
        return self.adapter(hint, cells)

    def _residuals(self, features: list[Tensor]) -> dict[str, list[Any]]:
        """{"input": behind each input block, last first; "middle"; "output"}, as a U-Net takes them."""
        if isinstance(self.adapter, ControlCopy):
            return {"input": [], "middle": features[-1:], "output": list(features[:-1])}
        inputs: list[Tensor | None] = [None] * self.inputs
        middle = []
        for block, feature in zip(self.blocks, features, strict=True):
            if block is None:
                middle.append(feature)
            else:
                inputs[block] = feature
        return {"input": inputs[::-1], "middle": middle, "output": []}

    def _hint(self, x: Tensor) -> Tensor:
        """The control picture [b, C, H, W] for latents ``x``, kept for the next call."""
        height, width = (side // self.patch * self.compression_ratio for side in x.shape[-2:])
        if self.cond_hint is None or self.cond_hint.shape[-2:] != (height, width):
            self.cond_hint = _sized(self._picture(), (width, height)).to(x.device, torch.float32)
        return self.cond_hint

    def _picture(self) -> Tensor:
        """The control picture as the adapter takes it, in its own size."""
        picture, channels = self.cond_hint_original, self.adapter.config.channels
        if self.concat_mask:
            kept = self.extra_concat_orig[0].to(picture)  # core tells 1 where the picture stays
            return with_mask(picture[:, :3], 1 - fitted(kept, (picture.shape[-1], picture.shape[-2])))
        if channels == 1:
            return picture[:, :3].mean(1, keepdim=True)
        if picture.shape[1] < channels:
            raise OneStepError(
                f"the control image has {picture.shape[1]} channels, this {self.adapter.config.control[:40]!r} adapter "
                f"takes {channels}: choose another image"
            )
        return picture[:, :channels]

    def copy(self) -> ControlAdapterNet:
        found = ControlAdapterNet(self.adapter, self.family, self.patcher)
        self.copy_to(found)
        return found

    def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> ControlAdapterNet:
        adapter = copy.deepcopy(self.adapter)
        patcher = comfy.model_patcher.ModelPatcher(adapter, load_device, management.unet_offload_device())
        found = ControlAdapterNet(adapter, self.family, patcher)
        self.copy_to(found)
        if autoregister:
            self.multigpu_clones[load_device] = found
        return found

    def get_models(self) -> list[Any]:
        return [*super().get_models(), self.patcher]

    def cleanup(self) -> None:
        self.sampling = self.entry = None
        super().cleanup()


def _sized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    found = picture.shape[-1], picture.shape[-2]
    if found != size:
        logging.warning("OneStep: the control image is resized from %dx%d to %dx%d", *found, *size)
    return fitted(picture.float(), size)


NODES = [LoadControlAdapter]
