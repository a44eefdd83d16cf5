"""The files that a run makes: a role's factors as a LoRA, one for each step or student where it has several, or its
adapter module; read back before they count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.adapter_file import check_adapter, save_adapter
from ...core.lora_file import save_lora
from ...core.lora_second import save_second, second_file
from ...core.memory import notice
from ...core.recipe import Recipe, step_names
from ...core.router import Router, router_file, save_router
from ..engine import processes
from ..engine.student import STUDENT
from ..host import Host
from ..settings import Settings
from .config import header_of


@dataclass(frozen=True)
class Writer:
    """Writes a run's files into its folder. recipe: how they are drawn; usage: the same in words."""

    host: Host
    texts: list[str]
    settings: Settings
    folder: Path
    recipe: Recipe
    usage: str

    def __call__(self, name: str, role: str, update: int, told: dict[str, str] | None = None) -> tuple[Path, str]:
        """The file ``name`` of what ``role`` holds after ``update``, and what its load-back proved; of several
        processes the first one writes it. told: more for its header."""
        path = self.folder / name
        if not processes.is_first():
            return path, ""
        header = header_of(self.host, self.texts, self.settings, self.folder.name) | (told or {})
        header |= {"onestep.role": role, "ss_steps": str(update)}
        return path, write_made(path, role, self.host, self.made(name), header, self.usage)

    def made(self, name: str) -> Recipe:
        """The recipe as the file ``name`` has it."""
        return in_files(self.recipe, name, self.host)


def in_files(recipe: Recipe, name: str, host: Host) -> Recipe:
    """``recipe`` as the file ``name`` has it: it names those of the steps, where each has its own."""
    steps = host.denoiser.roles.steps
    parts = steps.parts(STUDENT) if steps.router(STUDENT) is None else [STUDENT]
    return replace(recipe, files=step_names(name, len(parts)) if len(parts) > 1 else ())


def write_made(path: Path, role: str, host: Host, recipe: Recipe, header: dict[str, str], usage: str) -> str:
    """Write what ``role`` holds to ``path``, or to the recipe's files beside it; what loading it back has proven.

    usage: how a LoRA is drawn with.
    """
    roles, family = host.denoiser.roles, host.family
    if role in roles.modules and hasattr(roles.modules[role], "exported"):
        return _exported(path, role, host, recipe, header | {"modelspec.usage_hint": usage})
    if role in roles.modules:
        save_adapter(path, roles.modules[role], family, header | {"onestep.recipe": recipe.to_json()})
        return check_adapter(path, roles.modules[role], family)
    parts, router = roles.steps.parts(role), roles.steps.router(role)
    names = step_names(path.name, len(parts))
    if len(parts) > 1:
        usage = f"{usage.rstrip('.')}. {_usage_of_several(path, names, router)}"
    places, told, proven = [path.with_name(name) for name in names], recipe.to_json(), []
    header = header | {"modelspec.usage_hint": usage}
    for part, place in zip(parts, places, strict=True):
        save_lora(place, roles.state(part), family, told, header, host.loader)
        proven.append(host.check_file(place))
    second = second_file(path, family, host.loader)
    for at, name in enumerate(step_names(second.name, len(parts)) if second else ()):
        beside = places[at], path.with_name(name)
        proven.append(save_second(*beside, roles.state(parts[at]), family, told, header, host.loader))
    proven += [] if router is None else _routers(router, [path, *([second] if second else [])], family)
    return "; ".join(dict.fromkeys(filter(None, proven)))


def _routers(router: Router, firsts: Sequence[Path], family: str) -> list[str]:
    """The router's file beside each of the first students' files."""
    every = [(router_file(first), step_names(first.name, len(router))) for first in firsts]
    return [save_router(path, router, names, family) for path, names in every]


def _usage_of_several(path: Path, names: Sequence[str], router: Router | None) -> str:
    """How LoRAs are drawn with of which each is one step's or one student's."""
    if router is not None:
        return (
            f"One of {len(names)} students, each for prompts of its kind ({', '.join(names)}): "
            f"{router_file(path).name} tells which one draws a prompt."
        )
    return (
        f"Each step has a LoRA of its own ({', '.join(names)}): Load One-Step LoRA takes them all; with ComfyUI's own "
        "nodes it is one KSampler (Advanced) for each step, behind that step's LoRA."
    )


def _exported(path: Path, role: str, host: Host, recipe: Recipe, header: dict[str, str]) -> str:
    """As `write_made`, of an adapter module that is written as a LoRA: what of it that holds is told."""
    module, told = host.denoiser.roles.modules[role], recipe.to_json()
    state, held = module.exported()
    # ||D - B A|| / ||D||
    error = math.sqrt(max(0.0, 1 - held.weights))
    notice(
        f"{path.name} is a LoRA of rank {module.export_rank} of what was learnt: it holds {100 * held.weights:.1f} % "
        f"of its squared size, a relative error of {error:.3f}. What the watch measured is the student itself"
    )
    header |= {"onestep.export_error": f"{error:.6f}"}
    save_lora(path, state, host.family, told, header, host.loader)
    proven = [host.check_file(path)]
    second = second_file(path, host.family, host.loader)
    if second is not None:
        proven.append(save_second(path, second, state, host.family, told, header, host.loader))
    return "; ".join(dict.fromkeys(filter(None, proven)))
