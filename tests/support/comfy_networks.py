"""Inside ComfyUI's Python: diffusers' weights in ComfyUI's networks, by ComfyUI's own maps."""

import comfy.ops
import comfy.utils
import torch
from comfy.ldm.anima.model import Anima, LLMAdapter
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import TimestepEmbedder
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel


def same_names(config):
    """ComfyUI has no map of Qwen-Image: its tree has diffusers' own names."""
    network = QwenImageTransformer2DModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    return {key: key for key in network.state_dict()}


def anima_map(config):
    """ComfyUI has none of its own: names as diffusers' LoRA loader turns them (lora_conversion_utils.py)."""
    pairs = [("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0")]
    block = [
        (f"{theirs}.{a}", f"{ours}.{b}")
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in pairs
    ]
    block += [
        (f"{theirs}.{n}_norm", f"{ours}.norm_{n}")
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for n in "qk"
    ]
    block += [("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2")]
    norms = [("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3")]
    block += [(f"adaln_modulation_{theirs}.{at}", f"{ours}.linear_{at}") for theirs, ours in norms for at in (1, 2)]
    layers = [(f"blocks.{n}.{a}", f"transformer_blocks.{n}.{b}") for n in range(config["num_blocks"]) for a, b in block]
    layers += [
        ("x_embedder.proj.1", "patch_embed.proj"),
        ("t_embedding_norm", "time_embed.norm"),
        ("final_layer.linear", "proj_out"),
    ]
    layers += [(f"t_embedder.1.linear_{at}", f"time_embed.t_embedder.linear_{at}") for at in (1, 2)]
    layers += [(f"final_layer.adaln_modulation.{at}", f"norm_out.linear_{at}") for at in (1, 2)]
    return {f"{ours}.weight": f"{theirs}.weight" for theirs, ours in layers}


def krea2_map(config):
    """ComfyUI's own has the layers' weights alone."""
    own = comfy.utils.krea2_to_diffusers(config)
    table = dict(own)
    for ours, theirs in own.items():
        table[ours.replace(".weight", ".bias")] = theirs.replace(".weight", ".bias")
    blocks = {f"transformer_blocks.{n}": f"blocks.{n}" for n in range(config["layers"])}
    for ours, theirs in blocks.items():
        table[f"{ours}.scale_shift_table"] = (f"{theirs}.mod.lin", None, torch.flatten)
    for kind in ("layerwise", "refiner"):
        blocks |= {f"text_fusion.{kind}_blocks.{n}": f"txtfusion.{kind}_blocks.{n}" for n in range(2)}
    norms = {"norm1": "prenorm", "norm2": "postnorm", "attn.norm_q": "attn.qknorm.qnorm"}
    norms["attn.norm_k"] = "attn.qknorm.knorm"
    for ours, theirs in blocks.items():
        table |= {f"{ours}.{a}.weight": f"{theirs}.{b}.scale" for a, b in norms.items()}
    return table | {
        "txt_in.norm.weight": "txtmlp.0.scale",
        "final_layer.norm.weight": "last.norm.scale",
        "final_layer.scale_shift_table": "last.modulation.lin",
    }


def wan_map(config):
    """ComfyUI has none of its own: names as diffusers' converter turns Wan's (scripts/convert_wan_to_diffusers.py)."""
    parts = [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k")]
    block = [
        (f"{theirs}.{a}", f"{ours}.{b}")
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in parts
    ]
    block += [("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"), ("norm3", "norm2")]
    layers = [(f"blocks.{n}.{a}", f"blocks.{n}.{b}") for n in range(config["num_layers"]) for a, b in block]
    embedder = "condition_embedder"
    layers += [("time_projection.1", f"{embedder}.time_proj"), ("head.head", "proj_out")]
    layers += [
        (f"{kind}_embedding.{2 * at}", f"{embedder}.{kind}_embedder.linear_{at + 1}")
        for kind in ("text", "time")
        for at in (0, 1)
    ]
    layers += [("patch_embedding", "patch_embedding")]
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in layers for kind in ("weight", "bias")}
    names |= {f"blocks.{n}.scale_shift_table": f"blocks.{n}.modulation" for n in range(config["num_layers"])}
    return names | {"scale_shift_table": "head.modulation"}


def lumina2_map(config):
    """ComfyUI has none of its own: names as diffusers' LoRA loader turns them (lora_conversion_utils.py), keys and
    values as wide as the heads that they have."""
    width, narrow = config["dim"], config["dim"] * config["n_kv_heads"] // config["n_heads"]
    heads = [("q", 0, width), ("k", width, narrow), ("v", width + narrow, narrow)]
    found = {}
    counts = {"layers": config["n_layers"], **dict.fromkeys(REFINERS, config["n_refiner_layers"])}
    for at in (f"{kind}.{number}" for kind, count in counts.items() for number in range(count)):
        qkv = f"{at}.attention.qkv.weight"
        found |= {f"{at}.attn.to_{head}.weight": (qkv, (0, start, length)) for head, start, length in heads}
        pairs = {f"feed_forward.linear_{n}": f"feed_forward.w{n}" for n in (1, 2, 3)}
        pairs |= {
            "attn.to_out.0": "attention.out",
            "attn.norm_q": "attention.q_norm",
            "attn.norm_k": "attention.k_norm",
        }
        pairs |= {"norm2": "attention_norm2", "ffn_norm1": "ffn_norm1", "ffn_norm2": "ffn_norm2"}
        pairs |= {"norm1" if at.startswith("context") else "norm1.norm": "attention_norm1"}
        found |= {f"{at}.{ours}.weight": f"{at}.{theirs}.weight" for ours, theirs in pairs.items()}
        if not at.startswith("context"):
            found |= {f"{at}.norm1.linear.{end}": f"{at}.adaLN_modulation.1.{end}" for end in ("weight", "bias")}
    text, time = "time_caption_embed.caption_embedder", "time_caption_embed.timestep_embedder"
    outside = {
        f"{text}.1": "cap_embedder.1",
        f"{time}.linear_1": "t_embedder.mlp.0",
        f"{time}.linear_2": "t_embedder.mlp.2",
    }
    outside |= {"x_embedder": "x_embedder", "norm_out.linear_1": "final_layer.adaLN_modulation.1"}
    outside |= {"norm_out.linear_2": "final_layer.linear"}
    found |= {f"{ours}.{end}": f"{theirs}.{end}" for ours, theirs in outside.items() for end in ("weight", "bias")}
    return found | {f"{text}.0.weight": "cap_embedder.0.weight"}


REFINERS = ("noise_refiner", "context_refiner")
MAPS = {
    "unet": comfy.utils.unet_to_diffusers,
    "sd3": comfy.utils.mmdit_to_diffusers,
    "flux": comfy.utils.flux_to_diffusers,
    "z_image": comfy.utils.z_image_to_diffusers,
    "flux2": comfy.utils.flux_to_diffusers,
    "qwen_image": same_names,
    "anima": anima_map,
    "krea2": krea2_map,
    "wan": wan_map,
    "chroma": comfy.utils.flux_to_diffusers,
    "lumina2": lumina2_map,
    "pixart": comfy.utils.pixart_to_diffusers,
}
WAYS = ((1, "in"), (2, "out"))
EMBEDDED = {"time_in": "timestep", "guidance_in": "guidance"}
MODULATED = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
BESIDE = {
    "flux2": {
        **{
            f"time_guidance_embed.{told}_embedder.linear_{at}.weight": f"{path}.{way}_layer.weight"
            for path, told in EMBEDDED.items()
            for at, way in WAYS
        },
        **{f"{path}.linear.weight": f"{path}.lin.weight" for path in MODULATED},
    },
    "chroma": {
        f"distilled_guidance_layer.{ours}.{kind}": f"distilled_guidance_layer.{theirs}.{kind}"
        for kind in ("weight", "bias")
        for ours, theirs in (
            *((path, path) for path in ("in_proj", "out_proj", *(f"norms.{n}" for n in range(5)))),
            *((f"layers.{n}.linear_{at}", f"layers.{n}.{way}_layer") for n in range(5) for at, way in WAYS),
        )
    },
}
"""What ComfyUI's maps of FLUX.2 and Chroma lack."""


def as_published(network):
    """A small Z-Image whose embedding of the time is as wide as the published one's, and diffusers' of any size; a
    small Anima whose text's adapter is small too, which ComfyUI makes of one size."""
    if isinstance(network, NextDiT) and network.pad_tokens_multiple is not None:
        network.t_embedder = TimestepEmbedder(1024, output_size=256, operations=comfy.ops.disable_weight_init)
    if isinstance(network, Anima):
        sizes = {"source_dim": 24, "target_dim": 24, "model_dim": 24, "num_layers": 1, "num_heads": 2}
        network.llm_adapter = LLMAdapter(**sizes, operations=comfy.ops.disable_weight_init)
    return network


def place_of(entry):
    """ComfyUI's word for a diffusers key: its key, (axis, start, length) or None, a function of the weight or None."""
    return (entry, None, None) if isinstance(entry, str) else (*entry, None, None)[:3]


def fill(family, model, weights, config):
    """diffusers' weights into ComfyUI's layers; returns the keys that nothing was written to."""
    key_map = MAPS[family](config) | BESIDE.get(family, {})
    state = model.diffusion_model.state_dict()
    written = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in state.items()}
    for name, value in weights.items():
        key, rows, change = place_of(key_map[name])
        start, length = (0, len(state[key])) if rows is None else rows[1:]
        state[key][start : start + length] = value if change is None else change(value)
        written[key][start : start + length] = True
    # the adapter of the text, and what captions are dropped for, are no part of diffusers' network
    alone = ("llm_adapter.", "y_embedder.y_embedding")
    return [key for key, done in written.items() if not done.all() and not key.startswith(alone)]
