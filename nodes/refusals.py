"""What a MODEL may not be, or carry, that is distilled."""

from __future__ import annotations

from typing import Any

import comfy.model_base

from ..core.errors import OneStepError
from ..core.families import FAMILIES, bind_comfy, detect, refuse_name, refuse_pooled, refuse_short, refuse_text, select
from ..training.engine.donor import read_initial
from ..training.settings import Settings
from .denoiser import conditionings
from .own_text import refuse_without_ids


def refuse_patches(model: Any) -> None:
    """What changes more than weights and sampling could not be differentiated, or would be lost in the LoRA."""
    found = _strange_options(model) + [
        f"the object patch {key}" for key in model.object_patches if key != "model_sampling"
    ]
    wrappers = [(kind, name) for kind, named in model.wrappers.items() for name, kept in named.items() if kept]
    found += sorted({f"the wrapper {name or kind}" for kind, name in wrappers})
    for attribute, word in (
        ("weight_wrapper_patches", "a weight wrapper"),
        ("injections", "an injection"),
        ("hook_patches", "a hook"),
        ("additional_models", "an additional model"),
    ):
        found += [f"{word} ({key})" for key, value in getattr(model, attribute, {}).items() if value]
    if found:
        raise OneStepError(
            f"the MODEL to distil carries {', '.join(found)[:200]}: plug in the model before that node; LoRAs "
            f"and ModelSampling "
            "nodes may stay, they are part of the teacher"
        )


def _strange_options(model: Any) -> list[str]:
    options = dict(model.model_options)
    inner = options.pop("transformer_options", {})
    found = [f"the option {name}" for name, value in options.items() if value and name != "disable_cfg1_optimization"]
    for name, value in inner.items():
        patches = [key for key, entry in value.items() if entry] if isinstance(value, dict) else [""] * bool(value)
        found += [f"the patch {name} {key}".rstrip() for key in patches]
    return found


def refuse_variant(family: str, model: Any, name: str) -> None:
    """Models of a known network that are told more than a text. name: of the checkpoint."""
    refuse_name(family, name)
    config, wanted = model.model_config.unet_config, model.latent_format.latent_channels
    channels = config.get("in_channels", config.get("in_dim", wanted))  # as Wan has it
    # Qwen-Image's configuration counts those of a whole patch
    if channels not in (wanted, wanted * FAMILIES[family].patch ** 2 if FAMILIES[family].packed else wanted):
        raise OneStepError(
            f"this model takes {channels} input channels (inpainting, depth or editing): use a text-to-image base"
        )
    if FAMILIES[family].unet and model.adm_channels and not isinstance(model, comfy.model_base.SDXL):
        raise OneStepError(f"{type(model).__name__} is told more than a text: use SD1.5, SD2 or the SDXL base")


def refuse_encoder(clip: Any, model: Any) -> None:
    """Raises OneStepError for another model's text encoder."""
    ((text, told),) = conditionings(clip, [""])
    refuse_text(family := detect(model.diffusion_model), model.model_config.unet_config, text.shape[-1])
    refuse_pooled(family, text.shape[-1], told.get("pooled_output") is not None)
    refuse_short(family, text.shape[1])
    refuse_without_ids(model.diffusion_model, told, text.shape[-1])


def refuse_initial(settings: Settings, model: Any) -> None:
    """Raises OneStepError for an initial LoRA of another model."""
    if settings.initial_lora:
        family, network = detect(model.diffusion_model), model.diffusion_model
        targets = bind_comfy(family, network, model.model_config.unet_config)
        read_initial(family, select(targets, settings.targets), settings)
