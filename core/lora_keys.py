"""The names under which LoRA files hold their tensors: ours, kohya's, peft's, diffusers', ai-toolkit's, ComfyUI's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from .errors import OneStepError
from .families import FAMILIES, choices
from .families.later import LATER_KEYS, LATER_SHARED
from .families.table import Row

# What is behind the path of the layer, in the dialects that exist.
# peft's own state has the adapter's name behind lora_A.
PEFT = r"\.lora_{0}(?:\.(?!weight$)(?P<name_{0}>[^.]+))?(?:\.weight)?"
DOWN = rf"\.lora_down\.weight|{PEFT.format('A')}|[._]lora(?:_linear_layer)?\.down\.weight"
UP = rf"\.lora_up\.weight|{PEFT.format('B')}|[._]lora(?:_linear_layer)?\.up\.weight"
KEY = re.compile(rf"(?P<path>.+?)(?:(?P<a>{DOWN})|(?P<b>{UP})|(?P<alpha>\.alpha))")

# Other kinds of adapters, by what gives them away in a key.
REFUSED = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_|\.oft_blocks": "OFT",
    r"\.lora_mid\.": "LoCon with a Tucker core",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.lora_[AB](\.[^.]+)?\.bias$|\.lora_bias": "LoRA with biases",
    r"(double|single)_blocks\.\d+\.processor\.\w+_lora\d?\.(down|up)\.": "LoRA of Flux in XLabs' own names",
    r"\blllite_|^lora_controlnet$|control_model\.": "control adapter",
    r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$|\.reshape_weight$": "adapter with full weight differences",
}
WAY_OUT = {
    "adapter with full weight differences": "to draw with it let ComfyUI's LoraLoaderModelOnly, or diffusers' "
    "load_lora_weights, put it on the model, and choose its recipe by name; to start from it use a plain LoRA"
}
"""What to do with a kind that the hosts' own loaders read, as several of Wan's few-step files are."""

TEXT_ENCODER = re.compile(
    r"(lora_unet_|diffusion_model\.|transformer\.)?(llm_adapter|text_conditioner)[._]|lora_te\d?_|lora_prior_te_|text_encoders?(_\d)?\.|lycoris_te(\d?_|xt_(model|encoders?(_\d)?)_)|clip_[lgh]\.|t5xxl\.|cond_stage_model\.|"
    r"conditioner\.embedders\.|(base_model\.model\.)?text_model\."
)
# Not of the denoiser's LoRA either, and legal beside it: the trigger words' embeddings (bundles of kohya's and
# OneTrainer's) and the marks of a v-predicting base.
GUESTS = re.compile(r"bundle_emb\.|emb_params$|(v_pred|ztsnr)$")

PREFIXES = (
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "unet.base_model.model.",
    "transformer.base_model.model.",
    "unet.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)

# diffusers (0.42) drops the number from lora_unet_add_embedding_linear_1; both hosts read the older name.
KOHYA_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


@dataclass(frozen=True)
class Place:
    """What a path in a file stands for: the canonical names of its rows; row: ComfyUI's layer, if its name was used."""

    names: tuple[str, ...]
    row: Row | None = None


class KeyMap:
    """Finds the canonical names behind any dialect's path of one family.

    names: all target names of the base, from which its layout is read; without them the family's largest layout is
    taken (for U-Nets two residual blocks a level, as SD1.5, SD2 and SDXL have).
    """

    def __init__(self, family: str, names: Iterable[str] | None = None) -> None:
        spec, names = FAMILIES[family], list(names or ())
        self._family, self._places = spec, dict[str, Place]()
        for row in spec.rows(spec.layout_of_canonical(names) if names else spec.default):
            self._places.setdefault(_flat(row.host), Place(row.names, row))
            for name in row.names:
                self._places[_flat(name)] = Place((name,))

    def find(self, path: str) -> Place | None:
        """The place of a path: "lora_unet_mid_block_attentions_0_proj_in", "diffusion_model.final_layer.linear"."""
        bare = re.sub(r"\.processor\.", ".", _without_prefix(path))
        found = self._places.get(_flat(bare))
        return self._places.get(_flat(f"{bare}.0")) if found is None and bare.endswith("to_out") else found

    def why_not(self, path: str) -> str:
        """Why the layer of a path has no place, for a person."""
        reason = self._family.reason(_without_prefix(path))
        return f"which is not adapted here ({reason})" if reason else "which this model does not have"


def family_of_keys(
    keys: Iterable[str], wanted: str | None = None, shapes: Mapping[str, Sequence[int]] | None = None
) -> str | None:
    """The family whose layers the keys name, or None. Where several have such layers, as attention alone, it is the
    one whose layers are of these shapes, the ``wanted`` one, or the first. shapes: of the tensors, by key."""
    keys = list(keys)
    text = "\n".join(keys)
    own = [name for name, family in FAMILIES.items() if re.search(family.keys, text)]
    sisters = [name for name, family in FAMILIES.items() if re.search(family.sisters, text)]
    if sisters and not own:
        whole = [name for name in sisters if _has_all(name, keys)] or sisters
        return wanted if wanted in whole else whole[0]
    shared = [name for name, family in FAMILIES.items() if re.search(family.shared, text)]
    if own or not shared:
        return own[0] if own else None
    shared = [name for name in shared if has_ratios(FAMILIES[name].ratios, shapes or {})] or shared
    return wanted if wanted in shared else shared[0]


def _has_all(family: str, keys: Iterable[str]) -> bool:
    """Whether a family has every layer that the keys name."""
    table, found = _largest(family), (KEY.fullmatch(key) for key in keys)
    return all(table.find(match["path"]) is not None for match in found if match is not None)


@cache
def _largest(family: str) -> KeyMap:
    return KeyMap(family)


def has_ratios(ratios: Iterable[tuple[str, float]], shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether no layer has other outputs by its inputs than ``ratios`` say."""
    sizes: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        found = KEY.fullmatch(key)
        if found is not None and found["alpha"] is None and len(shape) > 1:
            sizes.setdefault(found["path"], {})["a" if found["a"] else "b"] = shape[1] if found["a"] else shape[0]
    whole = {path: size for path, size in sizes.items() if len(size) == 2}
    told = ((size, ratio) for path, size in whole.items() for end, ratio in ratios if re.search(rf"{end}$", path))
    return all(size["b"] == round(ratio * size["a"]) for size, ratio in told)


def key_of(family: str, name: str) -> tuple[str, str]:
    """The keys under which both hosts find A and B, in the family's dialect."""
    dialect = FAMILIES[family].dialect
    if dialect == "kohya":
        return f"{_kohya(name)}.lora_down.weight", f"{_kohya(name)}.lora_up.weight"
    path = f"diffusion_model.{_in_comfy(family)[name]}" if dialect == "native" else f"transformer.{name}"
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


@cache
def _in_comfy(family: str) -> dict[str, str]:
    """ComfyUI's path of each canonical name of a family that it fuses no layer of."""
    known = FAMILIES[family]
    return {name: row.host for row in known.rows(known.default) for name in row.names}


def alpha_key_of(family: str, name: str) -> str | None:
    """Kohya's files carry alpha; diffusers refuses or misreads it beside other keys."""
    return f"{_kohya(name)}.alpha" if FAMILIES[family].dialect == "kohya" else None


def refuse_kinds(keys: Iterable[str]) -> None:
    """Raise for adapters that are not plain LoRAs."""
    for key in keys:
        kind = next((kind for pattern, kind in REFUSED.items() if re.search(pattern, key)), None)
        if kind is not None:
            way = WAY_OUT.get(kind, "use a plain LoRA")
            raise OneStepError(f"This file holds a {kind} ({key[:120]!r}), which cannot be read: {way}.")


def parse(key: str) -> tuple[str, str]:
    """The path of the layer and the part, "a", "b" or "alpha". Raises OneStepError for a key that is none."""
    found = KEY.fullmatch(key)
    if found is not None:
        return found["path"], next(part for part in ("a", "b", "alpha") if found[part])
    if re.search(r"(^|[._])lora|\.(down|up)\.weight$", key):
        raise OneStepError(
            f"The file holds {key[:120]!r}, a LoRA in names that are not known here: export it in the names of kohya, "
            "peft, diffusers or ComfyUI."
        )
    raise OneStepError(f"The file holds {key[:120]!r}, which is no part of a LoRA: choose a LoRA's file.")


def refuse_adapters(keys: Iterable[str]) -> None:
    """Raise for peft's keys of several adapters, which are one file's but not one LoRA."""
    parsed = [found for key in keys if (found := KEY.fullmatch(key)) is not None]
    names = sorted({found["name_A"] or found["name_B"] or "" for found in parsed if found["alpha"] is None})
    if len(names) > 1:
        told = ", ".join(repr(name[:40]) for name in names[:5])
        raise OneStepError(f"This file holds {len(names)} adapters ({told}): save the one that is wanted alone.")


def refuse_families(keys: Iterable[str], wanted: str | None = None) -> None:
    """Raise for the LoRAs of known families that are not served. wanted: the family of the model that it is for, whose
    layers may have another's names."""
    keys = list(keys)
    text = "\n".join(keys)
    own = [
        known for name, known in FAMILIES.items() if name == wanted or re.search(f"{known.keys}|{known.sisters}", text)
    ]
    for key in keys:
        shared = any(re.search(known.shared, key) for known in own)
        family = next((family for pattern, family in LATER_KEYS.items() if re.search(pattern, key)), None)
        if family is not None:
            raise OneStepError(
                f"This LoRA is for {family} ({key[:80]!r}), which is not served: use one for {choices()}."
            )
        if not shared and (whose := _alike(key)):
            raise OneStepError(
                f"This LoRA is for {whose}, whose layers have the same names ({key[:80]!r}): give the model that it "
                "is for with it"
            )


def _alike(key: str) -> str:
    """The families that have the layer of a key alike, one of them not served, for a person; "" of any other key."""
    later = [title for pattern, title in LATER_SHARED.items() if re.search(pattern, key)]
    served = [known.short for known in FAMILIES.values() if re.search(known.shared, key)]
    return f"{', '.join(served)} or {later[0]}" if later else ""


def _kohya(name: str) -> str:
    return f"lora_unet_{_flat(KOHYA_NAMES.get(name, name))}"


def _without_prefix(path: str) -> str:
    prefix = max((prefix for prefix in PREFIXES if path.startswith(prefix)), key=len, default="")
    return path[len(prefix) :]


def _flat(path: str) -> str:
    return path.replace(".", "_")
