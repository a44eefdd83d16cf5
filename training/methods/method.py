"""What a method is: one row of the table of methods, and what a run asks of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.recipe import Recipe
from ..engine.inputs import recipe_of
from ..engine.prompts import Prompts, Tick, embed, silent
from ..engine.setup import Setup
from ..engine.turns import Plan
from ..host import Host
from ..settings import NoSettings, Settings
from ..watch.reference import Reference, by_teacher


def nothing_to_check(host: Host, settings: Settings) -> None:
    """Every base will do."""


def any_text(texts: Sequence[str], settings: Settings) -> None:
    """Every prompt will do."""


def as_they_are(host: Host, settings: Settings, prompts: Prompts, folder: Path) -> Prompts:
    """A run learns from the prompts that it is given, each as often as another."""
    return prompts


def nothing_to_say(settings: Settings) -> str:
    return ""


@dataclass(frozen=True)
class Method:
    """A file of this package that has a METHOD is a method: nothing else has to know it.

    name, title, paper: as the command, the node and the docs show them. forwards: network forwards of one sample in a
    student update, backward included, in words.
    plan: (setup) -> its roles, phases and turns; it adds the roles that it trains beside the student.
    settings: its own, a frozen dataclass (see `settings.NoSettings`).
    adapter: (host, settings) -> a new adapter module that learns in place of the student's factors; None for a LoRA.
    recipe: how the student draws. reference: what the watch compares it with.
    check: raises OneStepError for settings that it cannot do with this host. check_files: the same for a person's files
    that it reads as a run begins, and not where one goes on, which has kept what it has read. check_texts: the same for
    the run's prompts. prompts: (host, settings, prompts, where texts are kept) -> how they are drawn, and what the
    teacher is asked in their place. note: what a run tells of
    its settings as it begins, or nothing. adjustable: settings that may be others when a run is continued.
    guidance_input: whether the student is given the guidance of each sample as a condition. exports: whether what
    learns in place of the factors is written as a LoRA (`core.rotation_adapter`).
    """

    name: str
    title: str
    paper: str
    forwards: str
    plan: Callable[[Setup], Plan]
    settings: type[Any] = NoSettings
    adapter: Callable[[Host, Settings], Any] | None = None
    recipe: Callable[[Host, Settings], Recipe] = recipe_of
    reference: Callable[[Setup], Reference] = by_teacher
    check: Callable[[Host, Settings], None] = nothing_to_check
    check_files: Callable[[Host, Settings], None] = nothing_to_check
    check_texts: Callable[[Sequence[str], Settings], None] = any_text
    prompts: Callable[[Host, Settings, Prompts, Path], Prompts] = as_they_are
    note: Callable[[Settings], str] = nothing_to_say
    adjustable: tuple[str, ...] = ("steps", "pairs")
    guidance_input: bool = False
    exports: bool = False

    def check_all(self, host: Host, settings: Settings, goes_on: bool, texts: Sequence[str] = ()) -> None:
        """goes_on: whether the run that it is checked for is one that was begun before. texts: the run's prompts, where
        they are known."""
        if texts:
            self.check_texts(texts, settings)
        self.check(host, settings)
        if not goes_on:
            self.check_files(host, settings)

    def embedded(
        self, host: Host, texts: Sequence[str], settings: Settings, folder: Path, tick: Tick = silent
    ) -> Prompts:
        """The run's prompts as this method draws them. folder: where texts are kept."""
        found = embed(host, texts, settings, folder, guidance_input=self.guidance_input, tick=tick)
        return self.prompts(host, settings, found, folder)

    @property
    def makes(self) -> str:
        """What its result is: "LoRA" or "adapter"."""
        return "LoRA" if self.adapter is None or self.exports else "adapter"


def base_as_student(settings: Settings) -> str:
    """A note where the few-step student that an adapter is for is not named."""
    if settings.initial_lora:
        return ""
    return f"no initial_lora: {settings.method} takes the base itself, drawn in few steps, for the student"
