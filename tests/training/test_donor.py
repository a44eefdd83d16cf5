"""Runs that go on from somebody's few-step LoRA: its factors at the run's rank, its recipe, the critic's beginning."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_host import SmallHost, setup_of, small
from torch import Tensor
from whole_runs import run

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.licences import Source, sources_in
from onestep.core.lora_file import load_lora, save_lora
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.roles import State
from onestep.core.sampling import sample
from onestep.core.tensor_file import read_header, read_tensors, write_tensors
from onestep.training.engine.donor import cut, donor_recipe, initial_state
from onestep.training.engine.inputs import recipe_of
from onestep.training.engine.student import STUDENT, add_student, generate
from onestep.training.methods.alternating import add_critic
from onestep.training.methods.distribution_matching import CRITIC
from onestep.training.presets import preset
from onestep.training.settings import Settings


def drawn(host: SmallHost, rank: int, seed: int = 1) -> State:
    """Factors of ``rank`` on every target."""
    host.denoiser.roles.add("made", rank, seed)
    state = {name: (a.clone(), b.clone()) for name, (a, b) in host.denoiser.roles.state("made").items()}
    host.denoiser.roles.drop("made")
    draw = torch.Generator().manual_seed(seed)
    return {name: (a, 0.2 * torch.randn(b.shape, generator=draw)) for name, (a, b) in state.items()}


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].flatten(1) @ pair[0].flatten(1)


def donor(folder: Path, host: SmallHost, recipe: Recipe | None, rank: int = 2, name: str = "donor") -> str:
    save_lora(folder / f"{name}.safetensors", drawn(host, rank), host.family, recipe and recipe.to_json())
    return str(folder / f"{name}.safetensors")


def test_a_cut_is_numpys_svd() -> None:
    state = drawn(SmallHost(), 4)
    found, kept = cut(state, 2)
    whole = left = 0.0
    for name, pair in state.items():
        u, s, v = np.linalg.svd(product(pair).double().numpy(), full_matrices=False)
        np.testing.assert_allclose(product(found[name]).numpy(), (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
        assert found[name][0].shape[1:] == pair[0].shape[1:] and found[name][1].shape[2:] == pair[1].shape[2:]
        whole, left = whole + (s**2).sum(), left + (s[2:] ** 2).sum()
    assert kept == pytest.approx(1 - left / whole, rel=1e-5) and 0.2 < kept < 0.999
    same, all_of_it = cut(state, 4)
    assert all_of_it == pytest.approx(1)
    for name, pair in state.items():
        torch.testing.assert_close(product(same[name]), product(pair), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 5])
def test_at_another_rank_it_is_the_same_lora(rank: int, tmp_path: Path) -> None:
    """Filled up it is the donor; at the strength that its recipe asks for."""
    host = SmallHost()
    recipe = replace(PRESETS["hyper-sd-2-lora"], lora_scale=0.5)
    path = donor(tmp_path, host, recipe)
    state, note = initial_state(host, small(rank=rank, initial_lora=path))
    assert state is not None and "cut" not in note and "draws in 2 steps" in note
    for name, pair in load_lora(path).state.items():
        assert len(state[name][0]) == rank
        torch.testing.assert_close(product(state[name]), 0.5 * product(pair))


def recipe_for(host: SmallHost, path: str, **changes: object) -> Recipe:
    return recipe_of(host, small(initial_lora=path, **changes))


def test_the_student_keeps_the_donors_recipe(tmp_path: Path) -> None:
    """From its header, from its file's name, by name; or the run's own, where that is asked for or nothing is known."""
    host = SmallHost()
    told = replace(PRESETS["hyper-sd-2-lora"], sizes=((64, 64),), source="")
    header, silent = donor(tmp_path, host, told), donor(tmp_path, host, None, name="silent")
    named = donor(tmp_path, host, None, name="sdxl_lightning_4step_lora")
    assert recipe_for(host, header) == replace(told, sizes=((32, 32),))
    assert recipe_for(host, named).timesteps == PRESETS["sdxl-lightning-4"].timesteps
    assert recipe_for(host, header, initial_recipe="dmd2-4") == replace(PRESETS["dmd2-4"], sizes=((32, 32),), source="")
    for path, own in ((silent, "auto"), (header, "own"), (named, "own")):
        assert recipe_for(host, path, initial_recipe=own, student_steps=4).steps == 4


def test_a_run_says_what_it_takes_a_donor_for(tmp_path: Path) -> None:
    """By what, and how it is overruled; nothing of a donor that says itself, or that is named by hand."""
    host = SmallHost()
    named = donor(tmp_path, host, None, name="sdxl_lightning_4step_lora")
    note = initial_state(host, small(initial_lora=named))[1]
    assert note.startswith(
        "the initial LoRA is taken for sdxl-lightning-4, by its name (initial_recipe says otherwise)"
    )
    own, header = small(initial_lora=named, initial_recipe="own"), donor(tmp_path, host, PRESETS["dmd2-4"], name="fast")
    assert "taken for" not in initial_state(host, own)[1] + initial_state(host, small(initial_lora=header))[1]
    for name, why in (
        ("sdxl_hyper_lightning_4step", "may be one of sdxl-lightning-4, hyper-sd-4-lora"),
        ("Hyper-SDXL-8steps-CFG-lora", "with guidance 5, two forwards a step"),
    ):
        path = donor(tmp_path, host, None, name=name)
        with pytest.raises(OneStepError, match=why + ".*initial_recipe=own"):
            run(tmp_path / "run", small(initial_lora=path), host=host)
        assert recipe_for(host, path, initial_recipe="own", student_steps=2).steps == 2


@pytest.mark.parametrize(
    ("prediction", "recipe", "why"),
    [
        ("v_prediction", "lcm-4", "was made for models that predict noise"),
        ("flow", "dmd2-4", "was made for models that predict noise"),
        ("epsilon", "sd3.5-turbo-4", "a LoRA for the transformer of SD3"),
        ("epsilon", "nitrosd-realism-1", "makes its network expect 0.25 of each time"),
        ("epsilon", "dmd2-5", "did you mean 'dmd2-"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(prediction: str, recipe: str, why: str, tmp_path: Path) -> None:
    host = SmallHost(prediction=prediction)
    path = donor(tmp_path, host, None)
    with pytest.raises(OneStepError, match=why):
        run(tmp_path / "run", small(initial_lora=path, initial_recipe=recipe), host=host)
    assert not (tmp_path / "run").exists()


def test_a_donor_with_guidance_is_refused(tmp_path: Path) -> None:
    host = SmallHost()
    path = donor(tmp_path, host, Recipe((999.0,), guidance=2.0))
    with pytest.raises(OneStepError, match="with guidance 2, two forwards a step"):
        run(tmp_path / "run", small(initial_lora=path), host=host)


@pytest.mark.parametrize("name", ["dmd2-4", "sdxl-lightning-4", "tcd-4"])
@torch.no_grad()
def test_a_step_of_the_student_is_a_step_of_its_sampler(name: str, tmp_path: Path) -> None:
    """Fresh noise, DDIM, TCD: the pictures that it learns from are those that its recipe draws."""
    host = SmallHost()
    settings = small(initial_lora=donor(tmp_path, host, PRESETS[name]), rank=2)
    setup = setup_of(host, settings, tmp_path)
    add_student(host, settings, initial_state(host, settings)[0])
    seen = set()
    with host.denoiser.roles.installed():
        for key in range(12):
            batch = setup.prompts.batch(key, range(3))
            step = batch.choice(setup.recipe.steps, "student step")
            cutoff = replace(setup.recipe, timesteps=setup.recipe.timesteps[: step + 1])
            with host.denoiser.roles.use(STUDENT):
                noises = {at: batch.normal(f"renoise {at}") for at in range(4)}
                wanted = sample(host.denoiser, cutoff, batch.cond, batch.normal("latent"), noises.__getitem__)
            torch.testing.assert_close(generate(host.denoiser, setup.recipe, batch, train=False), wanted)
            seen.add(step)
    assert len(seen) > 2


@pytest.mark.parametrize("start", ["base", "donor"])
def test_where_the_critic_begins(start: str, tmp_path: Path) -> None:
    host = SmallHost()
    settings = small(initial_lora=donor(tmp_path, host, PRESETS["dmd2-4"]), critic_start=start)
    setup = setup_of(host, settings, tmp_path)
    add_student(host, settings, initial_state(host, settings)[0])
    add_critic(setup)
    student, critic = (host.denoiser.roles.state(role) for role in (STUDENT, CRITIC))
    for name, (a, b) in critic.items():
        assert torch.equal(a, student[name][0])
        assert torch.equal(b, student[name][1] if start == "donor" else torch.zeros_like(b))
        assert b.data_ptr() != student[name][1].data_ptr()


def adapt(path: str, **changes: object) -> Settings:
    few = {"steps": 3, "critic_warm_up": 1, "critic_updates": 1, "batch": 2, "rank": 2, "sizes": "32x32"}
    more = {"watch_samples": 4, "preview_every": 0, "teacher_steps": 2, "warm_up": 1, "guidance": 2.0}
    return preset("Adapt", **few, **more, initial_lora=path, **changes)


def test_a_run_adapts_a_donor(tmp_path: Path) -> None:
    host = SmallHost()
    path = donor(tmp_path, host, None, rank=3, name="dmd2_sdxl_4step_lora")
    result = run(tmp_path / "run", adapt(path), host=host)
    assert result.recipe.timesteps == PRESETS["dmd2-4"].timesteps and result.recipe.renoise
    notes = " ".join(result.notes)
    assert "cut to 2" in notes and "draws in 4 steps" in notes
    again = run(tmp_path / "run", adapt(path), host=SmallHost(), existing="continue")
    assert again.path.read_bytes() == result.path.read_bytes()


def test_adapt_without_a_donor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="there is none: set initial_lora"):
        run(tmp_path / "run", adapt(""), host=SmallHost())
    path = donor(tmp_path, SmallHost(), PRESETS["dmd2-4"])
    with pytest.raises(OneStepError, match="set critic_rank to 0"):
        run(tmp_path / "run", adapt(path, critic_rank=4), host=SmallHost())


def rewritten(path: str, name: str, tensors: dict[str, Tensor] | None = None, **header: str) -> str:
    """A LoRA file with other tensors or words in its header, beside it."""
    there = Path(path).with_name(f"{name}.safetensors")
    metadata = read_header(path).metadata | header
    write_tensors(there, read_tensors(path) | (tensors or {}), metadata)
    return str(there)


@pytest.mark.parametrize(("made", "base"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_a_donor_of_another_prediction_is_refused(made: str, base: str, tmp_path: Path) -> None:
    """By the header of our own files and of kohya's, or by the marks of a v-predicting base among the tensors."""
    result = run(tmp_path / "made", small(steps=1, warm_start=0), host=SmallHost(prediction=made))
    host = SmallHost(prediction=base)
    with pytest.raises(OneStepError, match="is for models that predict (epsilon|v), and small predicts"):
        initial_state(host, small(initial_lora=str(result.path)))
    initial_state(SmallHost(prediction=made), small(initial_lora=str(result.path)))
    silent = donor(tmp_path, SmallHost(), None, name="silent")
    initial_state(host, small(initial_lora=silent))
    if base == "epsilon":
        marked = rewritten(silent, "marked", {"v_pred": torch.zeros(0)})
        with pytest.raises(OneStepError, match="predict v, and small predicts epsilon"):
            initial_state(host, small(initial_lora=marked))


def test_a_donor_that_answers_with_pictures_is_refused(tmp_path: Path) -> None:
    """SDXL-Lightning's one step: by its recipe, and by its file's name; a student of it would be drawn wrongly."""
    host = SmallHost()
    told = donor(tmp_path, host, replace(PRESETS["sdxl-lightning-1"], source=""))
    for path in (told, donor(tmp_path, host, None, name="sdxl_lightning_1step")):
        with pytest.raises(OneStepError, match="answer with the picture itself"):
            initial_state(host, small(initial_lora=path))
        initial_state(host, small(initial_lora=path, initial_recipe="own"))


def test_a_donor_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    host = SmallHost()
    weak = donor(tmp_path, host, replace(PRESETS["lcm-4"], lora_scale=0.0, source=""))
    made = donor(tmp_path, host, None, name="made")
    zero = {name: torch.zeros_like(value) for name, value in read_tensors(made).items() if name.endswith("alpha")}
    for path in (weak, rewritten(made, "zero", zero)):
        with pytest.raises(OneStepError, match="changes nothing"):
            initial_state(host, small(initial_lora=path))


def test_a_name_alone_is_of_its_own_family(tmp_path: Path) -> None:
    """Files of other families are called Lightning or LCM too: their names then say nothing."""
    host = SmallHost(prediction="flow")
    host.family = "sd3"
    path = str(tmp_path / "sd3_lightning_4step_lora.safetensors")
    save_lora(path, {"transformer_blocks.0.attn.to_q": (torch.ones(1, 4), torch.ones(4, 1))}, "sd3")
    assert donor_recipe(host, small(initial_lora=path)) is None
    with pytest.raises(OneStepError, match="a LoRA for the U-Net of SD1.5"):
        donor_recipe(host, small(initial_lora=path, initial_recipe="sdxl-lightning-4"))


def test_a_recipe_for_no_lora_is_refused(tmp_path: Path) -> None:
    for name, why in (("dmd2-4", "there is no initial LoRA"), ("dmd2-5", "did you mean 'dmd2-4'")):
        with pytest.raises(OneStepError, match=why):
            run(tmp_path / "run", small(initial_recipe=name))
    assert not (tmp_path / "run").exists()


def test_a_renamed_donor_is_no_other_recipe(tmp_path: Path) -> None:
    """Where its name alone says how it is drawn, a run does not go on in other steps than it began with."""
    path = donor(tmp_path, SmallHost(), None, name="sdxl_lightning_4step_lora")
    # without the title that our own writer puts into a header, by which a renamed file is known too
    write_tensors(Path(path), read_tensors(path), {})
    shutil.copy(path, tmp_path / "mine.safetensors")
    (tmp_path / "moved").mkdir()
    shutil.copy(path, tmp_path / "moved")
    few = {"warm_start": 0, "watch_every": 0, "preview_every": 0}
    run(tmp_path / "run", small(initial_lora=path, steps=1, **few))
    with pytest.raises(OneStepError, match="draws by another recipe: .* Give it the name that it had"):
        run(
            tmp_path / "run",
            small(initial_lora=str(tmp_path / "mine.safetensors"), steps=2, **few),
            existing="continue",
        )
    moved = str(tmp_path / "moved" / Path(path).name)
    assert run(tmp_path / "run", small(initial_lora=moved, steps=2, **few), existing="continue").recipe.steps == 4


def test_what_is_told_of_a_donor_is_so(tmp_path: Path) -> None:
    """Text encoders' keys are left out with a word; a method with steps of its own does not take over the donor's."""
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)}
    path = rewritten(donor(tmp_path, SmallHost(), PRESETS["lcm-4"]), "text", text)
    few = {"steps": 1, "watch_every": 0, "preview_every": 0}
    told = run(tmp_path / "dmd", small(initial_lora=path, warm_start=0, **few)).notes
    assert "draws in 4 steps" in " ".join(told) and "1 keys of text encoders are left out" in " ".join(told)
    guided = run(tmp_path / "guided", small(method="guidance-lora", initial_lora=path, **few))
    assert guided.recipe.steps == 3 and "and so does the student" not in " ".join(guided.notes)


def test_a_donor_of_more_layers_than_are_adapted_says_so(tmp_path: Path) -> None:
    path = donor(tmp_path, SmallHost(), None)
    host = SmallHost()
    del host.denoiser.roles.targets["conv_in"]
    with pytest.raises(OneStepError, match="Or set targets=all: this run adapts attention alone"):
        initial_state(host, small(initial_lora=path, targets="attention"))


def test_the_result_names_what_it_was_made_of(tmp_path: Path) -> None:
    """With the licences that a file tells, that a person tells, or nobody; told anew, a run goes on."""
    host = SmallHost()
    host.made_of = [("base", "small", None)]
    save_lora(tmp_path / "donor.safetensors", drawn(host, 2), host.family, None, {"license": "mit"})
    settings = small(initial_lora=str(tmp_path / "donor.safetensors"), steps=1)
    result = run(tmp_path / "run", settings, host=host)
    usual = FAMILIES[host.family].license
    assert sources_in(read_header(result.path).metadata) == [
        Source("base", "small", usual=usual),
        Source("initial_lora", "donor.safetensors", "mit", "file"),
    ]
    line = f"base small (licence unknown; usual: {usual}), initial LoRA donor.safetensors (licence mit)"
    assert any(line in note for note in result.notes)
    again = run(tmp_path / "run", settings.with_(steps=2, licenses="base = x"), host=host, existing="continue")
    assert read_header(again.path).metadata["modelspec.license"] == "x + mit"
    with pytest.raises(OneStepError, match="licenses has 'bass=x'"):
        settings.with_(licenses="bass=x")
