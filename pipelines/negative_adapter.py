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
from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import detect
from ..core.negative_adapter import MAKERS, NegativeAttention, check_base, check_negative, checked_scale
from ..core.roles import RoleMap, Roles
from ..core.side import Call
from ..core.targets import Target, is_linear
from .adapt import network_of
from .steer_attention import Rows, repeated

ROLE = "away"


def load_negative_adapter(
    pipe: Any, file: str | PathLike[str], negative: Tensor | None, scale: float = 1.0, rows: Rows = "all"
) -> Away:
    """Hang the adapter of ``file`` on a pipeline's U-Net, or on a U-Net, until `remove`; also a context manager.

    negative: [1 or P, L, C], a text as `encode_prompt` returns it (its first result), for all pictures or for each of P
    prompts in order; None is none. L may differ from the prompt's. scale: 0 (off) to 10; 1 is what was trained. rows:
    which rows of the network's batch it acts on; under a pipeline's own guidance that is the "second half".
    It works beside LoRAs, loaded before or after, and on any checkpoint of the base that it was trained on. Raises
    OneStepError for a file that is no adapter, or one of another base, and for a negative that does not fit.
    """
    network = pipe if isinstance(pipe, nn.Module) else network_of(pipe)
    family = detect(network)
    side = load_adapter(file, MAKERS, family).side.requires_grad_(False)
    # peft's own layers stand where the base's stood; what they wrap is theirs
    layers = {name: layer for name, layer in network.named_modules() if is_linear(layer) and ".base_layer" not in name}
    targets = {name: Target(name, layer) for name, layer in layers.items()}
    check_base(side, targets, family)
    return Away(network, side, [targets[name] for name in sorted(side.before | side.after)], negative, scale, rows)


class Away:
    """A negative adapter that hangs on a network. negative and scale may be set anew between forwards."""

    def __init__(
        self,
        network: Any,
        side: NegativeAttention,
        targets: list[Target],
        negative: Tensor | None,
        scale: float,
        rows: Rows,
    ) -> None:
        self._side, self._rows = side, rows
        self.negative, self.scale = negative, scale
        self._roles = Roles(targets)
        self._roles.add_side(ROLE, side)
        self._roles.install()
        self._calls: list[Any] = []
        before = network.register_forward_pre_hook(self._before, with_kwargs=True)
        self._handles = [before, network.register_forward_hook(self._after, always_call=True)]

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
            check_negative(self._side, value.shape[2])
        self._negative = value

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = checked_scale(value)

    def remove(self) -> None:
        """Take the adapter off: the network is as it was."""
        self._roles.remove()
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Away:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.remove()

    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The call that begins is the adapter's, under this negative."""
        x: Tensor = args[0] if args else kwargs["sample"]
        self._side.to(x.device)
        # time and condition are told to sides that ask for them; this one does not
        nothing: Any = None
        call = self._roles.serving(RoleMap(((ROLE, None),), call=Call(nothing, nothing, self._told(x))))
        self._calls.append(call)
        call.__enter__()

    def _told(self, x: Tensor) -> dict[str, Any]:
        if self.negative is None or self.scale == 0:
            return {}
        parts = 1 if self._rows == "all" else 2
        count, odd = divmod(len(x), parts)
        if odd or count % len(self.negative):
            raise OneStepError(
                f"the network's batch has {len(x)} rows, of which {self._rows} are meant, and there are "
                f"{len(self.negative)} negatives: give one for all pictures, or one for each prompt"
            )
        text = repeated(self.negative.to(x), count)
        acts = {"all": (1.0,), "first half": (1.0, 0.0), "second half": (0.0, 1.0)}[self._rows]
        scale = self.scale * torch.tensor(acts).repeat_interleave(count)
        return {"negative": Cond(torch.cat([text] * parts)), "scale": scale}

    def _after(self, network: nn.Module, args: Any, output: Any) -> None:
        if self._calls:
            self._calls.pop().__exit__(None, None, None)
