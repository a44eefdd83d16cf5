"""The rows of benchmarks/cost.py on diffusers' networks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cost_modern as modern
import diffusers
import torch
from cost import DOUBLED, PLAIN, SCALES, Case, Row, fill, timed
from torch import Tensor, nn

from onestep.core.adapter_file import save_adapter
from onestep.core.cond import Cond
from onestep.core.families import bind_diffusers, detect
from onestep.core.guidance import Steering
from onestep.core.guidance_adapter import new_adapter
from onestep.pipelines.guidance_adapter import GuidanceDial, load_guidance_adapter
from onestep.pipelines.steer import steered

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    **{"cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "block_out_channels": (320, 640, 1280)},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
    **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    **{"transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True},
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
    **{"projection_class_embeddings_input_dim": 2816},
}
TOYS = {
    "sd15": {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 4, "norm_num_groups": 8},
    "sdxl": {
        **{"block_out_channels": (32, 64, 64), "attention_head_dim": 4, "norm_num_groups": 8},
        "transformer_layers_per_block": (1, 1, 2),
    },
    "sd3": {"attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128},
    "flux": {"attention_head_dim": 128, "num_attention_heads": 1},
    "flux2": {"num_attention_heads": 1, "joint_attention_dim": 64},
    "chroma": {"num_attention_heads": 1, "approximator_hidden_dim": 64},
    "krea2": {
        **{"attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256},
        **{"text_hidden_dim": 40, "text_intermediate_size": 128, "axes_dims_rope": (4, 6, 6)},
    },
    "z_image": {"dim": 288, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [8, 8, 8]},
    **modern.TOYS,
}
Inputs = dict[str, Any]


def versions() -> str:
    return f"diffusers {diffusers.__version__}"


def network_of(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    """With random weights."""
    toy = {} if case.wide else TOYS[case.family]
    with torch.device("meta"):
        network = MAKERS[case.family](case, toy)
    empty = {name: torch.empty_like(t, device=device, dtype=dtype) for name, t in network.state_dict().items()}
    network.load_state_dict(empty, assign=True)
    fill(network)
    return network.eval().requires_grad_(False)


def _sd3(case: Case, toy: dict[str, Any]) -> Any:
    wide = {"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    network = diffusers.SD3Transformer2DModel(
        **{**wide, **toy}, sample_size=128, pos_embed_max_size=192, num_layers=case.blocks[0] + 1, out_channels=16
    )
    del network.transformer_blocks[-1]
    return network


def _flux(case: Case, toy: dict[str, Any]) -> Any:
    double, single = case.blocks
    return diffusers.FluxTransformer2DModel(**toy, num_layers=double, num_single_layers=single, guidance_embeds=True)


def _chroma(case: Case, toy: dict[str, Any]) -> Any:
    double, single = case.blocks
    network = diffusers.ChromaTransformer2DModel(**toy, num_layers=double, num_single_layers=single)
    with torch.device("cpu"):  # its buffer is in no file
        count = network.time_text_embed.mod_proj.shape[0]
        network.time_text_embed = type(network.time_text_embed)(num_channels=16, out_dim=count)
    return network


def _z_image(case: Case, toy: dict[str, Any]) -> Any:
    layers, refiners = case.blocks
    lengths = {"axes_lens": [1536, 512, 512]}
    return diffusers.ZImageTransformer2DModel(**lengths, **toy, n_layers=layers, n_refiner_layers=refiners)


def _flux2(case: Case, toy: dict[str, Any]) -> Any:
    """klein 4B's width."""
    double, single = case.blocks
    wide = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
    return diffusers.Flux2Transformer2DModel(**{**wide, **toy}, num_layers=double, num_single_layers=single)


MAKERS: dict[str, Callable[[Case, dict[str, Any]], Any]] = {
    "sd15": lambda case, toy: diffusers.UNet2DConditionModel(**{**SD15, **toy}, layers_per_block=case.blocks[0]),
    "sdxl": lambda case, toy: diffusers.UNet2DConditionModel(**{**SDXL, **toy}, layers_per_block=case.blocks[0]),
    "sd3": _sd3,
    "flux": _flux,
    "flux2": _flux2,
    "chroma": _chroma,
    "krea2": lambda case, toy: diffusers.Krea2Transformer2DModel(**toy, num_layers=case.blocks[0]),
    "z_image": _z_image,
    **modern.MAKERS,
}


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Arguments of the network's forward, for one picture."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)

    own = {"z_image": _of_z_image, "krea2": _of_krea2, **dict.fromkeys(modern.MAKERS, modern.inputs_of)}
    if case.family in own:
        return own[case.family](case, device, draw)
    text = {"sd15": 768, "sdxl": 2048, "flux2": 7680 if case.wide else 64}.get(case.family, 4096)
    told: Inputs = {"encoder_hidden_states": draw(1, case.tokens, text), "return_dict": False}
    told["timestep"] = torch.tensor([700.0], device=device)
    if case.family in ("sd15", "sdxl"):
        told["sample"] = draw(1, 4, case.side, case.side)
    if case.family == "sdxl":
        told["added_cond_kwargs"] = {"text_embeds": draw(1, 1280), "time_ids": 1024 * torch.ones(1, 6, device=device)}
    if case.family == "sd3":
        told |= {"hidden_states": draw(1, 16, case.side, case.side), "pooled_projections": draw(1, 2048)}
    if case.family in ("flux", "chroma"):
        told |= {"hidden_states": draw(1, (case.side // 2) ** 2, 64), **_of_flux(case, device, draw)}
    if case.family == "flux2":
        zero, side, tokens = torch.zeros(1), torch.arange(case.side).float(), torch.arange(case.tokens).float()
        told |= {"hidden_states": draw(1, case.side**2, 128), "timestep": torch.tensor([0.7], device=device)}
        told |= {"img_ids": torch.cartesian_prod(zero, side, side, zero).to(device)}
        told |= {"txt_ids": torch.cartesian_prod(zero, zero, zero, tokens).to(device)}
    return told


def _of_z_image(case: Case, device: torch.device, draw: Callable[..., Tensor]) -> Inputs:
    told: Inputs = {"x": [draw(16, 1, case.side, case.side)], "cap_feats": [draw(case.tokens, 2560)]}
    return told | {"t": torch.tensor([0.3], device=device), "return_dict": False}


def _of_krea2(case: Case, device: torch.device, draw: Callable[..., Tensor]) -> Inputs:
    """Of each of a text's tokens twelve layers of its encoder; all lie at the origin."""
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(case.side // 2).float()] * 2)
    told: Inputs = {"encoder_hidden_states": draw(1, case.tokens, 12, 2560 if case.wide else 40), "return_dict": False}
    told |= {"hidden_states": draw(1, len(places), 64), "timestep": torch.tensor([0.7], device=device)}
    return told | {"position_ids": nn.functional.pad(places, (0, 0, case.tokens, 0)).to(device)}


def _of_flux(case: Case, device: torch.device, draw: Callable[..., Tensor]) -> Inputs:
    """Time and places; Flux is told a pooled text and a guidance besides."""
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(case.side // 2).float()] * 2)
    told: Inputs = {"img_ids": places.to(device), "txt_ids": torch.zeros(case.tokens, 3, device=device)}
    told["timestep"] = torch.tensor([0.7], device=device)
    if case.family == "chroma":
        return told
    return told | {"pooled_projections": draw(1, 768), "guidance": torch.tensor([3.5], device=device)}


def twice(told: Inputs, negative: Tensor) -> Inputs:
    """The same picture with either text."""
    alone = ("img_ids", "txt_ids", "position_ids", "padding_mask")

    def double(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: double(key, part) for key, part in value.items()}
        if isinstance(value, list):
            return [*value, *value]
        return torch.cat([value, value]) if isinstance(value, Tensor) and name not in alone else value

    both = {name: double(name, value) for name, value in told.items()}
    if "cap_feats" in told:
        return both | {"cap_feats": [*told["cap_feats"], *negative]}
    return both | {"encoder_hidden_states": torch.cat([told["encoder_hidden_states"], negative])}


def without_padding(text: Tensor) -> Cond:
    """The same, said to have no padding: a text without numbers is not looked at."""
    return Cond(text, mask=torch.tensor([[True] * text.shape[1]], device=text.device))


def answer(found: Any) -> Tensor:
    """Z-Image's is a list of pictures."""
    return torch.stack(found) if isinstance(found, list) else found


def makers(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> dict[str, Callable[[], Row]]:
    """What makes each row; it has modules of its own over the same weights, so that a compiled one stays as it is."""
    network, told = network_of(case, device, dtype), inputs_of(case, device, dtype)
    prompt = torch.stack(told["cap_feats"]) if "cap_feats" in told else told["encoder_hidden_states"]
    negative = torch.flip(prompt, (2,))
    places = [part for part in network.children() if next(part.parameters(), None) is None]  # numbers besides weights
    shared = [*network.parameters(), *network.buffers(), *places]

    def row(prepare: Callable[[Any], Any] = nn.Module.eval, given: Inputs = told, mode: str = "") -> Row:
        twin = copy.deepcopy(network, {id(part): part for part in shared})
        kept = ExitStack()
        kept.callback(lambda dial: None, prepare(twin))
        called = torch.compile(twin, backend=backend) if backend else twin
        if mode:
            pipe, scale = SimpleNamespace(unet=called, scheduler=None), SCALES[mode.upper()]
            away = negative.flatten(2)  # Krea 2's layers of a token lie beside one another
            text, empty = without_padding(away), without_padding(away.roll(1, 1))
            kept.enter_context(steered(pipe, text, mode, scale=scale, empty=empty))
        return lambda kept=kept: timed(lambda: answer(called(**given)[0]), device)

    found = {PLAIN: row, **{name: partial(row, mode=name.lower()) for name in SCALES}}
    found["AGD"] = partial(row, _guided)
    found[DOUBLED[0]] = partial(row, given=twice(told, negative))
    if case.family in ("sd3", "flux", "flux2", "chroma", "qwen"):
        found[DOUBLED[1]] = partial(row, lambda twin: _doubled(twin, case), twice(told, negative))
    return found


def _guided(network: nn.Module) -> GuidanceDial:
    """With an adapter as a training begins with, its output layers moved away from zero."""
    side = new_adapter({target.name: target for target in bind_diffusers(network)}, detect(network), 0)
    for parameter in side.out.parameters():
        parameter.normal_(0, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder, "adapter.safetensors"), side, detect(network))
        return load_guidance_adapter(network, Path(folder, "adapter.safetensors"))


def _doubled(network: Any, case: Case) -> None:
    """NAG behind every joint attention: the picture's rows of both texts get the steered answer."""
    steering = Steering("nag", SCALES["NAG"]).of_family(detect(network))

    def push(z: Tensor) -> None:
        z.copy_(steering.apart(z[:1, None], z[1:, None])[:, 0].expand_as(z))

    def of_double(layer: nn.Module, args: tuple[Tensor]) -> None:
        push(args[0])

    def of_single(layer: nn.Module, args: tuple[Tensor]) -> None:
        push(args[0][:, case.tokens :, : network.inner_dim])

    for block in network.transformer_blocks:
        block.attn.to_out[0].register_forward_pre_hook(of_double)
    for block in getattr(network, "single_transformer_blocks", ()):
        getattr(block, "proj_out", getattr(block.attn, "to_out", None)).register_forward_pre_hook(of_single)
