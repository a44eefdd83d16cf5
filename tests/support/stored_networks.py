"""Inside ComfyUI: networks with random texts as hosts, and the stored values of their weights."""

import comfy.sd
import torch

from onestep.core.checkpoint import clone_inputs
from onestep.core.cond import Cond
from onestep.core.families import FAMILIES


def load(path, options=None):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(path, output_clip=False, model_options=options or {})[0]


def told(host, rows):
    draw = torch.Generator().manual_seed(1)
    known, config = FAMILIES[host.family], host.model.model_config.unet_config
    width, length = known.widths(config)[0], known.tokens if known.zeros else 7
    pooled = torch.randn(rows, 2048, generator=draw) if known.pooled else None
    return Cond(torch.randn(rows, length, width, generator=draw), pooled=pooled)


def side(host):
    """Of a picture in pixels, the least that ComfyUI places."""
    return max(64, 16 * -(-FAMILIES[host.family].least // 2))


def learnt(host):
    """D of the teacher and of a student, and the gradients of a sum over the latter."""
    roles = host.denoiser.roles
    roles.add("student", 4, 0)
    draw = torch.Generator().manual_seed(3)
    for _, b in roles.state("student").values():
        b.copy_(torch.randn(b.shape, generator=draw) * 0.1 * b.shape[1] ** -0.5)
    roles.install()
    shape = host.latent_shape((side(host), side(host)))
    x, weight = torch.randn(2, 2, *shape, generator=draw)
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([700.0, 300.0], dtype=torch.float64))
    x.requires_grad_()
    with torch.no_grad():
        teacher = host.denoiser(x, sigma, told(host, 2))
    with roles.use("student"), clone_inputs(host.in_place):
        y = host.denoiser(x, sigma, told(host, 2))
    asked = [x, *roles.parameters("student")]
    # of Qwen-Image's last block the text goes nowhere
    gradients = torch.autograd.grad((weight * y).sum(), asked, allow_unused=True, materialize_grads=True)
    return teacher, y.detach(), gradients


def weights_of(network):
    """Of each weight its numbers as they are stored."""
    weights = [m.weight for m in network.modules() if getattr(m, "weight", None) is not None]
    return [getattr(weight, "_qdata", weight).detach() for weight in weights]


def stored(network):
    """Their dtypes."""
    weights = [m.weight for m in network.modules() if getattr(m, "weight", None) is not None]
    return sorted({str(getattr(weight, "storage_dtype", weight.dtype)) for weight in weights})
