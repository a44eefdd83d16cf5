"""The mixture as a world of the board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixture
import torch
from torch import Tensor

from onestep.cli.lora import read_lora
from onestep.core.sampling import sample, teacher_sample
from onestep.core.step_roles import part_of


class MixtureWorld:
    """See worlds.World. samples: of each prompt."""

    prompts = mixture.PROMPTS
    measures = {"kl": "KL", "kl_back": "back", "modes": "modes of 16", "off": "off"}
    batch, forwards = 128, 3000
    ranked_by = "both Kullback-Leibler divergences (nats)"

    notes = (
        "Without guidance `decoupled-dmd` is `dmd` and `pg-sb` is `vsd`; of a picture of one pixel `hipa` is "
        "`regression`.",
        "In one step what learns on the teacher's own ends comes first: 8192 pairs hold nearly all of two dimensions. "
        "That matching is ahead of it, as papers have it of large models, whose ends no such set covers, was not seen.",
        "`lcm`, `dcm`, `tscd`, `scm`, `meanflow` and `twinflow` are behind the untrained teacher in four steps: every "
        "level learns from the one below it, and the noisiest, at which a step begins, comes last. At four times the "
        "forwards `lcm` in one step comes from 4.43 to 3.55 nats. That consistency learns fastest was seen only where "
        "the way is short: `pcm` and `mlcm`, with a phase for each of four steps, are first.",
        "`wadi` turns the base's weights and adds no direction to them: behind `dmd` after as many updates.",
        "`msd` shares the forwards among four students: in one step it is behind `dmd`, in four not.",
    )

    def __init__(self, prediction: str, folder: Path, samples: int) -> None:
        self.prediction, self.samples = prediction, samples
        self.base = folder / f"mixture-{prediction}.safetensors"
        self.title = "A mixture in two dimensions"
        self.about = (
            f"{4 * len(mixture.PROMPTS)} Gaussians under {len(mixture.PROMPTS)} prompts ({prediction} model), without "
            "guidance. KL: of the student from the mixture, which forgives a mode left out; back: of the mixture from "
            f"the student, which does not; off: further than four deviations from each mode. {samples} draws of each "
            "prompt; one step size for every student and twice that for what is trained beside it."
        )

    def host(self) -> mixture.MixtureHost:
        return mixture.base(self.prediction, self.base)

    def told(self) -> dict[str, Any]:
        """No guidance, so that the student should end as the mixture itself."""
        rate = 1e-3
        beside = {"critic_learning_rate": 2 * rate, "head_learning_rate": 2 * rate, "warm_start_rate": rate}
        plain = {"matching_guidance": 1.0, "guidance_schedule": "constant", "guidance": 1.0, "gan_weight": 0.1}
        return {**beside, **plain, "sizes": "8x8", "rank": mixture.RANK, "pairs": 8192, "learning_rate": rate}

    @torch.no_grad()
    def scores(self, path: Path, recipe: Any) -> dict[str, float]:
        host, draws, found = self.host(), torch.Generator().manual_seed(11), []
        lora, roles = read_lora(str(path), host), host.denoiser.roles
        for part, state in enumerate((lora.state, *lora.later)):
            roles.load(part_of("drawn", part), state)
        if lora.later:
            roles.steps.split("drawn", lora.parts)
        with roles.installed(), roles.use("drawn"):
            for prompt in mixture.PROMPTS:
                cond, shape = host.texts([prompt] * self.samples), (self.samples, 2, 1, 1)

                def fresh(step: int, shape: tuple[int, ...] = shape) -> Tensor:
                    return torch.randn(shape, generator=draws)

                x = sample(host.denoiser, recipe, cond, torch.randn(shape, generator=draws), fresh)
                found.append(x.flatten(1))
        return mixture.measures(found)

    def floors(self) -> dict[str, dict[str, float]]:
        """The mixture against itself, and the teacher in 50 steps and in few."""
        draws = torch.Generator().manual_seed(7)
        true = [mixture.draw(torch.full((self.samples,), at), draws) for at in range(len(mixture.PROMPTS))]
        found, host = {"the mixture itself": mixture.measures(true)}, self.host()
        for steps in (50, 4, 2, 1):
            points = []
            for prompt in mixture.PROMPTS:
                noise = torch.randn(self.samples, 2, 1, 1, generator=draws)
                with torch.no_grad():
                    x0 = teacher_sample(host.denoiser, host.texts([prompt] * self.samples), None, noise, steps, 1.0)
                points.append(x0.flatten(1))
            found[f"teacher, {steps} steps" if steps > 1 else "teacher, 1 step"] = mixture.measures(points)
        return found

    def rank(self, scores: dict[str, Any]) -> float:
        return float(scores["kl"] + scores["kl_back"])
