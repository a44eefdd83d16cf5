"""Our ect, scm, meanflow and dmd2 beside FastGen's CM, sCM, MeanFlow and DMD2: its own models, built by its own
configurations, and its own functions called with the same pictures, noise and times."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from difference import Row, row
from fastgen_network import Network, model, network_of
from torch import Tensor
from world import Outcome, World, same_draws

from onestep.core.recipe import Recipe
from onestep.core.schedule import expand
from onestep.training.engine.levels import WEIGHTS
from onestep.training.engine.student import STUDENT, BackwardSimulation
from onestep.training.methods import settings_for
from onestep.training.methods.discriminator import LOSSES
from onestep.training.methods.distribution_matching import CRITIC, Scores
from onestep.training.methods.dmd import dmd
from onestep.training.methods.meanflow import MeanFlow, TwoLogits
from onestep.training.methods.near_times import NearTimes, inverse_gap, noise_ratio
from onestep.training.methods.scm import ContinuousConsistency, rotated
from onestep.training.methods.tangents import Differences, Forward, straight_on
from onestep.training.methods.trajectory import (
    Noised,
    Span,
    TeacherSteps,
    TwoTimes,
    WholeHuber,
    alike,
    same_noise,
)
from onestep.training.methods.trig_flow import TrigFlow

GUIDANCE = 3.0
losses_of: Any = importlib.import_module("fastgen.methods.common_loss")
t_to_r_sigmoid: Any = importlib.import_module("fastgen.methods.consistency_model.CM").t_to_r_sigmoid


def rows() -> Iterator[Row]:
    eps, flow = World("tiny"), World("tiny-flow")
    yield from consistency(eps, flow)
    yield from continuous(eps, flow)
    yield from mean_flow(flow)
    for world, schedule in ((eps, "alphas"), (flow, "rf")):
        yield from matching(world, schedule)
    yield from judged(eps)


def drawn(world: World, loss: Callable[[], Tensor], network: Any) -> Outcome:
    """Theirs, with the noise that ours was given as its first draw."""

    def computed() -> Tensor:
        with same_draws(world.noise):
            return loss()

    return world.theirs(network, computed)


def with_noise(world: World) -> None:
    """The world's noise becomes what `same_draws` draws."""
    with same_draws(world.noise) as noise:
        world.noise = noise
    world.batch = replace(world.batch, noise=world.noise)


# -- CM ---------------------------------------------------------------------------------------------------------------

STAGE, U = 3, torch.tensor([0.93, 0.8, 0.65, 0.5], dtype=torch.float64)


def consistency(eps: World, flow: World) -> Iterator[Row]:
    """In sigma / alpha, as EDM counts; and on a flow model in its own time."""
    with_noise(eps)
    with_noise(flow)
    width = settings_for("ect").own.distance_width
    c, ratio = width * eps.x0[0].numel() ** 0.5, 1 - 2.0 ** -(STAGE + 1)
    line = partial(row, "FastGen CM", "ect", "tiny")
    times = NearTimes(0.05, 80.0, STAGE)
    schedule = eps.denoise.schedule
    t = noise_ratio(schedule, times(schedule, eps.batch, U).t)
    training = TwoTimes(times, same_noise, WholeHuber(width), inverse_gap, between=True)
    for told, changes in (("each by its defaults", {}), ("their huber_const as ours", {"loss_config__huber_const": c})):
        theirs = model(eps, "cm", "edm", **changes)
        yield line(told, by_pairs(eps, training), pair_loss(eps, theirs, t, ratio))
    guided = replace(training, solve=TeacherSteps(GUIDANCE, GUIDANCE))
    theirs = model(eps, "cm", "edm", loss_config__use_cd=True, guidance_scale=GUIDANCE, loss_config__huber_const=c)
    told = "use_cd at guidance 3: our TwoTimes with its TeacherSteps; huber_const as ours"
    yield line(told, by_pairs(eps, guided), pair_loss(eps, theirs, t, ratio))
    line = partial(row, "FastGen CM", "ect", "tiny-flow")
    own = torch.tensor([0.9, 0.7, 0.45, 0.2], dtype=torch.float64)
    told_times: Any = lambda schedule, batch, u: Span(  # noqa: E731
        torch.stack([own, t_to_r_sigmoid(own, ratio)]), torch.zeros_like(own)
    )
    training = TwoTimes(told_times, same_noise, WholeHuber(width), inverse_gap)
    theirs = model(flow, "cm", "rf", loss_config__huber_const=c)
    told = "huber_const as ours; t and r theirs, in the flow's own time"
    yield line(told, by_pairs(flow, training), pair_loss(flow, theirs, own, ratio))
    theirs = model(flow, "cm", "rf", loss_config__huber_const=c, loss_config__weighting_ct_loss="one")
    told = "the same, unweighed: their weighting one, our weight alike"
    yield line(told, by_pairs(flow, replace(training, weight=alike)), pair_loss(flow, theirs, own, ratio))


def by_pairs(world: World, objective: TwoTimes) -> Outcome:
    return world.ours(lambda: backward(objective(world.denoise, world.batch, Noised(world.x0, world.noise, U))))


def pair_loss(world: World, theirs: Any, t: Tensor, ratio: float) -> Outcome:
    theirs.ratio = ratio

    def loss() -> Tensor:
        conds = {"condition": world.batch.cond, "neg_condition": world.nulls}
        return theirs._compute_cm_loss(theirs.net, world.x0, t, **conds)[0].mean()

    return drawn(world, loss, network_of(theirs))


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


# -- sCM --------------------------------------------------------------------------------------------------------------

WARM = 0.5
AS_OURS = {
    **{"sample_t_cfg__sigma_data": 1.0, "loss_config__prior_weighting_enabled": False},
    "loss_config__divide_x_0_spatial_dim": False,
}


def continuous(eps: World, flow: World) -> Iterator[Row]:
    for world, schedule in ((flow, "rf"), (eps, "edm")):
        line = partial(row, "FastGen sCM", "scm", world.name)
        own = settings_for("scm").own
        near = Differences(own.tangent_step, 1e-3, 1.56, rotated)
        ours = ContinuousConsistency(own.time_mean, own.time_deviation, near, GUIDANCE, 0.05, 1.5)
        tan = torch.tan(ours.angles(world.batch))
        t = tan / (1 + tan) if schedule == "rf" else tan
        cd = {"loss_config__use_cd": True, "guidance_scale": GUIDANCE}
        theirs = model(world, "scm", schedule, **cd)
        by_differences = angle_ours(world, ours)
        yield line("each by its defaults, both guided", by_differences, angle_theirs(world, theirs, t))
        exact = angle_ours(world, replace(ours, tangent=Forward(near)))
        theirs = model(world, "scm", schedule, **cd, **AS_OURS)
        told = "sigma_data 1, their weights off, tangent forward, a mean over elements"
        yield line(told, exact, angle_theirs(world, theirs, t), 1 / world.x0[0].numel())
        for step in (own.tangent_step, 1e-3):
            mine = angle_ours(world, replace(ours, tangent=replace(near, step=step)))
            told = f"the same, our tangent by differences of {step:g} t"
            yield line(told, mine, angle_theirs(world, theirs, t), 1 / world.x0[0].numel())
        theirs = model(world, "scm", schedule, **cd, **AS_OURS, loss_config__use_jvp_finite_diff=True)
        told = "the same, both by differences of 0.001 t"
        yield line(told, mine, angle_theirs(world, theirs, t), 1 / world.x0[0].numel())
        yield along_the_noising(world, theirs, ours.angles(world.batch))


def along_the_noising(world: World, theirs: Any, t: Tensor) -> Row:
    """cos(t) sin(t) dF / dt where x0 and n stay what they are, by differences on both sides."""
    cos, sin = (expand(part, world.x0) for part in (torch.cos(t), torch.sin(t)))
    x, dx = cos * world.x0 + sin * world.noise, cos * world.noise - sin * world.x0
    with torch.no_grad(), world.denoise.roles.use(STUDENT):
        flow = TrigFlow.of(world.denoise, world.x0)
        near = Differences(1e-3, 1e-3, 1.57, rotated)
        mine = cos * sin * near(lambda x, t: flow.velocity(x, t, world.batch.cond), x, t, dx)
    with torch.no_grad():
        wrapped = partial(theirs.net_trigflow, condition=world.batch.cond)
        other = theirs._estimate_jvp_finite_difference(wrapped, world.x0, world.noise, t)
    sides = [Outcome(float(part.norm()), {"tangent": part}) for part in (mine, other)]
    return row("FastGen sCM", "scm", world.name, "the tangent alone, along one picture's noising, 0.001 t", *sides)


def angle_ours(world: World, objective: ContinuousConsistency) -> Outcome:
    return world.ours(lambda: backward(objective(world.denoise, world.batch, world.x0, WARM)))


def angle_theirs(world: World, theirs: Any, t: Tensor) -> Outcome:
    half = int(WARM * theirs.loss_config.tangent_warmup_steps)
    conds = (world.batch.cond, world.nulls)
    return drawn(world, lambda: theirs._compute_scm_loss(world.x0, t, *conds, half)[0].mean(), network_of(theirs))


# -- MeanFlow ---------------------------------------------------------------------------------------------------------


def mean_flow(world: World) -> Iterator[Row]:
    line = partial(row, "FastGen MeanFlow", "meanflow", world.name)
    own = settings_for("meanflow").own
    times = TwoLogits(own.time_mean, own.time_deviation, own.picture_share, own.same_share, 0.99)
    near = Differences(own.tangent_step, 1e-3, 0.999, straight_on)
    ours = MeanFlow(times, near, GUIDANCE)
    t, r = times(world.batch)
    cd = {"loss_config__use_cd": True, "guidance_scale": GUIDANCE}
    theirs = model(world, "mean_flow", "rf", **cd)
    by_differences = means_ours(world, ours)
    yield line("each by its defaults, both guided", by_differences, means_theirs(world, theirs, t, r))
    theirs = model(world, "mean_flow", "rf", **cd, loss_config__loss_type="l2", loss_config__norm_const=1e-2)
    exact = means_ours(world, replace(ours, tangent=Forward(near)))
    told = "their loss_type l2, norm_const 0.01; tangent forward"
    yield line(told, exact, means_theirs(world, theirs, t, r))
    for step in (own.tangent_step, 1e-3):
        mine = means_ours(world, replace(ours, tangent=replace(near, step=step)))
        yield line(f"the same, our tangent by differences of {step:g} t", mine, means_theirs(world, theirs, t, r))


def means_ours(world: World, objective: MeanFlow) -> Outcome:
    return world.ours(lambda: backward(objective(world.denoise, world.batch, world.x0)))


def means_theirs(world: World, theirs: Any, t: Tensor, r: Tensor) -> Outcome:
    conds = {"condition": world.batch.cond, "neg_condition": world.nulls}
    return drawn(world, lambda: theirs._compute_mf_loss(world.x0, t, r, 0, **conds)[0].mean(), network_of(theirs))


# -- DMD2 -------------------------------------------------------------------------------------------------------------


def matching(world: World, schedule: str) -> Iterator[Row]:
    """Its student's and its critic's turn, without the discriminator."""
    denoise, batch, elements = world.denoise, world.batch, world.x0[0].numel()
    recipe = Recipe.for_student(denoise.schedule, 1, world.host.family, (), 0.9)
    simulate = BackwardSimulation(denoise, recipe)
    objective = dmd(settings_for("dmd2", matching_guidance=GUIDANCE))
    theirs = model(world, "dmd2", schedule, gan_loss_weight_gen=0.0, guidance_scale=GUIDANCE)
    theirs.fake_score = Network(world, CRITIC, schedule)
    start, level = simulate(batch), partial(own_time, denoise.schedule)
    t = level(objective._levels(denoise, objective.levels, batch, "match level"))
    asked = (start.x, level(start.sigma), t, world.noise)

    def pulled(objective: Any) -> Tensor:
        x = simulate(batch).x0
        g, scores = objective.cotangent(denoise, batch, x)
        x.backward(g / len(batch))
        # the value of 0.5 |x - sg(x - G)|^2
        return g.square().flatten(1).sum(1).mean() / 2

    def student() -> Tensor:
        data = {"real": world.x0}
        return theirs._student_update_step(*asked, data, batch.cond, world.nulls)[0]["vsd_loss"]

    line = partial(row, "FastGen DMD2", "dmd2, student", world.name)
    found = world.theirs(theirs.net.network, student)
    yield line("each by its defaults", world.ours(lambda: pulled(objective)), found)
    told = "a mean over elements (matching_scale mean)"
    yield line(told, world.ours(lambda: pulled(objective)), found, 1 / elements)
    told = "the same, our weight 1 / (mean + 1e-6), as theirs"
    yield line(told, world.ours(lambda: pulled(replace(objective, weight=as_theirs))), found, 1 / elements)

    x, line = start.x0.detach(), partial(row, "FastGen DMD2", "dmd2, critic", world.name)
    t = level(objective._levels(denoise, objective.critic_levels, batch, "critic level"))

    def critic() -> Tensor:
        found = theirs._fake_score_discriminator_update_step(*asked[:2], t, world.noise, world.x0, batch.cond)
        return found[0]["fake_score_loss"]

    theirs._setup_grad_requirements(1)
    found = world.theirs(theirs.fake_score.network, critic, CRITIC)
    default = settings_for("dmd2").own.critic_weight
    for weight in dict.fromkeys([default, "flow" if schedule == "rf" else "eps"]):
        changed = replace(objective, critic_weight=WEIGHTS[weight])
        mine = world.ours(partial(taught, changed, world, x), CRITIC)
        yield line(f"critic_weight {weight}{', our default' if weight == default else ', as theirs'}", mine, found)


def taught(objective: Any, world: World, x: Tensor) -> Tensor:
    return backward(objective.critic_loss(world.denoise, world.batch, x))


def as_theirs(schedule: Any, scores: Scores) -> Tensor:
    real = scores.real if scores.guided is None else scores.guided
    return 1 / ((scores.x - real).abs().flatten(1).mean(1) + 1e-6)


def own_time(schedule: Any, sigma: Tensor) -> Tensor:
    """FastGen's t of a level."""
    return schedule.time_of_sigma(sigma) / 1000


def judged(world: World) -> Iterator[Row]:
    """The discriminator's losses on the same logits, each its own network's."""
    loss, logits = LOSSES["softplus"], torch.randn(2, 4, 9, dtype=torch.float64)

    def outcome(losses: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        real, fake = (part.clone().requires_grad_() for part in logits)
        value = losses(real, fake)
        value.backward()
        return Outcome(float(value), {"real": real.grad, "fake": fake.grad})

    line = partial(row, "FastGen DMD2", "dmd2, head", "9 logits")
    mine = outcome(lambda real, fake: (loss.real(real) + loss.fake(fake)).mean())
    yield line("discriminator's loss", mine, outcome(lambda real, fake: losses_of.gan_loss_discriminator(real, fake)))
    mine = outcome(lambda real, fake: loss.generator(fake).mean() + 0 * real.sum())
    yield line("student's loss", mine, outcome(lambda real, fake: losses_of.gan_loss_generator(fake) + 0 * real.sum()))
