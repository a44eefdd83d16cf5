"""`Negative Steering`: a negative prompt without CFG, in one forward of the picture."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.guidance import DEFAULTS, LAYERS, MODES, Steering
from .steer_networks import MODELS, check_layers, network_of, served
from .steer_run import KEY, NegativeSteering
from .steer_text import own_tokens

MODES_TOLD = (
    "NASA subtracts what the picture finds in the negative. NAG pushes away from it and limits the change. VSF lets it "
    "answer with its sign flipped. PERP is NAG with a weight of the negative's own that can spare the prompt: it needs "
    "the empty text."
)
NEGATIVE_TOLD = (
    "What to keep away from, by the model's own text encoder. VSF needs CLIP Text Encode (Negative), which tells the "
    "text from padding."
)
TAU_TOLD = "NAG, PERP: a token may grow to tau times its length."
ALPHA_TOLD = "NAG, PERP: how much of the pushed attention is taken."
LAYERS_TOLD = (
    "U-Nets: decoder leaves the blocks that take the picture in unsteered. Pictures keep their quality better; at the "
    "same scale a word is kept away a little less."
)
KEEP_TOLD = (
    "PERP alone: how far the negative spares what it shares with the prompt. 0 for what rivals the prompt, as another "
    "subject; 2 to 3 for what any picture can have, as dark."
)


def usual(name: str, *modes: str) -> str:
    """What a number is by default, in words: for each mode, its value, and where that differs, each family's."""
    return "; ".join(f"{mode.upper()} {_by_family(name, mode)}" for mode in modes)


def _short(family: str) -> str:
    return FAMILIES[family].short if family in FAMILIES else family.title()


def _by_family(name: str, mode: str) -> str:
    found = {_short(family): getattr(numbers[mode], name) for family, numbers in DEFAULTS.items()}
    values = sorted(set(found.values()))
    if len(values) == 1:
        return f"{values[0]:g}"
    return ", ".join(f"{family} {value:g}" for family, value in found.items())


def number(name: str, default: float, high: float, step: float, tooltip: str, low: float = 0.0, **more: Any) -> Any:
    """A float's widget; NAG's and PERP's own are shown among the advanced ones."""
    told = {"default": default, "min": low, "max": high, "step": step, "round": False, "tooltip": tooltip}
    return io.Float.Input(name, advanced=name in ("tau", "alpha", "weight", "keep"), **told, **more)


class NegativeSteeringNode(io.ComfyNode):  # type: ignore[misc]
    """A MODEL whose attention is pushed away from a negative text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OneStepNegativeSteering",
            display_name="Negative Steering",
            category="OneStep/guidance",
            description="Gives a few-step model its negative prompt back: the negative acts inside attention, at CFG "
            "1, for a few per cent of a step.",
            search_aliases=["negative prompt", "nasa", "nag", "vsf", "snoopi", "perp-neg", "cfg free", "guidance"],
            inputs=[
                io.Model.Input("model", tooltip=f"{MODELS}."),
                io.Conditioning.Input("negative", tooltip=NEGATIVE_TOLD),
                io.Combo.Input("mode", options=[mode.upper() for mode in MODES], tooltip=MODES_TOLD),
                number("scale", 0.0, 100.0, 0.05, f"How hard to push. 0 = the model's own: {usual('scale', *MODES)}."),
                number("tau", 0.0, 100.0, 0.1, f"{TAU_TOLD} 0 = the model's own: {usual('tau', 'nag', 'perp')}."),
                number("alpha", 0.0, 1.0, 0.025, f"{ALPHA_TOLD} 0 = the model's own: {usual('alpha', 'nag', 'perp')}."),
                number("start_percent", 0.0, 1.0, 0.01, "Share of the schedule where steering begins; 0 = noisiest."),
                number("end_percent", 1.0, 1.0, 0.01, "Share of the schedule where steering ends; 1 = the last step."),
                io.Combo.Input("layers", options=list(LAYERS), optional=True, advanced=True, tooltip=LAYERS_TOLD),
                io.Conditioning.Input(
                    "empty", optional=True, tooltip="PERP alone: an empty prompt, by the model's own text encoder."
                ),
                number(
                    "weight", 1.5, 100.0, 0.05, "PERP alone: of the negative, beside the prompt's 1.", optional=True
                ),
                number("keep", 2.0, 100.0, 0.1, KEEP_TOLD, optional=True),
            ],
            outputs=[io.Model.Output(tooltip="The steered model: sample it at CFG 1.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        negative: Any,
        mode: str,
        scale: float,
        tau: float,
        alpha: float,
        start_percent: float,
        end_percent: float,
        layers: str = LAYERS[0],
        empty: Any = None,
        weight: float = Steering.weight,
        keep: float = Steering.keep,
    ) -> io.NodeOutput:
        own = {"scale": scale or None, "tau": tau or None, "alpha": alpha or None}  # 0 is the model's own
        steering = Steering(mode.lower(), **own, layers=layers, weight=weight, keep=keep)
        if not 0 <= start_percent < end_percent <= 1:
            raise OneStepError(
                f"steering from {start_percent:g} to {end_percent:g} of the schedule is no range: start_percent must "
                "be below end_percent, both within 0 to 1"
            )
        return io.NodeOutput(steered_model(model, negative, steering, start_percent, end_percent, empty))


def steered_model(
    model: Any, negative: Any, steering: Steering, start: float = 0.0, end: float = 1.0, empty: Any = None
) -> Any:
    """A clone of MODEL that steers; ``model`` stays as it is. OneStepError for what cannot be steered so."""
    found = served(model)
    steering = steering.of_family(found.family)
    if steering.layers != "all":
        check_layers(steering, network_of(model))
    width, pooled = found.width(network_of(model)), bool(model.model.adm_channels)
    check_negative(negative, width, pooled)
    if steering.wants_empty and not steering.neutral:
        check_empty(empty, width, pooled)
    if any(KEY in wrappers for wrappers in model.wrappers.values()):
        raise OneStepError(
            "this MODEL is steered already: give both negatives to one Negative Steering, through Conditioning "
            "(Combine), or plug in the MODEL from before the first"
        )
    clone = model.clone()
    if not steering.neutral:
        negative = negative if steering.wants_padding else own_tokens(negative)
        ours = NegativeSteering(steering, negative, empty, found, start, end)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, ours.outer_sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, ours.apply_model)
    return clone


# What a condition may carry -> its word. It would bind the negative to a part of the picture.
PARTIAL = {"area": "an area", "mask": "a mask", "attention_mask_img_shape": "an attention mask"}


def check_negative(negative: Any, width: int, pooled: bool, what: str = "negative") -> None:
    """Raises OneStepError for a negative of another text encoder, or one that is bound to a part of the picture.

    width: of the tokens that the model reads. pooled: whether it reads a pooled vector too. what: the negative's part.
    """
    if not negative:
        raise OneStepError(f"the {what} holds no text: plug in CLIP Text Encode, or ConditioningZeroOut")
    for text, told in negative:
        if text.shape[-1] != width:
            raise OneStepError(
                f"the {what}'s tokens are {text.shape[-1]} wide, this model reads {width}: encode it with this "
                "model's CLIP"
            )
        if pooled and told.get("pooled_output") is None:
            raise OneStepError(f"the {what} has no pooled vector, which this model's CLIP gives: encode it with that")
        bound = [word for key, word in PARTIAL.items() if told.get(key) is not None]
        bound += ["a strength"] * (told.get("strength", 1.0) != 1.0)
        if bound:
            raise OneStepError(
                f"the {what} has {bound[0]}, which steering cannot honour: it acts on the whole picture, and its "
                "strength is the node's scale. Plug in the condition without it"
            )


def check_empty(empty: Any, width: int, pooled: bool) -> None:
    """Raises OneStepError where there is no empty text, or none that `check_negative` takes, or one for some steps."""
    if not empty:
        raise OneStepError("PERP measures from the empty text: plug a CLIP Text Encode without words into `empty`")
    check_negative(empty, width, pooled, "empty text")
    if any((told.get("start_percent", 0.0), told.get("end_percent", 1.0)) != (0.0, 1.0) for _, told in empty):
        raise OneStepError("the empty text has a timestep range: plug it in without, the negative's is what counts")


NODES = [NegativeSteeringNode]
