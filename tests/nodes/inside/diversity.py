"""diversity.py: the SIGMAS that Diversity Sigmas gives for pairs of models, and what it refuses; one line of JSON."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.model_sampling
from comfy_steering import tiny

from onestep.core.errors import OneStepError
from onestep.core.recipe import PRESETS, Recipe
from onestep.nodes.diversity import OneStepDiversitySigmas


def zero_terminal(model):
    """v-prediction to zero SNR, as ModelSamplingDiscrete with zsnr patches it."""

    class Told(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
        pass

    clone = model.clone()
    clone.add_object_patch("model_sampling", Told(model.model.model_config, zsnr=True))
    return clone


MODELS = {"sd15": tiny("sd15"), "sd3": tiny("sd3")}
MODELS["zero"] = zero_terminal(MODELS["sd15"])
RECIPES = PRESETS | {"quarters": Recipe((1000.0, 900.0, 750.0, 500.0), family="sd3", shift=3.0)}
CASES = {
    "one model": ("sd15", "sd15", "dmd2-4", 20, "simple", 0.0),
    "off the base's levels": ("sd15", "sd15", "hyper-sdxl-1-unet", 8, "simple", 0.8),
    "karras": ("sd15", "sd15", "dmd2-4", 10, "karras", 0.0),
    "flow": ("sd3", "sd3", "quarters", 8, "simple", 0.0),
    "a share": ("sd3", "sd3", "quarters", 8, "simple", 0.5),
    "noise, then flow": ("sd15", "sd3", "quarters", 10, "simple", 0.5),
    "flow, then noise": ("sd3", "sd15", "dmd2-4", 10, "simple", 0.6),
    "zero-terminal, then noise": ("zero", "sd15", "lcm-4", 4, "simple", 0.0),
    "one step": ("sd15", "sd15", "dmd2-4", 1, "simple", 0.0),
    "nothing left": ("sd15", "sd15", "sd-turbo-1", 20, "simple", 0.0),
    "above the base": ("sd15", "sd3", "quarters", 20, "simple", 0.98),
    "no share": ("sd15", "sd15", "dmd2-4", 20, "simple", float("nan")),
}


def answered(base, distilled, preset, *widgets):
    try:
        found = OneStepDiversitySigmas.execute(MODELS[base], MODELS[distilled], RECIPES[preset], *widgets).args
    except OneStepError as error:
        return str(error)
    assert all(str(sigmas.dtype) == "torch.float32" for sigmas in found)
    return [sigmas.tolist() for sigmas in found]


print(json.dumps({name: answered(*case) for name, case in CASES.items()}))
