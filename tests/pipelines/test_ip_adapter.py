"""IP-Adapters on OneStepPipeline: loaded, scaled and taken off, and drawing what the families' own pipelines draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import random_lora
from PIL import Image
from tiny_ip_adapters import give, image_embeds, image_encoder, image_processor, saved, unet_state
from tiny_pipelines import make
from torch import Tensor

from onestep.core.errors import OneStepError
from onestep.core.recipe import Recipe
from onestep.pipelines.adapt import adapt
from onestep.pipelines.one_step import OneStepPipeline

CALL: dict[str, Any] = {"width": 16, "height": 16, "output_type": "latent"}
FAMILY = {"sd": "unet", "sdxl": "unet", "sd3": "sd3", "flux": "flux"}


def recipe(kind: str, guidance: float = 1.0, **more: Any) -> Recipe:
    return Recipe((999.0 if FAMILY[kind] == "unet" else 1000.0,), guidance=guidance, family=FAMILY[kind], **more)


def picture(seed: int = 0) -> Image.Image:
    colours = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(colours.numpy())


def drawn(ours: OneStepPipeline, prompt: Any = "a cat", **call: Any) -> Tensor:
    return ours(prompt, seed=3, **{**CALL, **call}).images  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "guidance"), [*((kind, 3.0) for kind in ("sd", "sdxl", "sd3")), *((kind, 1.0) for kind in FAMILY)]
)
def test_the_familys_own_pipeline_draws_the_same(kind: str, guidance: float) -> None:
    """1e-5 of the latents' standard deviation, from embeddings, with the scheduler that we print."""
    pipe = make(kind)
    ours = OneStepPipeline.from_pipe(pipe)
    without = drawn(ours, recipe=recipe(kind, guidance), num_images_per_prompt=2)
    give(pipe, kind)
    rows = image_embeds(kind, 2 if guidance != 1 else 1)
    found = drawn(ours, recipe=recipe(kind, guidance), num_images_per_prompt=2, ip_adapter_image_embeds=rows)
    arguments = ours.diffusers_settings(recipe(kind, guidance)).apply(pipe)
    torch.manual_seed(3)
    call = {**CALL, **arguments, "num_images_per_prompt": 2}
    if kind == "flux":  # or it encodes a black picture for a negative that it does not draw by
        call["negative_ip_adapter_image_embeds"] = rows
    plain = pipe("a cat", ip_adapter_image_embeds=rows, **call).images
    plain = pipe._unpack_latents(plain, 16, 16, pipe.vae_scale_factor) if kind == "flux" else plain
    assert float((found - plain).abs().max()) <= 1e-5 * float(plain.std())
    assert float((found - without).abs().max()) >= 1e-2 * float(plain.std())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_encoded_as_its_embeddings_are(guidance: float) -> None:
    parts = {"image_encoder": image_encoder(), "feature_extractor": image_processor()}
    ours = OneStepPipeline.from_pipe(make("sd"), **parts)
    give(ours, "sd")
    pixels = image_processor()(picture(), return_tensors="pt").pixel_values
    embeds = parts["image_encoder"](pixels).image_embeds[None].detach()
    rows = torch.cat([torch.zeros_like(embeds), embeds]) if guidance != 1 else embeds
    chosen = recipe("sd", guidance)
    found = drawn(ours, recipe=chosen, ip_adapter_image=picture())
    torch.testing.assert_close(found, drawn(ours, recipe=chosen, ip_adapter_image_embeds=[rows]))
    assert not torch.allclose(found, drawn(ours, recipe=chosen, ip_adapter_image=picture(1)))


def test_one_picture_for_each_prompt() -> None:
    """Two prompts with a row each are the two drawn alone, each with its own row."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    give(ours, "sd")
    rows, noise = image_embeds("sd", 2)[0], torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call: dict[str, Any] = {"recipe": recipe("sd"), "num_images_per_prompt": 2}
    both = drawn(ours, ["a cat", "red dog"], latents=noise, ip_adapter_image_embeds=[rows], **call)
    for number, prompt in enumerate(["a cat", "red dog"]):
        half = slice(2 * number, 2 * number + 2)
        alone = drawn(ours, prompt, latents=noise[half], ip_adapter_image_embeds=[rows[number : number + 1]], **call)
        assert float((both[half] - alone).abs().max()) <= 1e-5 * float(alone.std())


def test_masks_reach_the_attention() -> None:
    """An adapter behind a mask of zeros adds nothing, behind one of ones all."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    plain = drawn(ours, recipe=recipe("sd"))
    give(ours, "sd")
    rows = image_embeds("sd")
    found = drawn(ours, recipe=recipe("sd"), ip_adapter_image_embeds=rows)
    for value, expected in ((0.0, plain), (1.0, found)):
        masked = drawn(
            ours,
            recipe=recipe("sd"),
            ip_adapter_image_embeds=rows,
            cross_attention_kwargs={"ip_adapter_masks": [torch.full((1, 1, 16, 16), value)]},
        )
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, found, atol=1e-2)


def test_loaded_scaled_and_taken_off_again(tmp_path: Path) -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    plain, name = drawn(ours, recipe=recipe("sd")), saved(tmp_path, ours)
    ours.load_ip_adapter(str(tmp_path), subfolder="models", weight_name=name, local_files_only=True)
    assert ours.image_encoder is not None and ours.feature_extractor is not None
    found = drawn(ours, recipe=recipe("sd"), ip_adapter_image=picture())
    ours.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(drawn(ours, recipe=recipe("sd"), ip_adapter_image=picture()), plain, rtol=0, atol=1e-5)
    ours.set_ip_adapter_scale(1.0)
    torch.testing.assert_close(drawn(ours, recipe=recipe("sd"), ip_adapter_image=picture()), found)
    ours.unload_ip_adapter()
    assert ours.image_encoder is None
    torch.testing.assert_close(drawn(ours, recipe=recipe("sd")), plain)


def test_beside_a_one_step_lora_in_either_order(tmp_path: Path) -> None:
    file, pictures = random_lora(make("sd"), tmp_path / "x.safetensors", recipe("sd", lora_scale=0.5)), []
    for first in ("lora", "adapter"):
        ours = OneStepPipeline.from_pipe(make("sd"))
        without = drawn(ours, recipe=recipe("sd"))
        if first == "lora":
            ours.load_one_step_lora(file)
        give(ours, "sd")
        if first == "adapter":
            ours.load_one_step_lora(file)
        assert not torch.allclose(without, drawn(ours, ip_adapter_image_embeds=image_embeds("sd")), atol=1e-2)
        pictures.append(drawn(ours, ip_adapter_image_embeds=image_embeds("sd")))
    torch.testing.assert_close(*pictures)


def test_beside_a_steered_negative() -> None:
    """At a neutral scale steering changes nothing of what the adapter draws; at another one it does."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    give(ours, "sd")
    call: dict[str, Any] = {"recipe": recipe("sd"), "ip_adapter_image_embeds": image_embeds("sd")}
    found = drawn(ours, **call)
    negative = {"negative_prompt": "red", "steering": "nag"}
    torch.testing.assert_close(drawn(ours, scale=1.0, **negative, **call), found, rtol=0, atol=1e-5)
    assert not torch.allclose(drawn(ours, scale=4.0, **negative, **call), found, atol=1e-3)


def test_active_loras_stay_active(tmp_path: Path) -> None:
    """A FaceID adapter brings a LoRA of its own, which diffusers makes the only active one."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    ours.load_one_step_lora(random_lora(make("sd"), tmp_path / "x.safetensors", recipe("sd", lora_scale=0.5)))
    state, attention = (
        unet_state(ours.unet),
        ours.unet.get_submodule(next(iter(ours.unet.attn_processors))[: -len(".processor")]),
    )
    for part, layer in zip("kqv", (attention.to_k, attention.to_q, attention.to_v), strict=True):
        state["ip_adapter"][f"0.to_{part}_lora.down.weight"] = torch.ones(2, layer.in_features)
        state["ip_adapter"][f"0.to_{part}_lora.up.weight"] = torch.ones(layer.out_features, 2)
    state["ip_adapter"]["0.to_out_lora.down.weight"] = torch.ones(2, attention.to_out[0].in_features)
    state["ip_adapter"]["0.to_out_lora.up.weight"] = torch.ones(attention.to_out[0].out_features, 2)
    ours.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None, low_cpu_mem_usage=False)
    active = [set(module.active_adapters) for module in ours.unet.modules() if hasattr(module, "lora_A")]
    assert all("onestep" in names for names in active)
    assert set(attention.to_q.active_adapters) == {"onestep", "faceid_0"}
    scales = {module.scaling["onestep"] for module in ours.unet.modules() if "onestep" in getattr(module, "lora_A", {})}
    assert scales == {0.5}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({}, "no picture for it: give ip_adapter_image"),
    "both": ({"ip_adapter_image": picture(), "ip_adapter_image_embeds": image_embeds("sd")}, "both given"),
    "no encoder": ({"ip_adapter_image": picture()}, "needs an image encoder"),
    "guidance's halves without guidance": ({"ip_adapter_image_embeds": image_embeds("sd", 2)}, "2 rows for 1 prompts"),
    "one row under guidance": ({"ip_adapter_image_embeds": image_embeds("sd"), "guidance_scale": 3}, "has 1 rows"),
    "flat": ({"ip_adapter_image_embeds": [torch.zeros(12)]}, r"holds \[12\]"),
    "not finite": ({"ip_adapter_image_embeds": [torch.full((1, 1, 12), torch.nan)]}, "finite"),
    "no tensor": ({"ip_adapter_image_embeds": ["a"]}, "holds str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    give(ours, "sd")
    call, why = REFUSED[case]
    with pytest.raises(OneStepError, match=why):
        drawn(ours, recipe=recipe("sd"), **call)


@pytest.mark.parametrize("kind", FAMILY)
def test_training_is_refused_with_one(kind: str) -> None:
    pipe = make(kind)
    give(pipe, kind)
    with pytest.raises(OneStepError, match="has an IP-Adapter.*unload_ip_adapter"):
        adapt(pipe)


def test_without_an_adapter_it_is_said() -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    with pytest.raises(OneStepError, match="none is loaded: call load_ip_adapter"):
        drawn(ours, recipe=recipe("sd"), ip_adapter_image_embeds=image_embeds("sd"))
    for call in (lambda: ours.set_ip_adapter_scale(1.0), ours.unload_ip_adapter):
        with pytest.raises(OneStepError, match="no IP-Adapter is loaded"):
            call()


@pytest.mark.parametrize("name", ["ip-adapter_sd15.bin", ["a.safetensors", "b.pt"]])
def test_pickles_are_refused(name: Any) -> None:
    ours = OneStepPipeline.from_pipe(make("sd"))
    with pytest.raises(OneStepError, match="is a pickle"):
        ours.load_ip_adapter("folder", subfolder="models", weight_name=name)
    with pytest.raises(OneStepError, match="is a pickle"):
        ours.load_ip_adapter("folder", "models", name)
