"""Operations with a plain torch reference each; imports torch alone, and xformers when it is asked for attention."""

from .attention import attention, attention_reference, attention_with_lse, backends
from .low_rank import low_rank_conv, low_rank_conv_reference, low_rank_linear, low_rank_linear_reference

__all__ = [
    "attention",
    "attention_reference",
    "attention_with_lse",
    "backends",
    "low_rank_conv",
    "low_rank_conv_reference",
    "low_rank_linear",
    "low_rank_linear_reference",
]
