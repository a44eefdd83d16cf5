"""onestep extract: a few-step checkpoint as a LoRA of the base that it came from."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..core.recipe.recognised import without_recipe
from .console import Console
from .lora import preset_recipe
from .model import open_host, parse_size, read_prompts
from .parser import existing_parent

MOST_SHOWN = 5
USUAL_PROMPTS = 8
"""More than a few tell the layers nothing new."""


def run(args: Namespace, console: Console) -> None:
    path = Path(args.out)
    existing_parent(path)
    if path.suffix != ".safetensors":
        raise OneStepError(f"--out is {path.name[:80]!r}: give a name that ends in .safetensors")
    for given in (args.model, args.few_step):
        _spare(Path(given).expanduser(), path)
    if args.prompts and not args.recipe:
        raise OneStepError("prompts are drawn by a recipe: name the few-step model's, like --recipe dmd2-4")
    prompts = read_prompts(args.prompts)[:USUAL_PROMPTS] if args.prompts else []
    from ..pipelines.extract import extract_lora

    host = open_host(args.model, device=args.device)
    recipe = preset_recipe(args.recipe, host) if args.recipe else None
    size = parse_size(args.size) if args.size else None
    with console.counted(len(host.denoiser.roles.targets), "layers") as more:
        seen = [0]

        def tick(done: int, of: int) -> None:
            more(done - seen[0])
            seen[0] = done

        found = extract_lora(
            host, args.few_step, path, args.rank, recipe, prompts, size, licenses=args.licenses, tick=tick
        )
    facts = {
        "path": str(path),
        "whole": asdict(found.whole),
        "apart": found.apart,
        "licences": found.licences,
        "beside": found.beside,
        "check": found.check,
        "layers": {name: asdict(kept) for name, kept in found.layers.items()},
    }
    silent = "" if recipe else without_recipe(Path(args.few_step), host.family)
    console.result("\n".join(lines(path, found, silent)), facts)


def _spare(model: Path, path: Path) -> None:
    """Raises OneStepError where the LoRA would be written over one of the models."""
    if path.resolve() == model.resolve() or (model.is_dir() and model.resolve() in path.resolve().parents):
        raise OneStepError(f"--out {str(path)[-100:]!r} would be written into a model: give another place")


def lines(path: Path, found: Any, silent: str) -> list[str]:
    """What the file holds: in all, and of the layers that it holds least of. silent: where it tells no recipe."""
    whole = found.whole
    said = [f"{path}: {len(found.layers)} layers", f"  keeps {whole.weights:.1%} of the difference of the weights"]
    if whole.outputs is not None:
        said.append(f"  keeps {whole.outputs:.1%} of what it changes in the layers' outputs, on these prompts")
    if found.apart is not None:
        said.append(f"  its latents are {found.apart:.2f} as far from the few-step model's as the base's are")
    if found.beside:
        said.append(f"  {found.beside} norms and biases differ too, which no LoRA holds")
    least = sorted(found.layers.items(), key=lambda item: item[1].weights)[:MOST_SHOWN]
    said.append(f"  least: {', '.join(f'{name} {kept.weights:.1%}' for name, kept in least)}")
    if silent:
        said.append(f"  {silent}")
    return [*said, f"  {found.licences}", f"  {found.check}"]
