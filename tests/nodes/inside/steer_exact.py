"""steer_exact.py CHECKPOINTS: a steered MODEL against the doubled form, or steering behind attention."""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import torch
from comfy_doubled import doubled
from comfy_steering import FORMS, checkpoint, condition, empty_for, hooked, tiny, x0_of

from onestep.core.adapter_file import save_adapter
from onestep.core.guidance import Steering
from onestep.core.guidance_adapter import new_adapter
from onestep.nodes.guidance_adapter import guided_model, targets_of
from onestep.nodes.steer import steered_model

NETWORKS = ("sd15", "sd2", "sdxl", "sd3", "sd35", "flux", "flux2", "z_image", "qwen_image", "chroma", "krea2", "wan")
NETWORKS += ("pixart",)
LENGTHS = {"longer": (5, 9), "equal": (7, 7), "together as long as the video": (20, 12)}


def measured(model, kind, form, lengths=(9, 5), **told):
    """Largest error, and the effect of steering, in the oracle's standard deviations."""
    positive, negative = condition(kind, lengths[0], 1), condition(kind, lengths[1], 2)
    positive[0][1] |= told
    ours = x0_of(steered_model(model, negative, Steering(**form), empty=empty_for(negative)), positive)[0]
    if kind in ("sd3", "sd35", "flux", "flux2", "z_image", "qwen_image", "chroma", "krea2"):
        expected = doubled(model, positive, negative, form)
    else:
        with hooked(model, negative[0][0], form):
            expected = x0_of(model, positive)[0]
    scale = float(expected.std())
    apart = float((ours - expected).abs().max()) / scale
    return apart, float((x0_of(model, positive)[0] - expected).abs().max()) / scale


def padded(model, form):
    """As klein's encoder has it: 512 tokens, of which a mask shows the text's own at the front."""
    positive, negative = condition("flux2", 512, 1), condition("flux2", 512, 2)
    text, told = negative[0]
    negative = [
        [text, {"pooled_output": told["pooled_output"], "attention_mask": (torch.arange(512) < 9)[None].long()}]
    ]
    ours = x0_of(steered_model(model, negative, Steering(**form), empty=empty_for(negative)), positive)[0]
    if form["mode"] == "vsf":
        negative = [[text[:, :9], told]]
    expected = doubled(model, positive, negative, form, last=form["mode"] != "vsf")
    scale = float(expected.std())
    return float((ours - expected).abs().max()) / scale, float(
        (x0_of(model, positive)[0] - expected).abs().max()
    ) / scale


def under_guidance(model, family):
    """A MODEL under a guidance adapter away from its start, whose hooks are on the same layers."""
    with torch.inference_mode(False), tempfile.TemporaryDirectory() as folder:
        side = new_adapter({target.name: target for target in targets_of(model.model, family)}, family, 1)
        draw = torch.Generator().manual_seed(2)
        for _, value in sorted(side.named_parameters()):
            value.detach().add_(0.1 * torch.randn(value.shape, generator=draw))
        save_adapter(Path(folder) / "guide.safetensors", side, family)
        return guided_model(model, Path(folder) / "guide.safetensors", 4.0)


def every_form(model, kind, **told):
    return {name: measured(model, kind, form, **told) for name, form in FORMS.items()}


with torch.inference_mode():
    found = {kind: every_form(tiny(kind), kind) for kind in NETWORKS}
    folder = Path(sys.argv[1])
    found |= {f"{kind} checkpoint": every_form(checkpoint(folder, kind), kind) for kind in ("sd15", "sd3", "flux")}
    clip = SimpleNamespace(penultimate_hidden_states=torch.randn(1, 6, 1280))
    video = tiny("wan-i2v")
    found["wan-i2v"] = every_form(video, "wan-i2v", clip_vision_output=clip)
    found["wan-i2v without pictures"] = every_form(video, "wan-i2v")
    reference = {"reference_latents": [torch.randn(1, 16, 6, 4)]}
    found["flux with a reference picture"] = every_form(tiny("flux"), "flux", **reference)
    reference = {"reference_latents": [torch.randn(1, 128, 3, 2)]}
    found["flux2 with a reference picture"] = every_form(tiny("flux2"), "flux2", **reference)
    reference = {"reference_latents": [torch.randn(1, 16, 1, 6, 4)], "reference_latents_method": "index"}
    found["krea2 with a reference picture"] = every_form(tiny("krea2"), "krea2", **reference)
    found["flux2, padded behind"] = {name: padded(tiny("flux2"), form) for name, form in FORMS.items()}
    found["pixart under a guidance adapter"] = every_form(under_guidance(tiny("pixart"), "pixart"), "pixart")
    for kind in ("sd15", "sdxl"):
        behind = {name: {**form, "layers": "decoder"} for name, form in FORMS.items()}
        found[f"{kind}, decoder"] = {name: measured(tiny(kind), kind, form) for name, form in behind.items()}
    for kind in ("sd15", "sd3", "flux", "flux2", "krea2", "wan", "pixart"):
        model = tiny(kind)
        for name, lengths in LENGTHS.items():
            found[f"{kind}, {name}"] = {"nag": measured(model, kind, FORMS["nag"], lengths)}
print(json.dumps(found))
