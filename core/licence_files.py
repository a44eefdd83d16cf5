"""Licences as files name them: in a .safetensors header, or in the model card of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from .errors import OneStepError
from .licences import BASE, COMMON, FOUND, TOLD, Part, Source, one_line, told_licenses
from .tensor_file import read_header

NAMES = (COMMON, "license", "licence", "ss_license", "general.license")
"""Entries of a header under which a licence is found, the first that is there."""
CARD = 64 * 2**10
"""Characters of a model card that are read."""


def sources_of(parts: Iterable[Part], told: str, usual: str = "") -> list[Source]:
    """Each part with its licence. told: what a person says of them, which goes before what stands in a file. usual:
    said of a base whose licence neither tells, what models of its family were published under."""
    known = told_licenses(told)
    found = (_source(*part, known) for part in parts)
    return [replace(each, usual=usual) if each.part == BASE and not each.found else each for each in found]


def _source(part: str, name: str, path: Path | None, told: Mapping[str, str]) -> Source:
    if part in told:
        return Source(part, one_line(name), told[part], TOLD)
    license = license_in(path) if path else None
    return Source(part, one_line(name), license, FOUND) if license else Source(part, one_line(name))


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
    return next((text for name in NAMES if (text := one_line(metadata.get(name, "")))), None)


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
    entries = {name.strip(): one_line(text.strip().strip("\"'")) for name, text in lines}
    return entries.get("license_name") or entries.get("license") or None
