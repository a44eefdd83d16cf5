"""What OneStepPipeline is called with: refused in words where it does not fit, taken where it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rounding import between_hosts
from tiny_pipelines import make

from onestep.core.errors import OneStepError
from onestep.core.schedule import VPSchedule
from onestep.pipelines.diversity import diverse
from onestep.pipelines.one_step import OneStepPipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt is None, no text"),
    "a number": ({"prompt": 3}, "prompt is 3, no text"),
    "bytes": ({"prompt": b"a cat"}, "prompt is b'a cat', no text"),
    "an empty list": ({"prompt": []}, "prompt is an empty list"),
    "a list with none": ({"prompt": ["a cat", None]}, "prompt number 2 is None, a NoneType"),
    "nested lists": ({"prompt": [["a cat"]]}, "prompt number 1 is .*a list"),
    "a negative that is a number": ({"negative_prompt": 7, "steering": "nag"}, "negative_prompt is 7"),
    "a list with a negative that is none": ({"negative_prompt": [None], "steering": "nag"}, "negative_prompt number 1"),
    "too many generators": ({"generator": seeded(0, 1, 2)}, "3 generators for 2 pictures"),
    "too few generators": ({"generator": seeded(0), "num_images_per_prompt": 2}, "1 generators for 4 pictures"),
    "an empty list of generators": ({"generator": []}, "0 generators for 2 pictures"),
    "a generator that is a number": ({"generator": 5}, "generator holds 5"),
    "numpy's generator": ({"generator": [np.random.default_rng(0)] * 2}, "generator holds"),
    "a seed with a fraction": ({"seed": 1.5}, "seed is 1.5"),
    "a seed that is a text": ({"seed": "1"}, "seed is '1'"),
    "a seed too large": ({"seed": 2**64}, "seed is 18446744073709551616"),
    "latents of one picture": ({"latents": noise(1, 4, 8, 8)}, r"\[1, 4, 8, 8\], these .* \[2, 4, 8, 8\]"),
    "latents of another size": ({"latents": noise(2, 4, 4, 8)}, r"\[2, 4, 4, 8\]"),
    "latents of other channels": ({"latents": noise(2, 16, 8, 8)}, r"\[2, 16, 8, 8\]"),
    "flat latents": ({"latents": noise(512)}, r"\[512\]"),
    "latents as an array": ({"latents": noise(2, 4, 8, 8).numpy()}, "latents is a ndarray"),
    "latents of whole numbers": ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, "a tensor of torch.int64"),
    "latents with NaN": ({"latents": noise(2, 4, 8, 8).sqrt()}, "latents holds numbers that are not finite"),
    "no pictures": ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    "half a picture": ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
    "a width that is a text": ({"width": "16"}, "width is '16'"),
    "a negative height": ({"height": -16}, "height is -16"),
    "an unknown output": ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    changes, why = REFUSED[case]
    call = {"prompt": ["a cat", "red dog"], "width": 16, "height": 16, "recipe": "sd-turbo-1", **changes}
    with pytest.raises(OneStepError, match=why) as caught:
        OneStepPipeline.from_pipe(make("sd"))(**call)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("changes", [{"prompt": []}, {"generator": seeded(0, 1)}, {"seed": "a"}])
def test_diverse_refuses_the_same(changes: dict[str, Any]) -> None:
    call = {"prompt": "a cat", "recipe": "dmd2-4", **changes}
    with pytest.raises(OneStepError, match="prompt is|generators for|seed is"):
        diverse(OneStepPipeline.from_pipe(make("sd")), base=make("sd", 1), **call)


def test_one_generator_for_each_picture() -> None:
    """Each picture is the one that its generator alone draws; a tuple of prompts is a list of them."""
    ours = OneStepPipeline.from_pipe(make("sd"))
    call: dict[str, Any] = {"recipe": "sd-turbo-1", "width": 16, "height": 16, "output_type": "latent"}
    both = ours(("a cat", "red dog"), generator=seeded(3, 4), negative_prompt=None, **call).images
    for row, (prompt, seed) in enumerate([("a cat", 3), ("red dog", 4)]):
        alone = ours(prompt, seed=seed, **call).images[0]
        atol = between_hosts(VPSchedule.scaled_linear()) * float(alone.std())
        torch.testing.assert_close(alone, both[row], rtol=0, atol=atol)
