"""OneStepPipeline: text to image as a recipe says, for U-Nets, SD3 and Flux alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.cond import Cond
from ..core.control import ControlAdapter
from ..core.errors import OneStepError
from ..core.guidance import MODES, Steering
from ..core.presets import recipe_of
from ..core.recipe import Recipe
from ..core.sampling import sample
from .adapt import DiffusersHost, denoiser_of, network_of
from .call_values import check_count, check_latents, checked, texts_of
from .control import control_picture, controlled, load_control
from .guidance_adapter import GuidanceDial, check_guidance, read_guidance_adapter
from .load import class_for
from .noise import Generator as Generator
from .noise import Noise
from .one_step_lora import check_family, load_lora_into
from .own_guidance import Rows
from .plain import DiffusersSettings, diffusers_settings
from .quiet import quiet
from .steer import steered, steering_of

TEXT_PARTS = tuple(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))


class OneStepPipeline(DiffusionPipeline):
    """Text to image in one step, or in the few that a recipe says.

    The parts are those of StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline or FluxPipeline:
    `OneStepPipeline.from_pretrained(folder)` reads their folders, `OneStepPipeline.from_pipe(pipe)` shares their parts.
    recipe: a preset's name or a recipe's JSON, saved with the pipeline; `load_one_step_lora` takes a LoRA's own.
    embedded_guidance: what Flux-dev is told, saved too; None is 3.5, or what the LoRA was trained at.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = [*TEXT_PARTS, "unet", "transformer"]

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        unet: UNet2DConditionModel | None = None,
        transformer: SD3Transformer2DModel | FluxTransformer2DModel | None = None,
        recipe: str | None = None,
        embedded_guidance: float | None = None,
    ) -> None:
        super().__init__()
        texts = (text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3)
        self.register_modules(vae=vae, scheduler=scheduler, unet=unet, transformer=transformer)
        self.register_modules(**dict(zip(TEXT_PARTS, texts, strict=True)))
        self.register_to_config(recipe=recipe, embedded_guidance=embedded_guidance)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self._control: ControlAdapter | None = None
        self._guidance: tuple[Any, float] | None = None
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pipe(cls, pipeline: Any, **parts: Any) -> OneStepPipeline:
        """This pipeline over a loaded one's parts, which the base class would cast; ``parts`` replace some."""
        wanted = cls._get_signature_keys(cls)[0]
        return cls(**{name: part for name, part in pipeline.components.items() if name in wanted} | parts)

    @property
    def recipe(self) -> Recipe:
        """How this pipeline draws. Raises OneStepError where nothing has said so."""
        return recipe_of(self.config.recipe)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        recipe: Recipe | str | None = None,
        negative_prompt: str | Sequence[str] = "",
        steering: str | Steering | None = None,
        scale: float | None = None,
        guidance: float | None = None,
        control_image: Any = None,
        control_strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of ``prompt``, ``num_images_per_prompt`` of each in a row.

        recipe: a Recipe or a preset's name, for this call. negative_prompt: for all pictures, or one for each prompt;
        it acts where the recipe's guidance is not 1, and by ``steering``.
        steering, scale: how the negative prompt acts inside attention, in the same forward: "nasa", "nag", "vsf" or
        "perp" at a scale (None is a safe one for the family), or a `Steering`. None steers nothing. Where the recipe's
        guidance is not 1 both act: the prompt's rows are steered, then guided away from the negative's own rows, which
        are not.
        guidance: the scale of guidance that `load_guidance_adapter`'s adapter stands in for, in the same forward, 1
        (none) to 30; None is what it was loaded at. Where the recipe's is not 1 both act: the prompt's rows alone are
        the adapter's.
        control_image: what `load_control`'s adapter draws by (edges, say), a PIL image or a tensor, for all pictures or
        one for each prompt, resized where it has another size. control_strength: 0 is none, 1 what was trained.
        height, width: in pixels; by default what the recipe was trained at, else the model's own size.
        generator, seed: where the noise comes from; a seed draws it on the CPU. latents: standard normal [B, C, h, w]
        noise to start from instead.
        output_type: "pil", "np", "pt" or "latent".
        """
        recipe = self.recipe if recipe is None else recipe_of(recipe)
        prompts, generator = checked(prompt, num_images_per_prompt, generator, seed, output_type)
        host = self.host(recipe)
        size = self._size(host, recipe, width, height)
        cond = self._told(host.encode(prompts, size)).repeat(num_images_per_prompt).to(host.device)
        guided = recipe.guidance != 1
        negative = self._negative(host, negative_prompt, prompts, size) if guided or steering is not None else None
        if negative_prompt and negative is None:
            logging.warning('OneStep: the negative prompt does nothing at guidance 1: give steering too, "nag" for one')
        null = _beside(negative, cond) if guided and negative is not None else None
        shape = (len(cond), *host.latent_shape(size))
        noise = Noise(shape, generator, host)
        start = noise() if latents is None else check_latents(latents, shape).to(host.device, torch.float32)
        control = self._controlled(control_image, control_strength, size, len(prompts), num_images_per_prompt)
        measured = steering is not None and steering_of(steering, scale, host.family).wants_empty
        empty = host.encode([""], size).text if measured else None
        with self._steered(negative, guided, steering, scale, empty), self._adapted(guidance, guided), control:
            x0 = sample(host.denoiser, recipe, cond, start, lambda step: noise(packed=True), null)
        pictures = x0 if output_type == "latent" else self._pictures(host.decode(x0), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def load_one_step_lora(
        self, path: str | Path, recipe: Recipe | str | None = None, adapter_name: str = "onestep"
    ) -> Recipe:
        """Load a LoRA by the family's own `load_lora_weights` and draw by its recipe, which is returned.

        recipe: for somebody else's file, which has none in its header: a preset's name or a Recipe.
        """
        found, embedded = load_lora_into(self.plain(), Path(path).expanduser(), recipe, adapter_name)
        self.register_to_config(recipe=found.to_json(), embedded_guidance=embedded)
        return found

    def load_control(self, path: str | Path | None) -> None:
        """Draw by a control adapter's file where a call has a ``control_image``; None takes it off again."""
        self._control = None if path is None else load_control(path, self)

    def load_guidance_adapter(self, path: str | Path | None, guidance: float = 4.0) -> None:
        """Draw under a guidance adapter's file, at ``guidance`` where a call says none; None takes it off again."""
        usual = check_guidance(guidance)
        self._guidance = None if path is None else (read_guidance_adapter(self, path), usual)

    def unload_lora_weights(self) -> None:
        """Take all LoRAs off again."""
        self.plain().unload_lora_weights()

    def diffusers_settings(self, recipe: Recipe | str | None = None) -> DiffusersSettings:
        """What the family's own pipeline needs to draw the same; print its ``script()``."""
        recipe = self.recipe if recipe is None else recipe_of(recipe)
        return diffusers_settings(recipe, self.config.embedded_guidance)

    def plain(self) -> Any:
        """The family's own pipeline over these parts."""
        parts = {name: part for name, part in self.components.items() if part is not None}
        index = {name: ["", type(part).__name__] for name, part in parts.items()}
        cls = getattr(diffusers, class_for(index))
        wanted = cls._get_signature_keys(cls)[0]
        flags = {"requires_safety_checker": False} if "safety_checker" in wanted else {}
        with quiet():
            return cls(**{name: parts.get(name) for name in wanted}, **flags)

    def host(self, recipe: Recipe) -> DiffusersHost:
        """The parts behind the contract, as ``recipe`` wants the network read."""
        network = network_of(self)
        check_family(recipe, network)
        plain = self.plain()
        # where parts lie apart, the network decides; under CPU offload it lies on the CPU and works elsewhere
        device = self._execution_device if network.device.type == "cpu" else network.device
        return DiffusersHost(plain, denoiser_of(plain, prediction=recipe.prediction), device)

    def _told(self, cond: Cond) -> Cond:
        """``cond``, whose embedded guidance, where it has one, is this pipeline's."""
        if cond.guidance is None or self.config.embedded_guidance is None:
            return cond
        return cond.with_(guidance=torch.full((len(cond),), float(self.config.embedded_guidance)))

    def _negative(self, host: DiffusersHost, negative: Any, prompts: list[str], size: tuple[int, int]) -> Cond:
        """The conditions of one negative prompt for all, or of one for each."""
        texts = texts_of("" if negative is None else negative, "negative_prompt")
        if len(texts) not in (1, len(prompts)):
            raise OneStepError(
                f"there are {len(texts)} negative prompts for {len(prompts)} prompts: give one, or as many"
            )
        return host.encode(texts, size).to(host.device)

    def _steered(
        self, negative: Cond | None, guided: bool, steering: Any, scale: float | None, empty: Tensor | None
    ) -> AbstractContextManager[None]:
        if steering is not None and negative is not None:
            # nothing of the network changes within a call, and `guided` puts the prompt's rows first
            rows: Rows = "first half" if guided else "all"
            return steered(self, negative.text, steering, scale=scale, rows=rows, cache=True, empty=empty)
        if scale is not None:
            raise OneStepError(f"scale is {scale!r:.20}, and nothing is steered: give steering too, {', '.join(MODES)}")
        return nullcontext()

    def _adapted(self, guidance: float | None, guided: bool) -> AbstractContextManager[Any]:
        if self._guidance is not None:
            side, usual = self._guidance
            return GuidanceDial(self, side, usual if guidance is None else guidance, "first half" if guided else "all")
        if guidance is not None:
            raise OneStepError(
                f"guidance is {guidance!r:.20}, and no adapter has it: call load_guidance_adapter(path) first"
            )
        return nullcontext()

    def _controlled(
        self, images: Any, strength: float, size: tuple[int, int], prompts: int, each: int
    ) -> AbstractContextManager[None]:
        if images is None:
            return nullcontext()
        if self._control is None:
            raise OneStepError("there is a control_image, and nothing to draw by it: call load_control(path) first")
        control = control_picture(self._control, images, size)
        if len(control) not in (1, prompts):
            raise OneStepError(f"there are {len(control)} control images for {prompts} prompts: give one, or as many")
        control = control if len(control) == 1 else control.repeat_interleave(each, 0)
        return controlled(self, self._control, control, strength=strength)

    def _size(self, host: DiffusersHost, recipe: Recipe, width: int | None, height: int | None) -> tuple[int, int]:
        trained = recipe.sizes[0] if recipe.sizes else host.native_size
        found = width or trained[0], height or trained[1]
        return check_count(found[0], "width"), check_count(found[1], "height")

    def _pictures(self, pictures: Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(pictures, output_type, do_denormalize=[False] * len(pictures))


def _beside(null: Cond, cond: Cond) -> Cond:
    """``null``, of one prompt or of as many, for each sample of ``cond`` in its order, at its sizes and guidance."""
    return null.repeat(len(cond) // len(null)).with_(size=cond.size, guidance=cond.guidance)
