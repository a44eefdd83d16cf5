"""cost_rows.py: what the rows of benchmarks/cost.py find on toys, as differences from NAG's row in its deviations."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

import cost
import cost_comfy
import torch

told = {}
with torch.inference_mode():
    for name in ("toy-sd15", "toy-sd3", "toy-flux", "toy-flux2"):
        makers = cost_comfy.makers(cost.CASES[name], torch.device("cpu"), torch.float32, "")
        found = {row: make()()[1].clone() for row, make in makers.items()}
        nag, scale = found["NAG"], float(found[cost.PLAIN].std())
        told[name] = {row: float((x0 - nag).abs().max()) / scale for row, x0 in found.items()}
print(json.dumps(told))
