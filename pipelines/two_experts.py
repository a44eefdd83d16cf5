"""A folder of two networks for two ranges of noise, as Wan 2.2's: which of them is trained or drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..core.families import refuse_pipeline
from .weights import load_parts

EXPERTS = ("transformer", "transformer_2")
INDEX = "model_index.json"


def expert_of(folder: Path) -> tuple[Path, str]:
    """(the pipeline's folder, which of its networks) of the folder of a pipeline or of a network in it; "" where
    nobody says."""
    inside = folder.name in EXPERTS and not (folder / INDEX).is_file() and (folder.parent / INDEX).is_file()
    return (folder.parent, folder.name) if inside else (folder, "")


def entries_for(folder: Path, expert: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an index whose network is ``expert``. Raises OneStepError where two are there and none is
    chosen."""
    second = index.get(EXPERTS[1])
    if second is None or list(second[:2]) == [None, None]:
        return dict(index)
    if not expert:
        raise OneStepError(
            f"{folder.name[:60]} holds two experts: give {folder.name[:60]}/{EXPERTS[0]}, the high-noise one, with "
            f"noise_range=0.875-1, or {folder.name[:60]}/{EXPERTS[1]}, the low-noise one, with 0-0.875 or alone"
        )
    return {**index, EXPERTS[0]: index[expert]}


def as_the_only(folder: Path, expert: str, index: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """What a pipeline of ``expert`` alone is made of beside its other parts."""
    if EXPERTS[1] not in index:
        return {}
    alone: dict[str, Any] = {EXPERTS[1]: None, "boundary_ratio": None}
    if expert == EXPERTS[1]:
        alone[EXPERTS[0]] = load_parts(folder, {expert: index[expert]}, (expert,), dtype)[expert]
    return alone


def refuse_kind(pipe: Any) -> None:
    """Raises OneStepError for a loaded pipeline of a model that is not served, and for one of two experts, of which one
    is to be chosen."""
    refuse_pipeline(type(pipe).__name__)
    if getattr(pipe, EXPERTS[1], None) is not None:
        raise OneStepError(
            f"this {type(pipe).__name__} has two experts, and one is trained at a time: make a pipeline of "
            "{**pipe.components, 'transformer_2': None}, the high-noise one's, with noise_range 0.875-1; or of "
            "{..., 'transformer': pipe.transformer_2, 'transformer_2': None}, with 0-0.875"
        )
