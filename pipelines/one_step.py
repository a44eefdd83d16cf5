"""OneStepPipeline: text to image as a recipe says, for all families alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AnimaTextConditioner, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..core.control import ControlAdapter
from ..core.guidance import Steering
from ..core.recipe import Recipe, recipe_of
from . import acting
from .adapt import DiffusersHost, denoiser_of, network_of
from .autoencoder import VAE, factor_of
from .call_values import check_count, checked
from .control import load_control
from .fast import Fast, Mode, refuse_while_fast
from .guidance_adapter import check_guidance, read_guidance_adapter
from .injected import take_all_off
from .ip_adapter import IPAdapters, image_rows
from .kinds import kept_settings, own_parts, passed_on, pipeline_of
from .modular import made_of
from .network_inputs import Extras
from .networks import Transformer, UNet
from .noise import Generator as Generator
from .noise import Noise
from .one_step_lora import check_family, keep_on, load_lora_into
from .pictures import finished
from .plain import DiffusersSettings, diffusers_settings
from .quiet import quiet
from .saved import merged_in_writing
from .step_loras import StepLoRAs
from .steps import Callback, Called, Steps, StepState
from .switches import Switches
from .text import Embeds, PromptInput, at_guidance, beside, conditions, embeddings, negative_conditions

TEXT_PARTS = (
    *(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")),
    *("t5_tokenizer", "text_conditioner"),
)
IMAGE_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


class OneStepPipeline(StepState, Switches, IPAdapters, DiffusionPipeline):
    """Text to image in one step, or in the few that a recipe says.

    The parts are those of a family's own pipeline, of StableDiffusionPipeline's or another's (docs/diffusers.md):
    `OneStepPipeline.from_pretrained(folder)` reads their folders, `OneStepPipeline.from_pipe(pipe)` shares their parts.
    recipe: a preset's name or a recipe's JSON, saved with the pipeline; `load_one_step_lora` takes a LoRA's own.
    embedded_guidance: what Flux-dev reads, saved too; None is 3.5, 4 of FLUX.2-dev, or what the LoRA was trained at.

    A call takes:

    prompt: one or several, ``num_images_per_prompt`` pictures of each in a row; or prompt_embeds and, for SDXL, SD3 and
    Flux, pooled_prompt_embeds, as `encode_prompt` (this one's, the family's, a weighting library's) returns them.
    negative_prompt: one for all, or one for each prompt; or negative_prompt_embeds and negative_pooled_prompt_embeds.
    It acts where guidance is on, and by ``steering``.
    recipe: a Recipe or a preset's name, for this call. guidance_scale: of classifier-free guidance in the recipe's
    place, 1 none; of Flux, what it embeds. num_inference_steps: the recipe's own number, anything else is refused.
    steering, scale: how the negative prompt acts inside attention, in the same forward: "nasa", "nag", "vsf" or "perp"
    at a scale (None is the family's own), or a `Steering`. None steers nothing. "vsf" encodes the negative prompt
    without padding; negative_prompt_embeds are taken as they are. Under classifier-free guidance both act: the prompt's
    rows are steered, then guided away from the negative's own rows, which are not.
    guidance: the scale of guidance that `load_guidance_adapter`'s adapter stands in for, in the same forward, 1 (none)
    to 30; None is what it was loaded at. Under classifier-free guidance the prompt's rows alone are the adapter's.
    ip_adapter_image, ip_adapter_image_embeds: what loaded IP-Adapters draw by, as in the family's own pipeline.
    control_image: what `load_control`'s adapter draws by (edges, say), a PIL image or a tensor, for all pictures or one
    for each prompt, resized where it has another size. control_strength: 0 is none, 1 what was trained.
    cross_attention_kwargs, joint_attention_kwargs: for the attention of U-Nets and of transformers.
    height, width: in pixels; by default what the recipe was trained at, else the model's own size.
    generator, seed: where the noise comes from; a seed draws it on the CPU. latents: standard normal [B, C, h, w] noise
    to start from instead.
    callback_on_step_end: called with (pipeline, step, time, tensors) after each step; tensors holds what
    callback_on_step_end_tensor_inputs names, of `_callback_tensor_inputs`, and what it returns goes on. Set
    ``_interrupt`` to end after the step.
    output_type: "pil", "np", "pt" or "latent".
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->text_encoder_3->text_conditioner->image_encoder->unet->transformer->vae"
    )
    _optional_components = [*TEXT_PARTS, *IMAGE_PARTS, "unet", "transformer"]
    _exclude_from_cpu_offload = ["safety_checker"]

    def __init__(
        self,
        vae: VAE,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        t5_tokenizer: PreTrainedTokenizerBase | None = None,
        text_conditioner: AnimaTextConditioner | None = None,
        unet: UNet | None = None,
        transformer: Transformer | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: BaseImageProcessor | None = None,
        image_encoder: PreTrainedModel | None = None,
        recipe: str | None = None,
        embedded_guidance: float | None = None,
    ) -> None:
        super().__init__()
        texts = (text_encoder, tokenizer, text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3)
        others = (t5_tokenizer, text_conditioner, safety_checker, feature_extractor, image_encoder)
        parts: dict[str, Any] = dict(zip((*TEXT_PARTS, *IMAGE_PARTS), (*texts, *others), strict=True))
        self.register_modules(**own_parts(parts | {"unet": unet, "transformer": transformer}))
        self.register_modules(vae=vae, scheduler=scheduler)
        self.register_to_config(recipe=recipe, embedded_guidance=embedded_guidance)
        absent = (name for name, part in self.components.items() if name in IMAGE_PARTS or part is None)
        self._optional_components = list(absent)
        self.vae_scale_factor = factor_of(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._lora: str | None = None
        self._steps = StepLoRAs()
        self._control: ControlAdapter | None = None
        self._guidance: tuple[Any, float] | None = None

    @property
    def components(self) -> dict[str, Any]:
        """The parts that the family's own pipeline has, by name."""
        return {name: getattr(self, name) for name in self.config if name in self._get_signature_keys(type(self))[0]}

    @classmethod
    def from_pipe(cls, pipeline: Any, **changes: Any) -> OneStepPipeline:
        """This pipeline over a loaded one's parts; ``changes`` replace some, or settings. dtype: cast them, which the
        base class would always do."""
        dtype = changes.pop("dtype", changes.pop("torch_dtype", None))
        made = cls(**passed_on(cls, pipeline) | changes)
        made.register_to_config(**kept_settings(made, pipeline))
        return made if dtype is None else made.to(dtype=dtype)

    @property
    def recipe(self) -> Recipe:
        """How this pipeline draws. Raises OneStepError where nothing has said so."""
        return recipe_of(self.config.recipe)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        recipe: Recipe | str | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        prompt_embeds: Embeds | None = None,
        negative_prompt_embeds: Embeds | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        steering: str | Steering | None = None,
        scale: float | None = None,
        guidance: float | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        control_image: Any = None,
        control_strength: float = 1.0,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Pictures of ``prompt``, or of its embeddings; the class' own text says what each argument is."""
        keep_on(network_of(self), self._lora)
        chosen, embedded = self.begin(recipe, guidance_scale, num_inference_steps)
        positive = PromptInput("prompt", prompt, prompt_embeds, pooled_prompt_embeds)
        prompts, each = positive.count, num_images_per_prompt
        generator = checked(prompts, each, generator, seed, output_type)
        host, guided = self.host(chosen if output_type == "latent" else chosen.whole()), chosen.guidance != 1
        size = self._size(host, chosen, width, height)
        cond = at_guidance(conditions(host, positive, size), embedded).repeat(each).to(host.device)
        away = PromptInput("negative_prompt", negative_prompt, negative_prompt_embeds, negative_pooled_prompt_embeds)
        negative = negative_conditions(host, away, prompts, size, guided, steering is not None)
        null = beside(negative, cond) if guided and negative is not None else None
        images = image_rows(host, ip_adapter_image, ip_adapter_image_embeds, prompts, each, guided)
        attention = acting.attention(host.family, cross_attention_kwargs, joint_attention_kwargs)
        host.denoiser = denoiser_of(host.pipe, recipe=chosen, extras=Extras(images, attention))
        noise = Noise((len(cond), *host.latent_shape(size)), generator, host)
        start = noise.start(latents)
        control = acting.control(self, self._control, control_image, control_strength, size, (prompts, each))
        callback = Called(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        steered = acting.steering(self, host, away, negative, steering, scale, guided)
        dial = acting.dial(self, self._guidance, guidance, guided)
        with steered, dial, control, self._steps.switched(network_of(self), cond) as before:
            halves = steering is not None or self._guidance is not None
            steps = Steps(host, chosen, cond, null, callback, before, halves)
            x0 = steps.run(start, lambda step: noise(packed=True))
        pictures = finished(self, host, x0, output_type, generator, return_dict)
        self.maybe_free_model_hooks()
        return pictures

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
    ) -> tuple[Embeds, Embeds, Tensor | None, Tensor | None]:
        """(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds) of every family.

        The pooled two are None where the family reads no pooled text. Z-Image's, Qwen-Image's and Krea 2's embeddings
        are lists, [L, C] of each text, Krea 2's layers beside one another. It needs the text encoders and tokenizers
        alone, and a call with what it returns needs neither.
        """
        place, each = torch.device(device or self._execution_device), num_images_per_prompt
        prompt_embeds, pooled_prompt_embeds = embeddings(self.plain(), prompt, place, each)
        negatives = "" if negative_prompt is None else negative_prompt
        negative_prompt_embeds, negative_pooled_prompt_embeds = embeddings(
            self.plain(), negatives, place, each, negative=True
        )
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    def load_one_step_lora(
        self, path: str | Path, recipe: Recipe | str | None = None, adapter_name: str = "onestep"
    ) -> Recipe:
        """Load a LoRA and draw by its recipe, which is returned: all layers of the file act, or OneStepError is raised.

        Where each step has a file of its own, the files lie beside each other, and all of them are loaded; so are the
        students of a router's file (method msd), of which each call is drawn by the one for its prompt.
        It acts beside the LoRAs that are active, and replaces the one-step LoRA that was loaded before it. What the
        file holds for text encoders is left out, with a warning.
        recipe: for somebody else's file, which has none in its header: a preset's name or a Recipe.
        """
        refuse_while_fast(network_of(self))
        former = (*self._steps.names, *([self._lora] if self._lora else []))
        found, embedded, names, by = load_lora_into(self.plain(), Path(path).expanduser(), recipe, adapter_name, former)
        self._lora, self._steps = adapter_name, StepLoRAs(names, found.timesteps, by)
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
        refuse_while_fast(network_of(self))
        self._lora, self._steps = None, StepLoRAs()
        take_all_off(self.plain(), network_of(self))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does. The LoRAs that act on the denoiser are merged into the weights that are written, not
        into those in use; OneStepError where a text encoder has one."""
        self._steps.refuse("saving a pipeline")
        with merged_in_writing(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def fast(self, mode: Mode = "auto", decoder: Any = None, recipe: Recipe | str | None = None) -> Fast:
        """A context that draws at the card's limit, `pipelines.fast`: ``with pipe.fast() as draw: draw("a cat")``."""
        self._steps.refuse("drawing at the card's limit")
        return Fast(self, self.recipe if recipe is None else recipe_of(recipe), mode, decoder)

    def diffusers_settings(self, recipe: Recipe | str | None = None) -> DiffusersSettings:
        """What the family's own pipeline needs to draw the same; print its ``script()``."""
        recipe = self.recipe if recipe is None else recipe_of(recipe)
        self._steps.refuse("drawing in diffusers alone")
        return diffusers_settings(recipe, self.config.embedded_guidance)

    def plain(self) -> Any:
        """The family's own pipeline over these parts."""
        cls = getattr(diffusers, pipeline_of(self.components))
        made = {"requires_safety_checker": False} if "safety_checker" in self.components else {}
        with quiet():
            return made_of(cls, made | passed_on(cls, self))

    def host(self, recipe: Recipe) -> DiffusersHost:
        """The parts behind the contract, as ``recipe`` wants the network read."""
        network = network_of(self)
        check_family(recipe, network)
        plain = self.plain()
        # where parts lie apart, the network decides; under offload it lies on the CPU, or nowhere, and works elsewhere
        device = self._execution_device if network.device.type in ("cpu", "meta") else network.device
        return DiffusersHost(plain, denoiser_of(plain, recipe=recipe), device)

    def _size(self, host: DiffusersHost, recipe: Recipe, width: int | None, height: int | None) -> tuple[int, int]:
        trained = recipe.sizes[0] if recipe.sizes else host.native_size
        found = width or trained[0], height or trained[1]
        return check_count(found[0], "width"), check_count(found[1], "height")
