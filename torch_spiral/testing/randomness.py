"""How a random op is compared: its numbers differ from the CPU's by design, their distribution must not.

The CPU's op and the device's run REPEATS times on the same inputs, from one seed. Every element's values are ranked
together, equal ones (within rounding) sharing a rank; then the two sets of ranks must agree in location, spread,
dependence between elements and dependence between consecutive calls. That holds for any op, whatever its shape: a wrong
rate, scale, bound or mask of a dropout moves ranks, as do a stream that stands still and an element that repeats its
neighbour's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor

REPEATS = 48
# Standard errors. Seeds are fixed, so a run that passes passes again; by chance a statistic exceeds this once in 10^8.
LIMIT = 6.0
ELEMENTS = 1024  # of a result, evenly spaced: large ones don't sharpen the test further
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def drawn(results: Any) -> list[Tensor]:
    """The tensors and numbers of a result as vectors of float64 on the CPU; complex ones as pairs."""
    out = []
    for r in tree_leaves(results):
        if not isinstance(r, (Tensor, int, float, bool)):
            continue
        x = r.detach().cpu() if isinstance(r, Tensor) else torch.tensor(r)
        if x.layout != torch.strided:
            x = x.to_dense()
        x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        x = x.to(torch.float64).reshape(-1).nan_to_num(nan=-1e30, posinf=1e30, neginf=-2e30)
        out.append(x[:: max(1, x.numel() // ELEMENTS)])
    return out


def check_distribution(ours: Callable[[], Any], theirs: Callable[[], Any], rounding: float) -> None:
    """Raises AssertionError where two random functions differ: ours() and theirs() draw once each call."""
    torch.manual_seed(1)
    expected = [drawn(theirs()) for _ in range(REPEATS)]
    torch.manual_seed(1)
    found = [drawn(ours()) for _ in range(REPEATS)]
    torch.manual_seed(1)
    for again, first in zip(drawn(ours()), found[0], strict=True):
        _assert_near(again, first, rounding)
    if any(not torch.equal(a, b) for draw in expected[1:] for a, b in zip(draw, expected[0], strict=True)):
        torch.manual_seed(2)
        other = (drawn(ours()) for _ in range(REPEATS))
        assert any(
            not torch.equal(a, b) for o, f in zip(other, found, strict=True) for a, b in zip(o, f, strict=True)
        ), "another seed gives the same numbers"
    for k in range(len(expected[0])):
        compare_draws(torch.stack([f[k] for f in found]), torch.stack([e[k] for e in expected]), rounding)


def _assert_near(again: Tensor, first: Tensor, rounding: float) -> None:
    scale = float(first.abs().max()) if first.numel() else 0.0
    assert again.shape == first.shape and bool(((again - first).abs() <= rounding * scale).all()), (
        "the same seed gives other numbers"
    )


def compare_draws(ours: Tensor, theirs: Tensor, rounding: float) -> None:
    """Raises AssertionError where two samples [draws, elements] in float64 are not of one distribution."""
    if not ours.numel():
        return
    ranks = _ranks(torch.cat([ours, theirs]), rounding)
    a, b = ranks[: len(ours)], ranks[len(ours) :]
    statistics: dict[str, Callable[[Tensor], Tensor]] = {
        "location": lambda u: u.mean(1, keepdim=True),
        "spread": lambda u: (u - 0.5).square().mean(1, keepdim=True),
        "greatest": lambda u: u.amax(1, keepdim=True),
        "least": lambda u: u.amin(1, keepdim=True),
        "dependence between elements": lambda u: u.var(1, correction=0, keepdim=True),
        "dependence between neighbours": lambda u: ((u - 0.5) * (u.roll(1, 1) - 0.5)).mean(1, keepdim=True),
        "dependence between draws": lambda u: ((u[1:] - 0.5) * (u[:-1] - 0.5)).mean(1, keepdim=True),
        "location of an element": lambda u: u,
    }
    for name, statistic in statistics.items():
        x, y = statistic(a), statistic(b)
        error = ((x.var(0) + y.var(0)) / len(x) + 1e-9).sqrt()
        score = float(((x.mean(0) - y.mean(0)).abs() / error).max())
        assert score <= LIMIT, f"another distribution than the CPU's: {name} is {score:.1f} standard errors away"


def _ranks(values: Tensor, rounding: float) -> Tensor:
    """Ranks in (0, 1) along dim 0; values that rounding may have parted share their mean rank."""
    n = len(values)
    ordered, order = values.sort(0)
    sane = ordered.abs() < 1e29
    size = torch.where(sane, ordered.abs(), 0.0).amax(0)
    tolerance = rounding * (size + 0.1 * size.mean()) + 1e-12  # where terms cancel, errors are of the terms' size
    new = torch.zeros_like(ordered, dtype=torch.int64)
    new[1:] = (ordered.diff(dim=0) > tolerance).long()
    group = new.cumsum(0)
    sizes = torch.zeros_like(ordered).scatter_add_(0, group, torch.ones_like(ordered))
    middle = sizes.cumsum(0) - sizes / 2
    return torch.empty_like(ordered).scatter_(0, order, middle.gather(0, group) / n)


def check_gradient(
    outputs: Callable[[Any], tuple[list[Tensor], list[Tensor]]],
    gradients: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    given: Callable[[], Any],
) -> None:
    """Raises AssertionError where the backward pass draws other numbers than the forward pass: the slope along a random
    direction, from outputs of the same seed, must be the gradient's.

    outputs(tree) gives differentiable results and leaves, given() a fresh tree of arguments.
    """

    def along(step: float) -> tuple[list[Tensor], list[Tensor]]:
        tree = given()
        generator = torch.Generator().manual_seed(3)
        directions = []
        for x in (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.requires_grad):
            v = torch.randn(x.shape, dtype=x.dtype, generator=generator)
            directions.append(v)
            with torch.no_grad():
                x.add_(v.to(x.device), alpha=step)
        torch.manual_seed(5)
        outs, leaves = outputs(tree)
        if step:
            return [o.detach().cpu().double() for o in outs], directions
        return [g.detach().cpu().double() for g in gradients(outs, leaves)], directions

    step = 2.0**-10
    grads, directions = along(0.0)
    high, low = along(step)[0], along(-step)[0]
    generator = torch.Generator().manual_seed(1)  # the cotangents of checks.gradients
    slope = noise = 0.0
    for h, w in zip(high, low, strict=True):
        c = torch.randn(h.shape, dtype=torch.float64, generator=generator)
        slope += float((c * (h - w)).sum()) / (2 * step)
        noise += float((c * h).square().sum()) ** 0.5 * 2e-7 / step
    terms = [g * v.double() for g, v in zip(grads, directions, strict=True)]
    found, norm = sum(float(t.sum()) for t in terms), sum(float(t.square().sum()) for t in terms) ** 0.5
    assert abs(found - slope) <= 0.15 * norm + 4 * noise + 1e-4, (
        f"the gradient is not the function's of the same seed: slope {slope:.4g}, gradient {found:.4g}, norm {norm:.4g}"
    )
