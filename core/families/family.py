"""What is known of a family of models, once, for both hosts: the record that each of the families' files fills in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..schedule import NoiseSchedule
from .table import Row

Config = Mapping[str, Any]
"""A network's configuration, diffusers' or ComfyUI's `unet_config`."""
Layout = Any
"""How many blocks a network has: each family's own."""

NORM = "a norm: gains, no matrix"


class Numbers(NamedTuple):
    """What a mode of negative steering is steered by; each number's meaning is in `core.guidance.Steering`."""

    scale: float
    tau: float = 2.5
    alpha: float = 0.25
    order: float = 1
    offset: float = 0.1


class Encoder(NamedTuple):
    """A text encoder, for a person: whose it is, and what loads it in ComfyUI."""

    name: str
    loader: str


@dataclass(frozen=True)
class Block:
    """A kind of block, by the name of its class in either host.

    feed_forwards: paths inside of what may be computed again apart from the rest; "" is the whole block, where one
    product makes attention and feed-forward. in_place: layers inside whose input the host overwrites after they have
    kept it for backward. picture: where in what the block gives the picture is, if it gives several. sequence: how text
    and picture follow each other, if it gives both in one tensor; filled: of how many tokens each is a multiple there,
    patch: latents along a side of one. own: a path inside that another family's block of this name has not.
    """

    feed_forwards: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    picture: int = 0
    sequence: Literal["", "text first", "picture first"] = ""
    filled: int = 1
    patch: int = 2
    own: str = ""


SQUARE = (r"attn[._]to_[kv]", 1.0)
"""A ratio of families that have as many heads of keys and values as of queries."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Names of layers are canonical, diffusers' own, unless ComfyUI's are said.

    Recognition:
    title, models, short: for a person, "the transformer of SD3 and SD3.5", "SD3, SD3.5" and "SD3".
    network: diffusers' class. marks: children of the root, or paths, that tell ComfyUI's tree; none where its class has
    that name.
    keys: what a LoRA's keys have in no other family's file. sisters: what they have in those of families alone whose
    blocks are the same: the wanted model decides, else the first. shared: what they may have as well as another's; the
    wanted model decides then, or ratios: a layer's outputs by its inputs, by the end of its path, where that is
    another's own.

    Layers:
    rows: the table of a layout. layout_of_canonical, layout_of_comfy: from the paths of a network's layers. default:
    the largest layout known, for files that are read without their base. not_adapted: (pattern of module paths, why).
    width: of ComfyUI's fused layers, as its configuration tells it; None where it does not.

    license: what its known models were published under, for a person; shown where a base's own is not known.

    LoRA files:
    dialect: "kohya" is lora_unet_<path with _> with alpha, "transformer" is transformer.<path>.lora_A/B without,
    "native" is diffusion_model.<ComfyUI's path>.lora_A/B without, of a family that ComfyUI fuses no layer of; "each":
    no file serves both hosts, diffusers is given "transformer", ComfyUI "native", fused as its layers are.
    architecture: modelspec's word for the base, by the width of its text tokens; None is any other.

    Latents, text, time:
    encoders: the text encoders of its models, by how wide their tokens are.
    patch: latents along a side of one token. even: the hosts place tokens alike only where each side has an even number
    of them. packed: diffusers' network reads a row of patches, and its in_channels
    counts a whole one. innermost: whether the channels vary fastest in a patch that is embedded as a token, else
    slowest. folded: latents along a side of the autoencoder's that are one of the network's, normed by its statistics.
    variance: whether diffusers' network answers one besides, in as many channels behind those of the noise. least: of
    latents along a side, in the mean, by which ComfyUI can place a picture's patches; 1 is any. one_row: whether
    ComfyUI hands the blocks the texts of a batch in one row.
    widths: of a text token and of the pooled text (0: none), from either host's configuration. pooled: every model
    reads pooled text.
    lengths: texts of several lengths, which ComfyUI does not pad, are there "repeated" (cross-attention does not see
    it), "grouped" into a call for each, "masked" behind each's own tokens, must be "equal", or are "filled in front" by
    zeros to `tokens`, as ComfyUI's model itself does. one_stream: whether the network makes one sequence of
    text and picture, of every text at its own length. filled: a text is filled up to a multiple of so many tokens by
    the network itself; 0 where it is not. tokens: of a text of usual length.
    zeros: whether a text is filled up to `tokens` by zeros that are attended to. longest: of texts to which its
    pipeline pads all, by states that nothing marks in the text; 0 where it does not.
    token_ids: what ComfyUI's conditions call the ids from which, beside the encoder's text, its network makes the text
    that it reads; text_adapter: by what child of its root. text_embedder: what embeds each of a text's tokens before
    cross-attention sees them; "" where the encoder's are seen as they are.
    system: what the pipeline says before a prompt, and start what it parts them by; a text that has ``start`` says its
    own. A negative is told as it is.
    schedule: of the base as it is published. largest: tokens of the largest picture, by which its pipeline finds the
    shift where a scheduler does not say. divided: what diffusers' network is given is the time divided by so much.
    remaining: it is given 1 less a thousandth of the time.
    guidance: entries of the configurations that say whether guidance is embedded; none for classifier-free guidance.
    unembedded: how those are guided that embed none. usual_guidance: what is embedded where nobody says.
    unguided: the guidance scale that diffusers' own pipeline has for none. token_norm: whether it brings each token's
    guided velocity to the norm of the prompt's. scale: its argument of classifier-free guidance. placed: whether it
    makes latents with their places, where they are packed. prompts: the half of a batch of classifier-free guidance
    that they are there; "alone" where the other text has a forward of its own.
    experts: of models with one network for each range of noise (what its file's name has, the range's noise_range).
    pipelines: diffusers' own, for text to image. second: whether a configuration is the second one's. half: the dtype
    of half the bytes in which it is trained.

    Structure:
    blocks: kinds of blocks in both hosts, as checkpointing, streaming and discriminators' heads see them. unet: levels
    of several sizes, with ControlNets' residuals between them. fused_rotary: ComfyUI norms and rotates queries and keys
    by one op of its own, which has no backward. cross_attention: the picture alone attends to the text;
    else both attend jointly. ends: pattern of the layers by which what attention found enters the stream, where
    adapters add. entry: what writes the picture's stream at first; "" where no control is served. summary: the layer
    that reads the text as one vector, or else each of its tokens; "" where adapters read no text so. stacked: the
    layer that reads how many layers of the encoder a token has beside one another; "" where it has one. numbered: the
    rotary axis along which a text's tokens are numbered from 0; None where all lie at the origin. steering: by mode,
    the numbers of a negative where nobody gives any; none where steering is not served.
    """

    title: str
    models: str
    short: str
    network: str
    marks: tuple[str, ...]
    keys: str
    sisters: str = "(?!)"
    shared: str = "(?!)"
    ratios: tuple[tuple[str, float], ...] = ()
    license: str = ""

    rows: Callable[[Layout], Iterator[Row]]
    default: Layout
    layout_of_canonical: Callable[[Iterable[str]], Layout]
    layout_of_comfy: Callable[[Iterable[str]], Layout]
    not_adapted: tuple[tuple[str, str], ...]
    width: Callable[[Config], int | None] = lambda config: None

    dialect: Literal["kohya", "transformer", "native", "each"] = "transformer"
    architecture: Mapping[int | None, str] = field(default_factory=dict)

    encoders: Mapping[int, Encoder]
    patch: int
    even: bool = False
    packed: bool = False
    folded: int = 1
    innermost: bool = False
    variance: bool = False
    least: int = 1
    one_row: bool = False
    widths: Callable[[Config], tuple[int, int]]
    pooled: bool
    lengths: Literal["repeated", "equal", "grouped", "masked", "filled in front"]
    one_stream: bool = False
    filled: int = 0
    tokens: int
    zeros: bool = False
    longest: int = 0
    token_ids: str = ""
    text_adapter: str = ""
    text_embedder: str = ""
    system: str = ""
    start: str = ""
    schedule: NoiseSchedule
    largest: int = 4096
    divided: float = 1.0
    remaining: bool = False
    guidance: tuple[str, ...] = ()
    unembedded: Literal["cfg", "none"] = "none"
    usual_guidance: float = 1.0
    unguided: float = 1.0
    token_norm: Literal["", "token", "row"] = ""
    scale: str = "guidance_scale"
    placed: bool = True
    prompts: Literal["first half", "second half", "alone"] = "second half"
    experts: tuple[tuple[str, str], ...] = ()
    pipelines: tuple[str, ...]
    second: Callable[[Config], bool] = lambda config: False
    half: Literal["float16", "bfloat16"] = "bfloat16"

    blocks: Mapping[str, Block]
    unet: bool = False
    fused_rotary: bool = False
    cross_attention: bool = False
    ends: str
    entry: str = ""
    summary: str = ""
    stacked: str = ""
    numbered: int | None = None
    steering: Mapping[str, Numbers] = field(default_factory=dict)

    def reason(self, path: str) -> str | None:
        """Why the module of this path is not adapted, or None."""
        return next((why for pattern, why in self.not_adapted if re.fullmatch(pattern, path)), None)

    def canonical_names(self, layout: Layout) -> set[str]:
        return {name for row in self.rows(layout) for name in row.names}

    def guidance_of(self, config: Config) -> Literal["cfg", "embedded", "none"]:
        """How a model of this configuration is guided; "none" where it was made to need no guidance."""
        if not self.guidance:
            return "cfg"
        return "embedded" if any(config.get(entry) for entry in self.guidance) else self.unembedded

    @property
    def norm(self) -> int | Literal["row"]:
        """A denoiser's `token_norm` (core.denoiser), as the pipeline guides."""
        sides: dict[str, int | Literal["row"]] = {"": 0, "token": self.patch, "row": "row"}
        return sides[self.token_norm]

    def time_of(self, given: Any) -> Any:
        """The schedule's time of what diffusers' network is given."""
        return 1000 * (1 - given) if self.remaining else given * self.divided

    def said(self, prompt: str, system: str = "") -> str:
        """``prompt`` as its text encoder reads it, behind ``system`` or the usual one, where it does not say its
        own."""
        own = not self.system or self.start in prompt
        return prompt if own else f"{system or self.system} {self.start} {prompt}"

    @property
    def part(self) -> str:
        """What its network is called in a pipeline."""
        return "unet" if self.unet else "transformer"

    def channels(self, config: Config) -> int:
        """Of the latents, from diffusers' configuration."""
        return int(config["in_channels"]) // (self.patch**2 if self.packed else 1)


def first(config: Config, *entries: str) -> Any:
    """The first of ``entries`` that a configuration has: the hosts name alike things differently."""
    return next(config[entry] for entry in entries if entry in config)
