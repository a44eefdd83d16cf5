"""Another model's text encoder is refused by the width of its tokens, with whose it is and what to load."""

from __future__ import annotations

import re
from typing import Any

import pytest
from published_networks import IN_COMFY, PUBLISHED, on_meta

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES, refuse_short, refuse_text
from onestep.nodes.own_text import refuse_without_ids

WIDTHS = {"sd15": 768, "sd2": 1024, "sdxl": 2048, "sd3": 4096, "sd35_medium": 4096, "flux": 4096, "z_image": 2560}
WIDTHS |= {"qwen_image": 3584, "klein_4b": 7680, "klein_9b": 12288, "flux2_dev": 15360, "anima": 1024, "chroma": 4096}
WIDTHS |= {"krea2": 12 * 2560, "lumina2": 2304, "pixart": 4096}
WIDTHS |= dict.fromkeys(("wan_1b", "wan_14b", "wan_5b"), 4096)
WRONG = [
    ("z_image", 2304, "2304 numbers, as Lumina 2's Gemma-2-2B, and this model reads 2560: load Z-Image's Qwen3-4B"),
    ("z_image", 7680, "as FLUX.2 klein 4B's Qwen3-4B, and .* CLIPLoader with qwen_3_4b, type lumina2"),
    ("klein_9b", 7680, "as FLUX.2 klein 4B's Qwen3-4B, and .* load FLUX.2 klein 9B's Qwen3-8B"),
    ("z_image", 4096, "as SD3's CLIP-L and CLIP-G, with T5-XXL or without or Flux' CLIP-L and T5-XXL.*, and"),
    ("sdxl", 768, "as SD1.5's CLIP-L, and this model reads 2048: load SDXL's CLIP-L and CLIP-G .*DualCLIPLoader"),
    ("flux", 2560, "as Z-Image's Qwen3-4B, and this model reads 4096: load Flux' CLIP-L and T5-XXL"),
    ("sd15", 77, "tokens of 77 numbers, and this model reads 768: load SD1.5's CLIP-L"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_own_is_taken_in_either_host(name: str) -> None:
    family = PUBLISHED[name][0]
    network: Any = on_meta(name)
    for config in (network.config, IN_COMFY[name]):
        refuse_text(family, config, WIDTHS[name])
    assert WIDTHS[name] in FAMILIES[family].encoders


@pytest.mark.parametrize(("name", "found", "why"), WRONG)
def test_anothers_is_refused_with_whose_it_is(name: str, found: int, why: str) -> None:
    with pytest.raises(OneStepError) as refused:
        refuse_text(PUBLISHED[name][0], IN_COMFY[name], found)
    assert re.search(why, str(refused.value)) and len(str(refused.value)) < 250, refused.value


@pytest.mark.parametrize(("name", "right"), [("sd2", "load SD2's CLIP-H "), ("klein_9b", "load .*9B's Qwen3-8B ")])
def test_animas_is_refused_with_what_this_model_reads(name: str, right: str) -> None:
    """Anima's tokens are as wide as SD2's, and tell themselves by the ids beside them."""
    ids = {FAMILIES["anima"].token_ids: None}
    with pytest.raises(OneStepError, match=f"is Anima's Qwen3-0.6B, whose text this model does not read: {right}"):
        refuse_without_ids(on_meta(name), ids, WIDTHS[name])
    refuse_without_ids(on_meta(name), {}, WIDTHS[name])
    refuse_without_ids(on_meta("anima"), ids, WIDTHS["anima"])


def test_a_t5_that_fills_no_text_up_is_not_wans() -> None:
    """Chroma's T5-XXL, whose tokens are as wide."""
    with pytest.raises(
        OneStepError, match=r"gives a text of 7 tokens, .* reads 512, .*: load Wan's UMT5-XXL .*type wan"
    ):
        refuse_short("wan", 7)
    for family, tokens in (("wan", 512), ("wan", 513), ("anima", 7), ("chroma", 7), ("flux", 256)):
        refuse_short(family, tokens)
