"""diffusers' real networks at the least size that has every kind of layer, with seeded weights, inputs and adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CosmosTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from small_in_comfy import IN_COMFY as IN_COMFY
from torch import Tensor, nn

from onestep.pipelines.padding_mask import without_torchvision

Inputs = dict[str, Tensor]


def sd15() -> nn.Module:
    """SD1.5's layout: convolutions around the transformers, the last level without attention."""
    return UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 32},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 24},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4},
    )


def sdxl(embedded: int = 8) -> nn.Module:
    """SDXL's layout: Linears around the transformers, two transformer blocks at the bottom, embedded sizes (each in
    ``embedded`` numbers; 256 in ComfyUI)."""
    return UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
        **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24},
        **{"transformer_layers_per_block": (1, 1, 2), "use_linear_projection": True, "attention_head_dim": (2, 4, 4)},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": embedded},
        **{"projection_class_embeddings_input_dim": 6 * embedded + 16},
    )


def sd3(**more: Any) -> nn.Module:
    """SD3-medium's layout."""
    return SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2},
        **{"attention_head_dim": 64, "num_attention_heads": 2, "caption_projection_dim": 128},
        **{"joint_attention_dim": 24, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
        **more,
    )


def sd35() -> nn.Module:
    """SD3.5-medium's layout: the first block attends twice, queries and keys are normed."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux() -> nn.Module:
    """Flux-dev's layout: one double and one single block."""
    return FluxTransformer2DModel(
        **{"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128},
        **{"num_attention_heads": 1, "joint_attention_dim": 24, "pooled_projection_dim": 16, "guidance_embeds": True},
    )


def z_image() -> nn.Module:
    """Z-Image's layout: two blocks after one of refining for each stream. The least width whose feed-forwards are alike
    in both hosts, and that is more than the 256 of the time's embedding."""
    return ZImageTransformer2DModel(
        **{"dim": 288, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 12, "n_kv_heads": 12, "cap_feat_dim": 24},
        **{"axes_dims": [8, 8, 8], "axes_lens": [128, 32, 32]},
    )


def flux2(**more: Any) -> nn.Module:
    """FLUX.2's layout: one double and one single block; dev's embeds its guidance, klein's does not."""
    return Flux2Transformer2DModel(
        **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2},
        **{"joint_attention_dim": 24, "axes_dims_rope": (8, 8, 8, 8), **more},
    )


def qwen_image() -> nn.Module:
    """Qwen-Image's layout: two blocks of two streams."""
    return QwenImageTransformer2DModel(
        **{"num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24},
        axes_dims_rope=(8, 12, 12),
    )


def chroma(**more: Any) -> nn.Module:
    """Chroma's layout: one double and one single block; as many as in ``WHOLE`` where both hosts are compared."""
    more = {"num_layers": 1, "num_single_layers": 1} | more
    return ChromaTransformer2DModel(
        **{"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)},
        **{"approximator_hidden_dim": 40, **more},
    )


def pixart(**more: Any) -> nn.Module:
    """PixArt-Sigma's layout: two blocks."""
    return PixArtTransformer2DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "cross_attention_dim": 48},
        **{"caption_channels": 24, "sample_size": 64, "use_additional_conditions": False, **more},
    )


def anima(**more: Any) -> nn.Module:
    """Anima's layout: two blocks, modulations of rank 16."""
    without_torchvision()
    return CosmosTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "text_embed_dim": 24},
        **{"adaln_lora_dim": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None, **more},
    )


def krea2() -> nn.Module:
    """Krea 2's layout: two blocks, grouped queries, and a text of three layers that its own blocks fuse."""
    return Krea2Transformer2DModel(
        **{"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 256, "timestep_embed_dim": 32, "axes_dims_rope": (4, 6, 6)},
        **{"text_hidden_dim": 8, "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2},
        text_intermediate_size=128,
    )


def wan(**more: Any) -> nn.Module:
    """Wan's layout: two blocks."""
    return WanTransformer3DModel(
        **{
            **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "freq_dim": 32, "ffn_dim": 40},
            **{"num_layers": 2, **more},
        }
    )


def lumina2() -> nn.Module:
    """Lumina 2's layout: two blocks after one of refining for each stream, three queries' heads for one of keys."""
    return Lumina2Transformer2DModel(
        **{"hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 6, "num_kv_heads": 2},
        **{"multiple_of": 128, "axes_dim_rope": (4, 6, 6), "axes_lens": (300, 32, 32), "cap_feat_dim": 24},
    )


def unet_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 4, 8, 8), "time": torch.tensor([801.0, 37.0]), "text": draw(2, 5, 24)}


def sdxl_inputs(draw: Callable[..., Tensor]) -> Inputs:
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [96, 64, 8, 0, 64, 64]])
    return {**unet_inputs(draw), "pooled": draw(2, 16), "sizes": sizes}


def sd3_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 8), "time": torch.tensor([801.0, 37.0]), "text": draw(2, 5, 24), "pooled": draw(2, 16)}


def flux_inputs(draw: Callable[..., Tensor]) -> Inputs:
    inputs = {"x": draw(2, 16, 8, 8), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}
    return {**inputs, "pooled": draw(2, 16), "guidance": torch.tensor([3.5, 3.5])}


def z_image_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def flux2_inputs(draw: Callable[..., Tensor]) -> Inputs:
    inputs = {"x": draw(2, 128, 4, 6), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}
    return {**inputs, "guidance": torch.tensor([4.0, 2.5])}


def qwen_image_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def chroma_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def pixart_inputs(draw: Callable[..., Tensor]) -> Inputs:
    """No less than ComfyUI can place."""
    return {"x": draw(2, 4, 32, 36), "time": torch.tensor([801.0, 37.0]), "text": draw(2, 5, 24)}


def anima_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def krea2_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def wan_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([750.0, 125.0]), "text": draw(2, 5, 24)}


def lumina2_inputs(draw: Callable[..., Tensor]) -> Inputs:
    return {"x": draw(2, 16, 8, 12), "time": torch.tensor([0.75, 0.125]), "text": draw(2, 5, 24)}


def run_unet(network: Any, inputs: Inputs) -> Tensor:
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["sizes"]} if "pooled" in inputs else None
    return network(inputs["x"], inputs["time"], inputs["text"], added_cond_kwargs=added).sample


def run_sd3(network: Any, inputs: Inputs) -> Tensor:
    return network(inputs["x"], inputs["text"], inputs["pooled"], inputs["time"]).sample


def run_flux(network: Any, inputs: Inputs) -> Tensor:
    """Latents in and out as pictures: 2 x 2 pixels are one token, channels first."""
    x = inputs["x"]
    batch, channels, height, width = x.shape
    tiles = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    tokens = tiles.reshape(batch, height * width // 4, channels * 4)
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] += torch.arange(height // 2)[:, None]
    places[..., 2] += torch.arange(width // 2)[None]
    own = {"pooled_projections": "pooled", "guidance": "guidance"}
    predicted = network(
        **{"hidden_states": tokens, "encoder_hidden_states": inputs["text"], "timestep": inputs["time"]},
        **{"img_ids": places.reshape(-1, 3), "txt_ids": torch.zeros(inputs["text"].shape[1], 3)},
        **{name: inputs[given] for name, given in own.items() if given in inputs},
    ).sample
    tiles = predicted.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(x.shape)


def run_pixart(network: Any, inputs: Inputs) -> Tensor:
    """Its second half is a variance."""
    return network(inputs["x"], inputs["text"], inputs["time"]).sample[:, :4]


def run_z_image(network: Any, inputs: Inputs) -> Tensor:
    """The network is told 1 - sigma and answers x0 - noise, of lists of pictures [C, 1, h, w] and of texts [L, C]."""
    answer = network(list(inputs["x"].unsqueeze(2)), 1 - inputs["time"], list(inputs["text"])).sample
    return -torch.stack(answer).squeeze(2)


def run_flux2(network: Any, inputs: Inputs) -> Tensor:
    """A latent is a token; places are (0, row, column, 0), those of text (0, 0, 0, number)."""
    x, tokens = inputs["x"], inputs["text"].shape[1]
    row, column, number = (torch.arange(count) for count in (*x.shape[2:], tokens))
    one = torch.zeros(1, dtype=torch.long)
    predicted = network(
        **{"hidden_states": x.flatten(2).transpose(1, 2), "encoder_hidden_states": inputs["text"]},
        **{"timestep": inputs["time"], "guidance": inputs["guidance"]},
        **{"img_ids": torch.cartesian_prod(one, row, column, one)},
        txt_ids=torch.cartesian_prod(one, one, one, number),
    ).sample
    return predicted.transpose(1, 2).reshape(x.shape)


def run_qwen_image(network: Any, inputs: Inputs) -> Tensor:
    """Patches as Flux', of one frame; text tokens follow the picture's places along the diagonal."""
    x = inputs["x"]
    batch, channels, height, width = x.shape
    tiles = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    predicted = network(
        **{"hidden_states": tiles.reshape(batch, height * width // 4, channels * 4), "timestep": inputs["time"]},
        **{"encoder_hidden_states": inputs["text"], "img_shapes": [[(1, height // 2, width // 2)]] * batch},
    ).sample
    return predicted.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def run_anima(network: Any, inputs: Inputs) -> Tensor:
    """A picture is a video's one frame; nothing of it is padding."""
    x = inputs["x"].unsqueeze(2)
    nowhere = torch.zeros_like(x[:1, :1, 0])
    return network(x, inputs["time"], inputs["text"], padding_mask=nowhere).sample.squeeze(2)


def run_krea2(network: Any, inputs: Inputs) -> Tensor:
    """Patches as Flux'; all of a text's tokens lie at the origin, three layers of each behind one another."""
    x, tokens = inputs["x"], inputs["text"].shape[1]
    batch, channels, height, width = x.shape
    tiles = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    picture = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), *map(torch.arange, (height // 2, width // 2)))
    predicted = network(
        **{"hidden_states": tiles.reshape(batch, height * width // 4, channels * 4), "timestep": inputs["time"]},
        **{"encoder_hidden_states": inputs["text"].reshape(batch, tokens, 3, -1)},
        position_ids=torch.cat([torch.zeros(tokens, 3), picture]),
    ).sample
    return predicted.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def run_wan(network: Any, inputs: Inputs) -> Tensor:
    """A picture is a video's one frame."""
    return network(inputs["x"].unsqueeze(2), inputs["time"], inputs["text"]).sample.squeeze(2)


def run_lumina2(network: Any, inputs: Inputs) -> Tensor:
    """The network is told 1 - sigma and answers x0 - noise; all tokens of the texts are there."""
    everywhere = torch.ones(inputs["text"].shape[:2], dtype=torch.bool)
    return -network(inputs["x"], 1 - inputs["time"], inputs["text"], everywhere).sample


@dataclass(frozen=True)
class Case:
    """make() builds the network, inputs(draw) its inputs, run(network, inputs) its prediction in x's shape."""

    family: str
    make: Callable[..., nn.Module]
    inputs: Callable[[Callable[..., Tensor]], Inputs]
    run: Callable[[Any, Inputs], Tensor]


CASES = {
    "sd15": Case("unet", sd15, unet_inputs, run_unet),
    "sdxl": Case("unet", sdxl, sdxl_inputs, run_unet),
    "sd3": Case("sd3", sd3, sd3_inputs, run_sd3),
    "sd35": Case("sd3", sd35, sd3_inputs, run_sd3),
    "flux": Case("flux", flux, flux_inputs, run_flux),
    "z_image": Case("z_image", z_image, z_image_inputs, run_z_image),
    "flux2": Case("flux2", flux2, flux2_inputs, run_flux2),
    "qwen_image": Case("qwen_image", qwen_image, qwen_image_inputs, run_qwen_image),
    "anima": Case("anima", anima, anima_inputs, run_anima),
    "krea2": Case("krea2", krea2, krea2_inputs, run_krea2),
    "wan": Case("wan", wan, wan_inputs, run_wan),
    "chroma": Case("chroma", chroma, chroma_inputs, run_flux),
    "lumina2": Case("lumina2", lumina2, lumina2_inputs, run_lumina2),
    "pixart": Case("pixart", pixart, pixart_inputs, run_pixart),
}


WHOLE: dict[str, dict[str, Any]] = {"chroma": {"num_layers": 19, "num_single_layers": 38}}
"""ComfyUI's class makes the modulations of so many blocks, however many it has."""


def seeded(seed: int) -> Callable[..., Tensor]:
    """draw(*shape): normal numbers in float64 from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def network_of(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
    """Seeded weights, none at a special start (no zero bias, no unit gain, no zero output layer)."""
    draw, network = seeded(1), nn.Module.to(CASES[name].make(**more), torch.float64)
    for path, parameter in network.named_parameters():
        drawn = draw(*parameter.shape)
        if parameter.ndim > 1:
            parameter.data = drawn / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * drawn + float(path.endswith("weight"))
    return nn.Module.to(network, dtype).requires_grad_(False).eval()


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> Inputs:
    return {key: value.to(dtype) for key, value in CASES[name].inputs(seeded(2)).items()}


def random_state(targets: Any, rank: int = 3, seed: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters on every target, away from B = 0, in float32, strong enough to change the prediction visibly."""
    draw = seeded(seed)
    state = {}
    for target in targets:
        a, b = draw(*target.shape_a(rank)), draw(*target.shape_b(rank))
        state[target.name] = ((a / a[0].numel() ** 0.5).float(), (0.3 * b / rank**0.5).float())
    return state


def merged(network: nn.Module, targets: Any, state: dict[str, tuple[Tensor, Tensor]]) -> None:
    """W + B A written into the weights in their own dtype: what an adapter means, by another way than its own code."""
    for target in targets:
        a, b = (factor.to(target.module.weight.dtype) for factor in state[target.name])
        start, stop = target.row_range
        product = (b.flatten(1) @ a.flatten(1)).reshape(stop - start, *target.module.weight.shape[1:])
        target.module.weight.data[start:stop] += target.host_order(product)
