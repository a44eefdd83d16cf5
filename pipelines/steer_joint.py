"""Which texts a forward of a steered network reads: those of a U-Net as they are, the prompt's and the negative's in
one sequence where text and picture attend jointly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from .steer_modulation import Modulation
from .steer_run import Run

Given = dict[str, Any]
"""A forward's arguments by name."""
MASKS = ("encoder_hidden_states_mask", "attention_mask")
"""What hides padding of the prompts."""


@dataclass
class CrossTexts:
    """Of networks with cross-attention, which reads the negative by itself. family: the network's."""

    run: Run
    family: str
    network: Any
    time = "timestep"

    def counted(self, time: float) -> float:
        """The network's time as its schedule counts it."""
        return time * FAMILIES[self.family].divided

    def latents_and_prompts(self, given: Given) -> tuple[Any, Any]:
        return None, given["encoder_hidden_states"]

    def joined(self, given: Given) -> Given | None:
        """What changes of a steered forward's arguments; None is nothing. The negative is embedded once for all
        blocks."""
        text, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        self.run.positive_tokens, self.run.positive_lengths = text.shape[1], None
        if self.run.steering.mode == "vsf" and mask is not None and mask.ndim == 2:
            # one softmax over both texts' own tokens
            self.run.positive_lengths = shown(mask, text.shape[1])
        if path := FAMILIES[self.family].text_embedder:
            embedder, like = self.network.get_submodule(path), given["encoder_hidden_states"]
            self.run.embedded = embedder(self.run.away.tokens.to(like.device, like.dtype))
        return None

    def clear(self) -> None:
        """After a forward: nothing of it stays."""
        self.run.embedded, self.run.positive_lengths = None, None


@dataclass
class JointTexts:
    """Of SD3, Flux, FLUX.2, Chroma and Qwen-Image: the negative's tokens follow the prompt's, each text's modulated by
    its own pooled text where it has one."""

    run: Run
    modulation: Modulation
    family: str
    network: Any
    time = "timestep"

    def counted(self, time: float) -> float:
        return FAMILIES[self.family].time_of(time)  # type: ignore[no-any-return]

    def latents_and_prompts(self, given: Given) -> tuple[Any, Any]:
        return given["hidden_states"], given["encoder_hidden_states"]

    def joined(self, given: Given) -> Given:
        if (given.get("joint_attention_kwargs") or {}).get("attention_mask") is not None:
            raise OneStepError(
                "steering cannot follow a mask over the prompt's tokens: encode all prompts to one number of tokens"
            )
        (text, lengths, unmasked), away = _seen(given), self.run.away
        every = self.run.spread(away.tokens.to(text.device, text.dtype), len(text))
        self.run.positive_tokens, self.run.positive_lengths = text.shape[1], lengths
        if away.pooled:
            parts = [text.shape[1], every.shape[1] - away.empty, *([away.empty] if away.empty else ())]
            self.modulation.set([self._embedded(given, pooled) for pooled in away.pooled], parts)
        changed: Given = {"encoder_hidden_states": torch.cat([text, every], 1), **unmasked}
        if given.get("txt_ids") is not None:
            places = given["txt_ids"][0] if given["txt_ids"].ndim == 3 else given["txt_ids"]
            changed["txt_ids"] = torch.cat([places[: text.shape[1]], self._places(places)])
        return changed

    def _places(self, like: Tensor) -> Tensor:
        """[L, axes] of the negative's and the empty text's tokens, each numbered as if it were the only text."""
        away, axis = self.run.away, FAMILIES[self.family].numbered
        count = away.tokens.shape[1]
        places = like.new_zeros(count, like.shape[1])
        if axis is not None:
            numbers = torch.arange(count, device=like.device)
            own = count - away.empty
            places[:, axis] = torch.where(numbers < own, away.first + numbers, numbers - own).to(like)
        return places

    def clear(self) -> None:
        self.modulation.clear()

    def _embedded(self, given: Given, pooled: Tensor) -> Tensor:
        """[B, C] of time, guidance and ``pooled``, as the network's forward embeds the prompt's."""
        own = given["pooled_projections"]
        told = [given["timestep"]]
        if (factor := FAMILIES[self.family].divided) != 1:
            guidance = [given["guidance"]] if given.get("guidance") is not None else []
            told = [value.to(given["hidden_states"].dtype) * factor for value in (*told, *guidance)]
        spread = self.run.spread(pooled.to(own.device, own.dtype), len(own))
        return self.network.time_text_embed(*told, spread)  # type: ignore[no-any-return]


def _seen(given: Given) -> tuple[Tensor, tuple[int, ...] | None, Given]:
    """The prompts' tokens that their mask shows, how many each row begins with where they are not as many, and that
    mask's argument, none from here on. Chroma's lies over the picture's tokens too."""
    text = given["encoder_hidden_states"]
    name = next((name for name in MASKS if given.get(name) is not None), None)
    if name is None:
        return text, None, {}
    lengths = shown(given[name], text.shape[1])
    return text[:, : max(lengths)], lengths if len(set(lengths)) > 1 else None, {name: None}


def shown(mask: Tensor, tokens: int) -> tuple[int, ...]:
    """How many tokens each row of a mask [B, L] begins with, of a text's. OneStepError for any other mask."""
    seen = mask[:, :tokens].bool()
    if bool((seen[:, 1:] & ~seen[:, :-1]).any()) or not bool(seen[:, 0].all()):
        raise OneStepError(
            "steering cannot follow a mask that hides tokens of a prompt before others: give texts that are filled up "
            "behind their own tokens, as this pipeline's encode_prompt does"
        )
    return tuple(seen.sum(1).tolist())
