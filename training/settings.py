"""Every setting of a distillation, described once: the tooltip, the command line's help and the docs read it here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..core.errors import OneStepError

MATCHING = ("dmd", "vsd")
"""The methods with a critic, and with a warm start before it."""
GUIDING = ("agd", "guidance-lora")
"""The methods that put the teacher's guidance into one forward."""
METHODS = (*MATCHING, "regression", *GUIDING, "nct", "sun")
COPY = "copy"
"""The form of a control adapter that is a ControlNet."""
MOST_STEPS = 64
"""That a recipe can hold."""


def setting(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A field with its help text, its range and its choices; numbers out of range are refused, never clamped."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What a run is. Two runs with equal settings, prompts, checkpoint and versions make equal files on one machine.

    A new setting comes last: saved graphs know the node's widgets by their order.
    """

    method: str = setting("dmd", "How the student learns.", choices=METHODS)
    steps: int = setting(1000, "Student updates after the warm start.", 0, 1_000_000)
    student_steps: int = setting(1, "Steps in which the student draws: 1, 2 or 4.", 1, 8)
    start: float = setting(
        0.0,
        "Share of the model's time that the student's first step is told: 1 = pure noise, which KSampler reproduces; "
        "0 = automatic: lower for one step of a model that divides by a small alpha there; it then learns far faster.",
        0,
        1,
    )
    rank: int = setting(64, "Rank of the student's adapters; one step wants 64 or more.", 1, 512)
    critic_rank: int = setting(0, "Rank of the critic's adapters; 0 = the student's.", 0, 512)
    targets: str = setting("all", "Which layers are adapted.", choices=("all", "attention+mlp", "attention"))
    sizes: str = setting("512x512", "Picture sizes in pixels, WxH, several with commas; each step draws one.")
    teacher_steps: int = setting(
        20, "Steps of the teacher's pictures: pairs of the warm start, previews, the watch.", 1, 1000
    )
    guidance: float = setting(
        4.0, "Teacher's guidance in pairs and previews, and what guidance-lora learns; 1 = none.", 0, 30
    )
    matching_guidance: float = setting(1.75, "Teacher's guidance in the guidance term of dmd and vsd; 1 = none.", 0, 30)
    negative: str = setting("", "Negative text: what guidance steers away from; empty = the empty prompt.")
    seed: int = setting(0, "Seed of everything random in the run.", 0, 2**63 - 1)

    batch: int = setting(4, "Samples for each update.", 1, 4096)
    accumulation: int = setting(1, "Micro-batches that make up a batch; more = less memory, slower.", 1, 4096)
    learning_rate: float = setting(1e-4, "Student's step size.", 0, 1)
    critic_learning_rate: float = setting(4e-4, "Critic's step size; 2 to 4 times the student's.", 0, 1)
    warm_up: int = setting(20, "Updates over which step sizes rise from 0.", 0, 1_000_000)
    final_rate: float = setting(0.1, "Step sizes fall along a cosine to this share of their height.", 0, 1)
    clip: float = setting(1.0, "Largest norm of a gradient; 0 = no limit.", 0, 1e9)
    weight_decay: float = setting(0.0, "The optimiser's weight decay.", 0, 1)
    ema: float = setting(
        0.99, "Decay of the student's running mean, which is what the file holds; 0 = none.", 0, 0.999999
    )
    optimizer: str = setting(
        "auto",
        "auto = AdamW, 8 bit where bitsandbytes works on a GPU. muon learns agd's adapters in fewer updates.",
        choices=("auto", "adamw", "adamw8bit", "muon"),
    )

    warm_start: int = setting(
        300, "Updates of regression on the teacher's pairs before dmd or vsd; 0 = none.", 0, 1_000_000
    )
    warm_start_rate: float = setting(5e-4, "Student's step size in regression.", 0, 1)
    pairs: int = setting(
        1024,
        "Different teacher pairs, prompts with guided states or controlled pictures kept on disk; then used again.",
        1,
        1_000_000,
    )
    critic_warm_up: int = setting(50, "Updates of the critic alone, before the student follows it.", 0, 1_000_000)
    critic_updates: int = setting(3, "Updates of the critic for each of the student's.", 1, 100)
    follow: float = setting(0.0, "After each update the critic moves this share towards the student (IDA).", 0, 1)
    matching_weight: float = setting(
        1.0, "Weight of the matching term; the guidance term has weight guidance - 1.", 0, 100
    )
    anchor: float = setting(
        0.25, "Weight of regression on the teacher's pairs beside dmd or vsd; keeps composition.", 0, 100
    )
    separate_levels: bool = setting(False, "Draw the guidance term's noise level apart from the matching term's.")
    level_low: float = setting(0.02, "Least noise level, as a share of the model's time.", 0, 1)
    level_high: float = setting(0.98, "Greatest noise level, as a share of the model's time.", 0, 1)

    initial_lora: str = setting(
        "",
        "A LoRA that the student starts from, or nct's generator, or what sun acts on; empty = the base, which nct "
        "takes for a model of one step.",
    )
    checkpointing: bool = setting(True, "Recompute activations in backward: much less memory, about a third slower.")
    preview_every: int = setting(100, "Updates between previews; 0 = none.", 0, 1_000_000)
    watch_every: int = setting(50, "Updates between measures of the student; 0 = none.", 0, 1_000_000)
    watch_samples: int = setting(64, "Pictures that each measure compares with the teacher's.", 4, 4096)
    preview_samples: int = setting(6, "Pictures in a preview.", 1, 64)
    save_every: int = setting(100, "Updates between saved states; also every 60 seconds.", 1, 1_000_000)
    patience: int = setting(
        5, "Bad steps (not a number) in a row before the run stops at its last good state.", 1, 1000
    )
    keep_prompts: bool = setting(False, "Write the prompts into the LoRA's header.")
    guidance_low: float = setting(
        0.0,
        "Least guidance that agd and guidance-lora learn; 0 = automatic: 1 for agd, else the guidance itself.",
        0,
        30,
    )
    guidance_high: float = setting(
        0.0, "Greatest guidance that they learn; 0 = automatic: 12 for agd, else the guidance itself.", 0, 30
    )
    states: int = setting(
        4,
        "States of guided trajectories that agd and guidance-lora keep for each prompt drawn; from teacher_steps on, "
        "none of the teacher's answers is thrown away.",
        1,
        256,
    )
    control: str = setting("canny", "What nct controls by: canny, soft-edges, depth, low-resolution or mask.")
    control_width: int = setting(
        0, "Channels of nct's adapter on its finest grid; 0 = those of the model's first layer, at most 320.", 0, 4096
    )
    noise_levels: int = setting(
        4,
        "How fine nct becomes by a run's end: noises asked for the same are 1 / this apart; it begins with 1.",
        1,
        4096,
    )
    boundary: float = setting(
        0.1, "Share of nct's samples that are asked for their own picture at their own noise.", 0, 1
    )
    control_form: str = setting(
        "light",
        "nct's adapter: light = a small encoder of its own; copy = a ControlNet, U-Nets only: larger and slower.",
        choices=("light", COPY),
    )
    negatives: str = setting(
        "", "What sun learns to keep away from, parted by commas; empty = the parts of the prompts, parted so too."
    )
    push: float = setting(2.5, "How hard sun's teacher keeps away from a negative, in units of guidance.", 0.01, 30)
    segment_steps: int = setting(2, "Steps of sun's teacher for one of the student's.", 1, 64)

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), entry.metadata, entry.type)
        if self.level_low >= self.level_high:
            raise OneStepError(f"level_low {self.level_low} must be below level_high {self.level_high}")
        if self.batch % self.accumulation:
            raise OneStepError(f"accumulation {self.accumulation} must divide batch {self.batch}")
        if self.follow and self.critic_rank not in (0, self.rank):
            raise OneStepError(
                f"follow {self.follow} needs a critic of the student's rank {self.rank}, not {self.critic_rank}: "
                "set critic_rank to 0"
            )
        low, high = self.scales
        if self.method in GUIDING and low > high:
            raise OneStepError(f"guidance_low {low:g} must not be above guidance_high {high:g}")
        if self.method in GUIDING and self.teacher_steps > MOST_STEPS:
            raise OneStepError(
                f"{self.method} walks trajectories of {self.teacher_steps} steps: set teacher_steps to at most "
                f"{MOST_STEPS}; 20 to 50 do well"
            )
        if self.steps + self.first_steps == 0:
            raise OneStepError("steps and warm_start are both 0: nothing would be trained; give steps at least 1")
        self.size_list  # noqa: B018  (refuses what is no size)

    @property
    def first_steps(self) -> int:
        """Student updates of the warm start."""
        return self.warm_start if self.method in MATCHING else 0

    @property
    def scales(self) -> tuple[float, float]:
        """Least and greatest guidance of the trajectories that agd and guidance-lora learn from."""
        low, high = (1.0, 12.0) if self.method == "agd" else (self.guidance, self.guidance)
        return self.guidance_low or low, self.guidance_high or high

    @property
    def size_list(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each size."""
        return tuple(_size(text) for text in self.sizes.split(","))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def with_texts(self, texts: Mapping[str, str]) -> Settings:
        """With settings given as text, ``{"rank": "32"}``. Raises OneStepError for an unknown one, with the nearest
        name."""
        kinds = {entry.name: entry.type for entry in fields(self)}
        return replace(self, **{name: _parsed(name, text, kinds) for name, text in texts.items()})


# The presets are changes to the defaults: Fast is the warm start alone, Best matches for longer with a surer critic.
PRESETS: dict[str, dict[str, Any]] = {
    "Fast": {"method": "regression", "steps": 600, "learning_rate": 5e-4},
    "Balanced": {"method": "dmd", "steps": 600, "warm_start": 600},
    "Best": {"method": "dmd", "steps": 3000, "warm_start": 1000, "critic_updates": 5, "pairs": 4096},
}


def preset(name: str, **changes: Any) -> Settings:
    """The settings of a preset, with changes. Raises OneStepError for an unknown name."""
    if name not in PRESETS:
        raise OneStepError(f"no preset {name!r:.60}: the presets are {', '.join(PRESETS)}")
    return Settings(**{**PRESETS[name], **changes})


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


def _check(name: str, value: Any, meta: Mapping[str, Any], kind: Any) -> None:
    wanted, words = KINDS[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool") or value != value:
        raise OneStepError(f"{name} is {value!r:.60}: it must be {words}")
    if meta["choices"] and value not in meta["choices"]:
        raise OneStepError(f"{name} is {value!r:.60}{nearest(value, meta['choices'])}")
    if meta["low"] is not None and not meta["low"] <= value <= meta["high"]:
        raise OneStepError(
            f"{name} is {str(value)[:30]}: it must lie in {meta['low']:g} to {meta['high']:g}. {meta['help']}"
        )


def _parsed(name: str, text: str, kinds: Mapping[str, Any]) -> Any:
    if name not in kinds:
        raise OneStepError(f"no setting {name!r:.60}{nearest(name, kinds)}")
    parse: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _bool}
    try:
        return parse[kinds[name]](text)
    except ValueError:
        raise OneStepError(
            f"{name} is {text!r:.60}: it must be {KINDS[kinds[name]][1]}, like {name}={getattr(Settings, name)}"
        ) from None


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "1", "yes")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise OneStepError(
            f"size {text.strip()!r:.60} is not WIDTHxHEIGHT: write it like 512x512 or 512x512,640x448"
        ) from None
    if width % 8 or height % 8 or not 8 <= width <= 8192 or not 8 <= height <= 8192:
        raise OneStepError(
            f"size {text.strip()[:60]}: width and height must be multiples of 8 between 8 and 8192 pixels"
        )
    return width, height
