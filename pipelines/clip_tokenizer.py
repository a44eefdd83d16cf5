"""CLIP's tokenizer, from its merges alone: the vocabulary follows from them (openai/CLIP, simple_tokenizer.py)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).resolve().parent / "configs" / "clip_tokenizer" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """The tokenizer of SD1.5, SD2 and SDXL. pad: END for OpenAI's CLIP, "!" (token 0) for OpenCLIP."""
    from transformers import CLIPTokenizer  # takes a second and a half, which what reads no such file need not wait for

    text = MERGES.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "merges.txt").write_text(text, encoding="utf-8")
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary(text)), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(
            folder, local_files_only=True, model_max_length=LENGTH, pad_token=pad, unk_token=END
        )


def vocabulary(merges: str) -> dict[str, int]:
    """Every byte, every byte at a word's end, every merged pair in order, start and end: 49,408 pieces."""
    letters = byte_letters()
    pairs = ["".join(line.split()) for line in merges.splitlines()[1:] if line]
    pieces = [*letters, *(letter + "</w>" for letter in letters), *pairs, START, END]
    return {piece: at for at, piece in enumerate(pieces)}


def byte_letters() -> list[str]:
    """One printable letter for each byte: itself where it prints, else one from U+0100 on; printing ones first."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) for byte in printing] + [chr(0x100 + place) for place in range(len(others))]
