"""From what a person types to what training and sampling take: a host, prompts, settings, a size."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import OneStepError
from ..training.engine.prompts import read_prompts as prompts_of
from ..training.presets import preset
from ..training.runs.files import read_json
from ..training.settings import Settings, size_list


def open_host(
    model: str, targets: str = "all", device: str | None = None, stored: bool = False, waiting: bool = False
) -> Any:
    """MODEL as a host (pipelines.adapt.DiffusersHost), its adapters' hooks installed. stored, waiting: as in `load`."""
    from ..core.spill import limit
    from ..pipelines.adapt import adapt
    from ..pipelines.load import load

    where = device_of(device)
    limit(where)
    return adapt(load(model, device=where, stored=stored, waiting=waiting), targets=targets, device=where)


def device_of(name: str | None) -> Any:
    """The device of this name, or the best one here. Raises OneStepError where there is none such."""
    import torch

    from ..pipelines.load import best_device

    if name is None:
        return best_device()
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().split("\n")[0][:120]
        raise OneStepError(f"device {name[:40]!r} cannot be used ({why}): give cpu, or leave --device out") from None


def read_prompts(file: str) -> list[str]:
    """The prompts of a text file, one a line. Raises OneStepError for a file that holds none, or no text."""
    return prompts_of(Path(file))


def read_settings(args: Namespace) -> tuple[Settings, set[str]]:
    """Preset, --method, --steps, --size, --seed and --set as settings, with the names of those that the person gave."""
    texts = dict(_pair(text) for text in args.set)
    named = {"method": args.method, "steps": args.steps, "sizes": args.size, "seed": args.seed}
    texts |= {name: value for name, value in named.items() if value is not None}
    given = set(texts)
    # what a preset is made of hangs on these
    first = {name: texts.pop(name) for name in ("method", "initial_lora") if name in texts}
    return preset(args.preset, **first).with_texts(texts), given


def run_config(folder: Path) -> dict[str, Any]:
    """The config of the run in ``folder``. Raises OneStepError for a folder that is no run's."""
    if not (folder / "config.json").is_file():
        raise OneStepError(
            f"{str(folder)[-200:]} is no run's folder (it holds no config.json): name the one given as --out"
        )
    config = read_json(folder / "config.json")
    if not (isinstance(config, dict) and isinstance(config.get("settings"), dict)):
        raise OneStepError(f"{folder / 'config.json'} is not a run's: restore the file")
    return config


def at_native_size(settings: Settings, given: set[str], host: Any) -> Settings:
    """Where no size was asked for, the model's own."""
    if "sizes" in given:
        return settings
    width, height = host.native_size
    return replace(settings, sizes=f"{width}x{height}")


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "512x512"."""
    sizes = size_list(text)
    if len(sizes) != 1:
        raise OneStepError(f"--size is {text[:60]!r}: give one size, like 512x512")
    return sizes[0]


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise OneStepError(f"--set {text[:80]!r} has no '=': write it like --set rank=32")
    return name.strip(), value.strip()
