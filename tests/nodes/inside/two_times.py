"""two_times.py FOLDER OUT: the times that a tiny model's network is told in ComfyUI, plain, at any time, towards a
level and towards a twin's; and a short run of meanflow."""

import json
import sys
from pathlib import Path

import torch

from onestep.core.continuous import continuous, leading
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny
from onestep.training.distil import distil
from onestep.training.methods import settings_for

FOLDER, OUT = Path(sys.argv[1]), Path(sys.argv[2])
TIMES, ENDS = [700.25, 300.5, 20.75], [100.75, 0.0, 20.75]
RUN = {"steps": 2, "sizes": "32x32", "rank": 2, "batch": 2, "pairs": 2, "teacher_steps": 2, "student_steps": 1}
RUN |= {"watch_every": 0, "preview_every": 0}
with torch.inference_mode():  # as nodes run
    model, clip, vae = load_tiny(FOLDER)
    with adapted(model, clip, vae) as host, host.training():
        schedule, seen = host.denoiser.schedule, []
        hook = host.network.register_forward_pre_hook(lambda module, args: seen.append(args[1].double().tolist()))
        cond = host.encode(["a red dragon", "wall", "sea"], (32, 32))
        x = torch.randn(3, *host.latent_shape((32, 32)))
        sigma, lower = (schedule.sigma_of_time(torch.tensor(times, dtype=torch.float64)) for times in (TIMES, ENDS))
        anywhere = continuous(host.denoiser)
        for denoise in (host.denoiser, anywhere, leading(anywhere, lower), leading(anywhere, -lower), host.denoiser):
            denoise(x, sigma, cond)
        hook.remove()
    with adapted(model, clip, vae) as host:
        made = distil(host, ["a red dragon", "wall"], settings_for("meanflow", **RUN), OUT.with_suffix(".run"))
OUT.write_text(json.dumps({"told": seen, "times": TIMES, "ends": ENDS, "updates": made.updates}))
