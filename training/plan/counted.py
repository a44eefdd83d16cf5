"""Rehearsals that were played, kept by the network and the settings: the same is not counted twice in a process, nor on
another day where the host tells all that its shapes hang on.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict

from ..host import Host
from ..settings import Settings
from . import on_disk
from .rehearse import Rehearsed, rehearse

KEPT = 16
# what a rehearsal sets itself, or what nothing of it depends on
FREE = ("batch", "accumulation", "rank", "pairs", "watch_samples", "seed", "negative", "streaming", "compile_blocks")

_kept: OrderedDict[str, Rehearsed] = OrderedDict()


def counted(host: Host, settings: Settings, recompute: str) -> Rehearsed:
    """`rehearse`, or what it gave for the same network and settings. host: a shell; what it says of itself as
    ``configuration``, where it does, is what its count hangs on beside its weights' shapes. recompute: what of it is
    computed again in backward, a grade of core.recomputed."""
    key = _key(host, settings, recompute)
    if key not in _kept:
        _kept[key] = _from_disk(host, settings, recompute, key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _from_disk(host: Host, settings: Settings, recompute: str, key: str) -> Rehearsed:
    told = getattr(host, "configuration", None)
    if told is None:
        return rehearse(host, settings, recompute=recompute)
    whole = repr((key, told, on_disk.counted_by()))
    found = on_disk.read(whole)
    if found is None:
        found = rehearse(host, settings, recompute=recompute)
        on_disk.write(whole, found)
    return found


def _key(host: Host, settings: Settings, recompute: str) -> str:
    weights = [(name, tuple(weight.shape), weight.dtype) for name, weight in host.network.named_parameters()]
    text = host.encode(["a"], settings.size_list[0]).text.shape
    told = {name: value for name, value in settings.flat().items() if name not in FREE}
    if told["optimizer"] == "adamw8bit":  # counted as AdamW's, its moments are smaller
        told["optimizer"] = "auto"
    told["second_order"] = settings.second_order
    if settings.initial_lora and os.path.isfile(settings.initial_lora):  # another file may come to have its name
        told["of"] = os.stat(settings.initial_lora).st_size, os.stat(settings.initial_lora).st_mtime_ns
    parts = (type(host).__name__, recompute, weights, text, sorted(host.denoiser.roles.targets), sorted(told.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
