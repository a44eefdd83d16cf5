"""Progressive distillation (arXiv:2202.00512): the student makes in one step what its teacher makes in two; then it is
the teacher, and the steps are halved again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.errors import OneStepError
from ...core.schedule import NoiseSchedule
from ..engine.batch import Batch
from ..engine.setup import Setup
from ..engine.student import STUDENT
from ..engine.turns import Phase, Plan, Turn, learning, on_data_at
from ..settings import Settings, setting
from .consistency import SourceSettings, check_source, deterministic, pictures_of
from .earlier_student import EARLIER, EarlierStudent
from .method import Method
from .trajectory import Grid, PhaseEnd, Span, Start, TeacherSteps, TwoTimes, square


@dataclass(frozen=True)
class ProgressiveSettings(SourceSettings):
    """How often steps are halved."""

    halvings: int = setting(
        4,
        "Stages of the run, in each of which the steps are halved, down to student_steps: the first teacher takes that "
        "times 2 to the power of this many.",
        1,
        8,
    )

    def check(self, run: Settings) -> None:
        super().check(run)
        if run.steps < self.halvings:
            raise OneStepError(f"steps {run.steps} are fewer than halvings {self.halvings}: give each stage an update")


def truncated_snr(schedule: NoiseSchedule, span: Span) -> Tensor:
    """max(SNR, 1) of an error in x0 (Eq. 9), for one of J, which is (alpha_s - sigma_s alpha_t / sigma_t) of it."""
    alpha, of_s = schedule.alpha(span.t), schedule.alpha(span.s)
    return (alpha / span.t).square().clamp_min(1) / (of_s - span.s * alpha / span.t).square()


def teacher_of(setup: Setup, stage: int) -> TeacherSteps:
    """The guided base, and then the student as it was, which answers as that does."""
    guidance = setup.settings.guidance if setup.denoise.guidance == "cfg" else 1.0
    return TeacherSteps(1.0, 1.0, role=EARLIER) if stage else TeacherSteps(guidance, guidance)


def times_of(setup: Setup, stage: int) -> Grid:
    """Each step of the stage, from its beginning, in two halves."""
    parts = 2 ** (setup.settings.own.halvings - stage)
    return Grid(setup.recipe, parts, PhaseEnd(setup.recipe.steps * parts // 2), stride=2, every=2)


def plan(setup: Setup) -> Plan:
    """|J(x_t, t -> t''; D) - x''|^2, x'' after two steps of the stage's teacher (Algorithm 2); as many updates in each
    stage."""
    settings, pictures, count = setup.settings, pictures_of(setup), setup.settings.own.halvings
    firsts = [settings.steps * stage // count for stage in range(count + 1)]
    earlier = EarlierStudent(setup.denoise.roles, setup.folder / "stages", firsts[:-1])

    def phase(stage: int) -> Phase:
        solve, times = teacher_of(setup, stage), times_of(setup, stage)
        halve = TwoTimes(times, solve, square, truncated_snr)

        def value(batch: Batch, start: Start, update: int) -> Tensor:
            earlier.hold(batch, update)
            return halve(setup.denoise, batch, start)

        turn = Turn(STUDENT, on_data_at(pictures, value, "consistency"), settings.learning_rate)
        name = f"{settings.method}, {setup.recipe.steps * times.parts // 2} steps"
        updates = firsts[stage + 1] - firsts[stage]
        return Phase(name, updates, [turn], learning(settings) + solve.cost(2), *pictures.fresh)

    return Plan([STUDENT], [phase(stage) for stage in range(count)])


METHOD = Method(
    name="progressive",
    title="Progressive distillation: two steps become one, again and again",
    paper="arXiv:2202.00512",
    forwards="4.7 + the picture",
    plan=plan,
    settings=ProgressiveSettings,
    recipe=deterministic,
    check=check_source,
)
