"""A LoRA for each step on a pipeline of diffusers: all of them are loaded, one at a time acts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..core.errors import OneStepError
from ..core.step_roles import StepRoles
from .one_step_lora import act_alone


@dataclass(frozen=True)
class StepLoRAs:
    """names: of the adapters, the first step's first. times: of the network, at which the steps begin."""

    names: tuple[str, ...] = ()
    times: tuple[float, ...] = ()

    @contextmanager
    def switched(self, network: Any) -> Iterator[Callable[[float], None]]:
        """What a call does before each of its steps, with the network's time there; afterwards the first acts."""
        if len(self.names) < 2:
            yield lambda time: None
            return
        steps = StepRoles()
        steps.split("", self.times)
        try:
            yield lambda time: act_alone(network, self.names, steps.step_of("", time))
        finally:
            act_alone(network, self.names, 0)

    def refuse(self, what: str) -> None:
        """Raises OneStepError where there are several, for what one LoRA alone can do."""
        if len(self.names) > 1:
            raise OneStepError(
                f"{what} with a LoRA for each of {len(self.names)} steps cannot be: call the pipeline itself, or load "
                "a LoRA that serves all steps"
            )
