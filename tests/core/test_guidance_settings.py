"""What a Steering may be told, and what each family's own numbers are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.guidance import DEFAULTS, LIMITS, MODES, NEUTRAL, Numbers, Steering

# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"mode": "cfg"}, "no steering mode 'cfg': choose one of nasa, nag, vsf, perp"),
    ({"mode": None}, "no steering mode None"),
    ({"mode": ["nasa"]}, r"no steering mode \['nasa'\]"),
    ({"scale": math.nan}, "scale is nan: with nasa it must lie in 0 to 100. NASA acts at 0.1 to 0.5"),
    ({"scale": -0.1}, "scale is -0.1"),
    ({"scale": 101}, "scale is 101"),
    ({"scale": "0.3"}, "scale is '0.3'"),
    ({"mode": "perp", "scale": 0.5}, "scale is 0.5: with perp it must lie in 1 to 100.*Perp at 10 to 30"),
    ({"mode": "nag", "scale": 0.5}, "scale is 0.5: with nag it must lie in 1 to 100.*NAG at 2 to 8"),
    ({"mode": "vsf", "scale": -1.0}, "scale is -1.0: with vsf it must lie in 0 to 100"),
    ({"tau": 0.9}, "tau is 0.9: .* in 1 to 100"),
    ({"tau": math.inf}, "tau is inf"),
    ({"alpha": 1.1}, "alpha is 1.1: .* in 0 to 1"),
    ({"weight": None}, "weight is None"),
    ({"order": 0}, "order is 0: .* in 1 to 2"),
    ({"order": math.inf}, "order is inf"),
    ({"offset": -1}, "offset is -1: .* in 0 to 100"),
    ({"offset": math.nan}, "offset is nan"),
    ({"weight": -1}, "weight is -1: .* in 0 to 100"),
    ({"keep": math.inf}, "keep is inf: .* in 0 to 100"),
    ({"layers": "encoder"}, "layers are 'encoder': choose one of all, decoder"),
]


@pytest.mark.parametrize(("values", "words"), REFUSED, ids=str)
def test_bad_values_are_refused_with_a_word(values: dict[str, Any], words: str) -> None:
    with pytest.raises(OneStepError, match=words) as refusal:
        Steering(**values)
    assert len(str(refusal.value)) < 400
    with pytest.raises(OneStepError):
        replace(Steering(), **values)


def test_the_ends_of_the_ranges_are_taken() -> None:
    for mode in MODES:
        assert Steering(mode, NEUTRAL.get(mode, 0)).mode == mode
    for name, low, high, _ in LIMITS:
        assert all(getattr(Steering(**{name: value}), name) == value for value in (low, high))


# -- numbers of a family ----------------------------------------------------------------------------------------------

# The authors' own, by family: ChenDarYen/Normalized-Attention-Guidance (pipelines of SDXL, SD3 and Flux, their
# processors' norms), ComfyUI-NAG's workflow for few-step Wan; weathon/VSF's README for SD3.5-turbo, Flux and Wan.
NAG = {"unet": (3, 2.5, 0.5, 1), "sd3": (5, 2.5, 0.125, 1), "flux": (5, 2.5, 0.25, 2), "wan": (11, 3.5, 0.5, 1)}
VSF = {"sd3": (3.5, 0.1), "flux": (3.5, 0.0), "wan": (1.7, 0.2)}


@pytest.mark.parametrize("family", NAG)
def test_nag_is_its_authors(family: str) -> None:
    found = Steering("nag").of_family(family).numbers
    assert (found.scale, found.tau, found.alpha, found.order) == NAG[family]


@pytest.mark.parametrize("family", VSF)
def test_vsf_is_its_authors(family: str) -> None:
    found = Steering("vsf").of_family(family).numbers
    assert (found.scale, found.offset) == VSF[family]


@pytest.mark.parametrize("family", DEFAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_family_fills_in_what_is_not_given(family: str, mode: str) -> None:
    """Every number is there, none that was given is changed, and what it steers by acts."""
    whole = Steering(mode).of_family(family)
    assert whole.numbers == DEFAULTS[family][mode] and not whole.neutral and whole.of_family(family) == whole
    given = Numbers(7.0, 4.0, 0.375, 1.5, 0.75)
    for name, value in given._asdict().items():
        one = Steering(mode, **{name: value}).of_family(family)
        assert one.numbers == DEFAULTS[family][mode]._replace(**{name: value})
    assert Steering(mode, *given).of_family(family).numbers == given
    off = NEUTRAL.get(mode)
    assert off is None or Steering(mode, off).of_family(family).neutral


def test_every_family_has_every_mode() -> None:
    assert {tuple(modes) for modes in DEFAULTS.values()} == {MODES}


@pytest.mark.parametrize("family", [family for family in DEFAULTS if family != "unet"])
def test_only_a_unet_has_a_decoder(family: str) -> None:
    with pytest.raises(OneStepError, match=f"only U-Nets have, and this is {family}: set layers=all"):
        Steering("nag", layers="decoder").of_family(family)
    assert Steering("nag", layers="decoder").of_family("unet").layers == "decoder"


def test_which_text_a_mode_takes() -> None:
    """NAG's authors pad the negative as the prompt and modulate its stream by its own pooled text; VSF's neither."""
    assert {mode: Steering(mode).wants_padding for mode in MODES} == {mode: mode != "vsf" for mode in MODES}
    assert {mode: Steering(mode).wants_pooled for mode in MODES} == {mode: mode != "vsf" for mode in MODES}
    assert [mode for mode in MODES if Steering(mode).wants_empty] == ["perp"]


@pytest.mark.parametrize("page", ["docs/negatives.md", "web/docs/OneStepNegativeSteering.md"])
def test_pages_name_every_family_that_is_steered(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    names = [FAMILIES[family].short if family in FAMILIES else family.title() for family in DEFAULTS]
    assert [name for name in names if f"{name} " not in text.replace(",", " ")] == []
