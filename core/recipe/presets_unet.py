"""The public few-step models of SD1.5, SD2 and SDXL: each after its authors' own code or model card, which `source`
names with the files that it is for. Where a card says guidance 0, diffusers computes the prompt's rows alone: guidance
1 here."""

from __future__ import annotations

from typing import Any

from .definition import Recipe


def preset(*times: float, source: str, **more: Any) -> Recipe:
    return Recipe(tuple(map(float, times)), source=source, **more)


TRAILING = {
    1: (999,),
    2: (999, 499),
    4: (999, 749, 499, 249),
    8: (999, 874, 749, 624, 499, 374, 249, 124),
    12: (999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82),
    16: (999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61),
}
"""diffusers' timestep_spacing="trailing" (arXiv:2305.08891, table 2), by steps."""
LCM = (999, 759, 499, 259)
"""diffusers' LCMScheduler and TCDScheduler: 4 of their 50 times, whatever timestep_spacing says."""

HYPER = "huggingface.co/ByteDance/Hyper-SD, model card: {}"
LIGHTNING = "huggingface.co/ByteDance/SDXL-Lightning, model card: {} U-Net or LoRA, Euler, trailing, guidance 0"
TURBO = "Stability-AI/generative-models, scripts/demo/turbo.py: {}, 1 step from the noisiest of 1000 times, no guidance"
PCM = "huggingface.co/wangfuyun/PCM_Weights, model card: {} LoRA of SD1.5 or SDXL, DDIM or Euler, trailing, guidance {}"
NITRO = (
    "ChenDarYen/NitroFusion, README: NitroSD-{}, U-Net of SDXL, LCMScheduler over 4 times, timestep shift {}, 1 to 4 "
    "steps, guidance 0"
)
SECOND_ORDER = "; the card draws with DPM-Solver++ of second order (dpmpp_2m), these are first-order steps at its times"


def _nitro(steps: int, name: str, shift: int) -> Recipe:
    own = TRAILING[4][:: 4 // steps]
    return preset(*own, renoise=steps > 1, time_scale=shift / 1000, source=NITRO.format(name, shift))


def _pcm(steps: int, name: str, guidance: float, range_: str) -> Recipe:
    return preset(*TRAILING[steps], guidance=guidance, source=PCM.format(f"{steps}-step {name}", range_))


UNET: dict[str, Recipe] = {
    "sd-turbo-1": preset(999, source=TURBO.format("SD-Turbo")),
    "sdxl-turbo-1": preset(999, source=TURBO.format("SDXL-Turbo")),
    "lcm-4": preset(
        *LCM,
        renoise=True,
        source="huggingface.co/latent-consistency/lcm-lora-sdv1-5 and -sdxl (arXiv:2311.05556): LCM-LoRA, "
        "LCMScheduler, 4 of its 50 times, guidance 0",
    ),
    "tcd-4": preset(
        *LCM,
        eta=0.3,
        source="jabir-zheng/TCD, README (arXiv:2402.19159): TCD-LoRA, TCDScheduler, 4 of its 50 times, eta 0.3, "
        "guidance 0",
    ),
    "sdxl-lightning-1": preset(
        999,
        prediction="sample",
        source="huggingface.co/ByteDance/SDXL-Lightning, model card: 1-step U-Net, which predicts x0, trailing, "
        "guidance 0",
    ),
    "sdxl-lightning-2": preset(*TRAILING[2], source=LIGHTNING.format("2-step")),
    "sdxl-lightning-4": preset(*TRAILING[4], source=LIGHTNING.format("4-step")),
    "sdxl-lightning-8": preset(*TRAILING[8], source=LIGHTNING.format("8-step")),
    "hyper-sd-1-lora": preset(
        999,
        eta=1.0,
        source=HYPER.format("1-step LoRA of SD1.5 or SDXL, TCDScheduler, 1 step, eta 1, guidance 0"),
    ),
    **{
        f"hyper-sd-{steps}-lora": preset(
            *TRAILING[steps],
            source=HYPER.format(f"{steps}-step LoRA of SD1.5 or SDXL, DDIM, trailing, guidance 0"),
        )
        for steps in (2, 4, 8)
    },
    **{
        f"hyper-sd-{steps}-cfg": preset(
            *TRAILING[steps],
            guidance=5.0,
            source=HYPER.format(f"{steps}-step CFG-preserved LoRA of SD1.5 or SDXL, DDIM, trailing, guidance 5 to 8"),
        )
        for steps in (8, 12)
    },
    "hyper-sdxl-1-unet": preset(
        800, source=HYPER.format("Hyper-SDXL-1step-Unet, LCMScheduler, timesteps [800], guidance 0")
    ),
    **{f"pcm-{steps}": _pcm(steps, "smallcfg", 1.0, "1 to 2") for steps in (2, 4, 8, 16)},
    # of the card's ranges the middle; for 16 steps it has none but 2 to 9, and the demo draws at 7.5
    "pcm-4-cfg": _pcm(4, "normalcfg", 3.0, "2.5 to 3.5"),
    "pcm-8-cfg": _pcm(8, "normalcfg", 4.5, "3 to 6"),
    "pcm-16-cfg": _pcm(16, "normalcfg", 7.5, "2 to 9 (7.5 in G-U-N/Phased-Consistency-Model, demo/app.py)"),
    "pcm-lcm-4": preset(
        *LCM,
        renoise=True,
        source="G-U-N/Phased-Consistency-Model, demo/app.py: lcmlike LoRA of SD1.5 or SDXL, LCMScheduler, 4 steps, "
        "guidance 0",
    ),
    "flash-4": preset(
        *LCM,
        renoise=True,
        source="huggingface.co/jasperai/flash-sd and flash-sdxl, model cards: LoRA, LCMScheduler (which knows no "
        "trailing times), 4 steps, guidance 0",
    ),
    **{f"nitrosd-realism-{steps}": _nitro(steps, "Realism", 250) for steps in (1, 2, 4)},
    **{f"nitrosd-vibrant-{steps}": _nitro(steps, "Vibrant", 500) for steps in (1, 2, 4)},
    "sdxs-1": preset(
        999,
        source="IDKiro/sdxs, demo.py: SDXS-512, 1 step, guidance 0; the time is not named there, 999 is the noisiest",
    ),
    "dmd2-1": preset(
        399, source="tianweiy/DMD2, README: 1-step U-Net of SDXL, LCMScheduler, timesteps [399], guidance 0"
    ),
    "dmd2-4": preset(
        *TRAILING[4],
        renoise=True,
        source="tianweiy/DMD2, demo/text_to_image_sdxl.py and model card: 4-step U-Net or LoRA of SDXL, fresh noise, "
        "guidance 0",
    ),
    "tdm-sd15-4": preset(
        *(999, 749, 500, 250),
        source="Luo-Yihong/TDM, README: TDM-Dreamshaper-v7-LoRA, 4 steps, guidance 1" + SECOND_ORDER,
    ),
}
