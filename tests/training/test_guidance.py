"""Guidance in one forward: its target is classifier-free guidance, its loss is the network's own error, its runs resume
to the bit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from oracles import CASES, Array, Case, ExactGuidance, World, drawn, rows
from small_host import SmallHost, setup_of, small
from tiny_pipelines import sd
from torch import Tensor
from whole_runs import Cancelled, at_call, left, run

from onestep.core.adapter_file import load_adapter
from onestep.core.errors import OneStepError
from onestep.core.guidance_adapter import MAKERS
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.sampling import teacher_sample, trajectory
from onestep.core.tensor_file import write_tensors
from onestep.pipelines.adapt import adapt
from onestep.training.data.trajectories import States, Trajectories, Walkers, _chosen
from onestep.training.distil import distil
from onestep.training.methods import guidance as method
from onestep.training.methods import settings_for
from onestep.training.settings import Settings

W = torch.tensor([1.5, 2.0, 4.0, 7.0], dtype=torch.float64)
GUIDED = [case for case in CASES if case.name != "eps, last time"]


def guided(world: World, x: Array, w: Array, alpha: Any = None, sigma: Any = None) -> Array:
    """D_u + w (D_c - D_u) of the teacher, in closed form."""
    d_c = world.x0("teacher", x, world.cond, alpha, sigma)
    d_u = world.x0("teacher", x, world.null.repeat(4), alpha, sigma)
    return d_u + w[:, None] * (d_c - d_u)


def states(world: World, x: Tensor, w: Tensor = W) -> States:
    """Those of ``x`` under guidance ``w``, in closed form."""
    target = guided(world, rows(x), w.numpy())
    apart = np.linalg.norm(guided(world, rows(x), w.numpy() + 1) - target, axis=1)
    return States(x, world.sigma(), w, torch.tensor(target).reshape(x.shape), torch.tensor(apart))


def check_loss(module: ModuleType, case: Case, told: bool) -> None:
    """|D - D_w|^2 / |D_c - D_u|, over (w - 1)^2 where the student is told w."""
    world, x = World(case), drawn()
    data, heard = states(world, x), []
    hook = world.network.register_forward_pre_hook(lambda network, given: heard.append(given[-1].guidance))
    loss = module.GuidanceInOne(told)(world.denoise, world.batch(), data)
    loss.backward()
    hook.remove()
    # asked once, and told each trajectory's own w or nothing
    assert [None if w is None else w.tolist() for w in heard] == [W.tolist() if told else None]
    target = rows(data.target)
    error = np.square(world.x0("student", rows(x), world.cond) - target).sum(1)
    d_c, d_u = (world.x0("teacher", rows(x), cond) for cond in (world.cond, world.null.repeat(4)))
    error /= np.linalg.norm(d_c - d_u, axis=1) + 1e-3 * np.linalg.norm(target, axis=1)
    error /= (W.numpy() - 1) ** 2 if told else 1
    assert float(loss.detach()) == pytest.approx(error.mean(), rel=1e-8)
    assert all(factor.grad is not None for factor in world.roles.parameters("student"))
    assert all(factor.grad is None for factor in world.roles.parameters("critic"))
    assert all(p.grad is None for p in world.network.parameters())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_the_loss_is_the_squared_error_per_unit_of_guidance(case: Case, told: bool) -> None:
    check_loss(method, case, told)


def test_no_guidance_has_a_finite_loss() -> None:
    """A scale of 1, and a prompt that is the null prompt."""
    world, x = World(CASES[0]), drawn()
    objective = method.GuidanceInOne(True)
    data = States(x, world.sigma(), torch.ones_like(W), x, torch.zeros_like(W))
    assert math.isfinite(float(objective(world.denoise, world.batch(), data).detach()))


MUTANTS = {
    "a mean for a sum": ("square().flatten(1).sum(1)", "square().flatten(1).mean(1)"),
    "the teacher taught": ("denoise.roles.use(STUDENT)", 'denoise.roles.use("critic")'),
    "all states alike": ("cast_as(data.apart, error)", "1"),
    "guidance from nought": ("(cast_as(data.w, error) - 1)", "cast_as(data.w, error)"),
    "the other way about": ("if self.conditioned else 1", "if not self.conditioned else 1"),
    "not told": ("if self.conditioned else batch.cond", "if False else batch.cond"),
    "told another scale": ("with_(guidance=cast_as(data.w", "with_(guidance=cast_as(2 * data.w"),
    "a unit of guidance once": ("reach**2 * size", "reach * size"),
}


@pytest.mark.parametrize("change", MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_loss_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mutant("onestep.training.methods.guidance", *change, monkeypatch)
    must_fail(lambda mutated: check_loss(mutated, CASES[0], told=True), module)


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_an_adapter_that_is_guidance_has_no_loss(case: Case) -> None:
    """Each sample is told the scale of its own trajectory: any other one leaves an error."""
    world, x = World(case), drawn()
    world.roles.drop("student")
    world.roles.add_module("student", ExactGuidance(torch.tensor(world.mean("teacher", world.null))))
    objective, data = method.GuidanceInOne(True), states(world, x)
    right = objective(world.denoise, world.batch(), data)
    wrong = objective(world.denoise, world.batch(), replace(data, w=W.flip(0)))
    assert float(right.detach()) < 1e-18 < 1e-6 < float(wrong.detach())
    right.backward()
    assert float(world.roles.modules["student"].null.grad.abs().max()) < 1e-8


# -- trajectories -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GUIDED, ids=str)
def test_a_trajectory_in_closed_form(case: Case) -> None:
    """DDIM and Euler, x' = alpha' D_w + sigma' (x - alpha D_w) / sigma, with a scale for each sample."""
    world, noise = World(case), drawn(seed=3)
    times = world.schedule.trailing(4)
    sigmas = world.schedule.sigma_of_time(times).numpy()
    alphas = world.schedule.alpha(torch.tensor(sigmas)).numpy()
    with torch.no_grad(), world.roles.use("teacher"):
        walk = list(trajectory(world.denoise, world.cond, world.null.repeat(4), noise, 4, W))
        end = teacher_sample(world.denoise, world.cond, world.null.repeat(4), noise, 4, W)
        alone = teacher_sample(world.denoise, world.cond[1:2], world.null, noise[1:2], 4, 2.0)
    x = rows(noise) * np.hypot(alphas[0], sigmas[0])
    for step, (found, sigma, x0) in enumerate(walk):
        d_w = guided(world, x, W.numpy(), alphas[step], sigmas[step])
        np.testing.assert_allclose(rows(found), x, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(rows(x0), d_w, rtol=1e-7, atol=1e-9)
        assert sigma.tolist() == [sigmas[step]] * 4
        if step < 3:
            x = alphas[step + 1] * d_w + sigmas[step + 1] * (x - alphas[step] * d_w) / sigmas[step]
    assert torch.equal(end, walk[-1][2])
    torch.testing.assert_close(alone, end[1:2], rtol=1e-9, atol=1e-9)


def agd_settings(**changes: Any) -> Settings:
    return small(**{"method": "agd", "teacher_steps": 6, "states": 3, "guidance_high": 5.0, **changes})


def trajectories(folder: Path, settings: Settings, host: SmallHost) -> Trajectories:
    place, kept = folder / "trajectories", (method.scales(settings), settings.own.states)
    return Trajectories(host, setup_of(host, settings, folder).prompts, settings, place, *kept)


def check_states(made: Trajectories, block: int, row: int, kept: tuple[Tensor, ...]) -> None:
    """All answers of a sample, [N, ...]: whole trajectories by `trajectory`, each left where its guidance has fallen
    below its share of the largest."""
    (x, target, sigma, apart, w), denoise = kept, made.host.denoiser
    batch = made._rows_of(block, list(range(4)))
    one, levels = (batch.cond[row : row + 1], batch.nulls()[row : row + 1]), made.settings.teacher_steps
    at, number = 0, 0
    while at < len(x):
        noise, scale, share = made._start(block, row, number)
        with torch.no_grad():
            walk = list(trajectory(denoise, *one, noise[None], levels, torch.tensor([scale])))
            d_c = torch.cat([denoise(x, sigma, one[0]) for x, sigma, _ in walk])
            large = (d_c - torch.cat([step[2] for step in walk])).flatten(1).norm(dim=1) / (scale - 1)
        weak = [step for step in range(levels) if large[step] < share * large[: step + 1].max()]
        end = min(at + min(weak[0] + 1 if weak else levels, levels), len(x))
        told = (torch.cat(sides) for sides in zip(*walk[: end - at], strict=True))
        for side, wanted in zip((x, sigma, target), told, strict=True):
            torch.testing.assert_close(side[at:end], wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(apart[at:end], large[: end - at], rtol=1e-3, atol=1e-4)
        assert w[at:end].tolist() == [scale] * (end - at)
        at, number = end, number + 1
    assert number > 1


def test_states_are_the_guided_teachers(tmp_path: Path) -> None:
    """The student has no say; what is drawn is one of them, with all that belongs to it."""
    host, settings = SmallHost(), agd_settings(states=24)
    made = trajectories(tmp_path, settings, host)
    host.denoiser.roles.add("student", 2, 0)
    for _, b in host.denoiser.roles.state("student").values():
        b.normal_()
    with host.denoiser.roles.installed(), host.denoiser.roles.use("student"):
        _, kept = made._take(made.prompts.batch(0, range(4)), 0)
        _, data = made.draw(made.prompts.batch(0, range(4)), 0)
    for row in range(4):
        check_states(made, 0, row, tuple(side[row] for side in kept))
        (at,) = (index for index in range(24) if torch.equal(kept[0][row][index], data.x[row]))
        drawn = (data.x, data.target, data.sigma, data.apart, data.w)
        assert all(torch.equal(side[row][at], one[row]) for side, one in zip(kept, drawn, strict=True))


def test_fewer_states_than_steps_are_some_of_as_many_answers(tmp_path: Path) -> None:
    """Each by the same chance, in their order."""
    all_made, made = (
        trajectories(tmp_path / str(states), agd_settings(states=states), SmallHost()) for states in (6, 2)
    )
    with all_made.host.denoiser.roles.installed(), made.host.denoiser.roles.installed():
        whole, some = (pool._make(0, 4) for pool in (all_made, made))
        seen = {float(sigma) for block in range(12) for sigma in made._make(block, 4)["sigma"].flatten()}
    assert len(seen) >= 5  # far beyond the first two
    for row in range(4):
        at = made._keeps(0, row, 6)
        for name in whole:
            torch.testing.assert_close(some[name][row], whole[name][row][at], rtol=1e-4, atol=1e-4)
    counts = sum(made._keeps(block, 0, 6).double() for block in range(900)) / 900
    np.testing.assert_allclose(counts, np.full(6, 1 / 3), atol=0.06)


def test_trajectories_begin_each_by_itself(tmp_path: Path) -> None:
    """Guidance is uniform in its range and the share in [0, 1), apart from each other; block, row and number count."""
    made = trajectories(tmp_path, agd_settings(), SmallHost())
    starts = [made._start(*at) for at in itertools.product(range(10), range(4), range(25))]
    noise, scales, shares = (torch.stack([torch.as_tensor(start[of]) for start in starts]) for of in range(3))
    for found in ((scales - 1) / 4, shares):
        assert float(found.min()) >= 0 and float(found.max()) < 1
        np.testing.assert_allclose(
            np.quantile(found, [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.06
        )
    assert abs(float(torch.corrcoef(torch.stack([scales.double(), shares.double()]))[0, 1])) < 0.1
    assert len({tuple(one.flatten()[:2].tolist()) for one in noise}) == len(set(scales.tolist())) == 1000
    assert abs(float(noise.std()) - 1) < 0.02


def test_trajectories_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    made = trajectories(tmp_path, agd_settings(), SmallHost())
    with made.host.denoiser.roles.installed():
        kept = made._make(0, 4)
    kept.pop("w")
    made.folder.mkdir(parents=True)
    write_tensors(made.folder / "000000.safetensors", kept)
    with pytest.raises(OneStepError, match="are of an earlier version.*restart the run"):
        made.draw(made.prompts.batch(0, range(4)), 0)


def test_an_answer_that_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    made = trajectories(tmp_path, agd_settings(), SmallHost())
    with made.host.denoiser.roles.installed():
        batch, kept = made._take(made.prompts.batch(0, range(4)), 0)
        kept[1][:, :2], kept[3][:, :2] = float("nan"), float("nan")
        made._take = lambda batch, update, choose: (batch, choose(kept))  # type: ignore[method-assign]
        for step in range(8):
            _, data = made.draw(made.prompts.batch(step, range(4)), step)
            assert data.target.isfinite().all() and torch.equal(data.x, kept[0][:, 2])


class Scripted:
    """Trajectories of one row, their guidance along the way given."""

    def __init__(self, apart: list[float]) -> None:
        schedule, draw = GUIDED[0].schedule(), torch.Generator().manual_seed(5)
        self.apart, self.seen = torch.tensor(apart, dtype=torch.float64), []

        def start(row: int, number: int) -> tuple[Tensor, float, float]:
            return torch.zeros(1, 1, 1), float(number), float(torch.rand((), generator=draw))

        self.walkers = Walkers(schedule, len(apart), start, [0], torch.device("cpu"))

    def steps(self, count: int) -> list[int]:
        levels = self.walkers._levels.tolist()
        for _ in range(count):
            self.seen.append(levels.index(float(self.walkers.sigma)))
            self.walkers.step(torch.zeros(1, 1, 1, 1), self.apart[self.seen[-1:]])
        return self.seen


@pytest.mark.broad
def test_steps_are_seen_as_often_as_guidance_is_large_there() -> None:
    """The second always, a later one by what stood at the one before it, in proportion to the largest so far."""
    for apart, wanted in (
        ([4.0, 3.0, 2.0, 1.0], [1, 1, 0.75, 0.5]),
        ([2.0, 4.0, 1.0, 4.0], [1, 1, 1, 0.25]),
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1]),
    ):
        counts = np.bincount(Scripted(apart).steps(8000), minlength=4)
        np.testing.assert_allclose(counts / counts[0], wanted, atol=0.04)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_trajectory_ends_where_an_answer_is_no_number(bad: float) -> None:
    assert Scripted([1.0, bad, 2.0, 3.0]).steps(6) == [0, 1] * 3
    assert Scripted([bad, 1.0, 2.0, 3.0]).steps(3) == [0] * 3


def test_what_is_no_number_is_drawn_only_where_nothing_else_is() -> None:
    good = torch.tensor([[True, False, True, True], [False, False, False, False]])
    drawn = [_chosen(good, torch.full((2,), share, dtype=torch.float64)).tolist() for share in (0, 0.4, 0.7, 0.99)]
    assert drawn == [[0, 0], [2, 1], [3, 2], [3, 3]]


def test_a_state_is_the_same_whoever_asks(tmp_path: Path) -> None:
    """Whole batches and micro-batches, new trajectories and ones drawn again, from memory or disk."""
    for update in (0, 1, 5):
        found = []
        for attempt, cut in enumerate([[range(4)], [range(2), range(2, 4)], [range(3), range(3, 4)]]):
            made = trajectories(tmp_path / str(attempt % 2), agd_settings(), SmallHost())
            parts = [made.draw(made.prompts.batch(17, samples), update)[1] for samples in cut]
            found.append([torch.cat([getattr(part, name) for part in parts]) for name in ("w", "sigma", "x", "target")])
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
            torch.testing.assert_close(other[2:], found[0][2:], rtol=1e-4, atol=1e-4)


def test_the_scales_of_a_lora_are_one_unless_asked() -> None:
    assert method.scales(settings_for(method="guidance-lora", guidance=3.5)) == (3.5, 3.5)
    assert method.scales(settings_for(method="guidance-lora", guidance_low=2.0, guidance_high=5.0)) == (2.0, 5.0)
    assert method.scales(settings_for(method="agd")) == (1.0, 12.0)
    assert method.scales(settings_for(method="agd", guidance_low=1.5, guidance_high=8.0)) == (1.5, 8.0)


# -- whole runs -------------------------------------------------------------------------------------------------------


def agd_run(folder: Path, existing: str = "stop", poll: Any = None) -> Any:
    torch.manual_seed(0)
    host = adapt(sd(), device="cpu")
    host.on_poll = poll
    settings = agd_settings(sizes="16x16", steps=4, batch=2, pairs=4, watch_samples=4, ema=0.5)
    try:
        return distil(host, ["a cat", "a red dog"], settings, folder, existing=existing)
    finally:
        host.release()


@pytest.mark.broad
def test_a_killed_agd_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = agd_run(tmp_path / "whole" / "run")
    with pytest.raises(Cancelled):
        agd_run(tmp_path / "cut" / "run", poll=at_call(5, Cancelled()))
    agd_run(tmp_path / "cut" / "run", "continue")
    assert left(tmp_path / "cut" / "run") == left(tmp_path / "whole" / "run")
    adapter = load_adapter(whole.path, MAKERS, "unet")
    assert adapter.kind == "guidance-cross-attention" and any(bool(out.weight.any()) for out in adapter.module.out)
    recipe = Recipe.from_json(adapter.metadata["onestep.recipe"])
    assert recipe.steps == 6 and recipe.guidance == 1 and not recipe.renoise and recipe.eta == 0


def test_a_killed_guidance_lora_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = agd_settings(method="guidance-lora", guidance=3.0, guidance_high=0.0)
    whole = run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(3, Cancelled())))
    run(tmp_path / "cut" / "run", settings, existing="continue")
    assert left(tmp_path / "cut" / "run") == left(tmp_path / "whole" / "run")
    assert any(bool(b.any()) for _, b in load_lora(whole.path).state.values())
    losses = [line["loss"] for line in whole.metrics if "loss" in line]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guidance_low": 6.0, "guidance_high": 5.0}, "guidance_low 6 must not be above guidance_high 5"),
        ({"teacher_steps": 100}, "agd follows trajectories of 100 steps: set teacher_steps to at most 64"),
        ({"targets": "attention"}, "set targets=all and no initial_lora"),
        ({"guidance_low": 0.5}, "guidance_low is 0.5: an adapter.s dial begins at 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(OneStepError, match=words):
        run(tmp_path / "run", agd_settings(**changes))
    assert not (tmp_path / "run").exists()


def test_a_base_without_guidance_or_places_is_refused(tmp_path: Path) -> None:
    host = SmallHost()
    with pytest.raises(OneStepError, match="none of the layers that an adapter adds to"):
        run(tmp_path / "run", agd_settings(), host=host)
    host.denoiser.guidance = "embedded"
    with pytest.raises(OneStepError, match="has no guidance that agd could learn"):
        run(tmp_path / "run", agd_settings(), host=host)
    assert not (tmp_path / "run").exists()
