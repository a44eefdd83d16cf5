"""The rows of benchmarks/recipe.py: made, scored, kept in a file as each is known, and as a table."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from judged import Judged, Seen, train

from onestep.training.settings import Settings

DEFAULT = "default"


def _is(line: dict[str, Any], **key: Any) -> bool:
    return key.items() <= line.items()


class Table:
    """rows.jsonl in the script's folder: a line for each row that is known. The runs share the teacher's pairs."""

    def __init__(self, args: argparse.Namespace, prompts: list[str]) -> None:
        self.args, self.prompts, self.path = args, prompts, args.out / "rows.jsonl"
        self.lines = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.is_file() else []
        self.judged = Judged(args.model, prompts, args.samples, args.out, real=args.reference)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def made(self, kind: str, name: str, settings: Settings) -> Path:
        """The LoRA of a row, made and scored unless it is known."""
        seed = settings.seed
        key = {"part": kind, "row": name, "steps": settings.student_steps, "seed": seed}
        folder = self._folder(kind, name, settings.student_steps, seed)
        if not self.known(**key):
            self._pairs(folder, settings)
            lora = train(self.args.model, self.prompts, settings, folder)
            self._keep(folder)
            seconds = json.loads((folder / "seconds.json").read_text())
            self.add({**key, "updates": settings.steps, "seconds": round(seconds), **self.judged(lora)})
        return folder / "result.safetensors"

    def compare(self, steps: int, seed: int) -> None:
        """Each switch beside the default of the same seed."""
        rows = [line["row"] for line in self.lines if _is(line, part="switch", steps=steps, seed=seed)]
        missing = [name for name in rows if not self.known(part="beside", row=name, steps=steps, seed=seed)]
        default = self._seen(DEFAULT, steps, seed) if DEFAULT in rows and missing != [DEFAULT] else None
        for name in missing:
            if name != DEFAULT and default is not None:
                scores = self.judged.beside(self._seen(name, steps, seed), default)
                self.add({"part": "beside", "row": name, "steps": steps, "seed": seed, **scores})

    def _seen(self, name: str, steps: int, seed: int) -> Seen:
        return self.judged.seen(self._folder("switch", name, steps, seed) / "result.safetensors")

    def known(self, **key: Any) -> bool:
        return any(_is(line, **key) for line in self.lines)

    def _folder(self, kind: str, name: str, steps: int, seed: int) -> Path:
        return self.args.out / f"{kind}-{steps}-{name.replace(' ', '-').replace('/', '-')}-{seed}"

    def _pairs(self, folder: Path, settings: Settings) -> None:
        kept = self.args.out / "pairs"
        if kept.is_dir() and not folder.exists() and settings.seed == 0:
            shutil.copytree(kept, folder / "pairs")

    def _keep(self, folder: Path) -> None:
        made, kept = folder / "pairs", self.args.out / "pairs"
        if made.is_dir() and not kept.exists():
            shutil.copytree(made, kept)
        for part in ("pairs", "states", "anchors", "head pictures"):
            shutil.rmtree(folder / part, ignore_errors=True)


HEADS = (
    "row|steps|seed|updates|FD-local to the teacher|less the default's|to real|group|colour|variety|less the default's"
)


def markdown(lines: list[dict[str, Any]]) -> list[str]:
    """The rows as a table, a part after the other."""
    rows = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for line in lines:
        if line["part"] != "beside":
            of = {name: line.get(name) for name in ("row", "steps", "seed")}
            beside = next((one for one in lines if _is(one, part="beside", **of)), {})
            rows.append("| " + " | ".join(_cells(beside | line)) + " |")
    return rows


def _cells(line: dict[str, Any]) -> list[str]:
    def estimate(name: str) -> str:
        return f"{line[name]:.2f} ±{line[f'{name}_half']:.2f}" if name in line else ""

    told = [str(line.get(name, "")) for name in ("row", "steps", "seed", "updates")]
    distances = [estimate(name) for name in ("fd", "fd_less", "fd_real")]
    return [
        *told,
        *distances,
        *(f"{line[name]:.3f}" for name in ("group", "colour", "variety")),
        estimate("variety_more"),
    ]
