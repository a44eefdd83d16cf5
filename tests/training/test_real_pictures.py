"""A person's own pictures as what is real: read, cut, encoded once, drawn; folders that hold none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_host import SmallHost, setup_of, small
from whole_runs import Cancelled, at_call, left, run

from onestep.core.errors import OneStepError
from onestep.training.data.real_pictures import RealPictures, opened, pictures_in
from onestep.training.methods import METHODS, settings_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one colour each, one of them in another form and size, beside a text."""
    place = tmp_path / "my own"
    place.mkdir()
    for name, size, colour in (
        ("b.png", (32, 32), (255, 0, 51)),
        ("a.JPG", (64, 48), (0, 128, 255)),
        ("c.webp", (20, 90), (51, 204, 102)),
    ):
        Image.new("RGB", size, colour).save(place / name, quality=100, lossless=True)
    (place / "a.txt").write_text("a caption")
    (place / "folder.png").mkdir()
    return place


def test_a_picture_is_cut_to_its_middle(tmp_path: Path) -> None:
    """64 x 32 at 16 x 16: the middle square, half as large; [3, H, W] in [0, 1]."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:32, 0], pixels[:, 32:48, 1], pixels[:, :16, 2] = 255, 255, 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = opened(tmp_path / "wide.png", (16, 16))
    assert found.shape == (3, 16, 16)
    assert float(found[0, :, :6].min()) > 0.9 and float(found[1, :, 10:].min()) > 0.9
    assert float(found[2].max()) < 0.1 and float(found[1, :, :6].max()) < 0.1
    gray = Image.new("LA", (8, 24), (128, 0))
    gray.save(tmp_path / "tall.png")
    tall = opened(tmp_path / "tall.png", (16, 8))
    assert tall.shape == (3, 8, 16) and torch.allclose(tall, torch.full_like(tall, 128 / 255))


def made(folder: Path, work: Path, **more: Any) -> tuple[SmallHost, RealPictures]:
    host = SmallHost()
    settings = small(method="dmd2", real_pictures=str(folder), sizes="32x32,48x32", **more)
    pool = RealPictures(setup_of(host, settings, work), work / "pictures")
    pool.prepare()
    return host, pool


def test_each_is_drawn_at_the_batchs_size(folder: Path, tmp_path: Path) -> None:
    """In the order of their names: a.JPG, b.png, c.webp; of one colour each, so that latents tell which they are."""
    host, pool = made(folder, tmp_path / "run")
    wanted = [host.latents_of(opened(path, (8, 8))[None]).mean((0, 2, 3)) for path in pictures_in(str(folder))]
    seen = set()
    for step in range(12):
        batch = pool.setup.prompts.batch(step, range(4))
        _, latents = pool.draw(batch, step)
        assert latents.shape == (4, *batch.shape)
        for latent in latents:
            gaps = [float((latent.mean((1, 2)) - one).abs().max()) for one in wanted]
            assert min(gaps) < 0.05
            seen.add(int(np.argmin(gaps)))
        assert torch.equal(pool.draw(batch, step)[1], latents)
    assert seen == {0, 1, 2}
    assert sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir()) == [
        "32x32.safetensors",
        "48x32.safetensors",
    ]


def test_they_are_looked_at_without_a_prompt(folder: Path, tmp_path: Path) -> None:
    host, pool = made(folder, tmp_path / "run")
    batch = pool.setup.prompts.batch(3, range(4))
    seen = pool.looked_at(batch)
    assert batch.null is not None and torch.equal(seen.cond.text, batch.null.text.expand(4, -1, -1))
    assert seen.step == batch.step and torch.equal(seen.normal("x"), batch.normal("x"))


def test_of_a_base_without_a_null_condition_under_prompts_that_are_nobodys(folder: Path, tmp_path: Path) -> None:
    host = SmallHost("flow")
    host.denoiser.guidance = "none"
    settings = small(method="dmd2", real_pictures=str(folder), matching_guidance=1.0)
    pool = RealPictures(setup_of(host, settings, tmp_path), tmp_path / "pictures")
    pool.prepare()
    batches = [pool.setup.prompts.batch(step, range(4)) for step in range(8)]
    assert any(not torch.equal(pool.looked_at(batch).cond.text, batch.cond.text) for batch in batches)
    known = pool.setup.prompts.conds[(32, 32)].text
    assert all(any(torch.equal(row, one) for one in known) for row in pool.looked_at(batches[0]).cond.text)


@pytest.mark.parametrize("method", ["dmd2", "ladd"])
def test_a_run_with_them_makes_no_pairs_for_the_head_and_goes_on(method: str, folder: Path, tmp_path: Path) -> None:
    own = {"gan_start": 0.0, "gan_ramp": 0.0} if method == "dmd2" else {"head_blocks": 2, "head_warm_up": 1}
    settings = small(method=method, real_pictures=str(folder), warm_start=0, **own)
    run(tmp_path / "whole" / "run", settings)
    assert not (tmp_path / "whole" / "run" / "pairs").exists()
    with pytest.raises(Cancelled):
        run(tmp_path / "cut" / "run", settings, host=SmallHost(on_poll=at_call(20, Cancelled())))
    run(tmp_path / "cut" / "run", settings, existing="continue")
    whole, cut = left(tmp_path / "whole" / "run"), left(tmp_path / "cut" / "run")
    assert whole["files"] == cut["files"] and whole["metrics"] == cut["metrics"]


def test_folders_without_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("none")
    for method in ("dmd2", "ladd"):
        own = {} if method == "dmd2" else {"head_blocks": 1}
        check = METHODS[method].check
        check(SmallHost(), settings_for(method, real_pictures=str(folder), **own))
        with pytest.raises(OneStepError, match="empty', a folder with no pictures in it .*: put some there"):
            check(SmallHost(), settings_for(method, real_pictures=str(empty), **own))
        with pytest.raises(OneStepError, match=r"nowhere', which is no folder that can be read \(No such file"):
            check(SmallHost(), settings_for(method, real_pictures=str(tmp_path / "nowhere"), **own))
        with pytest.raises(OneStepError, match=r"notes.txt', which is no folder that can be read \(Not a dir"):
            check(SmallHost(), settings_for(method, real_pictures=str(empty / "notes.txt"), **own))
    with pytest.raises(OneStepError, match="f-distill has no setting 'real_pictures': it belongs to dmd2 and ladd"):
        settings_for("f-distill", real_pictures=str(folder))


@pytest.mark.parametrize("broken", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\x00\x00"])
def test_a_broken_picture_is_named(broken: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "b.png").write_bytes(broken)
    with pytest.raises(OneStepError, match=r"the picture 'b.png' of real_pictures cannot be read \(.+\): repair it"):
        made(folder, tmp_path / "run")
