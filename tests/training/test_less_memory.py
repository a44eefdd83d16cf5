"""What a run does with less memory, to the same result: what it computes again, what it asks one role at a time, and
moments on the host."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import layout_pipelines as layouts
import pytest
import torch
from narrowed import narrowed
from small_host import SmallHost, small
from torch import Tensor
from whole_runs import Cancelled, factors, newest, run

from onestep.core.recomputed import BLOCKS, FEED_FORWARDS, GRADES, NOTHING
from onestep.core.tensor_file import read_tensors
from onestep.pipelines.adapt import adapt
from onestep.training import distil as session
from onestep.training.distil import Result, distil
from onestep.training.engine import host_moments
from onestep.training.engine import optimizer as adam
from onestep.training.methods import settings_for
from onestep.training.plan.meter import Meter
from onestep.training.plan.run import Layout
from onestep.training.settings import Settings

pytestmark = pytest.mark.broad

QUIET: dict[str, Any] = {"watch_every": 0, "preview_every": 0}


def settings(**more: Any) -> Settings:
    few = {"steps": 2, "pairs": 4, "batch": 4, "rank": 4, "teacher_steps": 1, "sizes": "32x32", "save_every": 1}
    return settings_for(method="regression", **{**few, **QUIET, **more})


def laid_out(
    folder: Path, grade: str, monkeypatch: Any, cap: float | None = None, how: Settings | None = None, **existing: Any
) -> tuple[Result, float]:
    """A run that begins so on a card of ``cap`` bytes, and the most that it had alive at once."""
    how = how or settings()
    monkeypatch.setattr(session, "laid_out", lambda *given: Layout(how, how.batch, grade, True))
    with Meter("cpu", cap=cap) as card:
        result = distil(adapt(layouts.make("sd15")), ["a cat"], how, folder, **existing)
    return result, card.most


@pytest.fixture(scope="module")
def begun(tmp_path_factory: Any) -> Iterator[dict[str, tuple[Result, float]]]:
    """A run of each grade, that went through in it."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield {grade: laid_out(folder / grade, grade, monkeypatch) for grade in GRADES}


def test_whatever_is_computed_again_the_same_is_learnt(begun: dict[str, tuple[Result, float]]) -> None:
    most = [most for _, most in begun.values()]
    assert most == sorted(set(most), reverse=True), most
    learnt = [factors(result.path) for result, _ in begun.values()]
    assert learnt[0] == learnt[1] == learnt[2]


@pytest.mark.parametrize(
    ("first", "last"),
    narrowed([(NOTHING, FEED_FORWARDS), (FEED_FORWARDS, BLOCKS), (NOTHING, BLOCKS)], (FEED_FORWARDS, BLOCKS)),
)
def test_a_run_that_goes_down_equals_one_that_began_there(
    begun: dict[str, tuple[Result, float]], first: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, room = begun[last]
    found, most = laid_out(tmp_path, first, monkeypatch, cap=room)
    assert most <= room
    said = [note for note in found.notes if note.startswith("out of memory")]
    expected = [f"out of memory: {grade} are computed again in backward from here on" for grade in GRADES[1:]]
    assert said == expected[GRADES.index(first) : GRADES.index(last)]
    assert factors(found.path) == factors(wanted.path)
    told = json.loads((newest(tmp_path) / "state.json").read_text())["counters"]
    assert (told["recompute"], told["accumulation"], told["sliced"]) == (last, 1, True)


@pytest.mark.broad
def test_a_run_that_goes_on_is_where_it_went_down_to(
    begun: dict[str, tuple[Result, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again what did not fit; and what it learns is what it would have learnt."""
    wanted, room = begun[FEED_FORWARDS]

    def cancel(progress: Any) -> None:
        if progress.update == 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        laid_out(tmp_path, NOTHING, monkeypatch, cap=room, report=cancel)
    found, most = laid_out(tmp_path, NOTHING, monkeypatch, existing="continue")
    assert factors(found.path) == factors(wanted.path)
    assert most <= room and len([note for note in found.notes if "out of memory" in note]) == 1


def test_only_then_micro_batches_are_halved(
    begun: dict[str, tuple[Result, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = laid_out(tmp_path, FEED_FORWARDS, monkeypatch, cap=0.8 * begun[BLOCKS][1])
    said = [note for note in found.notes if note.startswith("out of memory")]
    assert said[0].startswith("out of memory: blocks are computed again")
    assert said[1] == "out of memory: micro-batches of 2 from here on"
    learnt, wanted = read_tensors(found.path), read_tensors(begun[BLOCKS][0].path)
    assert all(torch.allclose(learnt[name], wanted[name], atol=2e-4, rtol=1e-2) for name in wanted)


# -- roles one after the other ----------------------------------------------------------------------------------------


class Counting(SmallHost):
    """Rows of its forwards without a graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows: list[int] = []
        self.network.register_forward_pre_hook(self._ask)

    def _ask(self, module: Any, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            self.rows.append(len(args[0]))


ALIKE: dict[str, dict[str, Any]] = {
    "dmd": {},
    "levels": {"separate_levels": True},
    "vsd": {"method": "vsd"},
    "sid": {"method": "sid", "guidance_strategy": "long-short"},
}


@pytest.mark.parametrize("more", ALIKE.values(), ids=list(ALIKE))
def test_roles_asked_one_after_the_other_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    how, found = small(**{**QUIET, "steps": 3, "warm_start": 0, "learning_rate": 1e-4, **more}), {}
    for sliced in (False, True):
        layout = Layout(how, how.batch, BLOCKS, sliced)
        monkeypatch.setattr(session, "laid_out", lambda *given, layout=layout: layout)
        host = Counting()
        found[sliced] = read_tensors(run(tmp_path / str(sliced), how, host=host).path), max(host.rows)
    assert found[True][1] <= how.batch < found[False][1]
    for name, wanted in found[False][0].items():
        torch.testing.assert_close(found[True][0][name], wanted, rtol=1e-3, atol=1e-4)


# -- moments on the host ----------------------------------------------------------------------------------------------

SHAPES = ((64, 72), (3, 5), (4097,), (16, 4, 32, 3))


def parameters(device: str = "cpu") -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in SHAPES]


def stepped(tensors: list[Tensor], kind: str, betas: Sequence[float], parts: bool) -> torch.optim.Optimizer:
    optimizer = adam.make(tensors, settings_for(optimizer=kind, learning_rate=1e-2, weight_decay=0.01))
    for number, beta in enumerate(betas):
        draw = torch.Generator().manual_seed(100 + number)
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=draw).to(tensor.device)
        optimizer.param_groups[0] |= {"betas": (beta, 0.99), "lr": 1e-2 / (1 + number)}
        host_moments.step(optimizer) if parts else optimizer.step()
    return optimizer


@pytest.mark.parametrize("size", [1, 4700, 2**30])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_step_in_parts_is_the_step_to_the_bit(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(host_moments, "PART", size)
    whole, parts, betas = parameters(), parameters(), (0.9, 0.9, 0.0, 0.0)
    one, other = stepped(whole, kind, betas, False), stepped(parts, kind, betas, True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert one.param_groups[0]["params"] == whole and other.param_groups[0]["params"] == parts
    a, b = adam.pack(one, "x"), adam.pack(other, "x")
    assert a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize("size", [1, 5000, 2**30])
def test_no_more_than_a_part_is_on_the_card(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for it: between steps no moment is there, in a step one part's."""
    monkeypatch.setattr(host_moments, "PART", size)
    numbers = [value.numel() for value in parameters()]
    largest = max(sum(value.numel() for value in part) for part in host_moments.parts(parameters()))
    assert sum(len(part) for part in host_moments.parts(parameters())) == len(numbers)
    with Meter() as meter:
        tensors = parameters("meta")
        optimizer = stepped(tensors, "adamw", (0.0, 0.0), True)
        there = 2 * 4 * sum(numbers)  # factors and gradients
        assert meter.live - there < 100
        for entries in optimizer.state.values():
            assert entries["exp_avg_sq"].device.type == "cpu" and "exp_avg" not in entries
        optimizer.zero_grad(set_to_none=False)
        meter.most = meter.live
        host_moments.step(optimizer)
        # beside the moments of a part, what torch makes of them on the way
        assert there + 4 * largest <= meter.most <= there + 4 * (largest + 3 * largest) + 1000


def test_moments_of_matrices_stay_where_they_are() -> None:
    assert not host_moments.serves(settings_for(optimizer="muon")) and host_moments.serves(settings_for())
