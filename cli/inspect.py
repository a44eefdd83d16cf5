"""onestep inspect: what a LoRA's file holds, and how to sample it in ComfyUI and in diffusers."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..core.adapter_file import read_told
from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.ksampler import by_sigmas, core_nodes, same_sigmas
from ..core.licences import KEY, Source, license_line, sources_in
from ..core.lora_file import LoraFile, load_lora
from ..core.lora_second import TITLES, file_for
from ..core.recipe import Recipe
from ..core.recipe.recognised import Recognised, recognised
from ..core.schedule import FlowSchedule
from ..core.tensor_file import read_header
from .console import Console
from .lora import settings_in

SETTINGS, PROMPTS, HINT = "onestep.settings", "onestep.prompts", "modelspec.usage_hint"
LONG, LONG_HINT = 80, 1000
MOVED = "where it is another, ModelSamplingSD3 (of SD3 and Wan) or ModelSamplingAuraFlow (of others) sets it before"

# By the beginning of an adapter's kind: the node that takes it, and how it is drawn with in Python.
USES: dict[str, tuple[str, tuple[str, ...]]] = {
    "guidance": (
        "Apply Guidance Adapter, sampled at cfg 1",
        (
            "from onestep.pipelines.guidance_adapter import load_guidance_adapter",
            "dial = load_guidance_adapter(pipe, {path!r}, guidance=4)",
            'pipe("your prompt", guidance_scale=1)',
        ),
    ),
    "negative": (
        "Apply Negative Adapter, sampled at cfg 1, beside the few-step LoRA that it was trained with",
        (
            "from onestep.pipelines.negative_adapter import load_negative_adapter",
            'negative = pipe.encode_prompt("what to avoid", pipe.device, 1, False)[0]',
            "away = load_negative_adapter(pipe, {path!r}, negative)  # away.scale = 1.5, away.remove()",
            'pipe("your prompt", guidance_scale=1)',
        ),
    ),
    "control": (
        "Load Control Adapter, then Apply ControlNet, beside the one-step LoRA that it was trained with",
        (
            "fast = onestep.pipelines.OneStepPipeline.from_pipe(pipe)  # and fast.load_one_step_lora(...)",
            "fast.load_control({path!r})",
            'fast("your prompt", control_image=edges)  # the control itself, not the picture that it is of',
        ),
    ),
}


def run(args: Namespace, console: Console) -> None:
    path = Path(args.file)
    adapter = read_told(path)
    if adapter is not None:
        console.result(*of_adapter(path, adapter))
        return
    file = load_lora(path)
    facts = describe(file, path)
    console.result(told(facts), facts)


def of_adapter(path: Path, told: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What is said of an adapter's file, for a person and as plain values."""
    header = read_header(path)
    count = sum(math.prod(entry.shape) for entry in header.tensors.values())
    facts = {
        "path": str(path),
        "bytes": path.stat().st_size,
        "kind": told["kind"],
        "family": told["family"],
        "numbers": count,
        "settings": settings_in(header.metadata),
        "made_of": [asdict(source) for source in sources_in(header.metadata)],
    }
    title = FAMILIES[told["family"]].title if told["family"] in FAMILIES else repr(told["family"])
    lines = [f"{path}: an adapter ({told['kind']}) for {title}", f"  {count} numbers"]
    if licences := license_line(sources_in(header.metadata)):
        lines.append(f"  {licences}")
    node, calls = next((use for kind, use in USES.items() if told["kind"].startswith(kind)), ("", ()))
    if node:
        told_calls = (f"    {call.format(path=str(path))}" for call in calls)
        lines += [f"  ComfyUI: {node}", "  diffusers:", *told_calls]
    return "\n".join(lines), facts


def describe(file: LoraFile, path: Path) -> dict[str, Any]:
    """Everything that is said of a file, as plain values."""
    recipe = None if file.recipe is None else Recipe.from_json(file.recipe)
    taken, undecided = by_names(path, file) if recipe is None else (None, "")
    recipe = taken.recipe if taken else recipe
    ranks = sorted({len(a) for a, _ in file.state.values()})
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "family": file.family,
        "model": FAMILIES[file.family].title,
        "layers": len(file.state),
        "ranks": ranks,
        "unused": len(file.unused),
        "left_out": file.said,
        "taken_for": None if taken is None else asdict(taken),
        "undecided": undecided,
        "recipe": None if recipe is None else json.loads(recipe.to_json()),
        "comfyui": None if recipe is None else in_comfyui(recipe),
        "diffusers": None if recipe is None else in_diffusers(recipe, file_for(path, file.family, "diffusers")),
        "files": {title: file_for(path, file.family, host).name for host, title in TITLES.items()},
        "settings": settings_in(file.metadata),
        "made_of": [asdict(source) for source in sources_in(file.metadata)],
        "header": {name: text for name, text in sorted(file.metadata.items()) if name not in (SETTINGS, PROMPTS, KEY)},
    }


def by_names(path: Path, file: LoraFile) -> tuple[Recognised | None, str]:
    """What the names of a file without a recipe stand for; or between what they do not decide."""
    try:
        return recognised(path, file.metadata, file.family, "add --recipe NAME"), ""
    except OneStepError as error:
        return None, str(error)


def in_comfyui(recipe: Recipe) -> dict[str, Any]:
    """ComfyUI's own nodes for the family as it is published, or why none draw it."""
    schedule = usual = FAMILIES[recipe.family].schedule
    if recipe.shift is not None and isinstance(schedule, FlowSchedule):
        schedule = replace(schedule, shift=recipe.shift)
    found = core_nodes(recipe, schedule)
    if found.general is not None and recipe.sigmas and not same_sigmas(found.general.sigmas, recipe.sigmas):
        found = by_sigmas(recipe)  # of a base with a schedule of its own
    moved = "" if found.simple is None or schedule == usual else f", on a MODEL of shift {recipe.shift:g}: {MOVED}"
    return asdict(found) | {"words": f"{found}{moved}"}


def in_diffusers(recipe: Recipe, path: Path) -> list[str]:
    """Lines of Python that draw with a loaded `pipe`, or the reason why there are none."""
    from ..pipelines.plain import EITHER_GUIDANCE, GIVEN_SIGMAS, GUIDER, OWN_TOKENS, WITHOUT_T5, diffusers_settings

    try:
        settings = diffusers_settings(recipe)
    except OneStepError as error:
        return [f"# {error}"]
    changes = "".join(f", {name}={value!r}" for name, value in settings.changes.items())
    words = {name: f"{name}={value!r}" for name, value in settings.words.items()}
    guider = [GUIDER.format(settings.call["guidance_scale"])] if settings.modular else []
    if settings.modular:
        words = {name: word for name, word in words.items() if name != "guidance_scale"} | {"": 'output="images"'}
    if settings.embedded is not None:
        words["guidance_scale"] = EITHER_GUIDANCE.format(settings.call["guidance_scale"], settings.embedded)
    call = "".join(f", {word}" for word in words.values())
    if recipe.family == "sd3":
        call += f", {WITHOUT_T5}"
    if settings.latents_scale != 1:
        call += f", latents={settings.latents_scale!r} * noise"
    prompt = settings.prompt('"your prompt"')
    return [
        f"pipe.load_lora_weights({str(path)!r})",
        *([f"pipe.fuse_lora(lora_scale={recipe.lora_scale!r})"] if recipe.lora_scale != 1 else []),
        f"pipe.scheduler = diffusers.{settings.scheduler}.from_config(pipe.scheduler.config{changes})",
        *guider,
        *([GIVEN_SIGMAS.format(settings.by_scheduler)] if settings.by_scheduler else []),
        *([settings.noise_line()] if settings.latents_scale != 1 else []),
        *([OWN_TOKENS] if FAMILIES[recipe.family].longest else []),
        f"pipe({prompt}{call})",
    ]


def told(facts: dict[str, Any]) -> str:
    """The same for a person."""
    ranks = ", ".join(map(str, facts["ranks"]))
    unused = f"; {facts['left_out']}" if facts["left_out"] else ""
    lines = [
        f"{facts['path']}: a LoRA for {facts['model']}",
        f"  {facts['layers']} layers, rank {ranks}, {facts['bytes'] / 2**20:.1f} MiB{unused}",
    ]
    if facts["recipe"] is None:
        unsaid = facts["undecided"] or "onestep generate takes a preset with --recipe"
        lines.append(f"  It does not say how it is sampled: {unsaid}.")
    if taken := facts["taken_for"]:
        lines.append(f"  taken for {taken['preset']}, by {taken['evidence']} (--recipe says otherwise):")
    if facts["recipe"] is not None:
        lines += recipe_lines(facts)
    if HINT in facts["header"]:
        lines.append(f"  usage hint: {_short(facts['header'][HINT], LONG_HINT)}")
    changed = {
        name: value for name, value in facts["settings"].items() if name in ("method", "steps", "rank", "guidance")
    }
    if changed:
        lines.append("  trained with " + ", ".join(f"{name} {value}" for name, value in changed.items()))
    if len(set(facts["files"].values())) > 1:
        lines.append(f"  of two files: {', '.join(f'{name} for {title}' for title, name in facts['files'].items())}")
    if facts["made_of"]:
        lines.append("  " + license_line(Source(**source) for source in facts["made_of"]))
    return "\n".join([*lines, "header:", *(f"  {name}: {_short(text)}" for name, text in facts["header"].items())])


def recipe_lines(facts: dict[str, Any]) -> list[str]:
    recipe, core = facts["recipe"], facts["comfyui"]
    sizes = ", ".join(f"{width}x{height}" for width, height in recipe["sizes"]) or "any size"
    times = ", ".join(f"{time:g}" for time in recipe["timesteps"])
    between = ", fresh noise between them" if recipe["renoise"] else ""
    how = f"strength {recipe['lora_scale']:g}, guidance {recipe['guidance']:g}"
    if core["reason"]:
        comfy = f"Load One-Step LoRA, then One-Step Sample ({core['reason']})"
    else:
        comfy = f"LoraLoader, then {core['words']}"
    return [
        f"  draws in {len(recipe['timesteps'])} step(s) at time {times}{between}; {how}; trained at {sizes}",
        f"  ComfyUI: {comfy}",
        "  diffusers:",
        *(f"    {line}" for line in facts["diffusers"]),
    ]


def _short(text: str, most: int = LONG) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
