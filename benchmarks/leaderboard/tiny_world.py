"""A bundled model as a world of the board, by the judge that is bundled with it."""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from judged import Judged
from measure import EACH, GUIDANCE, pictures

from onestep.cli.model import open_host, read_prompts
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_tensors
from onestep.training.methods import METHODS, settings_for

PROMPTS = Path(__file__).resolve().parents[2] / "pipelines" / "tiny" / "prompts.txt"
PAIRS, SHOWN = 512, 12


class TinyWorld:
    """See worlds.World. samples: pictures of a student, four of a prompt; reference: real pictures, an .npz."""

    measures = {
        **{"fd": "FD-local", "fd_half": "±", "fd_real": "to real", "group": "group", "colour": "colour"},
        **{"brightness": "brightness", "variety": "variety"},
    }
    batch, forwards = 16, 1500
    ranked_by = "FD-local to the teacher's pictures"

    notes: tuple[str, ...] = ()

    def __init__(self, model: str, folder: Path, samples: int, reference: Path | None) -> None:
        self.model, self.folder, self.samples, self.reference = model, folder, samples, reference
        self.title, self.prompts = f"`{model}`", read_prompts(str(PROMPTS))
        self.about = (
            f"The bundled `{model}` and its prompts, at guidance {GUIDANCE:g}; {PAIRS} teacher's pairs, 10 steps. "
            "FD-local: in the judge's features, to the teacher's pictures and to real ones; group, colour, brightness: "
            "the share of pictures in which the judge finds what was asked for; variety: of one prompt's pictures, as "
            f"a share of the teacher's. {samples} pictures of each row; one step size for every student and twice that "
            "for what is trained beside it."
        )

    def host(self) -> Any:
        return open_host(self.model, device="cpu")

    def told(self) -> dict[str, Any]:
        rate = 3e-4
        beside = {"critic_learning_rate": 2 * rate, "head_learning_rate": 2 * rate, "warm_start_rate": rate}
        run = {"sizes": "32x32", "rank": 32, "pairs": PAIRS, "teacher_steps": 10, "guidance": GUIDANCE}
        return {**beside, **run, "learning_rate": rate}

    @cached_property
    def judged(self) -> Judged:
        return Judged(self.model, self.prompts, self.samples, self.folder, real=self.reference)

    @torch.no_grad()
    def scores(self, path: Path, recipe: Recipe) -> dict[str, float]:
        """And the first picture of some prompts, beside the LoRA."""
        latents = self.judged.latents(path)
        self._show(latents, path.with_name("shown.png"))
        return self.judged.scores(self.judged.features(latents))

    def floors(self) -> dict[str, dict[str, float]]:
        """The teacher from other noises, and in few steps."""
        judged, found = self.judged, {}
        found["teacher, 25 steps, other noises"] = judged.scores(judged.second)
        for steps in (4, 2, 1):
            recipe = METHODS["regression"].recipe(judged.host, settings_for("regression", student_steps=steps))
            found[f"teacher, {steps} steps" if steps > 1 else "teacher, 1 step"] = judged.untrained(recipe)
        self._show(read_tensors(self.folder / "teacher.safetensors")["x"], self.folder / "shown.png")
        return found

    def _show(self, latents: Tensor, path: Path) -> None:
        some = pictures(self.judged.host, latents[: SHOWN * EACH : EACH]).clamp(0, 1)
        strip = (torch.cat(list(some), 2).permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(strip).save(path)

    def rank(self, scores: dict[str, Any]) -> float:
        return float(scores["fd"])
