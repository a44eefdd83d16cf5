"""Ranking measures against the judge: closed forms of the distances, ranks, and every part of the scripts once."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measure  # noqa: E402
import measure_features  # noqa: E402
import measure_states  # noqa: E402
import measure_table  # noqa: E402


def test_equal_ranks_share_their_mean_and_monotone_values_correlate_wholly() -> None:
    assert measure_table.ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert measure_table.spearman([1, 2, 3, 9], [0.1, 4, 5, 6]) == pytest.approx(1)
    assert measure_table.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) for d = (0, 1, -1, 0)
    assert measure_table.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_distances_of_features_in_closed_form() -> None:
    teacher = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    shifted = teacher + 2 * teacher.std(0)
    # moved by two deviations along every feature, and nothing else
    assert measure_features.frechet_diagonal(shifted, teacher) == pytest.approx(4, rel=1e-4)
    assert measure_features.means(shifted, teacher) == pytest.approx(4, rel=1e-4)
    assert measure_features.frechet(shifted, teacher) == pytest.approx(4, rel=1e-4)
    assert measure_features.paired(shifted, teacher) == pytest.approx(2, rel=1e-4)
    assert measure_features.prompt_means(shifted, teacher) == pytest.approx(2, rel=1e-4)
    # three times as wide about the same mean
    wide = teacher.mean(0) + 3 * (teacher - teacher.mean(0))
    assert measure_features.frechet_diagonal(wide, teacher) == pytest.approx(4, rel=1e-4)
    assert measure_features.frechet(wide, teacher) == pytest.approx(4 * float(_axes(wide, teacher)), rel=1e-4)
    assert measure_features.means(wide, teacher) == pytest.approx(0, abs=1e-6)


def _axes(wide: torch.Tensor, teacher: torch.Tensor) -> float:
    """Mean variance of the scaled teacher along all axes of an orthonormal basis: 1."""
    _, b = measure_features.scaled(wide, teacher)
    return float(b.var(0).mean())


@pytest.mark.parametrize("distance", measure_features.DISTANCES)
def test_a_set_has_no_distance_to_itself_and_a_moved_one_has(distance: str) -> None:
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    measured = measure_features.DISTANCES[distance]
    assert measured(teacher, teacher) < 1e-6
    assert measured(teacher + 1, teacher) > 0.05


@pytest.mark.broad
def test_states_are_made_scored_and_ranked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Path("pipelines/tiny/prompts.txt").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    short = {"pairs": 4, "batch": 4, "rank": 2, "watch_samples": 4, "watch_every": 1, "steps": 1}
    matching = {"critic_warm_up": 1, "critic_updates": 1}
    monkeypatch.setattr(measure_states, "START", "0001-student")
    measure_states.make("tiny", "both", prompts, tmp_path, 1, 1, warm_start=1, **short, **matching)
    measure_states.make("tiny", "guided", prompts, tmp_path, 6, 1, **short | {"steps": 2}, **matching)
    args = Namespace(
        model="tiny", judge=None, prompts=str(tmp_path / "prompts.txt"), states=tmp_path, reference=None, samples=8,
        watched=8, role="*", finished=None, out=None,
    )  # fmt: skip
    measure.score(args)
    measure.score(Namespace(**vars(args) | {"finished": "*/run", "out": tmp_path / "again"}))
    assert len(measure_table.read_lines(tmp_path / "again")) == 2
    lines = measure_table.read_lines(tmp_path)
    assert len(lines) == len(list(tmp_path.glob("*/*-*.safetensors"))) >= 4
    states = [json.loads(line) for line in (tmp_path / "states.jsonl").read_text().splitlines()]
    assert {state["run"] for state in states} == {"both", "guided"}
    capsys.readouterr()
    measure_table.table([tmp_path], None)
    told = capsys.readouterr().out
    assert "rank correlation" in told and "today: distance" in told


def test_the_fine_part_of_a_plane_is_nothing_and_of_a_dot_what_its_neighbours_lack() -> None:
    x = torch.full((1, 2, 5, 5), 3.0)
    assert measure_features.fine(x).abs().max() < 1e-6
    x[0, 0, 2, 2] += 9
    assert measure_features.fine(x)[0, 0, 2, 2] == pytest.approx(8, abs=1e-5)
    assert measure_features.fine(x)[0, 0, 1, 1] == pytest.approx(-1, abs=1e-5)


def test_distances_of_latents_are_0_of_the_same_and_see_another_scale() -> None:
    teacher = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert all(value < 1e-5 for value in measure_features.of_latents(teacher, teacher).values())
    found = measure_features.of_latents(2 * teacher, teacher)
    assert all(value > 0.05 for name, value in found.items() if name != "latents: kernel")


def test_a_state_comes_back_from_its_file(tmp_path: Path) -> None:
    state = {"a.b": (torch.randn(2, 3), torch.randn(4, 2)), "c": (torch.randn(1, 3), torch.zeros(2, 1))}
    measure_states.write_state(tmp_path / "s.safetensors", state)
    found = measure_states.read_state(tmp_path / "s.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name][at], state[name][at]) for name in state for at in (0, 1))
