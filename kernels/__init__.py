"""Operations with a plain torch reference each; imports torch alone, and xformers when it is asked for attention."""

from .attention import attention, attention_reference, attention_with_lse, backends
from .low_rank import low_rank_conv, low_rank_conv_reference, low_rank_linear, low_rank_linear_reference
from .partial import Partial, merge, partial_attention

__all__ = [
    "Partial",
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
