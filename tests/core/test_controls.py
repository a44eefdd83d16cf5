"""Control extractors against known pictures and NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onestep.core import controls
from onestep.core.controls import CONTROLS, Control, control_of, edge_f1, register
from onestep.core.errors import OneStepError

Array = np.ndarray[Any, np.dtype[np.float64]]


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def square(side: int = 32, low: int = 8, high: int = 24) -> Tensor:
    """White from row and column ``low`` up to ``high``, exclusive, on black."""
    picture = torch.zeros(1, 3, side, side)
    picture[:, :, low:high, low:high] = 1
    return picture


def convolved(picture: Array, kernel: Array) -> Array:
    """Correlation of [H, W] with an odd kernel, the border repeated; by loops."""
    reach = len(kernel) // 2
    wide = np.pad(picture, reach, mode="edge")
    found = np.zeros_like(picture)
    for (i, j), weight in np.ndenumerate(kernel):
        found += weight * wide[i : i + picture.shape[0], j : j + picture.shape[1]]
    return found


def gradient(picture: Array, sigma: float) -> tuple[Array, Array]:
    """Sobel / 4 of the BT.601 brightness of [3, H, W] after a Gaussian cut at 3 sigma."""
    grey = 0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2]
    reach = round(3 * sigma)
    bell = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    grey = convolved(grey, np.outer(bell, bell) / bell.sum() ** 2)
    right = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    return convolved(grey, right), convolved(grey, right.T)


def test_soft_edges_are_sobels_in_numpy() -> None:
    x = pictures(2, 3, 9, 12)
    found = control_of("soft-edges")(x)
    for picture, edges in zip(x.double().numpy(), found, strict=True):
        dx, dy = gradient(picture, 1.0)
        np.testing.assert_allclose(edges[0], np.minimum(np.hypot(dx, dy), 1), atol=1e-6)


def canny_in_numpy(picture: Array, low: float, high: float) -> Array:
    """Canny by loops: ridges along the gradient's direction to the nearest 45 degrees; then hysteresis by a stack."""
    dx, dy = gradient(picture, 1.0)
    size = np.hypot(dx, dy)
    ridge = np.zeros(size.shape, bool)
    for i in range(1, size.shape[0] - 1):
        for j in range(1, size.shape[1] - 1):
            angle = np.degrees(np.arctan2(dy[i, j], dx[i, j])) % 180
            step = [(0, 1), (1, 1), (1, 0), (1, -1)][int((angle + 22.5) // 45) % 4]
            ahead, behind = size[i + step[0], j + step[1]], size[i - step[0], j - step[1]]
            ridge[i, j] = size[i, j] > ahead * (1 + 1e-5) and size[i, j] >= behind * (1 - 1e-5)
    edges, stack = np.zeros(size.shape), list(zip(*np.nonzero(ridge & (size >= high)), strict=True))
    while stack:
        i, j = stack.pop()
        if not (0 <= i < size.shape[0] and 0 <= j < size.shape[1]) or edges[i, j] or not ridge[i, j]:
            continue
        if size[i, j] >= low:
            edges[i, j] = 1
            stack += [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    return edges


def smooth(seed: int) -> Tensor:
    """Random pictures with contours at every angle."""
    return torch.nn.functional.interpolate(pictures(3, 3, 5, 6, seed=seed), (33, 40), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.1), (0.03, 0.15)])
def test_canny_is_cannys_in_numpy(low: float, high: float) -> None:
    x = smooth(1)
    found = controls.canny(x, low=low, high=high)
    for picture, edges in zip(x.double().numpy(), found, strict=True):
        wanted = canny_in_numpy(picture, low, high)
        assert 20 < wanted.sum() < 600
        assert float((edges[0].numpy() != wanted).mean()) < 1e-3  # float32 against float64 at a threshold


def test_canny_finds_a_squares_outline_once() -> None:
    """One closed line of one pixel's width, on the boundary or half a pixel beside it."""
    edges = control_of("canny")(square())[0, 0]
    rows = [edges[row].nonzero().flatten().tolist() for row in range(11, 21)]
    assert all(len(row) == 2 and row[0] in (7, 8) and row[1] in (23, 24) for row in rows)
    columns = [edges[:, column].nonzero().flatten().tolist() for column in range(11, 21)]
    assert all(len(column) == 2 and column[0] in (7, 8) and column[1] in (23, 24) for column in columns)
    assert 52 <= float(edges.sum()) <= 72 and float(edges[10:22, 10:22].sum()) == 0


def test_weak_edges_stay_only_where_they_hang_on_strong_ones() -> None:
    """A step that fades from 0.9 to 0.2 along its length is one edge; one of 0.2 throughout is none."""
    low, high = 0.1, 0.3
    fading, faint = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    fading[..., 16:] = torch.linspace(0.9, 0.2, 32)[:, None]
    faint[..., 16:] = 0.2
    assert float(controls.canny(fading, low=low, high=high)[..., 12:20].sum()) == 30
    assert float(controls.canny(fading, low=high, high=high)[..., 12:20].sum()) < 28
    assert float(controls.canny(faint, low=low, high=high).sum()) == 0
    assert float(controls.canny(faint, low=low, high=low).sum()) == 30


def test_nothing_is_no_edge() -> None:
    flat = torch.full((2, 3, 16, 16), 0.4)
    assert float(control_of("canny")(flat).sum()) == 0 and float(control_of("soft-edges")(flat).max()) < 1e-6


def test_depth_like_keeps_masses_and_loses_detail() -> None:
    x, noise = square(64, 16, 48), 0.4 * (pictures(1, 3, 64, 64) - 0.5)
    plain, noisy = (control_of("depth")(picture) for picture in (x, (x + noise).clamp(-1, 2)))
    assert float(plain[0, 0, 32, 32]) > 0.99 and float(plain[0, 0, 2, 2]) < 0.01
    assert float((plain - noisy).abs().max()) < 0.05 and 0.4 < float(plain[0, 0, 32, 16]) < 0.6


def test_low_resolution_is_the_mean_of_each_square() -> None:
    x = pictures(2, 3, 16, 24)
    found = control_of("low-resolution")(x)
    wanted = x.unflatten(2, (2, 8)).unflatten(4, (3, 8)).mean((3, 5))
    assert torch.allclose(found[:, :, ::8, ::8], wanted, atol=1e-6)
    assert torch.equal(found[:, :, 0], found[:, :, 7])
    assert control_of("low-resolution")(pictures(1, 3, 20, 12)).shape == (1, 3, 20, 12)


def test_masks_are_a_function_of_the_key_and_hide_the_picture() -> None:
    x = pictures(6, 3, 32, 40)
    found = control_of("mask")(x, [5, 6, 7, 8, 9, 5])
    mask = found[:, :1]
    assert set(mask.unique().tolist()) == {0.0, 1.0} and torch.equal(found[:, 1:], x * (1 - mask))
    assert torch.equal(mask[0], mask[5]) and not torch.equal(mask[0], mask[1])
    assert torch.equal(control_of("mask")(x[3:4], [8]), found[3:4])
    for one in mask[:, 0]:
        rows, columns = one.any(1).nonzero().flatten(), one.any(0).nonzero().flatten()
        tall, wide = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert float(one.sum()) == tall * wide and 8 <= tall <= 24 and 10 <= wide <= 30


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_says_what_it_gives_and_depends_on_its_picture_alone(name: str) -> None:
    x = pictures(3, 3, 24, 32)
    found = control_of(name)(x, [1, 2, 3])
    assert found.shape == (3, CONTROLS[name].channels, 24, 32) and 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.allclose(found[1:2], control_of(name)(x[1:2], [2]), atol=1e-6)


def test_f1_by_hand() -> None:
    found, wanted = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    found[0, 0, 2, :4] = 1  # 4 pixels, of which 3 lie within 1 of the wanted ones
    wanted[0, 0, 3, 3:8] = 1  # 5 pixels, of which 2 lie within 1 of the found ones
    f1 = edge_f1(found, wanted)
    precision, recall = 2 / 4, 2 / 5
    assert f1[0].item() == pytest.approx(2 * precision * recall / (precision + recall)) and f1[1].item() == 1
    assert edge_f1(found, wanted, reach=0)[0].item() == 0 and edge_f1(found, found)[0].item() == 1


def test_a_control_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def inverted(pictures: Tensor, keys: Sequence[int]) -> Tensor:
        return 1 - pictures

    monkeypatch.setattr(controls, "CONTROLS", dict(CONTROLS))
    register("inverted", Control("Inverted", 3, inverted))
    x = pictures(1, 3, 8, 8)
    assert torch.equal(control_of("inverted")(x), 1 - x)
    with pytest.raises(OneStepError, match="known already"):
        register("canny", Control("Mine", 3, inverted))


def test_what_is_refused() -> None:
    with pytest.raises(OneStepError, match="no control 'cany'.*canny"):
        control_of("cany")
    with pytest.raises(OneStepError, match=r"pictures are \[3, 8, 8\]"):
        control_of("canny")(pictures(3, 8, 8))
    with pytest.raises(OneStepError, match="'Wrong' gave"):
        Control("Wrong", 1, lambda pictures, keys: pictures)(pictures(1, 3, 8, 8))
    with pytest.raises(OneStepError, match="finite"):
        Control("Broken", 3, lambda pictures, keys: pictures / 0)(pictures(1, 3, 8, 8))
