"""The off-trajectory term of CDM (arXiv:2605.06376): from one of the student's steps its own velocity leads to any
other level, where it has never been; what it answers there is matched as well."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.denoiser import Denoiser
from ...core.sampling import jump
from ..engine.batch import Batch
from ..engine.levels import LevelSampler, UniformTime
from ..engine.student import STUDENT, Drawn
from .distribution_matching import DistributionMatching


@dataclass(frozen=True)
class OffTrajectory:
    """weight: beside the matching on the trajectory. levels: where it leads to."""

    weight: float
    levels: LevelSampler = UniformTime()

    def reached(self, denoise: Denoiser, batch: Batch, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """(x, sigma [B]) off the trajectory, without a graph."""
        sigma = self.levels(denoise.schedule, batch.uniform("off level"))
        # Eq. 7: x_t' = x_t + (t' - t) v of a flow model, which is the step of DDIM from t to t' of any other
        return jump(denoise.schedule, drawn.x.detach(), drawn.x0.detach(), drawn.sigma, sigma), sigma

    def __call__(
        self, denoise: Denoiser, batch: Batch, drawn: Drawn, objective: DistributionMatching, share: float
    ) -> None:
        """Runs backward: <D(x_t', t'), sg(G)>, with a level and noise of its own for G."""
        x, sigma = self.reached(denoise, batch, drawn)
        with denoise.roles.use(STUDENT):
            x0 = denoise(x, sigma, batch.cond)
        cotangent, _ = objective.cotangent(denoise, batch, x0, "off ")
        x0.backward(cotangent * (self.weight * share / len(batch)))
