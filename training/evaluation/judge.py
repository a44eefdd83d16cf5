"""The judge: a small frozen classifier of 32x32 tiles. Its features give FD-local, its heads say whether a prompt
was obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestep.core.errors import OneStepError

HEADS = ("group", "colour", "brightness")
FEATURES = 64


class Judge(nn.Module):
    """Convolutions, a FEATURES-wide last layer, and one linear head each for group, colour and brightness.

    config: {"heads": {"group": [...], "colour": [...], "brightness": [...]}, "held_out": {head: accuracy}, ...}; the
    lists
    name the classes in the order of the head's outputs, `held_out` is the accuracy on tiles the judge never saw.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential(
            *_layer(3, 32), *_layer(32, 64, stride=2), *_layer(64, 64), *_layer(64, 128, stride=2), *_layer(128, 128),
            *_layer(128, 128, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(4 * 128, FEATURES), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({head: nn.Linear(FEATURES, len(config["heads"][head])) for head in HEADS})

    @classmethod
    def load(cls, folder: str | Path) -> Judge:
        """Read judge.json and judge.safetensors; the judge comes frozen and ready to use."""
        folder = Path(folder)
        for name in ("judge.json", "judge.safetensors"):
            if not (folder / name).is_file():
                raise OneStepError(f"no judge in {folder}: {name} is missing; give the folder that holds both files")
        judge = cls(json.loads((folder / "judge.json").read_text(encoding="utf-8")))
        judge.load_state_dict(
            {name: tensor.float() for name, tensor in load_file(folder / "judge.safetensors").items()}
        )
        return judge.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write judge.json and judge.safetensors (float16, like the models beside it)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "judge.safetensors", {"format": "pt"})
        (folder / "judge.json").write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")

    def features(self, images: Tensor) -> Tensor:
        """[B, FEATURES] of images [B, 3, 32, 32] in [0, 1]."""
        return torch.cat([self.body(2.0 * part - 1.0) for part in images.split(512)])

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """Head name -> [B, classes] before the softmax."""
        return {head: layer(features) for head, layer in self.heads.items()}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Head name -> probabilities [B, classes] for images [B, 3, 32, 32] in [0, 1]."""
        return {head: logits.softmax(dim=1) for head, logits in self.logits(self.features(images)).items()}

    def asked(self, prompts: list[str]) -> dict[str, Tensor]:
        """Head name -> class [B] that each prompt "group: name, word, word" asks for; -1 where it asks for none."""
        parts = [[part.strip() for part in prompt.lower().split(",")] for prompt in prompts]
        wanted = {head: [words[1:] for words in parts] for head in HEADS}
        wanted["group"] = [[words[0].split(":")[0].strip()] for words in parts]
        return {head: torch.tensor([self._class(head, words) for words in wanted[head]]) for head in HEADS}

    def agreement(self, images: Tensor, prompts: list[str]) -> dict[str, float]:
        """Head name -> share of the images whose likeliest class is what the prompt asks for; nan where none asks."""
        chosen = {head: chances.argmax(dim=1).cpu() for head, chances in self.predict(images).items()}
        shares = {}
        for head, asked in self.asked(prompts).items():
            known = asked >= 0
            shares[head] = float((chosen[head][known] == asked[known]).double().mean())
        return shares

    def _class(self, head: str, words: list[str]) -> int:
        names = self.config["heads"][head]
        return next((names.index(word) for word in words if word in names), -1)


def _layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
