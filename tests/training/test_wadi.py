"""WaDi: rotations of the base's weights, the loss of vsd by them, the LoRA that is made of one, and whole runs."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from allocated import training
from flops import ONE_FLOP_A_SECOND, flops_of
from mutations import must_fail, mutant
from narrowed import narrowed
from oracles import CASES, Case, World, drawn, levels_in_numpy, posterior_mean, rows
from small_host import SmallHost, small
from tiny_pipelines import make
from torch import nn
from whole_runs import cancelled_and_whole, run

from onestep.core import rotation_adapter
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.targets import Target
from onestep.core.tensor_file import read_header
from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import of_host
from onestep.training.methods import METHODS, settings_for, wadi
from onestep.training.plan.rungs import Way, rung_of

THREE = [CASES[0], CASES[2], CASES[4]]
"""eps, v and flow."""
K = 1.5


def rotated(weight: Any, theta: Any) -> Any:
    """Each pair of neighbouring columns of W [out, in] times a rotation matrix, one after another, in NumPy."""
    found = np.array(weight, dtype=np.float64)
    for row in range(len(found)):
        for pair in range(found.shape[1] // 2):
            c, s = np.cos(theta[row, pair]), np.sin(theta[row, pair])
            found[row, 2 * pair : 2 * pair + 2] = np.array([[c, -s], [s, c]]) @ found[row, 2 * pair : 2 * pair + 2]
    return found


def turned_layer(rank: int = 3, export_rank: int = 4, size: tuple[int, int] = (9, 6)) -> tuple[nn.Linear, Any]:
    """A layer in float64 and a rotation of it with angles of all sizes."""
    torch.manual_seed(2)
    layer = nn.Linear(size[1], size[0]).double()
    module = rotation_adapter.Rotation([Target("x", layer)], rank, 5, export_rank).double()
    with torch.no_grad():
        module.a[0].normal_()
    return layer, module


# -- the rotation -----------------------------------------------------------------------------------------------------


def check_rotation(module: ModuleType) -> None:
    torch.manual_seed(0)
    weight, theta = torch.randn(5, 8, dtype=torch.float64), 2 * torch.randn(5, 4, dtype=torch.float64)
    found = weight + module.change(weight, theta)
    np.testing.assert_allclose(found.numpy(), rotated(weight.numpy(), theta.numpy()), atol=1e-12)
    # each pair's norm stays
    torch.testing.assert_close(found.unflatten(1, (-1, 2)).norm(dim=2), weight.unflatten(1, (-1, 2)).norm(dim=2))


def test_each_pair_turns_by_its_angle() -> None:
    check_rotation(rotation_adapter)


@pytest.mark.parametrize(
    "change",
    [
        ("odd * less - even * sine", "odd * less + even * sine"),
        ("odd * sine + even * less", "odd * sine - even * less"),
        ("-2 * torch.sin(theta / 2) ** 2", "-torch.sin(theta / 2) ** 2"),
        ("unflatten(1, (-1, 2)).unbind(2)", "unflatten(1, (2, -1)).unbind(1)"),
    ],
    ids=["a reflection", "a sign", "half the cosine", "halves for pairs"],
)
def test_a_wrong_rotation_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_rotation, mutant("onestep.core.rotation_adapter", *change, monkeypatch))


def test_small_angles_are_not_rounded_away() -> None:
    """To first order W' - W is theta times the pair turned by a right angle, in float32 too."""
    weight, theta = torch.randn(4, 6), torch.full((4, 3), 1e-6)
    wanted = torch.stack([-weight[:, 1::2], weight[:, 0::2]], 2).flatten(1) * 1e-6
    torch.testing.assert_close(rotation_adapter.change(weight, theta), wanted, rtol=1e-3, atol=0)


def test_at_angle_0_it_is_the_base_and_a_gradient_still_comes() -> None:
    layer = nn.Linear(6, 9)
    module = rotation_adapter.Rotation([Target("x", layer)], 3, 5, 4)
    x = torch.randn(2, 6)
    output = module.on_output("x", x, layer(x), None)  # type: ignore[arg-type]
    assert torch.equal(output, layer(x))
    output.square().sum().backward()
    assert module.a[0].grad is not None and bool(module.a[0].grad.any()) and not bool(module.b[0].grad.any())
    again = rotation_adapter.Rotation([Target("x", layer)], 3, 5, 4)
    assert torch.equal(again.b[0], module.b[0])


def test_its_gradient_is_that_of_finite_differences() -> None:
    layer, module = turned_layer()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: x @ rotation_adapter.change(layer.weight.detach(), a @ b).T,
        (module.a[0].detach().requires_grad_(), module.b[0].detach().requires_grad_()),
    )


def test_a_copy_shares_the_layers_and_has_its_own_angles() -> None:
    layer, module = turned_layer()
    other = copy.deepcopy(module)
    assert other._layers["x"].module is layer and other.a[0] is not module.a[0]


@pytest.mark.parametrize("export_rank", [1, 3, 6])
def test_the_lora_is_the_nearest_of_its_rank_and_its_loss_is_told(export_rank: int) -> None:
    layer, module = turned_layer(export_rank=export_rank)
    state, held = module.exported()
    weight = layer.weight.detach().numpy()
    difference = rotated(weight, module.theta("x").detach().numpy()) - weight
    s = np.linalg.svd(difference, compute_uv=False)
    a, b = state["x"]
    left = np.linalg.norm(difference - b.double().numpy() @ a.double().numpy())
    assert left == pytest.approx(np.sqrt((s[export_rank:] ** 2).sum()), abs=1e-5)
    assert 1 - held.weights == pytest.approx((s[export_rank:] ** 2).sum() / (s**2).sum(), abs=1e-6)


def test_what_cannot_be_turned_is_named() -> None:
    whole, fused = nn.Linear(6, 9), nn.Linear(6, 9)
    narrow = nn.Linear(6, 9)
    narrow.weight = nn.Parameter(narrow.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    targets = [Target("a", whole), Target("b", fused, slice(0, 3)), Target("c", narrow)]
    targets += [Target("d", nn.Conv2d(2, 2, 3)), Target("e", nn.Linear(5, 4))]
    found, not_served = rotation_adapter.turnable(targets)
    assert [target.name for target in found] == ["a"]
    assert [(one.name, one.why) for one in not_served] == [
        ("b", "is fused with others in this host"),
        ("c", "is stored as float8_e4m3fn"),
    ]


# -- the loss ---------------------------------------------------------------------------------------------------------


def turned_world(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[World, dict[str, Any]]:
    """A world of four words, whose critic turns the mean's weight; and each role's weight."""
    monkeypatch.setattr(oracles, "WORDS", 4)
    world = World(case)
    module = rotation_adapter.Rotation(world.roles.targets.values(), 2, 1, 4).double()
    with torch.no_grad():
        module.a[0].normal_()
    world.roles.drop("critic")
    world.roles.add_module("critic", module)
    teacher = world.network.mean.weight.numpy()
    return world, {"teacher": teacher, "critic": rotated(teacher, module.theta("mean").detach().numpy())}


@pytest.mark.parametrize("case", THREE, ids=str)
def test_the_loss_is_vsds_of_the_turned_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """b^2 (eps_R^k - eps_F^k), as in SwiftBrush, its critic's mean from the turned weight; and at angle 0 nothing."""
    world, weights = turned_world(case, monkeypatch)
    x, batch = drawn(), world.batch()
    told = settings_for("wadi", matching_guidance=K)
    g, _ = wadi.wadi(told).cotangent(world.denoise, batch, x)
    alpha, sigma = levels_in_numpy(case, batch.uniform("match level").numpy())
    x_s = alpha * rows(x) + sigma * rows(batch.normal("match noise"))
    guided = {}
    for role, weight in weights.items():
        means = [cond.text[:, 0].numpy().astype(np.float64) @ weight.T for cond in (world.cond, world.null.repeat(4))]
        d_c, d_u = (posterior_mean(x_s, alpha, sigma, mean) for mean in means)
        guided[role] = (x_s - alpha * (d_u + K * (d_c - d_u))) / sigma
    wanted = sigma**2 * (guided["teacher"] - guided["critic"]) / (alpha**2 + sigma**2)
    np.testing.assert_allclose(rows(g), wanted, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        world.roles.modules["critic"].a[0].zero_()
    g, _ = wadi.wadi(told).cotangent(world.denoise, batch, x)
    assert float(g.abs().max()) <= 1e-12


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", narrowed(["epsilon", "v_prediction", "flow"]))
def test_a_run_that_is_stopped_ends_as_if_not(prediction: str, tmp_path: Path) -> None:
    cut, whole = cancelled_and_whole(tmp_path, small(method="wadi", steps=3, warm_start=1, anchor=0.2), 9)
    assert cut["files"] == whole["files"] and cut["metrics"] == whole["metrics"]


def test_a_run_leaves_a_lora_and_says_what_it_holds(tmp_path: Path) -> None:
    """Of all that was turned, at the asked rank; the same as the student that was measured, where the rank holds it."""
    host, kept = SmallHost(), {}

    def keep(progress: Any) -> None:
        if not progress.preparing and "ema" in host.denoiser.roles.modules:
            kept.update({role: copy.deepcopy(host.denoiser.roles.modules[role]) for role in ("ema", "student")})

    result = run(tmp_path / "run", small(method="wadi", export_rank=8), host=host, report=keep)
    state = load_lora(result.path).state
    assert sorted(state) == sorted(name for name in state if "attn2" in name or "linear_1" in name) and len(state) == 3
    for name, (a, b) in state.items():
        module = kept[result.role]
        wanted = rotation_adapter.change(module._layers[name].module.weight, module.theta(name)).detach()
        torch.testing.assert_close(b @ a, wanted, rtol=1e-4, atol=1e-6)
    assert any("holds 100.0 % of its squared size, a relative error of 0.000" in note for note in result.notes)
    assert float(read_header(result.path).metadata["onestep.export_error"]) < 1e-3
    less = run(tmp_path / "less", small(method="wadi", export_rank=1))
    assert 0.01 < float(read_header(less.path).metadata["onestep.export_error"]) < 1


def test_what_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    check, host = METHODS["wadi"].check, SmallHost()
    with pytest.raises(OneStepError, match="cannot begin as a LoRA: leave initial_lora empty, or choose vsd"):
        check(host, settings_for("wadi", initial_lora="x.safetensors", sizes="32x32"))
    layer: Any = host.network.blocks[0].text  # type: ignore[union-attr]
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(OneStepError, match="is stored as float8_e4m3fn .1 such layers.: load the base in bf16 .* vsd"):
        check(host, settings_for("wadi", sizes="32x32"))
    for name in ("follow", "step_loras", "diversity_anchor"):
        with pytest.raises(OneStepError, match=f"wadi has no setting '{name}'"):
            settings_for("wadi", **{name: 1})


@pytest.mark.broad
def test_the_plan_counts_its_products(tmp_path: Path) -> None:
    """Turning weights too, which are as much work at any batch."""
    host = adapt(make("sd"))
    few: dict[str, Any] = {"sizes": "16x16", "rank": 4, "batch": 2, "pairs": 2, "steps": 4, "teacher_steps": 1}
    few |= {"watch_samples": 4, "warm_start": 0, "critic_warm_up": 0, "critic_updates": 2, "critic_rank": 4}
    settings = settings_for("wadi", **few)
    whole = rung_of(partial(of_host, host), settings, ONE_FLOP_A_SECOND, Way(settings.batch)).whole
    with training(host, settings, tmp_path) as step:
        step(0)  # whose data is made
        found = [flops_of(partial(step, at)) for at in (1, 2)]
    assert found == pytest.approx([whole.seconds["wadi"] / 4] * 2, rel=0.01)
