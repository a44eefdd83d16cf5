"""The one contract, D(x, sigma, cond) -> x0, and a wrapper for each way a network may be parameterised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .errors import OneStepError
from .lengths import by_length
from .schedule import NoiseSchedule, cast_as, expand

if TYPE_CHECKING:
    from .cond import Cond
    from .roles import Roles

Guidance = Literal["cfg", "embedded", "none"]
Network = Callable[[Tensor, Tensor, "Cond"], Tensor]
TokenNorm = int | Literal["row"]


def time_between(schedule: NoiseSchedule, sigma: Tensor, toward: Tensor | None) -> Tensor:
    """The time [B] that stands for both levels, from ``sigma`` down to ``toward``: t - r / 2 (TwinFlow,
    arXiv:2512.05150), the second time of a flow map without an embedder for it. Where ``toward`` is negative both times
    are, those of a twin trajectory: -(t - |r| / 2)."""
    time = schedule.time_of_sigma(sigma)
    if toward is None:
        return time
    between = time - schedule.time_of_sigma(toward.abs()) / 2
    return torch.where(toward < 0, -between, between)


class Denoiser(Protocol):
    """D(x, sigma, cond) -> x0.

    x: [B, C, H, W] (or [B, C, F, H, W]) noisy latents in the model's own scale, x = alpha(sigma) x0 + sigma noise,
    float32.
    sigma: [B] levels, float64. The result has the shape and dtype of x.
    token_norm: latents along a side of the tokens whose guided velocities have the norm of the prompt's, or each "row"
    of a channel instead of tokens; 0: guidance is as it is.
    """

    schedule: NoiseSchedule
    roles: Roles
    guidance: Guidance
    token_norm: TokenNorm

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor: ...


@dataclass
class _Wrapped:
    """``network(x, time, cond)``, told its own time [B]; subclasses turn its answer into x0. filled: of a network that
    reads each text at its own length, up to a multiple of so many tokens; 0 for others. toward: [B] the level that the
    answers are to lead to, of a student that learns flow maps; None and 0 for the picture, negative of a twin."""

    network: Network
    schedule: NoiseSchedule
    roles: Roles
    guidance: Guidance = "cfg"
    time_scale: float = 1.0
    filled: int = 0
    token_norm: TokenNorm = 0
    toward: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        captured = self.roles.capture(len(x), cast_as(self.schedule.time_of_sigma(sigma), x), cond)
        with captured:
            prediction = self._answer(x, cast_as(self.network_time(sigma), x), cond).to(x.dtype)
        return captured.guard(self.x0(x, sigma, prediction))

    def network_time(self, sigma: Tensor) -> Tensor:
        """The time [B] that the network is given at ``sigma``: a recipe's time_scale lowers it, to a whole index."""
        time = time_between(self.schedule, sigma, self.toward)
        return time if self.time_scale == 1 else (self.time_scale * time).floor()

    def _answer(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        if not self.filled:
            return self.network(x, time, cond)
        return by_length(self.network, self.roles, x, time, cond, self.filled)

    def x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        raise NotImplementedError


class X0Denoiser(_Wrapped):
    """The network answers x0."""

    def x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        return prediction


class EpsDenoiser(_Wrapped):
    """The network answers the noise: x0 = (x - sigma eps) / alpha. Refused where alpha = 0: there is no signal to
    find."""

    def x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        alpha = self.schedule.alpha(sigma)
        if not bool((alpha > 0).all()):
            raise OneStepError(
                "a noise-predicting model cannot start from pure noise (alpha = 0): "
                f"sigma {float(sigma.max()):.6g}; use a v- or x0-prediction for zero-terminal SNR"
            )
        return (x - expand(sigma, x) * prediction) / expand(alpha, x)


class VDenoiser(_Wrapped):
    """The network answers v = alpha eps - sigma x0 (arXiv:2202.00512, app. D): x0 = (alpha x - sigma v) / (alpha^2 +
    sigma^2)."""

    def x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        alpha = self.schedule.alpha(sigma)
        variance = alpha**2 + sigma.double() ** 2
        return expand(alpha / variance, x) * x - expand(sigma / variance, x) * prediction


class FlowDenoiser(_Wrapped):
    """The network answers v = noise - x0 (arXiv:2209.03003): x0 = x - sigma v, for alpha = 1 - sigma."""

    def x0(self, x: Tensor, sigma: Tensor, prediction: Tensor) -> Tensor:
        return x - expand(sigma, x) * prediction


PREDICTIONS: dict[str, type[_Wrapped]] = {
    "epsilon": EpsDenoiser,
    "v_prediction": VDenoiser,
    "sample": X0Denoiser,
    "flow": FlowDenoiser,
}


def guided(denoise: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, null: Cond | None, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598) in x0: D_u + k (D_c - D_u), with cond and null in one forward.

    k = ``scale``, one for all or [B]; 1 asks one forward of the conditional half alone. Raises OneStepError for k != 1
    where the model has no trained null condition.
    """
    if isinstance(scale, Tensor):
        scale = expand(scale, x)
    elif scale == 1:
        return denoise(x, sigma, cond)
    d_c, d_u = both(denoise, x, sigma, cond, null)
    return as_host(denoise.token_norm, x, d_c, d_u + scale * (d_c - d_u))


def as_host(token_norm: TokenNorm, x: Tensor, d_c: Tensor, answer: Tensor) -> Tensor:
    """``answer``, guided from ``d_c`` at x, all [B, C, h, w] of a flow, as a host guides with this `token_norm`."""
    if not token_norm:
        return answer
    # v = (x - D) / sigma; v_k ||v_c|| / ||v_k|| over each token's numbers, as QwenImagePipeline, or over each row's, as
    # Lumina2Pipeline: sigma cancels
    return x - _norms(x - d_c, token_norm) / _norms(x - answer, token_norm).clamp_min(1e-12) * (x - answer)


def _norms(v: Tensor, token_norm: TokenNorm) -> Tensor:
    """Of each token's or row's numbers, for each of them: [B, 1, h, w] or [B, C, h, 1] of [B, C, h, w]."""
    if token_norm == "row":
        return v.norm(dim=-1, keepdim=True)
    norms = token_norm * avg_pool2d(v.square().sum(1, keepdim=True), token_norm).sqrt()
    return norms.repeat_interleave(token_norm, -2).repeat_interleave(token_norm, -1)


def both(denoise: Denoiser, x: Tensor, sigma: Tensor, cond: Cond, null: Cond | None) -> tuple[Tensor, Tensor]:
    """(D_c, D_u): the conditional and the unconditional answer, from one forward of twice the batch."""
    if denoise.guidance != "cfg" or null is None:
        raise OneStepError(
            f"this model has no trained null condition (guidance is {denoise.guidance!r}), so guidance must be 1: "
            "set guidance to 1; models with embedded guidance take theirs through the condition"
        )
    answer = denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), type(cond).concat([cond, null]))
    d_c, d_u = answer.chunk(2)
    return d_c, d_u
