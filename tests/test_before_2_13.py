"""Ops that take other ways on PyTorch before 2.13, run here by importing that module in a process of its own."""

import subprocess
import sys

SCRIPT = """
import warnings
warnings.filterwarnings("ignore", message=".*[Oo]verrid")
import torch, torch_spiral, torch_spiral.ops.before_2_13
from torch.testing import assert_close

device = "spiral"
for dtype in (torch.float32, torch.bfloat16, torch.complex64):
    x = torch.randn(4, 5, 6, dtype=dtype)
    for f in (torch.var, torch.std, torch.var_mean, torch.std_mean):
        for how in ({}, {"dim": 1}, {"dim": (0, -1), "keepdim": True}, {"dim": (0, 2), "correction": 2}):
            ours, theirs = f(x.to(device), **how), f(x, **how)
            for o, t in zip(*((v if isinstance(v, tuple) else (v,)) for v in (ours, theirs))):
                assert_close(o.cpu(), t)
assert torch.zeros(0, 3, device=device).var(0).isnan().all() and torch.tensor(3.0, device=device).var().isnan()
for p in (0.0, 1.0, 2.0, 3.0, float("inf")):
    for sizes in (((4, 3), (5, 3)), ((2, 1, 4, 3), (3, 5, 3)), ((0, 3), (2, 3)), ((30, 3), (28, 3))):
        runs = []
        given = [torch.randn(s) for s in sizes]
        for d in ("cpu", device):
            a, b = (v.to(d).requires_grad_() for v in given)
            r = torch.cdist(a, b, p)
            runs.append((r, *torch.autograd.grad(r, (a, b), torch.ones_like(r))))
        for t, o in zip(*runs):
            assert_close(o.cpu(), t, atol=1e-3, rtol=1e-3)
    a = torch.randn(6, 3)
    assert_close(torch.pdist(a.to(device), p).cpu(), torch.pdist(a, p))
"""


def test_before_2_13():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
