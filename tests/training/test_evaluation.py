"""The evaluation in a world whose pictures are Gaussian: its rows, floors and distances have known values."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracles import CASES, SHAPE, TAU, WORDS, ExactGuidance, World, stable_diffusion_levels
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.training.evaluation.evaluate import Student, evaluate
from onestep.training.methods import settings_for
from onestep.training.methods.guidance import guided_recipe

EPS_AT_THE_END = next(case for case in CASES if str(case) == "eps, last time")
PROMPTS = ["one", "two", "three"]
TEACHER, UNTRAINED, FLOOR = "teacher, 25 steps", "teacher, 1 step", "teacher, 25 steps, another seed"


class GaussianHost:
    """The world behind the host's contract; a prompt's number is its condition."""

    name, family, device = "gaussian", "unet", torch.device("cpu")
    blocks: list[torch.nn.Module] = []
    in_place: list[torch.nn.Module] = []
    encoder_hash = base_hash = "none"

    def __init__(self) -> None:
        self.world = World(EPS_AT_THE_END)
        self.denoiser = self.world.denoise

    def encode(self, prompts: list[str], size: tuple[int, int], negative: bool = False) -> Cond:
        return Cond(torch.stack([self.text(prompt) for prompt in prompts])[:, None])

    def text(self, prompt: str) -> Tensor:
        return torch.eye(WORDS)[PROMPTS.index(prompt)] if prompt else torch.zeros(WORDS)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([latents, latents[:, :1]], 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return SHAPE

    def training(self) -> nullcontext[None]:
        return nullcontext()

    def poll(self) -> None: ...


class NearestMean:
    """A judge that knows the prompts' means; its features are the pixels."""

    def __init__(self, host: GaussianHost) -> None:
        means = host.world.mean("teacher", host.encode(PROMPTS, (8, 8)))
        self.means = host.decode(torch.from_numpy(means).float().unflatten(1, SHAPE)).flatten(1)

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return {"group": (-torch.cdist(images.flatten(1), self.means)).softmax(1)}

    def asked(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"group": torch.tensor([PROMPTS.index(prompt) for prompt in prompts])}


def one_step(host: GaussianHost) -> Recipe:
    return Recipe.for_student(host.denoiser.schedule, 1, "unet", ((8, 8),))


def table_of(samples: int = 400, prompts: list[str] = PROMPTS, **more: object):  # type: ignore[no-untyped-def]
    host = GaussianHost()
    state = host.world.roles.state("student")
    untouched = {name: (a, torch.zeros_like(b)) for name, (a, b) in state.items()}
    students = [Student("trained", state, one_step(host)), Student("untouched", untouched, one_step(host))]
    judge = NearestMean(host)
    return host, *evaluate(host, students, prompts, samples, judge=judge, size=(8, 8), guidance=1.0, **more)


def factor(levels: list[tuple[float, float]]) -> float:
    """What DDIM (arXiv:2010.02502, Eq. 12) multiplies deviations from the mean by: N(mu, tau^2), from unit noise."""
    total = 1.0
    for (alpha, sigma), (lower_alpha, lower_sigma) in zip(levels, [*levels[1:], (1.0, 0.0)], strict=True):
        shrink = alpha * TAU**2 / (alpha**2 * TAU**2 + sigma**2)
        total *= lower_alpha * shrink + lower_sigma * (1 - alpha * shrink) / sigma
    return total


def test_variety_is_that_of_the_gaussians_flow():
    _, table, _ = table_of(64)
    rows = {row.name: row for row in table.rows}
    trailing = [round(1000 - 40 * step) - 1 for step in range(25)]
    many = factor([stable_diffusion_levels(time) for time in trailing])
    once = factor([stable_diffusion_levels(999)])
    # the one step and the floor start from the same noise
    found = rows[UNTRAINED].measures["variety"].value / rows[FLOOR].measures["variety"].value
    assert found == pytest.approx(once / many, rel=1e-4)


@pytest.mark.broad
def test_frechet_to_the_teacher_is_that_of_two_gaussians():
    """One prompt: both rows are Gaussian, so the distance is |dm|^2 + D (s - s')^2, doubled rows and all."""
    host, table, pictures = table_of(800, ["two"], batch=400)
    measures = {row.name: row.measures for row in table.rows}
    teacher, untrained = (pictures[name].flatten(1).double().numpy() for name in (TEACHER, UNTRAINED))
    mean = ((teacher.mean(0) - untrained.mean(0)) ** 2).sum()
    trailing = [999 - 40 * step for step in range(25)]
    spread = factor([stable_diffusion_levels(time) for time in trailing]) - factor([stable_diffusion_levels(999)])
    # the third channel repeats the first, whose four pixels so count twice: sqrt(2) s along their axes
    width = 4 * (1 + math.sqrt(2) ** 2)
    assert measures[UNTRAINED]["fd"].value == pytest.approx(mean + width * spread**2, rel=0.06)
    assert measures[FLOOR]["fd"].value < 0.02 * measures[UNTRAINED]["fd"].value
    low, high = measures[UNTRAINED]["fd"].low, measures[UNTRAINED]["fd"].high
    assert low < measures[UNTRAINED]["fd"].value < high < 1.2 * low


def test_an_untouched_lora_is_the_untrained_step_and_a_trained_one_is_not():
    _, table, pictures = table_of(64)
    measures = {row.name: row.measures for row in table.rows}
    assert torch.equal(pictures["untouched"], pictures[UNTRAINED])
    assert measures["untouched"] == measures[UNTRAINED] != measures["trained"]


def test_rows_say_what_they_cost_and_count_the_same_pictures():
    host, table, pictures = table_of(30, batch=7)
    assert [(row.name, row.steps, row.forwards) for row in table.rows] == [
        (TEACHER, 25, 25),
        (UNTRAINED, 1, 1),
        (FLOOR, 25, 25),
        ("trained", 1, 1),
        ("untouched", 1, 1),
    ]
    assert {len(images) for images in pictures.values()} == {28}  # 7 whole prompts of 4 pictures
    assert table.about["pictures a row"] == 28
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in table.rows)
    assert host.world.roles.names() == ["student", "critic"]


def test_guidance_costs_a_second_forward_and_moves_the_pictures():
    host = GaussianHost()
    plain, _ = evaluate(host, [], PROMPTS, 8, size=(8, 8), guidance=1.0)
    guided, _ = evaluate(host, [], PROMPTS, 8, size=(8, 8), guidance=3.0)
    assert [row.forwards for row in guided.rows] == [50, 2, 50]
    assert guided.rows[0].measures.keys() == plain.rows[0].measures.keys() == {"variety"}


def test_the_batch_does_not_matter():
    _, table, pictures = table_of(40, batch=40)
    _, again, others = table_of(40, batch=3)
    assert all(torch.allclose(pictures[name], others[name], atol=1e-5) for name in pictures)
    for row, other in zip(table.rows, again.rows, strict=True):
        assert row.measures["variety"].value == pytest.approx(other.measures["variety"].value, rel=1e-4)


def test_real_pictures_are_compared_in_equal_number():
    host, _, pictures = table_of(40)
    real = torch.cat([pictures[TEACHER], pictures[TEACHER]])
    table, _ = evaluate(host, [], PROMPTS, 40, real, NearestMean(host), size=(8, 8), guidance=1.0)
    assert table.about["real pictures"] == 40
    measures = {row.name: row.measures for row in table.rows}
    assert measures[TEACHER]["fd_real"].value < 0.2 * measures[UNTRAINED]["fd_real"].value
    assert "fd" not in measures[TEACHER] and "sliced" not in measures[TEACHER]
    # its own pictures, all of them: no distance
    same, _ = evaluate(host, [], PROMPTS, 40, pictures[TEACHER], size=(8, 8), guidance=1.0)
    assert same.rows[0].measures["sliced_real"].value < 1e-6
    with pytest.raises(OneStepError, match="the model draws"):
        evaluate(host, [], PROMPTS, 8, torch.zeros(8, 3, 4, 4), size=(8, 8))


def test_the_judge_finds_what_was_asked():
    _, table, _ = table_of(200)
    measures = {row.name: row.measures["group"].value for row in table.rows}
    host = GaussianHost()
    centres = host.world.mean("teacher", host.encode(PROMPTS, (8, 8)))
    apart = min(np.linalg.norm(centres[i] - centres[j]) for i in range(3) for j in range(i))
    assert apart > 2 * TAU and measures[TEACHER] > 0.8


def test_json_holds_no_number_that_is_none_and_text_is_aligned():
    _, table, _ = table_of(16)
    told = json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert told["rows"][1]["measures"]["kd"]["low"] is None
    lines = table.to_text().split("\n\n")[0].split("\n")
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1


def test_a_distribution_needs_two_pictures():
    with pytest.raises(OneStepError, match="samples is 1"):
        evaluate(GaussianHost(), [], PROMPTS, 1, size=(8, 8))


def test_an_adapter_is_told_the_dial_and_draws_as_guidance_does() -> None:
    """One that is guidance gives the guided teacher's own pictures, each step of one forward; another dial others."""
    host = GaussianHost()
    recipe = guided_recipe(host, settings_for(sizes="8x8", teacher_steps=25))  # type: ignore[arg-type]
    side = ExactGuidance(torch.zeros(1, 8, dtype=torch.float64))
    adapters = [Student("right", {}, recipe, module=side, dial=3.0), Student("weak", {}, recipe, module=side, dial=1.5)]
    table, pictures = evaluate(host, adapters, PROMPTS, 12, size=(8, 8), guidance=3.0)  # type: ignore[arg-type]
    torch.testing.assert_close(pictures["right"], pictures[FLOOR], rtol=1e-5, atol=1e-5)
    assert float((pictures["weak"] - pictures[FLOOR]).abs().max()) > 0.1
    forwards = {row.name: row.forwards for row in table.rows}
    assert forwards[FLOOR] == 50 and forwards["right"] == 25
    assert "evaluated" not in host.denoiser.roles.names()
