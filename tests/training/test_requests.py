"""What a run may be asked for while it runs: to finish, to save, to draw."""

from __future__ import annotations

from pathlib import Path

from small_host import NAMES, small
from whole_runs import factors, run

from onestep.core.lora_file import load_lora
from onestep.core.tensor_file import read_header
from onestep.training.distil import Progress, Request
from onestep.training.runs.run import Run


def test_finish_now_ends_after_the_update_until_more_is_asked_for(tmp_path: Path) -> None:
    result = run(tmp_path / "run", report=lambda progress: progress.update in (0, 5))
    assert result.updates == 5 and result.path.is_file() and "finished early, after 5 of 9 updates" in result.notes
    assert read_header(result.path).metadata["ss_steps"] == "5"
    assert result.preview == tmp_path / "run" / "previews" / "000005.png" and result.preview.is_file()
    again = run(tmp_path / "run", existing="continue")
    assert again.updates == 5 and again.path.is_file(), "it counts as finished until it is given other steps"
    more = run(tmp_path / "run", small(steps=5), existing="continue")
    assert more.updates == 10 and more.preview == tmp_path / "run" / "previews" / "000010.png"


def test_a_running_run_saves_and_samples_when_it_is_asked_to(tmp_path: Path) -> None:
    """After update 3 a state and what has been learnt; after update 5 a picture, though none is due."""
    seen: list[Progress] = []

    def report(progress: Progress) -> Request:
        seen.append(progress)
        if progress.preparing or progress.preview:
            return Request.NONE
        return {3: Request.SAVE, 5: Request.SAMPLE, 6: Request.SAVE | Request.FINISH}.get(progress.update, Request.NONE)

    settings = small(preview_every=0, save_every=100)
    result = run(tmp_path / "run", settings, report=report)
    assert Run(tmp_path / "run").states() == [3, 6] and result.updates == 6
    drawn = [progress for progress in seen if progress.preview]
    assert [progress.update for progress in drawn] == [5] and drawn[0].preview.is_file()  # type: ignore[union-attr]
    # asking changes nothing that is learnt
    plain = run(tmp_path / "plain", settings, report=lambda progress: progress.update == 6)
    assert factors(plain.path) == factors(result.path)


def test_a_saved_moment_is_a_lora(tmp_path: Path) -> None:
    def report(progress: Progress) -> Request:
        if progress.update == 4:
            assert set(load_lora(tmp_path / "run" / "partial.safetensors").state) == set(NAMES.values())
        return Request.SAVE if progress.update == 3 else Request.NONE

    run(tmp_path / "run", report=report)
    assert not (tmp_path / "run" / "partial.safetensors").exists()
