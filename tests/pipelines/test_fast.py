"""Drawing at the card's limit: the pipeline's own pictures, with what runs once run once, and nothing left behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from lora_files import random_lora
from narrowed import narrowed
from rounding import between_hosts
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.core.schedule import add_noise
from onestep.core.step_numbers import step_numbers
from onestep.pipelines import fast as fast_module
from onestep.pipelines.adapt import network_of
from onestep.pipelines.fast import Fast
from onestep.pipelines.one_step import OneStepPipeline

SIZE: dict[str, Any] = {"width": 16, "height": 16}
RECIPES: dict[str, Recipe] = {
    "one step": PRESETS["sd-turbo-1"],
    "renoised": PRESETS["dmd2-4"],
    "deterministic": PRESETS["sdxl-lightning-4"],
    "stochastic": PRESETS["tcd-4"],
}
CASES = [
    *(("sd", recipe) for recipe in RECIPES.values()),
    ("sdxl", PRESETS["sdxl-lightning-1"]),
    ("sd3", PRESETS["sd3.5-turbo-4"]),
    ("flux", PRESETS["flux-schnell-4"]),
    ("flux", Recipe((1000.0, 500.0), renoise=True, family="flux")),
]


def loaded(name: str, recipe: Recipe, folder: Path) -> OneStepPipeline:
    pipe = OneStepPipeline.from_pipe(make(name))
    pipe.load_one_step_lora(random_lora(make(name), folder / "x.safetensors", recipe), recipe)
    return pipe


@pytest.mark.parametrize(("name", "recipe"), narrowed(CASES, *CASES[::3]))
def test_the_pictures_are_the_pipelines_own(name: str, recipe: Recipe, tmp_path: Path) -> None:
    pipe = loaded(name, recipe, tmp_path)
    wanted = pipe(["a cat", "red dog"], generator=torch.Generator().manual_seed(3), output_type="pt", **SIZE).images
    with pipe.fast() as draw:
        found = draw(["a cat", "red dog"], seed=3, **SIZE)
    atol = between_hosts(pipe.host(recipe).denoiser.schedule, recipe.timesteps[0])
    assert found.std() > 0.01
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_constants_are_the_samplers_equations(kind: str) -> None:
    """On numbers, against the equations by hand: eps, renoising, DDIM, and Algorithm 2 of TCD."""
    recipe, denoise = RECIPES[kind], OneStepPipeline.from_pipe(make("sd")).host(RECIPES[kind]).denoiser
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    steps = step_numbers(denoise, recipe)
    for index, step in enumerate(steps):
        assert step.time == recipe.timesteps[index]
        a = float(alphas[int(step.time)])
        assert step.skip == pytest.approx(a**-0.5, rel=1e-6)
        assert step.out == pytest.approx(-((1 - a) ** 0.5) / a**0.5, rel=1e-6)
        if index + 1 == len(steps):
            assert (step.keep, step.to, step.fresh) == (0, 1, 0)
            continue
        b = float(alphas[int(recipe.timesteps[index + 1])])
        if recipe.renoise:
            assert (step.keep, step.to, step.fresh) == pytest.approx((0, b**0.5, (1 - b) ** 0.5), rel=1e-6)
            continue
        lower = int((1 - recipe.eta) * recipe.timesteps[index + 1])
        s = float(alphas[lower]) if recipe.eta else b
        keep, grow = ((1 - s) / (1 - a)) ** 0.5, (b / s) ** 0.5
        told = (grow * keep, grow * (s**0.5 - keep * a**0.5), max(1 - b - b / s * (1 - s), 0.0) ** 0.5)
        assert (step.keep, step.to, step.fresh) == pytest.approx(told, rel=1e-6, abs=1e-9)


def test_a_text_is_encoded_once_and_a_shape_made_once(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    seen: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda module, given, answer: seen.append(1))
    with pipe.fast() as draw:
        first = draw("a cat", seed=1, **SIZE)
        assert torch.equal(draw("a cat", seed=1, **SIZE), first) and len(draw._calls) == 1
        draw(["a cat", "red dog"], seed=1, **SIZE)
        assert len(seen) == 2 and len(draw._calls) == 2
        assert not torch.equal(draw("red dog", seed=1, **SIZE), first) and len(seen) == 2 and len(draw._calls) == 2


def test_no_layer_of_a_lora_runs_and_every_weight_comes_back(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    network = network_of(pipe)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = pipe("a cat", seed=1, output_type="pt", **SIZE).images
    with pytest.raises(RuntimeError, match="on purpose"), pipe.fast() as draw:
        assert not any(hasattr(layer, "base_layer") for layer in network.modules())
        draw("a cat", seed=1, **SIZE)
        raise RuntimeError("on purpose")
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.as_tensor(pipe("a cat", seed=1, output_type="pt", **SIZE).images), torch.as_tensor(plain))


def test_a_tiny_decoder_in_the_vaes_place(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    latents = pipe("a cat", seed=1, output_type="latent", **SIZE).images
    with pipe.fast(decoder=tiny) as draw, torch.no_grad():
        found = draw("a cat", seed=1, **SIZE)
        wanted = (tiny.decode(latents / tiny.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert pipe.vae is not tiny


def test_frames_are_noised_to_the_share_and_drawn_in_one_step(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    frames = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    host = pipe.host(pipe.recipe)
    with pipe.fast() as draw, torch.no_grad():
        found = list(draw.frames(frames, "a cat", strength=0.5, seed=4))
        noise = torch.randn(1, 4, *host.latent_shape((16, 16))[1:], generator=torch.Generator().manual_seed(4))
        sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([round(0.5 * 999)]))
        for frame, picture in zip(frames, found, strict=True):
            x = add_noise(host.denoiser.schedule, host.latents_of(frame[None]), noise, sigma)
            wanted = host.decode(host.denoiser(x, sigma, host.encode(["a cat"], (16, 16))))
            torch.testing.assert_close(picture, wanted, rtol=0, atol=2e-3)
    assert len(found) == 2 and not torch.equal(*found)


@pytest.mark.broad
@pytest.mark.slow
def test_a_compiled_callable_draws_the_same(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    with pipe.fast() as draw:
        plain = draw("a cat", seed=1, **SIZE)
    with pipe.fast("compile") as draw:
        found = draw("a cat", seed=1, **SIZE)
        assert draw.mode == "compile"
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_what_cannot_be_compiled_is_drawn_eagerly_with_a_word(tmp_path: Path, monkeypatch, caplog) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    with pipe.fast("compile") as draw:
        first = draw("a cat", seed=1, **SIZE)
        assert torch.equal(draw("a cat", seed=1, **SIZE), first) and draw.mode == "eager"
    assert [record.message for record in caplog.records] == ["OneStep: draws without compile (no compiler here)"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"mode": "fastest"}, "mode is 'fastest'"),
        ({"mode": "graph"}, "needs a CUDA device, and this pipeline is on cpu"),
        ({"recipe": Recipe((999.0,), guidance=2.0)}, "guidance 2, two forwards"),
    ],
)
def test_what_it_cannot_do_is_said(given: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match=why):
        loaded("sd", RECIPES["one step"], tmp_path).fast(**given)


def test_loaded_adapters_that_it_leaves_out_are_refused(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    network_of(pipe).encoder_hid_proj = torch.nn.Identity()
    network_of(pipe).register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(OneStepError, match="unload_ip_adapter"):
        pipe.fast()
    network_of(pipe).register_to_config(encoder_hid_dim_type=None)
    pipe._guidance = (object(), 4.0)
    with pytest.raises(OneStepError, match=r"load_guidance_adapter\(None\)"):
        pipe.fast()


def test_a_strength_out_of_range_is_refused(tmp_path: Path) -> None:
    draw = Fast(loaded("sd", RECIPES["one step"], tmp_path), RECIPES["one step"])
    for strength in (0, -1, 1.5, float("nan")):
        with pytest.raises(OneStepError, match="strength is"):
            next(draw.frames([torch.zeros(3, 16, 16)], "a cat", strength=strength))


def test_frames_may_change_their_size_and_are_refused_in_words(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    frames = [torch.full((3, 16, 16), 0.3), torch.full((3, 32, 16), 0.3), torch.full((3, 16, 16), 0.3)]
    with pipe.fast() as draw:
        found = list(draw.frames(frames, "a cat"))
        for frame in (torch.zeros(1, 3, 16, 16), torch.zeros(4, 16, 16), torch.zeros(16, 16)):
            with pytest.raises(OneStepError, match=r"give \[3, H, W\]"):
                next(draw.frames([frame], "a cat"))
        with pytest.raises(OneStepError, match="multiple"):
            next(draw.frames([torch.zeros(3, 13, 16)], "a cat"))
        with pytest.raises(OneStepError, match="no prompt"):
            draw([], **SIZE)
    assert [picture.shape[-2:] for picture in found] == [frame.shape[-2:] for frame in frames]
    assert torch.equal(found[0], found[2])


def test_many_shapes_leave_few_callables(tmp_path: Path) -> None:
    """Of each a graph keeps the memory."""
    with loaded("sd", RECIPES["one step"], tmp_path).fast() as draw:
        first = draw("a cat", seed=1, **SIZE)
        for count in range(1, 2 + fast_module.CALLABLES):
            draw(["a cat"] * count, seed=1, **SIZE)
        assert len(draw._calls) == fast_module.CALLABLES
        assert torch.equal(draw("a cat", seed=1, **SIZE), first)


def test_adapters_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    """From merged weights they would act twice, or not at all; afterwards they act as they should."""
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    other = random_lora(make("sd"), tmp_path / "y.safetensors", RECIPES["one step"], seed=5)
    with pipe.fast() as draw:
        before = draw("a cat", seed=1, **SIZE)
        for change in (lambda: pipe.load_one_step_lora(other), pipe.unload_lora_weights):
            with pytest.raises(OneStepError, match=r"leave `with pipe.fast\(\)` first"):
                change()
        assert torch.equal(draw("a cat", seed=1, **SIZE), before)
        pipe.plain().load_lora_weights(other, adapter_name="other")
        with pytest.raises(OneStepError, match="LoRAs have changed while it drew fast"):
            draw("a cat", seed=1, **SIZE)
    again = loaded("sd", RECIPES["one step"], tmp_path)
    with again.fast() as draw:
        again._guidance = (object(), 4.0)
        with pytest.raises(OneStepError, match="guidance adapter is loaded"):
            draw("a cat", seed=1, **SIZE)
    again._guidance = None
    again.load_one_step_lora(other)
    with again.fast() as draw:
        assert not torch.equal(draw("a cat", seed=1, **SIZE), before)


def test_one_network_is_drawn_fast_once_at_a_time(tmp_path: Path) -> None:
    pipe = loaded("sd", RECIPES["one step"], tmp_path)
    shared = OneStepPipeline.from_pipe(pipe)
    with pipe.fast():
        for one in (pipe, shared):
            with pytest.raises(OneStepError, match="is drawn fast already"), Fast(one, RECIPES["one step"]):
                pass
    with pipe.fast() as draw:
        draw("a cat", seed=1, **SIZE)


def test_threads_draw_one_after_the_other(tmp_path: Path) -> None:
    """A callable's memory is one: what a thread puts in is what it gets out."""
    pipe, at_once, most = loaded("sd", RECIPES["renoised"], tmp_path), [0], [0]
    with pipe.fast() as draw:
        wanted = [draw("a cat", seed=seed, **SIZE) for seed in range(4)]
        key = next(iter(draw._calls))
        call = draw._calls[key]

        def watched(given: dict[str, torch.Tensor]) -> torch.Tensor:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            try:
                return call(given)
            finally:
                at_once[0] -= 1

        draw._calls[key] = watched
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda seed: draw("a cat", seed=seed, **SIZE), [0, 1, 2, 3] * 3))
    assert most == [1]
    for at, picture in enumerate(found):
        torch.testing.assert_close(picture, wanted[at % 4], rtol=0, atol=1e-6)
