"""A base that is distilled already, given as a teacher: a run says so as it begins, and what to do with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from small_host import SmallHost, small
from whole_runs import run

from onestep.core.licences import BASE, Part
from onestep.core.tensor_file import write_tensors
from onestep.training.engine.inputs import base_note


@dataclass
class Named:
    """Of a host, what is looked at."""

    name: str
    family: str = "unet"
    path: Path | None = None
    guidance: str = "cfg"
    denoiser: Any = field(init=False)

    def __post_init__(self) -> None:
        self.denoiser = type("", (), {"guidance": self.guidance})

    @property
    def made_of(self) -> list[Part]:
        return [(BASE, self.name, self.path)]


def note(host: Any, guidance: float = 4.0) -> str:
    return base_note(host, small(guidance=guidance))


def test_it_is_one_sentence_with_what_to_do() -> None:
    said = note(Named("DreamShaperXL_Turbo_v2_1"))
    assert said == (
        "DreamShaperXL_Turbo_v2_1 draws in few steps already (Turbo, by its name): a better teacher is the base that "
        "it was made from, with this one's difference as initial_lora (Extract Few-Step LoRA); to go on with it as the "
        "teacher, set guidance=1"
    )
    assert "\n" not in said and ". " not in said
    assert note(Named("sdxl-turbo"), guidance=1).endswith("(Extract Few-Step LoRA)")
    assert note(Named("sd_xl_base_1.0")) == ""


def test_a_header_a_folder_and_the_network_tell_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    write_tensors(file, {"x": torch.zeros(1)}, {"modelspec.title": "My SDXL Lightning"})
    assert "(Lightning, by 'My SDXL Lightning' in its header)" in note(Named("mine", path=file))
    write_tensors(file, {"time_embedding.cond_proj.weight": torch.zeros(1)}, {})
    assert "(LCM, by the guidance that its U-Net embeds)" in note(Named("mine", path=file))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    assert "(LCM, by its LCMScheduler)" in note(Named("mine", path=tmp_path))
    assert "(distilled, by the guidance that it does not take)" in note(Named("mine", "flux", guidance="none"))


def test_of_embedded_guidance_a_run_says_what_is_given() -> None:
    said = note(Named("flux1-dev", "flux", guidance="embedded"), guidance=3.5)
    assert said == "flux1-dev takes guidance as an input: teacher and student are given 3.5, in one forward"


@pytest.mark.parametrize(("name", "says"), [("sd_xl_turbo_1.0_fp16", True), ("small", False)])
def test_a_run_begins_with_it(name: str, says: bool, tmp_path: Path) -> None:
    host = SmallHost()
    host.name = name
    notes = run(tmp_path / "run", small(steps=1), host=host).notes
    assert any("draws in few steps already (sdxl-turbo-1, by its name)" in note for note in notes) == says
