"""An adapter module on a patched MODEL: its hooks are there while ComfyUI has the MODEL's patches on."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor, nn

from ..core.errors import OneStepError
from ..core.families import bind_comfy
from ..core.roles import Roles


class AdapterHooks:
    """One module, under the role ``role``, on each network that ComfyUI patches for the MODEL it was put on."""

    def __init__(self, module: Any, family: str, role: str) -> None:
        self.module, self.family, self.role = module, family, role
        self._roles: dict[int, Roles] = {}

    def put_on(self, clone: Any, key: str, apply_model: Any) -> None:
        """Give ``clone`` the hooks and the wrapper ``apply_model`` (ComfyUI's APPLY_MODEL)."""
        clone.set_injections(key, [PatcherInjection(inject=self._inject, eject=self._eject)])
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, apply_model)

    def roles(self, model: Any, x: Tensor) -> Roles:
        """Those on ``model``'s layers, the module on ``x``'s device."""
        found = self._roles.get(id(model))
        if found is None:
            raise OneStepError("the adapter is not on this MODEL's layers: load the model again, and report it")
        self.module.to(x.device)
        return found

    def _inject(self, patcher: Any) -> None:
        """Hooks on the network as it is now: a deep copy has layers of its own."""
        needed = self.module.before | self.module.after
        roles = Roles([target for target in targets_of(patcher.model, self.family) if target.name in needed])
        roles.add_module(self.role, self.module)
        roles.install()
        unfold(patcher.model.diffusion_model)
        self._roles[id(patcher.model)] = roles

    def _eject(self, patcher: Any) -> None:
        roles = self._roles.pop(id(patcher.model), None)
        if roles is not None:
            roles.remove()
            fold(patcher.model.diffusion_model)


def unfold(network: nn.Module) -> None:
    """Let each layer of Wan's feed-forwards be called. ComfyUI multiplies by the weight of one that is stored in int8
    without calling it, so that its hooks would do nothing. `fold` takes it back; all of a MODEL's come and go
    together."""
    for layers in _folding(network):
        vars(layers).setdefault("forward", partial(nn.Sequential.forward, layers))


def fold(network: nn.Module) -> None:
    for layers in _folding(network):
        vars(layers).pop("forward", None)


def _folding(network: nn.Module) -> list[Any]:
    return [layers for layers in network.modules() if type(layers).__name__ == "WanFeedForward"]


def targets_of(model: Any, family: str) -> Any:
    """All targets of a BaseModel's network."""
    return bind_comfy(family, model.diffusion_model, model.model_config.unet_config)
