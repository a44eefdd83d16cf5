"""Negative prompts in one pass of diffusers' networks: `with steered(pipe, negative): pipe(...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..core.compiled import uncompile
from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.guidance import Steering
from .adapt import called_network, network_of
from .own_guidance import OwnGuidance, Rows
from .steer_attention import CrossSteered, JointSteered
from .steer_joint import CrossTexts, JointTexts
from .steer_krea2 import FusedSteered, FusedTexts
from .steer_lumina2 import Lumina2Steered, Lumina2Stream
from .steer_modulation import Modulation, install
from .steer_one_stream import OneStream, StreamSteered
from .steer_run import Run
from .steer_served import apart_of, attentions_of, family_of, read_by, refuse_foreign, times_of, unsteered
from .steer_text import Text, away_of
from .threads import one_at_a_time, only_here, processors_of, set_processors

Texts = CrossTexts | JointTexts | OneStream | Lumina2Stream | FusedTexts


@one_at_a_time(network_of)
@contextmanager
def steered(
    pipe: Any,
    negative: Text,
    steering: str | Steering = "nasa",
    *,
    scale: float | None = None,
    start: float = 0.0,
    end: float = 1.0,
    rows: Rows = "all",
    cache: bool = False,
    empty: Text | None = None,
) -> Iterator[None]:
    """Within, each forward of the pipeline's U-Net or transformer steers away from ``negative``, without a second pass.

    pipe: a pipeline of a family in `core.guidance.DEFAULTS`; ControlNet's too.
    negative: a text for all pictures, or a list of one for each of P prompts in order. It is encoded by the pipeline's
    encoders, padded as the mode's authors do it: VSF not at all, the others as a prompt is. Or what encode_prompt made
    of it: tokens [1 or P, L, C], or a `core.cond.Cond` of tokens, their mask and their pooled text [1 or P, C']. In SD3
    and Flux the pooled text modulates the negative's tokens, but for VSF; tokens without one are modulated by the
    prompt's. L may differ from the prompt's. VSF's scales are meant for tokens without padding: `encode_text(...,
    padded=False)` gives them.
    steering, scale: "nasa", "nag", "vsf" or "perp" at a scale, or a `Steering`. Numbers that are None are the family's,
    in `core.guidance.DEFAULTS`.
    empty: what "perp" measures from, the empty text, where the negative is no text: one, as the negative is given.
    start, end: shares of the schedule between which it acts, both included; 0 is the noisiest.
    rows: which rows of the network's batch are steered. Where classifier-free guidance puts two halves into one batch,
    that is the prompt's: diffusers' own pipelines put it last ("second half"), Z-Image's first. CFG's own negative acts
    as well. A guided pipeline is refused at "all", FLUX.2's, Flux' ``true_cfg_scale`` and ``cfg_truncation`` at any.
    cache: keep a U-Net's keys and values of the negative between forwards; only where no weight and no LoRA's scale
    changes within.

        with steered(pipe, "red", "nag", scale=5):
            picture = pipe("a flower", num_inference_steps=4, guidance_scale=1).images[0]

        text, _, pooled, _ = pipe.encode_prompt("red", None, None)  # StableDiffusion3Pipeline
        with steered(pipe, Cond(text, pooled=pooled), "nag"):
            ...

    It acts in the thread that entered it; others draw as without it, and wait where they steer the same network.
    The network is given back as it was, also after an error. A neutral scale (NASA 0; NAG, Perp 1) changes nothing.
    Raises OneStepError for a network, an attention processor (an IP-Adapter of SD3 or Flux), a negative or a value that
    is not served; from the forward also for a batch that does not fit and under gradient checkpointing.
    """
    network, plain = called_network(pipe), network_of(pipe)
    family = family_of(plain)
    chosen, own = steering_of(steering, scale).of_family(family), OwnGuidance(pipe, rows, family)
    attentions = attentions_of(plain, family, chosen.layers)
    latest, earliest = times_of(pipe, family, start, end)
    away = away_of(pipe, plain, negative, empty, chosen, *read_by(plain, attentions))
    if chosen.neutral:
        yield
        return
    run = Run(chosen, away, rows, cache)
    with ExitStack() as undo:
        # hooks within what was compiled might not run, as one stream's; those around torch.compile's wrapper do
        undo.callback(uncompile(network, wrapped=FAMILIES[family].one_stream))
        hooks = _Hooks(run, _set_processors(plain, family, attentions, run, undo), own, plain, latest, earliest)
        undo.callback(network.register_forward_pre_hook(only_here(hooks.before), with_kwargs=True).remove)
        undo.callback(network.register_forward_hook(only_here(hooks.after)).remove)
        yield


def steering_of(steering: str | Steering, scale: float | None) -> Steering:
    """A mode's name or a Steering, at ``scale``; None is the Steering's own, else the family's."""
    if isinstance(steering, Steering):
        return steering if scale is None else replace(steering, scale=scale)
    return Steering(str(steering), scale)


def _set_processors(network: Any, family: str, attentions: dict[str, Any], run: Run, undo: ExitStack) -> Texts:
    """Steers ``attentions`` until ``undo``. Returns which texts each forward is to read."""
    found = processors_of(network)
    texts, chosen = _steered(network, family, {name: found[name] for name in attentions}, run, undo)
    undo.callback(_restore, network)
    set_processors(network, {**found, **chosen})
    return texts


def _steered(
    network: Any, family: str, found: dict[str, Any], run: Run, undo: ExitStack
) -> tuple[Texts, dict[str, Any]]:
    """In place of the processors ``found``; each text is modulated by its own pooled text where there is one."""
    if FAMILIES[family].cross_attention:
        return CrossTexts(run, family, network), {
            name: CrossSteered.around(inner, run) for name, inner in found.items()
        }
    for inner in found.values():
        refuse_foreign(inner)
    if FAMILIES[family].one_stream:
        filled = FAMILIES[family].filled
        stream: Any = OneStream(run, network, filled) if filled else Lumina2Stream(run, network)
        stream.install(undo)
        kind: Any = StreamSteered if filled else Lumina2Steered
        return stream, {name: kind(inner, stream, picture=name.startswith("layers.")) for name, inner in found.items()}
    if any(name.startswith("text_fusion.") for name in found):
        fused = FusedTexts(run, FAMILIES[family].divided)
        return fused, {
            name: FusedSteered(inner, fused, picture=not name.startswith("text_fusion."))
            for name, inner in found.items()
        }
    texts = JointTexts(run, Modulation(), family, network)
    kept = install(network, texts.modulation, undo) if run.away.pooled else {}
    return texts, {
        name: apart(inner, run)
        if (apart := apart_of(inner))
        else JointSteered(inner, run, kept.get(name.removesuffix(".processor")))
        for name, inner in found.items()
    }


def _restore(network: Any) -> None:
    set_processors(network, {name: unsteered(found) for name, found in processors_of(network).items()})


@dataclass
class _Hooks:
    """Around each forward of ``network``: is it steered, and by which texts.

    latest, earliest: the network's own times between which it is.
    """

    run: Run
    texts: Texts
    own: OwnGuidance
    network: Any
    latest: float
    earliest: float

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        """A forward pre-hook: the network reads the negative's tokens too where it reads all texts at once."""
        given = inspect.signature(type(self.network).forward).bind(None, *args, **kwargs).arguments
        del given["self"]
        self.texts.clear()  # of a forward that an error ended
        self.run.active, self.run.reached = self._in_range(given), False
        if not self.run.active:
            return None
        if torch.is_grad_enabled() and self.network.is_gradient_checkpointing:
            raise OneStepError(
                "negative steering is for drawing, and this network is under gradient checkpointing: call it under "
                "torch.no_grad(), or network.disable_gradient_checkpointing() first"
            )
        latents, prompts = self.texts.latents_and_prompts(given)
        self.own.check(latents, prompts)
        self._check_batch(len(given.get("sample", prompts)))
        changed = self.texts.joined(given)
        return None if changed is None else ((), {**given, **changed})

    def after(self, *_: Any) -> None:
        """A forward hook: a negative that could not act is not passed over in silence."""
        active, self.run.active = self.run.active, False
        self.texts.clear()
        if active and not self.run.reached:
            raise OneStepError(
                "the negative could not act: other attention processors were set within `steered`, or the network was "
                "compiled before it. Set them, or compile, before `steered`"
            )

    def _in_range(self, given: dict[str, Any]) -> bool:
        if self.latest == math.inf and self.earliest == -math.inf:
            return True  # without reading the time from the device
        first = torch.as_tensor(given[self.texts.time]).reshape(-1)[0]
        shown = self.texts.counted(float(first))
        # times come in the latents' dtype
        slack = torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
        slack = max(slack, 1e-5)
        return self.earliest * (1 - slack) <= shown <= self.latest * (1 + slack)

    def _check_batch(self, batch: int) -> None:
        count = len(self.run.away)
        if (self.run.rows != "all" and batch % 2) or self.run.count(batch) % count:
            raise OneStepError(
                f"the network's batch has {batch} rows, of which {self.run.rows} are steered, and there are {count} "
                "negatives: give one for all pictures, or one for each prompt"
            )
