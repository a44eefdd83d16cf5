"""Operations with a plain torch reference each; imports torch alone, and xformers or Triton when they are asked for."""

from .add_lora import LoRA, Place, add_lora, add_lora_reference
from .add_lora_conv import add_lora_conv, add_lora_conv_reference
from .attention import attention, attention_reference, attention_with_lse, backends
from .gated import gated, gated_reference
from .partial import Partial, merge, partial_attention
from .rotary import normed_rotary, normed_rotary_reference
from .steered import Steer, steered_attention, steered_attention_reference

__all__ = [
    "LoRA",
    "Partial",
    "Place",
    "Steer",
    "add_lora",
    "add_lora_conv",
    "add_lora_conv_reference",
    "add_lora_reference",
    "attention",
    "attention_reference",
    "attention_with_lse",
    "backends",
    "gated",
    "gated_reference",
    "merge",
    "normed_rotary",
    "normed_rotary_reference",
    "partial_attention",
    "steered_attention",
    "steered_attention_reference",
]
