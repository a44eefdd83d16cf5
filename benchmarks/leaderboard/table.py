"""The board as a page and a picture."""

from __future__ import annotations

import platform
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import mixture
import torch
from rows import every

from onestep.core.sampling import teacher_sample

MEASURES = ("kl", "kl_back", "modes", "off")
HEAD, RULE = "| {} | KL | back | modes of 16 | off | updates | forwards | seconds | MB |", "|---" * 9 + "|"


def floors(args: Any) -> dict[str, dict[str, float]]:
    """The mixture against itself, and the teacher in 50 steps and in few."""
    draws = torch.Generator().manual_seed(7)
    true = [mixture.draw(torch.full((args.samples,), prompt), draws) for prompt in range(len(mixture.PROMPTS))]
    found = {"the mixture itself": mixture.measures(true)}
    host = mixture.base(args.prediction, args.runs / f"mixture-{args.prediction}.safetensors")
    for steps in (50, 4, 2, 1):
        points = []
        for prompt in mixture.PROMPTS:
            noise = torch.randn(args.samples, 2, 1, 1, generator=draws)
            with torch.no_grad():
                x0 = teacher_sample(host.denoiser, host.texts([prompt] * args.samples), None, noise, steps, 1.0)
            points.append(x0.flatten(1))
        found[f"teacher, {steps} steps" if steps > 1 else "teacher, 1 step"] = mixture.measures(points)
    return found


def page(args: Any, rows: list[dict[str, Any]]) -> None:
    """Writes ``args.out`` and a picture of the same name."""
    lines = [
        "# The board: every method at equal network forwards",
        "",
        f"A mixture of {4 * len(mixture.PROMPTS)} Gaussians in two dimensions under {len(mixture.PROMPTS)} prompts "
        f"({args.prediction} model); {args.forwards} network forwards of a batch of {args.batch} for each run, pairs, "
        "roll-outs, critics and heads counted; one rate for all. KL: of the student from the mixture, which forgives a "
        "mode left out; back: of the mixture from the student, which does not. "
        f"{args.samples} draws of each prompt. A screening: papers train a thousand times as long.",
        "",
        f"    python benchmarks/leaderboard --forwards {args.forwards} --steps {_told(rows)} --out OUT.md",
        "",
        f"torch {torch.__version__}, {platform.machine()}, one thread.",
        "",
        HEAD.format("what"),
        RULE,
    ]
    lines += [f"| {name} | {_cells(found)} | | | | |" for name, found in floors(args).items()]
    for steps in sorted({found["steps"] for found in rows}):
        lines += ["", f"## In {steps} step{'s' * (steps > 1)}", "", HEAD.format("method"), RULE]
        lines += _of_steps([found for found in rows if found["steps"] == steps])
        done = {found["method"] for found in rows if found["steps"] == steps}
        if missing := [f"`{method}`" for method, count in every() if count == steps and method not in done]:
            lines += ["", f"Not run yet: {', '.join(missing)}."]
    args.out.write_text("\n".join(lines) + "\n")
    if rows:
        plot(rows, args.out.with_suffix(".png"))


def _told(rows: list[dict[str, Any]]) -> str:
    return " ".join(map(str, sorted({found["steps"] for found in rows})))


def _cells(found: dict[str, float]) -> str:
    return f"{found['kl']:.3f} | {found['kl_back']:.3f} | {found['modes']:g} | {found['off']:.3f}"


def _of_steps(rows: list[dict[str, Any]]) -> list[str]:
    """A line a method, best first by what both divergences sum to; seeds as mean and worst."""
    by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for found in rows:
        by_method[found["method"]].append(found)
    good = {name: some for name, some in by_method.items() if not any("failed" in found for found in some)}
    order = sorted(good, key=lambda name: statistics.mean(found["kl"] + found["kl_back"] for found in good[name]))
    lines = []
    for name in order:
        some = good[name]
        mean = {key: statistics.mean(found[key] for found in some) for key in MEASURES}
        worst = f" (worst {max(found['kl'] for found in some):.3f})" if len(some) > 1 else ""
        cells = _cells(mean).replace(" | ", worst + " | ", 1) if worst else _cells(mean)
        last = some[0]
        size = f"{last['updates']} | {last['forwards']} | {last['seconds']:.0f} | {last['peak'] / 1e6:.0f}"
        lines.append(f"| `{name}` | {cells} | {size} |")
    failed = [some[0] for name, some in by_method.items() if name not in good]
    return lines + [f"| `{found['method']}` | failed: {found['failed']} | | | | | | | |" for found in failed]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both divergences of each method, one panel for each number of steps, the best above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({found["steps"] for found in rows})
    figure, panels = pyplot.subplots(1, len(counts), figsize=(6 * len(counts), 8), squeeze=False)
    for panel, steps in zip(panels[0], counts, strict=True):
        shown = [found for found in rows if found["steps"] == steps and "failed" not in found]
        shown.sort(key=lambda found: found["kl"] + found["kl_back"], reverse=True)
        names, kl = [found["method"] for found in shown], [found["kl"] for found in shown]
        panel.barh(names, kl, label="of the student from the mixture")
        panel.barh(names, [found["kl_back"] for found in shown], left=kl, label="of the mixture from the student")
        panel.set(title=f"{steps} step{'s' * (steps > 1)}", xlabel="Kullback-Leibler divergences (nats)")
        panel.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
