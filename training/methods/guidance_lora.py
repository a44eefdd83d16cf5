"""One guidance of the teacher in one forward, as a LoRA (arXiv:2503.07274, arXiv:2210.03142)."""

from __future__ import annotations

from .guidance import GuidanceSettings, check_guided, guided, guided_recipe
from .method import Method

METHOD = Method(
    name="guidance-lora",
    title="One guidance in one forward, as a LoRA",
    paper="arXiv:2503.07274, arXiv:2210.03142",
    forwards="2.6 + the trajectories",
    plan=lambda setup: guided(setup, conditioned=False),
    settings=GuidanceSettings,
    recipe=guided_recipe,
    check=check_guided,
)
