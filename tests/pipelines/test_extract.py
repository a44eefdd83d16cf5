"""A few-step checkpoint as a LoRA of its base: through files, in diffusers' own loader, and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import narrowed
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, make

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.recipe import Recipe
from onestep.core.tensor_file import read_header
from onestep.pipelines.adapt import adapt, network_of
from onestep.pipelines.extract import Drawn, FewStep, extract_lora, groups

PROMPTS, SIZE = ("a cat", "red dog"), (16, 16)
RECIPES = {"sd": Recipe((999.0, 499.0), renoise=True), "sd3": Recipe((1000.0,), family="sd3")}


def few_step(name: str, folder: Path, size: float = 0.05, layers: str = "") -> Path:
    """A checkpoint whose every layer with ``layers`` in its name differs from the base's by noise."""
    pipe = make(name)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, weight in network_of(pipe).named_parameters():
            if weight.ndim > 1 and layers in path:
                weight.add_(size * torch.randn(weight.shape, generator=draw))
    pipe.save_pretrained(folder)
    return folder


def extracted(name: str, few: Path, path: Path, rank: int, **more: Any) -> Any:
    host = adapt(make(name))
    try:
        return extract_lora(host, few, path, rank, **more)
    finally:
        host.release()


@pytest.mark.parametrize("name", narrowed(MAKERS, "sd", "sd3"))
def test_at_full_rank_the_file_holds_the_difference(name: str, tmp_path: Path) -> None:
    few = few_step(name, tmp_path / "few")
    found = extracted(name, few, tmp_path / "x.safetensors", 4096)
    assert found.whole.weights == pytest.approx(1, abs=1e-9) and "loads all" in found.check and found.apart is None
    before, part = (
        network_of(make(name)).state_dict(),
        "unet" if name.startswith("sd") and name != "sd3" else "transformer",
    )
    after = load_file(few / part / "diffusion_pytorch_model.safetensors")
    read = load_lora(tmp_path / "x.safetensors").state
    assert read.keys() == found.state.keys()
    for layer, (a, b) in read.items():
        wanted = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        torch.testing.assert_close((b.flatten(1) @ a.flatten(1)).reshape(wanted.shape), wanted, rtol=0, atol=1e-5)


@pytest.mark.broad
@pytest.mark.parametrize("name", narrowed(RECIPES, "sd"))
def test_pictures_come_nearer_with_rank_and_whitening_helps_the_outputs(name: str, tmp_path: Path) -> None:
    few, recipe = few_step(name, tmp_path / "few"), RECIPES[name]
    told = {"recipe": recipe, "prompts": PROMPTS, "size": SIZE}
    low, high, full = (extracted(name, few, tmp_path / f"{rank}.safetensors", rank, **told) for rank in (2, 8, 4096))
    plain = extracted(name, few, tmp_path / "plain.safetensors", 2, recipe=recipe)
    assert low.whole.weights < plain.whole.weights < high.whole.weights < full.whole.weights
    assert low.whole.outputs < high.whole.outputs < full.whole.outputs and full.whole.outputs > 1 - 1e-6
    assert full.apart < 0.02 < high.apart
    assert Recipe.from_json(load_lora(tmp_path / "2.safetensors").recipe) == recipe


def test_the_moments_are_of_what_enters_the_layers(tmp_path: Path) -> None:
    """Of one layer, by a hook of its own while the recipe draws."""
    from onestep.pipelines.extract import Drawn

    host = adapt(make("sd"))
    drawn = Drawn(host, RECIPES["sd"], PROMPTS, SIZE)
    targets = {target.name: target for target in host.denoiser.roles.targets.values()}
    names = [next(name for name in targets if part in name) for part in ("conv", "attn2.to_k", "time_emb")]
    chosen = [targets[name] for name in names]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for target in chosen:
        target.module.register_forward_pre_hook(
            lambda module, args, name=target.name: seen[name].append(args[0].clone())
        )
    found = drawn.moments(chosen)
    for target in chosen:
        rows = [x.movedim(1, -1).flatten(0, -2) if target.is_conv else x.flatten(0, -2) for x in seen[target.name]]
        x = torch.cat(rows).double()
        assert len(seen[target.name]) == 4  # two prompts, two steps
        torch.testing.assert_close(found[target.name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    host.release()


def test_second_moments_take_no_more_than_two_of_the_largest_layer() -> None:
    host = adapt(make("sd"))
    targets = list(host.denoiser.roles.targets.values())
    largest = max(target.module.weight.numel() for target in targets)
    found = groups(targets)
    assert [target for group in found for target in group] == targets and len(found) > 1
    assert all(sum(t.in_features**2 for t in group) <= 2 * largest or len(group) == 1 for group in found)
    host.release()


def test_layers_that_do_not_differ_are_left_out(tmp_path: Path) -> None:
    few = few_step("sd", tmp_path / "few", layers="attn2")
    found = extracted("sd", few, tmp_path / "x.safetensors", 4)
    assert found.layers and all("attn2" in name for name in found.layers)
    told = read_header(tmp_path / "x.safetensors").metadata["onestep.extracted"]
    assert told.startswith("few less") and "of its weights" in told


def test_other_bases_and_equal_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="nothing to extract"):
        extracted("sd", few_step("sd", tmp_path / "same", size=0.0), tmp_path / "x.safetensors", 4)
    with pytest.raises(OneStepError, match="two (whole )?checkpoints of one base"):
        extracted("sd", few_step("sdxl", tmp_path / "xl"), tmp_path / "x.safetensors", 4)
    with pytest.raises(OneStepError, match="name the few-step model's"):
        extracted("sd", tmp_path / "same", tmp_path / "x.safetensors", 4, prompts=PROMPTS)
    with pytest.raises(OneStepError, match="recipe is for 'sd3'"):
        extracted("sd", tmp_path / "same", tmp_path / "x.safetensors", 4, recipe=RECIPES["sd3"])
    assert not (tmp_path / "x.safetensors").exists()


def test_shards_are_read_where_each_layer_lies(tmp_path: Path) -> None:
    pipe = make("sd")
    pipe.unet.save_pretrained(tmp_path / "few" / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "few" / "unet").glob("*.safetensors"))) > 1
    few = FewStep(tmp_path / "few", pipe)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(few.tensor(name), value)
    with pytest.raises(OneStepError, match="has no made.up"):
        few.tensor("made.up")


def test_the_index_of_a_saved_folder_is_not_needed(tmp_path: Path) -> None:
    few = few_step("sd", tmp_path / "few")
    (few / "model_index.json").unlink()
    assert json.loads((few / "unet" / "config.json").read_text())
    assert extracted("sd", few, tmp_path / "x.safetensors", 1).layers


def changed(few: Path, **changes: Any) -> Path:
    """The few-step folder's U-Net with tensors that are others, or None for gone."""
    file = few / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)
    return few


def test_what_one_has_and_the_other_has_not_is_refused(tmp_path: Path) -> None:
    """A guidance embedding, as LCM's whole U-Nets have it; a norm that is lost."""
    more = changed(few_step("sd", tmp_path / "more"), time_embedding__cond_proj__weight=torch.zeros(4, 4))
    with pytest.raises(OneStepError, match="1 weights that .* has not, the first time_embedding.cond_proj.weight"):
        extracted("sd", more, tmp_path / "x.safetensors", 4)
    less = changed(few_step("sd", tmp_path / "less"), conv_norm_out__bias=None)
    with pytest.raises(OneStepError, match="has no conv_norm_out.bias: give two whole checkpoints"):
        extracted("sd", less, tmp_path / "x.safetensors", 4, recipe=RECIPES["sd"], prompts=PROMPTS, size=SIZE)
    assert not (tmp_path / "x.safetensors").exists()


def test_another_prediction_is_refused_unless_the_recipe_says_so(tmp_path: Path) -> None:
    few = few_step("sd", tmp_path / "few")
    config = few / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(OneStepError, match="answers v_prediction, and .* epsilon"):
        extracted("sd", few, tmp_path / "x.safetensors", 4, recipe=RECIPES["sd"])
    said = Recipe((999.0,), prediction="v_prediction")
    assert extracted("sd", few, tmp_path / "x.safetensors", 4, recipe=said).layers


def test_norms_and_biases_that_differ_are_counted(tmp_path: Path) -> None:
    name, few = "conv_norm_out.bias", few_step("sd", tmp_path / "few")
    assert extracted("sd", few, tmp_path / "x.safetensors", 4).beside == 0
    value = load_file(few / "unet" / "diffusion_pytorch_model.safetensors")[name]
    assert (
        extracted("sd", changed(few, **{name.replace(".", "__"): value + 1}), tmp_path / "y.safetensors", 4).beside == 1
    )


def test_the_base_is_drawn_as_it_answers() -> None:
    """Where the few-step model answers with pictures, as SDXL-Lightning's one step does, the base still does not."""
    seen = []
    host = adapt(make("sd"))
    drawn = Drawn(host, Recipe((999.0,), prediction="sample"), PROMPTS[:1], SIZE)
    name, target = next((name, one) for name, one in host.denoiser.roles.targets.items() if "attn2.to_q" in name)
    plain = Drawn(host, Recipe((999.0,)), PROMPTS[:1], SIZE)
    torch.testing.assert_close(drawn.moments([target])[name], plain.moments([target])[name])
    for denoise in (host.denoiser, drawn.few):
        seen.append(drawn.latents(denoise))
    assert not torch.allclose(*seen)
    host.release()
