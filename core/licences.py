"""Of what a file was made, and under which licence each part was given: found in the parts' own files, told by a
person, or unknown. Nothing is blocked; a file says what is known of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import OneStepError

KEY, COMMON = "onestep.license", "modelspec.license"
UNKNOWN = "unknown"
FOUND, TOLD = "file", "told"
LONGEST = 200


BASE, BASE_LORA, INITIAL, FEW_STEP = "base", "base_lora", "initial_lora", "few_step_model"
PARTS = (BASE, BASE_LORA, INITIAL, FEW_STEP)
Part = tuple[str, str, Path | None]
"""What something was made of: one of `PARTS`, its name, and its file or folder where that is known."""


@dataclass(frozen=True)
class Source:
    """What a file was made of. part: one of `PARTS`. license: as its owner names it. found: "file" where it stands
    there, "told" by a person, "" where it is unknown. usual: of an unknown one, under which licences models of its
    family were published."""

    part: str
    name: str
    license: str = UNKNOWN
    found: str = ""
    usual: str = ""

    def __str__(self) -> str:
        usual = f"; usual: {self.usual}" if self.usual else ""
        return f"{self.part.replace('_', ' ').replace('lora', 'LoRA')} {self.name} (licence {self.license}{usual})"


def told_licenses(text: str) -> dict[str, str]:
    """What a person says, by part: ``base=openrail++; initial_lora=apache-2.0``. Raises OneStepError for what is no
    such text."""
    found = {}
    for entry in filter(None, (entry.strip() for entry in text.split(";"))):
        part, _, license = entry.partition("=")
        name, license = part.strip().lower().replace(" ", "_"), one_line(license)
        if name not in PARTS or not license:
            raise OneStepError(
                f"licenses has {entry!r:.80}: write PART=LICENCE, several with semicolons between; parts are "
                f"{', '.join(PARTS)}"
            )
        found[name] = license
    return found


def license_header(sources: Sequence[Source]) -> dict[str, str]:
    """For a file's header: every source, and in modelspec's own entry the licences, where one of them is known."""
    told = {KEY: json.dumps([asdict(each) for each in sources])} if sources else {}
    if any(each.license != UNKNOWN for each in sources):
        distinct = dict.fromkeys(each.license for each in sources)
        told[COMMON] = " + ".join(distinct)[: LONGEST * 4]
    return told


def sources_in(metadata: Mapping[str, str]) -> list[Source]:
    """Those of a header; none where it tells of none, or is damaged."""
    try:
        entries: Any = json.loads(metadata.get(KEY, "[]"))
        names = ("part", "name", "license", "found")
        told = ([*(entry[name] for name in names), entry.get("usual", "")] for entry in entries)
        return [Source(*(one_line(str(text)) for text in texts)) for texts in told]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def license_line(sources: Iterable[Source]) -> str:
    """One line for a person; empty where there is nothing to say."""
    parts = ", ".join(map(str, sources))
    return f"made of {parts}: their licences go with it, look before you share or sell" if parts else ""


def one_line(text: str) -> str:
    """In one line, of a length to print."""
    return " ".join(text.split())[:LONGEST]
