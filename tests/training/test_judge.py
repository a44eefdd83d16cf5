"""The judge: what its prompts ask for, its shapes, and that saving and loading keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onestep.core.errors import OneStepError
from onestep.training.evaluation.judge import FEATURES, HEADS, Judge

CONFIG = {
    "heads": {
        "group": ["floor", "weapon artefact", "grey"],
        "colour": ["red", "grey"],
        "brightness": ["bright", "dark"],
    },
    "held_out": {},
}


@pytest.fixture
def judge() -> Judge:
    return Judge(CONFIG).eval()


def test_prompts_ask_for_classes(judge: Judge) -> None:
    prompts = ["floor: grey stone, red, dark", "Weapon Artefact: axe, bright", "unheard of, grey", "", "grey"]
    asked = judge.asked(prompts)
    assert asked["group"].tolist() == [0, 1, -1, -1, 2]
    assert asked["colour"].tolist() == [0, -1, 1, -1, -1]
    assert asked["brightness"].tolist() == [1, 0, -1, -1, -1]


def test_shapes_and_probabilities(judge: Judge) -> None:
    images = torch.rand(3, 3, 32, 32)
    assert judge.features(images).shape == (3, FEATURES)
    chances = judge.predict(images)
    assert [tuple(chances[head].shape) for head in HEADS] == [(3, 3), (3, 2), (3, 2)]
    for of in chances.values():
        torch.testing.assert_close(of.sum(dim=1), torch.ones(3))


def test_agreement_counts_only_prompts_that_ask(judge: Judge) -> None:
    # Heads without weights and with one large bias answer the same for every image.
    for head in HEADS:
        torch.nn.init.zeros_(judge.heads[head].weight)
        judge.heads[head].bias.data = torch.eye(len(CONFIG["heads"][head]))[1]
    prompts = ["floor: a, grey", "weapon artefact: b", "weapon artefact, red", "c"]
    shares = judge.agreement(torch.rand(4, 3, 32, 32), prompts)
    assert shares["group"] == pytest.approx(2 / 3)
    assert shares["colour"] == 0.5
    assert shares["brightness"] != shares["brightness"]  # nan: no prompt asks


def test_saved_and_loaded_is_the_same_judge_rounded(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    for tensor in judge.state_dict().values():
        tensor.copy_(tensor.half())
    images, loaded = torch.rand(2, 3, 32, 32), Judge.load(tmp_path)
    assert torch.equal(loaded.features(images), judge.features(images))
    assert loaded.config == CONFIG
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_absent_judge_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OneStepError, match="judge.json is missing"):
        Judge.load(tmp_path)
