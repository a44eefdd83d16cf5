"""What the plan says of a whole run is what a short run of the bundled model does: its work, and its files on the
disk."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from flops import ONE_FLOP_A_SECOND, flops_of
from narrowed import narrowed

from onestep.pipelines.adapt import DiffusersHost, adapt
from onestep.pipelines.load import load
from onestep.pipelines.shells import of_host
from onestep.training.distil import distil
from onestep.training.engine.prompts import embed
from onestep.training.methods import METHODS, settings_for
from onestep.training.plan.rungs import STATES, Rung, Way, rung_of
from onestep.training.settings import Settings

PROMPTS = ["a red dragon", "a blue wall", "a wall"]
SHARED = {"sizes": "32x32", "rank": 8, "batch": 2, "pairs": 4, "teacher_steps": 2, "watch_every": 2}
SHARED |= {"watch_samples": 4, "preview_every": 2, "preview_samples": 1, "candidate_every": 0}
RUNS = {
    # of two blocks of pairs the warm start makes one
    "dmd": {"steps": 2, "warm_start": 1, "critic_warm_up": 1, "critic_updates": 1},
    "regression": {"steps": 3},
}


def settings(method: str) -> Settings:
    return settings_for(method=method, **SHARED, **RUNS[method])


@pytest.fixture(scope="module")
def host() -> DiffusersHost:
    return adapt(load("tiny", device="cpu"), targets="all", device="cpu")


def planned(host: DiffusersHost, how: Settings) -> Rung:
    return rung_of(partial(of_host, host), how, ONE_FLOP_A_SECOND, Way(how.batch))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def tensors_in(file: Path) -> int:
    """Bytes of a safetensors file without its header, of which large tensors make nothing."""
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.broad
def test_a_search_for_a_combination_is_planned(host: DiffusersHost, tmp_path: Path) -> None:
    """Its measures, and those on what it has not seen."""
    more = settings("regression").with_(candidate_every=1, combine=6)
    found = []
    for how in (more.with_(combine=0), more):
        work = flops_of(lambda how=how: distil(host, PROMPTS, how, tmp_path / str(how.combine)))
        found.append((work, sum(planned(host, how).whole.seconds.values())))
    held = json.loads((tmp_path / "6" / "combination.json").read_text())["result"]
    assert "held_out" in held, "the search found none better, and held nothing out"
    # one that is taken is drawn once more
    searched, told = (found[1][at] - found[0][at] for at in (0, 1))
    assert searched == pytest.approx(told, rel=0.05 + 0.15 * held["taken"])


@pytest.mark.broad
@pytest.mark.parametrize("method", narrowed(RUNS, "regression"))
def test_a_whole_run_is_what_was_planned(method: str, host: DiffusersHost, tmp_path: Path) -> None:
    how, run = settings(method).with_(candidate_every=1, choose_by="distance"), tmp_path / "run"
    work = flops_of(lambda: distil(host, PROMPTS, how, run))
    texts = flops_of(lambda: embed(host, PROMPTS, how, tmp_path, guidance_input=METHODS[method].guidance_input))
    whole = planned(host, how).whole
    # the least time: not more than is done, and hardly less; texts are encoded beside it, the file is checked, and a
    # kept student that is chosen is drawn once more
    chosen = (run / "previews" / "chosen.png").is_file()
    assert 0 <= (work - texts) / sum(whole.seconds.values()) - 1 < 0.005 + 0.06 * chosen
    assert all(seconds > 0 for seconds in whole.seconds.values())
    states = [path / "state.safetensors" for path in run.glob("state-*")]
    assert max(map(tensors_in, states)) == pytest.approx(whole.disk["states"] / STATES, rel=0.001)
    # a file of pairs has a header of a hundred bytes or two, which grows as its batch's size is written
    assert size_of(run / "pairs") == pytest.approx(whole.disk["pairs"], rel=0.05)
    kept = sum(map(tensors_in, (run / "candidates").iterdir()))
    assert kept == pytest.approx(whole.disk["candidates"], rel=1e-6) and kept
    assert set(whole.disk) == {"states", "candidates", "pairs"}
    # an embedding for each prompt, and the null one
    assert size_of(run / "embeddings") == pytest.approx((len(PROMPTS) + 1) * whole.text, rel=0.01)


@pytest.mark.broad
def test_data_is_made_as_long_as_it_is_new(host: DiffusersHost) -> None:
    """By the warm start and by the matching after it, each fourth time where its anchors are rarer; no more of it than
    the run keeps."""
    how = settings("dmd").with_(steps=8, warm_start=3)
    whole = {pairs: planned(host, how.with_(pairs=pairs)).whole for pairs in (4, 16, 1024)}
    one = whole[4].seconds["teacher's data"] / 2
    made = {pairs: found.seconds["teacher's data"] / one for pairs, found in whole.items()}
    assert made == pytest.approx({4: 2, 16: 8, 1024: 11})
    rarer = planned(host, how.with_(pairs=1024, anchor_every=4)).whole
    assert rarer.seconds["teacher's data"] / one == pytest.approx(3 + 8 / 4)
    assert rarer.disk["pairs"] == pytest.approx(whole[1024].disk["pairs"] * 5 / 11, abs=1)


@pytest.mark.broad
def test_what_is_long_in_a_run_is_long_in_its_plan(host: DiffusersHost) -> None:
    """Each of its parts by what is set of it, and a file for each of two blocks of pairs, whatever else there is."""
    first = planned(host, settings("dmd")).whole
    more = planned(host, settings("dmd").with_(steps=12, warm_start=3, pairs=8, watch_samples=8)).whole
    assert more.seconds["dmd"] == pytest.approx(6 * first.seconds["dmd"], rel=1e-9)
    assert more.seconds["warm start"] == pytest.approx(3 * first.seconds["warm start"], rel=1e-9)
    assert more.seconds["teacher's data"] == pytest.approx(2 * first.seconds["teacher's data"], rel=1e-9)
    assert more.disk["pairs"] == pytest.approx(2 * first.disk["pairs"], abs=1)
    assert more.disk["states"] == first.disk["states"] and more.text == first.text
