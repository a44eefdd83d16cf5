"""docs/methods.md is what the command makes of the methods and settings as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from narrowed import narrowed

from onestep.cli.methods import page
from onestep.core.recomputed import NOTHING
from onestep.pipelines.shells import layout
from onestep.training.methods import METHODS
from onestep.training.plan.counted import counted
from onestep.training.plan.rehearse import FORWARD
from onestep.training.presets import preset


def test_the_page_is_as_the_command_makes_it(root: Path) -> None:
    found = (root / "docs" / "methods.md").read_text("utf-8")
    assert found == page() + "\n", "make it anew: onestep methods --markdown > docs/methods.md"


def test_every_page_that_the_readme_names_is_there(root: Path) -> None:
    """And README is one screen of what it is and how to start."""
    readme = (root / "README.md").read_text("utf-8")
    named = {part.split(")")[0] for part in readme.split("](docs/")[1:]}
    assert named and all((root / "docs" / name).is_file() for name in named)
    assert readme.count("\n") <= 150


@pytest.mark.slow
@pytest.mark.parametrize("name", narrowed(METHODS, "dmd"))
def test_the_forwards_of_a_method_are_those_that_the_plan_counts(name: str) -> None:
    """What it says of an update, and of each of the critic's and the head's; cdm's student has several steps, with two
    to four on the way and so one before the drawn one, in the mean, of each picture; phased-dmd's last phase of
    two has one, a forward with its adapter."""
    several = {
        "cdm": {"student_steps": 4},
        "phased-dmd": {"student_steps": 2},
        **dict.fromkeys(("tune", "pso"), {"drawn": "few"}),
    }.get(name, {})
    settings = preset("Balanced", method=name, **several).with_(sizes="512x512")
    played = counted(layout("sd15", targets=settings.targets), settings, NOTHING)
    one = played.count.flops(FORWARD, 1, settings.rank)
    work = {part: played.count.flops(part, 1, settings.rank) / one for part in played.phases[-1].parts}
    others = [value for part, value in work.items() if part.endswith((", critic", ", head"))]
    earlier = {"cdm": 1.0, "phased-dmd": 1.1}.get(name, 0.0)
    found = [value - earlier for value in (sum(work.values()) - sum(others), *others)]
    said = [float(number) for number in re.findall(r"[0-9.]+", METHODS[name].forwards)]
    assert said == pytest.approx(found, abs=0.06)
