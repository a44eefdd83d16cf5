"""streamed.py CHECKPOINT...: answers and gradients of ComfyUI's model, resident and streamed, to be the same bits."""

import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
from delayed_link import DelayedLink, only_of_the_ring  # noqa: E402

from onestep.core.checkpoint import checkpoint_blocks, clone_inputs  # noqa: E402
from onestep.core.cond import Cond  # noqa: E402
from onestep.core.streaming import streamed  # noqa: E402
from onestep.nodes.adapt import adapted  # noqa: E402


def inputs(host):
    draw = torch.Generator().manual_seed(1)
    config = host.model.model_config.unet_config
    width = {"unet": config.get("context_dim"), "sd3": 4096, "flux": 4096}[host.family]
    pooled = None if host.family == "unet" else torch.randn(2, 2048, generator=draw)
    cond = Cond(torch.randn(2, 7, width, generator=draw), pooled=pooled)
    sigma = host.denoiser.schedule.sigma_of_time(torch.tensor([700.0, 300.0], dtype=torch.float64))
    return torch.randn(2, *host.latent_shape((64, 64)), generator=draw), sigma, cond


def passes(host, streaming):
    """Of a forward without a gradient, one of the student and one of rows of both roles with it."""
    x, sigma, cond = inputs(host)
    roles, found, link = host.denoiser.roles, [], DelayedLink()
    host.streamed = streaming
    with ExitStack() as stack:
        stack.enter_context(host.training())
        inner = streamed(host.network, host.blocks, host.device, link) if streaming else nullcontext()
        stream = stack.enter_context(inner)
        stack.enter_context(only_of_the_ring(stream) if streaming else nullcontext())
        stack.enter_context(roles.installed())
        stack.enter_context(clone_inputs(host.in_place))
        stack.enter_context(checkpoint_blocks(host.blocks, roles))
        loaded = [entry.model for entry in management.current_loaded_models]
        for _ in range(2):
            with torch.no_grad(), roles.use("teacher"):
                found.append(host.denoiser(x, sigma, cond))
            for chosen in (roles.use("student"), roles.rows([("critic", 1), ("student", 1)])):
                given = x.clone().requires_grad_()
                with chosen:
                    x0 = host.denoiser(given, sigma, cond)
                wanted = [given, *roles.parameters("student")]
                found += [x0.detach(), *torch.autograd.grad(x0.square().sum(), wanted, allow_unused=True)]
        told = {"copies": len(link.begun), "known to ComfyUI": host.patcher in loaded}
    return found, told


def same(found, wanted):
    return len(found) == len(wanted) and all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(found, wanted, strict=True)
    )


for path in sys.argv[1:]:
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(path, output_clip=False)[0]
    with adapted(model, None, None) as host:
        before = {name: value.clone() for name, value in host.network.state_dict().items()}
        roles = host.denoiser.roles
        for seed, role in enumerate(("student", "critic")):
            roles.add(role, 4, seed)
            for _, b in roles.state(role).values():
                b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
        wanted, resident = passes(host, False)
        found, ring = passes(host, True)
        after = host.network.state_dict()
        told = {"same": same(found, wanted), "blocks": len(host.blocks), "resident": resident, "ring": ring}
        told["as before"] = all(torch.equal(after[name], value) for name, value in before.items())
        told["finite"] = all(bool(value.isfinite().all()) for value in found if value is not None)
        print(json.dumps(told))
