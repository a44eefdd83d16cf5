"""What a run hands its method as it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ...core.checkpoint import Checkpoints, clone_inputs
from ...core.compiled import compiled_blocks
from ...core.denoiser import Denoiser
from ...core.families import FAMILIES
from ...core.gates import gated_layers
from ...core.recipe import Recipe
from ...core.recomputed import BLOCKS
from ...core.streaming import streamed
from ..host import Host
from ..settings import Settings
from .prompts import Prompts


@dataclass(frozen=True)
class Setup:
    """prompts: embedded. folder: the run's; a method keeps what it makes in a folder of its own there. recipe: how the
    student draws."""

    host: Host
    settings: Settings
    prompts: Prompts
    folder: Path
    recipe: Recipe

    @property
    def denoise(self) -> Denoiser:
        return self.host.denoiser


@contextmanager
def hooked(host: Host, grade: str, compiled: bool = False) -> Iterator[Checkpoints]:
    """Within, the host's network is as it is trained: its gates keep less; adapters first; then copies of what the host
    overwrites; then checkpoints around both, of ``grade`` (core.recomputed), of all blocks where they are streamed.
    compiled: whether its blocks are, with what hangs in them."""
    roles = host.denoiser.roles
    streaming = streamed(host.network, host.blocks, host.device) if host.streamed else nullcontext()
    with gated_layers(host.network), streaming, roles.installed(), clone_inputs(host.in_place):
        checkpoints = Checkpoints(host.blocks, roles, BLOCKS if host.streamed else grade, whole=compiled)
        try:
            with compiled_blocks(host.blocks, roles) if compiled else nullcontext():
                yield checkpoints
        finally:
            checkpoints.remove()


@contextmanager
def as_before(host: Host, settings: Settings) -> Iterator[None]:
    """Within, roles may be added, and guidance is as the settings say; after, all is as before: a second run on
    ``host`` starts from nothing, and frees nothing twice."""
    roles, token_norm = host.denoiser.roles, host.denoiser.token_norm
    before = set(roles.names())
    if settings.token_norm != "host":
        known = FAMILIES[host.family]
        host.denoiser.token_norm = (known.norm or known.patch) if settings.token_norm == "on" else 0
    try:
        yield
    finally:
        host.denoiser.token_norm = token_norm
        for role in set(roles.names()) - before:
            roles.drop(role)
