"""Prompts of several lengths in one steered batch, filled up under a mask: each as if it were drawn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import inputs_of
from steered_networks import STEERINGS, away, pipe_of, run, texts
from torch import Tensor

from onestep.core.cond import Cond
from onestep.core.errors import OneStepError

MASKED = ["qwen_image", "chroma"]
LENGTHS, OWN = (3, 5), (6, 4)
"""Tokens of each prompt, and of each one's negative."""
TOLERANCE = 1e-6
"""In float64: the networks turn queries and keys in float32."""


def shown(lengths: tuple[int, ...]) -> Tensor:
    """[B, L], True where a text has tokens of its own."""
    return torch.arange(max(lengths)).expand(len(lengths), -1) < torch.tensor(lengths)[:, None]


def masked(name: str, inputs: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """The argument of the network's forward; Chroma's lies over the picture's tokens too."""
    if name == "qwen_image":
        return {"encoder_hidden_states_mask": mask}
    return {"attention_mask": torch.cat([mask, mask.new_ones(len(mask), inputs["x"][0, 0].numel() // 4)], 1)}


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    one = {key: value[row : row + 1] for key, value in inputs.items()}
    return {**one, "text": one["text"][:, : LENGTHS[row]]}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("mode", STEERINGS)
@pytest.mark.parametrize("name", MASKED)
def test_each_is_steered_as_if_alone(name: str, mode: str) -> None:
    """By a negative of its own, of several lengths too."""
    pipe, network = pipe_of(name)
    inputs, negative = inputs_of(name), Cond(texts(2, 6), shown(OWN))
    with away(pipe, negative, mode):
        together = run(name, network, inputs, **masked(name, inputs, shown(LENGTHS)))
    for row in range(2):
        with away(pipe, Cond(negative.text[row : row + 1, : OWN[row]]), mode):
            alone = run(name, network, row_of(inputs, row))
        close(together[row : row + 1], alone)
        assert float((alone - run(name, network, row_of(inputs, row))).abs().max()) > 1e-3


@pytest.mark.parametrize("name", MASKED)
def test_of_two_halves_one_is_steered(name: str) -> None:
    pipe, network = pipe_of(name)
    inputs = inputs_of(name)
    with away(pipe, texts(1, 6), "nag", rows="second half"):
        together = run(name, network, inputs, **masked(name, inputs, shown(LENGTHS)))
    close(together[:1], run(name, network, row_of(inputs, 0)))
    with away(pipe, texts(1, 6), "nag"):
        close(together[1:], run(name, network, row_of(inputs, 1)))


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_with_holes_is_refused(name: str) -> None:
    pipe, network = pipe_of(name)
    inputs, mask = inputs_of(name), shown(LENGTHS)
    holes: Any = mask.clone()
    holes[0, 0] = False
    with away(pipe, texts(1, 6), "nasa"), pytest.raises(OneStepError, match="hides tokens of a prompt before others"):
        run(name, network, inputs, **masked(name, inputs, holes))
