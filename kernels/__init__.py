"""Operations with a plain torch reference each; imports torch alone, and xformers or Triton when they are asked for."""

from .add_lora import LoRA, Place, add_lora, add_lora_conv, add_lora_conv_reference, add_lora_reference
from .attention import attention, attention_reference, attention_with_lse, backends
from .low_rank import low_rank_conv, low_rank_conv_reference, low_rank_linear, low_rank_linear_reference
from .partial import Partial, merge, partial_attention

__all__ = [
    "LoRA",
    "Partial",
    "Place",
    "add_lora",
    "add_lora_conv",
    "add_lora_conv_reference",
    "add_lora_reference",
    "attention",
    "attention_reference",
    "attention_with_lse",
    "backends",
    "low_rank_conv",
    "low_rank_conv_reference",
    "low_rank_linear",
    "low_rank_linear_reference",
    "merge",
    "partial_attention",
]
