"""ComfyUI's own model behind the contract: D(x, sigma, cond) -> x0 through `apply_model` and `extra_conds`.

ComfyUI keeps noise- and v-predicting models in variance-exploding form, x_ve = x0 + s n with s = sigma / alpha; the
contract's x = alpha x0 + sigma n is alpha x_ve, so D(x, sigma) = apply_model(x / alpha, sigma / alpha). Flow models are
the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_sampling as sampling
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.adapter_module import Port
from ..core.cond import Cond
from ..core.continuous import ContinuousVP
from ..core.control import entry_of
from ..core.denoiser import Guidance, TokenNorm, time_between
from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.lengths import by_length, lengths_of
from ..core.roles import Roles
from ..core.schedule import FlowSchedule, NoiseSchedule, StepsShift, VPSchedule, expand
from .own_text import OwnText


@dataclass
class ComfyDenoiser:
    """See `core.denoiser.Denoiser`. model: a `BaseModel`. options: its transformer_options, copied at each call.
    lengths: what becomes of texts of several lengths, as in `core.families.family.Family`. toward: as `core.denoiser`
    has it."""

    model: Any
    schedule: NoiseSchedule
    roles: Roles
    guidance: Guidance
    options: dict[str, Any] = field(default_factory=dict)
    lengths: str = "repeated"
    token_norm: TokenNorm = 0
    toward: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        captured = self.roles.capture(len(x), self.schedule.time_of_sigma(sigma).to(x), cond)
        with captured:
            x0 = self._grouped(x, sigma, cond).to(x.dtype)
        return captured.guard(x0)

    def _grouped(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """ComfyUI pads no text: those of one length are one call, where the network sees what would pad them."""
        levels = sigma[:, None] if self.toward is None else torch.stack([sigma, self.toward], 1)
        if self.lengths != "grouped":
            return self._apply(x, levels, cond)
        return by_length(self._apply, self.roles, x, levels, cond, 1)

    def _apply(self, x: Tensor, levels: Tensor, cond: Cond) -> Tensor:
        """levels: [B, 1] sigma, and beside it what the answers lead to, where that is told."""
        sigma, *toward = levels.unbind(1)
        alpha = signal(self.schedule, sigma)
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in self.options.items()}
        # where the network embeds no guidance, it is an adapter beside it that is told
        told = cond if self.guidance == "embedded" else cond.with_(guidance=None)
        outer = framed(self.model, x / expand(alpha, x))
        more = conditions(self.model, told, outer, self.lengths)
        with told_between(self.model.model_sampling, self.schedule, sigma, *toward):
            x0 = self.model.apply_model(outer, (sigma / alpha).to(x), transformer_options=options, **more)
        return unframed(self.model, x0)


@contextmanager
def told_between(
    model_sampling: Any, schedule: NoiseSchedule, sigma: Tensor, toward: Tensor | None = None
) -> Iterator[None]:
    """Within, the network is told the time that stands for both levels [B], and on a `ContinuousVP` any between two
    indices, in place of ComfyUI's nearest."""
    if toward is None and not isinstance(schedule, ContinuousVP):
        yield
        return
    time, own = time_between(schedule, sigma, toward), model_sampling.timestep
    before = vars(model_sampling).get("timestep")
    if isinstance(schedule, FlowSchedule):
        # by ComfyUI's own multiplier
        time = own(schedule.sigma_of_time(time))
    model_sampling.timestep = lambda level: time.to(level)
    try:
        yield
    finally:
        del model_sampling.timestep
        if before is not None:
            model_sampling.timestep = before


def of_video(model: Any) -> bool:
    """Whether a model's latents are [B, C, T, h, w], of which a picture is T = 1, as Wan's and Qwen-Image's."""
    return bool(getattr(model.latent_format, "latent_dimensions", 2) == 3)


def framed(model: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as the model has them."""
    return latents.unsqueeze(2) if of_video(model) else latents


def unframed(model: Any, latents: Tensor) -> Tensor:
    """The other way."""
    return latents.squeeze(2) if of_video(model) else latents


def signal(schedule: NoiseSchedule, sigma: Tensor) -> Tensor:
    """What divides x and sigma on the way to ComfyUI's form: alpha for variance-preserving schedules, else 1."""
    if isinstance(schedule, FlowSchedule):
        return torch.ones_like(sigma.double())
    # alpha = 0 of a zero-terminal schedule does not occur: ComfyUI keeps it just above
    return schedule.alpha(sigma).clamp_min(0.5 * math.sqrt(1 - schedule.sigma_max**2))


def port_of(network: Any, family: str) -> Port:
    """Where adapters act in ComfyUI's network beside its layers that are adapted: a U-Net takes a ControlNet's
    residuals."""

    def carry(more: dict[str, Any], residuals: list[Tensor]) -> dict[str, Any]:
        return more | {"control": {"input": [], "middle": residuals[-1:], "output": list(residuals[:-1])}}

    return Port(network, carry if FAMILIES[family].unet else None, entry_of(family, network))


class ScaledTime(sampling.ModelSamplingDiscrete):  # type: ignore[misc]
    """A discrete schedule whose network is given floor(``time_scale`` * time) at each level."""

    time_scale = 1.0

    def timestep(self, sigma: Tensor) -> Any:
        return (self.time_scale * super().timestep(sigma)).floor()


def schedule_of(model_sampling: Any, family: str | None = None) -> NoiseSchedule:
    """The schedule that a MODEL's (possibly patched) model_sampling describes. OneStepError for one of another kind.
    family: the network's, whose own shift by steps holds as long as nobody has set another."""
    kind = type(model_sampling)
    flow = getattr(kind, "noise_scaling", None) is sampling.CONST.noise_scaling  # image-to-image flows start elsewhere
    if flow and getattr(model_sampling, "noise_scale", 1.0) == 1:
        if isinstance(model_sampling, sampling.ModelSamplingFlux):
            shift = math.exp(model_sampling.shift)  # e^mu / (e^mu + 1/u - 1) is the shift e^mu
            known = FAMILIES[family].schedule if family else None
            # one by size is diffusers' alone: nothing of ComfyUI's draws so
            if isinstance(known, FlowSchedule) and isinstance(known.by_steps, StepsShift):
                return known if math.isclose(shift, known.shift, rel_tol=1e-6) else FlowSchedule(shift)
            return FlowSchedule(shift)
        if getattr(kind, "timestep", None) is sampling.ModelSamplingDiscreteFlow.timestep:
            return FlowSchedule(float(model_sampling.shift))
    own = getattr(kind, "timestep", None) is sampling.ModelSamplingDiscrete.timestep
    discrete = own or issubclass(kind, ScaledTime)
    if discrete and getattr(kind, "calculate_input", None) is sampling.EPS.calculate_input:
        return VPSchedule(1 / (1 + model_sampling.sigmas.cpu().double() ** 2))
    bases = ", ".join(base.__name__ for base in kind.__mro__[1:] if base not in (torch.nn.Module, object))
    edm = ": EDM's noise levels" if "EDM" in bases else ""
    raise OneStepError(
        f"the model's sampling ({bases}{edm}) is not served: use a model of eps, v-prediction or flow, without an LCM "
        "patch"
    )


# -- conditions -------------------------------------------------------------------------------------------------------


def conditions(model: Any, cond: Cond, x: Tensor, lengths: str = "repeated") -> dict[str, Any]:
    """What the model's extra_conds makes of ``cond``: keyword arguments of apply_model. lengths: of a ComfyDenoiser."""
    if lengths == "masked":
        return _told(model, cond, x, cond.text, None if cond.mask is None else cond.mask.long())
    if cond.size is None or bool((cond.size == cond.size[:1]).all()):
        return _told(model, cond, x, even_lengths(cond))
    each = [(cond[row : row + 1], x[row : row + 1]) for row in range(len(x))]
    rows = [_told(model, one, of_it, even_lengths(one)) for one, of_it in each]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _told(model: Any, cond: Cond, x: Tensor, text: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    sizes = {} if mask is None else {"attention_mask": mask}
    if cond.size is not None:
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        sizes |= dict(zip(names, cond.size[0].tolist(), strict=True))
    values = model.extra_conds(
        cross_attn=text, pooled_output=cond.pooled, noise=x, device=x.device, prompt_type="positive", **sizes
    )
    told = {
        name: value.process_cond(batch_size=len(x), device=x.device, area=None).cond for name, value in values.items()
    }
    return told | ({"guidance": cond.guidance} if cond.guidance is not None else {})


def even_lengths(cond: Cond) -> Tensor:
    """[B, L, C] text of one length: each row's real tokens, repeated as often as ComfyUI repeats them in a batch.

    Cross-attention gives the same answer to tokens repeated equally often. Joint attention does not: such prompts were
    refused when they were encoded.
    """
    if cond.mask is None or bool(cond.mask.all()):
        return cond.text
    lengths = cond.mask.sum(1).tolist()
    common = math.lcm(*lengths)
    rows = [text[:length].repeat(common // length, 1) for text, length in zip(cond.text, lengths, strict=True)]
    return torch.stack(rows)


def encode(clip: Any, prompts: Any, pooled: bool, own: OwnText | None = None) -> Cond:
    """The CLIP's conditions of ``prompts``, on the CPU, in its own dtype, in ordinary tensors. own: what the network
    makes of each, where it makes its text itself."""
    made = conditionings(clip, prompts)
    with torch.inference_mode(False), torch.no_grad():
        texts = [_own(text) if own is None else _own(own(_own(text), _all_own(told))) for text, told in made]
        poolings = [_own(told.get("pooled_output")) if pooled else None for _, told in made]
    return Cond.concat([Cond(text, pooled=pooling) for text, pooling in zip(texts, poolings, strict=True)])


def conditionings(clip: Any, prompts: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """(text, what is told beside it) of each of ``prompts``."""
    with torch.inference_mode():
        return [clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0] for prompt in prompts]


def in_front(cond: Cond, tokens: int) -> Cond:
    """``cond`` with zeros before each text up to ``tokens``, as FLUX.2's model itself puts them."""
    texts = [text[:length] for text, length in zip(cond.text, lengths_of(cond), strict=True)]
    return Cond.concat([Cond(pad(text, (0, 0, max(0, tokens - len(text)), 0))[None]) for text in texts])


def _own(value: Tensor | None) -> Any:
    return None if value is None else value.detach().to("cpu", copy=True).clone()


def _all_own(told: dict[str, Any]) -> dict[str, Any]:
    return {name: _own(value) if isinstance(value, Tensor) else value for name, value in told.items()}


def refuse_lengths(cond: Cond, prompts: Any) -> None:
    """Raises OneStepError where texts differ in length, for networks that attend to every token of a batch."""
    lengths = [cond.text.shape[1]] if cond.mask is None else cond.mask.sum(1).tolist()
    shortest = min(lengths)
    if max(lengths) > shortest:
        number = lengths.index(max(lengths))
        raise OneStepError(
            f"prompt {number + 1} takes {max(lengths)} text tokens, others {shortest}, and this model attends "
            f"to every token of "
            f"a batch: shorten it ({prompts[number][:60]!r}...)"
        )


def with_sizes(cond: Cond, size: tuple[int, int]) -> Cond:
    """``cond`` with SDXL's six numbers for a picture of ``size`` (width, height)."""
    width, height = size
    ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
    return replace(cond, size=ids.expand(len(cond), 6).clone())
