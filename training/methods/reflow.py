"""Rectified flow from the teacher's own couplings, then its distillation (InstaFlow, arXiv:2309.06380): the first makes
the way from noise to picture straight, the second asks for its end in the student's own steps."""

from __future__ import annotations

from .couplings import Reflow, ReflowSettings, in_two_stages
from .method import Method
from .rectified import straight_of
from .trajectory import square

METHOD = Method(
    name="reflow",
    title="Straight trajectories from the teacher's pairs, then their ends",
    paper="arXiv:2309.06380, arXiv:2209.03003",
    forwards="2.6 + the pair",
    plan=lambda setup: in_two_stages(setup, Reflow(setup, straight_of(setup, square))),
    settings=ReflowSettings,
)
