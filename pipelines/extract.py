"""A few-step checkpoint of a base, as a LoRA of that base.

The base is a host; of the few-step model the weights are read a layer at a time. What enters the layers is seen
by drawing a few prompts with the base, again for each handful of layers, so that their second moments take no more room
than two of the largest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import Denoiser
from ..core.errors import OneStepError
from ..core.extraction import Kept, extract, in_all, of_all, only_rounded, weight_of
from ..core.factors import State
from ..core.families import FAMILIES
from ..core.licence_files import sources_of
from ..core.licences import FEW_STEP, license_header, license_line
from ..core.lora_file import save_lora
from ..core.lora_second import save_second, second_file
from ..core.recipe import Recipe
from ..core.roles import TEACHER
from ..core.sampling import sample
from ..core.targets import Target
from .adapt import DiffusersHost, denoiser_of
from .few_step import FewStep
from .schedules import prediction_of

ROLE, SEED = "extracted", 0
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Extracted:
    """layers: what is kept of each, by name; whole: of all. apart: the distance of the LoRA's latents to the few-step
    model's, as a share of the base's; None where nothing was drawn. check: what loading the file back has proven.
    licences: what it was made of, in a line. beside: weights that differ and that no LoRA holds, norms and biases."""

    state: State
    layers: dict[str, Kept]
    whole: Kept
    apart: float | None
    check: str
    licences: str
    beside: int = 0


def extract_lora(
    host: DiffusersHost,
    model: str | Path,
    path: Path,
    rank: int,
    recipe: Recipe | None = None,
    prompts: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    told: dict[str, str] | None = None,
    licenses: str = "",
    tick: Tick = lambda done, of: None,
) -> Extracted:
    """Write the difference of ``model`` to ``host``'s base as a LoRA of ``rank`` to ``path``, and say what it holds.

    recipe: how the few-step model is sampled, for the file's header. prompts: seen by the layers, which whitens, and
    drawn for the distance, after which the host holds the few-step model's weights; they need a recipe. told: more
    strings for the header. licenses: of the two models, where their files do not tell (core.licences). tick: layers
    done, of all. Raises OneStepError for two models that are not of one base.
    """
    if prompts and recipe is None:
        raise OneStepError("prompts are drawn by a recipe: name the few-step model's, like --recipe dmd2-4")
    if recipe is not None and recipe.family != host.family:
        raise OneStepError(
            f"the recipe is for {recipe.family!r} models, {host.name} is {host.family!r}: choose another"
        )
    parts = [*host.made_of, (FEW_STEP, Path(model).name, Path(model))]
    made_of = sources_of(parts, licenses, FAMILIES[host.family].license)
    few, targets = FewStep(model, host.pipe), list(host.denoiser.roles.targets.values())
    check_names(few, targets, host)
    check_prediction(few, host, recipe)
    drawn = None if not prompts or recipe is None else Drawn(host, recipe, prompts, size)
    state, layers = of_all(_each(targets, few, rank, drawn, tick))
    beside = beside_layers(few, targets, host)
    text = None if recipe is None else recipe.to_json()
    about = header(host, few, in_all(layers)) | license_header(made_of) | (told or {})
    save_lora(path, state, host.family, text, about)
    check = host.check_file(path)
    if second := second_file(path, host.family, host.loader):
        check += f"; {save_second(path, second, state, host.family, text, about, host.loader)}"
    apart = None if drawn is None else drawn.apart(state, few)
    return Extracted(state, layers, in_all(layers), apart, check, license_line(made_of), beside)


def check_names(few: FewStep, targets: list[Target], host: DiffusersHost) -> None:
    """Raises OneStepError where one of the two has what the other has not."""
    missing = [target.name for target in targets if f"{target.name}.weight" not in few.names()]
    if missing:
        raise OneStepError(
            f"{few.name[:80]} lacks {len(missing)} of the {len(targets)} layers of {host.name}, the first "
            f"{missing[0]}: give two checkpoints of one base"
        )
    own = set(host.network.state_dict())
    if lacking := sorted(own - few.names()):
        raise OneStepError(f"{few.name[:80]} has no {lacking[0]}: give two whole checkpoints of one base")
    if more := sorted(few.names() - own):
        raise OneStepError(
            f"{few.name[:80]} has {len(more)} weights that {host.name} has not, the first {more[0][:80]}: give two "
            "checkpoints of one base, or take the few-step LoRA that was published beside this one"
        )


ALPHAS = ("epsilon", "v_prediction", "sample")


def check_prediction(few: FewStep, host: DiffusersHost, recipe: Recipe | None) -> None:
    """Raises OneStepError where the few-step network answers something else than the base, and no recipe says so."""
    own = prediction_of(host.pipe.scheduler)
    told = own if recipe is None or recipe.prediction is None else recipe.prediction
    if own in ALPHAS and few.prediction in ALPHAS and few.prediction not in (own, told):
        raise OneStepError(
            f"{few.name[:80]} answers {few.prediction}, and {host.name} {own}: two checkpoints of one base and one "
            "prediction type are wanted, or a --recipe that says so"
        )


def beside_layers(few: FewStep, targets: list[Target], host: DiffusersHost) -> int:
    """How many weights differ that no LoRA holds: norms, biases."""
    own = {f"{target.name}.weight" for target in targets}
    rest = ((name, value) for name, value in host.network.state_dict().items() if name not in own)
    pairs = ((value.float(), few.tensor(name).to(value.device).float()) for name, value in rest)
    return sum(not torch.equal(one, other) and not only_rounded(one, other) for one, other in pairs)


def header(host: DiffusersHost, few: FewStep, whole: Kept) -> dict[str, str]:
    shares = {"weights": whole.weights, "outputs": whole.outputs}
    told = ", ".join(f"{share:.4f} of its {name}" for name, share in shares.items() if share is not None)
    return {
        "modelspec.title": few.name[:100],
        "onestep.extracted": f"{few.name[:100]} less {host.name[:100]}, {told}",
        "onestep.base": host.base_hash,
    }


def _each(targets: list[Target], few: FewStep, rank: int, drawn: Drawn | None, tick: Tick) -> Iterator[Any]:
    done = 0
    for group in groups(targets) if drawn else [[target] for target in targets]:
        moments = drawn.moments(group) if drawn else None
        yield from extract(group, weight_of, few.weight, rank, moments)
        done += len(group)
        tick(done, len(targets))


def groups(targets: list[Target]) -> list[list[Target]]:
    """Layers whose second moments together take no more than two of the largest layer, or one layer."""
    largest = max(weight.numel() for target in targets if isinstance(weight := target.module.weight, Tensor))
    found: list[list[Target]] = []
    room = 0
    for target in targets:
        needed = target.in_features**2
        if not found or needed > room:
            found.append([])
            room = 2 * largest
        found[-1].append(target)
        room -= needed
    return found


class Drawn:
    """The prompts, as the base, the LoRA and the few-step model draw them from the same noise by the recipe."""

    def __init__(
        self, host: DiffusersHost, recipe: Recipe, prompts: Sequence[str], size: tuple[int, int] | None
    ) -> None:
        self.host, self.recipe = host, recipe
        size = size or (recipe.sizes[0] if recipe.sizes else host.native_size)
        # the base answers as it does; what is few-step, as the recipe says
        self.few = denoiser_of(host.pipe, host.denoiser.roles, recipe=recipe)
        self.cond = host.encode(list(prompts), size).to(host.device)
        self.null = host.encode([""], size, negative=True).to(host.device)
        self.shape = host.latent_shape(size)

    @torch.no_grad()
    def latents(self, denoise: Denoiser, role: str = TEACHER) -> Tensor:
        """[N, C, h, w], a picture at a time."""
        pictures = []
        for row in range(len(self.cond)):
            stream = torch.Generator().manual_seed(SEED + row)

            def fresh(step: int, stream: torch.Generator = stream) -> Tensor:
                return torch.randn(1, *self.shape, generator=stream).to(self.host.device)

            cond = self.cond[row : row + 1]
            with denoise.roles.use(role, train=False):
                pictures.append(sample(denoise, self.recipe, cond, fresh(-1), fresh, cond.null_like(self.null)))
        return torch.cat(pictures)

    def moments(self, targets: Sequence[Target]) -> dict[str, Tensor]:
        """E x x^T [in, in] of what enters each layer while the base draws, float32 on its device."""
        totals: dict[str, Tensor] = {}
        counts = dict.fromkeys((target.name for target in targets), 0)

        def watch(target: Target) -> Any:
            def see(module: Any, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().float()
                flat = x.movedim(1, -1).flatten(0, -2) if target.is_conv else x.flatten(0, -2)
                counts[target.name] += len(flat)
                # in place: no second matrix of this size
                totals.setdefault(target.name, flat.new_zeros(flat.shape[1], flat.shape[1])).addmm_(flat.T, flat)

            return target.module.register_forward_pre_hook(see)

        handles = [watch(target) for target in targets]
        try:
            self.latents(self.host.denoiser)
        finally:
            for handle in handles:
                handle.remove()
        return {name: total.div_(counts[name]) for name, total in totals.items()}

    def apart(self, state: State, few: FewStep) -> float:
        """||LoRA - few-step|| / ||base - few-step|| of the latents. The base's network becomes the few-step model's."""
        roles, network = self.host.denoiser.roles, self.host.network
        base = self.latents(self.host.denoiser)
        roles.load(ROLE, state, self.host.device)
        lora = self.latents(self.few, ROLE)
        roles.drop(ROLE)
        with torch.no_grad():
            for name, value in network.state_dict().items():
                value.copy_(few.tensor(name))
        goal = self.latents(self.few)
        return float((lora - goal).norm() / (base - goal).norm().clamp_min(torch.finfo(torch.float32).tiny))
