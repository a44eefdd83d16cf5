"""Noise consistency training (NCT, arXiv:2506.19741): a control for a frozen one-step generator, without pictures.

G is the generator, C the control's extractor, f is G with the adapter. A noise and its control belong together:

    x = G(z),  c = C(x),  z_t = sqrt(1 - s_t^2) z + s_t e,  s_0 = 0, s_1 = 1,  z and e ~ N(0, I)

Each z_t is standard normal, so f may be asked at each; the further t, the less z_t knows of c. What holds at z (the
boundary, f(z, c) = x) is carried to t = 1, where the noise is any, by asking nearer noises for the same:

    L = d(f(z_t, c), sg f(z_r, c)) + lambda d(f(z, c), x),   r < t, the same e for both

Public of the paper are these terms. Ours, with what was found on the bundled model in benchmarks/results:

    r = max(0, t - 1 / N),   f(z_0, c) = x,   t ~ U(0, 1], or 0 for a share of samples

A sample at t = 0 is the boundary term, their share beta its weight: lambda = beta / (1 - beta). A run begins (N = 1) as
the regression of x on z_t and c, which teaches the control at once; then N grows (as the steps of ECT,
arXiv:2406.14548, section 3.2, shrink), and of the pictures that c allows f gives one, not their mean. What is asked for
x itself, t < 1 / N, holds the rest: with fewer of these f soon agrees with itself on nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...core.control import ControlAdapter, new_adapter, places_of
from ...core.control_copy import ControlCopy, new_copy
from ...core.controls import control_of, visible
from ...core.denoiser import Denoiser
from ...core.errors import OneStepError
from ...core.families import FAMILIES, unet_parts
from ...core.recipe import Recipe
from ...core.sampling import initial_latents
from ...core.schedule import expand
from ..data.controlled_pictures import TriplePool, Triples
from ..engine.batch import Batch
from ..engine.inputs import recipe_of_student
from ..engine.setup import Setup
from ..engine.student import STUDENT, level
from ..engine.turns import Plan, on_data, one_phase
from ..host import Host
from ..settings import Settings, need_steps, setting
from ..watch.measures import EACH
from ..watch.reference import Latents, Reference
from .method import Method, base_as_student

ROUND = 0.3


@dataclass(frozen=True)
class NoiseConsistency:
    """boundary: beta."""

    recipe: Recipe
    boundary: float = 0.1

    def __call__(self, denoise: Denoiser, batch: Batch, data: Triples) -> Tensor:
        """A sum over a sample's elements, so to say: d is of whole samples. A mean over samples."""
        own = batch.uniform("nct boundary") < self.boundary
        t = torch.where(own, 0.0, 1 - batch.uniform("nct level"))
        fresh = batch.normal("nct noise")
        later = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, t), data.control)
        # d(f(z_t, c), sg f(z_r, c))
        return distance(later, self._earlier(denoise, batch, data, fresh, t)).mean()

    @torch.no_grad()
    def _earlier(self, denoise: Denoiser, batch: Batch, data: Triples, fresh: Tensor, t: Tensor) -> Tensor:
        """f(z_r, c) for r = max(0, t - 1 / N), which is x for r = 0."""
        r = (t - 1 / data.levels).clamp_min(0)
        if not bool((r > 0).any()):
            return data.x
        found = controlled(denoise, self.recipe, batch, coupled(data.noise, fresh, r), data.control)
        return torch.where(expand(r, data.x) > 0, found, data.x)


def controlled(denoise: Denoiser, recipe: Recipe, batch: Batch, noise: Tensor, control: Tensor | None = None) -> Tensor:
    """f(noise, control) [B, ...], the frozen generator and its adapter; G(noise) where ``control`` is None."""
    sigma = level(denoise, recipe, 0, batch)
    with denoise.roles.use(STUDENT, control=control):
        return denoise(initial_latents(denoise.schedule, noise, sigma, recipe.initial_noise_scale), sigma, batch.cond)


def coupled(z: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(1 - s_t^2) z + s_t e for t [B] in [0, 1] and s_t = sin(pi t / 2): equal angles from z to e. z_0 = z
    exactly."""
    angle = math.pi / 2 * t.double()
    return expand(torch.cos(angle), z) * z + expand(torch.sin(angle), z) * e


def distance(a: Tensor, b: Tensor) -> Tensor:
    """[B] sqrt(|a - b|^2 + c^2) - c over a whole sample (arXiv:2310.14189, section 3.3), c = ROUND sqrt(numel): round
    where a and b are near. With that paper's 0.00054 it has a kink at a = b, which holds a new adapter, f = G, where it
    starts: the boundary pulls back with norm 1 from the least departure."""
    c = ROUND * math.sqrt(a[0].numel())
    return torch.sqrt((a - b).square().flatten(1).sum(1) + c**2) - c


def levels_at(update: int, total: int, first: int, last: int) -> int:
    """N of ``update``: ``first``, doubled in equal stages of the run until ``last``."""
    stages = 1 + max(0, round(math.log2(last / first)))
    return min(last, first * 2 ** (update * stages // max(total, 1)))


# -- a run ------------------------------------------------------------------------------------------------------------

COPY = "copy"
"""The form of an adapter that is a ControlNet."""
FIRST_LEVELS = 1
"""N at the start of a run."""


@dataclass(frozen=True)
class ControlSettings:
    """Of nct."""

    control: str = setting(
        "canny", "What the student is controlled by: canny, soft-edges, depth, low-resolution or mask."
    )
    control_form: str = setting(
        "light",
        "light = a small encoder of its own; copy = a ControlNet, U-Nets only: larger and slower.",
        choices=("light", COPY),
    )
    control_width: int = setting(
        0, "Channels of the adapter on its finest grid; 0 = those of the model's first layer, at most 320.", 0, 4096
    )
    noise_levels: int = setting(
        4,
        "How fine the noise levels become by a run's end: noises asked for the same are 1 / this apart; it begins with "
        "1.",
        1,
        4096,
    )
    boundary: float = setting(
        0.1, "Share of the samples that are asked for their own picture at their own noise.", 0, 1
    )

    def check(self, run: Settings) -> None:
        need_steps(run)


def check(host: Host, settings: Settings) -> None:
    """Raises OneStepError for a control that is not known, layers that are not adapted, or a generator of many
    steps."""
    control_of(settings.own.control)
    if settings.own.control_form == COPY and not FAMILIES[host.family].unet:
        raise OneStepError(f"control_form copy is a ControlNet for U-Nets, {host.name} has none: set it to light")
    places_of(host.family, host.denoiser.roles.modules.places)
    generator_recipe(host, settings)


def adapter(host: Host, settings: Settings) -> ControlAdapter | ControlCopy:
    """A new adapter of the settings' control for the host's network, that sees the noise as well. A copy is one of the
    generator, the initial LoRA included."""
    size, roles, own = settings.size_list[0], host.denoiser.roles, settings.own
    wanted, latent = (own.control, control_of(own.control).channels), host.latent_shape(size)
    if own.control_form == COPY:
        cell, factors = size[1] // latent[1], roles.state(STUDENT)
        return new_copy(roles.targets, unet_parts(host.network), wanted, cell, factors, seed=settings.seed)
    places = roles.modules.places
    return new_adapter(host.family, places, wanted, size, latent, width=own.control_width, seed=settings.seed)


def generator_recipe(host: Host, settings: Settings) -> Recipe:
    """How the generator draws: as the initial LoRA's file says; without one the base itself is the generator. Raises
    OneStepError for one of several steps."""
    what = "the initial LoRA" if settings.initial_lora else "the base"
    recipe = recipe_of_student(host, settings)
    if recipe.steps != 1 or recipe.guidance != 1 or recipe.lora_scale != 1:
        raise OneStepError(
            f"{what} draws in {recipe.steps} steps at guidance {recipe.guidance:g}, LoRA scale {recipe.lora_scale:g}: "
            "nct needs a generator of one step, without guidance and at scale 1"
        )
    return recipe


def plan(setup: Setup) -> Plan:
    """The adapter learns on triples of the frozen generator."""
    settings, own = setup.settings, setup.settings.own
    pool = TriplePool(
        setup.host,
        setup.prompts,
        settings,
        setup.folder / "triples",
        control_of(own.control),
        partial(controlled, setup.denoise, setup.recipe),
        lambda update: levels_at(update, settings.steps, FIRST_LEVELS, own.noise_levels),
    )
    consistency = NoiseConsistency(setup.recipe, own.boundary)
    # the generator's picture and its decoding, about as much again
    return one_phase(STUDENT, on_data(pool.draw, partial(consistency, setup.denoise)), settings, pool.blocks, 2.0)


def by_controls(setup: Setup) -> Reference:
    """The generator's pictures from other noises than the student's, with their controls, and what it draws from the
    student's own noise without a control."""
    host, control = setup.host, control_of(setup.settings.own.control)

    @torch.no_grad()
    def make(batch: Batch, noise: Tensor) -> Latents:
        generate = partial(controlled, host.denoiser, setup.recipe, batch)
        x = generate(batch.normal("watch control"))
        return {"x": x, "control": control(host.decode(x).cpu(), batch.samples), "plain": generate(noise)}

    def missed(host: Host, latents: Latents, x: Tensor) -> float:
        """rms between the controls of x and those that were asked for, of one picture of each prompt."""
        rows = range(0, len(x), min(EACH, len(x)))
        found = control(host.decode(x[rows]), rows)
        return float((found - latents["control"][rows]).square().mean().sqrt())

    return Reference(
        make,
        inputs=lambda latents, rows, like: {"control": latents["control"][rows].to(like)},
        missed=missed,
        above=lambda host, latents, rows: [visible(latents["control"][rows]), host.decode(latents["plain"][rows])],
    )


METHOD = Method(
    name="nct",
    title="Noise consistency training: a control for a one-step generator, as an adapter",
    paper="arXiv:2506.19741",
    forwards="2.7 + the picture",
    plan=plan,
    settings=ControlSettings,
    adapter=adapter,
    recipe=generator_recipe,
    reference=by_controls,
    check=check,
    note=base_as_student,
)
