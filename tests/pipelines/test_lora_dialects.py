"""Every dialect, alpha and dtype of a LoRA file through `load_one_step_lora`: each layer acts as the file says, or the
file is refused in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dialects import alpha_tensors, header, kohya, none, old_diffusers, peft
from lora_files import foreign, random_lora
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.families import bind_diffusers
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import network_of
from onestep.pipelines.one_step import OneStepPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
CALL: dict[str, Any] = {"seed": 5, "output_type": "latent", "width": 16, "height": 16}
RECIPES = {"sd": "sd-turbo-1", "sdxl": "sdxl-turbo-1", "sd3": "sd3.5-turbo-4", "flux": "flux-schnell-4"}
State = dict[str, tuple[Tensor, Tensor]]


def factors_of(name: str, ranks: tuple[int, ...] = (3,), attention: bool = False) -> State:
    targets = [t for t in bind_diffusers(network_of(make(name))) if not attention or ".attn" in t.name]
    draw = torch.Generator().manual_seed(2)
    chosen = [(target, ranks[at % len(ranks)]) for at, target in enumerate(targets)]
    return {
        t.name: tuple(0.1 * torch.randn(shape, generator=draw) for shape in (t.shape_a(r), t.shape_b(r)))  # type: ignore[misc]
        for t, r in chosen
    }


def deltas(network: Any, adapter: str = "onestep") -> dict[str, Tensor]:
    """scale B A of each layer that acts."""
    layers = {path: layer for path, layer in network.named_modules() if adapter in getattr(layer, "lora_A", {})}
    assert all(adapter in layer.active_adapters and not layer.disable_adapters for layer in layers.values())
    return {
        path: layer.scaling[adapter]
        * layer.lora_B[adapter].weight.flatten(1).double()
        @ layer.lora_A[adapter].weight.flatten(1).double()
        for path, layer in layers.items()
    }


def expected(factors: State, scales: dict[str, float], lora_scale: float = 1.0) -> dict[str, Tensor]:
    return {
        name: lora_scale * scales[name] * b.flatten(1).double() @ a.flatten(1).double()
        for name, (a, b) in factors.items()
    }


def assert_acts(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, rtol=0, atol=2e-6 * float(delta.abs().max()), msg=name)


UNET = {
    "kohya": (kohya("lora_unet_"), alpha_tensors(lambda at, rank: rank)),
    "kohya, alpha 1": (kohya("lora_unet_"), alpha_tensors(lambda at, rank: 1.0)),
    "kohya, alphas of each layer": (kohya("lora_unet_"), alpha_tensors(lambda at, rank: 0.5 + at % 5)),
    "kohya, alpha [1]": (kohya("lora_unet_"), alpha_tensors(lambda at, rank: 2.0, (1,))),
    "kohya, no alpha": (kohya("lora_unet_"), none),
    "LyCORIS": (kohya("lycoris_"), alpha_tensors(lambda at, rank: 2.0)),
    "peft, bare": (peft(""), none),
    "peft's own": (peft("base_model.model."), none),
    "peft's own, its adapter's name inside": (peft("base_model.model.", "style_0"), none),
    "diffusers": (peft("unet."), none),
    "diffusers, alpha in the header": (
        peft("unet."),
        header("unet", lambda f: {"r": 3, "lora_alpha": 6}, lambda at, rank: 6 / rank),
    ),
    "diffusers, rslora": (
        peft("unet."),
        header("unet", lambda f: {"lora_alpha": 6, "use_rslora": True}, lambda at, rank: 6 / rank**0.5),
    ),
    "diffusers, an alpha for each layer": (
        peft("unet."),
        header(
            "unet",
            lambda f: {"lora_alpha": 9, "alpha_pattern": {name: 1.0 + at for at, name in enumerate(f)}},
            lambda at, rank: (1.0 + at) / rank,
        ),
    ),
}
DIT = {
    "diffusers": (peft("transformer."), none),
    "diffusers, alpha in the header": (
        peft("transformer."),
        header("transformer", lambda f: {"lora_alpha": 1.5}, lambda at, rank: 1.5 / rank),
    ),
    "peft, bare": (peft(""), none),
    "peft's own": (peft("base_model.model."), none),
    "peft's own under diffusers' prefix": (peft("transformer.base_model.model."), none),
    "peft's own, its adapter's name inside": (peft("base_model.model.", "default_0"), none),
    "OneTrainer": (kohya("lora_transformer_"), alpha_tensors(lambda at, rank: 1.0 + at % 3)),
    "ai-toolkit's prefix": (peft("diffusion_model."), none),
    "dots with alpha": (kohya("transformer.", str), alpha_tensors(lambda at, rank: 2.0)),
}
CASES = [
    *(("sd", title, (3,)) for title in UNET),
    *(("sd", title, (1, 2, 4)) for title in ("kohya", "kohya, alphas of each layer", "peft, bare")),
    *(("sdxl", title, (2,)) for title in ("kohya, alphas of each layer", "peft's own")),
    *((name, title, (3,)) for name in ("sd3", "flux") for title in DIT),
    *((name, title, (1, 4)) for name in ("sd3", "flux") for title in ("OneTrainer", "diffusers")),
]


# Of each dialect one; of Flux those that the U-Net has not.
KEPT = [("sd", title, (3,)) for title in UNET if title not in ("kohya, alpha 1", "kohya, alphas of each layer")]
KEPT += [("sd", "kohya, alphas of each layer", (1, 2, 4)), ("flux", "OneTrainer", (1, 4)), ("flux", "diffusers", (3,))]
KEPT += [("flux", title, (3,)) for title in DIT if "prefix" in title or "dots" in title]


@pytest.mark.parametrize(("name", "title", "ranks"), narrowed(CASES, *KEPT), ids=str)
def test_every_layer_acts_at_its_own_alpha_and_rank(name: str, title: str, ranks: Any, tmp_path: Path) -> None:
    factors = factors_of(name, ranks)
    names, alphas = (UNET if name in ("sd", "sdxl") else DIT)[title]
    (tensors, metadata), scales = alphas(names(factors), factors)
    file = foreign(tmp_path / "x.safetensors", tensors, metadata or None)
    fast = OneStepPipeline.from_pipe(make(name))
    fast.load_one_step_lora(file, RECIPES[name])
    assert_acts(deltas(network_of(fast)), expected(factors, scales))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", narrowed(["sd", "flux"], "flux"))
def test_factors_of_any_dtype_act_as_they_are_rounded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    factors = {key: tuple(x.to(dtype) for x in pair) for key, pair in factors_of(name).items()}
    tensors = peft("base_model.model.")(factors)  # type: ignore[arg-type]
    fast = OneStepPipeline.from_pipe(make(name))
    fast.load_one_step_lora(foreign(tmp_path / "x.safetensors", tensors), RECIPES[name])
    rounded = {key: tuple(x.float() for x in pair) for key, pair in factors.items()}
    assert_acts(deltas(network_of(fast)), expected(rounded, dict.fromkeys(factors, 1.0)))  # type: ignore[arg-type]


def test_processors_names_of_old_diffusers_without_a_prefix_too(tmp_path: Path) -> None:
    factors = factors_of("sd", attention=True)
    tensors = old_diffusers(factors)
    for prefix in ("unet.", ""):
        file = foreign(tmp_path / "x.safetensors", {prefix + k.removeprefix("unet."): x for k, x in tensors.items()})
        fast = OneStepPipeline.from_pipe(make("sd"))
        fast.load_one_step_lora(file, "sd-turbo-1")
        assert_acts(deltas(fast.unet), expected(factors, dict.fromkeys(factors, 1.0)))


def test_a_network_in_half_precision_holds_the_same_layers(tmp_path: Path) -> None:
    factors, pipe = factors_of("sd"), make("sd")
    pipe.unet.to(torch.bfloat16)
    fast = OneStepPipeline.from_pipe(pipe)
    fast.load_one_step_lora(foreign(tmp_path / "x.safetensors", kohya("lora_unet_")(factors)), "sd-turbo-1")
    found = deltas(fast.unet)
    assert found.keys() == factors.keys()


def test_the_recipes_strength_is_on_top(tmp_path: Path) -> None:
    factors = factors_of("sd", (2, 4))
    (tensors, _), scales = alpha_tensors(lambda at, rank: 1.0 + at % 2)(kohya("lora_unet_")(factors), factors)
    fast = OneStepPipeline.from_pipe(make("sd"))
    fast.load_one_step_lora(foreign(tmp_path / "x.safetensors", tensors), Recipe((999.0,), lora_scale=0.25))
    assert_acts(deltas(fast.unet), expected(factors, scales, 0.25))


# -- beside others ----------------------------------------------------------------------------------------------------


ORDERS = [(name, first) for name in ("sd", "sd3", "flux") for first in ("style", "one step")]


@pytest.mark.parametrize(("name", "first"), narrowed(ORDERS, ("sd", "style"), ("sd", "one step"), ("flux", "style")))
def test_a_style_stays_on_in_either_order(name: str, first: str, tmp_path: Path, caplog: Any) -> None:
    """At the strength it was given."""
    few = random_lora(make(name), tmp_path / "few.safetensors", None, 0.2)
    style = random_lora(make(name), tmp_path / "style.safetensors", None, 0.2, seed=2)
    both = OneStepPipeline.from_pipe(make(name))

    def add_style(pipe: Any) -> None:
        pipe.plain().load_lora_weights(style, adapter_name="style")
        active = {path: list(layer.active_adapters) for path, layer in layers(pipe)}
        pipe.plain().set_adapters(["style"], [0.5])
        for path, layer in layers(pipe):
            layer.set_adapter(active[path])

    def layers(pipe: Any) -> list[tuple[str, Any]]:
        return [(path, x) for path, x in network_of(pipe).named_modules() if hasattr(x, "lora_A")]

    if first == "style":
        add_style(both)
    both.load_one_step_lora(few, RECIPES[name])
    if first == "one step":
        add_style(both)
    drawn = both("a cat", **CALL).images
    assert all(sorted(layer.active_adapters) == ["onestep", "style"] for _, layer in layers(both))
    assert all(layer.scaling["style"] == 0.5 for _, layer in layers(both))
    if first == "one step":
        assert "switched off" in caplog.text

    plain = make(name)
    plain.load_lora_weights(few, adapter_name="few")
    plain.load_lora_weights(style, adapter_name="style")
    plain.set_adapters(["few", "style"], [1.0, 0.5])
    wanted = OneStepPipeline.from_pipe(plain)("a cat", recipe=RECIPES[name], **CALL).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4 * float(wanted.std()))


def test_a_style_on_some_layers_leaves_the_others_free(tmp_path: Path) -> None:
    few = random_lora(make("sd"), tmp_path / "few.safetensors", None)
    style = peft("unet.")(factors_of("sd", attention=True))
    fast = OneStepPipeline.from_pipe(make("sd"))
    fast.plain().load_lora_weights(dict(style), adapter_name="style")
    fast.load_one_step_lora(few, "sd-turbo-1")
    assert len(deltas(fast.unet)) == len(factors_of("sd")) > len(deltas(fast.unet, "style")) > 0


@pytest.mark.parametrize("adapter", ["onestep", "another"])
def test_a_second_one_step_lora_replaces_the_first(adapter: str, tmp_path: Path) -> None:
    first = random_lora(make("sd"), tmp_path / "a.safetensors", None)
    factors = factors_of("sd", attention=True)
    fast = OneStepPipeline.from_pipe(make("sd"))
    fast.load_one_step_lora(first, "dmd2-1")
    fast.load_one_step_lora(foreign(tmp_path / "b.safetensors", peft("")(factors)), "sd-turbo-1", adapter)
    assert_acts(deltas(fast.unet, adapter), expected(factors, dict.fromkeys(factors, 1.0)))
    assert set(fast.unet.peft_config) == {adapter} and fast.recipe.timesteps == (999.0,)


def test_what_is_refused_leaves_the_first_on(tmp_path: Path) -> None:
    first = random_lora(make("sd"), tmp_path / "a.safetensors", None)
    fast = OneStepPipeline.from_pipe(make("sd"))
    fast.load_one_step_lora(first, "dmd2-1")
    before = deltas(fast.unet)
    broken = {key: x.flatten()[:1] for key, x in peft("")(factors_of("sd", attention=True)).items()}
    for tensors in (broken, peft("")(factors_of("sd3"))):
        with pytest.raises(OneStepError):
            fast.load_one_step_lora(foreign(tmp_path / "b.safetensors", tensors), "sd-turbo-1")
    assert_acts(deltas(fast.unet), before)
    assert fast.recipe.timesteps == (399.0,)


# -- text encoders and embeddings -------------------------------------------------------------------------------------


def test_what_is_for_text_encoders_is_left_out_and_said(tmp_path: Path, caplog: Any) -> None:
    factors = factors_of("sd", attention=True)
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    text = {f"{layer}.lora_down.weight": torch.randn(2, 8), f"{layer}.lora_up.weight": torch.randn(8, 2)}
    words = {"bundle_emb.mystyle.string_to_param.*": torch.randn(2, 8), "v_pred": torch.zeros(0)}
    pictures = []
    for more in ({}, text | words):
        fast = OneStepPipeline.from_pipe(make("sd"))
        file = foreign(tmp_path / "x.safetensors", {**kohya("lora_unet_")(factors), **more})
        fast.load_one_step_lora(file, "sd-turbo-1")
        pictures.append(fast("a cat", **CALL).images)
    assert torch.equal(*pictures)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "left out" in r.getMessage()]
    assert "2 keys of text encoders and 2 keys of embeddings and marks" in said
