"""What acts in the network for the length of a call: a steered negative, a guidance or control adapter, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ..core.cond import Cond
from ..core.control import ControlAdapter
from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.guidance import MODES, Steering
from .adapt import DiffusersHost
from .control import control_picture, controlled
from .guidance_adapter import GuidanceDial
from .own_guidance import Rows
from .steer import steered, steering_of
from .text import PromptInput


def prompt_rows(guided: bool) -> Rows:
    """Where the prompt's rows lie in a batch of this package's own guidance."""
    return "first half" if guided else "all"


def steering(
    pipe: Any, host: DiffusersHost, given: PromptInput, negative: Cond | None, mode: str | Steering | None,
    scale: float | None, guided: bool,
) -> AbstractContextManager[None]:  # fmt: skip
    """The prompt's rows steered away from ``negative``, what is made of ``given``; nothing where no mode is given."""
    if mode is None or negative is None:
        if scale is not None:
            raise OneStepError(f"scale is {scale!r:.20}, and nothing is steered: give steering too, {', '.join(MODES)}")
        return nullcontext()
    chosen = steering_of(mode, scale)
    if not chosen.wants_padding and given.embeds is None:
        told = {"padded": False, "negative": True}
        negative = host.encode(given.listed if given.texts else [""], host.native_size, **told)
    empty = host.encode([""], host.native_size, negative=True) if chosen.wants_empty else None
    # nothing of the network changes within a call
    return steered(pipe, negative, chosen, rows=prompt_rows(guided), cache=True, empty=empty)


def dial(
    pipe: Any, loaded: tuple[Any, float] | None, guidance: float | None, guided: bool
) -> AbstractContextManager[Any]:
    """A guidance adapter. loaded: it, and the guidance that it was loaded at."""
    if loaded is not None:
        adapter, usual = loaded
        return GuidanceDial(pipe, adapter, usual if guidance is None else guidance, prompt_rows(guided), True)
    if guidance is not None:
        raise OneStepError(
            f"guidance is {guidance!r:.20}, and no adapter has it: call load_guidance_adapter(path) first, or give "
            "guidance_scale for classifier-free guidance"
        )
    return nullcontext()


def control(
    pipe: Any, adapter: ControlAdapter | None, images: Any, strength: float, size: tuple[int, int],
    counts: tuple[int, int],
) -> AbstractContextManager[None]:  # fmt: skip
    """A control adapter that draws by ``images``, one for all or one a prompt. counts: prompts, pictures of each."""
    if images is None:
        return nullcontext()
    if adapter is None:
        raise OneStepError("there is a control_image, and nothing to draw by it: call load_control(path) first")
    found: Tensor = control_picture(adapter, images, size)
    prompts, each = counts
    if len(found) not in (1, prompts):
        raise OneStepError(f"there are {len(found)} control images for {prompts} prompts: give one, or as many")
    return controlled(pipe, adapter, found if len(found) == 1 else found.repeat_interleave(each, 0), strength=strength)


def attention(
    family: str, cross: Mapping[str, Any] | None, joint: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Of cross_attention_kwargs and joint_attention_kwargs the one that this family's network takes."""
    if joint and FAMILIES[family].unet:
        raise OneStepError("joint_attention_kwargs is a transformer's: give a U-Net cross_attention_kwargs")
    if cross and not FAMILIES[family].unet:
        raise OneStepError("cross_attention_kwargs is a U-Net's: give a transformer joint_attention_kwargs")
    return cross if FAMILIES[family].unet else joint
