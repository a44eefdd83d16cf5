"""Sums of a run's kept students: their equation, the search, and what becomes the result."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from mutations import must_fail, mutant
from small_host import PROMPTS, SmallHost, setup_of, small
from spoiled_runs import settings_of, spoiled_run
from whole_runs import Cancelled, run

from onestep.core.lora_file import load_lora
from onestep.core.roles import Roles
from onestep.core.targets import Target
from onestep.core.tensor_file import read_header, read_tensors
from onestep.training.runs.candidates import kept
from onestep.training.watch import combination, evolution
from onestep.training.watch.evolution import search
from onestep.training.watch.measures import Watch, others, watched
from onestep.training.watch.reference import by_teacher


def students(count: int, rank: int, out: int = 7, inputs: int = 5) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        a, b = torch.randn(rank, inputs, 3, 3, generator=draw), torch.randn(out, rank, 1, 1, generator=draw)
        made.append({"ema/x/a": a, "ema/x/b": b, "ema/module.a": torch.randn(4, generator=draw)})
    return made


def product(student: Any) -> Any:
    """B A [out, in, 3, 3] in NumPy."""
    a, b = (student[f"ema/x/{name}"].double().numpy() for name in ("a", "b"))
    return np.einsum("or,rihw->oihw", b[..., 0, 0], a)


# -- the sum ----------------------------------------------------------------------------------------------------------


def check_sum(module: ModuleType) -> None:
    """Of a rank that holds it, sum w B A to the last digit; of less, the nearest there is, and its loss."""
    some, weights = students(3, 9), (0.5, -0.25, 0.75)
    wanted = sum(w * product(one) for w, one in zip(weights, some, strict=True))
    found, lost = module.combined(some, weights, {"ema/x"})
    np.testing.assert_allclose(product(found), wanted, rtol=1e-5, atol=1e-5)
    assert found["ema/x/a"].shape == some[0]["ema/x/a"].shape and lost < 1e-12
    plain = sum(w * one["ema/module.a"].double() for w, one in zip(weights, some, strict=True))
    torch.testing.assert_close(found["ema/module.a"].double(), plain, rtol=1e-6, atol=1e-6)
    few = students(3, 2)
    wanted = sum(w * product(one) for w, one in zip(weights, few, strict=True))
    found, lost = module.combined(few, weights, {"ema/x"})
    u, s, v = np.linalg.svd(wanted.reshape(7, -1), full_matrices=False)
    np.testing.assert_allclose(product(found).reshape(7, -1), u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-4)
    assert lost == pytest.approx((s[2:] ** 2).sum() / (s**2).sum(), rel=1e-6)


def test_the_sum_is_that_of_the_products() -> None:
    check_sum(combination)


@pytest.mark.parametrize(
    "change",
    [
        ('w * student[f"{name}/b"].double() for', 'student[f"{name}/b"].double() for'),
        ('torch.cat([student[f"{name}/a"].double() for', 'torch.cat([-student[f"{name}/a"].double() for'),
        ("float(s[len(first) :].square().sum())", "float(s[len(first) :].sum())"),
        ("truncated(a, b, len(first))", "truncated(a, b, 1)"),
        ("sum(w * student[name].double() for", "sum(student[name].double() for"),
    ],
    ids=["no weights", "a sign", "the loss unsquared", "rank 1", "modules unweighed"],
)
def test_a_wrong_sum_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_sum, mutant("onestep.training.watch.combination", *change, monkeypatch))


def test_one_alone_is_itself_to_the_bit() -> None:
    some = students(3, 2)
    found, lost = combination.combined(some, (0.0, 1.0, 0.0), {"ema/x"})
    assert lost == 0 and all(torch.equal(found[name], value) for name, value in some[1].items())


def test_what_a_role_learns_is_paired() -> None:
    roles = Roles([Target("x", torch.nn.Linear(4, 4)), Target("y", torch.nn.Linear(4, 4))])
    roles.add("ema", 2, 0)
    roles.split("ema", (999.0, 499.0))
    assert combination.pairs_of(roles, "ema") == {"ema/x", "ema/y", "ema@2/x", "ema@2/y"}


# -- the search -------------------------------------------------------------------------------------------------------


def bowl(weights: Any) -> float:
    return float(np.square(np.array(weights) - np.array([0.4, -0.3, 0.9])).sum())


def check_search(module: ModuleType) -> None:
    """All sums are to 1; the own student is first, the mean second; a bowl's bottom is nearly found."""
    seen: list[Any] = []

    def measure(weights: Any) -> float:
        seen.append(weights)
        return bowl(weights)

    ranked = module.search(measure, 3, 120, seed=3)
    assert seen[0] == (1.0, 0.0, 0.0) and seen[1] == pytest.approx((1 / 3,) * 3)
    assert all(sum(weights) == pytest.approx(1, abs=1e-12) for weights in seen) and len(seen) == 120
    assert ranked[0][0] == min(map(bowl, seen)) < 0.02 and bowl(seen[0]) > 1
    assert [value for value, _ in ranked] == sorted(value for value, _ in ranked)


def test_the_search_finds_the_bottom_of_a_bowl() -> None:
    check_search(evolution)


@pytest.mark.parametrize(
    "change",
    [
        ("(1 - math.fsum(others), *others)", "(1.0, *others)"),
        ("sorted(found, key=_place)[:PARENTS]", "list(found)[:PARENTS]"),
        ("return sorted(found, key=_place)\n\n\ndef", "return found\n\n\ndef"),
        ("WIDE, NARROW = 0.3, 0.05", "WIDE, NARROW = 3.0, 3.0"),
    ],
    ids=["not to 1", "parents of any kind", "unranked", "too wide"],
)
def test_a_wrong_search_is_found_out(change: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    must_fail(check_search, mutant("onestep.training.watch.evolution", *change, monkeypatch))


def test_what_is_no_number_is_never_the_best() -> None:
    ranked = search(lambda weights: float("nan") if weights[0] < 0.9 else bowl(weights), 3, 20, seed=0)
    assert ranked[0][0] == ranked[0][0] and ranked[-1][0] != ranked[-1][0]
    assert search(bowl, 3, 9, seed=1) == search(bowl, 3, 9, seed=1) != search(bowl, 3, 9, seed=2)


# -- what the search has not seen -------------------------------------------------------------------------------------


def test_held_out_prompts_are_others(tmp_path: Path) -> None:
    settings = small(watch_samples=8)
    rows = watched(len(PROMPTS), settings)
    apart = others(len(PROMPTS), rows)
    assert len(apart) == len(rows) == 8 and not set(apart.tolist()) & set(rows.tolist())
    assert apart.tolist()[:4] == [apart[0]] * 4
    # where the watch has them all, the noise alone is another
    assert torch.equal(others(2, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])), torch.tensor([0] * 4 + [1] * 4))
    setup = setup_of(SmallHost(), settings, tmp_path)
    one, other = (Watch.prepare(setup, by_teacher(setup), held_out=held) for held in (False, True))
    assert not torch.allclose(one.noise, other.noise) and not torch.allclose(one.teacher, other.teacher)


# -- whole runs -------------------------------------------------------------------------------------------------------


def told_of(folder: Path) -> Any:
    return json.loads((folder / "combination.json").read_text())


def test_a_run_takes_a_sum_that_is_better_where_it_was_not_searched_too(tmp_path: Path) -> None:
    """A student that was spoiled at its end: what was kept before makes it better, and the file says all of it."""
    plain = spoiled_run(tmp_path / "plain", choose_by="last")
    result = spoiled_run(tmp_path / "run", choose_by="last", combine=8)
    told = told_of(tmp_path / "run")["result"]
    assert told["taken"] and told["held_out"] < told["held_out_own"] and told["value"] < told["own"]
    assert json.loads(read_header(result.path).metadata[combination.HEADER]) == told
    assert sum(told["weights"]) == pytest.approx(1) and told["of"][0] == 9 and len(told["of"]) == 6
    assert any("a combination of the students after updates 9" in note for note in result.notes)
    # the file holds that sum, of the same students, at the run's rank
    state, files = load_lora(result.path).state, kept(tmp_path / "run")
    rest = [read_tensors(files[update]) for update in told["of"][1:]]
    own = {name: (a, b) for name, (a, b) in load_lora(plain.path).state.items()}
    for name, (a, b) in state.items():
        some = [own[name], *((one[f"ema/{name}/a"], one[f"ema/{name}/b"]) for one in rest)]
        products = [(y.double().flatten(1) @ x.double().flatten(1)) for x, y in some]
        wanted = sum(w * value for w, value in zip(told["weights"], products, strict=True))
        u, s, v = np.linalg.svd(np.asarray(wanted), full_matrices=False)
        nearest = u[:, : len(a)] * s[: len(a)] @ v[: len(a)]
        np.testing.assert_allclose((b.flatten(1) @ a.flatten(1)).numpy(), nearest, rtol=1e-3, atol=1e-4)


def test_what_is_better_by_luck_alone_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the held-out measure is not better, the run's own file is the result, to the byte."""
    plain = spoiled_run(tmp_path / "plain", choose_by="last")
    swapped = Watch.measured

    def upside_down(self: Watch, host: Any, found: torch.Tensor) -> Any:
        numbers = swapped(self, host, found)
        return numbers | {"distance": -numbers["distance"]} if self.batch.step == -2 else numbers

    monkeypatch.setattr(Watch, "measured", upside_down)
    result = spoiled_run(tmp_path / "run", choose_by="last", combine=6)
    told = told_of(tmp_path / "run")["result"]
    assert not told["taken"] and told["held_out"] >= told["held_out_own"] and told["value"] < told["own"]
    assert any("the run's own result stays" in note for note in result.notes)
    one, other = (load_lora(made.path).state for made in (plain, result))
    assert all(torch.equal(one[name][at], other[name][at]) for name in one for at in (0, 1))
    assert combination.HEADER not in read_header(result.path).metadata


def test_a_search_that_was_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not drawn again, and the same sum is found."""
    whole = spoiled_run(tmp_path / "whole", choose_by="last", combine=6)
    count: list[int] = []
    value = combination.Sums.value

    def counted(self: Any, watch: Watch, weights: Any) -> float:
        count.append(watch.batch.step)
        if len(count) == 4 and cut:
            raise Cancelled()
        return value(self, watch, weights)

    monkeypatch.setattr(combination.Sums, "value", counted)
    cut = True
    with pytest.raises(Cancelled):
        spoiled_run(tmp_path / "run", choose_by="last", combine=6)
    cut, before = False, len(count)
    result = run(tmp_path / "run", settings_of(choose_by="last", combine=6), existing="continue")
    assert count[before:].count(-1) == 3 and told_of(tmp_path / "run") == told_of(tmp_path / "whole")
    one, other = (load_lora(made.path).state for made in (whole, result))
    assert all(torch.equal(one[name][at], other[name][at]) for name in one for at in (0, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"watch_every": 0, "preview_every": 0}, "the run watches nothing. Set watch_every"),
        ({"candidate_every": 0}, "has kept no students beside its result. Set candidate_every"),
        ({"learning_rate": 0.0, "warm_start_rate": 0.0}, "has a lower distance than the run's own result"),
    ],
)
def test_where_nothing_can_be_searched_a_run_says_so(changes: Any, said: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", settings_of(**{"choose_by": "last", "combine": 2, **changes}))
    assert any(said in note for note in result.notes), result.notes
