"""plan.py OUT.png ADAPTERS FOLDER...: what the plan counts of the tiny MODELs in these folders, a line of JSON each; of
the first what the run of each of these adapters would need, by the node's settings and in its words, a line each; then
the node's own table and picture of the first."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from onestep.nodes.plan import PlanDistillation, settings_of
from onestep.nodes.shell import Shell
from onestep.nodes.tiny_models.model import load_tiny
from onestep.nodes.trainer import makers_of
from onestep.training.methods import settings_for
from onestep.training.plan.cards import card_of
from onestep.training.plan.ladder import planned
from onestep.training.plan.text import facts

out, adapters, folders = sys.argv[1], sys.argv[2].split(","), list(map(Path, sys.argv[3:]))
assert set(adapters) <= set(makers_of("adapter"))
settings = settings_for(method="regression", sizes="32x32", rank=8, batch=2, steps=1, watch_samples=4)
with torch.inference_mode():
    for folder in folders:
        model, _, vae = load_tiny(folder)
        shell = Shell(model, vae, "all")
        print(json.dumps(facts(planned(shell.name, shell.shell, settings, card_of("8GB")))))
        assert " at 0x" not in shell.configuration  # by which a count is found again on another day
        # the plugged model is as it was
        assert not any(value.is_meta for part in (model.model, vae.first_stage_model) for value in part.parameters())
    model, _, vae = load_tiny(folders[0])
    few = {"student_steps": "1", "sizes": "32x32", "batch": 2, "steps": 1, "watch_samples": 4}
    for name in adapters:
        said = PlanDistillation.execute(model, "", "Balanced", {"method": name}, vae=vae, **few).result[0]
        shell = Shell(model, vae, "all")
        told = facts(planned(shell.name, shell.shell, settings_of({"method": name}, "Balanced", **few), None))
        print(json.dumps({"said": said, **told}))
    widgets = {"student_steps": "1", "sizes": "32x32", "rank": 4, "batch": 4}
    answer = PlanDistillation.execute(model, "RTX 3060", "Fast", {"method": "by preset"}, vae=vae, **widgets)
text, picture = answer.result
Image.fromarray((picture[0].numpy() * 255).astype("uint8")).save(out)
print(json.dumps(text))
