"""A pipeline's own classifier-free guidance: what acts on rows of a batch must know which of them are the prompt's."""

from __future__ import annotations

import inspect
from threading import get_ident
from typing import Any, Literal, get_args

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from .kinds import PIXART

Rows = Literal["all", "first half", "second half"]


def part(rows: str, batch: int) -> slice:
    """The ``rows`` of a batch."""
    first, last = (rows == "second half") * batch // 2, batch // (1 + (rows == "first half"))
    return slice(first, last)


def classifier_free(pipe: Any) -> bool:
    """Whether ``pipe``, in whose call this is asked, draws with guidance. PixArt's alone tells it nowhere but in that
    call's own variables."""
    name, frame = "do_classifier_free_guidance", inspect.currentframe()
    if type(pipe).__name__ != PIXART:
        return bool(getattr(pipe, name, False))
    while frame is not None and not (frame.f_locals.get("self") is pipe and name in frame.f_locals):
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals[name])


class OwnGuidance:
    """Watches a pipeline whose network something hangs on. rows: of each batch, those that it acts on."""

    def __init__(self, pipe: Any, rows: str, family: str) -> None:
        if rows not in get_args(Rows):
            raise OneStepError(f"rows is {rows!r:.40}: choose one of {', '.join(get_args(Rows))}")
        self.pipe, self.rows, self.family = pipe, rows, family
        self._asked: dict[int, tuple[Any, Any]] = {}  # by each thread

    def check(self, latents: Any, text: Any) -> None:
        """Of the forward about to be made. Raises OneStepError where rows would be acted on that are not the
        prompt's."""
        name = type(self.pipe).__name__
        guider = getattr(self.pipe, "guider", None)  # of a pipeline that is put together of blocks
        guided = getattr(guider, "num_conditions", 1) > 1 or classifier_free(self.pipe)
        family = FAMILIES[self.family]
        if guided and family.prompts == "alone":
            raise OneStepError(
                f"this {name} draws with guidance of its own, whose negative would be acted on as the prompt is: call "
                f"it with guidance_scale={family.unguided:g}"
            )
        if self.rows != "all" and len(text) % 2:
            raise OneStepError(f"the network's batch has {len(text)} rows, no two halves, and rows is {self.rows!r}")
        if self.rows == "all" and guided:
            raise OneStepError(
                f"this {name} draws with guidance of its own, whose negative is half of each batch: call it with "
                f'guidance_scale={family.unguided:g}, or say which half is the prompt\'s (rows="{family.prompts}" in '
                "diffusers' own pipeline)"
            )
        truncation = getattr(self.pipe, "_cfg_truncation", None)
        if self.rows != "all" and truncation is not None and truncation < 1:
            raise OneStepError(
                f"this {name} leaves its guidance out in some steps, whose batch then has no halves: call it with "
                "cfg_truncation=1"
            )
        # Flux' pipelines ask for their negative in a forward of its own, of the very same latents
        before = self._asked.get(get_ident(), (None, None))
        self._asked[get_ident()] = latents, text
        again = latents is before[0] and text is not before[1]
        if again and "true_cfg_scale" in inspect.signature(type(self.pipe).__call__).parameters:
            raise OneStepError(
                f"this {name} draws with guidance of its own, whose negative would be acted on as the prompt is: call "
                "it with true_cfg_scale=1"
            )
