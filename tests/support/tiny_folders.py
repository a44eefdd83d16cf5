"""Folders in the layout of the bundled tiny models with seeded random weights, written by diffusers and
transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CosmosTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from onestep.pipelines.padding_mask import without_torchvision

LENGTH = 24
WORDS = ("red", "blue", "dragon", "wall")


def byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes in CLIP's byte-pair vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + index) for index in range(len(hidden))]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A small byte-pair tokenizer that knows a few words and spells every other."""
    letters = byte_letters()
    merges, pieces = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, width: int = 64, layers: int = 2, act: str = "quick_gelu") -> CLIPTextConfig:
    return CLIPTextConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "hidden_act": act},
        **{"num_hidden_layers": layers, "num_attention_heads": 2, "max_position_embeddings": LENGTH},
        **{"projection_dim": width // 2, "bos_token_id": tokenizer.bos_token_id},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )


def autoencoder(scale: float, shift: float | None = None, plain: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        **{"block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32},
        **{"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3},
        **{"mid_block_add_attention": not plain, "use_quant_conv": not plain, "use_post_quant_conv": not plain},
        **{"sample_size": 32, "scaling_factor": scale, "shift_factor": shift},
    )


def shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights of which none is at its special start (zero biases, unit norms, zero-initialised output
    layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * noise)
        else:
            parameter.data.copy_(noise * (0.3 if "embedding" in name and parameter.ndim == 2 else fan_in**-0.5))
    return model.eval()


def unet_folder(
    folder: Path, widths: tuple[int, int] = (64, 128), prediction: str = "epsilon", linear: bool = False
) -> Path:
    """StableDiffusionPipeline's layout: U-Net of two levels, CLIP text encoder, autoencoder / 4."""
    torch.manual_seed(1)
    tokenizer = write_tokenizer(folder / "tokenizer_source")
    unet = UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": widths, "layers_per_block": 1, "cross_attention_dim": 64},
        **{"attention_head_dim": 2 if not linear else [2, 4], "norm_num_groups": 32, "use_linear_projection": linear},
        **{"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D" if linear else "DownBlock2D")},
        **{"up_block_types": ("CrossAttnUpBlock2D" if linear else "UpBlock2D", "CrossAttnUpBlock2D")},
    )
    pipe = StableDiffusionPipeline(
        **{"vae": shaken(autoencoder(0.7), 2), "unet": shaken(unet, 3), "tokenizer": tokenizer},
        **{"text_encoder": shaken(CLIPTextModel(text_config(tokenizer)), 4), "safety_checker": None},
        **{"feature_extractor": None, "requires_safety_checker": False},
        scheduler=DDIMScheduler(
            **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            **{"prediction_type": prediction, "timestep_spacing": "trailing", "clip_sample": False},
            **{"set_alpha_to_one": True, "steps_offset": 0},
        ),
    )
    pipe.save_pretrained(folder)
    return folder


def sd3_folder(folder: Path, heads: int = 2) -> Path:
    """StableDiffusion3Pipeline's layout without T5: MMDiT of `heads` blocks, two text encoders with projections."""
    torch.manual_seed(1)
    tokenizer = write_tokenizer(folder / "tokenizer_source")
    transformer = SD3Transformer2DModel(
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": heads},
        **{"attention_head_dim": 64, "num_attention_heads": heads, "joint_attention_dim": 160},
        **{"caption_projection_dim": 64 * heads, "pooled_projection_dim": 64, "pos_embed_max_size": 16},
        **{"qk_norm": "rms_norm"},
    )
    configs = [text_config(tokenizer), text_config(tokenizer, layers=3, act="gelu")]
    encoders = [shaken(CLIPTextModelWithProjection(config), 6 + index) for index, config in enumerate(configs)]
    pipe = StableDiffusion3Pipeline(
        **{"transformer": shaken(transformer, 3), "vae": shaken(autoencoder(0.8, 0.1, plain=True), 2)},
        **{"text_encoder": encoders[0], "text_encoder_2": encoders[1], "text_encoder_3": None},
        **{"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": None},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)
    return folder


Z_IMAGE_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def qwen_tokenizer(folder: Path, template: str = Z_IMAGE_TEMPLATE) -> Qwen2Tokenizer:
    """A byte-pair tokenizer of Qwen's kind that spells every word, with its own ``template``."""
    words = [*byte_letters(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer({word: at for at, word in enumerate(words)}, [], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


KLEIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)


def klein_folder(folder: Path) -> Path:
    """Flux2KleinPipeline's layout: two double and two single blocks, latents of 16 channels folded from 4, a text of
    three layers of an encoder of 28."""
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer(folder / "tokenizer_source", KLEIN_TEMPLATE)
    transformer = Flux2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32},
        **{"num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8, 8)},
        guidance_embeds=False,
    )
    text = Qwen3Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 28},
        **{"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128, "pad_token_id": tokenizer.pad_token_id},
        **{"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        tie_word_embeddings=True,
    )
    pipe = Flux2KleinPipeline(
        **{"transformer": shaken(transformer, 3), "vae": shaken(folded_autoencoder(), 2), "tokenizer": tokenizer},
        text_encoder=shaken(Qwen3ForCausalLM(text), 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.save_pretrained(folder)
    return folder


def t5_tokenizer(folder: Path | None = None) -> T5TokenizerFast:
    """A tokenizer of T5's kind that spells every word."""
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("\u2581", -1.0)]
    tokenizer = T5TokenizerFast(vocab=letters + [(chr(code), -2.0) for code in range(33, 127)], extra_ids=0)
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def anima_folder(folder: Path) -> Path:
    """AnimaModularPipeline's layout: two blocks, an autoencoder of videos, a text whose conditioner has two blocks."""
    without_torchvision()
    torch.manual_seed(1)
    tokenizer, t5 = qwen_tokenizer(folder / "tokenizer_source"), t5_tokenizer(folder / "t5_source")
    transformer = CosmosTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "text_embed_dim": 24},
        **{"adaln_lora_dim": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None},
    )
    text = Qwen3Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "pad_token_id": tokenizer.pad_token_id},
        **{"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    )
    conditioner = AnimaTextConditioner(
        **{"source_dim": 24, "target_dim": 24, "model_dim": 32, "num_layers": 2, "num_attention_heads": 2},
        target_vocab_size=len(t5),
    )
    told = {
        "latents_mean": torch.linspace(-0.9, 1.2, 16).tolist(),
        "latents_std": torch.linspace(0.6, 2.9, 16).tolist(),
    }
    pipe = AnimaModularPipeline()
    pipe.update_components(
        **{"transformer": shaken(transformer, 3), "text_conditioner": shaken(conditioner, 5), "tokenizer": tokenizer},
        **{"vae": shaken(AutoencoderKLQwenImage(base_dim=8, **told), 2), "t5_tokenizer": t5},
        **{"text_encoder": shaken(Qwen3Model(text), 4), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)},
    )
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def wan_folder(folder: Path, shift: float = 3.0) -> Path:
    """WanPipeline's layout: two blocks, an autoencoder of videos, a text of UMT5's, the published scheduler. shift: 8
    is ComfyUI's own."""
    torch.manual_seed(1)
    tokenizer = t5_tokenizer(folder / "tokenizer_source")
    transformer = WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 24, "freq_dim": 32, "ffn_dim": 40},
        num_layers=2,
    )
    text = UMT5Config(
        **{"vocab_size": len(tokenizer), "d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2},
        **{"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False},
    )
    told = {
        "latents_mean": torch.linspace(-0.9, 1.2, 16).tolist(),
        "latents_std": torch.linspace(0.6, 2.9, 16).tolist(),
    }
    pipe = WanPipeline(
        **{"transformer": shaken(transformer, 3), "vae": shaken(AutoencoderKLWan(base_dim=8, **told), 2)},
        **{"text_encoder": shaken(UMT5EncoderModel(text), 4), "tokenizer": tokenizer},
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
    )
    pipe.save_pretrained(str(folder))
    return folder


def folded_autoencoder() -> AutoencoderKLFlux2:
    """FLUX.2's with three levels; statistics away from 0 and 1."""
    vae = AutoencoderKLFlux2(
        **{"block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32},
        **{"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3},
        sample_size=32,
    )
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def z_image_folder(folder: Path) -> Path:
    """ZImagePipeline's layout at the least width that both hosts build alike; heads of the text encoder are 128 wide,
    as ComfyUI has them, and the last but one of its layers is not the first."""
    torch.manual_seed(1)
    tokenizer = qwen_tokenizer(folder / "tokenizer_source")
    transformer = ZImageTransformer2DModel(
        **{"in_channels": 4, "dim": 288, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 12, "n_kv_heads": 12},
        **{"cap_feat_dim": 24, "axes_dims": [8, 8, 8], "axes_lens": [1024, 32, 32]},
    )
    text = Qwen3Config(
        **{"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "pad_token_id": tokenizer.pad_token_id},
        **{"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    )
    pipe = ZImagePipeline(
        **{"transformer": shaken(transformer, 3), "vae": shaken(autoencoder(0.8, 0.1, plain=True), 2)},
        **{"text_encoder": shaken(Qwen3Model(text), 4), "tokenizer": tokenizer},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.save_pretrained(folder)
    return folder
