"""A real update on the CPU: what torch's allocator is asked for, by torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny_pipelines as tiny
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from onestep.core.recomputed import BLOCKS
from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.training.engine.prompts import embed
from onestep.training.engine.setup import Setup, hooked
from onestep.training.engine.student import STUDENT, add_student
from onestep.training.engine.trainer import EMA, Trainer
from onestep.training.methods import METHODS
from onestep.training.settings import Settings

UPDATE = 1
"""The second: moments are there; of several students, those of all."""


def host() -> DiffusersHost:
    """A U-Net of four levels with cross-attention, in float32."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        **{"sample_size": 32, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 16},
        **{"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "cross_attention_dim": 24},
        **{"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "attention_head_dim": 4},
    )
    return adapt(
        StableDiffusionPipeline(
            **{"vae": tiny.vae(), "unet": unet, "scheduler": tiny.ddim(), "text_encoder": tiny.clip(width=24)},
            **{"tokenizer": tiny.clip_tokenizer(), "safety_checker": None, "feature_extractor": None},
            requires_safety_checker=False,
        )
    )


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that ``work`` has alive at once, of those that it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    changes: list[tuple[int, int]] = []
    stack = list(found.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = most = 0
    for _, bytes in sorted(changes, key=lambda change: change[0]):
        alive += bytes
        most = max(most, alive)
    return most


def trained(host: DiffusersHost, settings: Settings, folder: Path, recompute: str, sliced: bool) -> int:
    """Of a real update of every role."""
    last = UPDATE * getattr(settings.own, "students", 1)
    with training(host, settings, folder, recompute, sliced) as step:
        for update in range(last):
            step(update)
        return allocated(lambda: step(last))


@contextmanager
def training(
    host: DiffusersHost, settings: Settings, folder: Path, recompute: str = BLOCKS, sliced: bool = True
) -> Iterator[Callable[[int], object]]:
    """Updates of a real run, by their numbers; its roles are let go at the end."""
    method, roles = METHODS[settings.method], host.denoiser.roles
    prompts = embed(host, ["a cat, a hat"], settings, folder, guidance_input=method.guidance_input)
    setup = Setup(host, settings, prompts, folder, method.recipe(host, settings))
    with host.training(), hooked(host, recompute) as checkpoints:
        add_student(host, settings, None, method.adapter)
        roles.copy(STUDENT, EMA)
        trainer = Trainer(host, settings, setup.recipe, prompts, method.plan(setup))
        trainer.checkpoints, trainer.sliced = checkpoints, sliced
        yield trainer.step
        for role in roles.names():
            roles.drop(role)
