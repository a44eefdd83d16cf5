"""steer_compiled.py: steering and torch.compile, with ComfyUI's own options and without; one line of JSON of errors."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from comfy_steering import FORMS, condition, empty_for, tiny, x0_of

from onestep.core.guidance import Steering
from onestep.nodes.steer import steered_model

SHARES = (0.1, 0.6)
told = {}


def compiled(model, guarded):
    """As ComfyUI's TorchCompileModel does it: without guards on patches, unless ``guarded``."""
    clone = model.clone(disable_dynamic=True)
    options = None if guarded else {"guard_filter_fn": skip_torch_compile_dict}
    set_torch_compile_wrapper(clone, backend="eager", options=options)
    return clone


def measured(kind, guarded, forms):
    """Errors of the compiled network in turn: plain, steered, steered in a part of the schedule, and plain again."""
    torch._dynamo.reset()
    model, positive, negative = tiny(kind), condition(kind, 9, 1), condition(kind, 5, 2)
    fast, errors = compiled(model, guarded), []

    def compare(ours, expected):
        ours, expected = (x0_of(one, positive, shares=SHARES) for one in (ours, expected))
        errors.append(float((ours - expected).abs().max() / expected.std()))

    compare(fast, model)

    def clone(model, *limits):
        return steered_model(model, negative, steering, *limits, empty=empty_for(negative))

    for form in forms:
        steering = Steering(**FORMS[form])
        compare(clone(fast), clone(model))
        compare(compiled(clone(model), guarded), clone(model))
        compare(clone(fast, 0.0, 0.5), clone(model, 0.0, 0.5))
        compare(fast, model)
    return {"errors": max(errors), "frames": dict(torch._dynamo.utils.counters["frames"])}


with torch.inference_mode():
    told["sd15"] = measured("sd15", False, ("nasa", "vsf", "perp"))
    told["flux"] = measured("flux", False, ("vsf", "nag"))
    told["flux2"] = measured("flux2", False, ("vsf", "nag"))
    told["pixart"] = measured("pixart", False, ("nag", "vsf"))
    told["wan"] = measured("wan", False, ("nasa",))
    told["sd3"] = measured("sd3", False, ("nag", "perp"))
    told["sd3 guarded"] = measured("sd3", True, ("nag",))
print(json.dumps(told))
