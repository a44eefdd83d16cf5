r"""Guidance in one forward: a small network that adds to a frozen base what classifier-free guidance would have added.

    D_agd(x, c, w) ~ D_u + w (D_c - D_u)          Adapter Guidance Distillation (arXiv:2503.07274)

Two forms, as the paper attaches them. Attention: each cross-attention of a U-Net gets a second one, over [guidance,
time, prompt tokens]. Offset: each block of a transformer gets one vector for all tokens of its picture; Z-Image's and
Krea 2's, whose text is modulated as its picture is, for all of both. Ours: what is added is scaled by w - 1, so that
at w = 1, where guidance adds nothing, neither does the adapter; and the attention form also sees where it looks from
and what the first attention found (benchmarks/results/guidance-adapter-tiny.md has what that is worth).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .adapter_module import Call
from .cond import Cond
from .errors import OneStepError
from .families import FAMILIES
from .families.table import natural
from .randomness import generator
from .targets import Target

FEATURES = 64
HEADS = 4
SHARE = 0.02
"""An adapter's parameters, as a share of its base's."""


@dataclass(frozen=True)
class Config:
    """sites: (the layer that is added to, its features), in the order of names. text: width of a prompt's token
    (attention), or of its summary (offset). hidden: width of all inside. seed: of the initial values."""

    sites: tuple[tuple[str, int], ...]
    text: int
    hidden: int
    seed: int = 0

    @classmethod
    def read(cls, sites: Any, text: int, hidden: int, seed: int) -> Config:
        """From a file's header. Raises TypeError or ValueError for values that are none."""
        pairs = tuple((str(name), int(width)) for name, width in sites)
        if (
            not 0 < len(pairs) <= 1000
            or not 0 < min(text, hidden) <= max(text, hidden, *dict(pairs).values()) < 2**16
            or hidden % HEADS
        ):
            raise ValueError("a width is out of range")
        return cls(pairs, int(text), int(hidden), int(seed))


class Conditioning(nn.Module):
    """What an adapter is conditioned on: guidance, time and prompt, each as vectors of ``hidden``."""

    def __init__(self, text: int, hidden: int) -> None:
        super().__init__()
        self.guidance = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.norm = nn.LayerNorm(hidden)
        self.time = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.text = nn.Linear(text, hidden)
        self.frequencies: Tensor
        self.phases: Tensor
        self.register_buffer("frequencies", torch.empty(FEATURES))
        self.register_buffer("phases", torch.empty(FEATURES))

    def scale(self, w: Tensor) -> Tensor:
        """[B] scales -> [B, hidden]: random Fourier features cos(2 pi (f w + p)) (arXiv:2006.10739)."""
        w = w.to(self.phases)
        return self.norm(self.guidance(torch.cos(2 * math.pi * (w[:, None] * self.frequencies + self.phases))))

    def moment(self, time: Tensor) -> Tensor:
        """[B] times of the network, 0 to 1000 -> [B, hidden]."""
        half = FEATURES // 2
        rates = torch.exp(torch.arange(half).to(self.phases) * (-math.log(10_000) / half))
        angles = time.to(self.phases)[:, None] * rates
        return self.time(torch.cat([angles.sin(), angles.cos()], 1))


class GuidanceAttention(nn.Module):
    """An adapter module on the cross-attentions of a U-Net. It reads w [B] in ``cond.guidance``; None = it is silent.

    out(silu(softmax(q k^T) v + q + W_z z + W_c c)), q = W_q h of what `to_q` takes, k and v of the tokens, z what
    `to_out.0` takes, c of guidance and time; added to what `to_out.0` gives. The output layers begin at zero: a new
    adapter changes nothing, to the bit.
    """

    kind = "guidance-cross-attention"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, hidden, widths = config, config.hidden, [width for _, width in config.sites]
        self.at = {_query(name): number for number, (name, _) in enumerate(config.sites)}
        self.before, self.after = frozenset(self.at), frozenset(name for name, _ in config.sites)
        self.conditioning = Conditioning(config.text, hidden)
        self.mix = nn.Linear(hidden, hidden)
        self.queries = nn.ModuleList(nn.Linear(width, hidden, bias=False) for width in widths)
        self.keys = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in widths)
        self.values = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in widths)
        self.found = nn.ModuleList(nn.Linear(width, hidden, bias=False) for width in widths)
        self.shift = nn.ModuleList(nn.Linear(hidden, hidden) for _ in widths)
        self.out = nn.ModuleList(nn.Linear(hidden, width) for width in widths)

    @classmethod
    def from_config(cls, **config: Any) -> GuidanceAttention:
        return _made(cls, Config.read(**config))

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        if call.cond.guidance is not None:
            call.cache[name] = x
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        if call.cond.guidance is None:
            return output
        look = _query(name)
        h, at = call.cache.pop(look), self.at[look]
        c, tokens, mask = self._tokens(call)
        c, tokens = c.to(h), tokens.to(h)
        q, k, v = _linear(self.queries[at], h), _linear(self.keys[at], tokens), _linear(self.values[at], tokens)
        looked = attention(_heads(q), _heads(k), _heads(v), mask).transpose(1, 2).flatten(2)
        inner = F.silu(looked + q + _linear(self.found[at], x) + _linear(self.shift[at], c))
        return output + _beyond_one(call, output) * _linear(self.out[at], inner)

    def _tokens(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """c [B, 1, hidden]; tokens [B, 2 + L, hidden]; and where to look, [B, 1, 1, 2 + L] or None for everywhere.

        Made anew at each site: a block that is recomputed in backward must do what it did in forward.
        """
        cond, embed = call.cond, self.conditioning
        assert cond.guidance is not None
        scale, moment = embed.scale(cond.guidance)[:, None], embed.moment(call.time)[:, None]
        c, text = scale + moment, embed.text(cond.text.to(embed.phases))
        tokens = torch.cat([scale, moment, text + self.mix(F.silu(text + c))], 1)
        mask = None if cond.mask is None else F.pad(cond.mask, (2, 0), value=True)[:, None, None].to(tokens.device)
        return c, tokens, mask


class GuidanceOffset(nn.Module):
    """An adapter module on the blocks of a transformer of SD3, Flux, FLUX.2, Z-Image or Krea 2: out(MLP(guidance + time
    + prompt)) [B, C] for every token of the picture, in the last two of the stream. Otherwise as
    `GuidanceAttention`."""

    kind = "guidance-offset"

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, hidden = config, config.hidden
        self.at = {name: number for number, (name, _) in enumerate(config.sites)}
        self.before, self.after = frozenset[str](), frozenset(self.at)
        self.conditioning = Conditioning(config.text, hidden)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.out = nn.ModuleList(nn.Linear(hidden, width) for _, width in config.sites)

    @classmethod
    def from_config(cls, **config: Any) -> GuidanceOffset:
        return _made(cls, Config.read(**config))

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        cond, embed = call.cond, self.conditioning
        if cond.guidance is None:
            return output
        c = embed.scale(cond.guidance) + embed.moment(call.time) + embed.text(cond.summary.to(embed.phases))
        added = _beyond_one(call, output) * self.out[self.at[name]](self.mix(c))[:, None].to(output)
        # Flux' and FLUX.2's single blocks, behind the double ones, hold the texts' tokens before the picture's
        single = name.startswith("single_")
        words = output.shape[1] - call.cache["picture"] if single else 0
        call.cache["picture"] = output.shape[1] - words
        return output + F.pad(added.expand(-1, output.shape[1] - words, -1), (0, 0, words, 0))


MAKERS = {module.kind: module.from_config for module in (GuidanceAttention, GuidanceOffset)}
"""By the kind in a file's header."""


def new_adapter(targets: Mapping[str, Target], family: str, seed: int, share: float = SHARE) -> Any:
    """An adapter for the base of ``targets``, all of them, with about ``share`` of its parameters."""
    known = FAMILIES[family]
    if not (known.cross_attention or known.summary):
        raise OneStepError(f"{known.models} models cannot have a guidance adapter yet: use another base")
    sites = tuple((name, targets[name].out_rows) for name in _sites(targets, family))
    if not sites:
        raise OneStepError(f"this {family!r} base has none of the layers that an adapter adds to: use targets=all")
    cls: Any = GuidanceAttention if FAMILIES[family].cross_attention else GuidanceOffset
    text = _text_width(targets, family, sites)
    if not text:
        raise OneStepError(
            f"this {family!r} base has not the layer among its targets that reads texts: use targets=all"
        )
    wanted = share * sum(target.out_rows * math.prod(target.shape_a(1)) for target in targets.values())

    def size(width: int) -> int:
        with torch.device("meta"):
            return _size(cls(Config(sites, text, width)))

    widths = range(2 * HEADS, 1032, HEADS)
    at = bisect_left(widths, wanted, key=size)
    hidden = min(widths[max(0, at - 1) : at + 1], key=lambda width: abs(size(width) - wanted))
    return _made(cls, Config(sites, text, hidden, seed))


def check_base(module: Any, targets: Mapping[str, Target], family: str) -> None:
    """Raises OneStepError where ``module`` was made for another base than that of ``targets``."""
    config: Config = module.config
    here = tuple((name, targets[name].out_rows) for name in _sites(targets, family))
    text = _text_width(targets, family, here) if here else 0
    if here != config.sites or text != config.text:
        wanted = f"{len(config.sites)} layers, the first {config.sites[0][1]} wide, and prompts {config.text} wide"
        found = f"{len(here)}, {here[0][1] if here else 0} and {text}"
        raise OneStepError(
            f"this adapter is for another base: it needs {wanted}; here it finds {found}. Choose its base"
        )


def with_guidance(cond: Cond, w: float) -> Cond:
    """``cond``, whose adapter is given the scale ``w``."""
    return cond.with_(guidance=torch.full((len(cond),), float(w), device=cond.text.device))


def _sites(targets: Mapping[str, Target], family: str) -> Sequence[str]:
    return sorted((name for name in targets if re.fullmatch(FAMILIES[family].ends, name)), key=natural)


def _text_width(targets: Mapping[str, Target], family: str, sites: Sequence[tuple[str, int]]) -> int:
    known = FAMILIES[family]
    keys = sites[0][0].replace("to_out.0", "to_k") if known.cross_attention else known.summary
    name = f"{known.text_embedder}.linear_1" if known.text_embedder else keys
    return math.prod(targets[each].in_features if each in targets else 0 for each in (name, known.stacked) if each)


def _query(name: str) -> str:
    return name.replace(".to_out.0", ".to_q")


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer whose float32 parameters learn, in the dtype that the network computes in."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return F.linear(x, weight.to(x), None if bias is None else bias.to(x))


def _heads(x: Tensor) -> Tensor:
    """[B, N, hidden] -> [B, HEADS, N, hidden / HEADS]."""
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


def _beyond_one(call: Call, like: Tensor) -> Tensor:
    """w - 1, as [B, 1, 1]."""
    assert call.cond.guidance is not None
    return (call.cond.guidance.to(like.device) - 1)[:, None, None].to(like)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _made(cls: Any, config: Config) -> Any:
    """An adapter with its initial values, each a function of (seed, name) alone; torch's own generator is not asked."""
    with torch.device("meta"):
        module = cls(config)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            value.copy_(_initial(name, value, config.seed))
    return module


def _initial(name: str, value: Tensor, seed: int) -> Tensor:
    """U(-1, 1) / sqrt(fan in); output layers and biases 0, gains 1; f ~ N(0, 0.1^2): a period of ten scales."""
    draw = generator(seed, "guidance adapter", name)
    if name.endswith("frequencies"):
        return 0.1 * torch.randn(value.shape, generator=draw)
    if name.endswith("phases"):
        return torch.rand(value.shape, generator=draw)
    if name.startswith("out.") or name.endswith("bias"):
        return torch.zeros(value.shape)
    if name.endswith("norm.weight"):
        return torch.ones(value.shape)
    return (2 * torch.rand(value.shape, generator=draw) - 1) / math.sqrt(value.shape[1])
