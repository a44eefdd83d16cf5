"""Negative steering around ComfyUI's apply_model: which forwards are steered, by which of the negative's tokens."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor

from ..core.errors import OneStepError
from ..core.families import FAMILIES
from ..core.guidance import Steering
from .steer_attention import Reached
from .steer_networks import Call, KeysValues, Served, bare
from .steer_text import WHOLE

KEY = "onestep_negative_steering"
PROMPT = "onestep_prompt"
"""In transformer_options: the prompt's own tokens, for adapters that run within, where the context holds others too."""
Entry = dict[str, Any]
"""One of a CONDITIONING's texts, as the sampler prepares it."""


@dataclass
class Run:
    """What one sampling run knows of the negative; gone when the run ends.

    unguarded: whether torch.compile may have been told to leave out guards.
    """

    entries: dict[int, list[Entry]] = field(default_factory=dict)
    empty: dict[int, list[Entry]] = field(default_factory=dict)
    keys_values: dict[Any, KeysValues] = field(default_factory=dict)
    reached: Reached = field(default_factory=Reached)
    said: bool = False
    unguarded: bool = False


@dataclass(frozen=True)
class NegativeSteering:
    """The two wrappers of one steered MODEL. negative, empty: CONDITIONING, the second where steering wants it. start,
    end: shares of the schedule, 0 noisiest."""

    steering: Steering
    negative: Any
    empty: Any
    served: Served
    start: float
    end: float

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's OUTER_SAMPLE: what is made of the negative lives as long as this run."""
        guider = executor.class_obj
        if "middle" in guider.conds:
            raise OneStepError(
                "Dual CFG Guider has two conditions to draw, and Negative Steering cannot know which to steer: use CFG "
                "Guider or Basic Guider, or the MODEL from before Negative Steering"
            )
        options = guider.model_options["transformer_options"]
        options[KEY] = Run(unguarded=may_lack_guards(guider.model_options))
        try:
            return executor(*args, **kwargs)
        finally:
            options.pop(KEY, None)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """ComfyUI's APPLY_MODEL: x0 [B, C, ...] of latents x at sigma t [B]; plain where nothing is to be steered."""
        options = dict(transformer_options or {})
        run, flags = options.get(KEY) or Run(), options.get("cond_or_uncond") or [0]
        self._say(flags, run)
        active = self._active(executor.class_obj, x, t, run) if 0 in flags and not management.in_training else []
        if not active:
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self._refuse_mask(kwargs.get("attention_mask"))
        options[PROMPT] = c_crossattn
        call = self._call(executor.class_obj, x, c_crossattn, flags, active, run)
        context = self.served.steer(call, options)
        with self._compiled_apart(executor.class_obj, call, run, kwargs), self.served.within(call, options):
            x0 = executor(x, t, c_concat, context, control, options, **kwargs)
        if not run.reached.once:
            raise OneStepError(
                "this MODEL's attention was not reached, so the negative could not act: another patch replaces it. "
                "Take that patch away, or sample without Negative Steering"
            )
        return x0

    def _refuse_mask(self, mask: Tensor | None) -> None:
        """Of a prompt that its conditioning pads; ComfyUI's own text encoders take such padding away."""
        if mask is not None and FAMILIES[self.served.family].lengths == "masked":
            raise OneStepError(
                f"the prompt has a mask over its {mask.shape[-1]} tokens, which Negative Steering does not follow: "
                "encode it by CLIP Text Encode, which pads nothing, or sample without Negative Steering"
            )

    def _say(self, flags: list[int], run: Run) -> None:
        if any(flags) and not run.said:
            run.said = True
            logging.info(
                "OneStep: CFG is on: Negative Steering steers its positive rows, and CFG's own negative acts too"
            )

    def _active(self, model: Any, x: Tensor, t: Tensor, run: Run) -> list[Entry]:
        """The negative's entries whose timestep range, and ours, hold this sigma."""
        level = model.model_sampling.percent_to_sigma
        start = level(self.start) if self.start > 0 else None
        if not inside(t, start, level(self.end) if self.end < 1 else None):
            return []
        if id(model) not in run.entries:
            run.entries[id(model)] = self._entries(model, x, self.negative)
            run.empty[id(model)] = self._entries(model, x, self.empty) if self.steering.wants_empty else []
        return [entry for entry in run.entries[id(model)] if inside(t, *(entry.get(name) for name in RANGE))]

    def _entries(self, model: Any, x: Tensor, texts: Any) -> list[Entry]:
        """The negative, or the empty text, as the sampler prepares a condition: through the model's own extra_conds."""
        entries = comfy.sampler_helpers.convert_cond(texts)
        comfy.samplers.calculate_start_end_timesteps(model, entries)
        # the latents stand in for the picture that inpainting models ask for; only the text is used
        given = {"latent_image": x, "denoise_mask": None}
        return comfy.samplers.encode_model_conds(model.extra_conds, entries, x, x.device, "negative", **given)

    def _call(self, model: Any, x: Tensor, context: Tensor, flags: list[int], active: list[Entry], run: Run) -> Call:
        entries = (*active, *run.empty[id(model)])
        texts = [self._text(entry) for entry in entries]
        tokens = torch.cat([comfy.utils.repeat_to_batch_size(text, max(map(len, texts))) for text in texts], 1)
        tokens = management.cast_to_device(tokens, x.device, model.get_dtype_inference())
        rows = None
        if any(flags):
            rows = torch.tensor([flag == 0 for flag in flags], device=x.device).repeat_interleave(len(x) // len(flags))
        network = bare(model.diffusion_model)
        hooked = getattr(model.current_patcher, "hook_patches", None)  # weights that change between calls
        key = (id(network), *(entry["uuid"] for entry in active))
        kept: KeysValues = {} if hooked else run.keys_values.setdefault(key, {})
        parts, pooled = [text.shape[1] for text in texts], self._pooled(network, entries, x)
        behind, chunks, firsts = sum(parts[len(active) :]), len(flags), [self._first(entry) for entry in entries]
        return Call(
            *(self.steering, network, x, context, tokens, behind, parts, pooled, firsts),
            *(chunks, rows, run.reached, kept),
        )

    def _text(self, entry: Entry) -> Tensor:
        """[n, L, C] as the model has it; without padding also without what the model itself puts in front."""
        text: Tensor = entry["model_conds"]["c_crossattn"].cond
        known = FAMILIES.get(self.served.family)
        if known is not None and known.token_ids in entry and not self.steering.wants_padding:
            return text[:, : entry[known.token_ids].shape[-1]]  # zeros fill it up
        return text if self.steering.wants_padding else text[:, text.shape[1] - entry["cross_attn"].shape[1] :]

    def _first(self, entry: Entry) -> int:
        """The place of a text's first token where the model puts padding in front: a text without it stays there."""
        family = FAMILIES.get(self.served.family)
        if self.steering.wants_padding or family is None or family.lengths != "filled in front":
            return 0
        return max(0, family.tokens - int(entry[WHOLE]))

    def _pooled(self, network: Any, entries: tuple[Entry, ...], x: Tensor) -> list[Tensor]:
        """[n, P] of each text, zeros where an entry has none, as the network's own forward has it."""
        if not (self.served.pooled and self.steering.wants_pooled):
            return []
        found = [entry["model_conds"].get("y") for entry in entries]
        widths = [one.cond.shape[1] for one in found if one is not None]
        nothing = x.new_zeros(1, *widths[:1]) if widths else x.new_zeros(1, network.params.vec_in_dim)
        return [nothing if one is None else one.cond.to(x.device) for one in found]

    def _compiled_apart(self, model: Any, call: Call, run: Run, kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
        """Without guards on patches torch would run the plain network's graph, or that of another steering.

        A keyword of its own is guarded; where no keyword gets that far, this forward is not compiled. Nor is one within
        hooks, as where texts have pooled texts of their own: torch does not guard those.
        """
        if call.pooled or self.served.hooked:
            return torch.compiler.set_stance("force_eager")
        if not run.unguarded:
            return nullcontext()
        if self.served.keywords and model.diffusion_model is not call.network:
            kwargs[form_of(call)] = True
            return nullcontext()
        return torch.compiler.set_stance("force_eager")


RANGE = ("timestep_start", "timestep_end")


def inside(t: Tensor, start: float | None, end: float | None) -> bool:
    """Whether the sigma t lies in a range that begins at the noisier ``start``, as ComfyUI compares; None = open."""
    return (start is None or bool(t[0] <= start)) and (end is None or bool(t[0] >= end))


def may_lack_guards(model_options: dict[str, Any]) -> bool:
    """Whether the MODEL was compiled with options: ComfyUI's own node has its guards on patches dropped by them."""
    # torch takes its filter out of the options when it reads them, so what is left does not tell
    return (model_options.get(TORCH_COMPILE_KWARGS) or {}).get("options") is not None


def form_of(call: Call) -> str:
    """A keyword for each form of steering; networks ignore it."""
    form = repr((call.steering, call.lengths, call.firsts, call.empty, call.tokens.shape, call.rows is None))
    return f"{KEY}_{hashlib.sha256(form.encode()).hexdigest()[:16]}"
