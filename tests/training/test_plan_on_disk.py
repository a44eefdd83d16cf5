"""What was counted is kept on the disk: the same to the byte, and as none where it is broken or of another day's
code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import layout_pipelines as layouts
import numpy as np
import pytest
from narrowed import narrowed

from onestep.pipelines.adapt import adapt
from onestep.pipelines.shells import Shell, of_folder, of_host
from onestep.training.methods import settings_for
from onestep.training.plan import counted, on_disk
from onestep.training.plan.cards import card_of
from onestep.training.plan.rehearse import rehearse
from onestep.training.plan.rungs import Rung, Way, rung_of
from onestep.training.plan.trace import Cost
from onestep.training.settings import Settings

CARD = card_of("12GB")
REAL: dict[str, Any] = {}
"""Rehearsals that were played by these tests: one that is asked for again is told, and not played again."""


def settings(**more: Any) -> Settings:
    few = {"steps": 1, "batch": 4, "rank": 4, "teacher_steps": 1, "watch_samples": 4, "sizes": "16x16"}
    return settings_for(method="regression", **{**few, **more})


@pytest.fixture
def shell() -> Shell:
    return of_host(adapt(layouts.sd15()), "all")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONESTEP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grades that were counted in this test, in order."""
    done: list[str] = []

    def count(host: Any, settings: Settings, *, recompute: str) -> Any:
        done.append(recompute)
        key = counted._key(host, settings, recompute)
        if key not in REAL:
            REAL[key] = rehearse(host, settings, recompute=recompute)
        return REAL[key]

    monkeypatch.setattr(counted, "rehearse", count)
    counted._kept.clear()
    return done


def rung(shell: Shell, how: Settings, micro: int = 4, grade: str = "blocks") -> Rung:
    """As another process would find it."""
    counted._kept.clear()
    return rung_of(shell.shell, how, CARD, Way(micro, grade))


def matched(name: str) -> Settings:
    few = {"steps": 2, "warm_start": 1, "critic_warm_up": 1, "watch_samples": 4, "pairs": 8, "batch": 4, "rank": 4}
    guided = {"matching_guidance": 1.0} if name == "flux" else {}
    return settings_for(method="dmd", sizes="16x16", **few, **guided)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_is_kept_is_what_was_counted(
    name: str, folder: Path, counts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of every part and label, seconds, forwards and disk, at micro-batches and ranks that were not counted; and
    every number of the count itself."""
    REAL.clear()
    shell, how = of_host(adapt(getattr(layouts, name)()), "all"), matched(name)
    cases = [(how.with_(rank=rank), micro) for rank in (4, 64) for micro in (1, 4)]
    first = [rung(shell, *case) for case in cases]
    assert counts == ["blocks"] and len(list(folder.iterdir())) == 1
    monkeypatch.setenv("ONESTEP_CACHE", "off")
    assert first == [rung(shell, *case) for case in cases] and len(counts) == 1 + len(cases)
    monkeypatch.setenv("ONESTEP_CACHE", str(folder))
    counted._kept.clear()
    ours, (theirs,) = counted.counted(shell, how, "blocks"), REAL.values()
    for field in ("phases", "gradients", "passes", "beside"):
        assert getattr(ours, field) == getattr(theirs, field)
    for field in ("parts", "label", "deltas"):
        assert np.array_equal(getattr(ours.count, field), getattr(theirs.count, field))
    for field in ("p", "r", "names", "labels", "within", "entered"):
        assert getattr(ours.count, field) == getattr(theirs.count, field)
    assert ours.count.counts.keys() == theirs.count.counts.keys()
    for part, costs in theirs.count.counts.items():
        assert told_of(ours.count.counts[part]) == told_of(costs)


def told_of(costs: dict[Cost, int]) -> list[Any]:
    return [(cost.flops, cost.moved, cost.width, times) for cost, times in costs.items()]


BREAK = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit is another": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "no text": lambda data: b"\xff\x00" * 40,
    "its checksum alone": lambda data: data.partition(b"\n")[0],
    "more behind it": lambda data: data + b" ",
}


@pytest.mark.parametrize("how", narrowed(BREAK, "cut off", "a bit is another", "no text"))
def test_a_broken_file_is_as_none(how: str, shell: Shell, folder: Path, counts: list[str]) -> None:
    first = rung(shell, settings())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(BREAK[how](whole))
    assert rung(shell, settings()) == first and len(counts) == 2
    assert file.read_bytes() == whole  # it was written anew
    assert rung(shell, settings()) == first and len(counts) == 2


def test_a_folder_or_a_link_to_nothing_in_its_place_is_as_none(shell: Shell, folder: Path, counts: list[str]) -> None:
    first = rung(shell, settings())
    (file,) = folder.iterdir()
    file.unlink()
    file.mkdir()
    assert rung(shell, settings()) == first and len(counts) == 2
    assert rung(shell, settings()) == first and len(counts) == 3


def test_what_is_kept_of_another_is_not_taken(shell: Shell, folder: Path, counts: list[str]) -> None:
    rung(shell, settings())
    (ours,) = folder.iterdir()
    fresh = rung(shell, settings(sizes="32x32"))
    (theirs,) = set(folder.iterdir()) - {ours}
    theirs.write_bytes(ours.read_bytes())
    assert rung(shell, settings(sizes="32x32")) == fresh and len(counts) == 3


@pytest.mark.parametrize("what", ["the code", "the texts", "the autoencoder", "the schedule", "the layers", "a grade"])
def test_what_is_stale_is_counted_anew(
    what: str, shell: Shell, folder: Path, counts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rung(shell, settings())
    grade, how = "blocks", settings()
    if what == "the code":
        monkeypatch.setattr(on_disk, "counted_by", lambda: "of another version")
    elif what == "the texts":
        shell.encoders += 1000
    elif what == "the autoencoder":
        shell.pipe.vae.to(dtype=layouts.torch.float64)
    elif what == "the schedule":
        shell.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    elif what == "the layers":
        how = settings(targets="attention")
    else:
        grade = "nothing"
    again = rung(shell, how, grade=grade)
    assert len(counts) == 2 and len(list(folder.iterdir())) == 2
    assert rung(shell, how, grade=grade) == again and len(counts) == 2


def test_batch_and_rank_need_no_count_of_their_own(shell: Shell, folder: Path, counts: list[str]) -> None:
    rung(shell, settings())
    rung(shell, settings(batch=2, rank=9), micro=1)
    assert counts == ["blocks"]


@pytest.mark.parametrize("place", ["off", "a file", "nobody's home"])
def test_where_nothing_can_be_kept_it_is_counted(
    place: str, shell: Shell, tmp_path: Path, counts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ONESTEP_CACHE", {"off": "off", "a file": str(tmp_path / "file")}.get(place, ""))
    if place == "nobody's home":
        monkeypatch.setattr(Path, "expanduser", homeless)
    assert rung(shell, settings()) == rung(shell, settings()) and len(counts) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def homeless(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_the_oldest_goes(shell: Shell, folder: Path, monkeypatch: pytest.MonkeyPatch, counts: list[str]) -> None:
    monkeypatch.setattr(on_disk, "MOST", 2)
    for number, size in enumerate((16, 32, 48)):
        rung(shell, settings(sizes=f"{size}x{size}"))
        for file in folder.iterdir():
            os.utime(file, (number, number)) if file.stat().st_mtime > 1000 else None
    assert len(list(folder.iterdir())) == 2
    rung(shell, settings(sizes="48x48"))
    assert len(counts) == 3
    rung(shell, settings(sizes="16x16"))
    assert len(counts) == 4


def test_it_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: Shell) -> None:
    monkeypatch.setenv("ONESTEP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rung(shell, settings())
    assert [path.suffix for path in (tmp_path / "onestep").iterdir()] == [".plan"]


@pytest.mark.broad
def test_another_process_asks_for_the_same(root: Path) -> None:
    """Whatever order its sets have."""
    folder = root / "pipelines" / "tiny" / "tiny"
    words = (
        "import importlib.util, sys; from pathlib import Path; "
        f"s = importlib.util.spec_from_file_location('onestep', {str(root / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(root)!r}]); m = importlib.util.module_from_spec(s); "
        "sys.modules['onestep'] = m; s.loader.exec_module(m); from onestep.pipelines.shells import of_folder; "
        f"print(of_folder(Path({str(folder)!r})).configuration)"
    )
    said = subprocess.run(
        [sys.executable, "-P", "-c", words],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == of_folder(folder).configuration
