"""A block's frozen weights end to end in one piece of memory, and the layers that compute with one copy or another.

What a layer has under ``weight`` is exchanged, never written: the weight itself stays as it is and where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 512
"""Bytes: of the start of a weight, as torch's own allocations on a card have it, so that kernels are chosen alike."""
Place = tuple[dict[str, Any], str]
"""A table and the name in it under which a layer looks for a weight."""


class Weight:
    """One frozen weight: a tensor, or a tensor subclass of several (``__tensor_flatten__``), as quantised ones are.

    places: where layers look for it. raw: where they look for its first tensor itself.
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.places: list[Place] = []
        self.raw: list[Place] = []

    @property
    def parts(self) -> list[tuple[str, Tensor]]:
        """Its tensors by name, themselves or those that it is made of."""
        if hasattr(self.value, "__tensor_flatten__"):
            return [(name, getattr(self.value, name)) for name in self.value.__tensor_flatten__()[0]]
        return [("", self.value.data)]

    def put(self, parts: list[Tensor]) -> None:
        """The weight itself lies in ``parts`` from here on."""
        for (name, _), part in zip(self.parts, parts, strict=True):
            if name:
                setattr(self.value, name, part)
            else:
                self.value.data = part
        for table, name in self.raw:
            table[name] = parts[0]

    def twin(self, parts: list[Tensor]) -> Tensor:
        """The same weight, lying in ``parts``, whose version counters it shares."""
        value: Any = self.value
        if hasattr(value, "__tensor_flatten__"):
            names, told = value.__tensor_flatten__()
            found = type(value).__tensor_unflatten__(
                dict(zip(names, parts, strict=True)), told, value.shape, value.stride()
            )
            found._is_param = True
        elif type(value) is nn.Parameter:
            return nn.Parameter(parts[0], requires_grad=False)
        else:  # bitsandbytes' own kinds of parameter
            found = parts[0].as_subclass(type(value))
            found.__dict__.update(value.__dict__)
        return found  # type: ignore[no-any-return]


def weights_of(block: nn.Module) -> list[Weight]:
    """The frozen parameters of ``block``, each once. Buffers, which a forward may write to, are none of them."""
    found: dict[int, Weight] = {}
    for module in block.modules():
        for name, value in module._parameters.items():
            if value is not None and not value.requires_grad:
                weight = found.setdefault(id(value), Weight(value))
                weight.places.append((module._parameters, name))
                weight.raw += _int8_state(module) if name == "weight" else []
    return list(found.values())


def _int8_state(module: Any) -> list[Place]:
    """Where bitsandbytes' 8-bit layers keep their weight beside the parameter, and compute with it."""
    state: Any = getattr(module, "state", None)
    if not hasattr(state, "CB") or not hasattr(module, "init_8bit_state") or state.has_fp16_weights:
        return []
    if module.weight.CB is not None:
        module.init_8bit_state()
    return [] if state.CB is None else [(vars(state), "CB")]


def size_of(weights: Iterable[Weight]) -> int:
    """Bytes of ``weights`` end to end."""
    return sum(_aligned(_bytes(part)) for weight in weights for _, part in weight.parts)


def _bytes(part: Tensor) -> int:
    return part.numel() * part.element_size()


def _aligned(bytes: int) -> int:
    return -(-bytes // ALIGNMENT) * ALIGNMENT


class Packed:
    """A block's weights in ``memory``, uint8 [bytes], on the host.

    make: memory of so many bytes. The weights themselves lie in it until `unpack`, which gives them back where they
    were, in memory of their own.
    """

    def __init__(self, weights: list[Weight], make: Callable[[int], Tensor]) -> None:
        self.weights = weights
        self.memory = make(size_of(weights))
        self._shapes = [[_Shape(part) for _, part in weight.parts] for weight in weights]
        self._before = [weight.value.device for weight in weights]
        self._twins: list[Tensor] = []
        self._twins_raw: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for weight, parts in zip(weights, self._views(self.memory), strict=True):
                for (_, value), view in zip(weight.parts, parts, strict=True):
                    view.copy_(value)
                weight.put(parts)

    @torch.inference_mode(False)
    def bind(self, slot: Tensor) -> None:
        """From here on `show` shows what lies at the beginning of ``slot``, uint8, on the device."""
        views = self._views(slot)
        self._twins = [weight.twin(parts) for weight, parts in zip(self.weights, views, strict=True)]
        self._twins_raw = [parts[0] for parts in views]

    def show(self) -> None:
        """Its layers compute with the slot."""
        for weight, twin, raw in zip(self.weights, self._twins, self._twins_raw, strict=True):
            for table, name in weight.places:
                table[name] = twin
            for table, name in weight.raw:
                table[name] = raw

    def hide(self) -> None:
        """Its layers have the weights on the host."""
        for weight in self.weights:
            for table, name in weight.places:
                table[name] = weight.value
            for table, name in weight.raw:
                table[name] = weight.value.data

    def unpack(self) -> None:
        """The weights are where they were, in memory of their own."""
        self.hide()
        for weight, device in zip(self.weights, self._before, strict=True):
            weight.put([part.to(device, copy=True) for _, part in weight.parts])
        self._twins, self._twins_raw = [], []

    def _views(self, memory: Tensor) -> list[list[Tensor]]:
        """Each weight's tensors in ``memory``, in order."""
        found, at = [], 0
        for shapes in self._shapes:
            views = []
            for shape in shapes:
                views.append(shape.view(memory, at))
                at += _aligned(shape.bytes)
            found.append(views)
        return found


class _Shape:
    """Of a tensor whose numbers lie without holes, in whatever order of its sizes; of others, in the usual order."""

    def __init__(self, like: Tensor) -> None:
        self.shape, self.stride, self.dtype, self.bytes = like.shape, like.stride(), like.dtype, _bytes(like)
        sizes = sorted((stride, size) for stride, size in zip(self.stride, self.shape, strict=True) if size > 1)
        dense = all(stride == prod(size for _, size in sizes[:at]) for at, (stride, _) in enumerate(sizes))
        if not dense:
            self.stride = torch.empty(self.shape, device="meta").stride()

    def view(self, memory: Tensor, at: int) -> Tensor:
        return memory[at : at + self.bytes].view(self.dtype).as_strided(self.shape, self.stride)
