"""A model without its weights, as a host on the meta device: its configurations, and what its network is told.

What `training.plan` rehearses a run on. A layout is a model whose configurations travel with us.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.profiler import record_function

from ..core.cond import Cond
from ..core.errors import OneStepError
from ..core.families import FAMILIES, bind_diffusers, of_class, select
from ..core.roles import Roles
from ..core.tensor_file import read_header
from ..training.plan.meter import Meter
from ..training.plan.trace import DECODE
from .adapt import DiffusersHost, denoiser_of
from .autoencoder import burnt
from .kinds import FLUX, SD, SDXL
from .networks import port_of
from .text import encoders_of, t5_tokens

CONFIGS = Path(__file__).resolve().parent / "configs"
META = torch.device("meta")


@dataclass(frozen=True)
class Layout:
    """title: for a person. tokens: of a text, as its pipeline pads it. encoders: parameters of the text encoders."""

    title: str
    tokens: int
    encoders: int


# CLIP-L, CLIP-H, CLIP-bigG with its projection, T5-XXL's encoder, Qwen3-4B and 8B, Qwen2.5-VL-7B, Qwen3-VL-4B
CLIP_L, CLIP_H, CLIP_G, T5 = 123_060_480, 340_387_840, 694_659_840, 4_762_310_656
QWEN3_4B, QWEN3_8B, QWEN25_VL_7B = 4_022_468_096, 8_190_735_360, 8_292_166_656
# Gemma-2-2B
GEMMA2_2B = 2_614_341_888
QWEN3_VL_4B = 4_437_815_808
# Qwen3-0.6B, and what makes Anima's text of its states; UMT5-XXL's encoder
ANIMA_TEXT, UMT5 = 596_049_920 + 134_663_680, 5_680_910_336
LAYOUTS = {
    "sd15": Layout("SD1.5", 77, CLIP_L),
    "sd2": Layout("SD2", 77, CLIP_H),
    "sdxl": Layout("SDXL", 77, CLIP_L + CLIP_G),
    "sd35-medium": Layout("SD3.5-medium", 77 + 256, CLIP_L + CLIP_G + T5),
    "flux-dev": Layout("Flux-dev", 512, CLIP_L + T5),
    "z-image": Layout("Z-Image", FAMILIES["z_image"].tokens, QWEN3_4B),
    "klein-4b": Layout("FLUX.2 klein 4B", FAMILIES["flux2"].tokens, QWEN3_4B),
    "klein-9b": Layout("FLUX.2 klein 9B", FAMILIES["flux2"].tokens, QWEN3_8B),
    "anima": Layout("Anima", FAMILIES["anima"].tokens, ANIMA_TEXT),
    "chroma": Layout("Chroma", FAMILIES["chroma"].tokens, T5),
    "lumina2": Layout("Lumina 2", FAMILIES["lumina2"].tokens, GEMMA2_2B),
    "pixart-sigma": Layout("PixArt-Sigma", FAMILIES["pixart"].tokens, T5),
    "qwen-image": Layout("Qwen-Image", FAMILIES["qwen_image"].tokens, QWEN25_VL_7B),
    "wan-1.3b": Layout("Wan 2.1 1.3B", FAMILIES["wan"].tokens, UMT5),
    "wan-14b": Layout("Wan 14B", FAMILIES["wan"].tokens, UMT5),
    "wan-5b": Layout("Wan 2.2 5B", FAMILIES["wan"].tokens, UMT5),
    "krea-2": Layout("Krea 2", FAMILIES["krea2"].tokens, QWEN3_VL_4B),
}


class Shell(DiffusersHost):
    """A `DiffusersHost` whose weights are on the meta device. tokens: of a text. encoders: bytes of the text encoders'
    weights."""

    tokens: int = 77
    encoders: int = 0
    encoder_hash = base_hash = "none"

    @property
    def configuration(self) -> str:
        """What its count hangs on beside its weights' shapes: the configurations, and whose code runs them."""
        parts = self.network, self.pipe.vae, self.pipe.scheduler
        # names that begin so are diffusers' own notes, a set in no order among them
        told = [sorted(entry for entry in part.config.items() if not entry[0].startswith("_")) for part in parts]
        kinds = [type(part).__name__ for part in parts]
        return repr((diffusers.__version__, kinds, told, self.pipe.vae.dtype, self.tokens, self.encoders))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], padded: bool = True, negative: bool = False) -> Cond:
        """Zeros in the place of texts, in their shapes; meanwhile the encoders are there."""
        weights = torch.empty(self.encoders, dtype=torch.uint8, device=META)
        width, pooled = self._known.widths(self.network.config)
        told = torch.zeros(len(prompts), pooled) if pooled else None
        del weights
        return Cond(torch.zeros(len(prompts), self.tokens, width), pooled=told)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        yield

    @contextmanager
    def training(self) -> Iterator[None]:
        yield

    @contextmanager
    def on_device(self, *modules: Any) -> Iterator[None]:
        yield

    def decode(self, latents: Tensor, generator: Any = None) -> Tensor:
        """The first picture in the place of each, which are decoded one after the other. The decoder's weights are
        there as long as it works."""
        weights = [torch.empty_like(weight) for weight in self.pipe.vae.parameters()]
        with record_function(DECODE):
            picture = super().decode(latents[:1], generator)
        del weights
        return picture.expand(len(latents), -1, -1, -1)

    @contextmanager
    def decoding(self) -> Iterator[Any]:
        """With the decoder's weights there."""
        weights = [torch.empty_like(weight) for weight in self.pipe.vae.parameters()]
        yield lambda latents: burnt(self.pipe.vae, latents)
        del weights

    def shell(self, targets: str) -> Shell:
        """Itself, with new adapters on ``targets``."""
        self.denoiser.roles = Roles(select(bind_diffusers(self.network), targets), port_of(self.network))
        return self


def layout(name: str, *, targets: str = "all", dtype: torch.dtype = torch.bfloat16) -> Shell:
    """The shell of a layout by its name, of weights of ``dtype``."""
    if name not in LAYOUTS:
        raise OneStepError(f"no layout {name[:60]!r}: there are {', '.join(LAYOUTS)}")
    told = LAYOUTS[name]
    shell = _shell(told.title, _configs(CONFIGS / name), told.tokens, targets, dtype)
    shell.encoders = told.encoders * dtype.itemsize
    return shell


def of_folder(folder: Path, *, targets: str = "all", dtype: torch.dtype = torch.bfloat16) -> Shell:
    """The shell of a diffusers folder: its configurations are read, its weights are not."""
    configs = _configs(folder)
    shell = _shell(folder.name, configs, _tokens(folder, configs), targets, dtype)
    shell.encoders = sum(file.stat().st_size for file in folder.glob("text_encoder*/*.safetensors"))
    return shell


def of_single_file(path: Path, *, targets: str = "all", dtype: torch.dtype = torch.bfloat16) -> Shell:
    """The shell of a checkpoint file: its keys are read, its weights are not."""
    from .single_file import kind_of  # which needs transformers, as no other shell does

    shell = layout(kind_of(path, read_header(path)).config, targets=targets, dtype=dtype)
    shell.name = path.stem
    return shell


def of_host(host: DiffusersHost, targets: str) -> Shell:
    """The shell of a loaded host."""
    pipe, network = host.pipe, host.network
    part = FAMILIES[host.family].part
    parts = {part: dict(network.config), "vae": dict(pipe.vae.config)}
    classes = {part: type(network), "vae": type(pipe.vae)}
    with Meter(), META:
        modules = {name: classes[name].from_config(config) for name, config in parts.items()}
    shell = _host(host.name, modules, pipe.scheduler, network.dtype, pipe.vae.dtype)
    shell.tokens = tokens_of(pipe, host.kind)
    shell.encoders = sum(weight.nbytes for module in encoders_of(pipe) for weight in module.parameters())
    return shell.shell(targets)


def tokens_of(pipe: Any, kind: str) -> int:
    """Tokens of a text as a loaded pipeline, one of `kinds.PIPELINES`, pads it."""
    one = next((known for known in FAMILIES.values() if kind in known.pipelines and not known.pooled), None)
    if one is not None and not one.unet:
        return one.tokens
    clip = 0 if kind == FLUX else int(pipe.tokenizer.model_max_length)
    return clip + (0 if kind in (SD, SDXL) else t5_tokens(pipe))


def _shell(name: str, configs: Mapping[str, Any], tokens: int, targets: str, dtype: torch.dtype) -> Shell:
    with Meter(), META:
        modules = {
            part: getattr(diffusers, config["_class_name"]).from_config(config)
            for part, config in configs.items()
            if part != "scheduler"
        }
    scheduler = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    shell = _host(name, modules, scheduler, dtype, dtype)
    shell.tokens = tokens
    return shell.shell(targets)


def _host(name: str, modules: dict[str, Any], scheduler: Any, dtype: torch.dtype, of_vae: torch.dtype) -> Shell:
    for part, module in modules.items():
        torch.nn.Module.to(module, of_vae if part == "vae" else dtype).requires_grad_(False).eval()
    nobody = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner"))
    pipe = SimpleNamespace(**modules, **nobody, scheduler=scheduler, config={"_name_or_path": name})
    shell = Shell(pipe, denoiser_of(pipe, Roles([])), META)
    if shell.family == "lumina2":
        shell.network.rope_embedder.register_forward_pre_hook(_whole_texts)
    return shell


def _whole_texts(unused: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Lumina 2's network asks the mask how long each text is, which has no numbers here: they are not padded."""
    latents, mask = given
    return latents, torch.ones(mask.shape, dtype=torch.bool)


def _configs(folder: Path) -> dict[str, Any]:
    """Of the network, the VAE and the scheduler."""
    found = {}
    for part, file in {
        "unet": "config",
        "transformer": "config",
        "vae": "config",
        "scheduler": "scheduler_config",
    }.items():
        path = folder / part / f"{file}.json"
        if path.is_file():
            found[part] = _read(path)
    missing = {"vae", "scheduler"} - set(found)
    if missing or not {"unet", "transformer"} & set(found):
        lacking = sorted(missing) or ["unet or transformer"]
        raise OneStepError(
            f"{str(folder)[-150:]} has no configuration of its {lacking[0]}: give a whole diffusers folder"
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    """A table of a JSON file; an empty one where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise OneStepError(f"{str(path)[-150:]} cannot be read ({str(error)[:80]}): save the model again") from None
    return found if isinstance(found, dict) else {}


def _tokens(folder: Path, configs: Mapping[str, Any]) -> int:
    """Of a text, as the folder's pipeline pads it."""
    config = configs.get("transformer", {})
    family = of_class(config.get("_class_name", ""))
    if family is not None and not FAMILIES[family].pooled:
        return FAMILIES[family].tokens
    if family == "flux":
        return 512 if config.get("guidance_embeds") else 256
    told = _read(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    t5 = any((folder / "text_encoder_3").glob("*.safetensors"))
    return int(told) + (256 if t5 else 0)
