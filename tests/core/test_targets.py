"""A target reads its sizes from any kind of layer and orders rows as its host does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onestep.core.targets import Target, is_adaptable, kernel_size, out_features


class CastOnUse(nn.Linear):
    """As ComfyUI's layers: an nn.Linear whose stored weight is not what it multiplies by."""


class Foreign(nn.Module):
    """As ComfyUI's and bitsandbytes' quantised layers: no nn.Linear, and a packed weight of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 10
        self.weight = nn.Parameter(torch.zeros(30, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("layer", [nn.Linear(6, 10), CastOnUse(6, 10), Foreign()])
def test_sizes_of_a_linear_are_read_from_its_attributes(layer: nn.Module) -> None:
    target = Target("x", layer)
    assert (target.in_features, target.out_rows, target.row_range) == (6, 10, (0, 10))
    assert (target.shape_a(4), target.shape_b(4)) == ((4, 6), (10, 4))
    assert not target.is_conv


def test_sizes_of_a_convolution() -> None:
    target = Target("x", nn.Conv2d(3, 8, (3, 5), stride=2, padding=1))
    assert target.is_conv and kernel_size(target.module) == (3, 5)
    assert (target.shape_a(4), target.shape_b(4)) == ((4, 3, 3, 5), (8, 4, 1, 1))


def test_rows_are_a_slice_of_the_layer() -> None:
    target = Target("x", nn.Linear(6, 10), slice(2, 7))
    assert (target.out_rows, target.row_range, target.shape_b(4)) == (5, (2, 7), (5, 4))
    assert out_features(target.module) == 10


def test_host_order_is_canonical_rows_by_the_permutation() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    swapped = Target("x", nn.Linear(1, 4), permutation=torch.tensor([2, 3, 0, 1]))
    assert swapped.host_order(rows).flatten().tolist() == [3, 4, 1, 2]
    assert Target("x", nn.Linear(1, 4)).host_order(rows) is rows


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.Embedding(4, 4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, groups=2)]
)
def test_norms_embeddings_and_grouped_convolutions_are_not_adaptable(layer: nn.Module) -> None:
    assert not is_adaptable(layer)
