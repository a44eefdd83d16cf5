"""What every run has, described once: the tooltip, the command line's help and the docs read it here. What one method
has of its own is described in that method's file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..core.errors import OneStepError
from ..core.licences import told_licenses
from .sizes import size_list as size_list

MOST_STEPS = 64
"""That a recipe can hold."""
LAST = "last"
"""No choice: the result is what a run ends with."""
CHOICES = ("distance", "content")
"""Measures of the watch by which the best student can be chosen; less is better."""


def setting(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A field with its help text, its range and its choices; numbers out of range are refused, never clamped."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none of its own. A method's settings are a frozen dataclass of `setting`
    fields like this one; ``check`` raises OneStepError for what does not fit together."""

    def check(self, run: Settings) -> None:
        """Raises OneStepError where these do not go with the run's other settings."""
        need_steps(run)


def need_steps(run: Settings) -> None:
    """Raises OneStepError for a run without an update."""
    if run.steps == 0:
        raise OneStepError("steps is 0: nothing would be trained; give steps at least 1")


@dataclass(frozen=True)
class Settings:
    """What a run is. Two runs with equal settings, prompts, checkpoint and versions make equal files on one machine, on
    a CPU at one number of threads: a run chooses it as it begins, or is told it by OMP_NUM_THREADS, and keeps it.

    method: its name. own: the method's own settings. Made by `methods.settings_for`, which knows every method.
    """

    method: str
    own: Any

    steps: int = setting(1000, "Student updates, after a warm start where there is one.", 0, 1_000_000)
    student_steps: int = setting(1, "Steps in which the student draws: 1, 2 or 4.", 1, 8)
    sizes: str = setting("512x512", "Picture sizes in pixels, WxH, several with commas; each step draws one.")
    start: float = setting(
        0.0,
        "Share of the model's time at which the student's first step begins: 1 = pure noise; "
        "0 = automatic: lower for one step of a model that divides by a small alpha there; it then learns far faster, "
        "and KSampler (Advanced) draws it.",
        0,
        1,
    )
    rank: int = setting(64, "Rank of the student's adapters; one step wants 64 or more.", 1, 512)
    targets: str = setting("all", "Which layers are adapted.", choices=("all", "attention+mlp", "attention"))
    teacher_steps: int = setting(
        20,
        "Steps of the teacher: its pairs or trajectories, previews, the watch. From 8 on, pictures take three fifths "
        "as many, of second order, which are as near.",
        1,
        1000,
    )
    guidance: float = setting(
        4.0, "Teacher's guidance in pairs and previews, and what guidance-lora learns; 1 = none.", 0, 30
    )
    negative: str = setting("", "Negative text: what guidance steers away from; empty = the empty prompt.")
    seed: int = setting(0, "Seed of everything random in the run.", 0, 2**63 - 1)

    batch: int = setting(4, "Samples for each update.", 1, 4096)
    accumulation: int = setting(1, "Micro-batches that make up a batch; more = less memory, slower.", 1, 4096)
    learning_rate: float = setting(1e-4, "Student's step size.", 0, 1)
    warm_up: int = setting(20, "Updates over which step sizes rise from 0.", 0, 1_000_000)
    final_rate: float = setting(0.1, "Step sizes fall along a cosine to this share of their height.", 0, 1)
    max_grad_norm: float = setting(1.0, "Largest norm of a gradient; 0 = no limit.", 0, 1e9)
    weight_decay: float = setting(0.0, "The optimiser's weight decay.", 0, 1)
    ema: float = setting(
        0.99, "Decay of the student's running mean, which is what the file holds; 0 = none.", 0, 0.999999
    )
    optimizer: str = setting(
        "auto",
        "auto = AdamW, 8 bit where bitsandbytes works on a GPU. muon learns agd's adapters in fewer updates.",
        choices=("auto", "adamw", "adamw8bit", "muon"),
    )
    pairs: int = setting(
        1024,
        "Different teacher pairs, prompts with guided states or controlled pictures kept on disk; then used again.",
        1,
        1_000_000,
    )
    initial_lora: str = setting(
        "",
        "A LoRA that the student starts from, or the few-step student that an adapter is for; empty = the base.",
    )
    checkpointing: bool = setting(
        True,
        "Recompute activations in backward: much less memory, about a third slower. On a card: what it asks for.",
    )
    preview_every: int = setting(100, "Updates between previews; 0 = none.", 0, 1_000_000)
    watch_every: int = setting(50, "Updates between measures of the student; 0 = none.", 0, 1_000_000)
    watch_samples: int = setting(64, "Pictures that each measure compares with the teacher's.", 4, 4096)
    preview_samples: int = setting(6, "Pictures in a preview.", 1, 64)
    save_every: int = setting(0, "Updates between saved states; 0 = every 10 minutes.", 0, 1_000_000)
    patience: int = setting(
        5, "Bad steps (not a number) in a row before the run stops at its last good state.", 1, 1000
    )
    keep_prompts: bool = setting(False, "Write the prompts into the LoRA's header.")
    initial_recipe: str = setting(
        "auto",
        "How the initial LoRA is sampled, which the student keeps: a preset's name; auto = as its file or its name "
        "says; own = in the run's own student_steps.",
    )
    licenses: str = setting(
        "",
        "Licences that the files do not tell, for the result's header: base=NAME; initial_lora=NAME; base_lora=NAME.",
    )
    streaming: str = setting(
        "auto",
        "on = the base lies in the host's memory and is copied to the card block by block, the same to the bit; "
        "auto = where the plan finds that it does not fit otherwise.",
        choices=("auto", "on", "off"),
    )
    candidate_every: int = setting(
        100,
        "Updates between students that are kept in the run's folder, each half as large as the result, for its end, or "
        "onestep choose, to choose from; 0 = none.",
        0,
        1_000_000,
    )
    candidates: int = setting(12, "Most of them; where there are more, every second one goes.", 2, 1000)
    choose_by: str = setting(
        LAST,
        "Which student is the result: the last, or of all that are kept the one with the least of a measure on the "
        "watch's fixed prompts and noise.",
        choices=(LAST, *CHOICES),
    )
    compile_blocks: bool = setting(
        False,
        "Compile the network's blocks with their adapters by torch.compile: minutes before the first updates, fewer "
        "operations from then on. A diffusers pipeline alone; where it fails, the run goes on uncompiled and says so.",
    )
    token_norm: str = setting(
        "host",
        "Whether the teacher's guided velocity has in each token the norm of the prompt's, as diffusers draws "
        "Qwen-Image, or in each row, as it draws Lumina 2, and ComfyUI does not; host = as the host draws the base.",
        choices=("host", "on", "off"),
    )
    noise_range: str = setting(
        "0-1",
        "Noise levels, LOW-HIGH of sigma, that a run learns and draws in, of a base that is one of several experts: of "
        "Wan 2.2's two 0.875-1 of the high-noise one, 0-0.875 of the other; 0-1 = all.",
    )
    combine: int = setting(
        0,
        "Measures that the end of a run spends on a search for a weighted sum of its kept students that is better than "
        "its result, also on prompts and noise that the search has not seen; 30 to 100 are usual, each as long as one "
        "of the watch; 0 = none.",
        0,
        10_000,
    )
    second_order: bool = False
    """Whether the teacher's pictures are drawn in fewer than ``teacher_steps``, of second order (core.sampling.fewer).
    Nobody's choice: a run keeps what it began with."""

    def __post_init__(self) -> None:
        for part in (self, self.own):
            for entry in described(part):
                check_value(entry.name, getattr(part, entry.name), entry.metadata, entry.type)
        if self.batch % self.accumulation:
            fitting = ", ".join(str(count) for count in range(1, self.batch + 1) if self.batch % count == 0)
            raise OneStepError(
                f"accumulation {self.accumulation} must divide batch {self.batch}: set it to one of {fitting:.60}, or "
                "choose another batch"
            )
        self.size_list, self.noise_levels  # noqa: B018  (refuses what is no size, and no range)
        told_licenses(self.licenses)
        self.own.check(self)

    @property
    def size_list(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each size."""
        return size_list(self.sizes)

    @property
    def noise_levels(self) -> tuple[float, float]:
        """(low, high) of the sigmas that the base answers for."""
        try:
            low, high = (float(part) for part in self.noise_range.split("-"))
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low < high <= 1:
            raise OneStepError(
                f"noise_range is {self.noise_range!r:.60}: it must be LOW-HIGH within 0 and 1, like 0.875-1"
            )
        return low, high

    def flat(self) -> dict[str, Any]:
        """Every setting by name, the method's own among them."""
        shared = {entry.name: getattr(self, entry.name) for entry in described(self)}
        return {"method": self.method, **shared, **asdict(self.own)}

    def to_json(self) -> str:
        return json.dumps(self.flat(), indent=1)

    def with_(self, **changes: Any) -> Settings:
        """With other values, the method's own among them. Raises OneStepError for an unknown name."""
        own_names = {entry.name for entry in fields(self.own)}
        own = {name: changes.pop(name) for name in own_names & changes.keys()}
        unknown = sorted(set(changes) - {entry.name for entry in described(self)})
        if unknown:
            raise OneStepError(
                f"{self.method} has no setting {unknown[0]!r:.60}{nearest(unknown[0], [*self.flat()][1:])}"
            )
        return replace(self, own=replace(self.own, **own), **changes)

    def with_texts(self, texts: Mapping[str, str]) -> Settings:
        """With settings given as text, ``{"rank": "32"}``. Raises OneStepError for an unknown one, with the nearest
        name."""
        known = {entry.name: entry for entry in (*described(self), *described(self.own))}
        return self.with_(
            **{name: parsed(name, text, known[name]) if name in known else text for name, text in texts.items()}
        )


def described(settings: Any) -> list[Any]:
    """The fields of a settings dataclass (or of an instance) that a person may set, in order."""
    return [entry for entry in fields(settings) if "help" in entry.metadata]


def nearest(name: str, known: Any) -> str:
    """ ", did you mean X?" for a name that is almost one of ``known``."""
    close = difflib.get_close_matches(name, list(known), 1)
    if close:
        return f"; did you mean {close[0]!r}?"
    names = ", ".join(known)
    return f"; known are {names}" if len(names) < 250 else f"; known are {names[:250].rsplit(', ', 1)[0]} and more"


KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "str": (str, "a text"),
    "bool": (bool, "true or false"),
}


def check_value(name: str, value: Any, meta: Mapping[str, Any], kind: Any) -> None:
    """Raises OneStepError for a value of another kind, out of its range, or none of its choices."""
    wanted, words = KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool") or value != value:
        raise OneStepError(f"{name} is {value!r:.60}: it must be {words}")
    if meta["choices"] and value not in meta["choices"]:
        raise OneStepError(f"{name} is {value!r:.60}{nearest(value, meta['choices'])}")
    if meta["low"] is not None and not meta["low"] <= value <= meta["high"]:
        raise OneStepError(
            f"{name} is {str(value)[:30]}: it must lie in {meta['low']:g} to {meta['high']:g}. {meta['help']}"
        )


def parsed(name: str, text: str, entry: Any) -> Any:
    """The value of a setting given as text. Raises OneStepError where it is none of its kind."""
    parse: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _bool}
    try:
        return parse[entry.type](text)
    except ValueError:
        raise OneStepError(
            f"{name} is {text!r:.60}: it must be {KINDS[entry.type][1]}, like {name}={entry.default}"
        ) from None


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")
