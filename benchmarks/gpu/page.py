"""The markdown of a run, written as far as it has come after each part: whatever ends the run, what was found stays."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from part import Part, Run, Table, release, sentence

LIBRARIES = ("triton", "bitsandbytes", "diffusers", "xformers")


@dataclass
class Page:
    """out: where it is written. wheels: the folder of those that were carried. good: whether every part ran and found
    all right."""

    run: Run
    out: Path
    wheels: Path
    good: bool = True
    pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        on_card = self.run.device.type == "cuda"
        self.pieces = ["# Measured on a GPU" if on_card else "# A rehearsal without a GPU", "", *machine(self.run)]

    @property
    def text(self) -> str:
        return "\n".join(self.pieces) + "\n"

    def add(self, *pieces: str) -> None:
        self.pieces += pieces
        self.out.write_text(self.text, encoding="utf-8")

    def measure(self, parts: Sequence[Part], minutes: float) -> None:
        """All of ``parts``, each in its share of ``minutes``. One that fails takes no other with it."""
        until = time.monotonic()
        share = 60 * minutes / sum(part.seconds for part in parts)
        for index, part in enumerate(parts):
            until += share * part.seconds
            self._part(part, self.run._replace(until=until))
            rest = parts[index + 1 :]
            if rest and dead(self.run.device):
                self._elsewhere(rest, minutes - share * sum(p.seconds for p in parts[: index + 1]) / 60)
                return

    def _part(self, part: Part, run: Run) -> None:
        self.add("", f"## {part.title}", "")
        if run.left < 0:
            self.good = False
            self.add("Not run: no time was left.")
            return
        began = time.monotonic()
        try:
            table = part.measure(run)
        except Exception as trouble:  # the other parts are worth their numbers
            traceback.print_exc()
            table = Table(("failed",), [(sentence(trouble),)], False)
        self.good &= table.good
        self.add(table.markdown(), "", f"{time.monotonic() - began:.0f} s.")
        release()

    def _elsewhere(self, parts: Sequence[Part], minutes: float) -> None:
        """The parts left in a process of their own: a kernel that went out of its memory has ended this one's use of
        the card."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "rest.md")
            words = ["--out", str(out), "--minutes", str(minutes), "--wheels", str(self.wheels)]
            words += ["--only", *(part.name for part in parts)]
            words += ["--tiny"] if self.run.tiny else []
            done = subprocess.run([sys.executable, str(Path(__file__).with_name("run.py")), *words], check=False)
            self.good = False
            found = out.read_text(encoding="utf-8").partition("\n## ")[2] if out.is_file() else ""
        told = "The card was lost in that part; the parts below ran in a process of their own."
        self.add("", told, "", f"## {found}" if found else f"They ended with {done.returncode}.")

    @contextmanager
    def at_most(self, minutes: float) -> Iterator[None]:
        """Within, the process ends after so long, whatever it is in."""
        timer = threading.Timer(60 * minutes, self._cut_off)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _cut_off(self) -> None:
        self.add("Cut off: the time was over.")
        print(self.text, flush=True)
        os._exit(1)


def dead(device: torch.device) -> bool:
    """Whether the card serves this process no more."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def machine(run: Run) -> list[str]:
    """Card and versions."""
    lines = [f"- Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"]
    for name in LIBRARIES:
        try:
            lines.append(f"- {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"- {name} is not installed")
    if run.device.type == "cuda":
        card = torch.cuda.get_device_properties(run.device)
        size, capability = card.total_memory / 2**30, f"{card.major}.{card.minor}"
        lines.append(f"- {card.name}, {size:.1f} GiB, compute capability {capability}, CUDA {torch.version.cuda}")
    return lines
