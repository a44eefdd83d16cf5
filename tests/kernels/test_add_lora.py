"""The added products against merged weights in float64, finite differences and forward mode, by each implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onestep.kernels import LoRA, Place, add_lora, add_lora_reference
from onestep.kernels.add_lora import OP

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = {
    "tokens": (5, 7, 19, 21),
    "rows": (5, None, 33, 70),
    "wide": (3, 70, 40, 130),
    "small": (5, 1, 3, 4),
    "one": (1, 1, 1, 1),
}


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def places(batch: int, wide: int) -> list[Place]:
    """The first row is the teacher's, the last rows' layer is fused, with features between that nobody serves."""
    if batch == 1:
        return [Place(scale=2.0)]
    third = wide // 3
    fused = [Place(slice(3, batch), slice(0, third)), Place(slice(3, batch), slice(third + 1, wide), 0.5)]
    return [Place(slice(1, 3)), *(fused if batch > 3 else [])]


def case(name: str, ranks: tuple[int, ...] = (3, 5, 4)) -> tuple[Tensor, Tensor, list[LoRA]]:
    """out, x and adapters, float64."""
    batch, tokens, width, wide = SHAPES[name]
    middle = () if tokens is None else (tokens,)
    found = []
    for rank, place in zip(ranks, places(batch, wide), strict=False):
        rows = len(range(*place.features.indices(wide)))
        found.append(LoRA(drawn(rank, width) / width**0.5, drawn(rows, rank), place))
    return drawn(batch, *middle, wide), drawn(batch, *middle, width), found


def merged(out: Tensor, x: Tensor, loras: list[LoRA]) -> Tensor:
    """y + s (B A) x, each row with its own weight, in float64."""
    weight = x.new_zeros(len(x), out.shape[-1], x.shape[-1], dtype=torch.float64)
    for a, b, (rows, features, scale) in loras:
        weight[rows, features] += scale * (b.double() @ a.double())
    return out.double() + torch.einsum("noi,n...i->n...o", weight, x.double())


def cast(found: tuple[Tensor, Tensor, list[LoRA]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Leaves: the network's tensors in its dtype, float32 masters."""
    out, x, loras = found
    factors = [factor.float() for lora in loras for factor in lora[:2]]
    return [value.to(device).requires_grad_(True) for value in (out.to(dtype), x.to(dtype), *factors)]


def gradients(function, leaves: list[Tensor], where: list[Place]) -> list[Tensor]:
    """The output and the gradient of a fixed projection of it, by out, x and each factor."""
    out, x, *factors = leaves
    loras = [LoRA(a, b, place) for a, b, place in zip(factors[::2], factors[1::2], where, strict=True)]
    result = function(out.clone(), x, loras)
    probe = drawn(*result.shape, seed=1).to(result)
    return [result, *torch.autograd.grad((result * probe).sum(), leaves)]


def assert_near(ours: list[Tensor], right: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(ours, right, strict=True):
        gap = (mine.double() - other.double()).abs().max()
        assert gap <= tolerance * other.double().abs().max(), f"{float(gap):.3g} of {float(other.abs().max()):.3g}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_are_those_of_merged_weights(name, dtype, implementation, device):
    found = case(name)
    leaves, where = cast(found, dtype, device), [lora.place for lora in found[2]]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    ours, right = gradients(add_lora, leaves, where), gradients(merged, exact, where)
    assert [value.dtype for value in ours] == [dtype, dtype, dtype] + [torch.float32] * (len(leaves) - 2)
    assert_near(ours, right, TOLERANCE[dtype])


def test_the_tests_above_ran_the_kernel_that_they_name(implementation, device):
    assert OP.choice(device, torch.float32) == implementation


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_nobody_serves_keeps_every_bit(dtype, implementation, device):
    out, x, loras = case("tokens")
    out[0, 0, 0], out[3, 2, 8] = float("nan"), -0.0
    given = out.to(device, dtype)
    before = given.clone()
    found = add_lora(given, x.to(given), [LoRA(a.float().to(device), b.float().to(device), p) for a, b, p in loras])
    assert found.data_ptr() == given.data_ptr()
    nobody = torch.ones_like(before, dtype=torch.bool)
    for _, _, (rows, features, _) in loras:
        nobody[rows, ..., features] = False
    assert nobody.any() and (found != before)[~nobody].float().mean() > 0.9
    assert torch.equal(found[nobody].view(torch.uint8), before[nobody].view(torch.uint8))


def test_only_what_is_wanted_is_computed(implementation, device):
    out, x, loras = case("tokens")
    out, x = out.float().to(device), x.float().to(device)
    loras = [LoRA(a.float().to(device), b.float().to(device), place) for a, b, place in loras]
    assert not add_lora(out.clone(), x, loras).requires_grad
    x.requires_grad_(True)
    frozen = torch.autograd.grad(add_lora(out.clone(), x, loras).sum(), x)[0]
    for a, b, _ in loras:
        a.requires_grad_(True), b.requires_grad_(True)
    torch.testing.assert_close(frozen, torch.autograd.grad(add_lora(out.clone(), x, loras).sum(), x)[0])
    first = add_lora(out.clone(), x.detach(), loras)
    found = torch.autograd.grad(first.sum(), [factor for lora in loras for factor in lora[:2]])
    assert all(float(gradient.abs().sum()) > 0 for gradient in found)


def test_gradients_match_finite_differences_twice():
    out, x, loras = case("small", (2, 1, 1))
    where = [lora.place for lora in loras]
    leaves = [leaf.requires_grad_(True) for leaf in (out, x, *(factor for lora in loras for factor in lora[:2]))]

    def function(out: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        return add_lora(out.clone(), x, [LoRA(*f) for f in zip(factors[::2], factors[1::2], where, strict=True)])

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_forward_mode_has_the_tangent(implementation):
    """A kernel would give none, without a word."""
    out, x, loras = case("tokens")
    values = [value.float() for value in (out, x, *(factor for lora in loras for factor in lora[:2]))]
    moves = [drawn(*value.shape, seed=2).float() for value in values]

    def function(out: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        pairs = zip(factors[::2], factors[1::2], loras, strict=True)
        return add_lora(out, x, [LoRA(a, b, lora.place) for a, b, lora in pairs])

    _, tangent = torch.func.jvp(function, tuple(values), tuple(moves))
    h = 1e-6
    ends = [[v.double() + side * h * m.double() for v, m in zip(values, moves, strict=True)] for side in (1, -1)]
    slope = (function(*ends[0]) - function(*ends[1])) / (2 * h)
    assert_near([tangent], [slope], 1e-5)


def test_tensors_that_cannot_be_written_give_a_new_one(implementation, device):
    """Strided, of another dtype than x, a leaf, under autocast."""
    out, x, loras = case("tokens")
    right = merged(out, x, loras).to(device)
    out, x = out.float().to(device), x.float().to(device)
    loras = [LoRA(a.float().to(device), b.float().to(device), place) for a, b, place in loras]
    turned = out.transpose(1, 2).contiguous().transpose(1, 2)
    given = {"strided": turned, "wider": out.double(), "a leaf": out.clone().requires_grad_(True)}
    for name, value in given.items():
        before = value.detach().clone()
        found = add_lora(value, x, loras)
        assert found.dtype == value.dtype and torch.equal(value, before), name
        assert_near([found], [right], 2e-6)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_near([add_lora(out.bfloat16(), x, loras)], [right], 2e-2)


def test_turned_inputs_factors_and_gradients(implementation, device):
    """x as a transpose leaves it, factors that are views, a gradient that is expanded."""
    out, x, loras = case("tokens")
    leaves, where = cast((out, x, loras), torch.float32, device), [lora.place for lora in loras]
    right = gradients(merged, [leaf.detach().double().requires_grad_(True) for leaf in leaves], where)
    turned = [leaf.detach().mT.contiguous().mT.requires_grad_(True) for leaf in leaves]
    assert_near(gradients(add_lora, turned, where), right, 2e-6)
    loras = [LoRA(a, b, place) for a, b, place in zip(leaves[2::2], leaves[3::2], where, strict=True)]
    spread = torch.autograd.grad(add_lora(leaves[0].clone(), leaves[1], loras).sum(), leaves[1])[0]
    wanted = torch.autograd.grad(add_lora_reference(leaves[0], leaves[1], loras).sum(), leaves[1])[0]
    torch.testing.assert_close(spread, wanted)


@pytest.mark.parametrize("shape", [(0, 7, 19), (5, 0, 19)])
def test_nothing_to_serve(shape, implementation, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    a, b = (torch.ones(size, device=device, requires_grad=True) for size in ((3, 19), (21, 3)))
    found = add_lora(torch.zeros(*shape[:2], 21, device=device), x, [LoRA(a, b)])
    gradients = torch.autograd.grad(found.sum(), (x, a, b))
    assert found.shape == (*shape[:2], 21) and all(float(gradient.abs().sum()) == 0 for gradient in gradients)


def test_who_needed_the_output_is_told(implementation, device):
    """Autograd notes that the memory was written, rather than go back through other numbers."""
    layer = torch.nn.Linear(19, 21, device=device).requires_grad_(False)
    x = drawn(2, 3, 19).float().to(device).requires_grad_(True)
    out = layer(x)
    kept = out * out
    add_lora(out, x, [LoRA(torch.ones(2, 19, device=device), torch.ones(21, 2, device=device))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_what_follows_may_write_too(implementation, device):
    """A network adds to its layer's output in place."""
    _, x, loras = case("tokens")
    x = x.float().to(device).requires_grad_(True)
    loras = [LoRA(a.float().to(device), b.float().to(device), place) for a, b, place in loras]
    layer = torch.nn.Linear(19, 21, device=device).requires_grad_(False)
    found = add_lora(layer(x), x, loras)
    found += 1
    right = add_lora_reference(layer(x), x, loras) + 1
    torch.testing.assert_close(found, right)
    ours, theirs = (torch.autograd.grad(value.square().sum(), x)[0] for value in (found, right))
    torch.testing.assert_close(ours, theirs)


def test_a_compiler_sees_plain_operations():
    out, x, loras = case("tokens")
    compiled = torch.compile(lambda out, x: add_lora(out, x, loras), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out, x), add_lora_reference(out, x, loras))
