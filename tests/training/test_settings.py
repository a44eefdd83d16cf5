"""Settings refuse what is out of range, by name, with what was found; nothing is clamped."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onestep.core.errors import OneStepError
from onestep.training.methods import METHODS, settings_for
from onestep.training.presets import PRESETS, preset
from onestep.training.settings import Settings, described, nearest

OWNERS = {method.settings: method.name for method in reversed([*METHODS.values()])}
ALL = [(entry, "dmd") for entry in described(Settings)]
ALL += list({id(entry): (entry, name) for kind, name in OWNERS.items() for entry in described(kind)}.values())
"""Every setting, each once, with a method that has it."""
NUMBERS = [pytest.param(*pair, id=f"{pair[1]}-{pair[0].name}") for pair in ALL if pair[0].metadata["low"] is not None]
CHOICES = [pytest.param(*pair, id=f"{pair[1]}-{pair[0].name}") for pair in ALL if pair[0].metadata["choices"]]


def message(**changes: Any) -> str:
    with pytest.raises(OneStepError) as caught:
        settings_for(**changes)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_every_setting_is_described() -> None:
    for entry, _ in ALL:
        assert len(entry.metadata["help"]) > 15 and entry.metadata["help"].endswith("."), entry.name
        assert entry.type in ("int", "float", "str", "bool")
        assert (entry.metadata["low"] is not None) == (entry.type in ("int", "float")), entry.name


def test_no_method_has_a_setting_that_every_run_has() -> None:
    """They are given by name alone."""
    every = {entry.name for entry in described(Settings)} | {"method", "own"}
    for method in METHODS.values():
        assert every.isdisjoint(entry.name for entry in described(method.settings)), method.name


@pytest.mark.parametrize(("entry", "method"), NUMBERS)
def test_numbers_out_of_range_are_refused(entry: Any, method: str) -> None:
    low, high = entry.metadata["low"], entry.metadata["high"]
    step = 1 if entry.type == "int" else 1e-3 * max(high, 1)
    for value in (low - step, high + step):
        found = message(method=method, **{entry.name: value})
        assert found.startswith(f"{entry.name} is {value}: it must lie in {low:g} to {high:g}")


@pytest.mark.parametrize(("entry", "method"), NUMBERS)
def test_what_is_no_number_is_refused(entry: Any, method: str) -> None:
    for value in (float("nan"), "4", None, True, [4], "x" * 10_000):
        assert message(method=method, **{entry.name: value}).startswith(f"{entry.name} is "), value
    assert entry.name in message(method=method, **{entry.name: float("inf")})


def test_the_ends_of_every_range_are_allowed() -> None:
    """Each alone, beside whatever it needs."""
    beside = {"steps": {"warm_start": 1}, "warm_start": {"steps": 1}, "batch": {"accumulation": 1}}
    beside |= {"accumulation": {"batch": 4096}, "level_low": {"level_high": 1.0}, "level_high": {"level_low": 0.0}}
    beside |= {"guidance_low": {"guidance_high": 30.0}, "head_level_low": {"head_level_high": 1.0}}
    beside |= {"head_level_high": {"head_level_low": 0.0}}
    beside |= {"picture_share": {"same_share": 0.0}, "same_share": {"picture_share": 0.0}}
    beside |= {"levels_first": {"levels_last": 10_000}, "levels_last": {"levels_first": 2}}
    for entry, method in ALL:
        if entry.metadata["low"] is None:
            continue
        for value in (entry.metadata["low"], entry.metadata["high"]):
            if (entry.name.removeprefix("head_"), value) in (("level_low", 1), ("level_high", 0)):
                continue
            made = settings_for(method, **{**beside.get(entry.name, {}), entry.name: value})
            assert made.flat()[entry.name] == value


@pytest.mark.parametrize(("entry", "method"), CHOICES)
def test_unknown_choices_are_refused_with_the_nearest(entry: Any, method: str) -> None:
    for choice in entry.metadata["choices"]:
        assert settings_for(method, **{entry.name: choice}).flat()[entry.name] == choice
        assert f"did you mean {choice!r}" in message(method=method, **{entry.name: choice + "x"})
    assert "known are" in message(method=method, **{entry.name: "zzzzzz"})
    for value in (None, "y" * 10_000):
        assert entry.name in message(method=method, **{entry.name: value})


@pytest.mark.parametrize("name", ["negative", "initial_lora", "sizes"])
@pytest.mark.parametrize("value", [None, 5, b"x"])
def test_texts_must_be_texts(name: str, value: Any) -> None:
    assert f"{name} is {value!r}: it must be a text" in message(**{name: value})


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_flags_must_be_flags(value: Any) -> None:
    assert "checkpointing is" in message(checkpointing=value)


# -- settings that belong together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level_low": 0.5, "level_high": 0.5}, "level_low 0.5 must be below level_high 0.5"),
        ({"batch": 6, "accumulation": 4}, "accumulation 4 must divide batch 6"),
        ({"steps": 0, "warm_start": 0}, "steps and warm_start are both 0"),
        ({"steps": 0, "method": "regression"}, "nothing would be trained"),
        ({"steps": 0, "method": "agd"}, "nothing would be trained"),
        ({"steps": 0, "method": "nct"}, "nothing would be trained"),
        ({"steps": 0, "method": "sun"}, "nothing would be trained"),
        (
            {"method": "agd", "guidance_low": 5.0, "guidance_high": 2.0},
            "guidance_low 5 must not be above guidance_high 2",
        ),
        ({"method": "guidance-lora", "teacher_steps": 65}, "set teacher_steps to at most 64"),
        ({"method": "dmdd"}, "no method 'dmdd'; did you mean 'dmd'?"),
        ({"method": "dmd", "push": 2.0}, "dmd has no setting 'push': it belongs to sun"),
        (
            {"method": "sun", "critic_rank": 2},
            "it belongs to dmd, anyflow, cdm and ",
        ),
        ({"rnak": 2}, "dmd has no setting 'rnak'; did you mean 'rank'?"),
        ({"follow": 0.1, "critic_rank": 8, "rank": 16}, "set critic_rank to 0"),
        ({"sizes": ""}, "size '' is not WIDTHxHEIGHT"),
        ({"sizes": "512"}, "size '512' is not WIDTHxHEIGHT"),
        ({"sizes": "512x512x512"}, "is not WIDTHxHEIGHT"),
        ({"sizes": "512x512,"}, "size '' is not WIDTHxHEIGHT"),
        ({"sizes": "axb"}, "size 'axb' is not WIDTHxHEIGHT"),
        ({"sizes": "512.5x512"}, "is not WIDTHxHEIGHT"),
        ({"sizes": "513x512"}, "size 513x512: width and height must be multiples of 8 between 8 and 8192"),
        ({"sizes": "0x512"}, "between 8 and 8192"),
        ({"sizes": "-8x512"}, "between 8 and 8192"),
        ({"sizes": "8200x512"}, "between 8 and 8192"),
        ({"sizes": "9" * 4000 + "x8"}, "between 8 and 8192"),
        ({"sizes": "x" * 10_000}, "is not WIDTHxHEIGHT"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], words: str) -> None:
    assert words in message(**changes)


def test_sizes_are_a_list() -> None:
    assert settings_for(sizes="512x512, 640X448").size_list == ((512, 512), (640, 448))


# -- settings as texts ------------------------------------------------------------------------------------------------


def test_texts_become_values() -> None:
    texts = {"rank": "32", "learning_rate": "3e-4", "checkpointing": "no", "critic_rank": "8", "negative": " a = b "}
    made = settings_for("vsd").with_texts(texts)
    assert (made.rank, made.learning_rate, made.checkpointing) == (32, 3e-4, False)
    assert (made.method, made.own.critic_rank, made.negative) == ("vsd", 8, " a = b ")
    assert made.with_texts({}) == made and made.with_texts({"checkpointing": "True"}).checkpointing


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"rnak": "32"}, "dmd has no setting 'rnak'; did you mean 'rank'?"),
        ({"push": "3"}, "dmd has no setting 'push'"),
        ({"zzz": "32"}, "no setting 'zzz'; known are steps"),
        ({"z" * 10_000: "32"}, "no setting"),
        ({"rank": "3.5"}, "rank is '3.5': it must be a whole number, like rank=64"),
        ({"rank": ""}, "rank is ''"),
        ({"rank": "9" * 10_000}, "rank is"),
        ({"rank": "9" * 4000}, "rank is"),
        ({"rank": "0"}, "rank is 0: it must lie in 1 to 512"),
        ({"guidance": "nan"}, "guidance is nan: it must be a number"),
        ({"guidance": "inf"}, "guidance is inf: it must lie in 0 to 30"),
        ({"checkpointing": "maybe"}, "checkpointing is 'maybe': it must be true or false"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_texts_that_make_no_sense_are_refused(texts: dict[str, str], words: str) -> None:
    with pytest.raises(OneStepError) as caught:
        settings_for().with_texts(texts)
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_presets_are_changes_to_the_defaults() -> None:
    for name, made in PRESETS.items():
        defaults = settings_for(made.values["method"]).flat()
        assert preset(name).flat() == {**defaults, **made.values}
        assert made.about.endswith(".") and set(made.with_donor) <= set(defaults)
    assert preset("Fast", rank=8).rank == 8
    # what another method has not is left out
    assert preset("Best", method="sun").flat() == {**settings_for("sun").flat(), "steps": 3000, "pairs": 4096}
    assert preset("Overnight", method="sun", steps=3).flat() == {**settings_for("sun").flat(), "steps": 3}
    with pytest.raises(OneStepError, match="no preset 'Slow'; known are Adapt, Overnight, Weekend, One step, Guidance"):
        preset("Slow")
    with pytest.raises(OneStepError, match="did you mean 'Overnight'"):
        preset("Overnite")
    assert preset(None) == preset("Overnight")
    assert preset(None, method="dmd", rank=8) == settings_for("dmd", rank=8), "a method alone: its own defaults"


@pytest.mark.parametrize("name", ["one-step", "One step", "ONE_STEP"])
def test_one_step_starts_from_the_best_that_there_is(name: str) -> None:
    """The donor where there is one, for student and critic alike; else regression."""
    cold, warm = preset(name), preset(name, initial_lora="donor.safetensors")
    assert cold.own.warm_start > 0 and cold.own.critic_start == "base" and cold.student_steps == 1
    assert warm.own.warm_start == 0 and warm.own.critic_start == "donor"
    assert warm.learning_rate < cold.learning_rate and warm.own.anchor == 0 < cold.own.anchor
    assert preset(name, initial_lora="donor.safetensors", learning_rate=0.5).learning_rate == 0.5


def test_the_outcomes_are_what_they_say() -> None:
    assert [preset(name).student_steps for name in ("Overnight", "Weekend", "One step")] == [4, 2, 1]
    assert preset("Weekend").own.step_loras and preset("Guidance only").method == "guidance-lora"
    assert preset("Adapt").own.critic_start == "donor" and preset("Adapt").own.warm_start == 0


def test_settings_are_json() -> None:
    assert settings_for(**json.loads(preset("Best").to_json())) == preset("Best")


def test_the_nearest_name() -> None:
    assert nearest("vds", ("dmd", "vsd")) == "; did you mean 'vsd'?"
    assert nearest("zzz", ("dmd", "vsd")) == "; known are dmd, vsd"
    assert len(nearest("zzz", [f"name{n}" for n in range(1000)])) < 300
