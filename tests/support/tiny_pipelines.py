"""Diffusers pipelines of every family with random weights, a few channels wide, made without any download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tiny_chroma
import tiny_krea2
import tiny_lumina2
import tiny_pixart
import tiny_qwen
import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from onestep.pipelines.padding_mask import without_torchvision

WIDTH = 32  # of every text encoder


@lru_cache(maxsize=1)
def clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: at for at, piece in enumerate(pieces)}, [], model_max_length=16)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5, "red": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def clip(projection: bool = False, width: int = WIDTH) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=8, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vae(channels: int = 4, levels: int = 2, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=16,
        **more,
    )


def unet(xl: bool = False, **more: Any) -> UNet2DConditionModel:
    if xl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "use_linear_projection": True,
            "projection_class_embeddings_input_dim": WIDTH + 48,
            "transformer_layers_per_block": (1, 2),
            **more,
        }
    settings = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2,
        "cross_attention_dim": 2 * WIDTH if xl else WIDTH, **more,
    }  # fmt: skip
    return UNet2DConditionModel(**settings)


def ddim(**more: Any) -> DDIMScheduler:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**{**settings, "timestep_spacing": "trailing", "steps_offset": 1, **more})


def sd(**scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**scheduler: Any) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13),
        text_encoder=clip(),
        text_encoder_2=clip(True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(xl=True),
        scheduler=ddim(**scheduler),
        add_watermarker=False,
    )


def sd3(with_t5: bool = False, **scheduler: Any) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    # as SD3's T5: as wide as what the transformer reads
    encoder = T5EncoderModel(T5Config(vocab_size=8, d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoder if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(embedded: bool = True, **scheduler: Any) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=embedded,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def qwen3_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<im_start>", "<im_end>", "user", "assistant", "a", "cat", "dog", "red"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<im_start> {{ m['role'] }} {{ m['content'] }} <im_end> {% endfor %}"
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": backend, "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 64},
        chat_template=template + "<im_start> assistant",
    )


def z_image(**scheduler: Any) -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        **{"in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"cap_feat_dim": WIDTH, "axes_dims": [8, 8, 8], "axes_lens": [1024, 32, 32]},
    )
    encoder = Qwen3Config(
        **{"vocab_size": 10, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=Qwen3Model(encoder),
        tokenizer=qwen3_tokenizer(),
        transformer=transformer,
    )


def folded_vae(channels: int = 4) -> AutoencoderKLFlux2:
    """FLUX.2's, whose 2 x 2 latents are folded into one and normed by its statistics."""
    made = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=16,
    )
    made.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 4 * channels))
    made.bn.running_var.copy_(torch.linspace(0.5, 2.0, 4 * channels))
    return made


def video_vae(cls: Any = AutoencoderKLQwenImage, width: int = 4) -> Any:
    """Wan's or Qwen-Image's, whose latents are [B, 16, T, h, w], an eighth of the side; its own statistics."""
    told = {"latents_mean": torch.linspace(-0.9, 1.2, 16), "latents_std": torch.linspace(0.6, 2.9, 16)}
    made = cls(base_dim=width, z_dim=16, **{name: value.tolist() for name, value in told.items()})
    randomise(made)
    return made.eval()


def klein_encoder(width: int = 8) -> Qwen3ForCausalLM:
    """Its layers 9, 18 and 27 are the text."""
    config = Qwen3Config(
        **{"vocab_size": 10, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 28, "head_dim": 8},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    )
    return Qwen3ForCausalLM(config)


def klein(distilled: bool = False, **scheduler: Any) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)},
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}),
        vae=folded_vae(),
        text_encoder=klein_encoder(),
        tokenizer=qwen3_tokenizer(),
        transformer=transformer,
        is_distilled=distilled,
    )


def qwen_image(**scheduler: Any) -> Any:
    return tiny_qwen.qwen_image(video_vae(), WIDTH, 2, **scheduler)


def krea2(distilled: bool = False, **scheduler: Any) -> Any:
    return tiny_krea2.krea2(video_vae(), head=16, distilled=distilled, **scheduler)


def chroma(**scheduler: Any) -> ChromaPipeline:
    autoencoder = vae(shift_factor=0.1, scaling_factor=0.4)
    return tiny_chroma.chroma(autoencoder, num_layers=1, num_single_layers=2, scheduler=scheduler)


def lumina2(**scheduler: Any) -> Any:
    """Its pipeline takes every VAE for one of an eighth of the side."""
    return tiny_lumina2.lumina2(vae(levels=4, shift_factor=0.1, scaling_factor=0.4), WIDTH, 16, **scheduler)


def anima(**scheduler: Any) -> AnimaModularPipeline:
    """A modular pipeline: of two text encoders one gives its states, the other its tokens alone."""
    without_torchvision()
    encoder = Qwen3Config(
        **{"vocab_size": 10, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    )
    conditioner = AnimaTextConditioner(
        **{"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH, "num_layers": 1, "num_attention_heads": 2},
        target_vocab_size=8,
    )
    transformer = CosmosTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "text_embed_dim": WIDTH},
        **{"adaln_lora_dim": 16, "rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None},
    )
    pipe = AnimaModularPipeline()
    pipe.update_components(
        **{"transformer": transformer, "vae": video_vae(), "text_conditioner": conditioner},
        **{"text_encoder": Qwen3Model(encoder), "tokenizer": qwen3_tokenizer(), "t5_tokenizer": t5_tokenizer()},
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )
    return pipe


def wan(**scheduler: Any) -> WanPipeline:
    """With the scheduler of its published folders; its text is filled up to 512 tokens."""
    encoder = UMT5Config(
        **{"vocab_size": 8, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        **{"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False},
    )
    transformer = WanTransformer3DModel(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 40},
        num_layers=2,
    )
    told = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2}
    return WanPipeline(
        **{"transformer": transformer, "vae": video_vae(AutoencoderKLWan), "tokenizer": t5_tokenizer()},
        **{"text_encoder": UMT5EncoderModel(encoder), "scheduler": UniPCMultistepScheduler(**{**told, **scheduler})},
    )


MODERN = {"z_image": z_image, "klein": klein, "qwen_image": qwen_image, "anima": anima, "krea2": krea2, "wan": wan}
MODERN |= {"chroma": chroma, "lumina2": lumina2, "pixart": tiny_pixart.pixart}
MAKERS = {"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def make(name: str, seed: int = 0, **scheduler: Any) -> Any:
    """The pipeline of a name in MAKERS, with random weights away from every zero that initialisation leaves."""
    torch.manual_seed(seed)
    pipe = {**MAKERS, **MODERN}[name](**scheduler)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    randomise(network)
    for part in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner"):
        if isinstance(getattr(pipe, part, None), nn.Module):
            getattr(pipe, part).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomise(network: nn.Module) -> None:
    """Weights of the size that keeps activations' scale; nothing is zero."""
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        else:
            nn.init.normal_(weight, mean=float(name.endswith("weight")), std=0.1)
