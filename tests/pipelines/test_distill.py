"""onestep.distill: a pipeline and prompts in, a file out that both draw with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from tiny_pipelines import make

import onestep
from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_header
from onestep.pipelines.one_step import OneStepPipeline

PLAIN: dict[str, Any] = {
    "steps": 2, "rank": 2, "batch": 2, "teacher_steps": 2, "pairs": 4, "watch_every": 0, "preview_every": 0,
    "warm_up": 0, "guidance": 1.0,
}  # fmt: skip
SHORT = {**PLAIN, "warm_start": 2, "critic_warm_up": 1, "critic_updates": 1, "matching_guidance": 1.0}


DISTILLED = [("sd", "dmd"), ("sdxl", "vsd"), ("sd3", "dmd"), ("flux", "regression")]


@pytest.mark.parametrize(("name", "method"), narrowed(DISTILLED, DISTILLED[0], DISTILLED[3]))
def test_a_pipeline_is_distilled(name: str, method: str, tmp_path: Path) -> None:
    pipe = make(name)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    more = {**PLAIN, "sizes": "16x16"} if name == "flux" else SHORT  # the others say their size
    before = {key: value.clone() for key, value in network.state_dict().items()}
    result = onestep.distill(pipe, ["a cat", "red dog"], method, out=tmp_path / "run", **more)
    assert result.path == tmp_path / "run" / "result.safetensors" and result.path.is_file()
    assert "diffusers" in result.check and result.recipe.steps == 1 and result.recipe.sizes == ((16, 16),)
    hint = read_header(result.path).metadata["modelspec.usage_hint"]
    by_core = (
        "KSampler (Advanced) with steps 8, cfg 1, " if name in ("sd", "sdxl") else "KSampler with steps 1, cfg 1, "
    )
    assert hint in result.notes and by_core in hint and "LoraLoaderModelOnly" in hint and "\n" not in hint
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert not any(module._forward_hooks for module in network.modules())
    ours = OneStepPipeline.from_pipe(pipe)
    teacher = ours("a cat", recipe=result.recipe, seed=0, output_type="latent").images
    assert ours.load_one_step_lora(result.path) == result.recipe
    student = ours("a cat", seed=0, output_type="latent").images
    assert student.isfinite().all() and (student - teacher).abs().max() > 1e-4
    assert Recipe.from_json(result.recipe.to_json()) == result.recipe


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"stepps": 3}, "did you mean 'steps'"),
        ({"rank": 0}, "rank is 0"),
        ({"sizes": "17x16"}, "17x16"),
        ({"method": "dmdd"}, "dmdd"),
        ({"preset": "Slow"}, "Fast, Balanced, Best"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=why):
        onestep.distill(make("sd"), ["a"], **{"out": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("prompts", "why"), [("a cat", "one text"), ([], "prompt"), (["a" * 10_001], "prompt")])
def test_bad_prompts_are_refused(prompts: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=why):
        onestep.distill(make("sd"), prompts, out=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()


@pytest.mark.broad
def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\nred dog\n", encoding="utf-8")
    few = {**SHORT, "steps": 1, "warm_start": 1}
    result = onestep.distill(make("sd"), tmp_path / "prompts.txt", out=tmp_path / "run", **few)
    goes_on = {**few, "initial_lora": result.path}
    assert isinstance(result.path, Path)
    assert onestep.distill(make("sd"), ["a"], out=tmp_path / "further", **goes_on).updates
    assert result.path.is_file()
    with pytest.raises(OneStepError, match="cannot be read"):
        onestep.distill(make("sd"), tmp_path / "absent.txt", out=tmp_path / "other", **few)
