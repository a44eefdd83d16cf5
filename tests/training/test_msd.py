"""Several students: which one a prompt is of, against NumPy; k-means by its fixed point; each learns its own Gaussians;
batches of one student; whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, rows
from small_host import PROMPTS, SmallHost, setup_of, small
from whole_runs import cancelled_and_whole, factors, left, run

from onestep.core import router as routing
from onestep.core.cond import Cond
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.router import Router, load_students, run_files, save_router
from onestep.core.tensor_file import write_tensors
from onestep.training.data.pairs import Pairs
from onestep.training.distil import distil
from onestep.training.engine import clusters
from onestep.training.engine.student import generate
from onestep.training.methods import METHODS, settings_for
from onestep.training.methods.dmd import dmd
from onestep.training.methods.msd import router_of

TOLD: dict[str, Any] = {"method": "msd", "students": 2}

# -- which student ----------------------------------------------------------------------------------------------------


def points(count: int = 60, width: int = 5, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def check_nearest(module: ModuleType) -> None:
    """Of pooled texts, of masked tokens, and in float32 as in float64."""
    draw = torch.Generator().manual_seed(0)
    centroids = torch.randn(4, 5, generator=draw)
    text = 3 * torch.randn(30, 6, 5, generator=draw)
    mask = torch.arange(6) < torch.randint(1, 7, (30, 1), generator=draw)
    for cond in (Cond(text, pooled=points(30)), Cond(text, mask=mask), Cond(text)):
        if cond.pooled is not None:
            summary = cond.pooled.double().numpy()
        else:
            tokens = text.double().numpy()
            tokens = tokens / np.sqrt((tokens**2).mean(2, keepdims=True) + 1e-12)
            real = (mask if cond.mask is not None else torch.ones(30, 6)).double().numpy()[:, :, None]
            summary = (tokens * real).sum(1) / real.sum(1)
        apart = ((summary[:, None] - centroids.double().numpy()[None]) ** 2).sum(2)
        assert module.Router(centroids).of(cond) == apart.argmin(1).tolist()


def test_the_router_is_the_nearest_centroid() -> None:
    check_nearest(routing)
    # the first of equals
    assert Router(torch.tensor([[1.0], [-1.0]])).of(Cond(torch.zeros(1, 1, 1), pooled=torch.zeros(1, 1))) == [0]


def check_k_means(module: ModuleType, clustered: int = 4) -> None:
    """A fixed point of Lloyd's iteration, in NumPy, in which no cluster is empty; as one seed has it, always."""
    for seed in range(3):
        x = points(seed=seed)
        router, groups = module.clustered(x, clustered, seed)
        assert sorted(torch.cat(groups).tolist()) == [*range(60)] and all(len(group) for group in groups)
        assert [int(group[0]) for group in groups] == sorted(int(group[0]) for group in groups)
        found, data = router.centroids.double().numpy(), x.double().numpy()
        nearest = ((data[:, None] - found[None]) ** 2).sum(2).argmin(1)
        for at, group in enumerate(groups):
            assert group.tolist() == np.flatnonzero(nearest == at).tolist()
            np.testing.assert_allclose(found[at], data[group].mean(0), atol=1e-6)
        again = module.clustered(x, clustered, seed)[0]
        assert torch.equal(router.centroids, again.centroids)


def test_clusters_are_a_fixed_point_of_lloyd() -> None:
    check_k_means(clusters)


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("onestep.core.router", (".argmin(1)", ".argmax(1)"), check_nearest),
        ("onestep.core.router", ("square().sum(2)", "sum(2).abs()"), check_nearest),
        ("onestep.training.engine.clusters", ("x[mine].mean(0)", "x[mine][0]"), check_k_means),
        ("onestep.training.engine.clusters", ("Router(centroids[order])", "Router(centroids)"), check_k_means),
    ],
    ids=["the farthest", "sums", "its first point", "in any order"],
)
def test_a_wrong_formula_is_found_out(name: str, change: Any, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check, mutant(name, *change, monkeypatch))


def test_clusters_that_are_plain_are_found() -> None:
    """And one far point gets one, or none of two is empty."""
    centres = 20 * torch.eye(4, 6)
    for seed in range(5):
        kind = torch.arange(80) % 4
        _, groups = clusters.clustered(centres[kind] + 0.1 * points(80, 6, seed), 4, seed)
        assert [group.tolist() for group in groups] == [torch.nonzero(kind == at)[:, 0].tolist() for at in range(4)]
    lonely = torch.cat([torch.zeros(30, 2), torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 90.0]])])
    _, groups = clusters.clustered(lonely, 3, 0)
    assert [group.tolist() for group in groups] == [[*range(30)], [30], [31]]
    # of a long list some are looked at, and all have a student
    many = points(clusters.LOOKED_AT + 500, 3)
    assert sum(len(group) for group in clusters.clustered(many, 3, 0)[1]) == len(many)


def test_a_routers_file(tmp_path: Path) -> None:
    router = Router(points(3, 4))
    path, names = tmp_path / "result-router.safetensors", ["result.safetensors", "result-2.safetensors"]
    proven = save_router(path, Router(points(2, 4)), names, "unet")
    assert proven == "result-router.safetensors tells 2 students apart"
    found = load_students(path)
    assert found.files == (tmp_path / names[0], tmp_path / names[1]) and found.family == "unet"
    # renamed together
    path.rename(tmp_path / "mine-router.safetensors")
    found = load_students(tmp_path / "mine-router.safetensors")
    assert [file.name for file in found.files] == ["mine.safetensors", "mine-2.safetensors"]
    with pytest.raises(OneStepError, match="tells students apart and is no LoRA: choose that of one student"):
        load_lora(tmp_path / "mine-router.safetensors")
    for told in ({}, {"onestep.students": "{"}, {"onestep.students": json.dumps(["../a.safetensors"] * 3)}):
        write_tensors(tmp_path / "bad.safetensors", {"centroids": router.centroids}, told)
        with pytest.raises(OneStepError, match=r"bad\.safetensors holds no router of students: choose"):
            load_students(tmp_path / "bad.safetensors")
    with pytest.raises(OneStepError, match="knows texts of 4 numbers, and this model's have 5"):
        router.nearest(points(2, 5))


# -- what each learns -------------------------------------------------------------------------------------------------


def two_kinds(world: World) -> tuple[Router, Cond]:
    """Four prompts, the first and the third of one kind."""
    world.cond = Cond(torch.eye(3)[[0, 1, 0, 1]][:, None] + 0.01 * torch.arange(4)[:, None, None])
    router = Router(world.cond.summary[:2].clone())
    assert router.of(world.cond) == [0, 1, 0, 1]
    return router, world.cond


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_row_is_its_students(case: Case) -> None:
    """Of a mixed batch, in NumPy; and a gradient is of its own student alone."""
    world = World(case)
    router, cond = two_kinds(world)
    world.roles.split("student", router)
    for _, b in world.roles.state("student@2").values():
        b.add_(0.5)
    x = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with world.roles.use("student"):
        found = world.denoise(x, world.sigma(), cond)
    wanted = [world.x0(role, rows(x), cond) for role in ("student", "student@2")]
    np.testing.assert_allclose(rows(found.detach())[::2], wanted[0][::2], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(rows(found.detach())[1::2], wanted[1][1::2], rtol=1e-6, atol=1e-9)
    found[1].sum().backward()
    grads = [
        float(factor.grad.abs().sum()) if factor.grad is not None else 0 for factor in world.roles.parameters("student")
    ]
    assert grads[:2] == [0, 0] and min(grads[2:]) > 0
    with (
        world.roles.use("student"),
        pytest.raises(OneStepError, match="which of 2 students serves is told by the prom"),
    ):
        world.roles.capture(4, torch.zeros(4))


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[6]], ids=str)
def test_each_student_learns_its_own_gaussians(case: Case) -> None:
    """dmd, an update for one and an update for the other, on two kinds of prompts: from what is nearly noise a picture
    is the student's mean. Each comes to the teacher's mean of its own prompts, and stays apart at the others'."""
    world = World(case)
    router, cond = two_kinds(world)
    before = world.mean("student", cond)
    for role in ("student", "critic"):
        world.roles.split(role, router)
    world.roles.copy("student", "critic")
    recipe, objective = Recipe.for_student(world.schedule, 1, "unet", ()), dmd(settings_for(matching_guidance=1.0))
    for step in range(240):
        batch = replace(world.batch(step=step), cond=cond[[step % 2, 2 + step % 2]], samples=range(2))
        x = generate(world.denoise, recipe, batch)
        g, _ = objective.cotangent(world.denoise, batch, x)
        x.backward(g / len(batch))
        for factor in world.roles.parameters("student"):
            if factor.grad is not None:
                factor.detach().sub_(0.05 * factor.grad)
                factor.grad = None
        world.roles.lerp("critic", "student", 1.0)
    wanted = world.mean("teacher", cond)
    gaps = {role: np.square(world.mean(role, cond) - wanted).sum(1) for role in ("student", "student@2")}
    began = np.square(before - wanted).sum(1)
    assert (gaps["student"][::2] < 0.05 * began[::2]).all() and (gaps["student@2"][1::2] < 0.05 * began[1::2]).all()
    # what one has learnt the other has not
    assert (gaps["student"][1::2] > 4 * gaps["student@2"][1::2]).all()
    assert (gaps["student@2"][::2] > 4 * gaps["student"][::2]).all()


# -- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["32x32", "32x32,32x16,16x16"])
def test_a_batch_is_all_of_one_student_and_each_has_its_turn(sizes: str, tmp_path: Path) -> None:
    """Critic and student of an update are of the same one; so is what the teacher made."""
    settings = small(**TOLD, sizes=sizes, pairs=20)
    setup = setup_of(SmallHost(), settings, tmp_path, [f"a picture of number {n}" for n in range(9)])
    router = router_of(setup.prompts, settings)[0]
    pairs, found, seen = Pairs(setup.host, setup.prompts, settings, tmp_path / "pairs"), [], set()
    assert pairs.blocks == max(5, 2 * len(settings.size_list))
    for update in range(12):
        of = [setup.prompts.batch(3 * update + turn, range(4)) for turn in range(3)]
        drawn, (noise, _) = pairs.draw(of[-1], update)
        assert drawn.shape == noise.shape[1:] == setup.prompts.shapes[settings.size_list[0]] or len(sizes) > 5
        assert {*router.of(drawn.cond)} == {*router.of(Cond.concat([batch.cond for batch in of]))} == {update % 2}
        found += of
        seen.add((update % 2, drawn.shape))
    texts = {text for batch in found for text in batch.texts}
    assert len(texts) == 9 and len(seen) == 2 * len(settings.size_list)


def test_one_student_is_dmd_to_the_bit(tmp_path: Path) -> None:
    told = {"anchor": 0.5, "student_steps": 2}
    one = run(tmp_path / "msd", small(method="msd", students=1, **told))
    plain = run(tmp_path / "dmd", small(method="dmd", **told))
    assert factors(one.path) == factors(plain.path)
    alike = [
        [{k: v for k, v in line.items() if k not in ("seconds", "phase")} for line in r.metrics] for r in (one, plain)
    ]
    assert alike[0] == alike[1] and run_files(one.path, one.recipe) == [one.path]


def test_the_files_of_a_run(tmp_path: Path) -> None:
    """A LoRA for each student, of its own factors, and the router that the run has drawn by."""
    host, held = SmallHost(), {}

    def look(progress: Any) -> None:
        roles = host.denoiser.roles
        if not progress.preparing:
            held.update({role: roles.state(role)["conv_in"][1].clone() for role in roles.names() if "ema" in role})

    settings = small(**TOLD, watch_every=0, preview_every=0)
    result = run(tmp_path / "run", settings, host=host, report=look)
    assert [file.name for file in run_files(result.path, result.recipe)] == [
        *("result.safetensors", "result-2.safetensors", "result-router.safetensors")
    ]
    students = load_students(tmp_path / "run" / "result-router.safetensors")
    states = [load_lora(file).state for file in students.files]
    assert not torch.equal(states[0]["conv_in"][1], states[1]["conv_in"][1])
    for state, role in zip(states, ("ema", "ema@2"), strict=True):
        assert torch.equal(state["conv_in"][1], held[role])
    assert result.recipe.files == () and "tells 2 students apart" in result.check
    hint = load_lora(result.path).metadata["modelspec.usage_hint"]
    assert "One of 2 students, each for prompts of its kind (result.safetensors, result-2.safetensors)" in hint
    setup = setup_of(SmallHost(), settings, tmp_path / "again")
    assert torch.equal(students.router.centroids, router_of(setup.prompts, settings)[0].centroids)
    assert any("2 students share the prompts by kind" in note for note in result.notes)


@pytest.mark.parametrize("poll", narrowed([5, 9, 14, 17], 14))
def test_a_run_that_is_stopped_ends_as_if_not(poll: int, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(**TOLD, anchor=0.5, critic_pictures="shared"), poll)
    assert cut == whole and "result-router.safetensors" in whole["files"]


def test_it_is_left_whole_by_a_second_run(tmp_path: Path) -> None:
    """One host, msd and then dmd: nothing of the first is left on it."""
    host = SmallHost()
    run(tmp_path / "first", small(**TOLD), host=host)
    assert host.denoiser.roles.names() == []
    run(tmp_path / "second" / "run", host=host)
    run(tmp_path / "alone" / "run")
    assert left(tmp_path / "second" / "run")["files"] == left(tmp_path / "alone" / "run")["files"]


def test_what_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="students is 9, and there are 5 different prompts"):
        distil(SmallHost(), PROMPTS, small(method="msd", students=9, steps=20), tmp_path / "run")
    with pytest.raises(OneStepError, match="steps is 1, and there are 2 students: give each an update"):
        METHODS["msd"].check(SmallHost(), small(**TOLD, steps=1))
    for name in ("step_loras", "anchor_every", "diversity_anchor"):
        with pytest.raises(OneStepError, match=f"msd has no setting '{name}': it belongs to"):
            settings_for("msd", **{name: 1})

    class Deaf(SmallHost):
        def texts(self, prompts: Any, negative: bool = False) -> Cond:
            return super().texts(["as one"] * len(prompts))

    with pytest.raises(OneStepError, match="the 5 prompts are of fewer than 2 kinds to this model: lower students"):
        distil(Deaf(), PROMPTS, small(**TOLD), tmp_path / "run")
