"""`Prompt List`: prompts from a text, from a file, or from the workflows inside pictures that ComfyUI saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui
from PIL import Image

from ..core.errors import OneStepError
from ..training.engine.prompts import MOST_BYTES, check_prompts, lines
from .places import inside_input

MOST_PICTURES = 10_000
TEXTS = ("text", "text_l", "clip_l", "t5xxl", "text_g", "clip_g")


class PromptList(io.ComfyNode):  # type: ignore[misc]
    """What a student learns to draw: one prompt a line."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepPromptList",
            display_name="Prompt List",
            category="OneStep/training",
            description="Collects prompts, one a line, for Distil One-Step LoRA. No pictures are needed to train.",
            search_aliases=["prompts from file", "captions", "dataset"],
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=False,
                    tooltip="One prompt a line. 200 to 1000 that you would really use do well.",
                ),
                io.String.Input(
                    "file",
                    default="",
                    tooltip="A name under ComfyUI's input folder, or empty: a .txt with one prompt a line, a "
                    "picture that "
                    "ComfyUI saved, or a folder of such pictures, whose positive prompts are read.",
                ),
                io.Boolean.Input("unique", default=True, tooltip="Keep each prompt once."),
            ],
            outputs=[
                io.String.Output(display_name="prompts", tooltip="One prompt a line, for Distil One-Step LoRA."),
                io.Int.Output(display_name="count", tooltip="How many there are."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: Any = None) -> bool | str:
        """At queue time: a file that is not there. What comes from another node is None here."""
        try:
            return not (isinstance(file, str) and file.strip()) or bool(inside_input(file))
        except OneStepError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file: Any = "", **unused: Any) -> Any:
        if not isinstance(file, str):  # from another node, which gives it later
            return float("nan")
        try:
            found = [inside_input(file), *pictures(inside_input(file))] if file.strip() else []
        except OneStepError:
            return float("nan")
        return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in found]

    @classmethod
    def execute(cls, text: str, file: str, unique: bool) -> io.NodeOutput:
        prompts = [*lines(text), *(from_file(inside_input(file)) if file.strip() else [])]
        prompts = check_prompts(list(dict.fromkeys(prompts)) if unique else prompts)
        shown = "\n".join(prompts[:5]) + ("\n..." if len(prompts) > 5 else "")
        return io.NodeOutput("\n".join(prompts), len(prompts), ui=ui.PreviewText(f"{len(prompts)} prompts:\n{shown}"))


def from_file(path: Path) -> list[str]:
    """Prompts of a text file, of a picture, or of all pictures in a folder."""
    if path.is_file() and path.suffix.lower() == ".txt":
        if path.stat().st_size > MOST_BYTES:
            raise OneStepError(f"{path.name} has {path.stat().st_size} bytes, more than {MOST_BYTES}: split it")
        return lines(path.read_text(encoding="utf-8-sig", errors="replace"))
    found = [prompt for picture in pictures(path) for prompt in inside_picture(picture)]
    if not found:
        raise OneStepError(
            f"no prompts were found in {path.name}: give a .txt file, or pictures that ComfyUI saved as PNG"
        )
    return found


def pictures(path: Path) -> list[Path]:
    """The PNGs at ``path``, a file or a folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".png" else []
    return sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".png")[:MOST_PICTURES]


def inside_picture(path: Path) -> list[str]:
    """The positive prompts in a picture's workflow metadata; none where it holds none that can be read."""
    try:
        with Image.open(path) as picture:
            told = dict(getattr(picture, "text", {}))
        graph = json.loads(told.get("prompt", "{}"))
        return list(dict.fromkeys(positive_texts(graph)))
    except (OSError, ValueError, AttributeError, RecursionError, SyntaxError):
        return []


def positive_texts(graph: dict[str, Any]) -> Iterator[str]:
    """Texts that reach a sampler's or guider's positive condition in an API-format graph."""
    for node in graph.values():
        inputs = node.get("inputs", {})
        for name in ("positive", "conditioning"):
            if isinstance(inputs.get(name), list):
                yield from texts_behind(graph, inputs[name], set())


def texts_behind(graph: dict[str, Any], link: Any, seen: set[str]) -> Iterator[str]:
    """The texts of the encoders that a link leads to, through whatever stands between."""
    key = str(link[0])
    node = graph.get(key)
    if node is None or key in seen:
        return
    seen.add(key)
    inputs = node.get("inputs", {})
    texts = [as_line(graph, inputs[name]) for name in TEXTS if name in inputs]
    yield from dict.fromkeys(text for text in texts if text)
    if not texts:
        for value in links(inputs.values()):
            yield from texts_behind(graph, value, seen)


def as_line(graph: dict[str, Any], value: Any) -> str:
    """A text widget's value on one line, or that of the node that it is linked to."""
    if isinstance(value, list) and value:
        inputs = graph.get(str(value[0]), {}).get("inputs", {})
        value = next((text for text in inputs.values() if isinstance(text, str) and text.strip()), "")
    return " ".join(value.split()) if isinstance(value, str) else ""


def links(values: Iterable[Any]) -> list[Any]:
    return [
        value for value in values if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
    ]


NODES = [PromptList]
