r"""The low-rank products of a batch's adapters, added to their layer's output in place.

    out[rows] <- out[rows] + s B (A x[rows])        (LoRA, arXiv:2106.09685, Eq. 3, s = alpha / r)

Each role's adapter serves its own rows of the batch, and in a fused layer each target its own features; what no adapter
serves is not touched. Written out, a product, its scale, the sum and a cat of all rows would each read and write the
output; here its rows are read and written once. Backward keeps x and the factors' masters, and no cast copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import autocast, in_forward_ad
from .choice import Op, load_triton

Size = int | Sequence[int]


class Place(NamedTuple):
    """Which rows of a batch and which features of a layer's output a product is added to, and its scale."""

    rows: slice = slice(None)
    features: slice = slice(None)
    scale: float = 1.0


class LoRA(NamedTuple):
    """a: [r, in] of a linear layer, [r, in, kh, kw] of a convolution. b: [out, r] or [out, r, 1, 1], out being the
    place's features. Float32 masters, or of any dtype and device: they are cast to x's."""

    a: Tensor
    b: Tensor
    place: Place = Place()


def add_lora(out: Tensor, x: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """out[rows, ..., features] + s B (A x[rows]) for each of ``loras``, whose places are apart.

    out: [N, ..., out], a linear layer's fresh output, which nobody else needs: it is written over where that is
    possible. x: [N, ..., in], the layer's input. Returns [N, ..., out] in out's dtype.
    """
    if not (_may_be_written(out) and out.is_contiguous() and out.dtype == x.dtype and out.ndim > 1):
        return add_lora_reference(out, x, loras)
    places, factors = [lora.place for lora in loras], [factor for lora in loras for factor in lora[:2]]
    if torch.is_grad_enabled() and any(value.requires_grad for value in (out, x, *factors)):
        return _AddLoRA.apply(out, x, places, *factors)
    OP.run("forward", out, out, x, places, factors)
    return out


def add_lora_reference(out: Tensor, x: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """What `add_lora` computes, written out in a new tensor; every derivative of it works."""
    out = out.clone()
    for a, b, (rows, features, scale) in loras:
        product = F.linear(F.linear(x[rows], a.to(x)), b.to(x))
        out[rows, ..., features] += scale * product.to(out.dtype)
    return out


def add_lora_conv(
    out: Tensor,
    x: Tensor,
    loras: Sequence[LoRA],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
) -> Tensor:
    """out[rows, features] + s B (A * x[rows]): A convolves as the layer does, B mixes its channels.

    out: [N, out, H', W'], a convolution's fresh output, any strides, written over as in `add_lora`. x: [N, in, H, W].
    stride, padding, dilation: the layer's own. Returns a tensor of out's shape, dtype and layout.
    """
    geometry = stride, padding, dilation
    if not _may_be_written(out):
        return add_lora_conv_reference(out, x, loras, *geometry)
    products = [_convolved(x, lora, geometry).to(out.dtype) for lora in loras]
    if torch.is_grad_enabled() and any(value.requires_grad for value in (out, *products)):
        return _AddProducts.apply(out, [lora.place for lora in loras], *products)
    for lora, product in zip(loras, products, strict=True):
        out[lora.place.rows, lora.place.features].add_(product)
    return out


def add_lora_conv_reference(
    out: Tensor,
    x: Tensor,
    loras: Sequence[LoRA],
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
) -> Tensor:
    """What `add_lora_conv` computes, written out in a new tensor; every derivative of it works."""
    out = out.clone()
    for lora in loras:
        product = _convolved(x, lora, (stride, padding, dilation))
        out[lora.place.rows, lora.place.features] += product.to(out.dtype)
    return out


def _convolved(x: Tensor, lora: LoRA, geometry: tuple[Any, Any, Any]) -> Tensor:
    a, b, (rows, _, scale) = lora
    hidden = F.conv2d(x[rows], a.to(x), None, *geometry)
    return F.conv2d(hidden, (b if scale == 1 else scale * b).to(x))


def _may_be_written(out: Tensor) -> bool:
    """Forward mode, a compiler and autocast want plain operations; a leaf is its owner's."""
    return not (
        autocast(out) or in_forward_ad() or torch.compiler.is_compiling() or (out.is_leaf and out.requires_grad)
    )


class _AddLoRA(torch.autograd.Function):
    """The output's memory is written, and autograd told of the sum alone: the layer below needs no output to go back,
    and where anybody does need it, its version tells."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, places: list[Place], *factors: Tensor) -> Tensor:
        written = out.detach()
        ctx.places = places
        ctx.save_for_backward(x, *factors, *OP.run("forward", out, written, x, places, factors)[1:])
        return written

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, (x, *saved), wanted = gradients[0], ctx.saved_tensors, ctx.needs_input_grad
        factors, hidden = saved[: 2 * len(ctx.places)], saved[2 * len(ctx.places) :]
        if torch.is_grad_enabled():  # somebody differentiates this backward
            found: list[Tensor | None] = _differentiable(gradient, x, ctx.places, factors, wanted)
        else:
            asked = wanted[1], any(wanted[3:])
            given = OP.run("backward", gradient, gradient, x, ctx.places, factors, hidden, *asked)
            found = list(given) if asked[0] else [None, *given]
            found += [None for _ in factors] if not asked[1] else []
        return gradient, found[0], None, *found[1:]


class _AddProducts(torch.autograd.Function):
    """out[rows, features] += product, for each."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, places: list[Place], *products: Tensor) -> Tensor:
        ctx.places, written = places, out.detach()
        for place, product in zip(places, products, strict=True):
            written[place.rows, place.features].add_(product)
        return written

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, *(gradients[0][place.rows, place.features] for place in ctx.places)


def _differentiable(
    gradient: Tensor, x: Tensor, places: list[Place], factors: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What backward gives, as a graph of its own."""
    loras = [LoRA(a, b, place) for a, b, place in zip(factors[::2], factors[1::2], places, strict=True)]
    product = add_lora_reference(torch.zeros_like(gradient), x, loras)
    inputs = [x, *factors]
    asked = [value for value, want in zip(inputs, (wanted[1], *wanted[3:]), strict=True) if want]
    found = iter(torch.autograd.grad(product, asked, gradient, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in (wanted[1], *wanted[3:])]


# -- plain torch -------------------------------------------------------------------------------------------------------


def forward(out: Tensor, x: Tensor, places: Sequence[Place], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``out``, written over, and each place's A x [tokens, r]."""
    outputs, inputs, hidden = tokens(out), tokens(x), []
    for (rows, features, scale), a, b in zip(places, factors[::2], factors[1::2], strict=True):
        rows = in_tokens(rows, out)
        hidden.append(torch.mm(inputs[rows], a.to(x).t()))
        outputs[rows, features].addmm_(hidden[-1], b.to(x).t(), alpha=scale)
    return out, *hidden


def backward(
    gradient: Tensor,
    x: Tensor,
    places: Sequence[Place],
    factors: Sequence[Tensor],
    hidden: Sequence[Tensor],
    wants_x: bool = True,
    wants_factors: bool = True,
) -> tuple[Tensor, ...]:
    """The gradients, as far as they are wanted, of x and of each A and B, in their dtypes."""
    found = [x.new_zeros(x.shape)] if wants_x else []
    gradients, inputs = tokens(gradient), tokens(x)
    for (rows, features, scale), a, b, h in zip(places, factors[::2], factors[1::2], hidden, strict=True):
        rows = in_tokens(rows, gradient)
        g = gradients[rows, features]
        # h = A x,  y = s B h:   dh = s B^T dy,  dx = A^T dh,  dA = dh x^T,  dB = s dy h^T
        dh = scaled(torch.mm(g, b.to(x)), scale)
        if wants_x:
            tokens(found[0])[rows].addmm_(dh, a.to(x))
        if wants_factors:
            found += [torch.mm(dh.t(), inputs[rows]).to(a), scaled(torch.mm(g.t(), h), scale).to(b)]
    return tuple(found)


def scaled(value: Tensor, scale: float) -> Tensor:
    return value if scale == 1 else value.mul_(scale)


def tokens(value: Tensor) -> Tensor:
    """[N, ..., width] as [N ..., width]."""
    return value.reshape(-1, value.shape[-1])


def in_tokens(rows: slice, value: Tensor) -> slice:
    """Rows of a batch as rows of its tokens."""
    each = value.shape[1:-1].numel()
    start, stop, _ = rows.indices(len(value))
    return slice(start * each, stop * each)


def example(device: torch.device, dtype: torch.dtype, large: bool) -> dict[str, tuple[Any, ...]]:
    """Teacher's rows, then two roles'; the second has another rank and serves two features apart."""
    length, width, wide, rank = (1024, 1280, 1280, 64) if large else (7, 19, 21, 3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device)

    source = torch.Generator().manual_seed(0)
    out, x, gradient = (drawn(5, length, size).to(dtype) for size in (wide, width, wide))
    places = [Place(slice(1, 3)), Place(slice(3, 5), slice(0, 5)), Place(slice(3, 5), slice(9, wide), 0.5)]
    ranks, spans = (rank, rank + 2, rank + 2), (wide, 5, wide - 9)
    factors = [drawn(*s) / s[1] ** 0.5 for r, span in zip(ranks, spans, strict=True) for s in ((r, width), (span, r))]
    rows = [tokens(x[place.rows]) for place in places]
    hidden = [torch.mm(row, a.to(dtype).t()) for row, a in zip(rows, factors[::2], strict=True)]
    return {"forward": (out, x, places, factors), "backward": (gradient, x, places, factors, hidden)}


OP = Op(
    "add_lora",
    {"forward": forward, "backward": backward},
    {"triton": lambda: load_triton("triton_add_lora")},
    example,
)
