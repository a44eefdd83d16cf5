"""A negative adapter on a diffusers U-Net: a trained negative prompt, in the same forward.

away = load_negative_adapter(pipe, "adapter.safetensors", pipe.encode_prompt("red", "cuda", 1, False)[0])
pipe("a flower", num_inference_steps=1, guidance_scale=1)
away.scale = 1.5
away.negative = pipe.encode_prompt("people", "cuda", 1, False)[0]
away.remove()
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter_file import load_adapter
from ..core.adapter_module import Call
from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import detect
from ..core.negative_adapter import MAKERS, NegativeAttention, check_base, check_negative, checked_scale
from ..core.role_map import RoleMap
from ..core.roles import Roles
from ..core.targets import Target
from .heads import repeated
from .on_network import OnNetwork, network_in, targets_in
from .own_guidance import OwnGuidance, Rows, part
from .threads import lock_of

ROLE = "away"


def load_negative_adapter(
    pipe: Any, file: str | PathLike[str], negative: Tensor | None, scale: float = 1.0, rows: Rows = "all"
) -> Away:
    """Hang the adapter of ``file`` on a pipeline's U-Net, or on a U-Net, until `remove`; also a context manager.

    negative: [1 or P, L, C], a text as `encode_prompt` returns it (its first result), for all pictures or for each of P
    prompts in order; None is none. L may differ from the prompt's. scale: 0 (off) to 10; 1 is what was trained. rows:
    which of the network's batch it acts on; a pipeline with guidance of its own is refused, unless that is told its
    prompt's half ("second half" in diffusers' pipelines): then both act.
    It works beside LoRAs, loaded before or after, and on any checkpoint of the base that it was trained on. Raises
    OneStepError for a file that is no adapter, or one of another base, and for a negative that does not fit.
    """
    network = network_in(pipe)
    family = detect(network)
    module = load_adapter(file, MAKERS, family).module.requires_grad_(False)
    check_base(module, targets_in(network), family)
    return Away(pipe, network, module, negative, scale, rows)


class Away(OnNetwork):
    """A negative adapter that hangs on a network. negative and scale may be set anew between forwards."""

    def __init__(
        self, pipe: Any, network: Any, module: NegativeAttention, negative: Tensor | None, scale: float, rows: Rows
    ) -> None:
        self._network, self._module, self._own = network, module, OwnGuidance(pipe, rows, detect(network))
        self.negative, self.scale = negative, scale
        self._roles = Roles([])
        self._attach(pipe, network)

    @property
    def negative(self) -> Tensor | None:
        return self._negative

    @negative.setter
    def negative(self, value: Tensor | None) -> None:
        if value is not None:
            if not isinstance(value, Tensor) or value.ndim != 3 or 0 in value.shape:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise OneStepError(
                    f"the negative is {found}: give the text's tokens [1 or prompts, tokens, width], the first result "
                    "of encode_prompt"
                )
            check_negative(self._module, value.shape[2])
        self._negative = value

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = checked_scale(value)

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call that begins is the adapter's, under this negative."""
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        x: Tensor = given["sample"]
        self._own.check(x, given["encoder_hidden_states"])
        self._module.to(x.device)
        self._hang()
        # time and condition are told to adapter modules that ask for them; this one does not
        nothing: Any = None
        call = self._roles.serving(RoleMap(((ROLE, None),), call=Call(nothing, nothing, self._told(x))))
        self._begin(call)

    def _hang(self) -> None:
        """Queries are taken behind a LoRA's: one that was loaded since stands where the base's layer stood."""
        if not self._hangs():
            with lock_of(self._network):
                self._hang_anew()

    def _hangs(self) -> bool:
        return [target.module for target in self._roles.targets.values()] == self._layers()

    def _layers(self) -> list[nn.Module]:
        return [self._network.get_submodule(name) for name in sorted(self._module.before | self._module.after)]

    def _hang_anew(self) -> None:
        if self._hangs():  # by another thread meanwhile
            return
        self._roles.remove()
        needed = sorted(self._module.before | self._module.after)
        roles = Roles([Target(name, layer) for name, layer in zip(needed, self._layers(), strict=True)])
        roles.add_module(ROLE, self._module)
        roles.install()
        self._roles = roles

    def _told(self, x: Tensor) -> dict[str, Any]:
        """The negative of each row; rows that it does not act on have a scale of 0."""
        if self.negative is None or self.scale == 0:
            return {}
        scale = torch.zeros(len(x))
        scale[part(self._own.rows, len(x))] = self.scale
        count = int(scale.count_nonzero())
        if count % len(self.negative):
            raise OneStepError(
                f"there are {len(self.negative)} negatives for {count} pictures: give one for all, or one for each "
                "prompt"
            )
        text = repeated(self.negative.to(x), count)
        return {"negative": Cond(torch.cat([text] * (len(x) // count))), "scale": scale}
