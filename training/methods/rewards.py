r"""Rewards: functions of pictures and prompts of which a student is to have more, and their pull on it.

    L = L_matching - lambda E r(decode(x), c),     pull = -lambda d r / d x

DI*'s term (arXiv:2410.20898), by backward through the decoder. A reward that is brought up without end draws what it
was never asked about: the guards are 0 for pictures as they usually are, and fall where colour or contrast burn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import OneStepError
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..settings import Settings, nearest

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""(pictures [B, 3, H, W] in [0, 1], their prompts) -> [B], more is better, each of its own picture and prompt alone,
with a gradient in the pictures."""
CHROMA, CONTRAST = 0.6, 0.3
"""Where the guards begin, ours: a pixel's colour, and the deviation of a picture's brightness; photographs have about
0.2 of each."""
LUMA = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue in brightness (ITU-R BT.709)."""
SMALL = 1024.0
"""Times the loss on the way back through a decoder in float16."""


def saturation(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """-mean max(0, max_c p - min_c p - CHROMA)^2."""
    chroma = pictures.amax(1) - pictures.amin(1)
    return -(chroma - CHROMA).relu().square().flatten(1).mean(1)


def contrast(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """-max(0, std of brightness - CONTRAST)^2."""
    brightness = torch.einsum("c,bchw->bhw", pictures.new_tensor(LUMA), pictures).flatten(1)
    return -(brightness.std(1, correction=0) - CONTRAST).relu().square()


BUILT_IN: dict[str, Reward] = {"saturation": saturation, "contrast": contrast}
AGREEMENT = "agreement"
_given: ContextVar[Mapping[str, Reward]] = ContextVar("rewards")


@contextmanager
def given(rewards: Mapping[str, Reward]) -> Iterator[None]:
    """Within, a run's settings may name these too."""
    for name, reward in rewards.items():
        if not (isinstance(name, str) and name.isidentifier() and callable(reward)):
            raise OneStepError(
                f"rewards has {name!r:.60}: {reward!r:.60}: give names of letters, digits and _, and for each a "
                "function of pictures and prompts"
            )
        if name in BUILT_IN:
            raise OneStepError(f"rewards has {name!r}, which is built in: give yours another name")
    before = _given.set({**_given.get({}), **rewards})
    try:
        yield
    finally:
        _given.reset(before)


def told(text: str) -> dict[str, float]:
    """The rewards of a setting, "agreement, contrast*0.5", with what each counts."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, star, times = (piece.strip() for piece in part.partition("*"))
        try:
            found[name] = float(times) if star else 1.0
        except ValueError:
            found[name] = float("nan")
        if not -1e6 < found[name] < 1e6:
            raise OneStepError(f"reward has {part[:60]!r}: write a number behind the star, as in {name[:40]}*0.5")
    return found


def rewards_of(settings: Settings, planned: bool = False) -> list[tuple[str, float, Reward]]:
    """(name, what it counts, reward) of each that the settings name. planned: whether on the meta device, where a
    person's own, and what reads a model, are left out. Raises OneStepError for one that is not there."""
    known = {**BUILT_IN, **_given.get({})}
    names = told(settings.own.reward)
    if not names:
        raise OneStepError(f"reward is empty: name one or several of {', '.join([AGREEMENT, *known])}")
    if planned:
        return [(name, times, BUILT_IN[name]) for name, times in names.items() if name in BUILT_IN]
    for name in names:
        if name not in known and name == AGREEMENT:
            raise OneStepError(
                "the reward agreement is had in Python and on the command line, with the folder of a CLIP in "
                f"reward_model; here there are {', '.join(known)}"
            )
        if name not in known:
            raise OneStepError(
                f"reward names {name[:60]!r}{nearest(name, known)}; one of your own is given to onestep.distill, each "
                f"time that the run goes on too: rewards={{{name[:60]!r}: function}}"
            )
    return [(name, times, known[name]) for name, times in names.items()]


def valued(name: str, reward: Reward, pictures: Tensor, prompts: Sequence[str], *, graded: bool = True) -> Tensor:
    """The reward [B]. Raises OneStepError, by its name, for what is none; graded: and for one without a gradient."""
    found: Any = reward(pictures, prompts)
    count = len(pictures)
    if not isinstance(found, Tensor) or found.shape != (count,):
        gave = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise OneStepError(
            f"the reward {name!r} gave {gave} for {count} pictures: it must give a tensor [{count}], a number for each"
        )
    if graded and not found.requires_grad:
        raise OneStepError(
            f"the reward {name!r} has no gradient in the pictures: it must be computed by torch from them, without "
            "no_grad, item() or numpy()"
        )
    return found


def check_numbers(values: Mapping[str, Tensor], slope: Tensor | None, prompts: Sequence[str]) -> None:
    """Raises OneStepError for rewards [B], each by its name, or their gradient, that are not finite. A card is waited
    for once."""
    every = [*values.values(), *([] if slope is None else [slope])]
    if not every or bool(torch.stack([value.detach().isfinite().all() for value in every]).all()):
        return
    for name, value in values.items():
        for number, prompt in zip(value.tolist(), prompts, strict=True):
            if not math.isfinite(number):
                raise OneStepError(
                    f"the reward {name!r} gave {number} for a picture of {prompt[:60]!r}: every number must be finite"
                )
    raise OneStepError(f"the gradient of the reward ({', '.join(values)}) through the decoder is not finite")


def summed(
    rewards: Sequence[tuple[str, float, Reward]], shown: Tensor, texts: Sequence[str], graded: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the sum [B] of each reward times what it counts, each [B] by its name) of pictures ``shown`` [B, 3, H, W]."""
    values, total = {}, shown.new_zeros(len(shown))
    for name, times, reward in rewards:
        values[name] = valued(name, reward, shown, texts, graded=graded)
        total = total + times * values[name]
    return total, values


@dataclass(frozen=True)
class RewardPull:
    """rewards: with their names and what each counts. weight: lambda."""

    setup: Setup
    rewards: Sequence[tuple[str, float, Reward]]
    weight: float

    def __call__(self, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(-lambda d r / d x [B, ...], numbers for the metrics)."""
        with self.setup.host.decoding() as decode, torch.enable_grad():
            free = x.detach().requires_grad_()
            pictures = decode(free)
            # the value of what is shown, the gradient of what burns too
            shown = pictures + (pictures.clamp(0, 1) - pictures).detach()
            total, values = summed(self.rewards, shown, batch.texts)
            if not self.rewards:  # none of those that a plan can count
                total = total + shown.flatten(1).mean(1)
            (slope,) = torch.autograd.grad(SMALL * total.sum(), free)
        check_numbers(values, slope, batch.texts)
        found = slope.to(x) * (-self.weight / SMALL)
        numbers = {f"reward_{name}": value.detach().mean() for name, value in values.items()}
        numbers |= {"reward": total.detach().mean(), "reward_pull": found.flatten(1).norm(dim=1).mean()}
        return found, numbers


@dataclass(frozen=True)
class Ranked:
    """What pictures are ranked by; it needs no gradient. rewards: with their names and what each counts."""

    setup: Setup
    rewards: Sequence[tuple[str, float, Reward]]

    @torch.no_grad()
    def __call__(self, batch: Batch, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(the sum of the rewards [B] of latents x [B, ...], numbers for the metrics)."""
        with self.setup.host.decoding() as decode:
            shown = decode(x).clamp(0, 1)
        total, values = summed(self.rewards, shown, batch.texts, graded=False)
        check_numbers(values, None, batch.texts)
        numbers = {f"reward_{name}": value.mean() for name, value in values.items()}
        return total.to(x), numbers | {"reward": total.mean()}


def ranked(setup: Setup) -> Ranked:
    """As the settings name it."""
    return Ranked(setup, rewards_of(setup.settings, setup.host.device.type == "meta"))


def reward_pull(setup: Setup) -> RewardPull:
    """As the settings name it."""
    planned = setup.host.device.type == "meta"
    return RewardPull(setup, rewards_of(setup.settings, planned), setup.settings.own.reward_weight)
