"""The file that a run makes: a role's factors as a LoRA, or its adapter module, read back before it counts."""

from __future__ import annotations

from pathlib import Path

from ...core.adapter_file import check_adapter, save_adapter
from ...core.lora_file import save_lora
from ..host import Host


def write_made(path: Path, role: str, host: Host, recipe: str, header: dict[str, str], usage: str) -> str:
    """Write what ``role`` holds to ``path``; what loading it back has proven. usage: how a LoRA is drawn with."""
    roles, family = host.denoiser.roles, host.family
    if role in roles.modules:
        save_adapter(path, roles.modules[role], family, header | {"onestep.recipe": recipe})
        return check_adapter(path, roles.modules[role], family)
    save_lora(path, roles.state(role), family, recipe, header | {"modelspec.usage_hint": usage})
    return host.check_file(path)
