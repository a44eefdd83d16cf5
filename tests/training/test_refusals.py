"""What cannot be distilled is refused before anything is written, in a word and with what to do."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from small_host import PROMPTS, SmallHost, small
from whole_runs import run

from onestep.core.errors import OneStepError
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.training.distil import distil

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "0 prompts: give 1 to"),
    "an empty prompt": ({"prompts": ["a", "  "]}, "prompt 2 is empty"),
    "a long prompt": ({"prompts": ["x" * 10_000]}, "prompt 1 has 10000 characters"),
    "a size it cannot draw": ({"settings": small(sizes="32x32,1024x32")}, "small draws up to 512 pixels, not 1024x32"),
    "a LoRA that is not there": ({"settings": small(initial_lora="/nowhere/x.safetensors")}, "Cannot read"),
    "an optimiser that is not there": ({"settings": small(optimizer="adamw8bit")}, "bitsandbytes cannot be imported"),
    "an unknown word for an existing run": ({"existing": "contniue"}, "did you mean 'continue'"),
    "NaN weights": ({"spoil": math.nan}, "small is damaged: 1 of its layers .*conv_in the first"),
    "infinite weights": ({"spoil": math.inf}, "small is damaged"),
    "noise from pure noise": ({"schedule": VPSchedule.scaled_linear(zero_terminal=True)}, "v-prediction most likely"),
    "tokens' norms of noise": (
        {"settings": small(token_norm="on")},
        "models that predict a velocity, which small is not",
    ),
    "tokens' norms of no guidance": (
        {"settings": small(token_norm="on"), "schedule": FlowSchedule(), "guidance": "embedded"},
        "classifier-free guidance, by which small is not drawn",
    ),
    "a base without a null": ({"guidance": "none"}, "no trained null condition.*set it to 1"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=list(BAD))
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # whether it is installed or not
    host = SmallHost()
    host.denoiser.guidance = changes.get("guidance", "cfg")
    host.denoiser.schedule = changes.get("schedule", host.denoiser.schedule)
    host.network.conv_in.weight[0, 0, 0, 0] = changes.get("spoil", 0.0)
    how = {"existing": changes.get("existing", "stop")}
    with pytest.raises(OneStepError, match=words) as caught:
        distil(host, changes.get("prompts", PROMPTS), changes.get("settings", small()), tmp_path / "run", **how)
    assert len(str(caught.value)) < 400 and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OneStepError, match="cannot be made"):
        run(tmp_path / "file" / "run")
    with pytest.raises(OneStepError, match="cannot be made"):
        run(tmp_path / "file")


@pytest.mark.parametrize("guidance", ["none", "embedded"])
def test_a_base_without_a_null_trains_without_guidance(tmp_path: Path, guidance: str) -> None:
    host = SmallHost()
    host.denoiser.guidance = guidance  # type: ignore[assignment]
    assert run(tmp_path / "run", small(matching_guidance=1.0), host=host).updates == 9
