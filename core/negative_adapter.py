r"""A trained negative prompt in one forward: the negative text acts through keys and values of its own.

    A-  = softmax(q K-^T / sqrt(d)) V-                 q: the base's own queries, in the base's own heads
    A+' = A+ - s (alpha |A+| / |A-| A- + beta)         SpeedUpNet (SUN, arXiv:2312.08887), attention normalisation

A+ is what a cross-attention of a U-Net has found in the prompt, before its output projection; alpha and beta are
learnt, one number for each channel. Ours: norms are of single tokens (the authors' code takes one of the whole batch,
which makes a picture depend on its neighbours); s, the dial, is applied (there it is computed and dropped); alpha
begins at zero, not one, so that a new adapter changes nothing, to the bit, and a student trains from what it draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .adapter_module import Call
from .cond import Cond
from .errors import OneStepError
from .factors import State
from .families import FAMILIES
from .families.table import natural
from .randomness import generator
from .stored import weight_of
from .targets import Target

MOST = 10.0
"""The dial's upper end."""


@dataclass(frozen=True)
class Config:
    """sites: (the cross-attention, its features, its heads), in the order of names. text: width of a text's token."""

    sites: tuple[tuple[str, int, int], ...]
    text: int

    @classmethod
    def read(cls, sites: Any, text: int) -> Config:
        """From a file's header. Raises TypeError or ValueError for values that are none."""
        found = tuple((str(name), int(width), int(heads)) for name, width, heads in sites)
        if not 0 < len(found) <= 1000 or not 0 < int(text) < 2**16:
            raise ValueError("a width is out of range")
        if any(not 0 < heads <= width < 2**16 or width % heads for _, width, heads in found):
            raise ValueError("an attention's heads do not divide its features")
        return cls(found, int(text))


class NegativeAttention(nn.Module):
    """An adapter module on the cross-attentions of a U-Net. It acts where `Roles.use` was given a ``negative``.

    negative: Cond of one text for all samples, or of one for each; its mask is honoured. scale: s, a number or [B]; 1
    is what was trained, 0 changes nothing. In memory: two Linears an attention, of the base's own sizes.
    """

    kind = "negative-attention"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.at = {name: number for number, (name, _, _) in enumerate(config.sites)}
        self.before = frozenset(f"{name}.to_out.0" for name in self.at)
        self.after = frozenset(f"{name}.to_q" for name in self.at)
        widths = [width for _, width, _ in config.sites]
        self.to_k_neg = nn.ModuleList(nn.Linear(config.text, width, bias=False) for width in widths)
        self.to_v_neg = nn.ModuleList(nn.Linear(config.text, width, bias=False) for width in widths)
        self.alpha = nn.ParameterList(torch.zeros(width) for width in widths)
        self.beta = nn.ParameterList(torch.zeros(width) for width in widths)

    @classmethod
    def from_config(cls, **config: Any) -> NegativeAttention:
        return _made(Config.read(**config))

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        """Queries, as they pass."""
        if call.inputs.get("negative") is not None:
            call.cache[name] = output
        return output

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        """x: A+ [B, N, C]."""
        negative: Cond | None = call.inputs.get("negative")
        if negative is None:
            return x
        site = name.removesuffix(".to_out.0")
        at, q = self.at[site], call.cache.pop(f"{site}.to_q")
        found = self._found(at, q, negative)
        alpha, beta = self.alpha[at].to(x), self.beta[at].to(x)
        return away(x, found, alpha, beta, _column(call.inputs.get("scale", 1.0), x))

    def _found(self, at: int, q: Tensor, negative: Cond) -> Tensor:
        """A- [B, N, C]."""
        text, heads = negative.text.to(q), self.config.sites[at][2]
        # the float32 weights that learn, in the dtype that the network computes in
        weights: list[Any] = [self.to_k_neg[at].weight, self.to_v_neg[at].weight]
        k, v = (F.linear(text, weight.to(q)) for weight in weights)
        q, k, v = (rows.unflatten(-1, (heads, -1)).transpose(1, 2) for rows in (q, k, v))
        k, v = (rows.expand(len(q), -1, -1, -1) for rows in (k, v))
        mask = None if negative.mask is None else negative.mask[:, None, None].to(q.device)
        return attention(q, k, v, mask).transpose(1, 2).flatten(2)


def away(positive: Tensor, negative: Tensor, alpha: Tensor, beta: Tensor, scale: Tensor) -> Tensor:
    """A+, A-: [B, N, C]. alpha, beta: [C]. scale: [] or [B, 1, 1]."""
    # A+' = A+ - s (alpha |A+| / |A-| A- + beta)
    reach = (_norm(positive) / _norm(negative)).to(positive.dtype)
    return positive - scale * (alpha * (reach * negative) + beta)


MAKERS = {NegativeAttention.kind: NegativeAttention.from_config}
"""By the kind in a file's header."""


def new_adapter(
    targets: Mapping[str, Target], family: str, heads: Mapping[str, int], seed: int, role: State | None = None
) -> NegativeAttention:
    """An adapter for the base of ``targets``, all of them, whose A- is what the base itself finds in the negative.

    heads: of each cross-attention, by its name (`heads_of`). role: factors of a role, which are then part of the base.
    seed: of keys and values that the base does not give (quantised ones).
    Raises OneStepError for a base that has none of a U-Net's cross-attentions.
    """
    names = _sites(targets, family)
    if not names:
        raise OneStepError(
            f"a negative adapter acts on a U-Net's cross-attentions, of which this {family!r} base has none among its "
            "targets: use SD1.5, SD2 or SDXL with targets=all; for others there is steering (nag, nasa)"
        )
    sites = tuple((name, targets[f"{name}.to_k"].out_rows, heads[name]) for name in names)
    module = _made(Config(sites, targets[f"{names[0]}.to_k"].in_features))
    for layers, part in ((module.to_k_neg, "to_k"), (module.to_v_neg, "to_v")):
        for layer, path in zip(layers.parameters(), (f"{name}.{part}" for name in names), strict=True):
            start = _start(targets[path], (role or {}).get(path), generator(seed, "negative adapter", path))
            layer.data.copy_(start)
    return module


def heads_of(modules: Iterable[nn.Module], targets: Mapping[str, Target]) -> dict[str, int]:
    """Heads of each cross-attention by its canonical name. modules: what holds the host's attentions, e.g. blocks."""
    here = {id(target.module): name for name, target in targets.items() if name.endswith(".to_q")}
    attentions: Iterable[Any] = (part for module in modules for part in module.modules() if hasattr(part, "to_q"))
    known = [(here.get(id(part.to_q)), part.heads) for part in attentions]
    return {name.removesuffix(".to_q"): int(heads) for name, heads in known if name is not None}


def check_base(module: NegativeAttention, targets: Mapping[str, Target], family: str) -> None:
    """Raises OneStepError where ``module`` was made for another base than that of ``targets``."""
    sites, text = [(name, width) for name, width, _ in module.config.sites], module.config.text
    here = [(name, targets[f"{name}.to_q"].out_rows) for name in _sites(targets, family)]
    width = targets[f"{here[0][0]}.to_k"].in_features if here else 0
    if here != sites or width != text:
        raise OneStepError(
            f"this adapter is for another base: it needs {len(sites)} cross-attentions, the first {sites[0][1]} wide, "
            f"and texts {text} wide; here it finds {len(here)}, {here[0][1] if here else 0} and {width}. "
            "Choose its base"
        )


def check_negative(module: NegativeAttention, width: int) -> None:
    """Raises OneStepError for a negative whose tokens are ``width`` wide where the adapter reads another width."""
    if width != module.config.text:
        raise OneStepError(
            f"the negative's tokens are {width} wide, this adapter reads {module.config.text}: encode it with this "
            "model's own text encoder"
        )


def checked_scale(scale: Any) -> float:
    """The dial. Raises OneStepError for what is no number from 0 to `MOST`."""
    if not (isinstance(scale, int | float) and math.isfinite(scale) and 0 <= scale <= MOST):
        raise OneStepError(f"scale is {scale!r:.40}: it must lie in 0 (off) to {MOST:g}; 1 is what was trained")
    return float(scale)


def _sites(targets: Mapping[str, Target], family: str) -> Sequence[str]:
    """Names of the cross-attentions, none for a family whose texts and pictures attend jointly, or that norms its
    queries and keys, as Anima, or embeds a text before keys read it, as PixArt-Sigma."""
    known = FAMILIES[family]
    ends = [name for name in targets if known.unet and re.fullmatch(known.ends, name)]
    return sorted((name.removesuffix(".to_out.0") for name in ends), key=natural)


def _norm(x: Tensor) -> Tensor:
    """[B, N, 1] of each token, float32 at least and never 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).clamp_min(torch.finfo(wide).tiny)


def _column(scale: Any, like: Tensor) -> Tensor:
    """A number as [], [B] numbers as [B, 1, 1]."""
    column = torch.as_tensor(scale, device=like.device).to(like.dtype)
    return column.reshape(-1, 1, 1) if column.ndim else column


def _start(target: Target, factors: tuple[Tensor, Tensor] | None, draw: torch.Generator) -> Tensor:
    """[out, in] W, or W + B A; where W is no plain matrix (a quantised one), U(-1, 1) / sqrt(fan in)."""
    weight: Any = target.module.weight
    wanted = (target.out_rows, target.in_features)
    if not weight.is_floating_point() or weight.shape != wanted:
        return (2 * torch.rand(wanted, generator=draw) - 1) / math.sqrt(wanted[1])
    return weight_of(target.module).cpu() + (0.0 if factors is None else (factors[1] @ factors[0]).cpu())  # type: ignore


def _made(config: Config) -> NegativeAttention:
    """An adapter whose numbers are all zero; torch's own generator is not asked."""
    with torch.device("meta"):
        module = NegativeAttention(config)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for value in module.parameters():
            value.zero_()
    return module
