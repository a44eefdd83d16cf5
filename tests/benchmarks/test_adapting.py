"""Adapting a donor to a fine-tune: its tiles, the shares of a run, and every part of the script once."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from narrowed import narrowed

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import adapting  # noqa: E402


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Four tiles: two whole ones of a dungeon, two with a square of another colour on grey."""
    images = np.full((4, 32, 32, 3), adapting.GREY, np.uint8)
    images[0], images[1] = (200, 10, 10), (10, 200, 10)
    images[2:, 8:24, 8:24] = (250, 40, 20)
    path = tmp_path / "tiles.npz"
    captions = np.array(["floor: lava", "floor: grass", "weapon: axe", "potion: ruby"])
    np.savez(path, image=images, caption=captions, kind=np.array(["dungeon", "dungeon", "item", "item"]))
    return path


def test_tiles_are_recoloured_and_laid_before_a_floor(tiles: Path) -> None:
    found = adapting.changed(tiles)
    assert found.images[0, :, 0, 0].tolist() == [10, 10, 200]  # red is blue now, and a floor stays whole
    assert found.images[2, :, 16, 16].tolist() == [40, 20, 250]
    assert found.words[2][0] == "blue"  # of what is before the floor
    floors = {tuple(found.images[at, :, 0, 0].tolist()) for at in (2, 3)}
    assert floors <= {(6, 6, 120), (120, 6, 6)}


def test_a_share_of_a_run_shortens_each_of_its_phases() -> None:
    whole, quarter = adapting.settings_of(4), adapting.settings_of(4, 0.25, Path("donor.safetensors"))
    assert whole.student_steps == quarter.student_steps == 4
    for name in ("steps", "pairs"):
        assert getattr(quarter, name) == round(getattr(whole, name) / 4)
    for name in ("warm_start", "critic_warm_up"):
        assert getattr(quarter.own, name) == round(getattr(whole.own, name) / 4)
    assert (whole.initial_lora, quarter.initial_lora) == ("", "donor.safetensors")
    assert quarter.own.critic_updates == whole.own.critic_updates


@pytest.mark.broad
def test_every_row_is_made_once_and_a_stopped_table_goes_on(tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("floor: lava\nweapon: axe, red, dark\n", encoding="utf-8")
    args = Namespace(
        data=tiles, model="tiny", prompts=str(tmp_path / "prompts.txt"), steps=[1], shares=[0.5], updates=2, batch=2,
        samples=8, out=tmp_path / "out",
    )  # fmt: skip
    short = {"steps": 2, "warm_start": 2, "critic_warm_up": 2, "critic_updates": 1, "pairs": 4, "batch": 2, "rank": 2}
    lines = adapting.measured(args, **short)
    names = [(line["row"], line.get("share")) for line in lines]
    assert names == [
        ("F, 25 steps", None), ("F, 25 steps, another seed", None), ("donor as it is", 0.0), ("adapted", 0.5),
        ("cold", 1.0), ("cold", 0.5), ("F, 1 steps", None),
    ]  # fmt: skip
    assert lines[0]["fd"] < 1e-6 and lines[0]["variety"] == pytest.approx(1)
    assert all(line["fd"] > 0 for line in lines[1:])
    assert adapting.measured(args, **short) == lines
    assert len(adapting.table(lines)) == 2 + len(lines)


@pytest.mark.parametrize("model", narrowed(["tiny", "tiny-flow"], "tiny-flow"))
def test_the_fine_tune_is_a_folder_whose_weights_are_others(model: str, tiles: Path, tmp_path: Path) -> None:
    from onestep.cli.model import open_host

    folder = adapting.finetune(adapting.changed(tiles), tmp_path / "F", updates=1, batch=2, model=model)
    ours, base = (open_host(str(path), device="cpu").network.state_dict() for path in (folder, model))
    assert ours.keys() == base.keys()
    moved = [name for name in base if not torch.equal(ours[name], base[name])]
    assert len(moved) > len(base) / 2
