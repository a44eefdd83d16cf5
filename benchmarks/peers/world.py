"""One tiny world for both sides: a bundled model, its student and critic, pictures, noise, prompts; and a copy of its
network for the peer, with the same adapters as peft has them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from onestep.core.cond import Cond
from onestep.core.roles import TEACHER
from onestep.core.sampling import teacher_sample
from onestep.pipelines.adapt import adapt, network_of
from onestep.pipelines.load import load
from onestep.training.engine.batch import Batch
from onestep.training.engine.student import STUDENT
from onestep.training.methods.distribution_matching import CRITIC

PROMPTS = ["a red circle", "a blue square at night", "two green stars", "a white ring"]
SIZE = (32, 32)
RANK = 4
Gradients = Mapping[str, Tensor]
"""Of each factor, "layer/a" and "layer/b"."""


@dataclass(frozen=True)
class Given(Batch):
    """A batch to which noise is given, the same as the peer is given; the student's latents alone are its own."""

    noise: Tensor | None = None

    def normal(self, stream: str) -> Tensor:
        if self.noise is None or stream == "latent":
            return super().normal(stream).to(torch.float64)
        return self.noise


@dataclass(frozen=True)
class Outcome:
    """A loss and its gradients with respect to a role's factors."""

    loss: float
    gradients: Gradients

    @property
    def flat(self) -> Tensor:
        return torch.cat([self.gradients[name].double().flatten() for name in sorted(self.gradients)])


class World:
    """name: of a bundled model. Its adapters are random, of both roles, so that nothing is zero."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, rank: int = RANK) -> None:
        self.name, self.dtype, self.rank = name, dtype, rank
        self.host = adapt(load(name, dtype=dtype))
        self.denoise: Any = self.host.denoiser
        self.bare = copy.deepcopy(network_of(load(name, dtype=dtype))).requires_grad_(False)
        for seed, role in enumerate((STUDENT, CRITIC)):
            self.denoise.roles.add(role, rank, seed)
            generator = torch.Generator().manual_seed(seed)
            for _, b in self.denoise.roles.state(role).values():
                b.copy_(0.02 * torch.randn(b.shape, generator=generator))
        cond, null = self.host.encode(PROMPTS, SIZE), self.host.encode([""], SIZE)
        shape, noise = self.host.latent_shape(SIZE), torch.Generator().manual_seed(7)
        self.noise = torch.randn(len(PROMPTS), *shape, generator=noise, dtype=dtype)
        self.batch = Given(cond, null, 0, 0, range(len(PROMPTS)), shape, self.host.device, noise=self.noise)
        start = torch.randn(len(PROMPTS), *shape, generator=noise, dtype=dtype)
        with torch.no_grad(), self.denoise.roles.use(TEACHER):
            self.x0 = teacher_sample(self.denoise, cond, self.nulls, start, 8, 3.0)

    @property
    def nulls(self) -> Cond:
        found = self.batch.nulls()
        assert found is not None
        return found

    # -- ours ---------------------------------------------------------------------------------------------------------

    def ours(self, backward: Callable[[], Tensor], role: str = STUDENT) -> Outcome:
        """What ``backward`` gives, which runs backward itself."""
        roles = self.denoise.roles
        for factor in roles.parameters(role):
            factor.grad = None
        loss = float(backward())
        found = iter(roles.parameters(role))
        names = [f"{name}/{side}" for name in sorted(roles.state(role)) for side in "ab"]
        return Outcome(loss, {name: next(found).grad for name in names})

    # -- the peer's ---------------------------------------------------------------------------------------------------

    def network(self, role: str) -> nn.Module:
        """diffusers' own network with ``role``'s factors as peft's, its base frozen; the teacher's without any."""
        network: Any = copy.deepcopy(self.bare)
        if role == TEACHER:
            return network
        state = self.denoise.roles.state(role)
        network.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(state)))
        network.to(self.dtype)
        with torch.no_grad():
            for name, (a, b) in state.items():
                for factor, value in zip(factors(network, name), (a, b), strict=True):
                    factor.copy_(value)
        return network

    def theirs(self, network: nn.Module, loss: Callable[[], Tensor], role: str = STUDENT) -> Outcome:
        network.zero_grad()
        value = loss()
        value.backward()
        pairs = {name: factors(network, name) for name in self.denoise.roles.state(role)}
        found = {f"{name}/{side}": pair["ab".index(side)].grad for name, pair in pairs.items() for side in "ab"}
        return Outcome(float(value), {name: value for name, value in found.items() if value is not None})


def factors(network: nn.Module, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """peft's A and B of a layer."""
    layer: Any = network.get_submodule(name)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def answered(network: Any, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """diffusers' network called by its own arguments."""
    text = cond.text.to(x)
    if cond.pooled is None:
        return network(x, time, encoder_hidden_states=text).sample
    return network(x, encoder_hidden_states=text, pooled_projections=cond.pooled.to(x), timestep=time).sample


@contextmanager
def same_draws(noise: Tensor, seed: int = 11) -> Iterator[Tensor]:
    """Within, the first numbers that torch draws of the shape and dtype of ``noise`` are those that are handed out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = torch.randn_like(noise)
        torch.manual_seed(seed)
        yield drawn
