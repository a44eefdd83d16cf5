"""Graphics cards by name, by size, and as found: what tensors may take of their memory, and how fast they can be."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...core.errors import OneStepError

GIB = 2**30
OF_FLOPS, OF_BANDWIDTH = 0.7, 0.8
"""What a good kernel reaches of a data sheet's figures."""
ORDINARY = GIB
"""Of a card, that CUDA's own and a desktop have: it is reckoned with everywhere."""


@dataclass(frozen=True)
class Card:
    """size: bytes. half, single: TFLOP/s of dense products in 16 and 32 bits, summed in 32. bandwidth: GB/s. By the
    makers' data sheets. taken: bytes that other programs have of it."""

    name: str
    size: int
    half: float
    single: float
    bandwidth: float
    taken: int = 0

    @property
    def usable(self) -> int:
        """Bytes that tensors may take: the rest is CUDA's own, its libraries' workspaces, holes between tensors, and
        other programs', of which the desktop's are a little on every card."""
        more = max(0, self.taken - ORDINARY)
        return max(0, int(0.9 * (self.size - more) - 0.7 * GIB))

    @property
    def crowded(self) -> str:
        """A sentence where other programs have more of it than is usual; else nothing."""
        if self.taken <= ORDINARY:
            return ""
        return f"Other programs have {self.taken / GIB:.1f} GiB of the card: close them, and there is more room."

    def seconds(self, flops: int, moved: int, width: int) -> float:
        """The least time of an operation: of its arithmetic or of its bytes, whichever is more (a roofline).
        width: bytes of a number."""
        rate = self.half if width <= 2 else self.single
        return max(flops / (OF_FLOPS * rate * 1e12), moved / (OF_BANDWIDTH * self.bandwidth * 1e9))


def _card(name: str, gib: int, half: float, single: float, bandwidth: float) -> Card:
    return Card(name, gib * GIB, half, single, bandwidth)


CARDS = (
    _card("RTX 2060", 6, 26, 6.5, 336),
    _card("RTX 2070", 8, 30, 7.5, 448),
    _card("RTX 2080 Ti", 11, 54, 13.4, 616),
    _card("RTX 3060", 12, 25.5, 12.7, 360),
    _card("RTX 3060 Ti", 8, 32.4, 16.2, 448),
    _card("RTX 3070", 8, 40.6, 20.3, 448),
    _card("RTX 3080", 10, 59.5, 29.8, 760),
    _card("RTX 3090", 24, 71, 35.6, 936),
    _card("RTX 4060", 8, 30.2, 15.1, 272),
    _card("RTX 4060 Ti", 16, 44.1, 22.1, 288),
    _card("RTX 4070", 12, 58.3, 29.1, 504),
    _card("RTX 4070 Ti", 12, 80.2, 40.1, 504),
    _card("RTX 4070 Ti SUPER", 16, 88.2, 44.1, 672),
    _card("RTX 4080", 16, 97.5, 48.7, 717),
    _card("RTX 4090", 24, 165, 82.6, 1008),
    _card("RTX 5060 Ti", 16, 47.4, 23.7, 448),
    _card("RTX 5070", 12, 61.7, 30.9, 672),
    _card("RTX 5070 Ti", 16, 87.9, 43.9, 896),
    _card("RTX 5080", 16, 112.6, 56.3, 960),
    _card("RTX 5090", 32, 209.5, 104.8, 1792),
    _card("T4", 16, 65, 8.1, 320),
    _card("L4", 24, 121, 30.3, 300),
    _card("A10", 24, 125, 31.2, 600),
    _card("RTX A6000", 48, 154.8, 38.7, 768),
    _card("L40S", 48, 362, 91.6, 864),
    _card("A100", 80, 312, 19.5, 2039),
    _card("H100", 80, 989, 66.9, 3350),
    _card("H200", 141, 989, 66.9, 4800),
)
# whose speed a size stands for
TYPICAL = {8: "RTX 4060", 12: "RTX 3060", 16: "RTX 4060 Ti", 24: "RTX 3090", 32: "RTX 5090", 48: "RTX A6000"}


def card_of(text: str) -> Card:
    """The card of a name ("RTX 3060", "4090") or of a size ("12GB"). Raises OneStepError for neither."""
    text = " ".join(text.split())
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)\s*", text, re.IGNORECASE)
    if size is not None:
        return _of_size(float(size[1]), text)
    wanted = _plain(text)
    found = [card for card in CARDS if wanted and _plain(card.name).endswith(wanted)]
    if len(found) != 1:
        raise OneStepError(
            f"no card {text[:40]!r} is known here: give a size, like 12GB, or one of {', '.join(c.name for c in CARDS)}"
        )
    return found[0]


def found_card(device: torch.device | None = None) -> Card | None:
    """The card that is here; None where there is none."""
    if not torch.cuda.is_available():
        return None
    name, size = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    alike = [card for card in CARDS if _plain(name).endswith(_plain(card.name))]
    like = alike[-1] if alike else _of_size(size / GIB, name)
    free = torch.cuda.mem_get_info(device)[0]
    taken = size - free - torch.cuda.memory_reserved(device)
    return Card(name, size, like.half, like.single, like.bandwidth, max(0, taken))


def _of_size(gib: float, text: str) -> Card:
    if not 1 <= gib <= 1024:
        raise OneStepError(f"a card of {text.strip()[:20]} is none: give its memory, like 12GB")
    near = min(TYPICAL, key=lambda known: (abs(known - gib), known))
    like = next(card for card in CARDS if card.name == TYPICAL[near])
    return Card(f"{gib:g} GB, as fast as an {like.name}", int(gib * GIB), like.half, like.single, like.bandwidth)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
