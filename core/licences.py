"""Of what a file was made, and under which licence each part was given: found in the parts' own files, told by a
person, or unknown. Nothing is blocked; a file says what is known of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import OneStepError
from .tensor_file import read_header

KEY, COMMON = "onestep.license", "modelspec.license"
NAMES = (COMMON, "license", "licence", "ss_license", "general.license")
"""Entries of a header under which a licence is found, the first that is there."""
UNKNOWN = "unknown"
FOUND, TOLD = "file", "told"
LONGEST, CARD = 200, 64 * 2**10


BASE, BASE_LORA, INITIAL, FEW_STEP = "base", "base_lora", "initial_lora", "few_step_model"
PARTS = (BASE, BASE_LORA, INITIAL, FEW_STEP)
Part = tuple[str, str, Path | None]
"""What something was made of: one of `PARTS`, its name, and its file or folder where that is known."""


@dataclass(frozen=True)
class Source:
    """What a file was made of. part: one of `PARTS`. license: as its owner names it. found: "file" where it stands
    there, "told" by a person, "" where it is unknown."""

    part: str
    name: str
    license: str = UNKNOWN
    found: str = ""

    def __str__(self) -> str:
        return f"{self.part.replace('_', ' ').replace('lora', 'LoRA')} {self.name} (licence {self.license})"


def sources_of(parts: Iterable[Part], told: str) -> list[Source]:
    """Each part with its licence. told: what a person says of them, which goes before what stands in a file."""
    known = told_licenses(told)
    return [_source(*part, known) for part in parts]


def _source(part: str, name: str, path: Path | None, told: Mapping[str, str]) -> Source:
    if part in told:
        return Source(part, _clean(name), told[part], TOLD)
    license = license_in(path) if path else None
    return Source(part, _clean(name), license, FOUND) if license else Source(part, _clean(name))


def license_in(path: Path) -> str | None:
    """The licence that a .safetensors file's header names, or the model card in a folder; None where neither does."""
    if path.is_dir():
        return _of_card(path / "README.md")
    if path.suffix != ".safetensors":
        return None
    try:
        metadata = read_header(path).metadata
    except OneStepError:
        return None
    return next((text for name in NAMES if (text := _clean(metadata.get(name, "")))), None)


def _of_card(path: Path) -> str | None:
    """`license_name`, or `license`, of a model card's first lines (https://huggingface.co/docs/hub/model-cards)."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            head = file.read(CARD)
    except OSError:
        return None
    if not head.startswith("---"):
        return None
    lines = [line.split(":", 1) for line in head.split("---", 2)[1].splitlines() if ":" in line]
    entries = {name.strip(): _clean(text.strip().strip("\"'")) for name, text in lines}
    return entries.get("license_name") or entries.get("license") or None


def told_licenses(text: str) -> dict[str, str]:
    """What a person says, by part: ``base=openrail++; initial_lora=apache-2.0``. Raises OneStepError for what is no
    such text."""
    found = {}
    for entry in filter(None, (entry.strip() for entry in text.split(";"))):
        part, _, license = entry.partition("=")
        name, license = part.strip().lower().replace(" ", "_"), _clean(license)
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
        return [Source(*(_clean(str(entry[name])) for name in names)) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def license_line(sources: Iterable[Source]) -> str:
    """One line for a person; empty where there is nothing to say."""
    parts = ", ".join(map(str, sources))
    return f"made of {parts}: their licences go with it, look before you share or sell" if parts else ""


def _clean(text: str) -> str:
    """In one line, of a length to print."""
    return " ".join(text.split())[:LONGEST]
