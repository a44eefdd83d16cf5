"""Negative prompts for diffusers' U-Nets, SD3 and Flux in one pass: `with steered(pipe, negative): pipe(...)`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from ..core.compiled import uncompile
from ..core.errors import OneStepError
from ..core.guidance import SAFE, Steering
from ..core.schedule import NoiseSchedule, VPSchedule
from .adapt import called_network, network_of
from .networks import schedule_of
from .own_guidance import OwnGuidance, Rows
from .steer_attention import JOINT, CrossSteered, JointSteered, Run, is_steered, repeated, unsteered
from .threads import one_at_a_time, only_here, set_processors

CLASSES = {"unet": UNet2DConditionModel, "sd3": SD3Transformer2DModel, "flux": FluxTransformer2DModel}


@one_at_a_time(network_of)
@contextmanager
def steered(
    pipe: Any,
    negative: Tensor,
    steering: str | Steering = "nasa",
    *,
    scale: float | None = None,
    start: float = 0.0,
    end: float = 1.0,
    rows: Rows = "all",
    cache: bool = False,
    empty: Tensor | None = None,
) -> Iterator[None]:
    """Within, each forward of the pipeline's U-Net or transformer steers away from ``negative``, without a second pass.

    pipe: a pipeline of SD1.5, SD2, SDXL, SD3, SD3.5 or Flux, ControlNet's and the like too.
    negative: [1 or P, L, C], a text as `encode_prompt` returns it (its first result; not the pooled one), for all
    pictures or for each of P prompts in order. L may differ from the prompt's.
    steering, scale: "nasa", "nag", "vsf" or "perp" at a scale (None is one that is safe for the family), or a
    `Steering`.
    empty: [1, L', C], the empty text, encoded in the same way; "perp" needs it, the others have no use for it.
    start, end: shares of the schedule between which it acts, both included; 0 is the noisiest.
    rows: which rows of the network's batch are steered. Where classifier-free guidance puts two halves into one batch,
    that is the prompt's: diffusers' own pipelines put it last ("second half"). CFG's own negative acts as well. A
    guided pipeline is refused at "all", and Flux' ``true_cfg_scale``, whose two halves are two forwards, at any.
    cache: keep a U-Net's keys and values of the negative between forwards; only where no weight and no LoRA's scale
    changes within.

        negative = pipe.encode_prompt("red", "cuda", 1, False)[0]  # StableDiffusionPipeline
        negative = pipe.encode_prompt("red", do_classifier_free_guidance=False)[0]  # StableDiffusionXLPipeline
        negative = pipe.encode_prompt("red", None, None)[0]  # StableDiffusion3Pipeline
        negative = pipe.encode_prompt("red", None)[0]  # FluxPipeline
        with steered(pipe, negative, "nag", scale=5):  # or "perp", empty=..., where "" is encoded as "red" is
            picture = pipe("a flower", num_inference_steps=4, guidance_scale=1).images[0]

    It acts in the thread that entered it; others draw as without it, and wait where they steer the same network.
    The network is given back as it was, also after an error. A neutral scale (NASA 0; NAG, Perp 1) changes nothing.
    Raises OneStepError for a network, an attention processor (an IP-Adapter of SD3 or Flux), a negative or a value that
    is not served; from the forward also for a batch that does not fit and under gradient checkpointing.
    """
    network, plain = called_network(pipe), network_of(pipe)
    family = _family(plain)
    chosen, own = steering_of(steering, scale, family), OwnGuidance(pipe, rows)
    chosen.check_family(family)
    attentions = _attentions(plain, family, chosen.layers)
    _check_negative(negative, _width(plain, attentions))
    told, length = _with_empty(negative, empty, chosen, _width(plain, attentions))
    latest, earliest = _times(pipe.scheduler, start, end)
    if chosen.neutral:
        yield
        return
    hooks = _Hooks(Run(chosen, told, rows, cache, length), own, family, plain, latest, earliest)
    with ExitStack() as undo:
        undo.callback(_restore, plain)
        # hooks within what was compiled in place might not run; those around torch.compile's wrapper do
        undo.callback(uncompile(network, wrapped=False))
        set_processors(plain, _processors(plain, attentions, hooks.run))
        undo.callback(network.register_forward_pre_hook(only_here(hooks.before), with_kwargs=True).remove)
        undo.callback(network.register_forward_hook(only_here(hooks.after)).remove)
        yield


def steering_of(steering: str | Steering, scale: float | None, family: str) -> Steering:
    """A mode's name or a Steering, at ``scale``; None is what is safe for the family, or the Steering's own."""
    if isinstance(steering, Steering):
        return steering if scale is None else replace(steering, scale=scale)
    mode = str(steering)
    return Steering(mode, SAFE[family].get(mode, 0.0) if scale is None else scale)


@dataclass
class _Hooks:
    """Around each forward of ``network``: is it steered, and, in joint attention, with which tokens.

    latest, earliest: the network's own times between which it is.
    """

    run: Run
    own: OwnGuidance
    family: str
    network: Any
    latest: float
    earliest: float

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        """A forward pre-hook: the negative's tokens follow the positive's where the two texts share one attention."""
        given = inspect.signature(type(self.network).forward).bind(None, *args, **kwargs).arguments
        del given["self"]
        self.run.active, self.run.reached = self._in_range(given["timestep"]), False
        if not self.run.active:
            return None
        if torch.is_grad_enabled() and self.network.is_gradient_checkpointing:
            raise OneStepError(
                "negative steering is for drawing, and this network is under gradient checkpointing: call it under "
                "torch.no_grad(), or network.disable_gradient_checkpointing() first"
            )
        text = given["encoder_hidden_states"]
        self.own.check(given.get("hidden_states"), text)
        batch = len(given["sample"] if self.family == "unet" else text)
        self._check_batch(batch)
        if self.family == "unet":
            return None
        self.run.positive_tokens = text.shape[1]
        return (), {**given, **self._with_negative(given, text)}

    def after(self, *_: Any) -> None:
        """A forward hook: a negative that could not act is not passed over in silence."""
        active, self.run.active = self.run.active, False
        if active and not self.run.reached:
            raise OneStepError(
                "the negative could not act: other attention processors were set within `steered`, or the network was "
                "compiled before it. Set them, or compile, before `steered`"
            )

    def _in_range(self, time: Any) -> bool:
        if self.latest == math.inf and self.earliest == -math.inf:
            return True  # without reading the time from the device
        first = torch.as_tensor(time).reshape(-1)[0]
        told = float(first) * (1000 if self.family == "flux" else 1)
        # times come in the latents' dtype
        slack = torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
        slack = max(slack, 1e-5)
        return self.earliest * (1 - slack) <= told <= self.latest * (1 + slack)

    def _check_batch(self, batch: int) -> None:
        count = len(self.run.negative)
        if (self.run.rows != "all" and batch % 2) or self._count(batch) % count:
            raise OneStepError(
                f"the network's batch has {batch} rows, of which {self.run.rows} are steered, and there are {count} "
                "negatives: give one for all pictures, or one for each prompt"
            )

    def _count(self, batch: int) -> int:
        return batch if self.run.rows == "all" else batch // 2

    def _with_negative(self, given: dict[str, Any], text: Tensor) -> dict[str, Any]:
        if (given.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
            raise OneStepError(
                "steering cannot follow a mask over the prompt's tokens: encode all prompts to one number of tokens"
            )
        count = self._count(len(text))
        negative = repeated(self.run.negative.to(text.device, text.dtype), count)
        # rows that are not steered carry the other half's negative, which nothing of theirs reads
        negative = torch.cat([negative] * (len(text) // count))
        changed = {"encoder_hidden_states": torch.cat([text, negative], 1)}
        if self.family == "flux":
            # every text lies at the origin of Flux' rotary positions
            places = given["txt_ids"][0] if given["txt_ids"].ndim == 3 else given["txt_ids"]
            changed["txt_ids"] = torch.cat([places, places.new_zeros(negative.shape[1], places.shape[1])])
        return changed


# -- what is served ---------------------------------------------------------------------------------------------------


def _family(network: Any) -> str:
    for family, cls in CLASSES.items():
        if isinstance(network, cls):
            if is_steered(network):
                raise OneStepError("this network is steered already: leave that `steered` first")
            return family
    raise OneStepError(
        f"a {type(network).__name__} is not served by negative steering: use SD1.5, SD2, SDXL, SD3, SD3.5 or Flux"
    )


def _attentions(network: Any, family: str, layers: str) -> dict[str, Any]:
    """The attentions that see a text and are steered, by their processors' names."""
    found = {name: network.get_submodule(name.removesuffix(".processor")) for name in network.attn_processors}
    if family == "flux":
        return found
    if family == "sd3":
        # SD3.5's second attention of a block sees the picture alone
        return {name: attn for name, attn in found.items() if attn.added_kv_proj_dim is not None}
    crossed = {name: attn for name, attn in found.items() if attn.is_cross_attention}
    if not crossed or any(attn.added_kv_proj_dim is not None for attn in found.values()):
        raise OneStepError("this U-Net has no cross-attention to a text of its own: it is not served by steering")
    chosen = {name: attn for name, attn in crossed.items() if layers == "all" or not name.startswith("down_blocks.")}
    if not chosen:
        raise OneStepError("this U-Net has no cross-attention in its decoder: set steering's layers to all")
    return chosen


def _processors(network: Any, attentions: dict[str, Any], run: Run) -> dict[str, Any]:
    """All processors of the network, those of ``attentions`` steered."""
    found = dict(network.attn_processors)
    if isinstance(network, UNet2DConditionModel):
        return {name: CrossSteered(inner, run) if name in attentions else inner for name, inner in found.items()}
    for name in attentions:
        _refuse_foreign(found[name])
        found[name] = JointSteered(found[name], run)
    return found


def _refuse_foreign(processor: Any) -> None:
    """A joint attention is computed anew, so that what a foreign processor adds would be lost."""
    if not isinstance(processor, JOINT) or getattr(processor, "_parallel_config", None) is not None:
        name = type(processor).__name__
        what = "an IP-Adapter" if "IPAdapter" in name else "another attention, or one over several devices,"
        raise OneStepError(
            f"this transformer has {what} ({name}), which steering does not serve there: take it off first"
        )


def _restore(network: Any) -> None:
    set_processors(network, {name: unsteered(found) for name, found in network.attn_processors.items()})


def _check_negative(negative: Any, width: int, what: str = "negative") -> None:
    if not isinstance(negative, Tensor) or negative.ndim != 3 or 0 in negative.shape:
        found = tuple(negative.shape) if isinstance(negative, Tensor) else type(negative).__name__
        count = "1 or prompts" if what == "negative" else "1"
        raise OneStepError(
            f"the {what} is {found}: give the text's tokens [{count}, tokens, width], the first result of encode_prompt"
        )
    if negative.shape[2] != width:
        raise OneStepError(
            f"the {what}'s tokens are {negative.shape[2]} wide, this network reads {width}: encode it by this "
            "pipeline's own encode_prompt"
        )


def _with_empty(negative: Tensor, empty: Tensor | None, steering: Steering, width: int) -> tuple[Tensor, int]:
    """The negative's tokens and behind them the empty text's, where steering wants them; how many those are."""
    if not steering.wants_empty or steering.neutral:
        return negative, 0
    if empty is None:
        raise OneStepError('perp measures from the empty text: give empty=..., "" encoded as the negative is')
    _check_negative(empty, width, "empty text")
    if len(empty) != 1:
        raise OneStepError(f"there are {len(empty)} empty texts: give one, [1, tokens, width]")
    return torch.cat([negative, empty.to(negative).expand(len(negative), -1, -1)], 1), empty.shape[1]


def _width(network: Any, attentions: dict[str, Any]) -> int:
    if isinstance(network, UNet2DConditionModel):
        return next(iter(attentions.values())).cross_attention_dim
    return network.config.joint_attention_dim


def _times(scheduler: Any, start: float, end: float) -> tuple[float, float]:
    """The network's own times at the shares ``start`` and ``end``, as ComfyUI counts percent: open at 0 and 1."""
    if not 0 <= start < end <= 1:
        raise OneStepError(
            f"steering from {start!r:.20} to {end!r:.20} is no range: 0 <= start < end <= 1, 0 the noisiest"
        )
    latest = math.inf if start == 0 else _time_at(schedule_of(scheduler), 1 - start)
    return latest, -math.inf if end == 1 else _time_at(schedule_of(scheduler), 1 - end)


def _time_at(schedule: NoiseSchedule, share: float) -> float:
    if isinstance(schedule, VPSchedule):
        return share * (schedule.times - 1)
    return float(schedule.time_of_sigma(schedule.sigma_at(torch.tensor(share, dtype=torch.float64))))
