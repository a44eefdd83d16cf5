"""OneStep Doctor in a running ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.comfy


def test_it_says_what_serves_and_names_no_folder(comfy_server: Any) -> None:
    finished = comfy_server.run({"1": {"class_type": "OneStepDoctor", "inputs": {}}})
    assert not finished.error, finished.error
    (output,) = finished.outputs.values()
    lines = "".join(output["text"]).splitlines()
    told = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert told["attention by sdpa"] == "works"
    for op in ("add_lora", "gated", "steered_attention"):
        assert "serves" in told[op] and "triton: " in told[op]
    assert any(line.startswith("torch ") for line in lines) and any(line.startswith("ComfyUI ") for line in lines)
    assert "/" not in "".join(lines).replace("https://", "")
    assert torch.cuda.is_available() or told["gated"].startswith("plain torch serves (triton: ")
