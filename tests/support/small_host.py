"""A whole host in miniature: a real network of convolutions and Linears on 4 x 4 latents, its text, its decoder.

Nothing in it stands in for anything: it is a checkpoint like another, only random and tiny.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onestep.core.cond import Cond
from onestep.core.denoiser import PREDICTIONS, Denoiser
from onestep.core.errors import OneStepError
from onestep.core.licences import Part
from onestep.core.lora_file import load_lora
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.core.targets import Target
from onestep.training.engine.setup import Setup
from onestep.training.methods import METHODS, settings_for
from onestep.training.settings import Settings, described

PROMPTS = ["a red house", "a blue tree", "two birds", "the sea at night", "stones"]
WIDTH, TOKENS, WORDS = 8, 3, 6
# Where the layers would stand in a U-Net, so that its LoRA is a U-Net's.
NAMES = {
    "conv_in": "conv_in",
    "time": "time_embedding.linear_1",
    "blocks.0.conv": "mid_block.resnets.0.conv1",
    "blocks.0.text": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "blocks.1.conv": "mid_block.resnets.1.conv1",
    "blocks.1.text": "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "conv_out": "conv_out",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.text = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WORDS, WIDTH)

    def forward(self, h: Tensor, text: Tensor) -> Tensor:
        return h + torch.tanh(self.conv(h) + self.text(text).mean(1)[..., None, None])


class Network(nn.Module):
    """(x [B, 2, h, w], time [B], cond) -> [B, 2, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(2, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 2, 3, padding=1)
        self.time, self.blocks = nn.Linear(2, WIDTH), nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        wave = torch.stack([torch.sin(time / 160), torch.cos(time / 160)], 1).to(x)
        h = self.conv_in(x) + self.time(wave)[..., None, None]
        for block in self.blocks:
            h = block(h, cond.text.to(x))
        return x + self.conv_out(h)


@dataclass
class SmallHost:
    """See training.host.Host. ``on_poll`` is called at every micro-step and may raise, as a person who cancels does."""

    prediction: str = "epsilon"
    seed: int = 0
    on_poll: Callable[[], None] | None = None
    name: str = "small"
    family: str = "unet"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    encoder_hash: str = "words"
    memory_required: int = 0
    streamed: bool = False

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.network = Network().requires_grad_(False)
        layers = dict(self.network.named_modules())
        roles = Roles([Target(name, layers[path]) for path, name in NAMES.items()])
        schedule = FlowSchedule() if self.prediction == "flow" else VPSchedule.scaled_linear()
        self.denoiser: Denoiser = PREDICTIONS[self.prediction](self.network, schedule, roles)
        self.blocks: list[nn.Module] = list(self.network.blocks)
        self.in_place: list[nn.Module] = []
        self.encoded = 0

    made_of: Sequence[Part] = ()

    loader = "diffusers"

    @property
    def base_hash(self) -> str:
        weights = b"".join(value.numpy().tobytes() for value in self.network.state_dict().values())
        return hashlib.sha256(weights).hexdigest()

    def encode(self, prompts: Sequence[str], size: tuple[int, int], negative: bool = False) -> Cond:
        return self.with_sizes(self.texts(prompts), size)

    def with_sizes(self, cond: Cond, size: tuple[int, int]) -> Cond:
        return cond

    @contextmanager
    def encoding(self) -> Iterator[None]:
        yield

    def texts(self, prompts: Sequence[str], negative: bool = False) -> Cond:
        self.encoded += len(prompts)
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little") for prompt in prompts]
        draws = [torch.randn(TOKENS, WORDS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return Cond(torch.stack(draws))

    def decode(self, latents: Tensor) -> Tensor:
        return self._drawn(latents.float().cpu())

    def _drawn(self, latents: Tensor) -> Tensor:
        mixed = [latents[:, 0], latents[:, 1], 0.5 * latents[:, 0] - 0.5 * latents[:, 1]]
        return torch.sigmoid(torch.stack(mixed, 1)).repeat_interleave(8, -1).repeat_interleave(8, -2)

    @contextmanager
    def decoding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        yield self._drawn

    def latents_of(self, pictures: Tensor) -> Tensor:
        """The inverse of `decode` on its two first channels."""
        return torch.logit(pictures[:, :2, ::8, ::8].clamp(1e-3, 1 - 1e-3))

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        if size[0] > 512 or size[1] > 512:
            raise OneStepError(f"small draws up to 512 pixels, not {size[0]}x{size[1]}")
        return 2, size[1] // 8, size[0] // 8

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    def check_file(self, path: Path) -> str:
        file = load_lora(path, list(self.denoiser.roles.targets), self.family)
        return f"{len(file.state)} layers read back"

    def poll(self) -> None:
        if self.on_poll is not None:
            self.on_poll()


def setup_of(host: Any, settings: Settings, folder: Path, prompts: Sequence[str] = PROMPTS) -> Setup:
    """What a run in ``folder`` hands its method."""
    method = METHODS[settings.method]
    embedded = method.embedded(host, prompts, settings, folder / "embeddings")
    return Setup(host, settings, embedded, folder, method.recipe(host, settings))


def small(**changes: Any) -> Settings:
    """A run of a few updates that goes through every phase."""
    values: dict[str, Any] = {"sizes": "32x32", "rank": 2, "batch": 4, "teacher_steps": 3, "pairs": 8, "warm_start": 3}
    values |= {"critic_warm_up": 2, "steps": 4, "critic_updates": 2, "warm_up": 2, "save_every": 1, "watch_every": 3}
    # what the tests reckon with is said here, so that better defaults change none of them
    values |= {"anchor": 0.0, "start": 1.0, "follow": 0.0, "ema": 0.99, "guidance": 4.0, "matching_guidance": 2.0}
    values |= {"watch_samples": 8, "preview_every": 4, "preview_samples": 2, "learning_rate": 1e-2, "seed": 3}
    own = METHODS[changes.get("method", "dmd")].settings
    known = {"method", *(entry.name for kind in (Settings, own) for entry in described(kind))}
    return settings_for(**{**{name: value for name, value in values.items() if name in known}, **changes})
