"""The tiles with their captions, and captions as a batch of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onestep.pipelines.tiny_words import group_of, normalise, pixel_words

NAME_DROPPED, WORD_DROPPED, PROMPT_DROPPED = 0.15, 0.5, 0.1


@dataclass(frozen=True)
class Tiles:
    """images: uint8 [N, 3, 32, 32]; captions: normalised "group: name"; words: (colour, "bright" | "dark" | None)."""

    images: Tensor
    captions: tuple[str, ...]
    words: tuple[tuple[str, str | None], ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def centred(self) -> Tensor:
        """The images as float32 in [-1, 1]."""
        return self.images.float() / 127.5 - 1.0


def load(path: Path) -> Tiles:
    """Read an .npz with `image` uint8 [N, 32, 32, 3] and `caption`."""
    with np.load(path, allow_pickle=False) as data:
        images, captions = data["image"], data["caption"]
    words = tuple(pixel_words(image) for image in images)
    return Tiles(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), tuple(map(normalise, captions)), words)


def prompt(caption: str, words: tuple[str, str | None], named: bool, coloured: bool, lit: bool) -> str:
    """ "group: name, colour, bright": each part after the group only where asked for."""
    head = caption if named else group_of(caption) or caption
    asked = [word for word, wanted in zip(words, (coloured, lit), strict=True) if wanted and word]
    return ", ".join([head, *asked])


class Prompts:
    """Token ids of every form of every caption, drawn at random by tile."""

    def __init__(self, tiles: Tiles, tokenizer: object) -> None:
        forms = list(product((True, False), repeat=3))
        texts = [prompt(c, w, *form) for c, w in zip(tiles.captions, tiles.words, strict=True) for form in forms]
        *ids, self.empty = encode(tokenizer, [*texts, ""])
        self.ids = torch.stack(ids).view(len(tiles), 2, 2, 2, -1)

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids [B, L] for tiles [B]; name and words dropped by chance, some prompts emptied for guidance."""
        chance = torch.rand(4, len(rows), generator=generator)
        named, coloured, lit = (chance[:3] < torch.tensor([[NAME_DROPPED], [WORD_DROPPED], [WORD_DROPPED]])).long()
        ids = self.ids[rows, named, coloured, lit]
        return torch.where((chance[3] < PROMPT_DROPPED)[:, None], self.empty, ids)


def encode(tokenizer: object, texts: Sequence[str]) -> Tensor:
    """Padded token ids [N, L]; L is CLIP's own length, or of a tokenizer with a template that of the longest text."""
    if tokenizer.chat_template is None:  # type: ignore[attr-defined]
        return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids  # type: ignore
    turns = ([{"role": "user", "content": text}] for text in texts)
    asked = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]  # type: ignore
    return tokenizer(asked, padding=True, padding_side="right", return_tensors="pt").input_ids  # type: ignore
