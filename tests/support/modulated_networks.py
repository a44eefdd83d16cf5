"""SD3 and Flux in their doubled form where each text is modulated by its own pooled text, and the picture by the
prompt's: rows are the prompts', then each other text's, with the same picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu


@contextmanager
def picture_under_the_prompt(network: Any, texts: int) -> Iterator[None]:
    """Within, whatever modulates the picture is that of the first of ``texts`` row blocks."""

    def prompts(embedded: Tensor) -> Tensor:
        return embedded[: len(embedded) // texts].repeat(texts, 1)

    def before(module: Any, args: Any, told: Any) -> Any:
        if "emb" in told:
            return args, {**told, "emb": prompts(told["emb"])}
        return (args[0], prompts(args[1])), told

    with ExitStack() as undo:
        for norm in (*(block.norm1 for block in network.transformer_blocks), network.norm_out):
            undo.callback(norm.register_forward_pre_hook(before, with_kwargs=True).remove)
        for block in getattr(network, "single_transformer_blocks", ()):
            undo.callback(setattr, block, "forward", block.forward)
            block.forward = partial(single_block, block, prompts)
        yield


def single_block(
    block: Any,
    prompts: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> tuple[Tensor, Tensor]:
    """x + g (W [attention(n), act(V n)]), n = (1 + s) LN(x) + t: s, t and g of a text's tokens by its row's embedding,
    of the picture's by the prompt's."""
    length, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], 1)
    own, picture = (block.norm.linear(silu(embedded))[:, None] for embedded in (temb, prompts(temb)))
    told = torch.cat([own.expand(-1, length, -1), picture.expand(-1, x.shape[1] - length, -1)], 1)
    t, s, g = told.chunk(3, 2)
    n = (1 + s) * layer_norm(x, x.shape[-1:], eps=1e-6) + t
    found = block.attn(hidden_states=n, image_rotary_emb=image_rotary_emb)
    x = x + g * block.proj_out(torch.cat([found, block.act_mlp(block.proj_mlp(n))], 2))
    return x[:, :length], x[:, length:]
