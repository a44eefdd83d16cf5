"""What public files, renamed as people do, are taken for; and names that must be taken for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from onestep.core.errors import OneStepError
from onestep.core.recipe.by_name import LORA, MODEL, preset_by_name, presets_by_name
from onestep.core.recipe.distilled_base import few_step_kind
from onestep.core.recipe.recognised import of_second_order, recognised, without_recipe

LORAS = {
    "sdxl_lightning_2step_lora.safetensors": "sdxl-lightning-2",
    "sdxl_lightning_4step_lora.safetensors": "sdxl-lightning-4",
    "SDXL-Lightning-8step-LoRA.safetensors": "sdxl-lightning-8",
    "SDXLLightning4Step.safetensors": "sdxl-lightning-4",
    "sdxl-lightning-v2-4step.safetensors": "sdxl-lightning-4",
    "sdxl_lightning_4steps_comfyui.fp16.safetensors": "sdxl-lightning-4",
    "Hyper-SD15-1step-lora.safetensors": "hyper-sd-1-lora",
    "Hyper-SDXL-2steps-lora.safetensors": "hyper-sd-2-lora",
    "hyper_sdxl_4step.safetensors": "hyper-sd-4-lora",
    "HyperSDXL_8StepsLoRA.safetensors": "hyper-sd-8-lora",
    "Hyper-SDXL-8steps-CFG-lora.safetensors": "hyper-sd-8-cfg",
    "Hyper-SD15-12steps-CFG-lora.safetensors": "hyper-sd-12-cfg",
    "Hyper-SD3-4steps-CFG-lora.safetensors": "hyper-sd3-4-cfg",
    "hyper_sd3_16steps_lora.safetensors": "hyper-sd3-16-cfg",
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": "hyper-flux-8",
    "Hyper-FLUX.1-dev-16steps-lora-fp16.safetensors": "hyper-flux-16",
    "hyperflux_8steps.safetensors": "hyper-flux-8",
    "pcm_sdxl_smallcfg_2step_converted.safetensors": "pcm-2",
    "pcm_sd15_smallcfg_16step_converted.safetensors": "pcm-16",
    "PCM_SDXL_SmallCFG_4step.safetensors": "pcm-4",
    "pcm_sd15_normalcfg_8step_converted.safetensors": "pcm-8-cfg",
    "pcm_sdxl_lcmlike_lora_converted.safetensors": "pcm-lcm-4",
    "pcm_deterministic_2step_shift1.safetensors": "pcm-sd3-2",
    "pcm_deterministic_4step_shift3.safetensors": "pcm-sd3-4",
    "pcm_deterministic_4step_shift1.safetensors": "pcm-sd3-4-shift1",
    "pdm_stochastic_shift3.safetensors": "pcm-sd3-4-stochastic",
    "lcm-lora-sdv1-5.safetensors": "lcm-4",
    "LCM_LoRA_Weights_SD15.safetensors": "lcm-4",
    "lcm_sdxl_lora.safetensors": "lcm-4",
    "lcm-lora-ssd-1b.safetensors": "lcm-4",
    "tcd-sdxl.safetensors": "tcd-4",
    "TCD-SD15-LoRA.safetensors": "tcd-4",
    "sd_xl_turbo_lora_v1.safetensors": "sdxl-turbo-1",
    "FlashSDXL.safetensors": "flash-4",
    "flash-sd_lora.safetensors": "flash-4",
    "dmd2_sdxl_4step_lora_fp16.safetensors": "dmd2-4",
    "DMD2-LoRA.safetensors": "dmd2-4",
    "tdm_dreamshaper.safetensors": "tdm-sd15-4",
    "TDM_sd3_lora.safetensors": "tdm-sd3-4",
    "FLUX.1-Turbo-Alpha.safetensors": "flux-turbo-alpha-8",
    "flux_turbo_alpha_comfyui_rank64.safetensors": "flux-turbo-alpha-8",
    "Qwen-Image-Lightning-4steps-V1.0-bf16.safetensors": "qwen-image-lightning-4",
    "Qwen-Image-Lightning-8steps-V2.0.safetensors": "qwen-image-lightning-8",
    "Qwen-Image-Edit-2509-Lightning-4steps-V1.0-fp32.safetensors": "qwen-image-lightning-4",
    "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors": "wan2.1-lightx2v-4",
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "wan2.1-lightx2v-4",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "wan2.2-lightx2v-high-2",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors": "wan2.2-lightx2v-low-2",
    "Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors": "wan2.2-lightx2v-high-2",
    "Wan2.2-Lightning-T2V-low_noise_model.safetensors": "wan2.2-lightx2v-low-2",
    "FastWan_T2V_14B_480p_lora_rank_128_bf16.safetensors": "fastwan-3",
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors": "causvid-3",
    "Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "causvid-9",
    "Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors": "causvid-9",
    "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16.safetensors": "wan2.2-lightx2v-high-2",
}
MODELS = {
    "sdxl_lightning_1step_x0.safetensors": "sdxl-lightning-1",
    "sdxl_lightning_4step.safetensors": "sdxl-lightning-4",
    "sdxl_lightning_8step_unet.safetensors": "sdxl-lightning-8",
    "juggernautXL_v9Rdphoto2Lightning_4S.safetensors": "sdxl-lightning-4",
    "Hyper-SDXL-1step-Unet.safetensors": "hyper-sdxl-1-unet",
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": "hyper-sdxl-1-unet",
    "flux1-dev-hyper-8steps-fp8.safetensors": "hyper-flux-8",
    "sd_turbo.safetensors": "sd-turbo-1",
    "sd_xl_turbo_1.0_fp16.safetensors": "sdxl-turbo-1",
    "sdxl-turbo": "sdxl-turbo-1",
    "sd3.5_large_turbo.safetensors": "sd3.5-turbo-4",
    "stable-diffusion-3.5-large-turbo": "sd3.5-turbo-4",
    "nitrosd-realism_unet.safetensors": "nitrosd-realism-1",
    "NitroSD_Realism_4steps.safetensors": "nitrosd-realism-4",
    "nitrosd-vibrant_comfyui.safetensors": "nitrosd-vibrant-1",
    "sdxs-512-0.9": "sdxs-1",
    "dmd2_sdxl_1step_unet_fp16.safetensors": "dmd2-1",
    "dmd2_sdxl_4step_unet.safetensors": "dmd2-4",
    "flux1-schnell-fp8.safetensors": "flux-schnell-4",
    "FLUX.1-schnell": "flux-schnell-4",
    "z_image_turbo_bf16.safetensors": "z-image-turbo-8",
    "ZImageTurbo_fp8.safetensors": "z-image-turbo-8",
    "anima-turbo-v1.0.safetensors": "anima-turbo-8",
    "anima_turbo_4steps_bf16.safetensors": "anima-turbo-4",
    "flux-2-klein-4b-fp8.safetensors": "flux2-klein-4",
    "krea2_turbo_fp8_scaled.safetensors": "krea2-turbo-8",
}
NOTHING = [
    *("lightning_mcqueen_style.safetensors", "lightning over a field.safetensors", "turbografx.safetensors"),
    *("hyperdetailer.safetensors", "hyper_detailer_8steps.safetensors", "hyperrealism_xl_8steps.safetensors"),
    *("pcm_audio.safetensors", "pcm_audio_4step.safetensors", "flashlight.safetensors", "4step_dance.safetensors"),
    *("pytorch_lora_weights.safetensors", "sd_turbocharged.safetensors", "NitroEngine.safetensors"),
    # of numbers of steps, or of bases, that nobody has published
    *("sdxl_lightning_6step_lora.safetensors", "sd3.5_medium_turbo.safetensors", "hyper-sdxl-3steps.safetensors"),
    *("Wan21_T2V_14B_lightx2v_2step.safetensors", "krea2_turbo_4step.safetensors", "z_image_turbo_4steps.safetensors"),
    # kinds of which the number of steps is told by nothing
    *("sdxl_lightning.safetensors", "Hyper-SDXL.safetensors", "realvisxlV40_v40LightningBakedvae.safetensors"),
    # other models of like names
    *("sdxl-flash.safetensors", "flash-sd3.safetensors", "Flux_2-Turbo-LoRA_comfyui.safetensors"),
    *("flux-2-klein-base-4b.safetensors", "AnimateLCM_sd15_t2v_lora.safetensors", "klein_blue_style.safetensors"),
    *("TDM_sd3-5_lora.safetensors", "hy1.5_t2v_480p_lightx2v_4step.safetensors"),
    *("Wan21_CausVid_T2V_1_3B_lora_rank32.safetensors", "Wan21_CausVid_14B_I2V_lora.safetensors"),
    # what was made of a few-step model, and is none
    *("flux-dev-de-distill.safetensors", "openflux1-schnell-4step.safetensors", "Z-Image-De-Turbo.safetensors"),
    *("z_image_turbo_fun_union_controlnet.safetensors", "zimage_turbo_training_adapter_v2.safetensors"),
    "sdxl_lightning_4step_controlnet.safetensors",
]


@pytest.mark.parametrize("name", LORAS)
def test_public_loras_are_known_by_their_names(name: str) -> None:
    assert presets_by_name(name, LORA) == (LORAS[name],) and preset_by_name(name) == LORAS[name]


@pytest.mark.parametrize("name", MODELS)
def test_public_checkpoints_are_known_by_their_names(name: str) -> None:
    assert presets_by_name(name, MODEL) == (MODELS[name],) and preset_by_name(name) == MODELS[name]


@pytest.mark.parametrize("name", NOTHING)
def test_a_name_that_stands_for_nothing(name: str) -> None:
    assert presets_by_name(name) == ()


@pytest.mark.parametrize("name", ["my_style_sdxl_turbo", "anna_z_image_turbo", "flux_schnell_cartoon", "elf_klein_4b"])
def test_a_style_made_for_a_few_step_model_is_no_few_step_lora(name: str) -> None:
    assert presets_by_name(f"{name}.safetensors", LORA) == ()


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("dreamshaperXL_lightning_4-8steps.safetensors", ("sdxl-lightning-4", "sdxl-lightning-8")),
        ("sdxl lightning, 4 to 8 steps.safetensors", ("sdxl-lightning-4", "sdxl-lightning-8")),
        ("sdxl_hyper_lightning_4step.safetensors", ("sdxl-lightning-4", "hyper-sd-4-lora")),
        ("pcm_sdxl_4step.safetensors", ("pcm-4", "pcm-4-cfg")),
        ("lcm_tcd_sdxl_mix.safetensors", ("lcm-4", "tcd-4")),
    ],
)
def test_a_name_that_stands_for_several_is_asked_about(name: str, several: tuple[str, ...]) -> None:
    assert presets_by_name(name) == several and preset_by_name(name) is None
    with pytest.raises(OneStepError, match="may be one of .*by its name: add --recipe") as caught:
        recognised(Path(name), {}, "unet", "add --recipe NAME")
    assert all(preset in str(caught.value) for preset in several)


def test_a_kind_without_steps_leaves_another_undecided() -> None:
    """It is merged of two, one of which says how many."""
    found = presets_by_name("lightning_dmd2_mix.safetensors")
    assert {"dmd2-4", "sdxl-lightning-4", "sdxl-lightning-8"} <= set(found)


HASH = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("path", "metadata", "family", "preset", "evidence"),
    [
        ("dmd2_sdxl_4step_lora.safetensors", {}, "unet", "dmd2-4", "its name"),
        ("fast.safetensors", {"modelspec.title": "Hyper-SD15-8steps-lora"}, "unet", "hyper-sd-8-lora", "in its header"),
        ("fast.safetensors", {"ss_output_name": "pcm_sd15_smallcfg_2step"}, "unet", "pcm-2", "in its header"),
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", {}, "unet", "lcm-4", "folder's name 'lcm-lora-sdxl'"),
        ("flash-sd/pytorch_lora_weights.fp16.safetensors", {}, "unet", "flash-4", "folder's name"),
        (f"models--h1t--TCD-SDXL-LoRA/snapshots/{HASH}/{HASH}.safetensors", {}, "unet", "tcd-4", "folder's name"),
        ("FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors", {}, "flux", "flux-turbo-alpha-8", "folder's name"),
        # a folder says nothing of a file that has a name, a base nothing of its LoRA, and one family nothing of another
        ("lcm-lora-sdxl/anna.safetensors", {}, "unet", None, ""),
        ("anna.safetensors", {"ss_sd_model_name": "sdxl_lightning_4step.safetensors"}, "unet", None, ""),
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", {}, "unet", None, ""),
        ("Qwen-Image-Lightning-4steps-V1.0.safetensors", {}, "unet", None, ""),
    ],
)
def test_what_a_file_is_taken_for_and_by_what(
    path: str, metadata: dict[str, str], family: str, preset: str | None, evidence: str
) -> None:
    found = recognised(Path("/models") / path, metadata, family, "say which")
    assert (found and found.preset) == preset
    assert found is None or (evidence in found.evidence and str(found).startswith(f"taken for {preset}, by "))


def test_a_header_that_says_something_else_is_asked_about() -> None:
    with pytest.raises(OneStepError, match="lightning-4, hyper-sd-8-lora, by its name and 'Hyper-SDXL-8steps-lora' in"):
        recognised(
            Path("sdxl_lightning_4step.safetensors"), {"modelspec.title": "Hyper-SDXL-8steps-lora"}, "unet", "say which"
        )


def test_what_is_said_of_a_lora_extracted_without_its_recipe() -> None:
    said = without_recipe(Path("/models/sd_xl_turbo_1.0_fp16.safetensors"), "unet")
    assert said.endswith("its model is taken for sdxl-turbo-1, by its name, extract it with that recipe")
    for path, family in (("mine.safetensors", "unet"), ("sd_xl_turbo_1.0.safetensors", "flux"), (None, "unet")):
        assert without_recipe(Path(path) if path else None, family).endswith(
            "name its recipe where you load it, or extract it with one"
        )


@pytest.mark.parametrize("name", ["Chroma1-HD-Flash.safetensors", "chroma-flash-heun_r128-fp32.safetensors"])
def test_what_is_drawn_by_steps_of_the_second_order_is_told_how(name: str) -> None:
    assert "core's KSampler, sampler_name heun, 8 to 16 steps, cfg 1" in of_second_order(Path(name), {})
    assert recognised(Path(name), {}, "chroma", "") is None


@pytest.mark.parametrize(
    "name", ["Chroma1-HD.safetensors", "FlashSDXL.safetensors", "chromatic_flashlight.safetensors"]
)
def test_others_are_not(name: str) -> None:
    assert of_second_order(Path(name), {}) == ""


# -- bases that are distilled already ---------------------------------------------------------------------------------

DISTILLED = {
    **MODELS,
    "DreamShaperXL_Turbo_v2_1.safetensors": "Turbo",
    "dreamshaperXL_v21TurboDPMSDE.safetensors": "Turbo",
    "TurboVisionXL.safetensors": "Turbo",
    "realvisxlV40_v40LightningBakedvae.safetensors": "Lightning",
    "realisticVisionV60B1_v51HyperVAE.safetensors": "Hyper",
    "dreamshaper_8LCM.safetensors": "LCM",
    "LCM_Dreamshaper_v7_4k.safetensors": "LCM",
    "lustifySDXLNSFW_v20-dmd2.safetensors": "dmd2-4",
    "sd3.5_medium_turbo.safetensors": "Turbo",
    "chroma1-hd-flash.safetensors": "Flash",
    "wan2.1_t2v_14B_CausVid_fp8.safetensors": "causvid-9",
    "wan2.1_t2v_1.3B_CausVid_fp8.safetensors": "CausVid",
    "flux_dev_schnell_merge.safetensors": "flux-schnell-4",
    **dict.fromkeys(("FLUX.2-klein-4B", "flux2_klein_9b_fp8mixed.safetensors"), "flux2-klein-4"),
}
UNDISTILLED = [
    *("sd_xl_base_1.0.safetensors", "v1-5-pruned-emaonly.safetensors", "flux1-dev.safetensors", "animagine-xl-3.1"),
    *("waiNSFWIllustrious_v140.safetensors", "ponyDiffusionV6XL.safetensors", "z_image_bf16.safetensors"),
    *("FLUX.2-klein-base-9B", "flux2_dev_fp8mixed.safetensors", "flux-2-klein-base-4b.safetensors"),
    *("flux-dev-de-distill.safetensors", "Z-Image-De-Turbo", "tiny", "tiny-flow"),
    *("lightning_mcqueen_style.safetensors", "turbografx.safetensors", "hyperdetailer.safetensors", "pcm_audio"),
    *("hyperRealism_v30.safetensors", "qwen_image_2512_fp8_e4m3fn.safetensors", "juggernautXL_v9.safetensors"),
]


@pytest.mark.parametrize("name", DISTILLED)
def test_a_base_that_is_distilled_already(name: str) -> None:
    assert few_step_kind(Path(name)) == (DISTILLED[name], "its name")


@pytest.mark.parametrize("name", UNDISTILLED)
def test_a_base_that_is_not(name: str) -> None:
    assert few_step_kind(Path(name)) is None


def test_a_base_is_known_by_its_header_its_folder_and_its_tensors_too(tmp_path: Path) -> None:
    assert few_step_kind(Path("my.safetensors"), {"modelspec.title": "SDXL Lightning merge"}) == (
        "Lightning",
        "'SDXL Lightning merge' in its header",
    )
    cached = Path(f"/hub/models--stabilityai--sdxl-turbo/snapshots/{HASH}")
    assert few_step_kind(cached / "model.safetensors") == (
        "sdxl-turbo-1",
        "its folder's name 'models--stabilityai--sdxl-turbo'",
    )
    tensors = ["model.diffusion_model.time_embed.0.weight", "unet.time_embedding.cond_proj.weight"]
    found = few_step_kind(Path("my.safetensors"), {}, tensors)
    assert found == ("LCM", "the guidance that its U-Net embeds") and few_step_kind(Path("x"), {}, tensors[:1]) is None
    (tmp_path / "scheduler").mkdir()
    assert few_step_kind(tmp_path) is None
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    assert few_step_kind(tmp_path) == ("LCM", "its LCMScheduler")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[]")
    (tmp_path / "model_index.json").write_text('{"is_distilled": true}')
    assert few_step_kind(tmp_path) == ("distilled", "is_distilled in its model_index.json")
