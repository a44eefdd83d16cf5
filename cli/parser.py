"""The words of the command line. Settings are described where they are defined: their help is read from there."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import OneStepError
from ..training import presets
from ..training.settings import CHOICES, Settings, described
from .settings_help import settings_help

MODEL = "`tiny`, `tiny-flow`, `tiny-dit`, a diffusers folder, or a .safetensors file of SD1.5, SD2 or SDXL"
DEBUG = "show the whole trace of an error"
RESTART = "delete the run in RUN and start anew"
DEFAULT = "(default: %(default)s)"
PRESET = (
    f"the outcome you want: {', '.join(presets.PRESETS)} (default: {presets.DEFAULT}; with a --method alone, what that "
    "has by itself). See: onestep methods"
)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name, instead of printing its usage and leaving."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise OneStepError(f"{message[:250]}. See: {self.prog} --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command and its options. Raises OneStepError for words that make no sense, SystemExit after --help."""
    parser, commands = _parser()
    if not words:
        parser.print_help(sys.stdout)
        raise SystemExit(0)
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in commands:
        raise OneStepError(f"no command {first[:60]!r}{_nearest(first, commands)} See: onestep --help")
    for word in words:
        _check_option(word.split("=")[0], commands[first] if first is not None else parser)
    return parser.parse_args(words)


def _check_option(word: str, parser: Parser) -> None:
    """argparse would first complain of what is missing, which a mistyped option is the reason of."""
    known = [option for action in parser._actions for option in action.option_strings]
    if word.startswith("--") and word not in known:
        raise OneStepError(f"{parser.prog} has no {word[:60]}{_nearest(word, known)} See: {parser.prog} --help")


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="onestep", description="Make a diffusion checkpoint draw in one step.")
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (help, fill) in COMMANDS.items():
        made = commands.add_parser(name, help=help)
        fill(made)
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
    return parser, dict(commands.choices)


def _distill(made: Parser) -> None:
    made.description = "Distil MODEL on prompts into RUN/result.safetensors. Ctrl-C saves the run; --resume goes on."
    _help_with_settings(made)
    add = made.add_argument
    _model(made)
    add("--prompts", required=True, metavar="FILE", help="a text file, one prompt a line; empty lines are skipped")
    add("--method", metavar="NAME", help="how the student learns; see: onestep methods")
    add("--steps", metavar="N", help=_help("steps"))
    add("--size", metavar="WxH", help="in pixels, several with commas (default: the model's own)")
    add("--seed", metavar="N", help=_help("seed"))
    add("--out", required=True, metavar="RUN", help="folder of the run")
    add("--preset", metavar="NAME", help=PRESET)
    whole = "the same base unquantised, where MODEL is stored in fp8 or less: the LoRA is checked against it at the end"
    add("--whole", metavar="MODEL", help=whole)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting below; may be repeated")
    existing = made.add_mutually_exclusive_group()
    resume = "go on with the run in RUN, also with more --steps than it had; start it where there is none"
    existing.add_argument("--resume", action="store_true", help=resume)
    existing.add_argument("--restart", action="store_true", help=RESTART)
    _device(made)
    _json(made)


def _plan(made: Parser) -> None:
    made.description = (
        "What a run of MODEL needs of a card, counted on any machine from its configuration alone, and how it can be "
        "made to fit. A run goes down to smaller micro-batches by itself; what would change its result is proposed."
    )
    add = made.add_argument
    layouts = (
        "`sd15`, `sd2`, `sdxl`, `sd35-medium`, `flux-dev`, `z-image`, `klein-4b`, `klein-9b`, `anima`, `qwen-image`, "
        "`lumina2`, `pixart-sigma`, `chroma`, `krea-2`, `wan-1.3b`, `wan-14b`, `wan-5b`"
    )
    add("model", metavar="MODEL", help=f"{layouts}, or a model as for distill")
    add("--card", metavar="CARD", help="a size, like 12GB, or a name, like 'RTX 3060' (default: the card found)")
    add("--method", metavar="NAME", help="how the student learns; see: onestep methods")
    add("--size", metavar="WxH", help="in pixels (default: the model's own)")
    add("--preset", metavar="NAME", help=PRESET)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of a run; may be repeated")
    made.set_defaults(steps=None, seed=None)
    _json(made)


def _generate(made: Parser) -> None:
    made.description = (
        "Draw a picture for each prompt: with a LoRA by its recipe, without in the model's own many steps."
        " The noise of picture i is that of ComfyUI's KSampler and of diffusers at seed + i."
    )
    add = made.add_argument
    _model(made)
    add("--lora", metavar="FILE", help="a .safetensors LoRA")
    add("--recipe", metavar="PRESET", help="how to sample a LoRA that does not say so itself, e.g. lcm-4")
    quoted = "what to draw, quoted; several give several pictures"
    add("--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help=quoted)
    add("--out", required=True, metavar="FILE.png", help="the picture; several side by side in one file")
    add("--seed", type=int, default=0, help=f"seed of the first picture's noise {DEFAULT}")
    add("--steps", type=int, metavar="N", help="steps (default: the recipe's, or 25 without a LoRA)")
    guidance = f"guidance scale (default: the recipe's, or {Settings.guidance:g})"
    add("--guidance", type=float, metavar="K", help=guidance)
    add("--negative", default="", metavar="TEXT", help="what guidance steers away from")
    add("--size", metavar="WxH", help="in pixels (default: the recipe's, or the model's own)")
    _device(made)
    _json(made)


def _evaluate(made: Parser) -> None:
    made.description = (
        "Compare pictures in equal numbers: the teacher's in 25 steps, in 1 step, with another seed (the"
        " floor of every distance), and each LoRA's by its recipe. The bundled models have a judge; others get"
        " the measures that need none."
    )
    add = made.add_argument
    _model(made)
    add("--lora", action="append", default=[], metavar="FILE", help="a .safetensors LoRA; may be repeated")
    add("--prompts", required=True, metavar="FILE", help="a text file, one prompt a line")
    add("--samples", type=int, default=256, metavar="N", help=f"pictures a row {DEFAULT}")
    add("--reference", metavar="FILE.npz", help="real pictures: `image` [N, H, W, 3], 0..255")
    guidance = "the teacher's (default: what the first LoRA was trained at)"
    add("--guidance", type=float, metavar="K", help=guidance)
    add("--teacher-steps", type=int, default=25, metavar="N", help=DEFAULT)
    add("--judge", metavar="FOLDER", help="a judge of your own (default: the bundled models')")
    add("--size", metavar="WxH", help="in pixels (default: the LoRA's, or the model's own)")
    add("--seed", type=int, default=0, help=DEFAULT)
    add("--json", metavar="FILE", help="write the table there too; - writes it to standard output, alone")
    _device(made)


def _extract(made: Parser) -> None:
    made.description = (
        "Write what makes a few-step checkpoint differ from its base as a LoRA, which draws in few steps on the base"
        " and its fine-tunes, and say how much of the difference it keeps. With prompts each layer keeps what matters"
        " to its outputs on them, rather than to its weights."
    )
    add = made.add_argument
    _model(made)
    add("few_step", metavar="FEW_STEP_MODEL", help="the same base's few-step checkpoint: a folder or a single file")
    add("--out", required=True, metavar="FILE.safetensors", help="the LoRA")
    add("--rank", type=int, default=64, metavar="N", help=f"of the LoRA {DEFAULT}")
    add("--recipe", metavar="PRESET", help="how the few-step model is sampled, e.g. dmd2-4: goes into the file")
    add("--prompts", metavar="FILE", help="a text file, one prompt a line; the first 8 are drawn, by --recipe")
    add("--size", metavar="WxH", help="in pixels (default: the recipe's, or the model's own)")
    add(
        "--licenses",
        default="",
        metavar="TEXT",
        help="licences that the files do not tell, for the header: base=NAME; few_step_model=NAME",
    )
    _device(made)
    _json(made)


def _inspect(made: Parser) -> None:
    made.add_argument("file", metavar="FILE.safetensors")
    _json(made)


def _choose(made: Parser) -> None:
    made.description = (
        "Rank the students that the run in RUN has kept, draw them side by side (RUN/choice.png), and make the best the"
        " result. The run itself stays as it is, finished or not, and may go on."
    )
    add = made.add_argument
    add("run", metavar="RUN", help="the folder of a run")
    by = f"of {', '.join(CHOICES)}, on the watch's fixed prompts and noise; less is better {DEFAULT}"
    add("--by", default=CHOICES[0], choices=CHOICES, metavar="MEASURE", help=by)
    _as_made(made)


def _combine(made: Parser) -> None:
    made.description = (
        "Search for a weighted sum of the students that the run in RUN has kept that is better than its result, by its"
        " own measure (choose_by, distance where that is last). It becomes the result only where it is better on other"
        " prompts and noise too, which the search has not seen. A search that was cut goes on where it was."
    )
    add = made.add_argument
    add("run", metavar="RUN", help="the folder of a run, finished or stopped")
    add("--evaluations", type=int, default=40, metavar="N", help=f"sums to be measured {DEFAULT}")
    _as_made(made)


def _as_made(made: Parser) -> None:
    made.add_argument(
        "--model", metavar="MODEL", help="the checkpoint that it was made with (default: as the run says)"
    )
    made.add_argument("--prompts", metavar="FILE", help="the prompts that it was made with (default: as the run says)")
    _device(made)
    _json(made)


def _report(made: Parser) -> None:
    made.description = (
        "One picture of a run to share: card, versions, settings, seconds an update, the curve, the last preview."
        " No prompt, no name of a file and no path is in it, but the preview shows what the run drew."
    )
    made.add_argument("run", metavar="RUN", help="the folder of a run, finished or not")
    made.add_argument("--out", metavar="FILE.png", help="(default: report.png in the run's folder)")
    _json(made)


def _methods(made: Parser) -> None:
    made.add_argument("--markdown", action="store_true", help="a page with every setting, as docs/methods.md")
    _json(made)


def _demo(made: Parser) -> None:
    made.description = "Distil `tiny` to one step from nothing and show it beside its teacher: comparison.png, a table."
    add = made.add_argument
    add("--out", metavar="RUN", default="runs/demo", help=f"folder of the run {DEFAULT}")
    add("--steps", type=int, metavar="N", help="updates of each phase, to have it shorter")
    add("--samples", type=int, default=128, metavar="N", help=f"pictures a row of the table {DEFAULT}")
    add("--restart", action="store_true", help=RESTART)
    _json(made)


def _model(made: Parser) -> None:
    made.add_argument("model", metavar="MODEL", help=MODEL)


def _device(made: Parser) -> None:
    made.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")


def _json(made: Parser) -> None:
    made.add_argument("--json", action="store_true", help="JSON alone on standard output")


COMMANDS: dict[str, tuple[str, Callable[[Parser], None]]] = {
    "distill": ("learn a one-step LoRA from a checkpoint and prompts", _distill),
    "choose": ("make the best of the students that a run has kept its result", _choose),
    "combine": ("make a weighted sum of the students that a run has kept its result, where it is better", _combine),
    "plan": ("say what a run needs of a card before it starts", _plan),
    "generate": ("draw pictures, with or without a LoRA", _generate),
    "evaluate": ("measure LoRAs against the checkpoint they came from", _evaluate),
    "extract": ("a few-step checkpoint as a LoRA of its base", _extract),
    "methods": ("list the methods of distillation", _methods),
    "inspect": ("what a LoRA file holds, and how to sample it in ComfyUI and diffusers", _inspect),
    "report": ("one picture of a run to share, with its figures", _report),
    "doctor": ("what is installed here, what works, and why something does not", _json),
    "demo": ("distil the bundled tiny model to one step, on any machine, in minutes", _demo),
}
"""name: (what it is for, what adds its options to its parser)"""


def _help(name: str) -> str:
    return next(str(entry.metadata["help"]) for entry in described(Settings) if entry.name == name)


def _help_with_settings(made: Parser) -> None:
    """The settings stand at the end of the help; looked up when that is asked for, as the methods need torch."""
    plain = made.format_help

    def format_help() -> str:
        made.epilog = settings_help()
        return plain()

    made.format_help = format_help  # type: ignore[method-assign]


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f": did you mean {close[0]}?" if close else f": there are {', '.join(known)}."


def existing_parent(path: Path) -> None:
    """Raises OneStepError where a file cannot be put at ``path``: found before any work is done for it."""
    if not path.parent.is_dir():
        raise OneStepError(
            f"there is no folder {str(path.parent)[-150:]} for {path.name[:100]}: make it, or choose another place"
        )
    if path.is_dir():
        raise OneStepError(f"{str(path)[-150:]} is a folder: give the name of a file in it")
