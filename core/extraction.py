"""The difference of two checkpoints of one base as a LoRA, layer by layer.

    plain:     min ||D - B A||_F        D = W' - W = U S V^T,  B A = U_r S_r V_r^T         (Eckart and Young, 1936)
    whitened:  min E ||(D - B A) x||^2  E x x^T = L L^T, D L = U S V^T,  B A = U_r S_r V_r^T L^-1
                                                                                         (SVD-LLM, arXiv:2403.07378)

x is what enters the layer. Of a convolution it is the input's channels, taken as alike under every tap of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OneStepError
from .factors import State
from .targets import Target

FLOOR = 1e-4
"""Of the mean variance of a layer's input: what each direction is given at least, so that L can be inverted."""
Weight = Callable[[Target], Tensor]
"""A target's weight [out, in, ...] in canonical order, float32."""


@dataclass(frozen=True)
class Kept:
    """How much of one layer's difference the LoRA holds. size: ||D||^2. weights: 1 - ||D - B A||^2 / ||D||^2. outputs:
    the same of what the layer puts out, E ||D x||^2, where inputs were seen; output_size: E ||D x||^2."""

    size: float
    weights: float
    output_size: float | None = None
    outputs: float | None = None


def weight_of(target: Target) -> Tensor:
    """The weight in the host's layer, of this target's rows, in canonical order."""
    weight = getattr(target.module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise OneStepError(
            f"{target.name} has quantised weights, whose difference cannot be taken: load both in bf16 or fp16"
        )
    return target.canonical_order(weight.detach()[slice(*target.row_range)].float())


def extract(
    targets: Iterable[Target], base: Weight, few: Weight, rank: int, moments: dict[str, Tensor] | None = None
) -> Iterator[tuple[str, tuple[Tensor, Tensor], Kept]]:
    """(name, (A, B), what is kept) of each target whose weights differ, one after another, so that no more than a
    layer's matrices are held at once. moments: E x x^T [in, in] by name; layers without one are taken plainly.

    Raises OneStepError where the two have other shapes, or hold what is no number.
    """
    if not 1 <= rank <= 4096:
        raise OneStepError(f"rank is {rank}: it must lie in 1 to 4096")
    for target in targets:
        # on one device, and where there is float64
        place = torch.device("cpu") if (before := base(target)).device.type == "mps" else before.device
        before, after = before.to(place), few(target).to(place)
        if before.shape != after.shape:
            raise OneStepError(
                f"{target.name} is {list(before.shape)} in the base and {list(after.shape)} in the few-step model: "
                "give two checkpoints of one base"
            )
        difference = (after - before).float()
        if not bool(difference.isfinite().all()):
            raise OneStepError(f"the difference of {target.name} is no number: one of the checkpoints is broken")
        if difference.any() and not only_rounded(before, after):
            moment = None if moments is None else moments.get(target.name)
            moment = None if moment is None else moment.to(place)
            factors = low_rank(difference, rank, moment)
            yield target.name, (factors[0].cpu(), factors[1].cpu()), kept(difference, factors, moment)


def only_rounded(one: Tensor, other: Tensor) -> bool:
    """Whether one of two weights, float32, is the other one as float16 or bfloat16 keeps it: two files of one model."""
    for dtype in (torch.float16, torch.bfloat16):
        short = [value.to(dtype) for value in (one, other)]
        kept_so = any(torch.equal(rounded.float(), value) for rounded, value in zip(short, (one, other), strict=True))
        if kept_so and torch.equal(*short):
            return True
    return False


def low_rank(difference: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(A [r, in, ...], B [out, r, ...]) of ``difference`` [out, in, ...] by the equations above, r at most ``rank``."""
    out, inputs, *kernel = difference.shape
    root = None if moment is None else root_of(moment)
    matrix = difference if root is None else torch.einsum("oi...,ij->oj...", difference.double(), root)
    u, s, v = svd(matrix.double().flatten(1))
    r = min(rank, len(s))
    scale = s[:r].sqrt()
    a = (scale[:, None] * v[:r]).reshape(r, inputs, *kernel)
    if root is not None:
        # A' = A L^-1 over the channels: L^T X = A^T, L lower triangular
        flat = a.movedim(1, 0).flatten(1)
        a = torch.linalg.solve_triangular(root.T, flat, upper=True).reshape(inputs, r, *kernel).movedim(0, 1)
    b = (u[:, :r] * scale).reshape(out, r, *(1 for _ in kernel))
    return a.contiguous().float(), b.contiguous().float()


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [m, k], S [k], V^T [k, n]) of a float64 ``matrix`` [m, n], k the smaller side, largest first.

    From the eigenvectors of the smaller of M M^T and M^T M, many times faster than an SVD of a wide matrix; the other
    side follows from M itself, so that U S V^T is M to rounding, however small a value.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, u = svd(matrix.T)
        return u.T, s, v.T
    u = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    rest = u.T @ matrix
    s = rest.norm(dim=1)
    return u, s, rest / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]


def root_of(moment: Tensor) -> Tensor:
    """L of E x x^T + floor = L L^T, float64. Raises OneStepError where the moment is no number."""
    moment = moment.double()
    if not bool(moment.isfinite().all()):
        raise OneStepError("what enters a layer is no number on these prompts: leave --prompts out, or load in float32")
    floor = FLOOR * moment.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + floor * eye)
        if not failed:
            return root
        floor = 10 * floor  # a sum in float32 has small eigenvalues that are below 0


def kept(difference: Tensor, factors: tuple[Tensor, Tensor], moment: Tensor | None = None) -> Kept:
    """How much of ``difference`` the factors hold."""
    a, b = (factor.double().flatten(1) for factor in factors)
    whole = difference.double()
    left = whole - (b @ a).reshape(whole.shape)
    size = float(whole.square().sum())
    weights = 1 - float(left.square().sum()) / size
    if moment is None:
        return Kept(size, weights)
    outputs = _through(whole, moment)
    return Kept(size, weights, outputs, 1 - _through(left, moment) / outputs if outputs else 1.0)


def _through(matrix: Tensor, moment: Tensor) -> float:
    """E ||M x||^2 = tr(M C M^T), summed over the taps of a kernel."""
    return float((torch.einsum("oi...,ij->oj...", matrix, moment.double()) * matrix).sum())


def in_all(layers: dict[str, Kept]) -> Kept:
    """Of the whole network: shares weighed by the layers' sizes."""
    size = sum(layer.size for layer in layers.values())
    weights = sum(layer.size * layer.weights for layer in layers.values()) / size if size else 1.0
    seen = [layer for layer in layers.values() if layer.output_size is not None]
    if not seen:
        return Kept(size, weights)
    through = sum(layer.output_size or 0.0 for layer in seen)
    outputs = sum((layer.output_size or 0.0) * (layer.outputs or 0.0) for layer in seen)
    return Kept(size, weights, through, outputs / through if through else 1.0)


def of_all(found: Iterable[tuple[str, tuple[Tensor, Tensor], Kept]]) -> tuple[State, dict[str, Kept]]:
    """(state, what is kept of each layer). Raises OneStepError where nothing differs."""
    state: State = {}
    layers: dict[str, Kept] = {}
    for name, factors, share in found:
        state[name], layers[name] = factors, share
    if not state:
        raise OneStepError("the two checkpoints have the same weights in every layer: there is nothing to extract")
    return state, layers
