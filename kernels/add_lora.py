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
from .choice import REFERENCE, Op, load_triton


class Place(NamedTuple):
    """Which rows of a batch and which features of a layer's output a product is added to, and its scale."""

    rows: slice = slice(None)
    features: slice = slice(None)
    scale: float = 1.0


EVERYWHERE = Place()


class LoRA(NamedTuple):
    """a: [r, in] of a linear layer, [r, in, kh, kw] of a convolution. b: [out, r] or [out, r, 1, 1], out being the
    place's features. Float32 masters, or of any dtype and device: they are cast to x's."""

    a: Tensor
    b: Tensor
    place: Place = EVERYWHERE


def add_lora(out: Tensor, x: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """out[rows, ..., features] + s B (A x[rows]) for each of ``loras``, whose places are apart.

    out: [N, ..., out], a linear layer's fresh output, which nobody else needs: it is written over where that is
    possible. x: [N, ..., in], the layer's input. Returns [N, ..., out] in out's dtype.
    """
    if out.dtype != x.dtype or out.ndim < 2 or not out.is_contiguous() or not may_be_written(out):
        return add_lora_reference(out, x, loras)
    graph = torch.is_grad_enabled()
    if graph and len(loras) == 1 and loras[0].place is EVERYWHERE and OP.choice(x.device, x.dtype) == REFERENCE:
        a, b = loras[0][:2]
        return add_one(out, x, a, b, a.detach().to(x).t(), b.detach().to(x).t())
    places, factors = [lora.place for lora in loras], [factor for lora in loras for factor in lora[:2]]
    if graph:
        return _AddLoRA.apply(out, x, places, *factors)
    OP.run("forward", out, out, x, places, factors)
    return out


def add_one(out: Tensor, x: Tensor, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor) -> Tensor:
    """`add_lora` of one adapter on all of a linear layer's contiguous ``out``, by plain torch, with a graph.

    a: [r, in], b: [out, r]: the masters, which get the gradients. a_t: [in, r], b_t: [r, out]: the same in x's dtype,
    transposed, which go into the products and must not be written to while the graph is needed.
    """
    return _AddOne.apply(out, x, a, b, a_t, b_t)  # type: ignore[no-any-return, no-untyped-call]


def add_lora_reference(out: Tensor, x: Tensor, loras: Sequence[LoRA]) -> Tensor:
    """What `add_lora` computes, written out in a new tensor; every derivative of it works."""
    out = out.clone()
    for a, b, (rows, features, scale) in loras:
        product = F.linear(F.linear(x[rows], a.to(x)), b.to(x))
        out[rows, ..., features] += scale * product.to(out.dtype)
    return out


def may_be_written(out: Tensor) -> bool:
    """Forward mode, a compiler and autocast want plain operations; a leaf is its owner's; whole numbers would be
    rounded where they lie."""
    owned = (out.is_leaf and out.requires_grad) or not out.is_floating_point()
    return not (owned or autocast(out) or in_forward_ad() or torch.compiler.is_compiling())


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
        wanted = ctx.needs_input_grad
        found = _went_back(gradients[0], ctx.saved_tensors, ctx.places, (wanted[1], *wanted[3:]))
        return gradients[0], found[0], None, *found[1:]


class _AddOne(torch.autograd.Function):
    """The same of one adapter everywhere, by plain torch: nearly every call of a run's, without the work of places."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor) -> Tensor:
        written = out.detach()
        h = x.reshape(-1, x.shape[-1]).mm(a_t)
        written.view(-1, out.shape[-1]).addmm_(h, b_t)
        # the masters' versions tell of what is written to them; casts are nobody's to write to
        ctx.casts = a_t, b_t
        ctx.save_for_backward(x, a, b, h)
        return written

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), wanted = gradients, ctx.needs_input_grad[1:4]
        x, a, b, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this backward
            return gradient, *_differentiable(gradient, [x, a, b], [EVERYWHERE], wanted), None, None
        a_t, b_t = ctx.casts
        g = tokens(gradient)
        # h = A x,  y = B h:   dh = B^T dy,  dx = A^T dh,  dA = dh x^T,  dB = dy h^T
        dh = g.mm(b_t.t()) if wanted[0] or wanted[1] else g
        dx = dh.mm(a_t.t()).view(x.shape) if wanted[0] else None
        da = dh.t().mm(tokens(x)).to(a) if wanted[1] else None
        db = g.t().mm(h).to(b) if wanted[2] else None
        return gradient, dx, da, db, None, None


def _went_back(
    gradient: Tensor, saved: Sequence[Tensor], places: list[Place], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are wanted of x and of each factor. saved: x, the factors, and each A x."""
    x, *rest = saved
    factors, hidden = rest[: 2 * len(places)], rest[2 * len(places) :]
    if torch.is_grad_enabled():  # somebody differentiates this backward
        return _differentiable(gradient, [x, *factors], places, wanted)
    asked = wanted[0], any(wanted[1:])
    given = OP.run("backward", gradient, gradient, x, places, factors, hidden, *asked)
    found: list[Tensor | None] = [*given] if asked[0] else [None, *given]
    return found if asked[1] else [*found, *(None for _ in factors)]


def _differentiable(
    gradient: Tensor, inputs: list[Tensor], places: list[Place], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """What backward gives, as a graph of its own. inputs: x and the factors."""
    x, *factors = inputs
    loras = [LoRA(a, b, place) for a, b, place in zip(factors[::2], factors[1::2], places, strict=True)]
    product = add_lora_reference(torch.zeros_like(gradient), x, loras)
    asked = [value for value, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(product, asked, gradient, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


# -- plain torch -------------------------------------------------------------------------------------------------------


def forward(out: Tensor, x: Tensor, places: Sequence[Place], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``out``, written over, and each place's A x [tokens, r]."""
    outputs, inputs, hidden = tokens(out), tokens(x), []
    for place, a, b in zip(places, factors[::2], factors[1::2], strict=True):
        hidden.append(torch.mm(_rows(inputs, place, out), a.to(x).t()))
        output = _features(_rows(outputs, place, out), place)
        output.addmm_(hidden[-1], b.to(x).t(), alpha=place.scale)
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
    one = len(places) == 1 and places[0].rows == slice(None)
    found = [] if one or not wants_x else [x.new_zeros(x.shape)]
    gradients, inputs = tokens(gradient), tokens(x)
    for place, a, b, h in zip(places, factors[::2], factors[1::2], hidden, strict=True):
        g, scale = _features(_rows(gradients, place, gradient), place), place.scale
        # h = A x,  y = s B h:   dh = s B^T dy,  dx = A^T dh,  dA = dh x^T,  dB = s dy h^T
        dh = scaled(torch.mm(g, b.to(x)), scale)
        if wants_x and one:
            found = [torch.mm(dh, a.to(x)).view(x.shape)]
        elif wants_x:
            _rows(tokens(found[0]), place, gradient).addmm_(dh, a.to(x))
        if wants_factors:
            of_a = torch.mm(dh.t(), _rows(inputs, place, gradient))
            found += [of_a.to(a), scaled(torch.mm(g.t(), h), scale).to(b)]
    return tuple(found)


def _rows(flat: Tensor, place: Place, value: Tensor) -> Tensor:
    """Of the tokens of ``value``'s batch, those of a place's rows."""
    return flat if place.rows == slice(None) else flat[in_tokens(place.rows, value)]


def _features(flat: Tensor, place: Place) -> Tensor:
    return flat if place.features == slice(None) else flat[:, place.features]


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
