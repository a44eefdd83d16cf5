"""Prompts by what their texts are about: k-means (Lloyd 1982, doi:10.1109/TIT.1982.1056489) on their summaries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import randomness
from ...core.cond import Cond
from ...core.router import Router

LOOKED_AT = 4096
"""Prompts that the centroids are found from; of a longer list as many, drawn by the seed."""
ROUNDS = 100
AT_ONCE = 64


def summaries(cond: Cond) -> Tensor:
    """[N, P] of N texts, a part at a time: a long list's lies in a file."""
    parts = (cond[start : start + AT_ONCE] for start in range(0, len(cond), AT_ONCE))
    return torch.cat([part.summary.float().cpu() for part in parts])


def clustered(found: Tensor, clusters: int, seed: int) -> tuple[Router, tuple[Tensor, ...]]:
    """The router of texts' summaries [N, P], and the rows of each cluster, the first prompt's cluster first. None is
    empty unless fewer than ``clusters`` summaries differ."""
    some = found
    if len(found) > LOOKED_AT:
        some = found[randomness.uniform(seed, "clusters", 0, range(len(found))).argsort()[:LOOKED_AT].sort().values]
    centroids = k_means(some.double(), clusters, seed).float()
    nearest = Router(centroids).nearest(found)
    order = sorted(range(clusters), key=lambda at: [*(nearest == at).nonzero()[:, 0].tolist(), len(found)][0])
    rows = tuple((nearest == at).nonzero()[:, 0] for at in order)
    return Router(centroids[order]), rows


def k_means(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Centroids [K, P] of x [N, P], float64: each the mean of the points that it is nearest to."""
    centroids = _far_apart(x, clusters, seed)
    for _ in range(ROUNDS):
        apart = torch.cdist(x, centroids)
        least, nearest = apart.min(1)
        moved = centroids.clone()
        for at in range(clusters):
            mine = nearest == at
            if bool(mine.any()):
                moved[at] = x[mine].mean(0)
            elif float(least.max()) > 0:
                # an empty cluster takes the point that is worst served
                worst = int(least.argmax())
                moved[at], least[worst] = x[worst], 0.0
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _far_apart(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Where they begin: each a point drawn by its squared distance to those before (k-means++, Arthur and Vassilvitskii
    2007)."""
    draws = randomness.uniform(seed, "clusters begin", 0, range(clusters)).double()
    chosen = [int(draws[0] * len(x))]
    for draw in draws[1:]:
        share = torch.cdist(x, x[chosen]).min(1).values.square().cumsum(0)
        chosen.append(min(int((share <= draw * share[-1]).sum()), len(x) - 1))
    return x[chosen]
