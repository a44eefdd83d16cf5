"""model_samplings.py OUT: what is made of every kind of sampling of ComfyUI, and of some patched ones."""

import json
import sys
from pathlib import Path

import comfy.model_base as models
import comfy.model_sampling as sampling

from onestep.core.errors import OneStepError
from onestep.nodes.denoiser import ScaledTime, schedule_of


class Config:
    sampling_settings = {"zsnr": True}


def patched(*bases):
    return type("Patched", bases, {})()


found = {kind.name: models.model_sampling(Config, kind) for kind in models.ModelType}
found |= {
    "x0": patched(sampling.ModelSamplingDiscrete, sampling.X0),
    "a share of each time": patched(ScaledTime, sampling.EPS),
    "image to image on a flow's levels": patched(sampling.ModelSamplingDiscreteFlow, sampling.IMG_TO_IMG_FLOW),
    "EDM's times on discrete levels": patched(sampling.ModelSamplingDiscreteEDM, sampling.V_PREDICTION),
    "EDM's levels of a model that predicts noise": patched(sampling.ModelSamplingContinuousEDM, sampling.EPS),
}
report = {}
nitro = type("Nitro", (ScaledTime, sampling.EPS), {"time_scale": 0.25})()
times = [999, 749, 499, 249]
given = nitro.timestep(nitro.sigmas[times]).tolist()
for name, model_sampling in found.items():
    try:
        report[name] = type(schedule_of(model_sampling)).__name__
    except OneStepError as error:
        report[name] = str(error)
Path(sys.argv[1]).write_text(json.dumps({"served": report, "given": given}))
