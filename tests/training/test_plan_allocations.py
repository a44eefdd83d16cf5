"""What the plan predicts on the meta device is what the CPU's allocator is asked for, by torch's own profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layout_pipelines as layouts
import pytest
from allocated import host, trained
from every_method import OF_METHOD
from narrowed import narrowed
from own_pictures import needed_by

from onestep.core.recomputed import BLOCKS, FEED_FORWARDS, GRADES
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.methods import METHODS, settings_for
from onestep.training.plan.rehearse import OPTIMIZER, rehearse
from onestep.training.plan.rungs import Way, peaks_of
from onestep.training.settings import Settings, described

LASTING = (
    "base",
    "student",
    "critic",
    "ema",
    "head",
    "earlier student",
    "features",
    "student moments",
    "critic moments",
    "head moments",
)


def settings_of(method: str, batch: int, **more: Any) -> Settings:
    run = {"sizes": "64x64", "rank": 8, "batch": batch, "pairs": batch, "steps": 4} | more
    few = {"teacher_steps": 1, "watch_samples": 4}
    # the matching alone, a head's turns and its term in each update
    alone = {"warm_start": 0, "critic_warm_up": 0, "critic_updates": 1, "gan_start": 0.0, "gan_ramp": 0.0}
    alone |= {"head_warm_up": 0, "twin_warm_up": 0}
    own = {entry.name for entry in described(METHODS[method].settings)}
    several = {"student_steps": 4} if "student_steps" in OF_METHOD.get(method, {}) else {}
    several |= {"students": 2} if method == "msd" else {}
    return settings_for(method=method, **several, **run, **few, **{n: v for n, v in alone.items() if n in own})


def predicted(settings: Settings, real: Any, recompute: str, sliced: bool) -> int:
    """The most bytes that an update's parts have alive beyond what is there before it."""
    shell = of_host(real, "all")
    played = rehearse(shell, settings, machine="cpu", scaled=False, recompute=recompute, sliced=sliced)
    peaks = peaks_of(played, settings, Way(settings.batch))
    parts = {OPTIMIZER, *(name for phase in played.phases for name in phase.parts)}
    return max(
        peak.bytes - sum(size for label, size in peak.made_of.items() if label.partition("@")[0] in LASTING)
        for peak in map(peaks.__getitem__, parts)
    )


@pytest.mark.broad
@pytest.mark.parametrize("recompute", narrowed(GRADES, FEED_FORWARDS))
@pytest.mark.parametrize(("batch", "sliced"), narrowed([(1, True), (4, False), (4, True)], (4, True)))
def test_the_peak_of_an_update_is_what_the_cpu_allocates(
    batch: int, sliced: bool, recompute: str, tmp_path: Path
) -> None:
    settings, real = settings_of("dmd", batch), host()
    measured = trained(real, settings, tmp_path, recompute, sliced)
    assert measured > 4 * 2**20
    assert predicted(settings, real, recompute, sliced) == pytest.approx(measured, rel=0.01)


@pytest.mark.broad
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dmd"])
def test_so_is_every_other_methods(method: str, tmp_path: Path) -> None:
    settings, real = settings_of(method, 3, **needed_by(method, tmp_path)), host()
    measured = trained(real, settings, tmp_path, BLOCKS, True)
    assert predicted(settings, real, BLOCKS, True) == pytest.approx(measured, rel=0.01)


@pytest.mark.broad
@pytest.mark.parametrize("recompute", GRADES)
@pytest.mark.parametrize("size", ["104x152", "152x104", "96x32"])
def test_so_is_a_picture_that_is_no_square(size: str, recompute: str, tmp_path: Path) -> None:
    """The first an eighth of 832x1216, in whose U-Net levels of odd widths and heights meet."""
    settings, real = settings_of("dmd", 2, sizes=size), host()
    measured = trained(real, settings, tmp_path, recompute, True)
    assert measured > 4 * 2**20
    assert predicted(settings, real, recompute, True) == pytest.approx(measured, rel=0.01)


@pytest.mark.broad
@pytest.mark.parametrize("recompute", GRADES)
def test_flux_2_takes_no_more_than_is_predicted(recompute: str, tmp_path: Path) -> None:
    """Of 512 text tokens beside a picture's 16: what is predicted is at most a tenth too much."""
    settings, real = settings_of("dmd", 2), adapt(layouts.flux2())
    measured = trained(real, settings, tmp_path, recompute, True)
    assert measured > 4 * 2**20
    assert 0.995 * measured <= predicted(settings, real, recompute, True) <= 1.1 * measured
