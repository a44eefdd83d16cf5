"""Families that are known, and not adapted yet: by their networks' classes, their trees and their LoRAs' keys."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What a LoRA's file has of a variant whose layers have a served family's names.

    title: the variant. inputs: channels that its entry reads, where that is adapted. own: what its name or its header
    has; served: what those of the served models have. doubt: what is said where neither is told.
    """

    title: str
    inputs: tuple[int, ...]
    own: str
    served: str
    doubt: str


# Class names of either host -> the family.
LATER = {
    "LensTransformer2DModel": "Lens",
    "MageFlowTransformer2DModel": "Mage-Flow",
    "QwenImage21Transformer2DModel": "Qwen-Image 2.1",
    "WanVACETransformer3DModel": "Wan VACE",
    "WanAnimateTransformer3DModel": "Wan Animate",
    "WanAnimate2Transformer3DModel": "Wan Animate 2",
    "SkyReelsV2Transformer3DModel": "SkyReels-V2",
    "MiniTrainDIT": "Cosmos-Predict2",
    "GeneralDIT": "Cosmos",
}
# Attributes that only a later family's network has, where its class has an earlier one's name.
LATER_MARKS = {
    "nerf_blocks": "Chroma Radiance",
    "ar_embedder": "PixArt-Alpha",
    "adaln_single.emb.aspect_ratio_embedder": "PixArt-Alpha",
    "siglip_embedder": "Z-Image Omni",
    "dec_net": "Z-Image in pixels",
    "clip_text_pooled_proj": "NewBie",
    "time_text_embed.addition_t_embedding": "Qwen-Image-Layered",
    "__index_timestep_zero__": "Qwen-Image-Edit",
    "zero_cond_t": "Qwen-Image-Edit",
    "crossattn_proj": "Cosmos-Predict2.5",
    "img_context_proj": "Cosmos-Predict2.5",
    "learnable_pos_embed": "Cosmos",
    "vace_patch_embedding": "Wan VACE",
    "control_adapter": "Wan camera control",
    "casual_audio_encoder": "Wan S2V",
    "audio_proj": "HuMo",
    "face_adapter": "Wan Animate",
    "patch_embedding_mask": "SCAIL-2",
    "patch_embedding_pose": "SCAIL",
    "patch_embedding_global": "WanDancer",
    "forward_block": "autoregressive Wan",
    "ref_conv": "Wan Fun Control",
    "img_emb": "Wan image-to-video",
    "condition_embedder.image_embedder": "Wan image-to-video",
}

# Pipelines of diffusers whose network has a served family's class, and weights of its own.
LATER_PIPELINES = {
    "PixArtAlphaPipeline": "PixArt-Alpha",
    "Flux2KleinKVPipeline": "FLUX.2 klein KV (editing)",
    "QwenImageEditPipeline": "Qwen-Image-Edit",
    "QwenImageEditInpaintPipeline": "Qwen-Image-Edit",
    "QwenImageEditPlusPipeline": "Qwen-Image-Edit",
    "QwenImageLayeredPipeline": "Qwen-Image-Layered",
    **dict.fromkeys(("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"), "Cosmos-Predict2"),
    **dict.fromkeys(("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"), "Cosmos"),
    "Cosmos2_5_PredictBasePipeline": "Cosmos-Predict2.5",
    "WanImageToVideoPipeline": "Wan image-to-video",
}

# Files whose weights have a served family's names and shapes: by the family and what their names have.
LATER_NAMES = {
    ("pixart", r"pixart.?(alpha|α|xl.?2.?(256|512|1024))(?!.*sigma)"): "PixArt-Alpha",
    ("flux2", r"(?<![a-z])kv(?![a-z])"): "FLUX.2 klein KV (editing)",
    ("qwen_image", r"qwen.?image.?edit"): "Qwen-Image-Edit",
}

LATER_WORDS = {
    "wan": Words(
        "Wan image-to-video",
        (36,),
        r"(?<![a-z0-9])i-?2-?v|image.?(to|2).?video",
        r"t-?2-?[vi](?![a-z])|text.?(to|2).?(video|image)|(?<![a-z])5-?b(?![a-z])|ti2v",
        "it does not say whether it was trained on Wan's text-to-video or image-to-video model, whose LoRAs have the "
        "same layers: if the pictures are wrong, choose one for text-to-video",
    )
}
"""By the served family."""

# By what gives them away in a LoRA's key.
LATER_KEYS = {
    r"patchify_proj[._]|audio_(attn|to_video)|video_to_audio|audio_adaln": "LTX",
    r"cross_attn[._](k|v|norm_k)_img|(?<![a-z])img_emb[._]proj|attn2[._](add_[kv]_|norm_added_k)": "Wan image-to-video",
    r"(?<![a-z])vace_(blocks|patch_embedding)": "Wan VACE",
    r"(?<![a-z])(face_adapter|motion_encoder|pose_patch_embedding)[._]": "Wan Animate",
    r"(?<![a-z])(casual_audio_encoder|audio_injector|frame_packer)[._]": "Wan S2V",
    r"transformer_blocks[._]\d+[._]attn[._](img|txt)_qkv|transformer_blocks[._]\d+[._](img|txt)_mlp[._]w[123]": "Lens",
    r"addition_t_embedding": "Qwen-Image-Layered",
    r"clip_text_pooled_proj[._]|(^|[._])time_text_embed[._]1[._]": "NewBie",
    r"siglip_(embedder|refiner)[._]": "Z-Image Omni",
    r"double_blocks\.\d+\.(img|txt)_attn_qkv|individual_token_refiner": "HunyuanVideo",
    r"(^|[._])nerf_(blocks|image_embedder|final_layer)|img_in_patch": "Chroma Radiance",
    r"(aspect_ratio|resolution)_embedder[._]|(?<![a-z])(ar|csize)_embedder[._]": "PixArt-Alpha",
    r"double_stream_blocks[._]\d": "HiDream",
    r"((?<!transformer_)|(?<=lora_transformer_))(?<![a-z])blocks[._]\d+[._](ff[._]net|skip_linear|default_modulation"
    r"|attn1[._](Wqkv|out_proj)|attn2[._]kv_proj)|(^|[._])(time_extra_emb|extra_embedder)[._]": "HunyuanDiT",
    r"joint_transformer_blocks[._]\d": "AuraFlow",
}
# The same of keys that a served family's LoRAs have too: what the file is for decides.
LATER_SHARED = {
    r"^(diffusion_model\.|transformer\.|base_model\.model\.)*transformer_blocks[._]\d+[._]attn1[._]": "LTX",
}
