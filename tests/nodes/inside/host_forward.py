"""host_forward.py FOLDER INPUTS OUTPUTS: D and its gradients by ComfyUI's host, float64, for the test to compare."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onestep.core.cond import Cond
from onestep.nodes.adapt import adapted
from onestep.nodes.tiny_models.model import load_tiny

as_float = torch.Tensor.float
given = load_file(sys.argv[2])
with torch.inference_mode():  # as nodes run
    model, clip, vae = load_tiny(Path(sys.argv[1]))
    with adapted(model, clip, vae) as host:
        cond = host.encode(["a red dragon", "wall"], (32, 32))
        schedule = host.denoiser.schedule
        out = {"text": cond.text, "trailing": schedule.trailing(4), "time": schedule.time_of_sigma(given["sigma"])}
        out |= {"sigma": schedule.sigma_of_time(given["told"])}
        out |= {} if cond.pooled is None else {"pooled": cond.pooled}
        with host.training():
            torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else as_float(self)
            host.network.double()
            host.network.dtype = torch.float64
            told = host.model.model_sampling.timestep  # both hosts embed the time in float32
            host.model.model_sampling.timestep = lambda sigma: told(sigma).to(torch.float32)
            roles = host.denoiser.roles
            state = {name[2:]: (given[name], given["B/" + name[2:]]) for name in given if name.startswith("A/")}
            roles.load("student", state)
            for factor in roles.parameters("student"):
                factor.data = factor.data.double()
            roles.install()
            with roles.use("student"):
                x0 = host.denoiser(given["x"], given["sigma"], Cond(given["text"], pooled=given.get("pooled")))
            gradients = torch.autograd.grad((given["weight"] * x0).sum(), roles.parameters("student"))
    names = [f"{kind}/{name}" for name in sorted(state) for kind in "AB"]
    out |= {"x0": x0} | dict(zip(names, gradients, strict=True))
    with torch.inference_mode(False):
        save_file({name: value.detach().clone().contiguous() for name, value in out.items()}, sys.argv[3])
