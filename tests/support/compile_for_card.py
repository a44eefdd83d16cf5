"""compile_for_card.py CAPABILITY: compile every Triton kernel for a card that need not be there; one line of JSON.

What it prints is the bytes of each kernel and of the shared memory that it takes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from onestep.kernels import triton_add_lora, triton_gated, triton_rotary, triton_steered

HALF = {"OPERANDS": tl.bfloat16}
LORA = {"FACTORS": tl.float32, **HALF, "RANK": 64, "ROWS": 64, "INNER": 32, "COLUMNS": 64, "FIELDS": 9, "ALIGNED": True}
STEER = {"SCALE": 0.125, **HALF, "WIDTH": 64, "WIDE": 64, "ROWS": 64, "KEYS": 32, "HEADS": 32, "SQUARE": False}
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "add_lora forward": (triton_add_lora._product, {**LORA, "BACK": False, "ADD": True}),
    "add_lora backward": (triton_add_lora._product, {**LORA, "BACK": True, "ADD": False}),
    "gated forward": (triton_gated._forward, {"GELU": True, "BLOCK": 1024}),
    "gated backward": (triton_gated._backward, {"GELU": True, "BLOCK": 1024}),
    "rotary forward": (triton_rotary._forward, {"ROWS": 16, "PAIRS": 64}),
    "rotary backward": (triton_rotary._backward, {"ROWS": 16, "PAIRS": 64}),
    "nag, its norms": (triton_steered._steer, {**STEER, "NAG": True, "MEASURE": True}),
    "nag": (triton_steered._steer, {**STEER, "NAG": True, "MEASURE": False}),
    "nasa": (triton_steered._steer, {**STEER, "NAG": False, "MEASURE": False}),
}
POINTERS = dict.fromkeys(("out", "x", "hidden", "projected", "gradient", "found", "q", "k", "v", "k2", "v2"), "*bf16")
POINTERS |= {"table": "*i64", "scales": "*fp32", "norms": "*fp32", "weight": "*bf16", "cos": "*fp32", "sin": "*fp32"}
REALS = {"scale", "tau", "alpha", "eps"}


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> dict[str, int]:
    names = kernel.arg_names
    kinds = {name: POINTERS.get(name, "fp32" if name in REALS else "i32") for name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    # as a launch finds them: addresses and widths that are multiples of 16
    whole = [index for index, name in enumerate(names) if kinds[name][0] == "*" or name in ("width", "x_stride")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in whole}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, kinds, fixed, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    return {"bytes": len(found.asm["cubin"]), "shared": found.metadata.shared}


if __name__ == "__main__":
    print(json.dumps({name: compiled(*parts, int(sys.argv[1])) for name, parts in KERNELS.items()}))
