"""steer_beside.py: steering beside whatever else a run holds; one line of JSON, name -> relative errors or facts."""

import gc
import json
import logging
import sys
import weakref
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management as management
import comfy.ops
import comfy.sd
import node_helpers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_doubled import doubled
from comfy_steering import FORMS, KINDS, condition, empty_for, fill, hooked, look, noise_of, shape_of, tiny, x0_of

import nodes as core
from onestep.core.guidance import DEFAULTS, Steering
from onestep.nodes.steer import NegativeSteeringNode, steered_model

JOINT = ("sd3", "flux", "flux2", "z_image")
CROSS = ("sd15", "pixart")
SHARES = (0.1, 0.4, 0.6, 0.9)
told = {}


def case(*kinds):
    """Run a function for each kind of network; what it returns is told under its name."""

    def run(measure):
        for kind in kinds:
            told[f"{measure.__name__} {kind}"] = measure(kind, tiny(kind))
        return measure

    return run


@torch.no_grad()
def apart(ours, expected):
    return float((ours - expected).abs().max() / expected.std())


def by(form, model, negative, *limits):
    return steered_model(model, negative, Steering(**FORMS[form]), *limits, empty=empty_for(negative))


def texts(kind):
    return condition(kind, 9, 1), condition(kind, 5, 2), condition(kind, 9, 4)


@case(*CROSS, *JOINT)
def neutral(kind, model):
    """Bit for bit the plain MODEL's, and no patch on it."""
    positive, negative, _ = texts(kind)
    plain, fields = x0_of(model, positive), (2.5, 0.25, 0.0, 1.0)
    off = [NegativeSteeringNode.execute(model, negative, "NAG", 1.0, *fields).args[0]]
    off += [steered_model(model, negative, Steering("nag", 5.0, alpha=0.0))]
    off += [steered_model(model, negative, Steering("nasa", 0.0))]
    return all(torch.equal(x0_of(one, positive), plain) and not any(one.wrappers.values()) for one in off)


@case(*CROSS, *JOINT, "wan")
def defaults(kind, model):
    """0 of the scale, tau and alpha is the model's family's own."""
    positive, negative, _ = texts(kind)
    found = []
    for mode, numbers in DEFAULTS[{"sd15": "unet"}.get(kind, kind)].items():
        more = {"empty": empty_for(negative)}
        node = NegativeSteeringNode.execute(model, negative, mode.upper(), 0.0, 0.0, 0.0, 0.0, 1.0, **more).args[0]
        ours = x0_of(steered_model(model, negative, Steering(mode, *numbers), **more), positive)
        found.append(torch.equal(x0_of(node, positive), ours) and apart(ours, x0_of(model, positive)) > 0.01)
    return all(found)


@case(*CROSS, *JOINT)
def no_leak(kind, model):
    positive, one, two = texts(kind)
    plain = x0_of(model, positive)
    a, b = by("nasa", model, one), by("nag", model, two)
    first, second = x0_of(a, positive), x0_of(b, positive)
    untouched = not any(model.wrappers.values()) and model.model_options == {"transformer_options": {}}
    again = [torch.equal(x0_of(a.clone(), positive), first), torch.equal(x0_of(b, positive), second)]
    again += [torch.equal(x0_of(model, positive), plain), untouched]
    return all(again) and apart(first, second) > 0.01 and apart(first, plain) > 0.01


@case(*CROSS, *JOINT)
def forwards(kind, model):
    """The batch of each forward at CFG 1: one row a step."""
    positive, negative, _ = texts(kind)
    seen, clone = [], by("nasa", model, negative)

    def count(executor, x, *args, **kwargs):
        seen.append(len(x))
        return executor(x, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", count)
    x0_of(clone, positive, negative, shares=SHARES)
    return seen


@case(*CROSS)
def kept(kind, model):
    """How often a block makes the negative's keys in a run; they are gone with the run, however that ends."""
    positive, negative, _ = texts(kind)
    made, clone = [], by("nag", model, negative)

    def watch(module, given, out):
        made.extend([weakref.ref(out)] * (given[0].shape[1] == negative[0][0].shape[1]))

    def fail(executor, x, t, *args, **kwargs):
        if made and float(t[0]) < 1.0:
            raise KeyboardInterrupt
        return executor(x, t, *args, **kwargs)

    network = model.model.diffusion_model
    block = network.blocks[0] if kind == "pixart" else network.input_blocks[1][1].transformer_blocks[0]
    layer = block.cross_attn.kv_linear if kind == "pixart" else block.attn2.to_k
    handle = layer.register_forward_hook(watch)
    x0_of(clone, positive, shares=SHARES)
    count, broken = len(made), clone.clone()
    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "fail", fail)
    try:
        x0_of(broken, positive, shares=SHARES)
    except KeyboardInterrupt:
        count = [count, len(made)]
    handle.remove()
    gc.collect()
    return count, [one() is None for one in made]


@case(*CROSS, *JOINT)
def guided(kind, model):
    """With CFG on: the positive's rows are steered, the others are the plain MODEL's, in one batch or in two."""
    positive, negative, other = texts(kind)
    found = []
    for form in FORMS:
        for unconditional in (other, condition(kind, 4, 5)):
            clone, seen = by(form, model, negative), []
            clone.set_model_sampler_pre_cfg_function(lambda told, seen=seen: seen.extend(told["conds_out"]) or seen)
            x0_of(clone, positive, unconditional, cfg=3.0)
            found.append(apart(seen[0], x0_of(by(form, model, negative), positive)[0]))
            found.append(apart(seen[1], x0_of(model, unconditional)[0]))
    return max(found)


@case("sd3")
def said(kind, model):
    """How often the log speaks of CFG: once a run where it is on."""
    positive, negative, other = texts(kind)
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    clone, count = by("nasa", model, negative), []
    for cfg in (1.0, 3.0):
        x0_of(clone, positive, other, cfg=cfg, shares=SHARES)
        count.append(sum("CFG is on" in line for line in lines))
    logging.getLogger().removeHandler(handler)
    return count


@case(*CROSS, *JOINT)
def ranges(kind, model):
    """Outside the range bit for bit the plain network; the negative's own ranges act as ours; several texts join."""
    positive, one, two = texts(kind)
    plain, whole, other = (
        x0_of(m, positive, shares=SHARES) for m in (model, by("perp", model, one), by("perp", model, two))
    )
    early = node_helpers.conditioning_set_values(one, {"start_percent": 0.0, "end_percent": 0.5})
    late = node_helpers.conditioning_set_values(two, {"start_percent": 0.5, "end_percent": 1.0})
    for clone in (by("perp", model, one, 0.0, 0.5), by("perp", model, early)):
        x0 = x0_of(clone, positive, shares=SHARES)
        assert torch.equal(x0[:2], whole[:2]) and torch.equal(x0[2:], plain[2:])
    x0 = x0_of(by("perp", model, early + late), positive, shares=SHARES)
    assert torch.equal(x0[:2], whole[:2]) and torch.equal(x0[2:], other[2:])
    if kind == "flux2":  # which numbers the tokens of each text: their order is no matter
        return apart(*(x0_of(by("perp", model, texts), positive) for texts in (one + two, two + one)))
    joined, alike = ([[text, one[0][1]]] for text in (torch.cat((one[0][0], two[0][0]), 1), two[0][0]))
    if kind in ("sd3", "flux"):  # each text under its own pooled vector
        assert apart(x0_of(by("perp", model, one + two), positive), x0_of(by("perp", model, joined), positive)) > 1e-3
    return apart(x0_of(by("perp", model, one + alike), positive), x0_of(by("perp", model, joined), positive))


@case(*CROSS, *JOINT)
def zero_out(kind, model):
    """ConditioningZeroOut is a negative like any other, but for VSF; against itself nothing breaks."""
    positive, negative, _ = texts(kind)
    zero, found = core.ConditioningZeroOut().zero_out(negative)[0], []
    for name, form in ((name, form) for name, form in FORMS.items() if name != "vsf"):
        clone = by(name, model, zero)
        if kind in JOINT:
            expected = doubled(model, positive, zero, form)
        else:
            with hooked(model, zero[0][0], form):
                expected = x0_of(model, positive)[0]
        found.append(apart(x0_of(clone, positive)[0], expected))
        assert bool(x0_of(clone, zero).isfinite().all())
    return max(found)


@case(*CROSS, *JOINT)
def batches(kind, model):
    """Different prompts, and different negatives, in one batch: each row as if it were alone."""
    noise = noise_of(model, 2)
    ours, single = [condition(kind, 9, seed, batch=2) for seed in (1, 2)], []
    both = x0_of(by("perp", model, ours[1]), ours[0], noise=noise)[0]
    for row in (0, 1):
        lone = [[[c[0][0][row : row + 1], {"pooled_output": c[0][1]["pooled_output"][row : row + 1]}]] for c in ours]
        single.append(x0_of(by("perp", model, lone[1]), lone[0], noise=noise[row : row + 1])[0, 0])
    guided = x0_of(by("perp", model, ours[1]), ours[0], condition(kind, 9, 7), cfg=1.0 + 1e-4, noise=noise)[0]
    return apart(both, torch.stack(single)), apart(guided, torch.stack(single)) < 1e-2


@case("sd15", *JOINT)
def areas(kind, model):
    """Each area of the positive is steered on its own part of the latents."""
    left, negative, right = texts(kind)
    halves = [left, right]
    placed = [node_helpers.conditioning_set_values(half, {"area": (8, 4, 0, 4 * i)}) for i, half in enumerate(halves)]
    clone, noise = by("nasa", model, negative), noise_of(model)
    crops = [x0_of(clone, half, noise=noise[..., 4 * i : 4 * i + 4]) for i, half in enumerate(halves)]
    return apart(x0_of(clone, placed[0] + placed[1]), torch.cat(crops, -1))


@case("sd15", "sdxl")
def ip_adapter(kind, model):
    """A patch that adds what a reference picture says: Z+ is its result, whether it comes before or after."""
    positive, negative, _ = texts(kind)
    pictures = {width: torch.randn(2, 4, width, generator=torch.Generator().manual_seed(5)) for width in (64, 128)}

    def patch(q, k, v, options):
        heads = options["n_heads"]
        keys, values = pictures[q.shape[2]].split(1)
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, keys, values, heads)

    def patched(model):
        clone = model.clone()
        places = [(name, number) for name in ("input", "middle", "output") for number in range(8)]
        for index in (None, 0, 1):  # some packs name the block alone
            for place in places:
                clone.set_model_attn2_replace(patch, *place, index)
        return clone

    def extra(q):
        keys, values = (
            p.unflatten(2, (q.shape[1], -1)).transpose(1, 2) for p in pictures[q.shape[1] * q.shape[3]].split(1)
        )
        return 0.5 * look(q, keys, values)

    found = []
    for name, form in FORMS.items():
        with hooked(model, negative[0][0], form, extra):
            expected = x0_of(model, positive)
        found.append(apart(x0_of(by(name, patched(model), negative), positive), expected))
        found.append(apart(x0_of(patched(by(name, model, negative)), positive), expected))
    return max(found)


@case("sd35")
def earlier_override(kind, model):
    """An override that was there keeps the picture's own attention, and only that."""
    positive, negative, _ = texts(kind)
    seen, before = [], model.clone()

    def override(attend, q, k, v, *args, **kwargs):
        seen.append(k.shape[1])
        return attend(q, k, v, *args, **kwargs)

    before.model_options["transformer_options"]["optimized_attention_override"] = override
    error = apart(x0_of(by("nag", before, negative), positive), x0_of(by("nag", model, negative), positive))
    return error, seen


@case("sd15")
def controlnet(kind, model):
    """A ControlNet sees the positive alone; the negative's own is not used."""
    positive, negative, _ = texts(kind)
    layout = {**KINDS[kind][1], "num_heads": 8, "hint_channels": 3}
    network = comfy.cldm.cldm.ControlNet(**layout, dtype=torch.float32, operations=comfy.ops.manual_cast)
    fill(network)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu")).set_cond_hint(picture, 0.8)
    controlled = node_helpers.conditioning_set_values(positive, {"control": net})
    with hooked(model, negative[0][0], FORMS["nasa"]):
        expected = x0_of(model, controlled)
    clone, idle = by("nasa", model, negative), node_helpers.conditioning_set_values(negative, {"control": net})
    assert torch.equal(x0_of(by("nasa", model, idle), controlled), x0_of(clone, controlled))
    return apart(x0_of(clone, controlled), expected), apart(x0_of(clone, positive), expected) > 0.01


@case("inpaint")
def inpainting(kind, model):
    """A model that is told a picture as well; the negative has none."""
    positive, negative, _ = texts(kind)
    shape = shape_of(model)
    with_picture = {"concat_latent_image": torch.ones(1, *shape), "concat_mask": torch.ones(1, 1, *shape[1:])}
    positive = node_helpers.conditioning_set_values(positive, with_picture)
    with hooked(model, negative[0][0], FORMS["nag"]):
        expected = x0_of(model, positive)
    return apart(x0_of(by("nag", model, negative), positive), expected)


def lora(strength=1.0):
    """Of every key and value projection that reads the text."""
    names = [
        n for n, m in tiny("sd15").model.diffusion_model.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    shapes = {n: m.weight.shape for n, m in tiny("sd15").model.diffusion_model.named_modules() if n in names}
    draw = torch.Generator().manual_seed(6)
    file = {}
    for name, (rows, columns) in shapes.items():
        file[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=draw) * strength
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, columns, generator=draw) * columns**-0.5
    return file


@case("sd15")
def loras(kind, model):
    """On to_k and to_v: merged before or after, or added by hooks in the forward."""
    positive, negative, _ = texts(kind)
    found = []
    for load in (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models):
        changed = load(model, None, lora(), 1.0, 0.0)[0]
        with hooked(changed, negative[0][0], FORMS["nag"]):
            expected = x0_of(changed, positive)
        found.append(apart(x0_of(by("nag", changed, negative), positive), expected))
        after = load(by("nag", model, negative), None, lora(), 1.0, 0.0)[0]
        found.append(apart(x0_of(after, positive), expected))
        assert apart(x0_of(by("nag", model, negative), positive), expected) > 0.01
    return max(found)


@case("sd15")
def weight_hooks(kind, model):
    """A LoRA whose strength changes with the steps: keys and values are made anew each time."""
    positive, negative, _ = texts(kind)
    hooks, frames = comfy.hooks.create_hook_lora(lora(), 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    for strength, share in ((0.0, 0.0), (1.0, 0.3), (0.5, 0.8)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=share))
    hooks.set_keyframes_on_hooks(frames)
    positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    with hooked(model, negative[0][0], FORMS["nag"]):
        expected = x0_of(model, positive, shares=SHARES)
    x0 = x0_of(by("nag", model, negative), positive, shares=SHARES)
    return max(apart(x0[i], expected[i]) for i in range(len(SHARES)))


@case(*CROSS, *JOINT)
def deep_clone(kind, model):
    """Modules are those of the network that runs."""
    positive, negative, _ = texts(kind)
    clone = by("nag", model, negative)
    return apart(x0_of(clone.clone(force_deepcopy=True), positive), x0_of(clone, positive))


@case(*CROSS, *JOINT)
def training(kind, model):
    """Not active inside training."""
    positive, negative, _ = texts(kind)
    management.in_training = True
    try:
        return torch.equal(x0_of(by("nag", model, negative), positive), x0_of(model, positive))
    finally:
        management.in_training = False


@case(*CROSS, *JOINT)
def dtypes(kind, model):
    """In half precision as near to float32 as the plain network is, or nearly."""
    positive, negative, _ = texts(kind)
    found = {}
    for name in ("bfloat16", "float16"):
        half = tiny(kind, getattr(torch, name))
        loss = apart(x0_of(half, positive), x0_of(model, positive))
        ours = [
            apart(x0_of(by(form, half, negative), positive), x0_of(by(form, model, negative), positive))
            for form in FORMS
        ]
        found[name] = max(ours) / loss
    return found


print(json.dumps(told))
