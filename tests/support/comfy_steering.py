"""What steering is compared with in ComfyUI's Python: tiny networks, and oracles that import nothing of ours.

`hooked` computes each cross-attention of a U-Net or a video network anew, behind the network's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models as supported
import torch
from torch import Tensor

UNET = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2]},
    **{"num_res_blocks": [1, 1], "transformer_depth": [1, 2], "transformer_depth_output": [1, 1, 2, 1]},
    **{"transformer_depth_middle": 1, "use_spatial_transformer": True, "legacy": False},
}
LINEAR = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
SD3 = {
    **{"input_size": None, "patch_size": 2, "in_channels": 16, "out_channels": 16, "depth": 2, "num_patches": 256},
    **{"pos_embed_max_size": 16, "adm_in_channels": 2048, "qk_norm": "rms", "context_embedder_config": LINEAR},
}
FLUX = {
    **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 2048, "context_in_dim": 4096},
    **{"hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "patch_size": 2},
    **{"axes_dim": [16, 24, 24], "theta": 10000, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []},
}
WAN = {
    **{"image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2},
    **{"in_dim": 16, "out_dim": 16, "text_dim": 4096, "freq_dim": 32, "patch_size": (1, 2, 2)},
}
Z_IMAGE = {
    **{"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 288, "cap_feat_dim": 64, "n_layers": 2},
    **{"n_refiner_layers": 1, "qk_norm": True, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [8, 8, 8]},
    **{"axes_lens": [64, 32, 32], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True},
    **{"time_scale": 1000.0, "pad_tokens_multiple": 32},
}
FLUX2 = {
    **{"image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None},
    **{"context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 3.0, "num_heads": 2, "depth": 1, "theta": 2000},
    **{"depth_single_blocks": 1, "axes_dim": [8, 8, 8, 8], "qkv_bias": False, "ops_bias": False},
    **{"guidance_embed": True, "txt_ids_dims": [3], "global_modulation": True, "mlp_silu_act": True},
    **{"default_ref_method": "index", "ref_index_scale": 10.0},
}
QWEN_IMAGE = {
    **{"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 32},
    **{"num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)},
}
CHROMA = {
    **{"image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": None},
    **{"context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "theta": 10000},
    **{"depth_single_blocks": 1, "axes_dim": [8, 12, 12], "qkv_bias": True, "txt_ids_dims": []},
    **{"in_dim": 64, "out_dim": 64, "hidden_dim": 40, "n_layers": 2},
}
KREA2 = {
    **{"image_model": "krea2", "features": 64, "channels": 16, "patch": 2, "layers": 2, "heads": 4, "kvheads": 2},
    **{"tdim": 32, "txtlayers": 4, "txtdim": 16, "txtheads": 2, "txtkvheads": 2},
}
SDXL = {"context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True}
SVD = {
    **{"in_channels": 8, "context_dim": 1024, "adm_in_channels": 768, "num_classes": "sequential"},
    **{"use_linear_in_transformer": True, "use_temporal_attention": True, "merge_strategy": "learned"},
    "extra_ff_mix_layer": True,
}
PIXART = {
    **{"hidden_size": 48, "depth": 2, "num_heads": 2, "input_size": 8, "caption_channels": 4096, "pe_interpolation": 1},
    **{"micro_condition": False, "model_max_length": 300},
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (supported.SD15, {**UNET, "context_dim": 768, "use_linear_in_transformer": False}),
    "inpaint": (supported.SD15, {**UNET, "in_channels": 9, "context_dim": 768, "use_linear_in_transformer": False}),
    "sd2": (supported.SD20, {**UNET, "context_dim": 1024, "use_linear_in_transformer": True}),
    "sdxl": (supported.SDXL, {**UNET, **SDXL}),
    "sd3": (supported.SD3, SD3),
    "sd35": (supported.SD3, {**SD3, "x_block_self_attn_layers": [0]}),
    "flux": (supported.Flux, FLUX),
    "z_image": (supported.ZImage, Z_IMAGE),
    "lumina2": (supported.ZImage, {**Z_IMAGE, "z_image_modulation": False, "pad_tokens_multiple": None}),
    "wan": (supported.WAN21_T2V, WAN),
    "wan-i2v": (supported.WAN21_I2V, {**WAN, "model_type": "i2v", "in_dim": 36}),
    "video unet": (supported.SVD_img2vid, {**UNET, **SVD}),
    "flux2": (supported.Flux2, FLUX2),
    "klein": (supported.Flux2, {**FLUX2, "guidance_embed": False}),
    "qwen_image": (supported.QwenImage, QWEN_IMAGE),
    "chroma": (supported.Chroma, CHROMA),
    "krea2": (supported.Krea2, KREA2),
    "numbered": (supported.Flux, {**FLUX, "vec_in_dim": None, "txt_ids_dims": [1, 2]}),
    "pixart": (supported.PixArtSigma, PIXART),
    "pixart alpha": (supported.PixArtAlpha, {**PIXART, "micro_condition": True}),
}
WIDTHS = {"sd15": 768, "inpaint": 768, "sd2": 1024, "sdxl": 2048, "z_image": 64, "qwen_image": 64, "lumina2": 64}
WIDTHS |= dict.fromkeys(("flux2", "klein", "chroma", "krea2"), 64)
POOLED = {"sdxl": 1280, "sd3": 2048, "sd35": 2048, "flux": 2048}
FORMS = {
    "nasa": {"mode": "nasa", "scale": 0.4},
    "nag": {"mode": "nag", "scale": 4.0, "tau": 1.2, "alpha": 0.6, "order": 1},
    "vsf": {"mode": "vsf", "scale": 1.5, "offset": 0.1},
    "perp": {"mode": "perp", "scale": 4.0, "tau": 1.2, "alpha": 0.6, "order": 1, "weight": 1.3, "keep": 1.6},
}


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of ComfyUI's own class with random weights; no number in it is trivially 0 or 1."""
    family, layout = KINDS[kind]
    config = family(layout)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device="cpu")
    fill(model.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    patcher.cached_patcher_init = (lambda *given, disable_dynamic=False: tiny(*given), (kind, dtype))
    return patcher


def fill(network: torch.nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        spread = 0.1 if tensor.ndim < 2 else torch.Size(tensor.shape[1:]).numel() ** -0.5
        middle = 1.0 if tensor.ndim < 2 and name.endswith(("weight", "scale")) else 0.0
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * spread + middle)


def checkpoint(folder: Any, kind: str) -> Any:
    """The MODEL of a tiny checkpoint, by ComfyUI's own loader."""
    path = str(folder / f"tiny_{kind}.safetensors")
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]


def condition(kind: str, length: int, seed: int, batch: int = 1) -> list[Any]:
    """A random CONDITIONING of one text without padding, as CLIP Text Encode (Negative) makes it."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, length, WIDTHS.get(kind, 4096), generator=draw)
    pooled = torch.randn(batch, POOLED.get(kind, 768), generator=draw)
    return [[text, {"pooled_output": pooled, "onestep_unpadded": (text, text)}]]


def empty_for(negative: Any) -> list[Any]:
    """What stands for the empty text beside a negative."""
    text, told = negative[0]
    draw = torch.Generator().manual_seed(11)
    zero = torch.randn(1, 4, text.shape[-1], generator=draw)
    return [[zero, {"pooled_output": torch.randn(1, told["pooled_output"].shape[-1], generator=draw)}]]


def shape_of(model: Any, side: int = 8) -> tuple[int, ...]:
    latent, network = model.model.latent_format, model.model.diffusion_model
    side = max(side, 36) if hasattr(network, "t_block") else side  # PixArt's smallest picture
    picture = hasattr(network, "txt_in") or hasattr(network, "txtmlp")
    channels, frames = latent.latent_channels, 1 if picture else 2
    return (channels, frames, side, side) if latent.latent_dimensions == 3 else (channels, side, side)


class Probe(comfy.samplers.Sampler):
    """A sampler that takes x0 at given levels and leaves the latents as they are."""

    def __init__(self, shares: tuple[float, ...]) -> None:
        self.shares, self.found = shares, []

    def sample(self, model: Any, sigmas: Tensor, extra: Any, callback: Any, noise: Tensor, *rest: Any) -> Tensor:
        schedule = model.inner_model.model_sampling
        for share in self.shares:
            sigma = torch.full((len(noise),), min(float(schedule.sigma_max), schedule.percent_to_sigma(share)))
            self.found.append(model(noise * sigma[0], sigma.to(noise), **extra))
        return noise


def noise_of(model: Any, batch: int = 1, side: int = 8) -> Tensor:
    return torch.randn(batch, *shape_of(model, side), generator=torch.Generator().manual_seed(3))


def x0_of(
    model: Any,
    positive: Any,
    negative: Any = None,
    cfg: float = 1.0,
    shares: tuple[float, ...] = (0.1,),
    noise: Tensor | None = None,
) -> Tensor:
    """What the MODEL makes of a noise at the given shares of its schedule, by ComfyUI's own guider: [S, B, ...]."""
    noise = noise_of(model) if noise is None else noise
    probe, guider = Probe(shares), comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} | ({"negative": negative} if negative is not None else {}))
    guider.set_cfg(cfg)
    guider.sample(noise, torch.zeros_like(noise), probe, torch.tensor([1.0, 0.0]), disable_pbar=True)
    return torch.stack(probe.found).clone()


# -- the oracles ------------------------------------------------------------------------------------------------------


def look(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v in float64; [B, H, L, D]."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


def pushed(form: dict[str, Any], positive: Tensor, negative: Tensor, empty: Tensor | None = None) -> Tensor:
    """NASA (arXiv:2412.02687) or NAG (arXiv:2505.21179) of Z+ and Z-, [B, H, N, D] each. With Z0, NAG limits
    Z+ + (s - 1) (a - n b'): a and b are measured from Z0, b' loses ``keep`` times its part along a (arXiv:2304.04968).
    """
    if form["mode"] == "nasa":
        return positive - form["scale"] * negative
    guided = form["scale"] * positive - (form["scale"] - 1) * negative
    if empty is not None:
        a, b = positive - empty, negative - empty
        b = b - form["keep"] * (a * b).sum(-1, keepdim=True).clamp_min(0) / (a * a).sum(-1, keepdim=True) * a
        guided = positive + (form["scale"] - 1) * (a - form["weight"] * b)
    ratio = guided.abs().sum((1, 3), keepdim=True) / positive.abs().sum((1, 3), keepdim=True)
    limited = guided * torch.minimum(ratio, torch.full_like(ratio, form["tau"])) / ratio
    return form["alpha"] * limited + (1 - form["alpha"]) * positive


def flipped(form: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, k_negative: Tensor, v_negative: Tensor) -> Tensor:
    """VSF (arXiv:2508.10931): one softmax over both texts' keys, the negative's scores less the offset, V- := -s V-."""
    bias = torch.zeros(k.shape[2] + k_negative.shape[2], dtype=torch.float64)
    bias[k.shape[2] :] = -form["offset"]
    return look(q, torch.cat((k, k_negative), 2), torch.cat((v, -form["scale"] * v_negative), 2), bias)


@contextmanager
def hooked(model: Any, negative: Tensor, form: dict[str, Any], extra: Any = None) -> Iterator[None]:
    """Within it, each cross-attention of a U-Net or a video network gives the steered answer, by a hook behind it.

    negative: [B or 1, L, C] tokens. extra: what another patch adds to the positive's answer, of its queries.
    """
    network = model.model.diffusion_model
    embed = getattr(network, "text_embedding", lambda text: text)
    embed = network.y_embedder.y_proj if hasattr(network, "t_block") else embed
    others = [
        negative,
        *(empty_for([[negative, {"pooled_output": negative}]])[0][:1] if form["mode"] == "perp" else ()),
    ]

    def answer(q: Tensor, found: list[Tensor], *refused: list[Tensor], added: Tensor | float = 0.0) -> Tensor:
        if form["mode"] == "vsf":
            return flipped(form, q, *found, *refused[0]) + added
        return pushed(form, look(q, *found) + added, *(look(q, *text) for text in refused))

    def hook(module: Any, given: Any, told: Any, out: Tensor) -> Tensor:
        x, context = given[0], told["context"] if "context" in told else given[1]
        context = context.reshape(len(x), -1, context.shape[2])  # PixArt's is all texts in a row
        pictures = told.get("context_img_len")
        against = (embed(other.to(context).expand(len(x), -1, -1)) for other in others)
        texts = (context if pictures is None else context[:, pictures:], *against)
        (q, *found), *rest = (projected(module, x, text) for text in texts)
        z = answer(q, found, *(text[1:] for text in rest), added=0.0 if extra is None else extra(q))
        if hasattr(module, "k_img") and pictures is None:  # without pictures the network shows its text once more
            z = z + answer(q, *(of_pictures(module, text, q) for text in texts))
        elif hasattr(module, "k_img"):
            z = z + look(q, *of_pictures(module, context[:, :pictures], q))
        last = next(getattr(module, name) for name in ("to_out", "o", "proj") if hasattr(module, name))
        return last(z.to(x).transpose(1, 2).flatten(2))

    modules = [module for name, module in network.named_modules() if name.endswith(("attn2", "cross_attn"))]
    if form.get("layers") == "decoder":
        encoder = {id(module) for module in network.input_blocks.modules()}
        modules = [module for module in modules if id(module) not in encoder]
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def projected(module: Any, x: Tensor, text: Tensor) -> list[Tensor]:
    """A cross-attention's queries, keys and values, [B, H, L, D]."""
    if hasattr(module, "to_q"):
        made, heads = (module.to_q(x), module.to_k(text), module.to_v(text)), module.heads
    elif hasattr(module, "kv_linear"):
        made, heads = (module.q_linear(x), *module.kv_linear(text).chunk(2, -1)), module.num_heads
    else:
        made = (module.norm_q(module.q(x)), module.norm_k(module.k(text)), module.v(text))
        heads = module.num_heads
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in made]


def of_pictures(module: Any, seen: Tensor, q: Tensor) -> list[Tensor]:
    """Keys and values [B, H, L, D] of reference pictures in a video network, with the heads of q."""
    made = (module.norm_k_img(module.k_img(seen)), module.v_img(seen))
    return [part.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for part in made]
