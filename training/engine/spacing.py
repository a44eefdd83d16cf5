"""After which updates a run keeps its student as a candidate, and in which numbers."""

from __future__ import annotations

import torch

from ..settings import Settings

KEPT_AS = torch.bfloat16
"""As fine as what the factors' products are added to, where a base computes in it; half of what a LoRA file takes."""


def spacing(update: int, settings: Settings) -> int:
    """Updates from one to the next where a run has done ``update``: ``candidate_every``, doubled until there are no
    more than ``candidates``; 0 = none. Each spacing's updates are among those of the one before: a run that goes on
    from an earlier state finds, or makes again, all that it is to have at its end."""
    every = settings.candidate_every
    while every and update // every > settings.candidates:
        every *= 2
    return every


def number(updates: int, settings: Settings) -> int:
    """How many a run of ``updates`` has at its end."""
    every = spacing(updates, settings)
    return updates // every if every else 0
