"""Settings refuse what is out of range, by name, with what was found; nothing is clamped."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

import pytest

from onestep.core.errors import OneStepError
from onestep.training.settings import PRESETS, Settings, nearest, preset

NUMBERS = [entry for entry in fields(Settings) if entry.metadata["low"] is not None]
CHOICES = [entry for entry in fields(Settings) if entry.metadata["choices"]]


def message(**changes: Any) -> str:
    with pytest.raises(OneStepError) as caught:
        Settings(**changes)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_every_setting_is_described() -> None:
    for entry in fields(Settings):
        assert len(entry.metadata["help"]) > 15 and entry.metadata["help"].endswith("."), entry.name
        assert entry.type in ("int", "float", "str", "bool")
    assert [entry.name for entry in fields(Settings) if entry.type in ("int", "float")] == [n.name for n in NUMBERS]


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: entry.name)
def test_numbers_out_of_range_are_refused(entry: Any) -> None:
    low, high = entry.metadata["low"], entry.metadata["high"]
    step = 1 if entry.type == "int" else 1e-3 * max(high, 1)
    for value in (low - step, high + step):
        found = message(**{entry.name: value})
        assert found.startswith(f"{entry.name} is {value}: it must lie in {low:g} to {high:g}")


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("value", [float("nan"), "4", None, True, [4], "x" * 10_000])
def test_what_is_no_number_is_refused(entry: Any, value: Any) -> None:
    assert message(**{entry.name: value}).startswith(f"{entry.name} is ")


@pytest.mark.parametrize("entry", NUMBERS, ids=lambda entry: entry.name)
def test_infinity_is_refused(entry: Any) -> None:
    assert entry.name in message(**{entry.name: float("inf")})


def test_the_ends_of_every_range_are_allowed() -> None:
    """Each alone, beside whatever it needs."""
    beside = {"steps": {"warm_start": 1}, "warm_start": {"steps": 1}, "batch": {"accumulation": 1}}
    beside |= {"accumulation": {"batch": 4096}, "level_low": {"level_high": 1.0}, "level_high": {"level_low": 0.0}}
    for entry in NUMBERS:
        for value in (entry.metadata["low"], entry.metadata["high"]):
            if (entry.name, value) in (("level_low", 1), ("level_high", 0)):
                continue
            assert getattr(Settings(**{**beside.get(entry.name, {}), entry.name: value}), entry.name) == value


@pytest.mark.parametrize("entry", CHOICES, ids=lambda entry: entry.name)
def test_unknown_choices_are_refused_with_the_nearest(entry: Any) -> None:
    for choice in entry.metadata["choices"]:
        assert getattr(Settings(**{entry.name: choice}), entry.name) == choice
        assert f"did you mean {choice!r}" in message(**{entry.name: choice + "x"})
    assert "known are" in message(**{entry.name: "zzzzzz"})
    assert entry.name in message(**{entry.name: None}) and entry.name in message(**{entry.name: "y" * 10_000})


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
    assert Settings(sizes="512x512, 640X448").size_list == ((512, 512), (640, 448))


def test_a_warm_start_belongs_to_matching_alone() -> None:
    assert Settings(method="dmd", warm_start=7).first_steps == Settings(method="vsd", warm_start=7).first_steps == 7
    assert Settings(method="regression", warm_start=7).first_steps == 0


# -- settings as texts ------------------------------------------------------------------------------------------------


def test_texts_become_values() -> None:
    texts = {"rank": "32", "learning_rate": "3e-4", "checkpointing": "no", "method": "vsd", "negative": " a = b "}
    made = Settings().with_texts(texts)
    assert (made.rank, made.learning_rate, made.checkpointing) == (32, 3e-4, False)
    assert (made.method, made.negative) == ("vsd", " a = b ")
    assert made.with_texts({}) == made and made.with_texts({"checkpointing": "True"}).checkpointing


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"rnak": "32"}, "no setting 'rnak'; did you mean 'rank'?"),
        ({"zzz": "32"}, "no setting 'zzz'; known are method, steps"),
        ({"z" * 10_000: "32"}, "no setting"),
        ({"rank": "3.5"}, "rank is '3.5': it must be a whole number, like rank=64"),
        ({"rank": ""}, "rank is ''"),
        ({"rank": "9" * 10_000}, "rank is"),
        ({"rank": "9" * 4000}, "rank is"),
        ({"rank": "0"}, "rank is 0: it must lie in 1 to 512"),
        ({"guidance": "nan"}, "guidance is nan: it must be a number"),
        ({"guidance": "inf"}, "guidance is inf: it must lie in 0 to 30"),
        ({"checkpointing": "maybe"}, "checkpointing is 'maybe': it must be true or false"),
        ({"method": "dmb"}, "did you mean 'dmd'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_texts_that_make_no_sense_are_refused(texts: dict[str, str], words: str) -> None:
    with pytest.raises(OneStepError) as caught:
        Settings().with_texts(texts)
    assert words in str(caught.value) and len(str(caught.value)) < 400


def test_presets_are_changes_to_the_defaults() -> None:
    for name, changes in PRESETS.items():
        assert asdict(preset(name)) == {**asdict(Settings()), **changes}
    assert preset("Fast", rank=8).rank == 8
    with pytest.raises(OneStepError, match="no preset 'Slow': the presets are Fast, Balanced, Best"):
        preset("Slow")


def test_settings_are_json() -> None:
    assert Settings(**json.loads(preset("Best").to_json())) == preset("Best")


def test_the_nearest_name() -> None:
    assert nearest("vds", ("dmd", "vsd")) == "; did you mean 'vsd'?"
    assert nearest("zzz", ("dmd", "vsd")) == "; known are dmd, vsd"
    assert len(nearest("zzz", [f"name{n}" for n in range(1000)])) < 300
