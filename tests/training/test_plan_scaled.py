"""One count at a prime batch and rank gives the bytes and FLOPs of every other batch and rank, exactly."""

from __future__ import annotations

import layout_pipelines as layouts
import pytest
import torch

from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.methods import settings_for
from onestep.training.plan.rehearse import FORWARD, rehearse
from onestep.training.plan.rungs import Way, peaks_of
from onestep.training.settings import Settings

LEAST = {"warm_start": 1, "critic_warm_up": 0, "steps": 1, "critic_updates": 1, "watch_samples": 4, "anchor": 0.25}


def settings_of(name: str, batch: int, rank: int, accumulation: int = 1) -> Settings:
    guided = {} if name != "flux" else {"matching_guidance": 1.0}
    size = f"{layouts.SIDE}x{layouts.SIDE}"
    own = {"batch": batch, "rank": rank, "accumulation": accumulation, "pairs": batch}
    return settings_for(method="dmd", sizes=size, **own, **LEAST, **guided)


BROAD = [pytest.param(name, marks=pytest.mark.broad) for name in ("sdxl", "sd3", "flux", "flux2")]


@pytest.mark.broad
@pytest.mark.parametrize("name", ["sd15", *BROAD])
def test_scaled_is_what_is_counted_there(name: str) -> None:
    """In bfloat16, as on a card: each pass has its roles' factors cast into one row."""
    shell = of_host(adapt(getattr(layouts, name)().to(torch.bfloat16)), "all")
    scaled = rehearse(shell, settings_of(name, 4, 64))
    for batch, rank in ((2, 64), (3, 5)):
        settings = settings_of(name, batch, rank)
        there = rehearse(shell, settings, scaled=False)
        ours, theirs = peaks_of(scaled, settings, Way(batch)), peaks_of(there, settings, Way(batch))
        assert ours == theirs and len(ours) > 7
        for part in (*ours, FORWARD):
            assert scaled.count.flops(part, batch, rank) == there.count.flops(part, batch, rank), part
            assert scaled.count.moved(part, batch, rank) == there.count.moved(part, batch, rank), part
        assert scaled.phases == there.phases


@pytest.mark.broad
def test_z_image_is_counted_within_a_percent() -> None:
    """Its network takes a batch apart into samples and makes what fills their sequences up for each of them."""
    shell = of_host(adapt(layouts.z_image().to(torch.bfloat16)), "all")
    scaled = rehearse(shell, settings_of("z_image", 4, 64))
    for batch, rank in ((2, 64), (3, 5)):
        settings = settings_of("z_image", batch, rank)
        there = rehearse(shell, settings, scaled=False)
        ours, theirs = peaks_of(scaled, settings, Way(batch)), peaks_of(there, settings, Way(batch))
        assert ours.keys() == theirs.keys() and len(ours) > 7
        for part, peak in theirs.items():
            assert ours[part].bytes == pytest.approx(peak.bytes, rel=0.01), part
        for part in (*ours, FORWARD):
            expected = there.count.flops(part, batch, rank)
            assert scaled.count.flops(part, batch, rank) == pytest.approx(expected, rel=0.01), part


@pytest.mark.broad
def test_a_single_sample_is_counted_within_a_thousandth() -> None:
    """torch copies a little less where a batch has one sample: a transposed tensor may then be contiguous."""
    shell = of_host(adapt(layouts.sd15()), "all")
    settings = settings_of("sd15", 1, 64)
    scaled, there = rehearse(shell, settings), rehearse(shell, settings, scaled=False)
    ours, theirs = peaks_of(scaled, settings, Way(1)), peaks_of(there, settings, Way(1))
    assert ours.keys() == theirs.keys()
    for part, peak in theirs.items():
        assert peak.bytes <= ours[part].bytes <= 1.001 * peak.bytes, part


@pytest.mark.broad
@pytest.mark.parametrize("name", ["sd15", BROAD[1]])
def test_gradients_of_earlier_micro_batches_are_there(name: str) -> None:
    """Each part of a turn, as when two micro-batches are counted one after the other; but for the texts and numbers of
    the first, which are let go only after the second's are there."""
    shell = of_host(adapt(getattr(layouts, name)()), "all")
    settings = settings_of(name, 4, 6, accumulation=2)
    scaled, there = rehearse(shell, settings), rehearse(shell, settings, scaled=False)
    ours = peaks_of(scaled, settings, Way(2))
    theirs = peaks_of(there, settings.with_(batch=4, accumulation=1), Way(4))
    for part in scaled.gradients:
        assert ours[part].made_of[scaled.gradients[part]] == theirs[part].made_of[scaled.gradients[part]], part
        assert ours[part].bytes <= theirs[part].bytes <= 1.002 * ours[part].bytes, part
