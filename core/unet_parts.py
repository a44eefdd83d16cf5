"""The parts of a U-Net's encoder (SD1.5, SD2, SDXL) in plain torch, with diffusers' names for parameters.

Both hosts build the same from the same weights; these serve a trainable copy (core.control_copy) in either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

GROUPS = 32


def waves(time: Tensor, width: int) -> Tensor:
    """[B, width]: cos and sin of time [B] times 10000^(-2 i / width) (arXiv:1706.03762, section 3.5)."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = time[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


class Embedding(nn.Module):
    """Of the time, or of SDXL's pooled text and sizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, outputs), nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(x)))  # type: ignore[no-any-return]


class Hint(nn.Module):
    """The control's encoder (arXiv:2302.05543, section 3.2): an eighth of each side. A narrow network has a narrow
    one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        share = min(1.0, outputs / 320)
        widths = [max(4, 4 * round(share * width / 4)) for width in (16, 32, 96, 256)]
        layers = []
        for width, wider in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, wider, 3, 2, 1)]
        self.conv_in, self.blocks = nn.Conv2d(inputs, widths[0], 3, 1, 1), nn.ModuleList(layers)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = silu(self.conv_in(x))
        for block in self.blocks:
            x = silu(block(x))
        return self.conv_out(x)  # type: ignore[no-any-return]


class Resnet(nn.Module):
    def __init__(self, inputs: int, width: int, spread: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs, 1e-5), nn.Conv2d(inputs, width, 3, 1, 1)
        self.time_emb_proj = nn.Linear(spread, width)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width, 1e-5), nn.Conv2d(width, width, 3, 1, 1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x: Tensor, spread: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.time_emb_proj(silu(spread))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))  # type: ignore[no-any-return]


class Halving(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, width: int, inputs: int, heads: int) -> None:
        super().__init__()
        self.heads, self.to_q = heads, nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(inputs, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        sides = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (side.unflatten(2, (self.heads, -1)).transpose(1, 2) for side in sides)
        seen = None if mask is None else mask.to(x.device)[:, None, None]
        found = scaled_dot_product_attention(q, k, v, seen)
        return self.to_out[0](found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """a gelu(b) (arXiv:2002.05202, Eq. 6), a and b one layer's halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.proj(x).chunk(2, -1)
        return a * gelu(b)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, text: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, text, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), text, mask)
        return x + self.ff(self.norm3(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """linear: whether it begins and ends in linear layers; else in 1x1 convolutions, which are the same product."""

    def __init__(self, width: int, heads: int, depth: int, text: int, linear: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, 1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, text) for _ in range(depth))
        self.linear = linear

    def forward(self, h: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        size, x = h.shape[2:], self.norm(h)
        x = self.proj_in(_rows(x)) if self.linear else _rows(self.proj_in(x))
        for block in self.transformer_blocks:
            x = block(x, text, mask)
        x = _picture(self.proj_out(x), size) if self.linear else self.proj_out(_picture(x, size))
        return h + x  # type: ignore[no-any-return]


def _rows(picture: Tensor) -> Tensor:
    return picture.flatten(2).transpose(1, 2)


def _picture(rows: Tensor, size: torch.Size) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, size)


class Down(nn.Module):
    """One level of the encoder; gives what each of its blocks, and the halving behind them, makes of h.

    inputs: channels of what it takes. spread: of the time's embedding. heads, depth, text, linear: of its transformers.
    """

    def __init__(
        self, inputs: int, width: int, blocks: int, spread: int, transformer: tuple[int, int, int, bool], halves: bool
    ) -> None:
        super().__init__()
        starts = [inputs, *[width] * (blocks - 1)]
        self.resnets = nn.ModuleList(Resnet(start, width, spread) for start in starts)
        self.attentions = nn.ModuleList(Transformer(width, *transformer) for _ in starts if transformer[1])
        self.downsamplers = nn.ModuleList([Halving(width)] if halves else [])

    def forward(self, h: Tensor, spread: Tensor, text: Tensor, mask: Tensor | None) -> list[Tensor]:
        found = []
        for at, resnet in enumerate(self.resnets):
            h = resnet(h, spread)
            h = self.attentions[at](h, text, mask) if self.attentions else h
            found.append(h)
        return found + [halving(h) for halving in self.downsamplers]


class Middle(nn.Module):
    def __init__(self, width: int, spread: int, transformer: tuple[int, int, int, bool]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(width, width, spread) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(width, *transformer)] if transformer[1] else [])

    def forward(self, h: Tensor, spread: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        h = self.resnets[0](h, spread)
        for attention in self.attentions:
            h = attention(h, text, mask)
        return self.resnets[1](h, spread)  # type: ignore[no-any-return]
