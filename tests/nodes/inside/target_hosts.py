"""target_hosts.py FOLDER CASE...: the cases' networks, built from ComfyUI's own classes with the weights of diffusers'.

Reads CASE.json (ComfyUI's unet_config), CASE.weights / .inputs / .lora.safetensors; writes CASE.out.safetensors and
CASE.report.json for the test to compare.
"""

import json
import logging
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models as supported
import comfy.utils
import torch
from comfy.supported_models_base import BASE
from comfy_networks import MAPS, as_published, fill, place_of
from safetensors.torch import load_file, save_file

from onestep.core.checkpoint import clone_inputs
from onestep.core.families import FAMILIES, bind_comfy, blocks_of, detect
from onestep.core.features import Features
from onestep.core.lora_file import fit, load_lora
from onestep.core.roles import Roles
from onestep.core.targets import Target, is_adaptable
from onestep.nodes.rotary import training_options


class SmallUNet(BASE):
    """Any U-Net: ComfyUI itself only knows the published widths."""

    unet_config, unet_extra_config, latent_format = {}, {}, supported.SD15.latent_format
    memory_usage_factor = 1.0


CLASSES = {"unet": SmallUNet, "sd3": supported.SD3, "flux": supported.Flux, "z_image": supported.ZImage}
CLASSES |= {"flux2": supported.Flux2, "qwen_image": supported.QwenImage}
CLASSES |= {"flux2": supported.Flux2, "anima": supported.Anima}
CLASSES |= {"krea2": supported.Krea2, "wan": supported.WAN21_T2V}
CLASSES |= {"chroma": supported.Chroma, "lumina2": supported.Lumina2}
CLASSES["pixart"] = supported.PixArtSigma


def build(family, config, dtype):
    settings = CLASSES[family]({**config})
    settings.set_inference_dtype(dtype, None)
    model = settings.get_model({}, "", device="cpu")
    as_published(model.diffusion_model)
    return model.to(dtype)


def predict(family, network, inputs):
    if family in ("flux", "flux2"):
        return network(inputs["x"], inputs["time"], inputs["text"], inputs.get("pooled"), inputs["guidance"])
    if family == "chroma":
        return network(inputs["x"], inputs["time"], inputs["text"], torch.zeros_like(inputs["time"]))
    if family in ("qwen_image", "krea2", "wan"):
        return network(inputs["x"].unsqueeze(2), inputs["time"], inputs["text"]).squeeze(2)
    if family in ("z_image", "lumina2"):
        return network(inputs["x"], inputs["time"], inputs["text"], inputs["text"].shape[1], transformer_options={})
    if family == "anima":
        options = training_options(family)
        return network(inputs["x"].unsqueeze(2), inputs["time"], inputs["text"], transformer_options=options).squeeze(2)
    y = inputs.get("y", inputs.get("pooled"))
    return network(inputs["x"], inputs["time"], context=inputs["text"], **({} if y is None else {"y": y}))


def changed_in_place(network):
    """Flux' blocks add to x, in place, what they computed from these norms of x."""
    norms = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    return [module for path, module in network.named_modules() if path.split(".")[-1] in norms]


def adapted(family, network, targets, state, inputs):
    """The prediction with adapters on all targets, and the gradients of input and factors, in the network's dtype."""
    roles = Roles(targets)
    roles.load("student", state)
    roles._factors["student"] = {
        name: tuple(factor.detach().to(inputs["x"]).requires_grad_(True) for factor in factors)
        for name, factors in roles._factors["student"].items()
    }
    x = inputs["x"].clone().requires_grad_(True)
    roles.install()
    try:
        with clone_inputs(changed_in_place(network)), roles.use("student"), roles.capture(len(x)):
            prediction = predict(family, network, {**inputs, "x": x})
    finally:
        roles.remove()
    (prediction * inputs["g"]).sum().backward()
    out = {"adapted": prediction.detach(), "grad": x.grad}
    for name, factors in roles._factors["student"].items():
        for letter, factor in zip("AB", factors, strict=True):
            out[f"{letter}|{name}"] = torch.zeros_like(factor) if factor.grad is None else factor.grad
    return out


def features(family, network, targets, inputs, count):
    """What each of ``count`` blocks gives, by its name."""
    looked_at = Features({target.name: target for target in targets}, blocks_of(network), count)
    with torch.no_grad(), looked_at.kept(inputs["x"]) as found:
        predict(family, network, inputs)
    return {f"feature {name}": value for name, value in zip(looked_at.names, found, strict=True)}


def by_lora_loader(family, model, path, inputs):
    """What core's LoraLoader makes of the file: (prediction with merged weights, complaints it logged)."""
    complaints = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    merged, _ = comfy.sd.load_lora_for_models(patcher, None, comfy.utils.load_torch_file(str(path)), 1.0, 0.0)
    comfy.model_management.load_models_gpu([merged])
    with torch.no_grad():
        prediction = predict(family, merged.model.diffusion_model, inputs)
    merged.unpatch_model()
    logging.getLogger().removeHandler(handler)
    # Two patchers on one model, as here, are not usual: that one warning is ours.
    return prediction, [text for text in complaints if "memory leak" not in text]


def native_lora(family, network, path):
    """A LoRA in ComfyUI's own names of what is adapted: fused layers, its order of rows, alpha half the rank."""
    draw, tensors = torch.Generator().manual_seed(5), {}
    for name, module in network.named_modules():
        if is_adaptable(module) and not FAMILIES[family].reason(name):
            target = Target(name, module)
            a, b = (torch.randn(shape, generator=draw) for shape in (target.shape_a(4), target.shape_b(4)))
            key = f"diffusion_model.{name}"
            tensors |= {f"{key}.lora_down.weight": a / a[0].numel() ** 0.5, f"{key}.lora_up.weight": 0.3 * b}
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def table_of(targets, network):
    """Our table in ComfyUI's words: name -> [key of the weight, first row, rows, order of the rows]."""
    paths = {id(module): path for path, module in network.named_modules()}
    order = lambda target: None if target.permutation is None else target.permutation.tolist()  # noqa: E731
    return {t.name: [f"{paths[id(t.module)]}.weight", t.row_range[0], t.out_rows, order(t)] for t in targets}


def their_table(family, key_map, network):
    """The same from ComfyUI's own map, for the layers that exist and are adapted."""
    state, table = network.state_dict(), {}
    for name, entry in key_map.items():
        key, rows, change = place_of(entry)
        adapted_here = key in state and not FAMILIES[family].reason(key.removesuffix(".weight"))
        if name.endswith(".weight") and adapted_here and state[key].ndim > 1:
            start, length = (0, len(state[key])) if rows is None else rows[1:]
            order = None if change is None else change(torch.arange(len(state[key]))).tolist()
            table[name.removesuffix(".weight")] = [key, start, length, order]
    return table


def without_reason(family, targets, network):
    """Weights that are neither in the table nor known as not adapted."""
    bound = {id(target.module) for target in targets}
    held = {path for path, module in network.named_modules() if path and id(module) in bound}
    # of the root's own weights the names
    owners = {name.rpartition(".")[0] or name for name, _ in network.named_parameters()} - held
    return sorted(path for path in owners if not FAMILIES[family].reason(path))


def run(folder, case):
    told = json.loads((folder / f"{case}.json").read_text())
    family, config, dtype = told["family"], told["unet_config"], getattr(torch, told["dtype"])
    weights, inputs = (load_file(folder / f"{case}.{part}.safetensors") for part in ("weights", "inputs"))
    lora = folder / f"{case}.lora.safetensors"
    model = build(family, config, dtype)
    network, key_map = model.diffusion_model.requires_grad_(False), MAPS[family](config)
    unwritten = fill(family, model, weights, config)
    targets = bind_comfy(detect(network), network, model.model_config.unet_config)
    state = fit(load_lora(lora, [target.name for target in targets]).state, targets)
    with torch.no_grad():
        out = {"plain": predict(family, network, inputs)}
    out |= features(family, network, targets, inputs, told["features"])
    out |= adapted(family, network, targets, state, inputs)
    out["merged"], complaints = by_lora_loader(family, model, lora, inputs)
    native = native_lora(family, network, folder / f"{case}.native.safetensors")
    out["native_merged"], more = by_lora_loader(family, model, native, inputs)
    imported = load_lora(native, [target.name for target in targets], family)
    out["native"] = adapted(family, network, targets, fit(imported.state, targets), inputs)["adapted"]
    complaints += more
    with torch.no_grad():
        out["after"] = predict(family, network, inputs)
    report = {"unwritten": unwritten, "complaints": complaints, "names": [target.name for target in targets]}
    report |= {"table": table_of(targets, network), "theirs": their_table(family, key_map, network)}
    report |= {"without_reason": without_reason(family, targets, network)}
    save_file({key: value.contiguous() for key, value in out.items()}, folder / f"{case}.out.safetensors")
    (folder / f"{case}.report.json").write_text(json.dumps(report))


comfy.model_management.in_training = True
for case in sys.argv[2:]:
    run(Path(sys.argv[1]), case)
