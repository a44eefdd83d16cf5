"""What steering is compared with in ComfyUI's Python: tiny networks, and oracles that import nothing of ours.

`doubled` runs a joint network on its texts as one row each and overwrites the picture's rows after each attention;
`hooked` computes each cross-attention of a U-Net or a video network anew, behind the network's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models as supported
import torch
from comfy.ldm.flux.math import attention as flux_attention
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
SDXL = {"context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential", "use_linear_in_transformer": True}
SVD = {
    **{"in_channels": 8, "context_dim": 1024, "adm_in_channels": 768, "num_classes": "sequential"},
    **{"use_linear_in_transformer": True, "use_temporal_attention": True, "merge_strategy": "learned"},
    "extra_ff_mix_layer": True,
}
PIXART = {"hidden_size": 32, "depth": 1, "num_heads": 2, "input_size": 8, "caption_channels": 4096}
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
    "flux2": (supported.Flux2, {**FLUX, "vec_in_dim": None, "txt_ids_dims": [3], "axes_dim": [16, 16, 16, 16]}),
    "pixart": (supported.PixArtAlpha, PIXART),
}
WIDTHS = {"sd15": 768, "inpaint": 768, "sd2": 1024, "sdxl": 2048, "z_image": 64, "lumina2": 64}
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
    channels = model.model.latent_format.latent_channels
    return (channels, 2, side, side) if model.model.latent_format.latent_dimensions == 3 else (channels, side, side)


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


def doubled(model: Any, positive: Any, negative: Any, form: dict[str, Any], share: float = 0.1) -> Tensor:
    """x0 of the doubled form: one picture under the positive's pooled vector, each text as a row under its own, or by
    VSF under the positive's; [1, C, H, W]. The shorter texts are filled up with noise that nothing looks at.
    """
    base = model.model
    comfy.model_management.load_models_gpu([model])
    noise = noise_of(model)
    sigma = torch.tensor([min(float(base.model_sampling.sigma_max), base.model_sampling.percent_to_sigma(share))])
    entries = [positive[0], negative[0], *(empty_for(negative) if form["mode"] == "perp" else ())]
    texts, fill = [text for text, _ in entries], getattr(base.diffusion_model, "pad_tokens_multiple", 1)
    longest = max(-(-text.shape[1] // fill) * fill for text in texts)
    filled = [torch.cat((t, 9 * torch.randn(1, longest - t.shape[1], t.shape[2])), 1) for t in texts]
    told = base.extra_conds(**positive[0][1], noise=noise, device=noise.device)
    pictures = [noise, *(told["ref_latents"].cond if "ref_latents" in told else [])]
    image = sum(-(-picture.shape[-1] * picture.shape[-2] // 4 // fill) * fill for picture in pictures)
    told = {name: as_rows(value.cond, len(entries)) for name, value in told.items()}
    if fill > 1:
        told = {"num_tokens": longest}
    elif form["mode"] != "vsf":
        told["y"] = torch.cat([more["pooled_output"][:1] for _, more in entries])
    override = Doubled(form, [text.shape[1] for text in texts], longest, image, fill > 1)
    options = {"optimized_attention_override": override}
    with picture_under_the_positive(base.diffusion_model), learnt_filling(base.diffusion_model, texts, fill):
        x0 = base.apply_model(
            torch.cat([noise * sigma] * len(entries)),
            sigma.repeat(len(entries)),
            c_crossattn=torch.cat(filled),
            transformer_options=options,
            **told,
        )
    assert override.joint and float((x0[:1] - x0).abs().max()) < 1e-5 * float(x0.std()), "all rows hold one picture"
    return x0[:1]


@contextmanager
def learnt_filling(network: Any, texts: list[Tensor], fill: int) -> Iterator[None]:
    """Within, the tokens behind each row's text are those that Z-Image fills it up by, to the same length for all."""
    if fill == 1:
        yield
        return
    assert len({-(-text.shape[1] // fill) for text in texts}) == 1, "rows are filled up to one length here"

    def learnt(module: Any, given: Any, out: Tensor) -> Tensor:
        own = torch.tensor([text.shape[1] for text in texts])[:, None]
        return torch.where((torch.arange(out.shape[1]) < own)[..., None], out, network.cap_pad_token)

    handle = network.cap_embedder.register_forward_hook(learnt)
    try:
        yield
    finally:
        handle.remove()


def as_rows(value: Any, rows: int) -> Any:
    """A condition for each of the rows."""
    return [torch.cat([part] * rows) for part in value] if isinstance(value, list) else torch.cat([value] * rows)


@contextmanager
def picture_under_the_positive(network: Any) -> Iterator[None]:
    """Within, whatever modulates a picture is the first row's."""

    def of_first(module: Any, given: Any) -> Any:
        return (given[0][:1].expand(given[0].shape),)

    def last(module: Any, given: Any, told: Any) -> Any:
        return (given[0], given[1][:1].expand(given[1].shape)), told

    joint, double = getattr(network, "joint_blocks", ()), getattr(network, "double_blocks", ())
    layers = [*(block.x_block.adaLN_modulation for block in joint), *(block.img_mod for block in double)]
    handles = [layer.register_forward_pre_hook(of_first) for layer in layers]
    handles.append(network.final_layer.register_forward_pre_hook(last, with_kwargs=True))
    singles = list(getattr(network, "single_blocks", ()))
    for block in singles:
        block.forward = partial(single_block, block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in singles:
            del block.forward


def single_block(block: Any, x: Tensor, vec: Tensor, pe: Tensor, transformer_options: Any, **rest: Any) -> Tensor:
    """x + g (W [attention(n), gelu(m)]), (q, k, v, m) = V n, n = (1 + s) LN(x) + t: s, t and g of a text's tokens by
    its row's vector, of the picture's by the first's."""
    length = transformer_options["optimized_attention_override"].longest
    shift, scale, gate = (
        torch.cat((part.expand(-1, length, -1), part[:1].expand(len(x), x.shape[1] - length, -1)), 1)
        for part in block.modulation.lin(torch.nn.functional.silu(vec))[:, None].chunk(3, -1)
    )
    n = block.linear1((1 + scale) * block.pre_norm(x) + shift)
    qkv, m = n[..., : 3 * block.hidden_size], n[..., 3 * block.hidden_size :]
    q, k, v = qkv.unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = block.norm(q, k, v)
    found = flux_attention(q, k, v, pe=pe, transformer_options=transformer_options)
    return x + gate * block.linear2(torch.cat((found, torch.nn.functional.gelu(m, approximate="tanh")), 2))


class Doubled:
    """An attention override over rows [text, image], the shorter texts filled up: the positive's comes first.

    learnt: what fills a text up is seen, but for the negative's by VSF's picture.
    """

    def __init__(
        self, form: dict[str, Any], lengths: list[int], longest: int, image: int, learnt: bool = False
    ) -> None:
        self.form, self.lengths, self.longest, self.image, self.joint = form, lengths, longest, image, 0
        self.seen = [longest] * len(lengths) if learnt else lengths

    def __call__(
        self, attend: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **rest: Any
    ) -> Tensor:
        flat = not rest.get("skip_reshape")
        parts = [x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) if flat else x for x in (q, k, v)]
        out = self.steered(*parts) if parts[1].shape[2] == self.longest + self.image else look(*parts)
        out = out.to(q)
        return out if rest.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def steered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.joint += 1
        seen = torch.full((len(self.lengths), 1, 1, k.shape[2]), -math.inf, dtype=torch.float64)
        for row, length in enumerate(self.seen):
            seen[row, ..., :length] = seen[row, ..., self.longest :] = 0
        out = look(q, k, v, seen)
        if self.form["mode"] == "vsf":
            keys = [torch.cat((x[:1, :, : self.seen[0]], x[:1, :, self.longest :]), 2) for x in (k, v)]
            negative = [x[1:, :, : self.lengths[1]] for x in (k, v)]
            picture = flipped(self.form, q[:1, :, self.longest :], *keys, *negative)
        else:
            picture = pushed(self.form, *out[:, :, self.longest :].split(1))
        return torch.cat((out[:, :, : self.longest], picture.expand(len(out), -1, -1, -1)), 2)


@contextmanager
def hooked(model: Any, negative: Tensor, form: dict[str, Any], extra: Any = None) -> Iterator[None]:
    """Within it, each cross-attention of a U-Net or a video network gives the steered answer, by a hook behind it.

    negative: [B or 1, L, C] tokens. extra: what another patch adds to the positive's answer, of its queries.
    """
    network = model.model.diffusion_model
    embed = getattr(network, "text_embedding", lambda text: text)
    others = [
        negative,
        *(empty_for([[negative, {"pooled_output": negative}]])[0][:1] if form["mode"] == "perp" else ()),
    ]

    def answer(q: Tensor, found: list[Tensor], *refused: list[Tensor], added: Tensor | float = 0.0) -> Tensor:
        if form["mode"] == "vsf":
            return flipped(form, q, *found, *refused[0]) + added
        return pushed(form, look(q, *found) + added, *(look(q, *text) for text in refused))

    def hook(module: Any, given: Any, told: Any, out: Tensor) -> Tensor:
        x, context = given[0], told.get("context", given[-1])
        pictures = told.get("context_img_len")
        against = (embed(other.to(context).expand(len(x), -1, -1)) for other in others)
        texts = (context if pictures is None else context[:, pictures:], *against)
        (q, *found), *rest = (projected(module, x, text) for text in texts)
        z = answer(q, found, *(text[1:] for text in rest), added=0.0 if extra is None else extra(q))
        if hasattr(module, "k_img") and pictures is None:  # without pictures the network shows its text once more
            z = z + answer(q, *(of_pictures(module, text, q) for text in texts))
        elif hasattr(module, "k_img"):
            z = z + look(q, *of_pictures(module, context[:, :pictures], q))
        return getattr(module, "to_out", getattr(module, "o", None))(z.to(x).transpose(1, 2).flatten(2))

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
    else:
        made = (module.norm_q(module.q(x)), module.norm_k(module.k(text)), module.v(text))
        heads = module.num_heads
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in made]


def of_pictures(module: Any, seen: Tensor, q: Tensor) -> list[Tensor]:
    """Keys and values [B, H, L, D] of reference pictures in a video network, with the heads of q."""
    made = (module.norm_k_img(module.k_img(seen)), module.v_img(seen))
    return [part.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for part in made]
