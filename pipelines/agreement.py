"""How well a picture agrees with its prompt, as a CLIP of the user's sees them: a reward with a gradient."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from ..core.errors import OneStepError
from ..training.methods.rewards import AGREEMENT, Reward, told
from ..training.settings import Settings

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue, as OpenAI's CLIP is told pictures."""


class Agreement:
    """The cosine of picture and prompt, [B]. folder: of a CLIP as transformers saves it."""

    def __init__(self, folder: str) -> None:
        place = Path(folder).expanduser()
        if not folder or not (place / "config.json").is_file():
            raise OneStepError(
                f"reward_model is {folder[-150:]!r}, which is no folder of a CLIP: the reward agreement needs one as "
                "transformers saves it, with config.json, model.safetensors and its tokenizer "
                "(openai/clip-vit-large-patch14, for one)"
            )
        kind = json.loads((place / "config.json").read_text("utf-8")).get("model_type")
        if kind != "clip":
            raise OneStepError(
                f"reward_model holds a model of type {str(kind)[:60]!r}, and agreement needs a CLIP (clip)"
            )
        from transformers import AutoTokenizer, CLIPModel

        try:
            self.model: Any = CLIPModel.from_pretrained(place, local_files_only=True, use_safetensors=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            raise OneStepError(f"the CLIP in reward_model cannot be read ({why}): download it again") from None
        self.model.float().eval().requires_grad_(False)
        beside = place / "preprocessor_config.json"
        values = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        self.mean, self.deviation = values.get("image_mean", MEAN), values.get("image_std", DEVIATION)
        self.texts: dict[str, Tensor] = {}

    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        self.model.to(pictures.device)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            self.texts |= zip(new, self._read(new).cpu(), strict=True)
        texts = torch.stack([self.texts[prompt] for prompt in prompts]).to(pictures.device)
        return cosine_similarity(self._seen(pictures), texts)

    @torch.no_grad()
    def _read(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        taken = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _embedded(self.model.get_text_features(**taken))

    def _seen(self, pictures: Tensor) -> Tensor:
        """The picture's middle square, as large as the CLIP takes it."""
        side = min(pictures.shape[2:])
        top, left = ((size - side) // 2 for size in pictures.shape[2:])
        square = pictures[:, :, top : top + side, left : left + side].float()
        size = self.model.config.vision_config.image_size
        small = interpolate(square, (size, size), mode="bicubic", antialias=True)
        mean, deviation = (small.new_tensor(values)[:, None, None] for values in (self.mean, self.deviation))
        return _embedded(self.model.get_image_features(pixel_values=(small - mean) / deviation))


def _embedded(found: Any) -> Tensor:
    """Of transformers' answer, a tensor or, from version 5 on, an output that holds it."""
    answer: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return answer


def read_for(settings: Settings) -> dict[str, Reward]:
    """The reward, where a run's settings name it."""
    own = settings.own
    wanted = AGREEMENT in told(getattr(own, "reward", ""))
    return {AGREEMENT: Agreement(own.reward_model)} if wanted else {}
