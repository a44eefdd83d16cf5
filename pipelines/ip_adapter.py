"""IP-Adapters, which draw by a picture beside the text: loaded by the family's own pipeline, their rows made here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from .adapt import DiffusersHost, network_of
from .kinds import FLUX
from .networks import has_ip_adapter
from .quiet import quiet

with quiet():  # importing it asks for torchvision on the console
    from diffusers.loaders import IPAdapterMixin


class IPAdapters(IPAdapterMixin):
    """`load_ip_adapter`, `set_ip_adapter_scale` and `unload_ip_adapter` of whichever family the pipeline is of."""

    def load_ip_adapter(self: Any, model: Any, *args: Any, weight_name: Any = None, **more: Any) -> None:
        """As the family's own pipeline: a folder (or hub id, or a loaded state), ``subfolder`` and ``weight_name``.

        Weights must be .safetensors. LoRAs that are active stay so. Raises OneStepError for a pickle.
        """
        given = {"weight_name": weight_name} if weight_name is not None else {}
        _refuse_pickles([*_listed(weight_name), *(name for arg in args for name in _listed(arg))])
        plain, active = self.plain(), _active_loras(network_of(self))
        plain.load_ip_adapter(model, *args, **given, **more)
        _keep_active(network_of(self), active)
        self.register_modules(image_encoder=plain.image_encoder, feature_extractor=plain.feature_extractor)

    def set_ip_adapter_scale(self: Any, scale: Any) -> None:
        """As the family's own pipeline: one scale, or a list with one for each adapter."""
        self._with_ip_adapter("set_ip_adapter_scale").set_ip_adapter_scale(scale)

    def unload_ip_adapter(self: Any) -> None:
        """Take all IP-Adapters off again, and their image encoder."""
        plain = self._with_ip_adapter("unload_ip_adapter")
        plain.unload_ip_adapter()
        self.register_modules(image_encoder=None)
        if self.safety_checker is None:
            self.register_modules(feature_extractor=None)

    def _with_ip_adapter(self: Any, name: str) -> Any:
        if not has_ip_adapter(network_of(self)):
            raise OneStepError(f"{name} was called, and no IP-Adapter is loaded: call load_ip_adapter first")
        with quiet():
            return self.plain()


def image_rows(
    host: DiffusersHost, picture: Any, embeds: Any, prompts: int, each: int, guided: bool
) -> tuple[Tensor, ...]:
    """The image embeddings of a call, one tensor an adapter: the prompts' rows first, under guidance the negatives'
    behind them.

    picture: one for each adapter, or a list of several for one. embeds: what the family's
    prepare_ip_adapter_image_embeds returns, under guidance the negative's half first.
    prompts, each: how many there are, and the pictures of each. Raises OneStepError where adapter and picture do not
    go together.
    """
    if picture is None and embeds is None:
        if has_ip_adapter(host.network):
            raise OneStepError(
                "an IP-Adapter is loaded, and there is no picture for it: give ip_adapter_image or "
                "ip_adapter_image_embeds, or call unload_ip_adapter()"
            )
        return ()
    if picture is not None and embeds is not None:
        raise OneStepError("ip_adapter_image and ip_adapter_image_embeds are both given: give one of them")
    if not has_ip_adapter(host.network):
        raise OneStepError("there is a picture for an IP-Adapter, and none is loaded: call load_ip_adapter first")
    if embeds is None:
        found = _encoded(host, picture, guided)
    else:
        found = [_halves(rows, guided) for rows in ([embeds] if isinstance(embeds, Tensor) else embeds)]
    return tuple(torch.cat([_for_all(half, prompts, each) for half in halves]) for halves in found)


def _encoded(host: DiffusersHost, picture: Any, guided: bool) -> list[list[Tensor]]:
    """For each adapter the embeddings of its picture, and under guidance those of none."""
    if host.pipe.image_encoder is None or host.pipe.feature_extractor is None:
        raise OneStepError(
            "ip_adapter_image needs an image encoder, and this pipeline has none: load the adapter with its "
            "image_encoder_folder, or give ip_adapter_image_embeds"
        )
    more = () if host.kind == FLUX else (guided,)
    with host.on_device(host.pipe.image_encoder):
        found = host.pipe.prepare_ip_adapter_image_embeds(picture, None, host.device, 1, *more)
    return [_halves(rows, guided) for rows in ([found] if isinstance(found, Tensor) else found)]


def _halves(rows: Any, guided: bool) -> list[Tensor]:
    """[P, ...], or under guidance the two halves of [2 P, ...], whose first is the negative's, in our order."""
    if not isinstance(rows, Tensor) or rows.ndim not in (3, 4) or not bool(rows.isfinite().all()):
        what = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise OneStepError(
            f"ip_adapter_image_embeds holds {what}: give for each adapter a tensor of finite numbers "
            "[pictures, images, width], as prepare_ip_adapter_image_embeds returns it"
        )
    if not guided:
        return [rows]
    if len(rows) % 2:
        raise OneStepError(
            f"ip_adapter_image_embeds has {len(rows)} rows: under guidance it holds the negative's rows, then as many "
            "of the picture's"
        )
    negative, positive = rows.chunk(2)
    return [positive, negative]


def _for_all(rows: Tensor, prompts: int, each: int) -> Tensor:
    """One row for all pictures, or one for each prompt, as the rows of all pictures."""
    if len(rows) not in (1, prompts):
        raise OneStepError(
            f"ip_adapter_image_embeds has {len(rows)} rows for {prompts} prompts: give one, or as many. Without "
            "guidance the negative's rows are left out"
        )
    return rows.repeat_interleave(each if len(rows) == prompts else prompts * each, 0)


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _refuse_pickles(names: Iterable[Any]) -> None:
    for name in names:
        if isinstance(name, str | PurePath) and PurePath(name).suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise OneStepError(
                f"{str(name)[:80]} is a pickle, which can run code when it is opened: take the adapter's .safetensors"
            )


def _active_loras(network: Any) -> list[tuple[Any, list[str]]]:
    """The network's LoRA layers, with the names of those that are active there."""
    layers = (module for module in network.modules() if hasattr(module, "lora_A"))
    return [(layer, list(layer.active_adapters)) for layer in layers]


def _keep_active(network: Any, before: list[tuple[Any, list[str]]]) -> None:
    """A FaceID adapter's own LoRA, which diffusers makes the only active one, acts beside those that were active."""
    for layer, names in before:
        layer.set_adapter(list(dict.fromkeys([*names, *layer.active_adapters])))
        for weight in layer.parameters():
            weight.requires_grad_(False)
