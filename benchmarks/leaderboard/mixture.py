"""A world in two dimensions, where the density and its modes are known: four prompts, four Gaussians each.

A small residual network learns it as a flow model or by noise, with the null condition one time in ten; it is the base
of every method on the board, with LoRAs on each of its layers, through the same host protocol as a checkpoint.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep.core.cond import Cond
from onestep.core.denoiser import PREDICTIONS, Denoiser
from onestep.core.licences import Part
from onestep.core.lora_file import load_lora
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule, add_noise
from onestep.core.targets import Target
from onestep.core.tensor_file import read_tensors, write_tensors

PROMPTS = ["north", "east", "south", "west"]
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
DEVIATION = 0.1
WIDTH, BLOCKS, WAVES = 64, 4, 8
RANK = 32


# -- what is true -----------------------------------------------------------------------------------------------------


def modes(prompt: int) -> Tensor:
    """[4, 2]: two on an inner arc, two on an outer, about the prompt's direction."""
    middle = math.pi / 2 * (1 - prompt)
    angles = torch.tensor([-0.45, 0.45, -0.2, 0.3], dtype=torch.float64) + middle
    radii = torch.tensor([0.7, 0.8, 1.5, 1.7], dtype=torch.float64)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1)


def draw(prompts: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 2] of ``prompts`` [B]."""
    every = torch.stack([modes(prompt) for prompt in range(len(PROMPTS))])
    chosen = torch.multinomial(WEIGHTS, len(prompts), replacement=True, generator=generator)
    noise = torch.randn(len(prompts), 2, dtype=torch.float64, generator=generator)
    return every[prompts, chosen] + DEVIATION * noise


def mass(prompt: int, edges: Tensor) -> Tensor:
    """[n, n]: the exact probability of each cell between ``edges`` [n + 1]."""
    below = torch.special.ndtr((edges[None, :, None] - modes(prompt)[:, None]) / DEVIATION)
    cells = below[:, 1:] - below[:, :-1]
    return torch.einsum("m,mi,mj->ij", WEIGHTS, cells[..., 0], cells[..., 1])


# -- the network ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.text, self.time = nn.Linear(len(PROMPTS), WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, told: Tensor, text: Tensor) -> Tensor:
        return h + self.second(nn.functional.silu(self.first(h) + self.time(told) + self.text(text)))


class Network(nn.Module):
    """(x [B, 2, 1, 1], time [B] of 0 to 1000, cond) -> [B, 2, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2, WIDTH), nn.Linear(WIDTH, 2)
        self.time, self.blocks = nn.Linear(2 * WAVES, WIDTH), nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        waves = time[:, None] / 1000 * math.pi * 2 ** torch.linspace(-1, 5, WAVES).to(x)
        told = nn.functional.silu(self.time(torch.cat([waves.sin(), waves.cos()], 1)))[:, None]
        # a picture of one token
        h, text = self.enter(x.flatten(1)[:, None]), cond.text.to(x)
        for block in self.blocks:
            h = block(h, told, text)
        return self.leave(nn.functional.silu(h)).reshape(x.shape)


def names() -> dict[str, str]:
    """Layers by where they would stand in a U-Net, so that a LoRA of them is a U-Net's."""
    ends = "mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"
    found = {"enter": ends[0], "leave": ends[1], "time": "time_embedding.linear_1"}
    places = {"first": "ff.net.0.proj", "second": "ff.net.2", "text": "attn2.to_k", "time": "attn1.to_k"}
    for block in range(BLOCKS):
        inside = f"mid_block.attentions.0.transformer_blocks.{block}"
        found |= {f"blocks.{block}.{layer}": f"{inside}.{place}" for layer, place in places.items()}
    return found


@dataclass
class MixtureHost:
    """See training.host.Host. Pictures of 8 pixels are one latent [2, 1, 1]."""

    prediction: str
    network: Network
    name: str = "mixture"
    family: str = "unet"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encoder_hash: str = "prompts"
    memory_required: int = 0
    streamed: bool = False
    made_of: Sequence[Part] = ()
    loader: str = "diffusers"

    def __post_init__(self) -> None:
        self.network.requires_grad_(False)
        layers = dict(self.network.named_modules())
        roles = Roles([Target(name, layers[path]) for path, name in names().items()])
        self.denoiser: Denoiser = PREDICTIONS[self.prediction](self.network, schedule_of(self.prediction), roles)
        self.blocks: list[nn.Module] = list(self.network.blocks)
        self.in_place: list[nn.Module] = []

    @property
    def base_hash(self) -> str:
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in self.network.state_dict().values())).hexdigest()

    def encode(self, prompts: Sequence[str], size: tuple[int, int], *, negative: bool = False) -> Cond:
        return self.texts(prompts)

    def texts(self, prompts: Sequence[str], *, negative: bool = False) -> Cond:
        """One number a prompt; none of them for the empty text."""
        return Cond(torch.tensor([[[float(prompt == one) for one in PROMPTS]] for prompt in prompts]))

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        return cond

    @contextmanager
    def encoding(self) -> Iterator[None]:
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(latents.float()).mean(1, keepdim=True).repeat(1, 3, 8, 8)

    def latents_of(self, pictures: Tensor) -> Tensor:
        raise NotImplementedError("the mixture has no pictures to read")

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return 2, size[1] // 8, size[0] // 8

    def check_file(self, path: Path) -> str:
        return f"{len(load_lora(path, list(self.denoiser.roles.targets), self.family).state)} layers read back"

    def poll(self) -> None:
        pass


def schedule_of(prediction: str) -> Any:
    return FlowSchedule() if prediction == "flow" else VPSchedule.scaled_linear()


def base(prediction: str, path: Path, updates: int = 10_000, batch: int = 256) -> MixtureHost:
    """The trained network, kept at ``path``."""
    torch.manual_seed(0)
    host = MixtureHost(prediction, Network())
    if path.is_file():
        host.network.load_state_dict(read_tensors(path))
        return host
    _train(host, updates, batch)
    write_tensors(path, {name: value.clone() for name, value in host.network.state_dict().items()})
    return host


def _train(host: MixtureHost, updates: int, batch: int) -> None:
    """What it predicts, by the square, at uniform times; the mean of its weights is kept."""
    draws, network = torch.Generator().manual_seed(1), host.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0)
    mean = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    schedule, answer = host.denoiser.schedule, _answer(host.prediction)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * update / updates))
        prompts = torch.randint(len(PROMPTS), (batch,), generator=draws)
        x0 = draw(prompts, draws).float()[..., None, None]
        noise = torch.randn(x0.shape, generator=draws)
        sigma = schedule.sigma_at(torch.rand(batch, dtype=torch.float64, generator=draws))
        text = nn.functional.one_hot(prompts, len(PROMPTS)).float()
        text = text * (torch.rand(batch, 1, generator=draws) >= 0.1)
        time = schedule.time_of_sigma(sigma).float()
        found = network(add_noise(schedule, x0, noise, sigma), time, Cond(text[:, None]))
        loss = (found - answer(x0, noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean.update_parameters(network)
    network.load_state_dict(mean.module.state_dict())
    network.requires_grad_(False)


def _answer(prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return (lambda x0, noise: noise - x0) if prediction == "flow" else (lambda x0, noise: noise)


# -- how far off a student is -----------------------------------------------------------------------------------------

EDGES = torch.linspace(-2.4, 2.4, 49, dtype=torch.float64)
LEAST = 1e-6


def measures(prompt_draws: Sequence[Tensor]) -> dict[str, float]:
    """Of [N, 2] draws of each prompt: both Kullback-Leibler divergences on cells of 0.1, in nats, the modes that have a
    quarter of their share at least, and the share further than four deviations from each mode."""
    found = [_of_prompt(prompt, points.double()) for prompt, points in enumerate(prompt_draws)]
    mean = {key: sum(one[key] for one in found) / len(found) for key in ("kl", "kl_back", "off")}
    return mean | {"modes": sum(one["modes"] for one in found)}


def _of_prompt(prompt: int, points: Tensor) -> dict[str, float]:
    p, n = mass(prompt, EDGES).clamp_min(LEAST), len(points)
    cells = ((points - EDGES[0]) / (EDGES[1] - EDGES[0])).floor().long().clamp(0, len(EDGES) - 2)
    counts = torch.zeros_like(p).index_put_((cells[:, 0], cells[:, 1]), torch.ones(n).double(), accumulate=True)
    q, smooth = counts / n, (counts + 0.05) / (counts + 0.05).sum()
    apart = torch.cdist(points, modes(prompt))
    near = apart.min(1).values < 4 * DEVIATION
    share = torch.bincount(apart.argmin(1)[near], minlength=len(WEIGHTS)) / n
    return {
        "kl": float(torch.xlogy(q, q / p).sum()),
        "kl_back": float((p * (p / smooth).log()).sum()),
        "modes": float((share >= WEIGHTS / 4).sum()),
        "off": float((~near).double().mean()),
    }
