"""One dispatch mode that follows storages: bytes alive, bytes moved, FLOPs, operations and crossings of whatever runs.

Over the meta device it stands for a graphics card: what runs there needs no memory, and what asks for numbers that are
not there (float(), bool(), .cpu()) is answered with ones. Over the CPU, with a cap, it is a card that fills up.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it

from ..engine.student import EARLIER
from .kernels import Kernel, kernel_of, key_of
from .trace import Trace

aten = torch.ops.aten
DRAWN = 2**16
"""Random numbers beyond which the host does not draw them: what they are does not matter here."""


class _Live(weakref.ref[Any]):
    """A storage that is alive: called when it dies."""

    __slots__ = ("bytes", "key", "label")
    bytes: int
    key: int
    label: str


class Meter(TorchDispatchMode):
    """device: "meta" or "cpu", whose storages are followed. cap: bytes beyond which torch.OutOfMemoryError is raised;
    None is no end of memory. trace: what was counted. Storages that were there before are told by `hold`.
    """

    def __init__(self, device: str = "meta", cap: float | None = None, trace: Trace | None = None) -> None:
        super().__init__()
        self.device, self.cap, self.trace = device, math.inf if cap is None else cap, trace or Trace()
        self.live, self.most = 0, 0
        self.crossings: Counter[str] = Counter()
        self._storages: dict[int, _Live] = {}
        self._of_host: dict[int, Any] = {}
        self._kernels: dict[Any, Kernel] = {}
        self._records: list[tuple[str, float]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: torch need not guard each call against it."""
        return False

    # -- what is alive ------------------------------------------------------------------------------------------------

    def hold(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count ``tensors``, whose storages may have been there before, under ``label``."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found = self._storages.get(id(storage))
            if found is None:
                self._add(storage, label)
            elif found.label != label:
                self.trace.changed(found.label, -found.bytes)
                found.label = label
                self.trace.changed(label, found.bytes)

    def _add(self, storage: Any, label: str) -> None:
        live = _Live(storage, self._gone)
        live.bytes, live.key, live.label = storage.nbytes(), id(storage), label
        self._storages[live.key] = live
        self.live += live.bytes
        self.most = max(self.most, self.live)
        self.trace.changed(label, live.bytes)

    def _gone(self, live: _Live) -> None:
        self._storages.pop(live.key, None)
        self.live -= live.bytes
        self.trace.changed(live.label, -live.bytes)

    def _found(self, result: Any) -> None:
        """Count what an operation has made; out of memory where it is too much."""
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if id(storage) not in self._storages and id(storage) not in self._of_host:
                    if self.live + storage.nbytes() > self.cap:
                        raise torch.OutOfMemoryError(
                            f"{self.live} bytes are in use and {storage.nbytes()} more are asked for: "
                            f"there are {self.cap:.0f}"
                        )
                    self._add(storage, "activations")

    # -- what runs ----------------------------------------------------------------------------------------------------

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, whatever is counted belongs to ``name``, where no part within it has a name of its own."""
        before = self.trace.part
        self.trace.begin(name)
        try:
            yield
        finally:
            self.trace.begin(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func.namespace == "profiler":
            return self._record(func, args)
        if self.device == "cpu":
            result = func(*args, **kwargs)
            self._found(result)
            return result
        tensors, key = key_of(func, args, kwargs)
        kernel = self._kernels.get(key)
        if kernel is not None:
            return self._ran(kernel, tensors, kwargs, kernel.run(func, args, kwargs, tensors))
        if not any(tensor.is_meta for tensor in tensors) and not _makes_meta(kwargs):
            return self._on_host(func, args, kwargs)
        answer = self._asked(func, args, kwargs)
        if answer is not None:
            return answer
        result = func(*args, **kwargs)
        self._kernels[key] = kernel = kernel_of(func, args, kwargs, tensors, result)
        return self._ran(kernel, tensors, kwargs, result)

    def _ran(self, kernel: Kernel, tensors: list[Tensor], kwargs: Any, result: Any) -> Any:
        """``result``, counted."""
        if kernel.cost is not None:
            self.trace.ran(kernel.cost)
            if kernel.crosses:
                self.crossings[kernel.crosses] += 1
        if kernel.fresh:
            if self._of_host and self._is_host(tensors, kwargs):
                self._mark_host(result)
            else:
                self._found(result)
        return result

    def _asked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The answer to what needs numbers; None for what does not."""
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            self.crossings["read"] += 1
            return 1.0 if args[0].dtype.is_floating_point else True if args[0].dtype is torch.bool else 1
        if packet is aten.equal:
            self.crossings["read"] += 1
            return True
        if packet is aten._to_copy and str(kwargs.get("device", "meta")) != "meta":
            self.crossings["to the host"] += 1
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if packet is aten.copy_ and not args[0].is_meta:
            self.crossings["to the host"] += 1
            return args[0].fill_(1)
        return None

    # -- the host -----------------------------------------------------------------------------------------------------

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the CPU does is done; but great many random numbers are not drawn."""
        if func.overloadpacket is aten.rand and math.prod(args[0]) > DRAWN:
            result = torch.empty(args[0], dtype=kwargs.get("dtype"), device="meta")
            self._mark_host(result)
            return result
        return func(*args, **kwargs)

    def _is_host(self, tensors: list[Tensor], kwargs: Any) -> bool:
        return not _makes_meta(kwargs) and all(id(t.untyped_storage()) in self._of_host for t in tensors)

    def _mark_host(self, result: Any) -> None:
        for tensor in result if isinstance(result, tuple | list) else (result,):
            key = id(tensor.untyped_storage())
            self._of_host[key] = weakref.ref(tensor.untyped_storage(), partial(self._forget, key))

    def _forget(self, key: int, unused: Any) -> None:
        self._of_host.pop(key, None)

    def _record(self, func: Any, args: Any) -> Any:
        """torch.profiler.record_function, by which training names its parts."""
        if func.overloadpacket is torch.ops.profiler._record_function_enter_new:
            self._records.append((self.trace.part, self.trace.times))
            if args[0] == EARLIER:  # no part of its own
                self.trace.times = float(args[1])
            elif not args[0].startswith("Optimizer."):  # torch's own name for a step
                self.trace.enter(args[0])
        elif self._records:
            part, self.trace.times = self._records.pop()
            self.trace.begin(part)
        return func(*args)


def _makes_meta(kwargs: Any) -> bool:
    return str(kwargs.get("device")) == "meta"
