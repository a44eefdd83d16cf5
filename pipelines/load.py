"""MODEL, as a person names it, to a loaded pipeline: a bundled model, a diffusers folder or a single .safetensors file.

Nothing is downloaded and no pickle is opened.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ..core.errors import OneStepError
from ..core.families import FAMILIES, choices, of_class
from ..core.stored import holds_float8
from ..core.tensor_file import read_header
from .bundled import MODELS, path_of
from .kinds import PIPELINES
from .modular import is_modular, loaded_names, made_of, part_names
from .quiet import attempt
from .single_file import FIRST, load_single_file
from .two_experts import EXPERTS, as_the_only, entries_for, expert_of
from .weights import load_parts

WEIGHTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner")
UNUSED = ("feature_extractor", "image_encoder")  # parts that only an IP-Adapter or the safety checker asks for
BIGGEST_INDEX_BYTES = 1 << 20


def load(
    model: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    stored: bool = False,
    waiting: bool = False,
) -> Any:
    """The pipeline of MODEL: a bundled model's name, a diffusers folder, or a single file of SD1.5, SD2 or SDXL.

    device: where the U-Net or transformer lies. Text encoders and VAE stay on the CPU, to be lent to it when they work.
    dtype: of the weights; None is float32 on a CPU and elsewhere as `half_of` says. stored: whether the network's
    blocks keep a single file's weights of fp8 as they are, to be trained on. waiting: whether the network stays on the
    CPU until it is trained on the device, which may be too small for it. Raises OneStepError with what to do.
    """
    device, path = torch.device(device), located(model)
    dtype = dtype or (torch.float32 if device.type == "cpu" else half_of(path, has_bfloat16(device)))
    pipe = (
        load_folder(path, dtype)
        if path.is_dir()
        else load_single_file(path, dtype, stored=stored and holds_float8(device))
    )
    refuse_broken(pipe, path)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    network.to("cpu" if waiting else device)
    return pipe


def located(model: str | Path) -> Path:
    """Where MODEL lies. Raises OneStepError where it is not there."""
    path = path_of(str(model)) if str(model) in MODELS else Path(model).expanduser()
    if not path.exists():
        raise OneStepError(
            f"no model {str(model)[:150]!r}: give {', '.join(MODELS)}, a diffusers folder, "
            "or a .safetensors file of SD1.5, SD2 or SDXL"
        )
    return path


def half_of(path: Path, bfloat16: bool) -> torch.dtype:
    """float16 for a U-Net that is not stored in bfloat16, else bfloat16: float16 leaves eight times more of the
    difference that matching learns from (benchmarks/results/half-precision.md), and larger networks may leave its
    range. bfloat16: whether the device computes in it; without it everything is float16."""
    stored = _stored_in(path)
    return torch.float16 if not bfloat16 or stored not in (None, torch.bfloat16) else torch.bfloat16


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; older cards only seem to."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _stored_in(path: Path) -> torch.dtype | None:
    """The dtype of a U-Net's first weight in its file; None where there is no U-Net."""
    files = sorted((path / "unet").glob("*.safetensors")) if path.is_dir() else [path]
    name = "conv_in.weight" if path.is_dir() else FIRST
    found = (read_header(file).tensors.get(name) for file in files)
    return next((entry.dtype for entry in found if entry is not None), None)


def best_device() -> torch.device:
    """Where a model named by its path goes if nobody says where: a GPU that torch can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_folder(folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline of a diffusers folder, from its safetensors alone; of one of two experts, the folder in it."""
    folder, expert = expert_of(folder)
    index = entries_for(folder, expert, read_index(folder))
    cls = getattr(diffusers, pipeline_class(folder, index))
    if is_modular(cls):
        return _assembled(folder, cls, index, dtype)
    for part in WEIGHTS:
        _refuse_pickles(folder / part)
    wanted = tuple(part for part in WEIGHTS if expert != EXPERTS[1] or part != EXPERTS[0])
    parts = _left_out(folder, cls, index) | load_parts(folder, index, wanted, dtype)
    parts |= as_the_only(folder, expert, index, dtype)
    return attempt(
        folder,
        lambda: cls.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **parts,
        ),
    )


def _assembled(folder: Path, cls: Any, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A modular pipeline of the parts that lie in the folder, wherever its index says that they came from."""
    told = {name: _class_told(entry) for name, entry in index.items() if isinstance(entry, list)}
    wanted = [name for name in told if name in part_names(cls) and (folder / name).is_dir()]
    entries = {name: told[name] for name in wanted if _present(told, name)}
    if absent := sorted(loaded_names(cls) - set(entries)):
        raise OneStepError(f"{folder.name[:80]} has no {absent[0]}: give the folder of a whole {cls.__name__}")
    parts = load_parts(folder, entries, WEIGHTS, dtype)
    for name in sorted(set(entries) - set(parts)):
        made = _without_weights(folder, name, entries[name])
        parts[name] = attempt(folder / name, partial(made.from_pretrained, folder / name, local_files_only=True))
    pipe = attempt(folder, lambda: made_of(cls, parts))
    pipe._pretrained_model_name_or_path = str(folder)  # as its own from_pretrained keeps it
    return pipe


def _class_told(entry: list[Any]) -> Any:
    """[library, class] of an entry in a modular index, which holds them in a hint alone where diffusers wrote it of a
    part that it had not loaded."""
    hint = entry[-1].get("type_hint") if entry[:2] == [None, None] and isinstance(entry[-1], dict) else None
    return hint if isinstance(hint, list) else entry[:2]


def _without_weights(folder: Path, name: str, entry: Any) -> Any:
    """The class of a tokenizer or a scheduler. entry: [library, class]."""
    library, kind = entry if isinstance(entry, list) and len(entry) == 2 else ("", entry)
    made: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(kind), None)
    if not hasattr(made, "from_pretrained") or issubclass(made, torch.nn.Module):
        raise OneStepError(
            f"{folder.name[:80]}'s {name} is {str(entry)[:80]}, which is not known here: use a folder that diffusers "
            "saved"
        )
    return made


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a diffusers folder, or modular_model_index.json."""
    file = folder / "model_index.json"
    modular = folder / "modular_model_index.json"
    file = modular if modular.is_file() and not file.is_file() else file
    try:
        if file.stat().st_size > BIGGEST_INDEX_BYTES:
            raise ValueError("it is too long")
        index = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it holds no table")
    except (OSError, ValueError) as error:
        raise OneStepError(
            f"{str(folder)[-150:]} is no diffusers folder: {file.name} cannot be read ({str(error)[:80]}); "
            "give the folder that holds it"
        ) from None
    return index


def pipeline_class(folder: Path, index: dict[str, Any]) -> str:
    """The class that loads a folder; one of ours is loaded as the family's own."""
    name = index.get("_class_name")
    if name == "OneStepPipeline":
        return class_for(index)
    if name not in PIPELINES:
        raise OneStepError(
            f"{folder.name[:80]} holds a {str(name)[:60]}, which cannot be distilled: use a text-to-image pipeline "
            f"of {choices()}"
        )
    return str(name)


def class_for(parts: Mapping[str, Any]) -> str:
    """The pipeline class for an index's entries, name -> [library, class]."""
    if _present(parts, "unet"):
        return PIPELINES[_present(parts, "text_encoder_2")]
    family = of_class(parts.get("transformer", ["", ""])[1])
    return FAMILIES[family or "flux"].pipelines[0]


def _present(parts: Mapping[str, Any], name: str) -> bool:
    return parts.get(name) is not None and list(parts[name][:2]) != [None, None]


def refuse_broken(pipe: Any, path: Path) -> None:
    """Raise where a weight is not there, or not a finite number."""
    for part in WEIGHTS:
        module = getattr(pipe, part, None)
        for name, weight in module.named_parameters() if module is not None else ():
            if weight.is_meta:
                raise OneStepError(
                    f"{path.name[:80]} is incomplete: it lacks {part}.{name[:80]}; download or export it again"
                )
            if not bool(torch.isfinite(weight if weight.dtype.itemsize > 1 else weight.float()).all()):
                raise OneStepError(
                    f"{path.name[:80]} is damaged: {part}.{name[:80]} holds numbers that are not finite (NaN or "
                    "infinite); download or export it again"
                )


def _left_out(folder: Path, cls: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    """None for each part that the folder lacks, as SD3 without T5, and for the safety checker, never used here."""
    wanted = inspect.signature(cls.__init__).parameters
    empty = inspect.Parameter.empty
    absent = {name: None for name in wanted if wanted[name].default is empty and index.get(name) == [None, None]}
    absent |= {name: None for name in UNUSED if name in wanted and not (folder / name).is_dir()}
    spared = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in wanted else {}
    return {**absent, **spared}


def _refuse_pickles(part: Path) -> None:
    pickles = [file.name for ending in ("bin", "pt", "pth", "ckpt") for file in part.glob(f"*.{ending}")]
    if pickles and not any(part.glob("*.safetensors")):
        raise OneStepError(
            f"{part.name}/{pickles[0][:80]} is a pickle, which can run code when it is opened: "
            "save the pipeline again with safe_serialization=True"
        )
