"""Rehearsals that were played, kept by the network and the settings: the same is not counted twice in a process."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from ..host import Host
from ..settings import Settings
from .rehearse import Rehearsed, rehearse

KEPT = 16
# what a rehearsal sets itself, or what nothing of it depends on
FREE = ("batch", "accumulation", "rank", "pairs", "watch_samples", "seed", "negative", "streaming", "compile_blocks")

_kept: OrderedDict[str, Rehearsed] = OrderedDict()


def counted(host: Host, settings: Settings, recompute: str) -> Rehearsed:
    """`rehearse`, or what it gave for the same network and settings. host: a shell. recompute: what of it is computed
    again in backward, a grade of core.recomputed."""
    key = _key(host, settings, recompute)
    if key not in _kept:
        _kept[key] = rehearse(host, settings, recompute=recompute)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def _key(host: Host, settings: Settings, recompute: str) -> str:
    weights = [(name, tuple(weight.shape), weight.dtype) for name, weight in host.network.named_parameters()]
    text = host.encode(["a"], settings.size_list[0]).text.shape
    told = {name: value for name, value in settings.flat().items() if name not in FREE}
    if told["optimizer"] == "adamw8bit":  # counted as AdamW's, its moments are smaller
        told["optimizer"] = "auto"
    told["second_order"] = settings.second_order
    parts = (type(host).__name__, recompute, weights, text, sorted(host.denoiser.roles.targets), sorted(told.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
