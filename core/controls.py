"""What a picture is controlled by: extractors from pictures to control pictures, by name.

All are of torch alone, deterministic and the same on every device; none needs a gradient. A control of one's own is one
more `Control`, given to `register` before its name is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, max_pool2d, pad

from . import randomness
from .errors import OneStepError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601: the share of red, green and blue in a picture's brightness."""


class Extract(Protocol):
    """Pictures [B, 3, H, W] in [0, 1] -> control pictures [B, C, H, W] in [0, 1]. keys: [B] whole numbers; whatever an
    extractor draws for a picture is a function of that picture's key."""

    def __call__(self, pictures: Tensor, keys: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Control:
    """One kind of control. channels: C of its control pictures."""

    title: str
    channels: int
    extract: Extract

    @torch.no_grad()
    def __call__(self, pictures: Tensor, keys: Sequence[int] | None = None) -> Tensor:
        """Raises OneStepError for pictures that are none, and for an extractor that gives other than it says."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise OneStepError(f"pictures are {list(pictures.shape)}: give [B, 3, H, W], red, green and blue")
        found = self.extract(pictures.float(), range(len(pictures)) if keys is None else keys)
        wanted = (len(pictures), self.channels, *pictures.shape[2:])
        if tuple(found.shape) != wanted or not bool(found.isfinite().all()):
            raise OneStepError(
                f"the control {self.title!r:.60} gave {list(found.shape)}: it must give finite numbers {list(wanted)}"
            )
        return found.clamp(0, 1)


# -- edges ------------------------------------------------------------------------------------------------------------


def brightness(pictures: Tensor) -> Tensor:
    """[B, 1, H, W]."""
    return (pictures * pictures.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian of ``sigma`` pixels, cut off at 3 sigma; the border is repeated outwards."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=pictures.dtype, device=pictures.device)
    bell = torch.exp(-(at**2) / (2 * sigma**2))
    row = (bell / bell.sum()).reshape(1, 1, 1, -1)
    flat = pad(pictures.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    return conv2d(conv2d(flat, row), row.transpose(2, 3)).reshape(pictures.shape)


def sobel(grey: Tensor) -> tuple[Tensor, Tensor]:
    """(d/dx, d/dy) of [B, 1, H, W] by Sobel's kernels over 4, so that a step of height 1 gives 1 at both its sides."""
    right = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    kernels = torch.stack([right, right.T])[:, None]
    return tuple(conv2d(pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).split(1, 1))  # type: ignore[return-value]


def soft_edges(pictures: Tensor, keys: Sequence[int] = (), *, sigma: float = 1.0) -> Tensor:
    """|gradient| of the brightness, blurred by ``sigma`` pixels: 1 is a step from black to white before the blur."""
    x, y = sobel(blurred(brightness(pictures), sigma))
    return (x**2 + y**2).sqrt().clamp(max=1)


def canny(
    pictures: Tensor, keys: Sequence[int] = (), *, sigma: float = 1.0, low: float = 0.05, high: float = 0.1
) -> Tensor:
    """Edges of one pixel's width, 0 or 1 (Canny, IEEE PAMI 8(6), 1986): blur, gradient, the ridges of its size along
    its direction, and of these what reaches ``high``, with all above ``low`` that hangs together with it."""
    x, y = sobel(blurred(brightness(pictures), sigma))
    size = (x**2 + y**2).sqrt()
    ridge = size * _is_ridge(size, x, y)
    return _connected(ridge >= high, ridge >= low).to(pictures)


def _is_ridge(size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Where ``size`` is a maximum among its neighbours along the gradient, the direction rounded to 45 degrees.

    Of two equal neighbours the second is the ridge, so that a symmetric step has one edge, not two. The picture's
    outermost pixels, beyond which nothing is known, are none.
    """
    around = pad(size, (1, 1, 1, 1))
    height, width = size.shape[2:]

    def shifted(down: int, right: int) -> Tensor:
        return around[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    sector = torch.remainder(torch.round(torch.atan2(y, x) / (torch.pi / 4)), 4)
    ridge = torch.zeros_like(size, dtype=torch.bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        # what differs by rounding alone counts as equal, so that the result does not depend on the device
        ahead, behind = shifted(down, right) * (1 + 1e-5), shifted(-down, -right) * (1 - 1e-5)
        ridge |= (sector == number) & (size > ahead) & (size >= behind)
    return pad(ridge[:, :, 1:-1, 1:-1], (1, 1, 1, 1))


def _connected(sure: Tensor, possible: Tensor) -> Tensor:
    """``sure`` grown within ``possible`` over neighbours, diagonal ones too, until nothing is added."""
    while True:
        grown = (max_pool2d(sure.float(), 3, 1, 1) > 0) & possible | sure
        if torch.equal(grown, sure):
            return sure
        sure = grown


# -- surfaces, details, holes -----------------------------------------------------------------------------------------


def depth_like(pictures: Tensor, keys: Sequence[int] = (), *, share: float = 1 / 16) -> Tensor:
    """The brightness without anything finer than ``share`` of the shorter side: near and far as soft masses."""
    return blurred(brightness(pictures), share * min(pictures.shape[2:]))


def low_resolution(pictures: Tensor, keys: Sequence[int] = (), *, factor: int = 8) -> Tensor:
    """Each side's ``factor``-th part by means, back to full size by nearest neighbours: [B, 3, H, W]."""
    height, width = pictures.shape[2:]
    filled = pad(pictures, (0, -width % factor, 0, -height % factor), mode="replicate")
    return interpolate(avg_pool2d(filled, factor), scale_factor=factor, mode="nearest")[:, :, :height, :width]


def masked(pictures: Tensor, keys: Sequence[int]) -> Tensor:
    """[B, 4, H, W]: a mask, 1 where the picture is to be filled in, and the picture, 0 there. The hole is a rectangle
    of a quarter to three quarters of each side, anywhere, drawn from the picture's key."""
    height, width = pictures.shape[2:]
    masks = torch.zeros(len(pictures), 1, height, width)
    for mask, key in zip(masks, keys, strict=True):
        tall_share, wide_share, down, right = torch.rand(4, generator=randomness.generator("hole", key)).tolist()
        tall, wide = (max(1, int((0.25 + s / 2) * side)) for s, side in ((tall_share, height), (wide_share, width)))
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        mask[:, top : top + tall, left : left + wide] = 1
    return with_mask(pictures, masks.to(pictures))


def with_mask(pictures: Tensor, masks: Tensor) -> Tensor:
    """The control picture of a given mask [B, 1, H, W], 1 where the picture is to be filled in."""
    return torch.cat([masks, pictures * (1 - masks)], 1)


def visible(control: Tensor) -> Tensor:
    """Control pictures [B, C, H, W] as pictures to look at, [B, 3, H, W]: of a mask and a picture, the picture."""
    return control[:, -3:] if control.shape[1] >= 3 else control[:, :1].expand(-1, 3, -1, -1)


# -- by name ----------------------------------------------------------------------------------------------------------

CONTROLS: dict[str, Control] = {
    "canny": Control("Canny edges", 1, canny),
    "soft-edges": Control("Soft edges", 1, soft_edges),
    "depth": Control("Depth-like blur", 1, depth_like),
    "low-resolution": Control("Low-resolution picture", 3, low_resolution),
    "mask": Control("Mask (inpainting)", 4, masked),
}


def register(name: str, control: Control) -> None:
    """Make a control of one's own known as ``name``. Raises OneStepError where the name is taken."""
    if name in CONTROLS:
        raise OneStepError(f"a control {name!r:.60} is known already: choose another name")
    CONTROLS[name] = control


def control_of(name: str) -> Control:
    """Raises OneStepError for an unknown name."""
    if name not in CONTROLS:
        raise OneStepError(f"no control {name!r:.60}: known are {', '.join(CONTROLS)[:200]}")
    return CONTROLS[name]


def edge_f1(found: Tensor, wanted: Tensor, reach: int = 1) -> Tensor:
    """[B] F1 of edges [B, 1, H, W], 0 or 1: the harmonic mean of the share of ``found`` edge pixels that have a
    ``wanted`` one within ``reach`` pixels, and the other way round (as BSDS, IEEE PAMI 26(5), 2004, without its
    matching one to one). 1 where both have none."""

    def share(of: Tensor, near: Tensor) -> Tensor:
        grown = max_pool2d(near, 2 * reach + 1, 1, reach)
        return (of * grown).flatten(1).sum(1) / of.flatten(1).sum(1).clamp_min(1)

    precision, recall = share(found, wanted), share(wanted, found)
    none = (found.flatten(1).sum(1) + wanted.flatten(1).sum(1)) == 0
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return torch.where(none, torch.ones_like(f1), f1)
