"""Drawing at the card's limit: texts encoded once, LoRAs merged, and from noise to pixels one callable of fixed shape.

    with fast.fast() as draw:                 # fast is a OneStepPipeline
        pictures = draw("a lighthouse in a storm", seed=7)      # [B, 3, H, W] in [0, 1], on the device
        for picture in draw.frames(camera, "an oil painting", strength=0.6): ...

What remains at one step is the network and the decoder (SDXL's decoder costs more than its network at 1024 pixels, so a
tiny one is worth most), the launch of their kernels (a CUDA graph or torch.compile takes that away) and the text
encoders (which run once a text).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from ..core.cond import Cond
from ..core.denoiser import Network
from ..core.errors import OneStepError
from ..core.recipe import Recipe
from ..core.schedule import add_noise
from ..core.step_numbers import StepNumbers, initial_scale, step_numbers
from .adapt import DiffusersHost, network_of
from .autoencoder import decoded, encoded, upcast
from .merged import loras_of, merged
from .networks import has_ip_adapter
from .noise import Noise

Mode = Literal["auto", "eager", "compile", "graph"]
TEXTS, CALLABLES, WARM_UPS = 256, 16, 3
PARTS = ("text", "mask", "pooled", "size", "guidance")
Call = Callable[..., Tensor]
_DRAWN_FAST: WeakSet[Any] = WeakSet()
"""Networks whose LoRAs are merged now."""


@dataclass(frozen=True)
class Key:
    """What a callable is made for: shapes and dtypes of all it reads, and its steps."""

    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    steps: tuple[StepNumbers, ...]


class Fast:
    """One-step drawing of a `OneStepPipeline`; a context, which puts the pipeline back as it was. Meanwhile the
    pipeline's adapters are not to be changed. Several threads may draw: they wait for each other.

    mode: "graph" replays a CUDA graph, "compile" compiles network and decoder, "eager" does neither; "auto" is a graph
    on CUDA and eager elsewhere. What fails falls back to eager, with one warning that says why.
    decoder: a VAE in the pipeline's own place, an `AutoencoderTiny` for instance.
    """

    def __init__(self, pipe: Any, recipe: Recipe, mode: Mode = "auto", decoder: Any = None) -> None:
        if mode not in ("auto", "eager", "compile", "graph"):
            raise OneStepError(f"mode is {mode!r:.40}: choose from auto, eager, compile, graph")
        _refuse_adapters(pipe)
        self.pipe, self.recipe = pipe, recipe.whole()
        self.host: DiffusersHost = pipe.host(recipe)
        self.host.network.eval()
        if decoder is not None:
            self.host.pipe.vae = decoder.to(self.host.device, self.host.network.dtype).eval()
        on_cuda = self.host.device.type == "cuda"
        self.mode: Mode = ("graph" if on_cuda else "eager") if mode == "auto" else mode
        if self.mode == "graph" and not on_cuda:
            raise OneStepError(
                f"mode 'graph' needs a CUDA device, and this pipeline is on {self.host.device}: use auto"
            )
        self.network: Network = self.host.denoiser.network  # type: ignore[attr-defined]
        self.steps, self.scale = step_numbers(self.host.denoiser, recipe), initial_scale(self.host.denoiser, recipe)
        self._texts: OrderedDict[tuple[str, tuple[int, int]], Cond] = OrderedDict()
        self._calls: OrderedDict[Key, Call] = OrderedDict()
        self._within, self._lock = ExitStack(), threading.RLock()

    def __enter__(self) -> Fast:
        self._loras = loras_of(self.host.network)
        self._within.enter_context(_alone(self.host.network))
        self._within.enter_context(merged(self.host.network))
        self._within.enter_context(upcast(self.host.pipe.vae))
        self._within.callback(self._calls.clear)
        return self

    def __exit__(self, *error: Any) -> None:
        self._within.close()

    # -- drawing ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | None = None,
        generator: Any = None,
        latents: Tensor | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of ``prompt``, on the device: those of the pipeline's own call with the same
        arguments. latents: standard normal [B, C, h, w]."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise OneStepError("there is no prompt in the list: give one at least")
        size = self.pipe._size(self.host, self.recipe, width, height)
        cond = self.cond(prompts, size)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        noise = Noise((len(prompts), *self.host.latent_shape(size)), generator, self.host)
        x = self.scale * noise.start(latents)
        return self._run(x, cond, [noise(packed=True) for step in self.steps if step.fresh], self.steps)

    @torch.inference_mode()
    def frames(
        self, frames: Iterable[Tensor], prompt: str, *, strength: float = 0.5, seed: int = 0
    ) -> Iterator[Tensor]:
        """A picture [1, 3, H, W] for each of ``frames`` [3, H, W] in [0, 1], by one noise, so that they hang together.

        strength: the share of the recipe's first time at which the frame is noised, above 0 (the frame) to 1; one step.
        """
        if not 0 < strength <= 1:
            raise OneStepError(f"strength is {strength!r:.40}: give a share above 0 to 1; 0.4 to 0.7 are usual")
        schedule = self.host.denoiser.schedule
        own = self.recipe.at_strength(schedule, strength)
        sigma, steps = own.levels(schedule), step_numbers(self.host.denoiser, own)
        noise: Tensor | None = None
        for frame in frames:
            if frame.ndim != 3 or len(frame) != 3:
                raise OneStepError(f"a frame has shape {list(frame.shape)}: give [3, H, W] in 0 to 1")
            self.host.latent_shape((frame.shape[-1], frame.shape[-2]))
            latents = encoded(self.host.pipe.vae, frame[None].to(self.host.device))
            if noise is None or noise.shape != latents.shape:
                generator = torch.Generator().manual_seed(seed)
                noise = Noise(tuple(latents.shape), generator, self.host)()
            x = add_noise(schedule, latents, noise, sigma)
            height, width = frame.shape[-2:]
            yield self._run(x, self.cond([prompt], (width, height)), [], steps)

    # -- texts --------------------------------------------------------------------------------------------------------

    def cond(self, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
        """The conditions of ``prompts``, each encoded once, in the network's dtype on its device."""
        with self._lock:
            return self._cond(prompts, size)

    def _cond(self, prompts: Sequence[str], size: tuple[int, int]) -> Cond:
        missing = [text for text in dict.fromkeys(prompts) if (text, size) not in self._texts]
        if missing:
            made = self.host.encode(missing, size)
            guided = self.pipe.config.embedded_guidance
            if guided is not None and made.guidance is not None:
                made = made.with_(guidance=torch.full((len(made),), float(guided)))
            for row, text in enumerate(missing):
                self._texts[text, size] = _in_place(made[row : row + 1], self.host)
        for text in prompts:
            self._texts.move_to_end((text, size))
        found = Cond.concat([self._texts[text, size] for text in prompts])
        while len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return found

    # -- the one callable ---------------------------------------------------------------------------------------------

    def _run(self, x: Tensor, cond: Cond, fresh: list[Tensor], steps: Sequence[StepNumbers]) -> Tensor:
        given = {"x": x} | {name: value for name in PARTS if (value := getattr(cond, name)) is not None}
        given |= {f"fresh {index}": noise for index, noise in enumerate(fresh)}
        key = Key(tuple((name, tuple(value.shape), value.dtype) for name, value in given.items()), tuple(steps))
        with self._lock:  # a callable's memory is one
            self._check_unchanged()
            if key not in self._calls:
                self._calls[key] = self._made(given, steps)
            self._calls.move_to_end(key)
            while len(self._calls) > CALLABLES:  # a graph keeps the memory of its shape
                self._calls.popitem(last=False)
            return self._calls[key](given)

    def _check_unchanged(self) -> None:
        """Raises OneStepError where adapters have come or gone since the LoRAs were merged."""
        _refuse_adapters(self.pipe)
        if loras_of(self.host.network) != self._loras:
            raise OneStepError(
                "the pipeline's LoRAs have changed while it drew fast, from merged weights: leave `with pipe.fast()`, "
                "load them, and begin it again"
            )

    def _made(self, given: dict[str, Tensor], steps: Sequence[StepNumbers]) -> Call:
        """``given`` -> pictures, as the mode has it, or eager where that fails."""

        def eager(given: dict[str, Tensor]) -> Tensor:
            return self._pictures(given, steps)

        if self.mode == "eager":
            return eager
        try:
            made: Call = Graph(eager, given) if self.mode == "graph" else torch.compile(eager)
            made(given)
            return made
        except Exception as error:  # whatever a compiler or a driver raises
            why = str(error).strip().splitlines()[0][:150] if str(error).strip() else type(error).__name__
            logging.warning("OneStep: draws without %s (%s)", self.mode, why)
            self.mode = "eager"
            return eager

    def _pictures(self, given: dict[str, Tensor], steps: Sequence[StepNumbers]) -> Tensor:
        """The equations of `core.step_numbers`, then the decoder."""
        x, cond = given["x"], Cond(**{name: given[name] for name in PARTS if name in given})
        fresh = iter([value for name, value in given.items() if name.startswith("fresh")])
        for step in steps:
            time = torch.full((len(x),), step.time, device=x.device)
            x0 = step.skip * x + step.out * self.network(x, time, cond).float()
            x = step.keep * x + step.to * x0 + (step.fresh * next(fresh) if step.fresh else 0)
        return decoded(self.host.pipe.vae, x)


def _refuse_adapters(pipe: Any) -> None:
    if pipe._guidance is not None:
        raise OneStepError("a guidance adapter is loaded: take it off with load_guidance_adapter(None) to draw fast")
    if has_ip_adapter(network_of(pipe)):
        raise OneStepError("an IP-Adapter is loaded, and this draws texts alone: call unload_ip_adapter()")


def refuse_while_fast(network: Any) -> None:
    """Raises OneStepError where the network draws fast, its LoRAs merged: they can be neither loaded nor taken off."""
    if network in _DRAWN_FAST:
        raise OneStepError("this network is drawn fast, with its LoRAs merged: leave `with pipe.fast()` first")


@contextmanager
def _alone(network: Any) -> Iterator[None]:
    """Raises OneStepError where another one draws fast with this network: its weights are one, and its LoRAs go back
    when the first one ends."""
    if network in _DRAWN_FAST:
        raise OneStepError(
            "this network is drawn fast already, by this pipeline or one that shares its parts: end that one first, or "
            "draw several prompts in one call"
        )
    _DRAWN_FAST.add(network)
    try:
        yield
    finally:
        _DRAWN_FAST.discard(network)


class Graph:
    """``function`` of a dictionary of tensors as a CUDA graph: recorded once, replayed on the same memory."""

    def __init__(self, function: Call, given: dict[str, Tensor]) -> None:
        self.given = {name: value.clone() for name, value in given.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(self.given)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.answer = function(self.given)

    def __call__(self, given: dict[str, Tensor]) -> Tensor:
        for name, value in given.items():
            self.given[name].copy_(value)
        self.graph.replay()
        return self.answer.clone()


def _in_place(cond: Cond, host: DiffusersHost) -> Cond:
    """Text and pooled text in the network's dtype, all on its device."""
    kept = {entry.name: getattr(cond, entry.name) for entry in fields(cond)}
    narrow = {name: kept[name].to(host.network.dtype) for name in ("text", "pooled") if kept[name] is not None}
    return Cond(**kept | narrow).to(host.device)
