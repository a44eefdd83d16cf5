"""The rows of benchmarks/cost.py in ComfyUI: one step's call of its own guider, batches and wrappers included."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import comfy.model_patcher
import comfy.samplers
import torch
from comfy_extras.nodes_nag import NAGuidance
from comfy_steering import KINDS, WIDTHS
from comfyui_version import __version__
from cost import DOUBLED, PLAIN, SCALES, Case, Measured, Row, fill, timed
from torch import Tensor

from onestep.core.adapter_file import save_adapter
from onestep.core.families import detect
from onestep.core.guidance import Steering
from onestep.core.guidance_adapter import new_adapter
from onestep.nodes.guidance_adapter import guided_model, targets_of
from onestep.nodes.steer import steered_model

POOLED = {"sd15": 768, "sdxl": 1280, "sd3": 2048, "flux": 768, "flux2": 1}
WIDE: dict[str, dict[str, Any]] = {
    "sd15": {
        **{"model_channels": 320, "channel_mult": [1, 2, 4, 4], "num_heads": 8},
    },
    "sdxl": {
        **{"model_channels": 320, "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "num_head_channels": 64},
        **{"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]},
        "transformer_depth_middle": 10,
    },
    # SD3's width is 64 times what is called its depth
    "sd3": {
        **{"depth": 24, "num_patches": 36864, "pos_embed_max_size": 192, "qk_norm": None},
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    },
    "flux": {"hidden_size": 3072, "num_heads": 24, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56]},
    # klein 4B's
    "flux2": {"hidden_size": 3072, "num_heads": 24, "axes_dim": [32] * 4, "context_in_dim": 7680},
}


def versions() -> str:
    return f"ComfyUI {__version__}"


def model_of(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    """A MODEL with random weights."""
    family, layout = KINDS[case.family]
    layout = {**layout, **(WIDE[case.family] if case.wide else {})}
    if case.family == "sd15" and case.wide:
        here, beyond = case.blocks[0], case.blocks[0] + 1
        layout |= {"num_res_blocks": [here] * 4, "transformer_depth": [1] * 3 * here + [0] * here}
        layout["transformer_depth_output"] = [1] * 3 * beyond + [0] * beyond
    if case.family == "sd3":
        layout["num_blocks"] = case.blocks[0] + 1
    if case.family == "flux":
        layout |= {"depth": case.blocks[0], "depth_single_blocks": case.blocks[1], "vec_in_dim": POOLED["flux"]}
    if case.family == "flux2":
        layout |= {"depth": case.blocks[0], "depth_single_blocks": case.blocks[1], "guidance_embed": False}
    config = family(layout)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    if case.family == "sd3":
        del model.diffusion_model.joint_blocks[-1]
    fill(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, device, device)


class OneCall(comfy.samplers.Sampler):  # type: ignore[misc]
    """A sampler that asks for x0 once and tells how long that took."""

    def sample(self, model: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, *rest: Any) -> Tensor:
        sigma = model.inner_model.model_sampling.percent_to_sigma(0.2)
        level = torch.full((len(noise),), sigma, device=noise.device)
        self.found: Measured = timed(lambda: model(noise * sigma, level, **extra), noise.device)
        return noise


def text_of(case: Case, seed: int) -> list[Any]:
    """A CONDITIONING; all share one pooled vector."""
    draw = torch.Generator().manual_seed(seed)
    width = WIDE[case.family].get("context_in_dim") if case.wide else None
    text = torch.randn(1, case.tokens, width or WIDTHS.get(case.family, 4096), generator=draw)
    return [[text, {"pooled_output": torch.ones(1, POOLED[case.family])}]]


def without_padding(conditioning: list[Any]) -> list[Any]:
    """The same, said to have no padding, as VSF wants to know."""
    return [[text, {**more, "attention_mask": torch.ones(text.shape[:2])}] for text, more in conditioning]


def makers(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, Callable[[], Row]]:
    """What makes each row."""
    if backend:
        raise SystemExit("--compile measures diffusers' networks: leave it out, or --host comfyui")
    if case.family not in WIDE:
        raise SystemExit(f"{case.family} is measured in diffusers: leave it out, or --host comfyui")
    model, positive, negative = model_of(case, device, dtype), text_of(case, 1), text_of(case, 2)
    noise = torch.randn(1, model.model.latent_format.latent_channels, case.side, case.side)

    def row(patch: Callable[[], Any], cfg: float = 1.0) -> Row:
        patched = patch()

        def run() -> Measured:
            guider, call = comfy.samplers.CFGGuider(patched), OneCall()
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
            guider.sample(noise, torch.zeros_like(noise), call, torch.tensor([1.0, 0.0]), disable_pbar=True)
            return call.found

        return run

    found: dict[str, Callable[[], Any]] = {PLAIN: model.clone}
    for name, scale in SCALES.items():
        found[name] = partial(
            steered_model, model, without_padding(negative), Steering(name.lower(), scale), empty=text_of(case, 3)
        )
    found["AGD"] = partial(_guided, model)
    if case.family in ("sd3", "flux", "flux2"):
        found[DOUBLED[1]] = partial(_doubled, model, case)
    if case.family != "sd3":  # whose attention it does not reach
        found[DOUBLED[2]] = lambda: NAGuidance.execute(model, 5.0, 0.5, 1.5)[0]
    return {name: partial(row, patch) for name, patch in found.items()} | {DOUBLED[0]: partial(row, model.clone, 5.0)}


def _guided(model: Any) -> Any:
    """Under an adapter as a training begins with, its output layers moved away from zero."""
    family = detect(model.model.diffusion_model)
    with torch.inference_mode(False), tempfile.TemporaryDirectory() as folder:
        side = new_adapter({target.name: target for target in targets_of(model.model, family)}, family, 0)
        for parameter in side.out.parameters():
            parameter.detach().normal_(0, 0.02)
        save_adapter(Path(folder, "adapter.safetensors"), side, family)
        return guided_model(model, Path(folder, "adapter.safetensors"), 4.0)


def _doubled(model: Any, case: Case) -> Any:
    """NAG behind every joint attention: the picture's rows of both texts get the steered answer."""
    steering = Steering("nag", SCALES["NAG"]).of_family(case.family)

    def attend(inner: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **rest: Any) -> Tensor:
        found = inner(q, k, v, heads, **rest)
        positive = rest["transformer_options"]["cond_or_uncond"].index(0)
        z = found[:, case.tokens :, None].transpose(1, 2)
        pushed = steering.apart(z[positive : positive + 1], z[1 - positive : 2 - positive])
        z.copy_(pushed.expand_as(z))
        return found

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = attend
    clone.disable_model_cfg1_optimization()
    return clone
