"""The doubled form of a joint network in ComfyUI's Python: its texts are one row each, and the picture's rows are
overwritten after each attention; nothing of ours is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.flux.math import attention as flux_attention
from comfy_steering import empty_for, flipped, look, noise_of, pushed
from torch import Tensor


def doubled(
    model: Any, positive: Any, negative: Any, form: dict[str, Any], share: float = 0.1, last: bool = True
) -> Tensor:
    """x0 of the doubled form: one picture under the positive's pooled vector, each text as a row under its own, or by
    VSF under the positive's; [1, C, H, W]. The shorter texts are filled up with noise that nothing looks at. last: a
    text whose tokens are numbered is the end of its row, behind the noise.
    """
    base = model.model
    comfy.model_management.load_models_gpu([model])
    noise = noise_of(model)
    sigma = torch.tensor([min(float(base.model_sampling.sigma_max), base.model_sampling.percent_to_sigma(share))])
    entries = [positive[0], negative[0], *(empty_for(negative) if form["mode"] == "perp" else ())]
    texts, fill = [text for text, _ in entries], getattr(base.diffusion_model, "pad_tokens_multiple", 1)
    numbered = bool(getattr(getattr(base.diffusion_model, "params", None), "txt_ids_dims", ()))
    if numbered:
        texts = filled_in_front(form, texts)
    longest = max(-(-text.shape[1] // fill) * fill for text in texts)
    noises = [9 * torch.randn(1, longest - t.shape[1], t.shape[2]) for t in texts]
    pairs = list(zip(texts, noises, strict=True))
    filled = [torch.cat(pair[::-1] if numbered and last else pair, 1) for pair in pairs]
    told = base.extra_conds(**positive[0][1], noise=noise, device=noise.device)
    pictures = [noise, *(told["ref_latents"].cond if "ref_latents" in told else [])]
    side = 1 if numbered else 2
    image = sum(-(-picture.shape[-1] * picture.shape[-2] // side**2 // fill) * fill for picture in pictures)
    told = {name: as_rows(value.cond, len(entries)) for name, value in told.items()}
    if fill > 1:
        told = {"num_tokens": longest}
    elif form["mode"] != "vsf" and not numbered:
        told["y"] = torch.cat([more["pooled_output"][:1] for _, more in entries])
    override = Doubled(form, [text.shape[1] for text in texts], longest, image, fill > 1, numbered and last)
    options = {"optimized_attention_override": override}
    of_time = numbered or hasattr(base.diffusion_model, "distilled_guidance_layer")
    modulated = hasattr(base.diffusion_model, "final_layer") and not of_time
    pooled = picture_under_the_positive(base.diffusion_model) if modulated else nullcontext()
    with pooled, learnt_filling(base.diffusion_model, texts, fill):
        x0 = base.apply_model(
            torch.cat([noise * sigma] * len(entries)),
            sigma.repeat(len(entries)),
            c_crossattn=torch.cat(filled),
            transformer_options=options,
            **told,
        )
    assert override.joint and float((x0[:1] - x0).abs().max()) < 1e-5 * float(x0.std()), "all rows hold one picture"
    return x0[:1]


def filled_in_front(form: dict[str, Any], texts: list[Tensor]) -> list[Tensor]:
    """FLUX.2's texts of 512 tokens, zeros in front; VSF's negative alone is not filled up."""
    own = [form["mode"] == "vsf" and number == 1 for number in range(len(texts))]
    pairs = zip(texts, own, strict=True)
    return [t if alone else torch.nn.functional.pad(t, (0, 0, max(0, 512 - t.shape[1]), 0)) for t, alone in pairs]


@contextmanager
def learnt_filling(network: Any, texts: list[Tensor], fill: int) -> Iterator[None]:
    """Within, the tokens behind each row's text are those that Z-Image fills it up by, to the same length for all."""
    if fill == 1:
        yield
        return
    assert len({-(-text.shape[1] // fill) for text in texts}) == 1, "rows are filled up to one length here"

    def learnt(module: Any, given: Any, out: Tensor) -> Tensor:
        own = torch.tensor([text.shape[1] for text in texts])[:, None]
        return torch.where((torch.arange(out.shape[1]) < own)[..., None], out, network.cap_pad_token)

    handle = network.cap_embedder.register_forward_hook(learnt)
    try:
        yield
    finally:
        handle.remove()


def as_rows(value: Any, rows: int) -> Any:
    """A condition for each of the rows; a word is all of theirs."""
    if isinstance(value, str):
        return value
    return [torch.cat([part] * rows) for part in value] if isinstance(value, list) else torch.cat([value] * rows)


@contextmanager
def picture_under_the_positive(network: Any) -> Iterator[None]:
    """Within, whatever modulates a picture is the first row's."""

    def of_first(module: Any, given: Any) -> Any:
        return (given[0][:1].expand(given[0].shape),)

    def last(module: Any, given: Any, told: Any) -> Any:
        return (given[0], given[1][:1].expand(given[1].shape)), told

    joint, double = getattr(network, "joint_blocks", ()), getattr(network, "double_blocks", ())
    layers = [*(block.x_block.adaLN_modulation for block in joint), *(block.img_mod for block in double)]
    handles = [layer.register_forward_pre_hook(of_first) for layer in layers]
    handles.append(network.final_layer.register_forward_pre_hook(last, with_kwargs=True))
    singles = list(getattr(network, "single_blocks", ()))
    for block in singles:
        block.forward = partial(single_block, block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block in singles:
            del block.forward


def single_block(block: Any, x: Tensor, vec: Tensor, pe: Tensor, transformer_options: Any, **rest: Any) -> Tensor:
    """x + g (W [attention(n), gelu(m)]), (q, k, v, m) = V n, n = (1 + s) LN(x) + t: s, t and g of a text's tokens by
    its row's vector, of the picture's by the first's."""
    length = transformer_options["optimized_attention_override"].longest
    shift, scale, gate = (
        torch.cat((part.expand(-1, length, -1), part[:1].expand(len(x), x.shape[1] - length, -1)), 1)
        for part in block.modulation.lin(torch.nn.functional.silu(vec))[:, None].chunk(3, -1)
    )
    n = block.linear1((1 + scale) * block.pre_norm(x) + shift)
    qkv, m = n[..., : 3 * block.hidden_size], n[..., 3 * block.hidden_size :]
    q, k, v = qkv.unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = block.norm(q, k, v)
    found = flux_attention(q, k, v, pe=pe, transformer_options=transformer_options)
    return x + gate * block.linear2(torch.cat((found, torch.nn.functional.gelu(m, approximate="tanh")), 2))


class Doubled:
    """An attention override over rows [text, image], the shorter texts filled up: the positive's comes first.

    learnt: what fills a text up is seen, but for the negative's by VSF's picture. last: a text is the end of its row.
    """

    def __init__(
        self,
        form: dict[str, Any],
        lengths: list[int],
        longest: int,
        image: int,
        learnt: bool = False,
        last: bool = False,
    ) -> None:
        self.form, self.lengths, self.longest, self.image, self.joint = form, lengths, longest, image, 0
        self.own = [slice(last * (longest - n), longest if last else n) for n in lengths]
        self.seen = [slice(0, longest)] * len(lengths) if learnt else self.own

    def __call__(
        self, attend: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **rest: Any
    ) -> Tensor:
        flat = not rest.get("skip_reshape")
        parts = [x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) if flat else x for x in (q, k, v)]
        length = parts[1].shape[2]
        if length == self.longest + self.image:
            out = self.steered(*parts)
        elif length == self.longest and len(q) == len(self.lengths):  # each row's text alone, refined
            out = look(*parts, self.hidden(length))
        else:
            out = look(*parts)
        out = out.to(q)
        return out if rest.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def hidden(self, length: int) -> Tensor:
        """What is added to the scores of each row: nothing where its own text or the picture is."""
        seen = torch.full((len(self.lengths), 1, 1, length), -math.inf, dtype=torch.float64)
        for row, text in enumerate(self.seen):
            seen[row, ..., text] = seen[row, ..., self.longest :] = 0
        return seen

    def steered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.joint += 1
        out = look(q, k, v, self.hidden(k.shape[2]))
        if self.form["mode"] == "vsf":
            keys = [torch.cat((x[:1, :, self.seen[0]], x[:1, :, self.longest :]), 2) for x in (k, v)]
            negative = [x[1:, :, self.own[1]] for x in (k, v)]
            picture = flipped(self.form, q[:1, :, self.longest :], *keys, *negative)
        else:
            picture = pushed(self.form, *out[:, :, self.longest :].split(1))
        return torch.cat((out[:, :, : self.longest], picture.expand(len(out), -1, -1, -1)), 2)
