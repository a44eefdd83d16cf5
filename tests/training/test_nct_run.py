"""Whole runs of nct: what they learn from, what learns, what they leave, and how they are cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from narrowed import narrowed
from PIL import Image
from small_host import PROMPTS, SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run, seen_under

from onestep.core.adapter_file import load_adapter
from onestep.core.control import ControlAdapter
from onestep.core.controls import CONTROLS, Control, control_of
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_header, read_tensors, write_tensors
from onestep.training.data.controlled_pictures import TriplePool
from onestep.training.engine.prompts import embed
from onestep.training.methods import nct
from onestep.training.methods.nct import controlled, generator_recipe
from onestep.training.settings import Settings
from onestep.training.watch.measures import Watch, patch_distance

MAKERS = {"control": ControlAdapter.from_config}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-step LoRA of the small checkpoint."""
    settings = small(method="regression", steps=2, start=0.6, watch_every=0, preview_every=0)
    return run(tmp_path_factory.mktemp("lora") / "run", settings).path


def nct_settings(lora: Path, **changes: Any) -> Settings:
    values = {"method": "nct", "initial_lora": str(lora), "control": "soft-edges", "control_width": 8, "steps": 5}
    values |= {"noise_levels": 8, "watch_every": 0, "preview_every": 0, "ema": 0.5, "warm_up": 1, "final_rate": 1.0}
    return small(**{**values, **changes})


def pool(host: SmallHost, settings: Settings, folder: Path) -> TriplePool:
    prompts = embed(host, PROMPTS, settings, folder / "embeddings")

    def generate(batch: Any, noise: Any) -> Any:
        return torch.tanh(noise) + 0.1 * batch.cond.text.mean((1, 2))[:, None, None, None]

    def levels(update: int) -> int:
        return nct.levels_at(update, settings.steps, nct.FIRST_LEVELS, settings.own.noise_levels)

    return TriplePool(host, prompts, settings, folder / "triples", control_of(settings.own.control), generate, levels)


def test_a_triple_is_a_noise_its_picture_and_its_control(lora: Path, tmp_path: Path) -> None:
    host, settings = SmallHost(), nct_settings(lora, pairs=8)
    made = pool(host, settings, tmp_path)
    batch, triples = made.draw(made.prompts.batch(0, range(4)), 0)
    x = torch.tanh(triples.noise) + 0.1 * batch.cond.text.mean((1, 2))[:, None, None, None]
    assert torch.equal(triples.x, x) and triples.levels == 1
    wanted = (255 * control_of("soft-edges")(host.decode(x))).round() / 255
    assert torch.equal(triples.control, wanted) and float(wanted.std()) > 0
    # by a second pool on the same disk, by two halves of the batch, and from nothing
    again = pool(host, settings, tmp_path).draw(made.prompts.batch(0, range(4)), 0)[1]
    fresh = pool(host, settings, tmp_path / "fresh")
    halves = [fresh.draw(made.prompts.batch(0, rows), 0)[1] for rows in (range(2), range(2, 4))]
    for name in ("noise", "x", "control"):
        assert torch.equal(getattr(again, name), getattr(triples, name))
        assert torch.allclose(torch.cat([getattr(half, name) for half in halves]), getattr(triples, name), atol=4e-3)
    assert len(list((tmp_path / "triples").iterdir())) == 1


def test_pictures_are_made_up_to_the_cap_and_then_used_again(lora: Path, tmp_path: Path) -> None:
    made = pool(SmallHost(), nct_settings(lora, pairs=8, steps=40), tmp_path)
    levels = [made.draw(made.prompts.batch(update, range(4)), update)[1].levels for update in (0, 1, 19, 20, 39)]
    assert levels == [1, 1, 2, 4, 8] and len(list((tmp_path / "triples").iterdir())) == 2


def test_the_adapter_alone_learns_and_is_the_result(lora: Path, tmp_path: Path) -> None:
    host, settings = SmallHost(), nct_settings(lora, steps=40, control="low-resolution")
    result = run(tmp_path / "run", settings, host=host, report=seen_under(host, lora))
    losses = [line["loss"] for line in result.metrics]
    assert len(losses) == 40 and all(np.isfinite(losses))
    adapter = load_adapter(result.path, MAKERS, "unet")
    assert adapter.module.config.control == "low-resolution" and adapter.module.config.channels == 3
    assert float(adapter.module.leave[0].weight.detach().abs().min()) > 0
    assert Recipe.from_json(adapter.metadata["onestep.recipe"]) == Recipe.from_json(
        read_header(lora).metadata["onestep.recipe"]
    )
    assert json.loads(adapter.metadata["onestep.settings"])["method"] == "nct"


@pytest.mark.broad
def test_what_it_learns_is_the_control(lora: Path, tmp_path: Path) -> None:
    """From noises that it never saw, with controls of others' pictures: nearer to these pictures than G is."""
    settings = nct_settings(lora, steps=150, batch=8, pairs=256, control="low-resolution", ema=0.9, noise_levels=4)
    result, host = run(tmp_path / "run", settings), SmallHost()
    adapter, roles = load_adapter(result.path, MAKERS), host.denoiser.roles
    roles.load("student", load_lora(lora, list(roles.targets), "unet").state)
    roles.add_module("student", adapter.module)
    recipe = Recipe.from_json(adapter.metadata["onestep.recipe"])
    batch = embed(host, PROMPTS, settings, tmp_path / "embeddings").batch(10**6, range(32))
    with torch.no_grad(), roles.installed():
        x, stranger = (
            controlled(host.denoiser, recipe, batch, batch.normal(stream)) for stream in ("held out", "another")
        )
        control = control_of("low-resolution")(host.decode(x))
        found = controlled(host.denoiser, recipe, batch, batch.normal("another"), control)
    before, after = ((side - x).square().mean() for side in (stranger, found))
    assert float(after) < 0.6 * float(before)


@pytest.mark.parametrize("name", list(CONTROLS))
def test_every_control_is_learnt_and_acts(lora: Path, tmp_path: Path, name: str) -> None:
    result, host = run(tmp_path / "run", nct_settings(lora, control=name, steps=3, learning_rate=0.01)), SmallHost()
    adapter, roles = load_adapter(result.path, MAKERS), host.denoiser.roles
    roles.load("student", load_lora(lora, list(roles.targets), "unet").state)
    roles.add_module("student", adapter.module)
    batch = embed(host, PROMPTS, nct_settings(lora), tmp_path / "embeddings").batch(0, range(2))
    recipe, noise = Recipe.from_json(adapter.metadata["onestep.recipe"]), batch.normal("latent")
    with torch.no_grad(), roles.installed():
        plain = controlled(host.denoiser, recipe, batch, noise)
        control = control_of(name)(host.decode(plain), [0, 1])
        found, other = (controlled(host.denoiser, recipe, batch, noise, c) for c in (control, 1 - control))
    for a, b in ((plain, found), (found, other)):
        assert float((a - b).abs().max()) > 1e-3


def test_it_is_watched_under_its_control(lora: Path, tmp_path: Path) -> None:
    """The reference is the generator's; a new adapter misses as much as none; the preview shows control, without,
    with."""
    settings = nct_settings(lora, steps=4, watch_every=2, preview_every=2, watch_samples=8, control="low-resolution")
    first, *others = [line for line in run(tmp_path / "run", settings).metrics if "distance" in line]
    assert first["distance"] == pytest.approx(1) and all(0 < line["distance"] != 1 for line in others)
    assert first["detail"] >= 0 and "detail" in others[0]
    kept = read_tensors(tmp_path / "run" / "reference.safetensors")
    assert sorted(kept) == ["control", "plain", "x"] and not torch.equal(kept["x"], kept["plain"])
    host = SmallHost()
    wanted = control_of("low-resolution")(host.decode(kept["x"]))
    torch.testing.assert_close(kept["control"], wanted)
    with Image.open(tmp_path / "run" / "previews" / "000000.png") as grid:
        rows = torch.from_numpy(np.array(grid)).float().chunk(3)
    assert torch.equal(rows[1], rows[2]), "a new adapter changes nothing"
    with Image.open(tmp_path / "run" / "previews" / "000004.png") as grid:
        last = torch.from_numpy(np.array(grid)).float().chunk(3)
    assert torch.equal(last[0], rows[0]) and torch.equal(last[1], rows[1]) and not torch.equal(last[2], rows[2])


def test_the_distance_is_the_share_of_the_control_that_is_missed(lora: Path, tmp_path: Path) -> None:
    settings, host = nct_settings(lora, watch_samples=8, control="low-resolution"), SmallHost()
    setup = setup_of(host, settings, tmp_path)
    roles, recipe = host.denoiser.roles, setup.recipe
    roles.load("student", load_lora(lora, list(roles.targets), "unet").state)
    side = nct.adapter(host, settings)
    for leave in side.leave:
        leave.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    roles.add_module("student", side)
    with roles.installed():
        watch = Watch.prepare(setup, nct.by_controls(setup))
        numbers, found = watch(host, recipe, "student"), watch.student(host, recipe, "student")
    missed = [
        np.sqrt(
            ((control_of("low-resolution")(host.decode(x[::4])) - watch.latents["control"][::4]).numpy() ** 2).mean()
        )
        for x in (found, watch.latents["plain"])
    ]
    assert numbers["distance"] == pytest.approx(float(missed[0] / missed[1]), rel=1e-5) and numbers["distance"] != 1
    assert numbers["detail"] == pytest.approx(patch_distance(found, watch.latents["x"]))


@pytest.mark.parametrize("call", narrowed([2, 5, 7, 9], 5, 9))
def test_a_cancelled_run_ends_as_if_it_had_not_been(lora: Path, tmp_path: Path, call: int) -> None:
    settings = nct_settings(lora, accumulation=2, pairs=8)
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "run", settings, host=SmallHost(on_poll=at_call(call, Cancelled())))
    run(tmp_path / "run", settings, existing="continue")
    assert left(tmp_path / "run") == left(tmp_path / "whole" / "run")
    assert len(list((tmp_path / "run" / "triples").iterdir())) == 2


def test_a_restart_forgets_the_pictures(lora: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", nct_settings(lora, steps=2))
    before = {path.name for path in (tmp_path / "run" / "triples").iterdir()}
    run(tmp_path / "run", nct_settings(lora, steps=1), existing="restart")
    assert len(before) == 2 and len(list((tmp_path / "run" / "triples").iterdir())) == 1


def test_a_control_of_ones_own_is_trained_by_its_name(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTROLS, "red", Control("Red", 1, lambda pictures, keys: pictures[:, :1]))
    result = run(tmp_path / "run", nct_settings(lora, control="red", steps=2))
    assert load_adapter(result.path, MAKERS).module.config.control == "red"


def test_without_a_lora_the_base_is_the_generator() -> None:
    settings = nct_settings(Path(""), initial_lora="", start=0.5)
    recipe = generator_recipe(SmallHost(), settings)
    assert recipe.steps == 1 and recipe.timesteps[0] == pytest.approx(500, abs=1)
    assert nct.adapter(SmallHost(), settings).config.cell == 8


def test_a_run_without_a_lora_says_whose_pictures_it_learns_on(lora: Path, tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", nct_settings(Path(""), initial_lora="", steps=1))
    told = run(tmp_path / "told", nct_settings(lora, steps=1))
    assert [note for note in alone.notes if "no initial_lora: nct takes the base itself" in note]
    assert not [note for note in told.notes if "initial_lora" in note]
    again = run(tmp_path / "alone", nct_settings(Path(""), initial_lora="", steps=1), existing="continue")
    assert len(again.notes) == len(set(again.notes))


def test_what_is_refused_is_refused_before_anything_is_written(lora: Path, tmp_path: Path) -> None:
    def refused(match: str, host: SmallHost | None = None, **changes: Any) -> None:
        with pytest.raises(OneStepError, match=match):
            run(tmp_path / "run", nct_settings(lora, **changes), host=host or SmallHost())
        assert not (tmp_path / "run").exists()

    refused("no control 'cany'", control="cany")
    refused("the base draws in 4 steps", initial_lora="", student_steps=4)
    narrow = SmallHost()
    narrow.denoiser.roles.targets.pop("conv_in")
    with pytest.raises(OneStepError, match="acts on conv_in"):
        nct.check(narrow, nct_settings(lora))
    state = load_lora(lora).state
    four = Recipe.for_student(SmallHost().denoiser.schedule, 4, "unet", ())
    save_lora(tmp_path / "four.safetensors", state, "unet", four.to_json(), {})
    refused("the initial LoRA draws in 4 steps", initial_lora=str(tmp_path / "four.safetensors"))
    write_tensors(tmp_path / "silent.safetensors", read_tensors(lora))
    refused("does not say how it is sampled", initial_lora=str(tmp_path / "silent.safetensors"))
