"""A custom node of the tests: the folder of any tiny model as MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any


class LoadTinyFolder:
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder: str) -> Any:
        from pathlib import Path

        from onestep.nodes.tiny_models.model import load_tiny

        return load_tiny(Path(folder))


NODE_CLASS_MAPPINGS = {"LoadTinyFolder": LoadTinyFolder}
