"""Public few-step files by their names, as their authors gave them and as people rename them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .checks import MOST_STEPS
from .presets import PRESETS


def word(text: str) -> str:
    """A regex for ``text`` with no letter on either side."""
    return rf"(?<![a-z])(?:{text})(?![a-z])"


LIGHTNING, LIGHTX2V, TURBO, SCHNELL = word("lightning"), r"light-?x2-?v", word("turbo"), word("schnell")
HYPER = r"(?<![a-z])hyper(?=sd|xl|flux|[-\d]|$)(?!-(?:real|detail|fine|focus|active))"
PCM, TCD, DMD2, TDM, KLEIN = word("p[cd]m"), word("tcd"), r"(?<![a-z])dmd-?2", word("tdm"), word("klein")
LCM = r"(?<![a-z])(?<!animate-)lcm(?![a-z])(?!-like)"
CAUSVID = r"caus-?vid"
NITRO, SDXS, FLASH = r"nitro-?(?:sd|fusion)", word("sdxs"), r"(?<![a-z])flash-?sd(?:-?xl)?(?![a-z0-9])"
CFG, FLUX, SD3, UNET = r"cfg(?![a-z])", "flux", r"sd-?3(?!\d)", "unet"
SD, WAN, QWEN, VIDEO = r"(?<![a-z])s?sd|xl(?![a-z])|lora", word("wan(?:video)?"), "qwen", word("[ti]2-?v|wan(?:video)?")

NEVER = re.compile(
    r"(?<![a-z])(?:de|un|non|anti)-?(?:distil|turbo|lightning|schnell)|training-adapter|control-?net|ip-?adapter|openflux|"
    r"(?<![a-z])hy(?:uan)?-?\d|hunyuan"
)
"""What gives away a file that is no few-step model, whatever else its name holds."""
STEPS = re.compile(r"(?<![\d.])(?P<n>\d{1,2})-?steps?(?![a-z])|(?<![a-z\d.])(?P<short>\d{1,2})-?(?:nfe|s)(?![a-z\d])")
RANGE = re.compile(r"(?<![A-Za-z\d.])(?P<low>\d{1,2}) ?(?:-|~|to) ?(?P<high>\d{1,2})(?=[ _-]?steps?)", re.IGNORECASE)
LORA, MODEL, EITHER = "lora", "model", "either"


@dataclass(frozen=True)
class Rule:
    """presets: what a name that holds all of ``words`` stands for, {n} its number of steps, several where it does not
    decide; steps: that number, where a name has none. what: a LoRA's name, a whole model's, or either."""

    presets: tuple[str, ...]
    words: tuple[str, ...]
    what: str = EITHER
    steps: int | None = None
    never: str | None = None

    def fits(self, name: str) -> bool:
        """Whether a normal ``name`` holds its words."""
        return all(re.search(word, name) for word in self.words) and not (self.never and re.search(self.never, name))

    def found(self, steps: tuple[int, ...]) -> tuple[str, ...]:
        """The presets of so many ``steps`` that are known."""
        every = (text.format(n=n) for text in self.presets for n in steps or (self.steps,))
        return tuple(preset for preset in dict.fromkeys(every) if preset in PRESETS)


RULES = (
    Rule(("sdxl-lightning-{n}",), (LIGHTNING,)),
    Rule(("qwen-image-lightning-{n}",), (LIGHTNING, QWEN)),
    Rule(("wan2.2-lightx2v-{n}",), (LIGHTNING, WAN), steps=4),
    Rule(("wan2.1-lightx2v-{n}",), (LIGHTX2V, VIDEO), steps=4),
    Rule(("wan2.2-lightx2v-{n}",), (LIGHTX2V, VIDEO, r"wan-?2[.-]?2"), steps=4),
    *(
        Rule((f"wan2.2-lightx2v-{half}-2",), (*words, rf"(?<![a-z]){half}(?:-?noise|(?![a-z]))"))
        for half in ("high", "low")
        for words in ((LIGHTNING, WAN), (LIGHTX2V, VIDEO), (LIGHTX2V, VIDEO, r"wan-?2[.-]?2"))
    ),
    Rule(("fastwan-3",), (r"fast-?wan",)),
    Rule(("causvid-3",), (CAUSVID, "bidirect")),
    Rule(("causvid-9",), (CAUSVID, r"14-?b(?![a-z])"), never="i-?2-?v"),
    Rule(("hyper-sd-{n}-lora",), (HYPER,)),
    Rule(("hyper-sd-{n}-cfg",), (HYPER, CFG)),
    Rule(("hyper-sdxl-1-unet",), (HYPER, UNET)),
    Rule(("hyper-flux-{n}",), (HYPER, FLUX)),
    Rule(("hyper-sd3-{n}-cfg",), (HYPER, SD3)),
    Rule(("hyper-sd3-{n}-cfg",), (HYPER, SD3, CFG)),
    Rule(("pcm-{n}", "pcm-{n}-cfg"), (PCM, SD)),
    Rule(("pcm-{n}",), (PCM, SD, r"small-?cfg")),
    Rule(("pcm-{n}-cfg",), (PCM, SD, r"normal-?cfg")),
    Rule(("pcm-lcm-4",), (PCM, SD, r"lcm-?like")),
    Rule(("pcm-sd3-{n}",), (PCM, "deterministic")),
    Rule(("pcm-sd3-{n}-shift1",), (PCM, "deterministic", r"shift-?1(?!\d)")),
    Rule(("pcm-sd3-4-stochastic",), (PCM, "stochastic")),
    Rule(("lcm-4",), (LCM, SD)),
    Rule(("tcd-4",), (TCD, SD)),
    Rule(("sdxl-turbo-1",), (r"(?<![a-z])sd-?xl-?turbo(?![a-z])",), MODEL),
    Rule(("sdxl-turbo-1",), (r"^sd-?xl-?turbo(?![a-z])",), LORA),
    Rule(("sd-turbo-1",), (r"(?<![a-z])sd-?turbo(?![a-z])",), MODEL),
    Rule(("sd-turbo-1",), (r"^sd-?turbo(?![a-z])",), LORA),
    Rule(("sd3.5-turbo-4",), (r"(?:sd|diffusion)-?3\.?5", "large", TURBO), MODEL),
    Rule(("flux-turbo-alpha-8",), (FLUX, r"turbo-?alpha|alimama"), never="inpaint"),
    Rule(("flux-schnell-4",), (FLUX, SCHNELL), MODEL),
    Rule(("z-image-turbo-{n}",), (r"z-?image", TURBO), MODEL, steps=8),
    Rule(("anima-turbo-{n}",), (word("anima"), TURBO), steps=8),
    Rule(("krea2-turbo-{n}",), (r"krea-?2", TURBO), MODEL, steps=8),
    Rule(("flux2-klein-4",), (KLEIN, r"flux|klein-?\d"), MODEL, never="base"),
    Rule(("dmd2-{n}",), (DMD2,), steps=4),
    Rule(("flash-4",), (FLASH,)),
    Rule(("nitrosd-realism-{n}",), (NITRO, "reali"), steps=1),
    Rule(("nitrosd-vibrant-{n}",), (NITRO, "vibrant"), steps=1),
    Rule(("sdxs-1",), (SDXS,), MODEL),
    Rule(("tdm-sd15-4",), (TDM, "dream-?shaper|sd-?1")),
    Rule(("tdm-sd3-4",), (TDM, r"sd-?3(?![\d.]|-5)")),
)


def presets_by_name(file: str, what: str = EITHER) -> tuple[str, ...]:
    """What a file of this name is: one of `PRESETS`; several where the name does not decide; () where it says nothing.

    Of two rules that match, one that asks for more words than the other, and for all of the other's, is the answer. A
    kind of which no number of steps is told says nothing alone; beside another kind it leaves both possible.
    """
    name = normal(file)
    if NEVER.search(name):
        return ()
    steps = steps_in(name)
    fitting = [rule for rule in RULES if (what == EITHER or rule.what in (EITHER, what)) and rule.fits(name)]
    found = {rule: rule.found(steps) for rule in fitting if rule.found(steps) or not steps}
    last = [rule for rule in found if not any(set(rule.words) < set(other.words) for other in found)]
    if not any(found[rule] for rule in last):
        return ()
    every = (preset for rule in last for preset in found[rule] or rule.found(tuple(range(1, MOST_STEPS + 1))))
    return tuple(dict.fromkeys(every))


def preset_by_name(file: str) -> str | None:
    """The preset of a file like "sdxl_lightning_4step_lora.safetensors"; None where its name does not decide."""
    found = presets_by_name(file)
    return found[0] if len(found) == 1 else None


def normal(file: str) -> str:
    """A file's name in small letters, its words apart: "HyperSDXL_8StepsLoRA" is "hyper-sdxl-8-steps-lora"."""
    name = re.sub(r"\.(?:safetensors|sft|ckpt|pt|bin|gguf)$", "", Path(file).name, flags=re.IGNORECASE)
    name = RANGE.sub(_apart, name)
    name = name.replace("LoRA", "-Lora-").replace("LoRa", "-Lora-").replace("ComfyUI", "-Comfyui-")
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=\d)(?=[A-Z][a-z])", "-", name)
    return re.sub(r"[^a-z\d.]+", "-", name.lower()).strip("-")


def _apart(match: re.Match[str]) -> str:
    """ "4-8" of "4-8 steps" as "4steps-8"; "1-5-4 steps" is no range."""
    low, high = match["low"], match["high"]
    return f"{low}steps-{high}" if int(low) < int(high) else match[0]


def steps_in(name: str) -> tuple[int, ...]:
    """The numbers of steps that a normal name tells: "4-8steps" two."""
    found = [number for match in STEPS.finditer(name) for number in match.groups() if number]
    return tuple(dict.fromkeys(map(int, found)))
