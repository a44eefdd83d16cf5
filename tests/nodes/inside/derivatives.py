"""derivatives.py CHECKPOINT...: <gradient, direction> of D against finite differences, float64."""

import json
import sys

import comfy.sd
import torch

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs
from onestep.core.cond import Cond
from onestep.core.gates import gated_layers
from onestep.core.recomputed import BLOCKS, FEED_FORWARDS, NOTHING, recomputed
from onestep.nodes.adapt import adapted

as_float = torch.Tensor.float
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # fourth order: the error falls with h^4
STEP = 2e-3


def double(host):
    """ComfyUI casts to float32 at its borders: within this process float64 stays float64, and so do the weights."""
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else as_float(self)
    host.network.double()
    host.network.dtype, host.model.manual_cast_dtype = torch.float64, None
    for module in host.network.modules():
        if type(module).__name__ == "EmbedND":
            module.register_forward_hook(lambda module, given, positions: positions.double())


def inputs(host):
    """A batch of two, at a noisy and at a cleaner level."""
    draw = torch.Generator().manual_seed(1)
    config = host.model.model_config.unet_config
    width = {"unet": config.get("context_dim"), "sd3": 4096, "flux": 4096}[host.family]
    pooled = None if host.family == "unet" else torch.randn(2, 2048, generator=draw, dtype=torch.float64)
    shape = host.latent_shape((64, 64))
    x = torch.randn(2, *shape, generator=draw, dtype=torch.float64)
    cond = Cond(torch.randn(2, 7, width, generator=draw, dtype=torch.float64), pooled=pooled)
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([700.0, 300.0], dtype=torch.float64))
    return x, sigma, cond, torch.randn(2, *shape, generator=draw, dtype=torch.float64)


def measured(host, grade):
    """Relative errors of the derivative along the adapters and along x, and the gradients."""
    roles = host.denoiser.roles
    x, sigma, cond, weight = inputs(host)
    factors = roles.parameters("student")
    draw = torch.Generator().manual_seed(2)
    along = [torch.randn(f.shape, generator=draw, dtype=torch.float64) * f.detach().std() for f in factors]
    along_x = torch.randn(x.shape, generator=draw, dtype=torch.float64)

    def value(given):
        with roles.use("student"):
            return (weight * host.denoiser(given, sigma, cond)).sum()

    def slope(move):
        total = 0.0
        for k, share in STENCIL.items():
            move(k * STEP)
            with torch.no_grad():
                total += share * float(value(x)) / STEP
            move(-k * STEP)
        return total

    def move_factors(step):
        for factor, direction in zip(factors, along, strict=True):
            factor.data.add_(direction, alpha=step)

    x.requires_grad_(True)
    with clone_inputs(host.in_place), checkpoint_blocks(recomputed(host.blocks, grade), roles):
        gradients = torch.autograd.grad(value(x), [*factors, x])
    x.requires_grad_(False)
    analytic = (
        sum(float((g * v).sum()) for g, v in zip(gradients, along, strict=False)),
        float((gradients[-1] * along_x).sum()),
    )
    before = [factor.detach().clone() for factor in factors]
    numeric = slope(move_factors), slope(lambda step: x.add_(along_x, alpha=step))
    for factor, value_before in zip(factors, before, strict=True):  # to the bit: there and back is not
        factor.data.copy_(value_before)
    errors = [abs(a - n) / abs(n) for a, n in zip(analytic, numeric, strict=True)]
    return errors, gradients


for path in sys.argv[1:]:
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(path, output_clip=False)[0]
    with adapted(model, None, None) as host, host.training():
        double(host)
        roles = host.denoiser.roles
        roles.add("student", 4, 0)
        draw = torch.Generator().manual_seed(3)
        for a, b in roles._factors["student"].values():
            a.data = a.data.double()
            b.data = torch.randn(b.shape, generator=draw, dtype=torch.float64) * 0.3 * b.shape[1] ** -0.5
        roles.install()
        plain, expected = measured(host, NOTHING)
        found = {grade: measured(host, grade) for grade in (FEED_FORWARDS, BLOCKS)}
        apart = {
            grade: [i for i, (g, e) in enumerate(zip(given, expected, strict=True)) if not torch.equal(g, e)]
            for grade, (_, given) in found.items()
        }
        with gated_layers(host.network) as gates:
            gated, given = measured(host, BLOCKS)
        pairs = zip(given, expected, strict=True)
        off = max(float((g - e).abs().max() / e.abs().max().clamp_min(1e-30)) for g, e in pairs)
        inner = [type(module).__name__ for module in recomputed(host.blocks, FEED_FORWARDS)]
        owners = [name for name in sorted(roles.targets) for _ in "ab"]
        missing = sorted({name for name, g in zip(owners, expected, strict=False) if float(g.abs().max()) == 0})
        told = {
            "family": host.family,
            "plain": plain,
            "checkpointed": found[BLOCKS][0],
            "apart": apart,
            "gates": gates,
            "gated": gated,
            "gated_apart": off,
            "missing": missing,
        }
        print(json.dumps(told | {"feed_forwards": inner, "blocks": len(host.blocks), "factors": len(expected) - 1}))
        torch.Tensor.float = as_float
