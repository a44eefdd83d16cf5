"""Tuning from one session to the next: what a run has begun with it keeps; and what a person's folder may hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_pictures import pictures_in
from PIL import Image
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.training.data.captioned_pictures import CaptionedPictures, captioned
from onestep.training.data.real_pictures import opened
from onestep.training.methods import METHODS


def tuned(own: dict[str, Any], **changes: Any) -> Any:
    return small(method="tune", student_steps=2, **own | changes)


def test_a_run_goes_on_without_a_picture_that_it_has(tmp_path: Path) -> None:
    """To the bit, its watch too."""
    settings = tuned(pictures_in(tmp_path / "own"))
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(21, Cancelled())))
    (tmp_path / "own" / "0.png").unlink()
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def gone(own: Path) -> None:
    shutil.rmtree(own)


def others(own: Path) -> None:
    (own / "0.txt").write_text("another thing")
    (own / "1.png").unlink()
    Image.new("RGB", (32, 32)).save(own / "9.png")
    (own / "9.txt").write_text("a new picture")


def faulty(own: Path) -> None:
    (own / "0.txt").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (gone, "which is no folder that can be read"),
        (others, "there are now 1 missing ('1.png'), 1 new ('9.png'), 1 captioned otherwise ('0.png'). Begin another"),
        (faulty, "now the picture '0.png' has no caption"),
    ],
)
def test_what_has_become_of_the_folder_is_said_and_changes_nothing(change: Any, words: str, tmp_path: Path) -> None:
    """Of a run that goes on, which has kept its pictures and captions; a new one is refused without."""
    settings, said = tuned(pictures_in(tmp_path / "own")), []
    run(tmp_path / "whole" / "run", settings)
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(21, Cancelled())))
    change(tmp_path / "own")
    run(tmp_path / "cut" / "run", settings, existing="continue", report=lambda progress: said.append(progress.notes))
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]
    (note,) = {note for notes in said for note in notes if "that it began with" in note}
    assert words in note
    if change is not others:
        with pytest.raises(OneStepError, match=words.removeprefix("now ")):
            run(tmp_path / "new", settings, existing="continue")
        assert not (tmp_path / "new").exists()


def test_without_its_caption_a_picture_has_an_empty_text(tmp_path: Path) -> None:
    """Not the run's negative, which says what pictures should not be like."""
    host = SmallHost()
    setup = setup_of(host, tuned(pictures_in(tmp_path / "own"), negative="ugly"), tmp_path / "run")
    batch, _ = CaptionedPictures(setup).draw(setup.prompts.batch(0, range(4)))
    bare = batch.with_nulls(1.0, "caption")
    assert torch.equal(bare.cond.text, host.texts([""] * 4).text)


def test_a_size_that_the_model_does_not_draw_is_no_bucket(tmp_path: Path) -> None:
    """Qwen-Image's sides, for one, are multiples of 32; buckets around 96 are 16 pixels apart."""

    class Coarse(SmallHost):
        def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
            if any(side % 32 for side in size):
                raise OneStepError(f"small draws multiples of 32, not {size}")
            return super().latent_shape(size)

    own = pictures_in(tmp_path / "own")
    Image.new("RGB", (120, 80)).save(tmp_path / "own" / "0.png")
    assert captioned(SmallHost(), tuned(own, sizes="96x96"))[0].size == (112, 80)
    assert captioned(Coarse(), tuned(own, sizes="96x96"))[0].size == (128, 64)


def test_an_initial_lora_that_does_not_say_how_it_is_drawn_is_refused(tmp_path: Path) -> None:
    """It may be of many steps; a recipe of one would be held to what it draws in one."""
    from safetensors.torch import load_file, save_file

    first = run(tmp_path / "first", small(method="regression"))
    assert load_lora(first.path).recipe
    save_file(load_file(first.path), tmp_path / "style.safetensors")
    told = {**pictures_in(tmp_path / "own"), "drawn": "auto", "initial_lora": str(tmp_path / "style.safetensors")}
    with pytest.raises(OneStepError, match="the initial LoRA does not say how it is sampled"):
        METHODS["tune"].check(SmallHost(), tuned(told))
    found = METHODS["tune"].recipe(SmallHost(), tuned(told, initial_recipe="own"))
    assert found.steps == 2


def test_a_grey_picture_of_16_bits_is_as_bright_as_it_is(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "grey.png")
    deep, grey = (opened(tmp_path / name, (32, 32)) for name in ("deep.png", "grey.png"))
    torch.testing.assert_close(deep, grey, rtol=0, atol=2 / 255)
