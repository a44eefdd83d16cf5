"""A LoRA for each step, or for each kind of prompt, on a pipeline of diffusers: all are loaded, one at a time acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.router import Router
from ..core.step_roles import StepRoles
from .one_step_lora import act_alone


@dataclass(frozen=True)
class StepLoRAs:
    """names: of the adapters, the first step's or student's first. times: of the network, at which the steps begin.
    router: what tells them apart that are students."""

    names: tuple[str, ...] = ()
    times: tuple[float, ...] = ()
    router: Router | None = None

    @contextmanager
    def switched(self, network: Any, cond: Cond) -> Iterator[Callable[[float], None]]:
        """What a call for the prompts ``cond`` does before each of its steps, with the network's time there; afterwards
        the first acts."""
        if len(self.names) < 2:
            yield lambda time: None
            return
        steps = StepRoles()
        steps.split("", self.times)
        student = None if self.router is None else self._student(self.router, cond)
        try:
            yield lambda time: act_alone(network, self.names, steps.step_of("", time) if student is None else student)
        finally:
            act_alone(network, self.names, 0)

    def _student(self, router: Router, cond: Cond) -> int:
        """The one that draws all of a call's pictures. Raises OneStepError where there are several."""
        found = router.of(cond)
        if len({*found}) > 1:
            told = ", ".join(str(student + 1) for student in found[:8])
            raise OneStepError(f"the pictures of this call are of the students {told}: give each prompt its own call")
        return found[0]

    def refuse(self, what: str) -> None:
        """Raises OneStepError where there are several, for what one LoRA alone can do."""
        if len(self.names) > 1:
            kind = "steps" if self.router is None else "students"
            raise OneStepError(
                f"{what} with a LoRA for each of {len(self.names)} {kind} cannot be: call the pipeline itself, or load "
                f"a LoRA that serves all {'steps' if self.router is None else 'prompts, or that of one student'}"
            )
