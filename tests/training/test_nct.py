"""NCT's loss against NumPy: its coupled noises, its distance, its levels, its terms and their gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from torch import Tensor, nn

from onestep.core.adapter_module import Call
from onestep.core.cond import Cond
from onestep.core.denoiser import X0Denoiser
from onestep.core.recipe import Recipe
from onestep.core.roles import Roles
from onestep.core.schedule import FlowSchedule, VPSchedule
from onestep.core.targets import Target
from onestep.training.engine.batch import Batch
from onestep.training.methods import nct

NAME = "onestep.training.methods.nct"
SHAPE, WIDTH, ROWS = (2, 2, 2), 8, 6


class Generator(nn.Module):
    """x0 = layer(x), told nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.layer(x.flatten(1)).reshape(x.shape)


class Adding(nn.Module):
    """Gives what the layer gave, and p times the control. With ``obeys`` it gives the control alone."""

    before, after = frozenset[str](), frozenset({"layer"})

    def __init__(self, obeys: bool = False) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.obeys = obeys

    def on_input(self, name: str, x: Tensor, call: Call) -> Tensor:
        return x

    def on_output(self, name: str, x: Tensor, output: Tensor, call: Call) -> Tensor:
        control = call.inputs["control"]
        if control is None:
            return output
        control = control.flatten(1)
        return 0 * self.p + control if self.obeys else output + self.p * control


class World:
    """A linear generator G(z) = W sigma z in float64, as ComfyUI's samplers begin, and f(z, c) = G(z) + p c."""

    def __init__(self, schedule: Any = None, obeys: bool = False) -> None:
        schedule = schedule or VPSchedule.scaled_linear()
        draw = torch.Generator().manual_seed(0)
        network, self.side = Generator().requires_grad_(False), Adding(obeys)
        network.layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64) / 3)
        roles = Roles([Target("layer", network.layer)])
        roles.add_module("student", self.side)
        roles.install()
        self.denoise = X0Denoiser(network, schedule, roles)
        self.recipe = Recipe.for_student(schedule, 1, "unet", (), 0.6)
        time = float(self.recipe.timesteps[0])
        sigma = float(schedule.sigma_of_time(torch.tensor(time, dtype=torch.float64)))
        self.gain = network.layer.weight.numpy() * sigma
        self.batch = Batch(Cond(torch.zeros(ROWS, 1, 1)), None, 5, 7, range(10, 10 + ROWS), SHAPE, torch.device("cpu"))
        self.z = torch.randn(ROWS, *SHAPE, generator=draw, dtype=torch.float64)
        self.x = torch.from_numpy(flat(self.z) @ self.gain.T).reshape(self.z.shape)
        self.control = torch.randn(ROWS, *SHAPE, generator=draw, dtype=torch.float64)

    def triples(self, levels: int) -> Any:
        control = self.x if self.side.obeys else self.control
        return nct.Triples(self.z, self.x, control, levels)

    def loss(self, module: ModuleType, levels: int, boundary: float = 0.3) -> Tensor:
        return objective(self, module, boundary)(self.denoise, self.batch, self.triples(levels))

    def expected(self, levels: int, boundary: float = 0.3) -> tuple[float, float]:
        """The loss, and its derivative by p, in NumPy from the module's equations."""
        p, z, x, c = 0.3, flat(self.z), flat(self.x), flat(self.control)
        u, e = self.batch.uniform("nct level").numpy()[:, None], flat(self.batch.normal("nct noise"))
        t = np.where(self.batch.uniform("nct boundary").numpy()[:, None] < boundary, 0, 1 - u)
        r = np.maximum(0, t - 1 / levels)

        def f(t: Any) -> Any:
            s = np.sin(np.pi / 2 * t)
            return (np.sqrt(1 - s**2) * z + s * e) @ self.gain.T + p * c

        gap, size = f(t) - np.where(r == 0, x, f(r)), 0.3 * np.sqrt(WIDTH)
        root = np.sqrt((gap**2).sum(1) + size**2)
        return float((root - size).mean()), float(((gap * c).sum(1) / root).mean())


def objective(world: World, module: ModuleType, boundary: float) -> Any:
    return module.NoiseConsistency(world.recipe, boundary)


def flat(x: Tensor) -> Any:
    return x.double().flatten(1).numpy()


# -- the parts --------------------------------------------------------------------------------------------------------


def test_every_coupled_noise_is_standard_normal() -> None:
    draw = torch.Generator().manual_seed(0)
    z, e = (torch.randn(200_000, 1, generator=draw, dtype=torch.float64) for _ in range(2))
    for t in (0.0, 0.25, 0.5, 1.0):
        z_t = nct.coupled(z, e, torch.full((len(z),), t))
        s = np.sin(np.pi / 2 * t)
        assert float(z_t.mean()) == pytest.approx(0, abs=0.01) and float(z_t.var()) == pytest.approx(1, abs=0.01)
        assert float((z_t * z).mean()) == pytest.approx(np.sqrt(1 - s**2), abs=0.01)
        assert float((z_t**4).mean()) == pytest.approx(3, abs=0.1)


def test_the_ends_are_the_noises_and_neighbours_share_both() -> None:
    z, e = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    assert torch.equal(nct.coupled(z, e, torch.zeros(3)), z)
    assert torch.allclose(nct.coupled(z, e, torch.ones(3)), e, atol=1e-6)
    near = nct.coupled(z, e, torch.tensor([0.5, 0.0, 1.0])) - nct.coupled(z, e, torch.tensor([0.49, 0.01, 0.99]))
    assert float(near.abs().max()) < 0.06


def test_the_distance_is_of_whole_samples() -> None:
    a, b = torch.randn(3, *SHAPE, dtype=torch.float64), torch.randn(3, *SHAPE, dtype=torch.float64)
    c = 0.3 * np.sqrt(WIDTH)
    wanted = np.sqrt(((flat(a) - flat(b)) ** 2).sum(1) + c**2) - c
    np.testing.assert_allclose(nct.distance(a, b), wanted, rtol=1e-12)
    assert torch.equal(nct.distance(a, a), torch.zeros(3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(nct.distance(a.requires_grad_(), b).sum(), a)
    far = np.sqrt(((flat(a.detach()) - flat(b)) ** 2).sum(1))
    np.testing.assert_allclose(slope.flatten(1).norm(dim=1), far / np.sqrt(far**2 + c**2), rtol=1e-5)


def test_levels_double_in_equal_stages() -> None:
    found = [nct.levels_at(update, 400, 4, 32) for update in range(400)]
    assert found == [4] * 100 + [8] * 100 + [16] * 100 + [32] * 100
    assert {nct.levels_at(update, 50, 8, 8) for update in range(50)} == {8}
    assert {nct.levels_at(update, 10, 1, 1) for update in range(10)} == {1} and nct.levels_at(10, 10, 4, 16) == 16


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [VPSchedule.scaled_linear, FlowSchedule], ids=["vp", "flow"])
@pytest.mark.parametrize(("levels", "boundary"), [(1, 0.0), (1, 0.5), (4, 0.0), (4, 0.5), (32, 0.3), (4, 1.0)])
def test_loss_and_gradient_are_those_of_the_equations(schedule: Any, levels: int, boundary: float) -> None:
    world = World(schedule())
    value, slope = world.expected(levels, boundary)
    loss = world.loss(nct, levels, boundary)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)  # the noise is drawn in float32
    loss.backward()
    assert world.side.p.grad is not None
    assert float(world.side.p.grad) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 16])
def test_a_generator_that_obeys_has_no_loss(levels: int) -> None:
    """f(z', c) = x for every noise z', where c says all of x."""
    world = World(obeys=True)
    loss = world.loss(nct, levels)
    assert float(loss.detach()) == 0
    loss.backward()
    assert float(world.side.p.grad or 0.0) == 0


def test_a_new_adapter_has_the_boundary_already() -> None:
    """At p = 0, f is G: at its own noise nothing is to be learnt, at others how much G changes."""
    world = World()
    world.side.p.data.zero_()
    assert float(world.loss(nct, 8, boundary=1.0).detach()) < 1e-12 < float(world.loss(nct, 8, boundary=0.0).detach())


def test_the_first_levels_ask_for_the_picture_itself() -> None:
    """N = 1: every t is asked for x, whatever f says at nearer noises; N = 4: those below 1 / 4."""
    world = World()
    t = 1 - world.batch.uniform("nct level").numpy()
    for levels, own in ((1, t <= 1), (4, t <= 0.25), (2, t <= 0.5)):
        earlier = objective(world, nct, 0.0)._earlier(
            world.denoise, world.batch, world.triples(levels), world.z, torch.from_numpy(t)
        )
        assert (flat(earlier) == flat(world.x)).all(1).tolist() == own.tolist()
    assert 0 < (t <= 0.5).sum() < len(t), "the drawn levels lie on both sides"


def test_without_a_control_the_adapter_is_not_there() -> None:
    world = World()
    x = nct.controlled(world.denoise, world.recipe, world.batch, world.z)
    np.testing.assert_allclose(flat(x), flat(world.x), rtol=1e-12)


def test_descent_makes_the_adapter_obey() -> None:
    """With one level, f(e, c) is asked for x: descent by the loss's own gradient ends where a grid finds it least."""
    world = World()
    values = {}
    for p in np.linspace(-0.5, 0.5, 11):
        world.side.p.data.fill_(float(p))
        values[float(p)] = float(world.loss(nct, 1, boundary=0.0).detach())
    least = min(values, key=lambda p: values[p])
    world.side.p.data.fill_(0.5)
    optimizer = torch.optim.SGD([world.side.p], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        world.loss(nct, 1, boundary=0.0).backward()
        optimizer.step()
    assert float(world.side.p.detach()) == pytest.approx(least, abs=0.1)


def checked(module: ModuleType) -> None:
    """What the tests above hold the module to."""
    world = World()
    for levels, boundary in ((1, 0.0), (4, 0.5)):
        world.side.p.grad = None
        value, slope = world.expected(levels, boundary)
        loss = world.loss(module, levels, boundary)
        np.testing.assert_allclose(float(loss.detach()), value, rtol=1e-5)
        loss.backward()
        np.testing.assert_allclose(float(world.side.p.grad), slope, rtol=1e-5)  # type: ignore[arg-type]


MUTANTS = [
    ("t - 1 / data.levels", "t - 2 / data.levels"),
    ("torch.where(own, 0.0,", "torch.where(own, 1.0,"),
    ("1 - batch.uniform", "batch.uniform"),
    ("coupled(data.noise, fresh, r)", "coupled(fresh, data.noise, r)"),
    ("@torch.no_grad()\n    def _earlier", "@torch.enable_grad()\n    def _earlier"),
    ("torch.where(expand(r, data.x) > 0, found, data.x)", "torch.where(expand(r, data.x) > 0, data.x, found)"),
    ("math.pi / 2 * t.double()", "math.pi * t.double()"),
    ("torch.cos(angle)", "torch.sin(angle)"),
    ("+ c**2) - c", "+ c**2)"),
    ("ROUND = 0.3", "ROUND = 0.00054"),
    ("ROUND * math.sqrt(a[0].numel())", "ROUND * math.sqrt(a.numel())"),
    (".square().flatten(1).sum(1)", ".square().flatten(1).mean(1)"),
    ("recipe.initial_noise_scale)", "2 * recipe.initial_noise_scale)"),
]


@pytest.mark.parametrize(("old", "new"), MUTANTS, ids=[new for _, new in MUTANTS])
def test_a_wrong_equation_is_found_out(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(nct)
    must_fail(checked, mutant(NAME, old, new, monkeypatch))
