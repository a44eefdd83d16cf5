"""Which of diffusers' networks can be steered, at which attentions, and between which times."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

from ..core.errors import OneStepError
from ..core.families import FAMILIES, STEERING, choices, detect, of_class
from ..core.schedule import FlowSchedule, NoiseSchedule, SizeShift, VPSchedule
from .schedules import schedule_in
from .steer_attention import JOINT, CrossSteered, JointSteered
from .steer_krea2 import FusedSteered
from .steer_lumina2 import Lumina2Steered
from .steer_one_stream import StreamSteered
from .steer_parallel import ParallelSteered
from .steer_qwen import QwenSteered
from .threads import processors_of

STEERED = CrossSteered | JointSteered | ParallelSteered | QwenSteered | StreamSteered | Lumina2Steered | FusedSteered
APART: dict[type, Any] = {
    Flux2ParallelSelfAttnProcessor: ParallelSteered,
    QwenDoubleStreamAttnProcessor2_0: QwenSteered,
}
COMPUTED_ANEW = (*JOINT, *APART, ZSingleStreamAttnProcessor, Lumina2AttnProcessor2_0, Krea2AttnProcessor)


def apart_of(processor: Any) -> Any:
    """What steers a joint attention that is called unlike SD3's, or None."""
    return next((steered for kind, steered in APART.items() if isinstance(processor, kind)), None)


def family_of(network: Any) -> str:
    kinds = (of_class(cls.__name__) for cls in type(network).__mro__)
    family = next((family for family in kinds if family is not None), None)
    if family not in STEERING:
        served = choices(name for name in FAMILIES if name in STEERING)
        raise OneStepError(f"a {type(network).__name__} is not served by negative steering: use {served}")
    if is_steered(network):
        raise OneStepError("this network is steered already: leave that `steered` first")
    return family


def attentions_of(network: Any, family: str, layers: str) -> dict[str, Any]:
    """The attentions that see a text and are steered, by their processors' names."""
    found = {name: network.get_submodule(name.removesuffix(".processor")) for name in processors_of(network)}
    if not FAMILIES[family].cross_attention:
        # SD3.5's second attention of a block, and the refiner of noise of one stream, see the picture alone, a part of
        # Krea 2's fusion a single token
        textless = (".attn2.", "noise_refiner.", "layerwise_blocks.")
        return {name: attn for name, attn in found.items() if not any(part in name for part in textless)}
    crossed = {name: attn for name, attn in found.items() if attn.is_cross_attention}
    if not crossed or any(attn.added_kv_proj_dim is not None for attn in found.values()):
        raise OneStepError("this U-Net has no cross-attention to a text of its own: it is not served by steering")
    chosen = {name: attn for name, attn in crossed.items() if layers == "all" or not name.startswith("down_blocks.")}
    if not chosen:
        raise OneStepError("this U-Net has no cross-attention in its decoder: set steering's layers to all")
    return chosen


def refuse_foreign(processor: Any) -> None:
    """A joint attention is computed anew, so that what a foreign processor adds would be lost."""
    if not isinstance(processor, COMPUTED_ANEW) or getattr(processor, "_parallel_config", None) is not None:
        name = type(processor).__name__
        what = "an IP-Adapter" if "IPAdapter" in name else "another attention, or one over several devices,"
        raise OneStepError(
            f"this transformer has {what} ({name}), which steering does not serve there: take it off first"
        )


def width_of(network: Any, attentions: dict[str, Any]) -> int:
    family = detect(network)
    if FAMILIES[family].unet:
        return next(iter(attentions.values())).cross_attention_dim
    return FAMILIES[family].widths(network.config)[0]


def pooled_width_of(network: Any) -> int:
    """Of the pooled text that modulates a text's tokens; 0 where none does."""
    family = FAMILIES[detect(network)]
    return 0 if family.cross_attention else family.widths(network.config)[1]


def read_by(network: Any, attentions: dict[str, Any]) -> tuple[int, int, int]:
    """How wide tokens and pooled text are that it reads; of how many tokens a text is, where it numbers them."""
    family = FAMILIES[detect(network)]
    return width_of(network, attentions), pooled_width_of(network), 0 if family.numbered is None else family.tokens


def unsteered(processor: Any) -> Any:
    """The processor that was there before steering."""
    return processor.inner if isinstance(processor, STEERED) else processor


def is_steered(network: Any) -> bool:
    """Whether a network is inside `steered`."""
    found = (getattr(module, "processor", None) for module in network.modules())
    return any(isinstance(processor, STEERED) for processor in found)


def times_of(pipe: Any, family: str, start: float, end: float) -> tuple[float, float]:
    """The network's own times at the shares ``start`` and ``end``, as ComfyUI counts percent: open at 0 and 1."""
    if not 0 <= start < end <= 1:
        raise OneStepError(
            f"steering from {start!r:.20} to {end!r:.20} is no range: 0 <= start < end <= 1, 0 the noisiest"
        )
    latest = math.inf if start == 0 else _time_at(_of_usual_size(schedule_in(pipe, family)), 1 - start)
    return latest, -math.inf if end == 1 else _time_at(_of_usual_size(schedule_in(pipe, family)), 1 - end)


def _of_usual_size(schedule: NoiseSchedule) -> NoiseSchedule:
    """With the shift of the family's usual size where it hangs on the picture's, which no forward has told yet."""
    if not isinstance(schedule, FlowSchedule) or not isinstance(schedule.by_steps, SizeShift):
        return schedule
    return replace(schedule, shift=schedule.by_steps(1))  # whatever the steps


def _time_at(schedule: NoiseSchedule, share: float) -> float:
    if isinstance(schedule, VPSchedule):
        return share * (schedule.times - 1)
    return float(schedule.time_of_sigma(schedule.sigma_at(torch.tensor(share, dtype=torch.float64))))
