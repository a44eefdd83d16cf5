"""Texts of several lengths in one batch, for networks that read each at its own: a call for the rows of each length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .cond import Cond
from .roles import Roles

Network = Callable[[Tensor, Tensor, Cond], Tensor]


def rows_by_length(cond: Cond, filled: int = 1) -> list[list[int]]:
    """The rows of each text length, counted up to a multiple of ``filled``, in order."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths_of(cond)):
        groups.setdefault(-(-length // filled), []).append(row)
    return list(groups.values())


def lengths_of(cond: Cond) -> list[int]:
    """Real tokens of each text; they come first."""
    return [cond.text.shape[1]] * len(cond) if cond.mask is None else cond.mask.sum(1).tolist()


def cut(cond: Cond) -> Cond:
    """``cond`` without what pads all of its texts, and without a mask where none is left to mask."""
    lengths = lengths_of(cond)
    text, mask = cond.text[:, : max(lengths)], None if cond.mask is None else cond.mask[:, : max(lengths)]
    return replace(cond, text=text, mask=None if min(lengths) == max(lengths) else mask)


def by_length(network: Network, roles: Roles, x: Tensor, time: Tensor, cond: Cond, filled: int) -> Tensor:
    """What ``network`` gives of x [B, ...], a call for the rows of each length. Within a captured call of ``roles``,
    whose adapters serve each row as they would in one call of all."""
    groups = rows_by_length(cond, filled)
    if len(groups) == 1:
        return network(x, time, cut(cond))
    answers = []
    for rows in groups:
        with roles.serving(roles.of_rows(rows)):
            answers.append(network(x[rows], time[rows], cut(cond[rows])))
    order = torch.tensor([row for rows in groups for row in rows], device=x.device)
    return torch.cat(answers)[order.argsort()]
