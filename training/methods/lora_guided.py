"""One guidance of the teacher in one forward, as a LoRA, learnt on noised pictures (arXiv:2312.06899). guidance-lora
learns the same on the guided teacher's own trajectories."""

from __future__ import annotations

from .guidance import guided_recipe
from .guided_answers import AnswersSettings, check_answers, guided_answers
from .method import Method

METHOD = Method(
    name="lora-guided",
    title="One guidance in one forward, as a LoRA, on pictures",
    paper="arXiv:2312.06899, arXiv:2210.03142",
    forwards="4.6 + the picture",
    plan=lambda setup: guided_answers(setup, setup.settings.guidance, setup.settings.guidance, conditioned=False),
    settings=AnswersSettings,
    recipe=guided_recipe,
    check=check_answers,
)
