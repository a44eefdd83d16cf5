"""What the generator of a run of method nct draws, for an extractor that is not Python: its controls come back as
examples (core.own_control)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from ...core.controls import Control
from ...core.errors import OneStepError
from ...core.lora_file import fit, load_lora
from ..data.controlled_pictures import TriplePool
from ..engine.inputs import check_base
from ..engine.prompts import check_prompts, embed
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings
from .nct import check, controlled, generator_recipe

PICTURES = Control("Pictures", 3, lambda pictures, keys: pictures)


def generator_pictures(host: Host, prompts: Sequence[str], settings: Settings) -> Iterator[Tensor]:
    """Every picture that a run with these ``settings`` takes the control of, [settings.batch, 3, H, W] in [0, 1] at a
    time and in steps of 1 / 255. Raises OneStepError for what such a run would refuse, and for several sizes."""
    texts = check_prompts(prompts)
    if len(settings.size_list) > 1:
        raise OneStepError(f"pictures of {len(settings.size_list)} sizes make no batch: give one size")
    check_base(host, settings)
    check(host, settings)
    roles, targets = host.denoiser.roles, list(host.denoiser.roles.targets.values())
    generate, path = partial(controlled, host.denoiser, generator_recipe(host, settings)), settings.initial_lora
    state = fit(load_lora(path, [target.name for target in targets], host.family).state, targets) if path else {}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, host.training(), roles.installed():
        embedded = embed(host, texts, settings, Path(folder) / "embeddings")
        roles.load(STUDENT, state, host.device, lineage=settings.seed)
        try:
            pool = TriplePool(host, embedded, settings, Path(folder) / "triples", PICTURES, generate, lambda update: 1)
            for _, _, picture in pool.every(settings.batch // settings.accumulation):
                yield picture.float() / 255
        finally:
            roles.drop(STUDENT)
