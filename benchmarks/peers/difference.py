"""How far two sides are apart."""

from __future__ import annotations

from dataclasses import dataclass

from world import Outcome


@dataclass(frozen=True)
class Row:
    """peer, method, model: what was compared. told: how both were set. ours over theirs: of the loss, and of the
    gradient, by the best factor; apart: of the gradients, relative, as they are and after that factor."""

    peer: str
    method: str
    model: str
    told: str
    loss: float
    factor: float
    apart: float
    turned: float

    @property
    def agrees(self) -> bool:
        return max(abs(self.loss - 1), self.apart) < 1e-6

    def line(self) -> str:
        told, apart = self.told, f"{self.apart:.1e}"
        if self.agrees:
            told, apart = f"**{told}**", f"**{apart}**"
        cells = [self.peer, self.method, self.model, told, f"{self.loss:.8g}", f"{self.factor:.8g}", apart]
        return "| " + " | ".join([*cells, f"{self.turned:.1e}"]) + " |"


HEAD = (
    "| peer | method | model | set | loss, ours / theirs | gradient, ours / theirs | relative difference "
    "| after that factor |\n|---|---|---|---|---|---|---|---|"
)


def row(peer: str, method: str, model: str, told: str, ours: Outcome, theirs: Outcome, scale: float = 1.0) -> Row:
    """scale: by what ours is multiplied: an average where it is a sum."""
    assert set(ours.gradients) == set(theirs.gradients)
    mine, other = scale * ours.flat, theirs.flat
    factor = float(mine @ other / (other @ other))
    apart = float((mine - other).norm() / other.norm())
    turned = float((mine / factor - other).norm() / other.norm())
    return Row(peer, method, model, told, scale * ours.loss / theirs.loss, factor, apart, turned)
