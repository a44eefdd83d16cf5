"""attention.py: what ONESTEP_ATTENTION chooses against ComfyUI's own attention of torch; relative errors of the answer
and of its gradients, and how often the chosen one was called."""

import json
import os

import torch

import onestep.nodes.attention as served

calls, plain = [], served.attention
served.attention = lambda *given: calls.append(1) or plain(*given)
found = {}
for name, reshape, mask in (
    ("tokens", False, None),
    ("heads", True, None),
    ("mask", False, torch.arange(7) < 5),
    ("rows' masks", False, (torch.arange(7) < 5).expand(2, 4, 7)),
    ("heads' masks", True, torch.randn(2, 3, 4, 7).double()),
):
    shapes = ((2, 3, 4, 6), (2, 3, 7, 6), (2, 3, 7, 6)) if reshape else ((2, 4, 18), (2, 7, 18), (2, 7, 18))
    q, k, v = (torch.randn(shape).double().requires_grad_(True) for shape in shapes)
    mask = mask.expand(4, 7) if mask is not None and mask.ndim == 1 else mask
    results = []
    for wanted in ("reference", "auto"):
        os.environ["ONESTEP_ATTENTION"] = wanted
        out = served.differentiable_attention(None, q, k, v, 3, mask=mask, skip_reshape=reshape)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
os.environ["ONESTEP_ATTENTION"] = "reference"
served.differentiable_attention(None, q, k, v, 3, skip_reshape=True, scale=0.5)
print(json.dumps({"errors": found, "calls": len(calls)}))
