"""How weights get from the host to a device: on a card beside its work, elsewhere at once."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import notice


class Link(Protocol):
    """From the host to one device. Whoever copies waits for the ticket before the copy is read."""

    def host(self, size: int) -> Tensor:
        """``size`` bytes on the host, from which copies are fast. uint8."""
        ...

    def slot(self, size: int) -> Tensor:
        """``size`` bytes on the device. uint8."""
        ...

    def copy(self, into: Tensor, source: Tensor) -> Any:
        """Begin to copy, behind everything that has been asked of the device so far. The ticket of this copy, not
        None."""
        ...

    def wait(self, ticket: Any) -> None:
        """Everything that is asked of the device from here on comes behind the copy."""
        ...

    def close(self) -> None:
        """Every copy has ended; the host's memory is ordinary."""
        ...


def link_of(device: torch.device) -> Link:
    return CardLink(device) if device.type == "cuda" else PlainLink(device)


class PlainLink:
    """To a device whose copies are made in the order of its work: a CPU, or the meta device, which only counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta" if self.device.type == "meta" else "cpu")

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    @torch.no_grad()
    def copy(self, into: Tensor, source: Tensor) -> Any:
        into.copy_(source)
        return True

    def wait(self, ticket: Any) -> None:
        return None

    def close(self) -> None:
        return None


class CardLink:
    """To an NVIDIA card: a stream of its own, events, and memory of the host that the card reads by itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side = torch.cuda.Stream(device)
        self._locked: list[Tensor] = []

    def host(self, size: int) -> Tensor:
        """Page-locked. torch's own page-locked memory is rounded up to powers of two: up to twice a base of many
        gigabytes."""
        memory = torch.empty(size, dtype=torch.uint8)
        if size and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)) == 0:
            self._locked.append(memory)
        elif size:
            notice(
                "the host's memory cannot be locked for the card's copies (too little of it, or a limit of the "
                "system): streaming goes on, slower"
            )
        return memory

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    @torch.no_grad()
    def copy(self, into: Tensor, source: Tensor) -> Any:
        # the slot's last reader has been asked for, and may still be at work
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            into.copy_(source, non_blocking=True)
            return self._side.record_event()

    def wait(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def close(self) -> None:
        torch.cuda.synchronize(self.device)
        while self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._locked.pop().data_ptr())
