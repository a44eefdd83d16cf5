"""300 damaged files: `onestep inspect`, the reader and the pipeline answer each with success or with OneStepError."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lora_dialects import alpha_tensors, kohya, peft
from lora_files import random_lora
from narrowed import narrowed
from tiny_pipelines import make
from torch import Tensor

from onestep.cli import inspect
from onestep.core.errors import OneStepError
from onestep.core.lora_file import load_lora
from onestep.core.recipe import PRESETS
from onestep.pipelines.one_step import OneStepPipeline

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = ("kohya", "ours", "sd3", "flux")
COUNT = 75  # of each base
FEWER = 24  # three of each mutation
RUNS = [("ours", FEWER), *((name, COUNT) for name in BASES)]
LONGEST = 20.0  # seconds of one processor for one file

Header = dict[str, Any]


def base_file(name: str, folder: Path) -> Path:
    """kohya's with alphas and peft's settings; ours with recipe and settings; SD3 and Flux in peft's names."""
    pipe = make({"kohya": "sd", "ours": "sd"}.get(name, name))
    path = random_lora(pipe, folder / f"{name}.safetensors", PRESETS["sd-turbo-1"] if name == "ours" else None)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    few = dict(list(tensors.items())[:36])
    if name == "ours":
        metadata["onestep.settings"] = json.dumps({"guidance": 3.5, "method": "dmd"})
    else:
        metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "transformer.lora_alpha": 4})}
    safetensors.torch.save_file(few, path, metadata)
    return path


def parts(raw: bytes) -> tuple[Header, bytes]:
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def whole(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def flipped(raw: bytes, draw: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 4, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))] if draw.random() < 0.7 else raw + draw.randbytes(draw.randrange(1, 99))


def renamed(raw: bytes, draw: random.Random) -> bytes:
    header, data = parts(raw)
    names = [name for name in header if name != "__metadata__"]
    old = draw.choice(names)
    new = draw.choice(("", "lora", old + ".x", old.replace("lora", "hada"), "bundle_emb.x", "x" * 2000, old.upper()))
    return whole({new if name == old else name: value for name, value in header.items()}, data)


def reshaped(raw: bytes, draw: random.Random) -> bytes:
    header, data = parts(raw)
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    shape = entry["shape"]
    shapes = ([], [0], shape[::-1], [1, *shape], [*shape, 0], [-1, 4], [2**40, 2**40], [7], None, "4", [4.0], [True])
    entry["shape"] = draw.choice(shapes)
    if draw.random() < 0.3:
        entry["dtype"] = draw.choice(("I8", "F64", "BOOL", "F8_E4M3", "X", None, 4))
    return whole(header, data)


HUGE = "9" * 400
DEEP = "[" * 100_000
NONSENSE = ("", "null", "[]", "5", '"x"', "{", DEEP, HUGE, '{"guidance": ' + HUGE + "}", '{"guidance": ' + DEEP)
NUMBERS = ('"x"', "[1]", "{}", "null", "true", "-1", "1e400", HUGE, "1e30", "0", "NaN", DEEP)


def with_metadata(raw: bytes, draw: random.Random) -> bytes:
    header, data = parts(raw)
    told = header.setdefault("__metadata__", {})
    key = draw.choice(("onestep.settings", "onestep.recipe", "lora_adapter_metadata", "onestep.family"))
    told[key] = draw.choice(NONSENSE)
    if key == "lora_adapter_metadata" and draw.random() < 0.8:
        part, name = draw.choice(("unet", "transformer")), draw.choice(("lora_alpha", "alpha_pattern", "use_rslora"))
        told[key] = f'{{"{part}.{name}": {draw.choice(NUMBERS)}}}'
    if key == "onestep.recipe" and draw.random() < 0.8:
        told[key] = odd_recipe(draw)
    return whole(header, data)


def odd_recipe(draw: random.Random) -> str:
    recipe = json.loads(PRESETS["dmd2-4"].to_json())
    recipe[draw.choice(list(recipe))] = "ODD"
    return json.dumps(recipe).replace('"ODD"', draw.choice((*NUMBERS, "[[1]]", "[[-1, 4]]", "[999, 1e300, 2, 1]")))


def odd_tensors(raw: bytes, draw: random.Random) -> bytes:
    header, _ = parts(raw)
    tensors: dict[str, Tensor] = dict(safetensors.torch.load(raw))
    name = draw.choice(list(tensors))
    odd = (torch.tensor([]), torch.zeros(7), torch.tensor(torch.nan), torch.tensor(1e30), torch.zeros(0, 8))
    more = (torch.zeros(8, 0), torch.zeros(4, 8, dtype=torch.int8), torch.full((3, 3), torch.inf), torch.zeros(1, 1, 1))
    for _ in range(draw.choice((1, 2))):
        tensors[draw.choice((name, name.split(".lora")[0] + ".alpha"))] = draw.choice(odd + more).clone()
    return safetensors.torch.save(tensors, header.get("__metadata__"))


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flipped, cut, renamed, reshaped),
    *(with_metadata, with_metadata, odd_tensors, odd_tensors),
)


def answered(call: Callable[[], Any]) -> bool:
    """Whether it succeeded; anything but success and words fails the test."""
    began = time.process_time()
    try:
        call()
        good = True
    except OneStepError as error:
        assert 20 < len(str(error)) < 1200, str(error)[:300]
        good = False
    assert time.process_time() - began < LONGEST
    return good


def all_answers(path: Path, name: str) -> list[bool]:
    pipe = make({"kohya": "sd", "ours": "sd"}.get(name, name))
    preset = None if name == "ours" else {"sd3": "sd3.5-turbo-4", "flux": "flux-schnell-4"}.get(name, "sd-turbo-1")
    return [
        answered(lambda: inspect.told(inspect.describe(load_lora(path), path))),
        answered(lambda: load_lora(path)),
        answered(lambda: OneStepPipeline.from_pipe(pipe).load_one_step_lora(path, preset)),
    ]


@pytest.mark.parametrize(
    ("name", "count"), narrowed([("ours", FEWER), *((name, COUNT) for name in BASES)], ("ours", FEWER))
)
def test_damaged_files_are_answered_in_words(name: str, count: int, tmp_path: Path) -> None:
    base = base_file(name, tmp_path)
    assert all(all_answers(base, name)), "the base itself is sound"
    draw, raw, refused = random.Random(name), base.read_bytes(), 0
    for at in range(count):
        mutant = tmp_path / f"{at}.safetensors"
        mutation = MUTATIONS[at % len(MUTATIONS)]
        mutant.write_bytes(mutation(raw, draw))
        try:
            refused += not all(all_answers(mutant, name))
        except Exception as error:
            pytest.fail(f"{mutation.__name__}, file {at}: {type(error).__name__}: {str(error)[:200]}")
        mutant.unlink()
    assert refused > count // 3


def test_too_many_tensors_are_refused_while_reading(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (tmp_path / "x.safetensors").write_bytes(whole({f"lora.{at}": one for at in range(100_010)}, b""))
    began = time.process_time()
    with pytest.raises(OneStepError, match="more than 100000 tensors"):
        load_lora(tmp_path / "x.safetensors")
    assert time.process_time() - began < LONGEST


@pytest.mark.parametrize("prefix", ["lora_unet_", "base_model.model."])
def test_odd_alphas_are_named(prefix: str, tmp_path: Path) -> None:
    state = {"mid_block.attentions.0.proj_in": (torch.ones(2, 8), torch.ones(8, 2))}
    names = kohya(prefix) if prefix.startswith("lora") else peft(prefix)
    for metadata, word in (
        ({"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": "x"})}, "alpha_pattern is 'x'"),
        ({"lora_adapter_metadata": f'{{"unet.lora_alpha": {HUGE}}}'}, "is no number up to"),
        ({"lora_adapter_metadata": "["}, "is no table of settings"),
    ):
        path = tmp_path / "x.safetensors"
        safetensors.torch.save_file(names(state), path, metadata)
        with pytest.raises(OneStepError, match=word):
            load_lora(path, family="unet")
    (tensors, _), _ = alpha_tensors(lambda at, rank: 1.0, (7,))(kohya("lora_unet_")(state), state)
    safetensors.torch.save_file(tensors, tmp_path / "y.safetensors")
    with pytest.raises(OneStepError, match="holds 7 numbers"):
        load_lora(tmp_path / "y.safetensors")
