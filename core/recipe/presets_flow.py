"""The public few-step models of flow families: each after its authors' own code or model card, which `source` names.
Times are 1000 sigma, shifted already, so that no scheduler's default can bend them; digits of float32, as a host has
them, where they come out of one."""

from __future__ import annotations

import math
from typing import Any

from .definition import Recipe
from .presets_unet import SECOND_ORDER, preset

HYPER_SD3 = (
    "huggingface.co/ByteDance/Hyper-SD, model card: {}-step CFG LoRA of SD3-Medium, LoRA scale 0.125, guidance {}; "
    "FlowMatchEulerDiscreteScheduler, shift 3"
)
HYPER_FLUX = (
    "huggingface.co/ByteDance/Hyper-SD, model card: {}-step LoRA of FLUX.1-dev, LoRA scale 0.125, embedded guidance "
    "3.5; times for 1024x1024"
)
PCM_SD3 = (
    "G-U-N/Phased-Consistency-Model, code/text_to_image_sd3: {} LoRA of SD3-Medium, of a grid of 50 times, shift {}, "
    "guidance 1.2"
)
QWEN = (
    "ModelTC/Qwen-Image-Lightning, generate_with_diffusers.py: {}-step LoRA of Qwen-Image and -Edit, V1.x and 2.0, "
    "shift 3 at every size, no shift_terminal, guidance 1"
)
LIGHTX2V = (
    "ModelTC/LightX2V, models/schedulers/wan/step_distill: {}, denoising steps 1000, 750, 500, 250, shift 5, guidance 1"
)
CAUSVID = "tianweiy/CausVid, causvid/dmd.py: fresh noise between the steps (its consistency sampler); "


def shifted(shift: float, *shares: float) -> tuple[float, ...]:
    """1000 s u / (1 + (s - 1) u) of each share u (arXiv:2403.03206, Eq. 23)."""
    return tuple(1000 * shift * share / (1 + (shift - 1) * share) for share in shares)


def even(shift: float, steps: int) -> tuple[float, ...]:
    """``steps`` equal steps from 1, shifted."""
    return shifted(shift, *(left / steps for left in range(steps, 0, -1)))


def flow_scale(time: float) -> float:
    """Of the noise that ComfyUI's samplers begin with at a ``time`` below pure noise: sigma of it."""
    sigma = time / 1000
    return sigma / math.hypot(1 - sigma, sigma)


def ends(shift: float, steps: int) -> tuple[float, ...]:
    """Evenly from 1000 to the lowest of 1000 shifted times, and shifted once more: FlowMatchEulerDiscreteScheduler
    without sigmas of the caller's, and Stability's own sd3_infer.py."""
    low = shifted(shift, 0.001)[0] / 1000
    return shifted(shift, *(1 - (1 - low) * step / (steps - 1) for step in range(steps)))


def _sd3(times: tuple[float, ...], source: str, **more: Any) -> Recipe:
    # the base's shift, not that of the times: ComfyUI's nodes are named for the base as it is
    return preset(*times, family="sd3", source=source, shift=3.0, **more)


def _flux(times: tuple[float, ...], source: str, **more: Any) -> Recipe:
    return preset(*times, family="flux", source=source, **more)


MEGAPIXEL = ((1024, 1024),)
FLUX_SHIFT = math.exp(1.15)
"""FLUX.1-dev's at 1024x1024: mu = 1.15 for 4096 tokens."""
KLEIN_SHIFT = math.exp(2.291179894)
"""FLUX.2's at 1024x1024 and 4 steps: compute_empirical_mu(4096, 4) of its pipelines."""
ANIMA = (
    "huggingface.co/circlestone-labs/Anima, model card: Anima Turbo, 4 to 8 steps, cfg 1, Euler; shift 3, as ComfyUI "
    "draws the base"
)

FLOW: dict[str, Recipe] = {
    "flux-schnell-4": _flux(
        even(1.0, 4),
        "black-forest-labs/flux, cli.py and sampling.py: flux-schnell, 4 steps, times not shifted",
        shift=1.0,
    ),
    **{
        f"hyper-flux-{steps}": _flux(
            even(FLUX_SHIFT, steps), HYPER_FLUX.format(steps), lora_scale=0.125, sizes=MEGAPIXEL
        )
        for steps in (8, 16)
    },
    "flux-turbo-alpha-8": _flux(
        even(FLUX_SHIFT, 8),
        "huggingface.co/alimama-creative/FLUX.1-Turbo-Alpha, model card: 8-step LoRA of FLUX.1-dev, LoRA scale 1, "
        "embedded guidance 3.5; times for 1024x1024",
        sizes=MEGAPIXEL,
    ),
    "sd3.5-turbo-4": _sd3(
        (1000.0, 857.69232, 602.15057, 8.9285717),
        "Stability-AI/sd3.5, sd3_infer.py, and model card: SD3.5-Large-Turbo, Euler, 4 steps, no guidance",
    ),
    **{
        f"hyper-sd3-{steps}-cfg": _sd3(
            ends(3.0, steps), HYPER_SD3.format(steps, guidance), lora_scale=0.125, guidance=guidance
        )
        for steps, guidance in ((4, 3.0), (8, 5.0), (16, 7.0))
    },
    "pcm-sd3-2": _sd3(shifted(1.0, 1.0, 0.5), PCM_SD3.format("2-step deterministic", 1), guidance=1.2),
    "pcm-sd3-4": _sd3(shifted(3.0, 1.0, 0.76, 0.5, 0.26), PCM_SD3.format("4-step deterministic", 3), guidance=1.2),
    "pcm-sd3-4-shift1": _sd3(
        shifted(1.0, 1.0, 0.76, 0.5, 0.26), PCM_SD3.format("4-step deterministic", 1), guidance=1.2
    ),
    "pcm-sd3-4-stochastic": _sd3(
        shifted(3.0, 1.0, 0.76, 0.5, 0.26), PCM_SD3.format("stochastic", 3), guidance=1.2, renoise=True
    ),
    "tdm-sd3-4": _sd3(
        shifted(6.0, 0.999, 0.74925, 0.4995, 0.24975),
        "Luo-Yihong/TDM, README: TDM-SD3-LoRA, 4 steps, LoRA scale 0.125, flow_shift 6, guidance 1" + SECOND_ORDER,
        lora_scale=0.125,
    ),
    "z-image-turbo-8": preset(
        *even(3.0, 8),
        family="z_image",
        shift=3.0,
        source="huggingface.co/Tongyi-MAI/Z-Image-Turbo, model card: 8 forwards, no guidance; shift 3. ComfyUI's "
        "template image_z_image_turbo draws these times with res_multistep",
    ),
    "flux2-klein-4": preset(
        *even(KLEIN_SHIFT, 4),
        family="flux2",
        sizes=MEGAPIXEL,
        source="diffusers, pipeline_flux2_klein.py, and ComfyUI's template image_flux2_klein_text_to_image: FLUX.2 "
        "klein 4B and 9B, 4 steps, guidance 1, Euler; times for 1024x1024",
    ),
    **{
        f"qwen-image-lightning-{steps}": preset(
            *even(3.0, steps), family="qwen_image", shift=3.0, source=QWEN.format(steps)
        )
        for steps in (4, 8)
    },
    **{f"anima-turbo-{steps}": preset(*even(3.0, steps), family="anima", shift=3.0, source=ANIMA) for steps in (4, 8)},
    "krea2-turbo-8": preset(
        *even(FLUX_SHIFT, 8),
        family="krea2",
        shift=FLUX_SHIFT,
        source="diffusers, pipeline_krea2.py (is_distilled: mu 1.15 at every size), and ComfyUI's template "
        "image_krea2_turbo_t2i: Krea 2 Turbo, 8 steps, no guidance, Euler",
    ),
    "wan2.1-lightx2v-4": preset(
        *even(5.0, 4), family="wan", shift=5.0, renoise=True, source=LIGHTX2V.format("Wan 2.1 14B, fresh noise")
    ),
    "wan2.2-lightx2v-4": preset(
        *even(5.0, 4),
        family="wan",
        shift=5.0,
        source=LIGHTX2V.format("Wan 2.2 A14B, Euler, the high-noise file in steps 1 and 2, the low-noise one in 3, 4"),
    ),
    "wan2.2-lightx2v-high-2": preset(
        *even(5.0, 4)[:2],
        family="wan",
        shift=5.0,
        end=even(5.0, 4)[2],
        source=LIGHTX2V.format("Wan 2.2 A14B, Euler, the high-noise file, steps 1 and 2 of 4"),
    ),
    "wan2.2-lightx2v-low-2": preset(
        *even(5.0, 4)[2:],
        family="wan",
        shift=5.0,
        initial_noise_scale=flow_scale(even(5.0, 4)[2]),
        source=LIGHTX2V.format("Wan 2.2 A14B, Euler, the low-noise file, steps 3 and 4 of 4"),
    ),
    "fastwan-3": preset(
        *(1000.0, 757.0, 522.0),
        family="wan",
        shift=8.0,
        renoise=True,
        source="hao-ai-lab/FastVideo, its DMD inference scripts: FastWan2.1 and 2.2 5B, dmd_denoising_steps 1000, 757, "
        "522, flow shift 8, guidance 1",
    ),
    "causvid-3": preset(
        *(1000.0, 757.0, 522.0),
        family="wan",
        shift=8.0,
        renoise=True,
        source=CAUSVID + "configs/wan_bidirectional_dmd_from_scratch.yaml: denoising steps 1000, 757, 522, no guidance",
    ),
    "causvid-9": preset(
        *(999.0, 934.0, 862.0, 756.0, 603.0, 410.0, 250.0, 140.0, 74.0),
        family="wan",
        shift=8.0,
        renoise=True,
        initial_noise_scale=flow_scale(999.0),
        source=CAUSVID
        + "ModelTC/LightX2V, configs/causvid/wan_t2v_causvid.json: the 14B model, 9 denoising steps from "
        "999 to 74, shift 8, no guidance",
    ),
}
