"""The byte-pair tokenizers of the tiny models, in CLIP's own format and in Qwen's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer

LENGTH = 24
PIECES = 1200
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TURN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
"""A prompt as Qwen's chat has it, with its thinking left open."""


def build(captions: Sequence[str], length: int = LENGTH) -> CLIPTokenizer:
    """CLIP tokenizer of PIECES pieces learnt from the captions; holds every byte, alone and at the end of a word."""
    merges = _merges(captions)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return CLIPTokenizer({piece: at for at, piece in enumerate(pieces)}, merges, model_max_length=length)


def build_qwen(captions: Sequence[str]) -> Qwen2Tokenizer:
    """Qwen's kind of tokenizer, of PIECES pieces learnt from the captions and the words around them; holds every
    byte."""
    backend = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=PIECES - 3, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator(
        [*captions, *(f"{role}\n" for role in ("user", "assistant") for _ in captions)], trainer
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *("".join(pair) for pair in merges), EOS, TURN, END]
    tokenizer = Qwen2Tokenizer({piece: at for at, piece in enumerate(pieces)}, merges, pad_token=EOS)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write tokenizer.json and, for older readers, vocab.json with merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _merges(captions: Sequence[str]) -> list[tuple[str, str]]:
    like_clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer, learner.pre_tokenizer = like_clip.normalizer, like_clip.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES - 2, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    pairs = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # The learner counts only the word ends it saw as letters; ours are all 256, so some merges must go.
    return pairs[: PIECES - 2 - 2 * len(alphabet)]
