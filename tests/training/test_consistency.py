"""What the trajectory methods share beside their equations: the recipe of their students, the null condition of a
person's pictures, when a change along the way comes in, and what does not go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import pictures_in
from small_host import SmallHost, setup_of, small
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.lora_file import save_lora
from onestep.core.recipe import PRESETS
from onestep.training.data.pairs import Pairs
from onestep.training.engine.donor import initial_state
from onestep.training.engine.student import add_student
from onestep.training.methods import METHODS, scm
from onestep.training.methods.consistency import pictures_of


def fast_lora(folder: Path, host: SmallHost, **changes: Any) -> str:
    """Of four steps, drawn by TCD with noise."""
    host.denoiser.roles.add("made", 2, 1)
    state = {name: (a.clone(), torch.ones_like(b)) for name, (a, b) in host.denoiser.roles.state("made").items()}
    host.denoiser.roles.drop("made")
    path = folder / "fast.safetensors"
    save_lora(path, state, host.family, replace(PRESETS["tcd-4"], **changes).to_json())
    return str(path)


@pytest.mark.parametrize("method", ["pcm", "perflow", "tscd", "mlcm"])
def test_a_student_without_noise_has_none_of_its_donors(method: str, tmp_path: Path) -> None:
    """Its steps and times are the donor's, which the run tells; between them there is no noise."""
    host = SmallHost()
    settings = small(method=method, student_steps=2, initial_lora=fast_lora(tmp_path, host, eta=0.3))
    recipe = METHODS[method].recipe(host, settings)
    assert (recipe.timesteps, recipe.eta, recipe.renoise) == (PRESETS["tcd-4"].timesteps, 0.0, False)
    assert "draws in 4 steps, and so does the student" in initial_state(host, settings, METHODS[method].recipe)[1]


def test_a_student_of_its_own_steps_is_told_of_no_donors(tmp_path: Path) -> None:
    host = SmallHost()
    settings = small(method="guidance-lora", teacher_steps=6, initial_lora=fast_lora(tmp_path, host))
    assert "draws in" not in initial_state(host, settings, METHODS["guidance-lora"].recipe)[1]


def test_an_experts_donor_ends_where_the_runs_range_does(tmp_path: Path) -> None:
    host = SmallHost()
    settings = small(method="dmd", initial_lora=fast_lora(tmp_path, host, end=100.0))
    assert METHODS["dmd"].recipe(host, settings).end == 0


@pytest.mark.parametrize("own", [True, False])
def test_the_solver_is_guided_away_from_the_runs_negative(own: bool, tmp_path: Path) -> None:
    """Whoever made the pictures."""
    told = {"pictures": pictures_in(tmp_path / "own")["pictures"]} if own else {}
    host, settings = SmallHost(), small(method="lora-guided", negative="blurry", **told)
    setup = setup_of(host, settings, tmp_path / "run")
    drawn, _ = pictures_of(setup).draw(setup.prompts.batch(0, range(4)), 0)
    null = drawn.nulls()
    assert null is not None
    torch.testing.assert_close(null.text, host.texts(["blurry"]).text.expand(4, -1, -1))


@pytest.mark.parametrize(("method", "changes"), [("rcm", {"anchor_every": 4}), ("rcm", {}), ("sana-sprint", {})])
def test_a_change_along_the_way_comes_in_by_the_updates_of_the_matching(
    method: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half of the warm-up's way it weighs a half, however many updates came before and however seldom it is asked
    for: of 40 updates a warm-up of 0.4 is over after 16."""
    ahead = {"warm_start": 3, ("critic_warm_up" if method == "rcm" else "head_warm_up"): 2}
    settings = small(method=method, steps=40, tangent_warm_up=0.4, pairs=4, **ahead, **changes)
    setup, seen = setup_of(SmallHost("flow"), settings, tmp_path), []

    def told(self: Any, denoise: Any, batch: Any, x0: Tensor, warmth: float) -> Tensor:
        seen.append(warmth)
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(scm.ContinuousConsistency, "__call__", told)
    loss, _ = scm.beside(setup, Pairs(setup.host, setup.prompts, settings, tmp_path / "pairs"))
    every = changes.get("anchor_every", 1)
    for index in (0, 8, 16, 36):
        # as `alternating` counts them
        loss(setup.prompts.batch(index, range(4)), 1.0, 5 + index // every)
    assert seen == pytest.approx([0.0, 0.5, 1.0, 1.0])


APART: dict[str, tuple[Callable[[], Any], str]] = {
    "shares of the same samples": (
        lambda: small(method="meanflow", picture_share=0.8, same_share=0.5),
        "picture_share 0.8 and same_share 0.5 .*not be above 1",
    ),
    "limits in the wrong order": (
        lambda: small(method="lcm", guidance_low=5.0, guidance_high=2.0),
        "guidance_low 5 must not be above guidance_high 2",
    ),
    "one limit beyond the guidance": (
        lambda: small(method="lcm", guidance=4.0, guidance_high=2.0),
        "guidance 4 must not be above guidance_high 2",
    ),
    "limits of no guidance": (
        lambda: small(method="pcm", guided_solver=False, guidance_high=6.0),
        "guided_solver is off, .*but 6 is named",
    ),
    "steps that cross a phase": (
        lambda: METHODS["mlcm"].check(SmallHost(), small(method="mlcm", segments="8,4", student_steps=2)),
        "segments 8,4 ends with 4, which a student of 2 steps does not keep to: set student_steps to a multiple of 4",
    ),
    "one step across phases": (
        lambda: METHODS["tscd"].check(SmallHost(), small(method="tscd", segments="4,2")),
        "a student of 1 step does not keep to",
    ),
}


@pytest.mark.parametrize(("make", "words"), APART.values(), ids=list(APART))
def test_what_does_not_go_together_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(OneStepError, match=words):
        make()


def test_steps_within_phases_are_taken() -> None:
    for steps in (4, 8):
        METHODS["mlcm"].check(SmallHost(), small(method="mlcm", segments="8,4", student_steps=steps))
    METHODS["tscd"].check(SmallHost(), small(method="tscd"))
    METHODS["mlcm"].check(SmallHost(), small(method="mlcm", student_steps=2))


def test_mlcms_phases_end_with_the_students_steps(tmp_path: Path) -> None:
    """Where nothing is told: twice as many, then as many."""
    seen = []
    for name, told in (("none", ""), ("told", "4,2")):
        setup = setup_of(SmallHost(), small(method="mlcm", student_steps=2, segments=told), tmp_path / name)
        add_student(setup.host, setup.settings, None)
        loss = METHODS["mlcm"].plan(setup).phases[0].turns[0].loss
        with setup.denoise.roles.installed():
            batches = [setup.prompts.batch(update, range(4)) for update in (0, 3)]
            seen.append([float(loss(batch, 1.0, batch.step)["consistency"]) for batch in batches])
    assert seen[0] == seen[1]
